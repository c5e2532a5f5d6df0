"""Laws of checkpoints: what is saved comes back to the bit, and nothing else is ever loaded."""

import pytest
import torch

from perturbray.training import checkpoint

STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "sums": torch.ones(2, dtype=torch.float64) / 3},
    "generator": torch.get_rng_state(),
    "progress": {"epoch": 3, "best_loss": float("inf"), "history": [{"epoch": 1, "lr": 1e-3}]},
}


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


def test_a_state_comes_back_to_the_bit(tmp_path):
    checkpoint.save(tmp_path, STATE)
    found = checkpoint.load(tmp_path)
    assert found["progress"] == STATE["progress"]
    for name, tensor in STATE["model"].items():
        assert torch.equal(found["model"][name], tensor)
        assert found["model"][name].dtype == tensor.dtype
    assert torch.equal(found["generator"], STATE["generator"])


def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path, capsys):
    checkpoint.save(tmp_path, {"model": Code()})
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load(tmp_path)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_checkpoint_that_was_cut_off_is_refused(tmp_path, share):
    checkpoint.save(tmp_path, STATE)
    place = tmp_path / checkpoint.NAME
    place.write_bytes(place.read_bytes()[: int(share * place.stat().st_size)])
    with pytest.raises((RuntimeError, EOFError, OSError)):
        checkpoint.load(tmp_path)


def test_a_missing_checkpoint_is_refused_by_its_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=checkpoint.NAME):
        checkpoint.load(tmp_path)


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, STATE)
    before = (tmp_path / checkpoint.NAME).read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, {})
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_a_new_save_replaces_the_old_and_leaves_no_other_file(tmp_path):
    checkpoint.save(tmp_path, STATE)
    checkpoint.save(tmp_path, {"progress": {"epoch": 4}})
    assert checkpoint.load(tmp_path) == {"progress": {"epoch": 4}}
    assert [place.name for place in tmp_path.iterdir()] == [checkpoint.NAME]
