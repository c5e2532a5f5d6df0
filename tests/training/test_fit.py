"""Laws of the loop: it stops when it should, keeps the best weights, and goes on after a stop as if there had been none."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from perturbray.data.splits import TRAIN, UNUSED, VAL
from perturbray.errors import InputError
from perturbray.models.base import GradientModel, StreamingModel
from perturbray.models.baselines import MeanShift, NoChange
from perturbray.models.cpa import CPA
from perturbray.models.latent_additive import LatentAdditive, LatentAdditiveNet
from perturbray.training import checkpoint
from perturbray.training.fit import DivergedError, Training, fit, validate

SPEC = LatentAdditive(width=16, latent_dim=4)  # with dropout: resuming must restore the generator too
TRAINING = Training(epochs=6, batch_size=64, lr=5e-3, plateau_patience=0, plateau_factor=0.5)


class Stop(Exception):
    pass


def fitted(lab, training=TRAINING, *, spec=SPEC, seed=0, **options):
    torch.manual_seed(seed)
    model = spec.build(lab.vocabulary)
    return model, fit(model, lab.stream(spec.mode), training, **options)


def interrupted(lab, epochs: int, training=TRAINING) -> dict:
    """The state of a fit that is stopped after so many epochs, as a report gets it."""
    kept = {}

    def report(values, snapshot):
        if values["epoch"] == epochs:
            kept.update(copy.deepcopy(snapshot()))
            raise Stop

    with pytest.raises(Stop):
        fitted(lab, training, report=report)
    return kept


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Scripted(GradientModel):
    """A model of one number, the epoch, whose validation loss is as scripted."""

    def __init__(self, lab, losses):
        super().__init__(lab.vocabulary)
        self.losses, self.weight = losses, torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def predict(self, batch):
        return batch.control

    def train(self, mode=True):
        if mode:
            self.epoch += 1
        return super().train(mode)

    def loss(self, batch):
        value = 1.0 if self.training else self.losses[int(self.epoch) - 1]
        return value + 0 * self.weight


@pytest.mark.parametrize(
    ("losses", "patience", "epochs", "best"),
    [
        ([5, 4, 3, 2, 1, 0.5], 2, 6, 6),
        ([5, 4, 6, 6, 3, 2], 2, 4, 2),
        ([5, 4, 6, 6, 3, 2], 3, 6, 6),
        ([5, 5, 5, 5, 5, 5], 3, 4, 1),
        ([1, 2, 3, 4, 5, 6], 1, 2, 1),
    ],
)
def test_it_stops_after_its_patience_and_returns_to_the_best_epoch(lab, losses, patience, epochs, best):
    model = Scripted(lab, losses)
    done = fit(model, lab.stream(batch_size=500), Training(epochs=6, patience=patience, plateau_patience=9))
    assert (done.epochs, done.best_epoch, done.best_loss) == (epochs, best, losses[best - 1])
    assert int(model.epoch) == best
    assert [row["val_loss"] for row in done.history] == losses[:epochs]
    assert [row[0] for row in done.curve] == list(range(1, epochs + 1))
    assert [row[2] for row in done.curve] == pytest.approx(losses[:epochs], rel=1e-5)


def test_best_weights_are_restored(lab):
    training = Training(epochs=8, batch_size=64, lr=0.2, patience=8, plateau_patience=8)
    model, done = fitted(lab, training, spec=replace(SPEC, width=16, dropout=0.0, latent_dim=32))
    assert done.best_epoch < done.epochs, "a rate at which the last epoch is not the best"
    assert validate(model, lab.stream(), VAL) == done.best_loss == min(row["val_loss"] for row in done.history)


def test_the_rate_falls_on_a_plateau(lab):
    model = Scripted(lab, [5, 5, 5, 5, 5, 5])
    training = Training(epochs=6, lr=1e-2, plateau_patience=1, plateau_factor=0.1, patience=9)
    rates = [row["lr"] for row in fit(model, lab.stream(batch_size=500), training).history]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_training_learns(lab):
    _, done = fitted(lab)
    assert done.history[-1]["train_loss"] < 0.7 * done.history[0]["train_loss"]
    assert done.best_loss < done.history[0]["val_loss"]
    assert [row["epoch"] for row in done.history] == list(range(1, 7))


def test_gradients_are_clipped_where_asked(lab):
    plain, clipped, harmless = (fitted(lab, replace(TRAINING, epochs=1, clip_norm=norm))[0] for norm in (0, 1e-3, 1e9))
    assert not same(plain, clipped)
    assert same(plain, harmless)


@pytest.mark.parametrize("epochs", [1, 3, 5, 6])
def test_a_resumed_fit_ends_with_the_weights_of_one_that_was_never_stopped(lab, tmp_path, epochs):
    whole, expected = fitted(lab)
    checkpoint.save(tmp_path, interrupted(lab, epochs))
    resumed, done = fitted(lab, seed=99, state=checkpoint.load(tmp_path))
    assert same(whole, resumed)
    assert done == expected


def test_a_resumed_fit_stops_as_early_as_one_that_was_never_stopped(lab):
    losses, training = [5, 4, 6, 6, 6, 3], Training(epochs=6, patience=3, plateau_patience=1)
    states = []
    expected = fit(
        Scripted(lab, losses),
        lab.stream(batch_size=500),
        training,
        report=lambda _, snap: states.append(copy.deepcopy(snap())),
    )
    assert expected.epochs == 5
    assert len({row["lr"] for row in expected.history}) == 2, "the rate fell, and the schedule must know when"
    for state in states:
        model = Scripted(lab, losses)
        assert fit(model, lab.stream(batch_size=500), training, state=state) == expected
        assert int(model.epoch) == 2


def test_a_state_serves_more_than_once(lab):
    state = interrupted(lab, 2)
    before = copy.deepcopy(state)
    (first, done), (second, again) = (fitted(lab, state=state) for _ in range(2))
    assert same(first, second)
    assert done == again
    assert state["progress"] == before["progress"]
    before, state = before["optimisers"]["model"], state["optimisers"]["model"]
    for kept, part in zip(before["state"].values(), state["state"].values(), strict=True):
        assert all(torch.equal(kept[name], part[name]) for name in kept)


def test_same_seed_same_weights_and_another_seed_others(lab):
    training = replace(TRAINING, epochs=2)
    first, second, other = (fitted(lab, training, seed=seed)[0] for seed in (1, 1, 2))
    assert same(first, second)
    assert not same(first, other)


def test_reporting_changes_nothing(lab):
    reports = []
    training = replace(TRAINING, epochs=3)
    plain, done = fitted(lab, training)
    watched, _ = fitted(lab, training, report=lambda values, snapshot: reports.append((values, snapshot())))
    assert same(plain, watched)
    assert [values for values, _ in reports] == done.history


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_a_loss_that_is_not_finite_ends_the_fit_with_advice(lab, lr):
    reports = []
    with pytest.raises(DivergedError, match=r"not finite in epoch \d.*lower training\.lr \(now 1e\+3\d\)"):
        fitted(
            lab, replace(TRAINING, lr=lr), spec=LatentAdditive(softplus=False), report=lambda *of: reports.append(of)
        )
    assert all(np.isfinite(values["val_loss"]) for values, _ in reports)


def test_without_conditions_for_validation_the_training_loss_decides(lab):
    condition, cell = lab.split.condition.copy(), lab.split.cell.copy()
    condition[condition == VAL] = UNUSED
    perturbed = ~lab.conditions.is_control[lab.conditions.cell_condition]
    cell[perturbed & (cell == VAL)] = UNUSED
    bare = replace(lab, split=replace(lab.split, condition=condition, cell=cell))
    assert not len(bare.stream().rows(VAL))
    model, done = fitted(bare, replace(TRAINING, epochs=2))
    assert np.isfinite(done.best_loss)
    assert validate(model, bare.stream(), TRAIN) == done.best_loss


def test_validation_is_the_same_number_every_time(lab):
    model, _ = fitted(lab, replace(TRAINING, epochs=1))
    assert validate(model, lab.stream(), VAL) == validate(model, lab.stream(), VAL)


def test_models_without_a_gradient_have_one_pass_or_none(lab):
    model, done = fitted(lab, spec=MeanShift())
    assert done.epochs == 0
    assert np.isnan(done.best_loss)
    trained = lab.split.cells(TRAIN, conditions=lab.conditions, controls=False)
    controls = lab.split.cells(TRAIN, conditions=lab.conditions, controls=True)
    assert int(model.cells.sum()) == len(trained) + len(controls)
    assert fitted(lab, spec=NoChange())[1].epochs == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, r"training\.epochs=0: at least 1"),
        ({"batch_size": -1}, r"training\.batch_size=-1"),
        ({"patience": 0}, r"training\.patience=0"),
        ({"lr": 0.0}, r"training\.lr=0\.0: above 0"),
        ({"lr": float("nan")}, r"training\.lr=nan"),
        ({"plateau_factor": 1.0}, r"training\.plateau_factor=1\.0: above 0 and below 1"),
    ],
)
def test_impossible_training_is_refused_by_its_field(fields, message):
    with pytest.raises(InputError, match=message):
        Training(**fields)


# Several optimisers, a pass before the first epoch, precision, compilation.

ADVERSARIAL = CPA(width=16, latent_dim=4, adversary_width=8, adversary_steps=2, warmup_epochs=2, dropout=0.1)


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_resumed_fit_restores_every_optimiser_and_schedule(lab, tmp_path, epochs):
    def run(seed, **options):
        torch.manual_seed(seed)
        model = ADVERSARIAL.build(lab.vocabulary)
        return model, fit(model, lab.stream("all"), TRAINING, **options)

    def report(values, snapshot):
        if values["epoch"] == epochs:
            checkpoint.save(tmp_path, snapshot())

    whole, expected = run(0, report=report)
    resumed, done = run(99, state=checkpoint.load(tmp_path))
    assert same(whole, resumed)
    assert done == expected
    assert {"train_loss", "train_adversary", "val_loss", "val_recon", "val_adversary"} <= set(expected.history[-1])
    assert "train_adversary" not in expected.history[0], "there is none in the warm-up"


def test_weights_of_the_warm_up_are_no_candidates_for_the_best(lab):
    class Warm(Scripted):
        warmup_epochs = 2

    losses = [1, 2, 5, 4, 6, 6]
    done = fit(Warm(lab, losses), lab.stream(batch_size=500), Training(epochs=6, patience=2, plateau_patience=9))
    assert (done.epochs, done.best_epoch, done.best_loss) == (6, 4, 4)
    short = fit(Warm(lab, losses), lab.stream(batch_size=500), Training(epochs=2, patience=2, plateau_patience=9))
    assert (short.epochs, short.best_epoch, short.best_loss) == (2, 2, 2), "where there are no others the last one"


def test_an_adversary_that_is_not_finite_ends_the_fit_though_what_is_watched_is(lab):
    class Lost(Scripted):
        def optimisers(self, training):
            self.other = torch.nn.Parameter(torch.zeros(()))
            adam = {"model": self.weight, "adversary": self.other}
            return {name: torch.optim.Adam([weight], lr=training.lr) for name, weight in adam.items()}

        def step(self, batch, at):
            if at.step % 2:
                return "adversary", self.other * torch.nan
            return "model", self.loss(batch)

    with pytest.raises(DivergedError, match=r"epoch 1 \(train model 1\.0, train adversary nan, val loss 5\.0"):
        fit(Lost(lab, [5, 5]), lab.stream(batch_size=64), Training(epochs=2))


def test_the_moment_counts_epochs_and_batches_of_all_epochs(lab):
    seen = []

    class Watching(Scripted):
        def step(self, batch, at):
            seen.append((at.epoch, at.step))
            return super().step(batch, at)

    fit(Watching(lab, [3, 2, 1]), lab.stream(batch_size=100), Training(epochs=3))
    batches = len(seen) // 3
    assert batches > 1
    assert seen == [(step // batches, step) for step in range(3 * batches)]


class Centred(LatentAdditiveNet, StreamingModel):
    """Subtracts the mean of what it saw before the first epoch."""

    def __init__(self, spec, vocabulary):
        super().__init__(spec, vocabulary)
        self.register_buffer("total", torch.zeros(len(vocabulary.genes), dtype=torch.float64))
        self.register_buffer("cells", torch.zeros(()))
        self.passes = 0

    def update(self, batch):
        assert not torch.is_grad_enabled()
        self.total += batch.expression.double().sum(dim=0)
        self.cells += len(batch)

    def finish(self):
        self.passes += 1
        self.total /= self.cells

    def loss(self, batch):
        assert self.passes or self.cells, "the pass comes first"
        return super().loss(batch)


def test_a_model_may_have_one_pass_over_training_cells_before_the_first_epoch(lab):
    states = []
    model = Centred(SPEC, lab.vocabulary)
    fit(model, lab.stream(), TRAINING, report=lambda _, snap: states.append(copy.deepcopy(snap())))
    rows = np.flatnonzero(lab.split.cell == TRAIN)  # controls too, whatever an epoch visits
    np.testing.assert_allclose(model.total, lab.cells.dense(rows).mean(axis=0), rtol=1e-5)
    assert (model.passes, int(model.cells)) == (1, len(rows))
    resumed = Centred(SPEC, lab.vocabulary)
    fit(resumed, lab.stream(), TRAINING, state=states[2])
    assert resumed.passes == 0, "the state holds what came of it"
    assert same(model, resumed)


def test_half_precision_is_for_matrix_products_while_training(lab):
    found = []

    class Looking(LatentAdditiveNet):
        def loss(self, batch):
            found.append(self.decoder(torch.zeros(1, self.decoder[0].in_features)).dtype)
            return super().loss(batch)

    training = replace(TRAINING, epochs=3)
    models = []
    for half, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        torch.manual_seed(0)
        found.clear()
        models.append(Looking(SPEC, lab.vocabulary))
        done = fit(models[-1], lab.stream(), replace(training, bfloat16=half))
        assert set(found) == {dtype}
        assert {p.dtype for p in models[-1].parameters()} == {torch.float32}
        assert done.history[-1]["train_loss"] < done.history[0]["train_loss"]
    assert not same(*models)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
def test_a_compiled_model_learns_what_it_learns_otherwise(lab):
    spec, training = replace(SPEC, dropout=0.0), replace(TRAINING, epochs=2)
    (plain, done), (compiled, again) = (fitted(lab, replace(training, compile=c), spec=spec) for c in (False, True))
    np.testing.assert_allclose(done.best_loss, again.best_loss, rtol=1e-3)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for name, part in plain.state_dict().items():
        torch.testing.assert_close(part, compiled.state_dict()[name], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_a_resumed_fit_on_a_gpu_restores_the_generator_of_the_gpu(lab):
    class Cuda:
        """The same stream on the GPU."""

        def stream(self, mode="paired"):
            stream = lab.stream(mode)
            stream.device = torch.device("cuda")
            return stream

    def run(seed, **options):
        torch.manual_seed(seed)
        model = SPEC.build(lab.vocabulary).cuda()
        fit(model, Cuda().stream(), TRAINING, **options)
        return model

    kept = {}

    def report(values, snapshot):
        if values["epoch"] == 3:
            kept.update(copy.deepcopy(snapshot()))

    whole = run(0, report=report)
    assert same(whole, run(99, state=kept))
