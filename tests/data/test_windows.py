"""Laws of delivery: mapped or streamed, whatever the shards and windows, the batches of a plan are the same to the bit."""

import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import screens
import torch

import perturbray as pr
from perturbray.data import store as stores
from perturbray.data.batches import BatchStream, Sampling
from perturbray.data.dataset import DatasetSpec
from perturbray.data.loading import Delivery, load
from perturbray.data.splits import TRAIN, VAL, CovariateTransfer
from perturbray.data.windows import IN_FLIGHT, Windows
from perturbray.errors import InputError
from perturbray.training.fit import Training, fit

HANG = 120  # seconds; without a hang a test here takes a tenth of it
TENSORS = ("expression", "control", "condition", "context", "cell", "embedding", "control_embedding")


def same(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        for name in TENSORS:
            left, right = getattr(a, name), getattr(b, name)
            assert (left is None) == (right is None), name
            assert left is None or torch.equal(left, right), name


@pytest.fixture(scope="module")
def store(small) -> stores.Store:
    return stores.ingest(small, small.conditions())


@pytest.fixture(scope="module")
def stream(ray_session, small, store):
    """A stream of the small screen, mapped or in windows of a tenth of the training cells."""
    conditions = small.conditions()
    split = CovariateTransfer().split(conditions)

    def make(mode="paired", *, streamed: bool, megabytes: float = 0.15, batch_size: int = 64, **options) -> BatchStream:
        windows = Windows(store, memory_mb=megabytes) if streamed else None
        kind = {"batch_size": batch_size, "seed": 3, "mode": mode, "windows": windows}
        return BatchStream(store.cells(), conditions, split, **kind, **options)

    return make


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("paired", {}),
        ("all", {"chunk": 16}),
        ("paired", {"controls": "mean", "balance": True}),
        ("perturbed", {"unit": "condition"}),
        ("paired", {"unit": "set", "set_size": 8}),
    ],
)
def test_streamed_batches_are_the_mapped_ones(stream, mode, how):
    mapped, streamed = (stream(mode, streamed=s, sampling=Sampling(**how)) for s in (False, True))
    plan = streamed.plan(number=2)
    assert len(streamed.windows.edges(plan.cuts)) > 4, "a single window would show nothing"
    same(mapped.epoch(number=2), streamed.epoch(number=2))


def test_validation_and_a_batch_alone_are_the_same_too(stream):
    mapped, streamed = (stream(streamed=s) for s in (False, True))
    same(mapped.epoch(VAL, shuffle=False, fixed=True), streamed.epoch(VAL, shuffle=False, fixed=True))
    rows = np.array([7, 3, 3])
    same([mapped.batch(rows, rows + 1)], [streamed.batch(rows, rows + 1)])


def test_an_epoch_that_is_left_in_the_middle_disturbs_no_other(stream):
    mapped, streamed = (stream("perturbed", streamed=s) for s in (False, True))
    for _ in range(3):
        assert len(next(iter(streamed.epoch()))) == 64
    same(mapped.epoch(number=1), streamed.epoch(number=1))


def test_a_batch_that_does_not_fit_is_refused_with_the_number_that_would_do(stream):
    streamed = stream("perturbed", streamed=True, megabytes=0.01)
    with pytest.raises(InputError, match=r"largest has 64 cells: (\S+) MB are needed and 0.01 MB allowed") as caught:
        next(streamed.epoch())
    need = float(re.search(r"(\S+) MB are needed", str(caught.value)).group(1))
    assert len(next(stream("perturbed", streamed=True, megabytes=need).epoch())) == 64


def test_controls_that_do_not_fit_are_refused_and_the_way_out_is_one(stream):
    options = {"streamed": True, "megabytes": 0.02, "batch_size": 1}
    with pytest.raises(InputError, match=r"control cells that pairs are drawn from.*training.controls=mean"):
        next(stream(**options).epoch())
    assert next(stream(sampling=Sampling(controls="mean"), **options).epoch()).control.shape == (1, 60)


def test_a_reader_imports_neither_torch_nor_what_compiles():
    code = "import sys, perturbray.data.windows; print([name for name in ('torch', 'numba') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# The real screens.


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("papalexi_eccite", {"covariates": ("bio_rep",)}),
        ("kang_ifnb", {}),
        ("perturbench_devel", {}),
    ],
)
def test_real_screens_give_the_same_cells_and_the_same_weights_both_ways(ray_session, shared_data, name, fields):
    spec = DatasetSpec(path=str(shared_data / f"{name}.h5ad"), **fields)
    conditions = stores.conditions(spec)
    split = load(spec).split
    store, training = stores.ingest(spec, conditions), Training(epochs=1)
    whole = store.cells()
    parts = screens.in_blocks(whole.select(np.arange(len(whole))), 5)
    weights, cells = [], []
    for source, windows in ((whole, None), (parts, None), (whole, Windows(store, memory_mb=IN_FLIGHT * 1.5))):
        made = BatchStream(source, conditions, split, batch_size=256, seed=1, mode="paired", windows=windows)
        torch.manual_seed(0)
        model = pr.LatentAdditive(width=16, latent_dim=4).build(pr.Vocabulary.of(conditions, split))
        fit(model, made, training)
        weights.append(torch.cat([part.flatten() for part in model.state_dict().values()]))
        cells.append(torch.cat([batch.cell for batch in made.epoch(number=4)]))
    assert sorted(cells[0].tolist()) == made.rows(TRAIN).tolist()
    for other in (1, 2):
        assert torch.equal(cells[0], cells[other])
        assert torch.equal(weights[0], weights[other])


# Trials that hold every CPU.


def test_two_trials_that_hold_both_cpus_stream_at_the_same_time_and_finish(ray_session, small, store, tmp_path):
    import ray
    from ray import tune

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a trial's process does not find this file
    conditions = small.conditions()

    def train(config):
        (tmp_path / f"{config['number']}").touch()
        begun = time.monotonic()
        while len(list(tmp_path.glob("[01]"))) < 2:  # both are here, so that nobody streams with a CPU to spare
            assert time.monotonic() - begun < HANG / 2
            time.sleep(0.05)
        windows = Windows(store, memory_mb=0.5)
        split = CovariateTransfer().split(conditions)
        options = {"batch_size": 64, "seed": config["number"], "mode": "paired"}
        mapped, streamed = (
            BatchStream(store.cells(), conditions, split, windows=w, **options) for w in (None, windows)
        )
        began = time.time()
        for number in range(3):
            same(mapped.epoch(number=number), streamed.epoch(number=number))
        tune.report({"began": began, "ended": time.time()})

    found = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"number": tune.grid_search([0, 1])},
        tune_config=tune.TuneConfig(max_concurrent_trials=2, time_budget_s=HANG),  # what hangs is stopped, and fails
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    assert not found.errors
    ended = [trial.metrics.get("ended") for trial in found]
    assert None not in ended, f"a trial hangs: nothing for {HANG} s"
    assert max(trial.metrics["began"] for trial in found) < min(ended), "at the same time"


# The choice.


def test_what_is_larger_than_the_limit_is_streamed_and_the_log_says_why(store, monkeypatch):
    for variable in ("PERTURBRAY_DELIVERY", "PERTURBRAY_RESIDENT_MB"):
        monkeypatch.delenv(variable, raising=False)
    size = f"{store.nbytes / 1e6:,.0f} MB of rows"
    chosen = Delivery.choose(store)
    assert not chosen.streaming
    assert chosen.windows() is None
    assert chosen.reason.startswith(size)
    large = replace(store, stored=10**13)
    assert Delivery.choose(large).streaming
    assert Delivery.choose(large).reason.endswith("MB may be mapped: streaming")
    assert not Delivery.choose(large, "resident").streaming
    assert Delivery.choose(store, "streaming").reason.endswith("streaming, as asked for")
    monkeypatch.setenv("PERTURBRAY_RESIDENT_MB", str(store.nbytes / 1e6 - 0.001))
    assert Delivery.choose(store).streaming
    monkeypatch.setenv("PERTURBRAY_RESIDENT_MB", str(store.nbytes / 1e6 + 0.001))
    assert not Delivery.choose(store).streaming
    monkeypatch.setenv("PERTURBRAY_DELIVERY", "streaming")
    monkeypatch.setenv("PERTURBRAY_STREAM_MB", "123")
    assert Delivery.choose(store).windows(at_once=2).limit_mb == 123


def test_a_choice_that_there_is_not_is_named(store, monkeypatch):
    with pytest.raises(InputError, match="delivery 'steaming': did you mean 'streaming'"):
        Delivery.choose(store, "steaming")
    monkeypatch.setenv("PERTURBRAY_RESIDENT_MB", "plenty")
    with pytest.raises(InputError, match="PERTURBRAY_RESIDENT_MB='plenty': a number of megabytes is needed"):
        Delivery.choose(store)


def test_a_screen_is_loaded_in_one_call_without_a_sweep(ray_session, small, small_screen):
    said = []
    whole = load(small_screen, batch_size=100, say=said.append)
    assert sum(map(len, whole.epoch())) == (~small.conditions().is_control[small.conditions().cell_condition]).sum()
    assert said[-1].endswith("resident")
    split = load(small, batch_size=100, split=CovariateTransfer(), mode="all", seed=2)
    streamed = load(small, batch_size=100, split=CovariateTransfer(), mode="all", seed=2, delivery="streaming")
    for subset in (TRAIN, VAL):
        same(split.epoch(subset), streamed.epoch(subset))
