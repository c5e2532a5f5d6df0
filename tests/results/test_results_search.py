"""What the page says of a search, against searches whose truth is drawn here."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
from fake_sweep import fake_sweep

from perturbray.results import ledger
from perturbray.results import search as page
from perturbray.results.report import write_report
from perturbray.space import Choice, LogUniform, QUniform, When

SPACE = {
    "model.width": Choice(64, 128, 256),
    "training.lr": LogUniform(1e-4, 1e-2),
    "model.dropout": QUniform(0.0, 0.4, 0.1),
    "model.kind": Choice("a", "b"),
    "model.weight": When("model.kind", "b", LogUniform(0.1, 10)),
}


@dataclass
class Fake:
    """A search as a folder of records: the objective falls with the logarithm of the rate, and has noise."""

    trials: int = 60
    noise: float = 0.3
    seed: int = 0

    def records(self) -> list[dict]:
        rng, found = np.random.default_rng(self.seed), []
        for number in range(self.trials):
            values = {path: part.sample(rng) for path, part in SPACE.items() if not isinstance(part, When)}
            if values["model.kind"] == "b":
                values["model.weight"] = SPACE["model.weight"].then.sample(rng)
            objective = 1.0 - 0.5 * np.log10(values["training.lr"] / 1e-4) + self.noise * rng.normal()
            state = "failed" if number % 20 == 7 else "stopped" if number % 3 else "finished"
            record = {"number": number, "key": f"{number:016x}", "values": values, "way": "tpe", "state": state}
            record |= {
                "reason": "DivergedError: the loss is <nan>" if state == "failed" else "",
                "started": f"{number:04d}",
            }
            record |= {"epochs": {"finished": 30, "stopped": 2, "failed": 1}[state], "seconds": 3.0, "history": []}
            found.append(record if state == "failed" else record | {"objective": float(objective)})
        return found

    def write(self, folder, **header) -> None:
        place = folder / ledger.FOLDER / "latent_additive-0123"
        place.mkdir(parents=True)
        for record in self.records():
            ledger.write_record(place, record)
        space = {path: ledger.describe(part) for path, part in SPACE.items()}
        ledger.write_header(
            place, {"model": "latent_additive", "objective": "rmse/average", "way": "tpe", "space": space, **header}
        )


@pytest.fixture
def learnt(tmp_path):
    Fake().write(tmp_path, borders={"training.lr": "high"})
    (found,) = ledger.read_searches(tmp_path)
    return found


def test_what_decides_is_important_and_what_does_not_is_like_chance(learnt):
    found = page.importance(learnt).set_index("hyperparameter")
    assert found.index[0] == "training.lr"
    assert found.loc["training.lr", "share"] > 0.4 > found.loc["training.lr", "chance"]
    assert set(found.index) == set(SPACE)
    assert found.loc["model.weight", "trials"] < found.loc["model.kind", "trials"], (
        "where it does not count it is not there"
    )


def test_without_any_effect_importance_is_at_chance_one_time_in_twenty(tmp_path):
    above, shares = [], []
    for seed in range(12):
        Fake(noise=1e6, seed=seed).write(tmp_path / str(seed))
        (found,) = ledger.read_searches(tmp_path / str(seed))
        shown = page.importance(found)
        above += list(shown["share"] > shown["chance"])
        shares += list(shown["share"])
    assert np.mean(above) < 0.15
    assert abs(np.mean(shares)) < 0.02, "adjusted: 0 on average where there is nothing"


def test_what_stopping_saved_is_counted_in_epochs(learnt):
    saved = page.savings(learnt)
    stopped = sum(record["state"] == "stopped" for record in Fake().records())
    finished = sum(record["state"] == "finished" for record in Fake().records())
    assert saved["stopped"] == stopped
    assert saved["saved"] == stopped * 28
    assert saved["share"] == pytest.approx(28 * stopped / (30 * (stopped + finished)))


def test_borders_are_named_and_their_absence_too(learnt):
    text = " ".join(page.sentences(learnt))
    assert "At an end of the space: training.lr (" in text
    assert "--widen" in text
    del learnt.header["borders"]
    assert "No best value lies at an end" in " ".join(page.sentences(learnt))


def test_few_trials_say_nothing_of_importance(tmp_path):
    Fake(trials=8).write(tmp_path)
    (view,) = page.views(tmp_path)
    assert view["importance"] is None
    assert len(view["figures"]) == 2


def test_a_search_of_which_all_failed_has_a_page(tmp_path):
    fake = Fake(trials=8)
    fake.records = lambda: [{**r, "state": "failed", "objective": None} for r in Fake(trials=8).records()]
    fake.write(tmp_path)
    (view,) = page.views(tmp_path)
    assert view["sentences"] == ["No trial has a value."]
    assert len(view["failures"]) == 8


def test_the_page_of_a_sweep_tells_of_its_searches_and_no_other_page_does(tmp_path):
    fake_sweep(tmp_path / "with")
    Fake().write(tmp_path / "with")
    fake_sweep(tmp_path / "without")
    text, other = (write_report(tmp_path / name).read_text() for name in ("with", "without"))
    assert 'href="#searches"' in text
    assert "#searches" not in other
    assert "the loss is &lt;nan&gt;" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "figures do not share ids"
    assert "best so far" in text


def test_a_record_is_written_once(tmp_path):
    record = Fake().records()[0]
    ledger.write_record(tmp_path, record)
    with pytest.raises(ValueError, match="ended before"):
        ledger.write_record(tmp_path, record)
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text()[:40])
    with pytest.raises(Exception, match="delete it, and that trial is run again"):
        ledger.read_records(tmp_path)
