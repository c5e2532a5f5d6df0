"""Models that read cells as rows of an embedding: which cell's row, in training and in prediction."""

from dataclasses import replace

import numpy as np
import pytest
import screens
import torch
from contract import Subject

from perturbray.data.splits import TEST, TRAIN
from perturbray.errors import InputError
from perturbray.models.cpa import CPA, CPANoAdversary
from perturbray.models.latent_additive import LatentAdditive
from perturbray.training.fit import Training, fit

WIDTH = 12
SPECS = (
    LatentAdditive(width=32, dropout=0.0, embedding="X_pca"),
    CPANoAdversary(width=32, embedding="X_pca"),
    CPA(width=32, embedding="X_pca", adversary_steps=2),
)


class Embedded:
    """A stream whose batches carry rows of an embedding; ``scrambled``: those of the matched controls are of cells of the
    same numbers elsewhere, which is the defect of PerturBench."""

    def __init__(self, stream, table: torch.Tensor, *, scrambled: bool = False) -> None:
        self.stream, self.table, self.scrambled = stream, table, scrambled
        self.device, self.rows = stream.device, stream.rows

    def epoch(self, *arguments, **options):
        for batch in self.stream.epoch(*arguments, **options):
            yield self.embedded(batch)

    def embedded(self, batch):
        control = None
        if batch.control is not None:
            control = self.table[self.number(batch.control)]
            control = control.roll(1, dims=0) if self.scrambled else control
        return replace(batch, embedding=self.table[batch.cell], control_embedding=control)

    def number(self, expression: torch.Tensor) -> torch.Tensor:
        """The cell that each row is the expression of."""
        cells = torch.from_numpy(self.stream.cells.dense(np.arange(len(self.stream.cells))))
        return torch.cdist(expression, cells, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


@pytest.fixture(scope="module")
def embedded(lab):
    """The lab's vocabulary with a width, and principal components of all its cells."""
    cells = lab.cells.dense(np.arange(len(lab.cells)))
    left, size, _ = np.linalg.svd(cells - cells.mean(axis=0), full_matrices=False)
    table = torch.from_numpy(left[:, :WIDTH] * size[:WIDTH]).float()
    return replace(lab.vocabulary, embedding_width=WIDTH), table


def batch_of(lab, table, mode="paired", subset=TRAIN):
    return next(iter(Embedded(lab.stream(mode, batch_size=32), table).epoch(subset)))


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_prediction_reads_the_embedding_of_the_control_and_no_other(lab, embedded, spec):
    vocabulary, table = embedded
    torch.manual_seed(0)
    model, batch = spec.build(vocabulary).eval(), batch_of(lab, table, subset=TEST)
    nothing = torch.full_like(batch.expression, torch.nan)
    with torch.no_grad():
        expected = model.predict(batch)
        blind = replace(
            batch, expression=nothing, control=nothing, embedding=torch.full_like(batch.embedding, torch.nan)
        )
        assert torch.equal(model.predict(blind), expected)
        scrambled = replace(batch, control_embedding=batch.control_embedding.roll(1, dims=0))
        assert not torch.equal(model.predict(scrambled), expected)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_training_reads_the_row_of_the_control_or_for_cpa_of_the_cell_itself(lab, embedded, spec):
    vocabulary, table = embedded
    torch.manual_seed(0)
    model, batch = spec.build(vocabulary).eval(), batch_of(lab, table, spec.mode)
    read, other = ("embedding", "control_embedding") if spec.mode == "all" else ("control_embedding", "embedding")
    with torch.no_grad():
        expected = model.loss(batch)
        hidden = replace(batch, control=None, **{other: None})
        assert torch.equal(model.loss(hidden), expected), "a cell's expression is what is predicted, not what is read"
        scrambled = replace(batch, **{read: getattr(batch, read).roll(1, dims=0)})
        assert not torch.equal(model.loss(scrambled), expected)


def test_rows_of_other_cells_in_training_are_found_out():
    """Where the state of a control decides what its perturbed cells look like, scrambled rows cost most of it."""
    lab, table = paired_states()
    errors = {}
    for scrambled in (False, True):
        torch.manual_seed(0)
        model = LatentAdditive(width=32, dropout=0.0, softplus=False, covariates=False, embedding="X_pca").build(
            replace(lab.vocabulary, embedding_width=table.shape[1])
        )
        stream = Embedded(lab.stream("paired", batch_size=64), table, scrambled=scrambled)
        fit(model, stream, Training(epochs=50, batch_size=64, lr=1e-2, patience=50, plateau_patience=50))
        batch = next(iter(Embedded(lab.stream("paired", batch_size=200), table).epoch(TEST)))
        with torch.no_grad():
            errors[scrambled] = float((model.eval().predict(batch) - batch.expression).square().mean())
    assert errors[False] < 0.5 * errors[True]


def paired_states():
    """A control has the state of its context, and the embedding says which; each context has cells of all subsets."""
    lab, _ = screens.noise_free(contexts=6, perturbations=8, cells=10, controls=24, seed=3)
    context = lab.conditions.context[lab.conditions.cell_condition]
    return lab, torch.eye(6)[torch.from_numpy(context)]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_screen_without_the_embedding_is_refused(lab, spec):
    with pytest.raises(InputError, match=r"model\.embedding='X_pca': the dataset has no such obsm matrix"):
        spec.build(lab.vocabulary)


def test_with_the_cells_themselves_as_the_embedding_the_model_is_the_same(lab):
    """The embedding is another input, not another model."""
    genes = len(lab.vocabulary.genes)
    table = torch.from_numpy(lab.cells.dense(np.arange(len(lab.cells))))
    spec = LatentAdditive(width=16, dropout=0.0)
    subject = Subject.fit("", spec, lab, epochs=2)
    torch.manual_seed(0)
    other = replace(spec, embedding="X_pca").build(replace(lab.vocabulary, embedding_width=genes))
    fit(other, Embedded(lab.stream("paired"), table), Training(epochs=2, batch_size=64))
    batch = batch_of(lab, table, subset=TEST)
    with torch.no_grad():
        assert torch.equal(other.eval().predict(batch), subject.predict(batch))
