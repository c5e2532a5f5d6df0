"""What every model must do, as functions of a spec and a lab: the registered models and mutants are held to the same.

A check returns if the model keeps the law, and raises AssertionError if not. ``CHECKS`` lists them by the law's name.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, replace

import numpy as np
import screens
import torch
from screens import Lab
from torch import Tensor

from perturbray.data.batches import Batch, Cells
from perturbray.data.splits import TEST, TRAIN
from perturbray.data.truth import control_rows
from perturbray.models.base import GradientModel, Model, ModelSpec, StreamingModel
from perturbray.models.label_vectors import LabelVectors
from perturbray.training import checkpoint
from perturbray.training.fit import validate

# Models that say the same of every perturbation, and for what they are there all the same.
BLIND = {
    "no_change": "the floor",
    "perturbed_mean": "what metrics must not reward",
    "perturbed_mean_global": "what metrics must not reward",
    "decoder_cov": "a check of metrics, trained by gradient",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A fitted model under its name and spec, and the screen that it was fitted on."""

    name: str
    spec: ModelSpec
    model: Model
    lab: Lab

    @classmethod
    def fit(cls, name: str, spec: ModelSpec, lab: Lab, **training) -> "Subject":
        torch.manual_seed(0)
        return cls(name=name, spec=spec, model=lab.fitted(spec, **training), lab=lab)

    def batch(self, size: int = 40) -> Batch:
        """Test cells paired with controls, whatever the model trains on."""
        return next(iter(self.lab.stream("paired", batch_size=size).epoch(TEST)))

    def of_mode(self, size: int) -> Batch:
        """Training cells as the model sees them."""
        return next(iter(self.lab.stream(self.spec.mode, batch_size=size).epoch(TRAIN)))

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        self.model.eval()
        return self.model.predict(batch)


def take(batch: Batch, rows: Tensor) -> Batch:
    """Some cells of a batch, in another order."""
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return Batch(**{name: part[rows] if isinstance(part, Tensor) else part for name, part in parts.items()})


def spec_is_frozen_and_pickles(subject: Subject) -> None:
    spec = subject.spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(copy.deepcopy(spec))
    for field in fields(spec):
        try:
            setattr(spec, field.name, getattr(spec, field.name))
        except FrozenInstanceError:
            continue
        raise AssertionError(f"{field.name} can be set")


def prediction_has_a_row_a_cell_and_a_column_a_gene_and_is_finite(subject: Subject) -> None:
    for size in (40, 1):
        batch = subject.batch(size)
        predicted = subject.predict(batch)
        assert predicted.shape == (size, len(subject.lab.conditions.genes))
        assert predicted.shape == batch.control.shape
        assert torch.isfinite(predicted).all()


def prediction_never_reads_the_observed_expression(subject: Subject) -> None:
    batch = subject.batch()
    shuffled = batch.expression[torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))]
    expected = subject.predict(batch)
    for expression in (shuffled, torch.full_like(batch.expression, torch.nan), None):
        assert torch.equal(subject.predict(replace(batch, expression=expression)), expected)


def prediction_follows_a_permutation_of_cells(subject: Subject) -> None:
    batch = subject.batch()
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(subject.predict(take(batch, order)), subject.predict(batch)[order], rtol=1e-5, atol=1e-6)


def prediction_does_not_depend_on_the_other_cells_of_the_batch(subject: Subject) -> None:
    batch = subject.batch()
    alone = torch.cat([subject.predict(take(batch, torch.tensor([i]))) for i in range(len(batch))])
    torch.testing.assert_close(alone, subject.predict(batch), rtol=1e-5, atol=1e-6)


def prediction_is_the_same_twice(subject: Subject) -> None:
    batch = subject.batch()
    assert torch.equal(subject.predict(batch), subject.predict(batch))


def prediction_draws_from_the_generator_of_the_batch_alone(subject: Subject) -> None:
    """One seed, one answer, wherever torch's own generator stands; another seed, another, if the model says it draws."""
    batch = subject.batch()

    def seeded(seed: int) -> Tensor:
        before = torch.get_rng_state()
        torch.manual_seed(17 * seed + len(answers))
        found = subject.predict(replace(batch, generator=torch.Generator().manual_seed(seed)))
        torch.set_rng_state(before)
        answers.append(found)
        return found

    answers: list[Tensor] = []
    assert torch.equal(seeded(1), seeded(1))
    assert torch.equal(seeded(2), answers[0]) != subject.spec.samples
    assert torch.equal(subject.predict(batch), answers[0]) != subject.spec.samples


def fitting_depends_on_the_seed_alone(subject: Subject) -> None:
    again = Subject.fit(subject.name, subject.spec, subject.lab)
    assert torch.equal(again.predict(subject.batch()), subject.predict(subject.batch()))


def models_of_one_process_share_nothing(subject: Subject) -> None:
    batch = subject.batch()
    before = subject.predict(batch)
    conditions = subject.lab.conditions
    narrow = replace(conditions, genes=conditions.genes[:7])
    cells = Cells([block.csr()[:, :7] * 3 for block in subject.lab.cells.blocks])
    Subject.fit(subject.name, subject.spec, replace(subject.lab, conditions=narrow, cells=cells))
    assert torch.equal(subject.predict(batch), before)
    again = Subject.fit(subject.name, subject.spec, subject.lab)
    assert torch.equal(again.predict(batch), before)


def state_restores_predictions_to_the_bit(subject: Subject, folder) -> None:
    checkpoint.save(folder, {"model": subject.model.state_dict()})
    torch.manual_seed(99)
    restored = subject.spec.build(subject.lab.vocabulary)
    restored.load_state_dict(checkpoint.load(folder)["model"])
    batch = subject.batch()
    assert torch.equal(replace(subject, model=restored).predict(batch), subject.predict(batch))


def loss_is_finite_for_a_batch_of_one_cell(subject: Subject) -> None:
    if not isinstance(subject.model, GradientModel):
        return
    model = copy.deepcopy(subject.model).train()
    loss = model.loss(subject.of_mode(1))
    assert loss.shape == ()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    assert torch.isfinite(loss)


def loss_of_a_batch_is_the_mean_over_its_cells(subject: Subject) -> None:
    """Validation weighs batches by their cells, so that its value does not depend on the batch size."""
    if not isinstance(subject.model, GradientModel):
        return
    values = [validate(subject.model, subject.lab.stream(subject.spec.mode, batch_size=size), TEST) for size in (1, 64)]
    np.testing.assert_allclose(*values, rtol=1e-4)


def order_of_batches_does_not_matter_to_a_streaming_model(subject: Subject) -> None:
    if not isinstance(subject.model, StreamingModel) or isinstance(subject.model, GradientModel):
        return  # of a model that descends after its pass the weights say nothing about the pass
    other = subject.spec.build(subject.lab.vocabulary)
    for batch in subject.lab.stream(subject.spec.mode, batch_size=17).epoch(TRAIN, number=5):
        other.update(batch)
    other.finish()
    batch = subject.batch()
    expected = subject.predict(batch)
    torch.testing.assert_close(replace(subject, model=other).predict(batch), expected, rtol=1e-5, atol=1e-6)


def gradient_models_overfit_32_cells(subject: Subject) -> None:
    """Two conditions that differ in perturbation and in context, so that a model blind to either can fit them."""
    if not isinstance(subject.model, GradientModel):
        return
    lab = subject.lab
    rows = np.flatnonzero((lab.split.condition == TRAIN) & ~lab.conditions.is_control)
    first, second = (
        rows[0],
        next(
            row
            for row in rows
            if lab.conditions.context[row] != lab.conditions.context[rows[0]]
            and lab.conditions.perturbation[row] != lab.conditions.perturbation[rows[0]]
        ),
    )
    condition = torch.tensor([first] * 16 + [second] * 16)
    generator = torch.Generator().manual_seed(0)
    profiles = 0.2 + 2 * torch.rand(2, len(lab.conditions.genes), generator=generator)
    batch = Batch(
        expression=profiles.repeat_interleave(16, dim=0),
        control=torch.rand(1, profiles.shape[1], generator=generator).repeat(32, 1),
        condition=condition,
        context=torch.from_numpy(lab.conditions.context)[condition],
    )
    torch.manual_seed(0)
    model = subject.spec.build(lab.vocabulary)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    start = model.eval().loss(batch).item()
    model.train()
    for _ in range(250):
        optimiser.zero_grad()
        model.loss(batch).backward()
        optimiser.step()
    assert model.eval().loss(batch).item() < 0.02 * start


def perturbations_are_told_apart_as_their_effects_are(subject: Subject) -> None:
    """On the training conditions of a screen without noise, predicted effects agree with the true ones."""
    if subject.name in BLIND:
        return
    truth = np.array([subject.lab.cells.dense(rows[:1])[0] for rows in _cells_of_conditions(subject.lab)])
    batch, rows = _training_conditions(subject.lab)
    predicted = subject.predict(batch).numpy()
    for context in range(len(subject.lab.conditions.contexts)):
        here = subject.lab.conditions.context[rows] == context
        # Against their mean, since the mean effect can be learned without looking at the perturbation.
        found = predicted[here] - predicted[here].mean(axis=0)
        expected = truth[rows][here] - truth[rows][here].mean(axis=0)
        assert np.sqrt(np.mean((found - expected) ** 2)) < 0.5 * np.sqrt(np.mean(expected**2))


def levels_of_expression_are_those_of_the_training_cells(subject: Subject) -> None:
    """Blind or not: the mean over a context's training conditions is not far off."""
    if subject.name == "no_change":
        return
    batch, rows = _training_conditions(subject.lab)
    truth = np.array([subject.lab.cells.dense(cells[:1])[0] for cells in _cells_of_conditions(subject.lab)])[rows]
    off = subject.predict(batch).numpy().mean(axis=0) - truth.mean(axis=0)
    assert np.abs(off).max() < 0.3


def held_out_conditions_are_nearer_than_without_a_change(subject: Subject) -> None:
    """The effects of the screen are strong; a model that looks at the perturbation must find more than the controls."""
    if isinstance(subject.spec, LabelVectors):  # their vectors are random here: what is held out, they cannot know
        return
    if subject.name in BLIND:
        return
    lab = subject.lab
    prediction, _, _ = screens.predicted(subject.model, lab.stream(subject.spec.mode), lab.vocabulary)
    assert len(prediction) >= 3
    control = prediction.control.mean[prediction.context]
    errors = [
        np.sqrt(np.mean((found - prediction.observed.mean) ** 2)) for found in (prediction.predicted.mean, control)
    ]
    assert errors[0] < 0.8 * errors[1]


def every_test_condition_is_predicted_with_a_profile_that_is_not_negative(subject: Subject) -> None:
    lab = subject.lab
    prediction, rows, unseen = screens.predicted(subject.model, lab.stream(subject.spec.mode), lab.vocabulary)
    asked = np.flatnonzero((lab.split.condition == TEST) & ~lab.conditions.is_control)
    assert sorted([*rows, *unseen]) == asked.tolist()
    assert len(prediction) == len(rows) > 0
    assert np.isfinite(prediction.predicted.mean).all()
    assert prediction.predicted.mean.min() >= 0
    assert (prediction.predicted.cells > 0).all()


def _cells_of_conditions(lab: Lab) -> list[np.ndarray]:
    return [np.flatnonzero(lab.conditions.cell_condition == code) for code in range(len(lab.conditions))]


def _training_conditions(lab: Lab) -> tuple[Batch, np.ndarray]:
    """A control cell under every training condition of its context."""
    conditions = lab.conditions
    rows = np.flatnonzero((lab.split.condition == TRAIN) & ~conditions.is_control)
    controls = np.array([control_rows(conditions, lab.split, context)[0] for context in conditions.context[rows]])
    batch = Batch(
        expression=None,
        control=torch.from_numpy(lab.cells.dense(controls)),
        condition=torch.from_numpy(rows),
        context=torch.from_numpy(conditions.context[rows]),
    )
    return batch, rows


ANYWHERE: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        spec_is_frozen_and_pickles,
        prediction_has_a_row_a_cell_and_a_column_a_gene_and_is_finite,
        prediction_never_reads_the_observed_expression,
        prediction_follows_a_permutation_of_cells,
        prediction_does_not_depend_on_the_other_cells_of_the_batch,
        prediction_is_the_same_twice,
        prediction_draws_from_the_generator_of_the_batch_alone,
        fitting_depends_on_the_seed_alone,
        models_of_one_process_share_nothing,
        loss_is_finite_for_a_batch_of_one_cell,
        loss_of_a_batch_is_the_mean_over_its_cells,
        order_of_batches_does_not_matter_to_a_streaming_model,
        gradient_models_overfit_32_cells,
        every_test_condition_is_predicted_with_a_profile_that_is_not_negative,
    )
}
WITHOUT_NOISE: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        perturbations_are_told_apart_as_their_effects_are,
        levels_of_expression_are_those_of_the_training_cells,
        held_out_conditions_are_nearer_than_without_a_change,
    )
}
