"""Every registered model keeps the contract, and a model that breaks a law of it is caught by the check of that law."""

from dataclasses import dataclass, replace

import contract
import pytest
import screens
import torch
from contract import ANYWHERE, BLIND, WITHOUT_NOISE, Subject, state_restores_predictions_to_the_bit

from perturbray.data.batches import Batch
from perturbray.models.base import MODELS, ModelSpec
from perturbray.models.baselines import MeanShiftNet
from perturbray.models.cpa import CPA, CPANet
from perturbray.models.latent_additive import LatentAdditive, LatentAdditiveNet

THOROUGH = {"epochs": 60, "lr": 1e-2, "patience": 60, "plateau_patience": 60}


def thoroughly(spec: ModelSpec) -> dict:
    """As many steps of the model itself, where most batches are an adversary's; and masks need time to close."""
    times = spec.adversary_steps if getattr(spec, "adversarial", False) else 4 if getattr(spec, "sparse", False) else 1
    return {name: value if name == "lr" else value * times for name, value in THOROUGH.items()}


@pytest.fixture(scope="module", params=MODELS)
def fitted(request, lab) -> Subject:
    return Subject.fit(request.param, screens.default_spec(request.param), lab)


@pytest.fixture(scope="module", params=MODELS)
def thorough(request, clean) -> Subject:
    spec = screens.default_spec(request.param)
    return Subject.fit(request.param, spec, clean, **thoroughly(spec))


@pytest.mark.parametrize("law", ANYWHERE)
def test_every_model_keeps_the_contract(fitted, law):
    ANYWHERE[law](fitted)


def test_every_models_state_restores_its_predictions(fitted, tmp_path):
    state_restores_predictions_to_the_bit(fitted, tmp_path)


@pytest.mark.parametrize("law", WITHOUT_NOISE)
def test_every_model_that_can_fit_fits_effects_without_noise(thorough, law):
    WITHOUT_NOISE[law](thorough)


def test_models_that_are_blind_to_the_perturbation_are_those_that_say_so():
    assert set(BLIND) <= set(MODELS)


# Mutants: one thing wrong in each.


def mutant(base: type[torch.nn.Module] = LatentAdditiveNet, **methods) -> ModelSpec:
    """A spec whose network is ``base`` with other methods."""
    net, latent = type("Mutant", (base,), methods), issubclass(base, LatentAdditiveNet)
    if issubclass(base, CPANet):

        @dataclass(frozen=True, kw_only=True)
        class Drawing(CPA):
            def build(self, vocabulary):
                return net(self, vocabulary)

        return Drawing()

    @dataclass(frozen=True, kw_only=True)
    class Spec(LatentAdditive):
        mode = "paired" if latent else "all"

        def build(self, vocabulary):
            return net(self, vocabulary) if latent else net(vocabulary)

    return Spec()


def control_of_the_neighbour(self, batch: Batch):
    return LatentAdditiveNet.predict(self, replace(batch, control=batch.control.roll(1, dims=0)))


def control_of_all(self, batch: Batch):
    return LatentAdditiveNet.predict(
        self, replace(batch, control=batch.control.mean(0, keepdim=True).expand_as(batch.control))
    )


def target_read(self, batch: Batch):
    predicted = LatentAdditiveNet.predict(self, batch)
    return predicted if batch.expression is None else 0.9 * predicted + 0.1 * batch.expression


def dropout_left_on(self, batch: Batch):
    self.train()
    return LatentAdditiveNet.predict(self, batch)


def seed_ignored(self, batch: Batch):
    predicted = LatentAdditiveNet.predict(self, batch)
    return predicted if batch.generator is None else predicted + torch.randn_like(predicted)


def generator_ignored(self, batch: Batch):
    return CPANet.predict(self, replace(batch, generator=None))


def effect_zeroed(self, batch: Batch):
    return torch.zeros_like(LatentAdditiveNet.perturbation(self, batch))


def one_row(self, batch: Batch):
    return LatentAdditiveNet.predict(self, batch).mean(0, keepdim=True)


def raw(self, batch: Batch):
    return LatentAdditiveNet.predict(self, batch) * torch.nan


def loss_of_nothing(self, batch: Batch):
    return self.decoder[-1].bias.square().mean()


def sum_over_cells(self, batch: Batch):
    return LatentAdditiveNet.loss(self, batch) * len(batch)


def without_bias(self, batch: Batch):
    return LatentAdditiveNet.loss(self, batch) * len(batch) / torch.tensor(len(batch) - 1)


def unseeded(self, spec, vocabulary):
    LatentAdditiveNet.__init__(self, spec, vocabulary)
    generator = torch.Generator()
    generator.seed()
    with torch.no_grad():
        self.decoder[-1].bias += torch.rand(len(self.decoder[-1].bias), generator=generator)


class Shared(LatentAdditiveNet):
    """Counts the models that were ever built in an attribute of its class, as PerturBench keeps its vocabulary."""

    built = 0

    def __init__(self, spec, vocabulary):
        super().__init__(spec, vocabulary)
        Shared.built += 1

    def predict(self, batch: Batch):
        return super().predict(batch) * Shared.built


def stuck(self, batch: Batch):
    return LatentAdditiveNet.loss(self, batch).detach() + 0 * self.decoder[-1].bias.sum()


def kept_beside_the_state(self):
    MeanShiftNet.finish(self)
    self.beside = self.profile.clone()
    self.profile.zero_()


def predict_from_beside(self, batch: Batch):
    return batch.control + getattr(self, "beside", self.profile)[batch.condition]


def last_batch_counts_more(self, batch: Batch):
    self.sums *= 0.9
    MeanShiftNet.update(self, batch)


def negative_label(self, batch: Batch):
    return batch.control + self.profile[batch.condition].flip(0)


MUTANTS = {
    "target read": (mutant(predict=target_read), "prediction_never_reads_the_observed_expression"),
    "control swapped": (mutant(predict=control_of_the_neighbour), "prediction_follows_a_permutation_of_cells"),
    "control averaged over the batch": (
        mutant(predict=control_of_all),
        "prediction_does_not_depend_on_the_other_cells_of_the_batch",
    ),
    "labels swapped": (mutant(MeanShiftNet, predict=negative_label), "prediction_follows_a_permutation_of_cells"),
    "a mean for all cells": (
        mutant(predict=one_row, loss=loss_of_nothing),
        "prediction_has_a_row_a_cell_and_a_column_a_gene_and_is_finite",
    ),
    "not a number": (
        mutant(predict=raw, loss=loss_of_nothing),
        "prediction_has_a_row_a_cell_and_a_column_a_gene_and_is_finite",
    ),
    "dropout left on": (mutant(predict=dropout_left_on), "prediction_is_the_same_twice"),
    "seed ignored": (mutant(predict=seed_ignored), "prediction_draws_from_the_generator_of_the_batch_alone"),
    "generator ignored": (
        mutant(CPANet, predict=generator_ignored),
        "prediction_draws_from_the_generator_of_the_batch_alone",
    ),
    "a generator of its own": (mutant(__init__=unseeded), "fitting_depends_on_the_seed_alone"),
    "state on the class": (mutant(Shared), "models_of_one_process_share_nothing"),
    "loss summed": (mutant(loss=sum_over_cells), "loss_of_a_batch_is_the_mean_over_its_cells"),
    "loss over one cell less": (mutant(loss=without_bias), "loss_is_finite_for_a_batch_of_one_cell"),
    "nothing learned": (mutant(loss=stuck), "gradient_models_overfit_32_cells"),
    "a running mean": (
        mutant(MeanShiftNet, update=last_batch_counts_more),
        "order_of_batches_does_not_matter_to_a_streaming_model",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name, lab):
    spec, law = MUTANTS[name]
    subject = Subject.fit("mutant", spec, lab)
    with pytest.raises(AssertionError):
        ANYWHERE[law](subject)


def test_a_mutant_without_effects_is_caught(clean):
    subject = Subject.fit("mutant", mutant(perturbation=effect_zeroed), clean, **THOROUGH)
    contract.levels_of_expression_are_those_of_the_training_cells(subject)
    with pytest.raises(AssertionError):
        contract.perturbations_are_told_apart_as_their_effects_are(subject)


def test_a_mutant_that_learned_nothing_of_the_levels_is_caught(clean):
    subject = Subject.fit("mutant", mutant(loss=stuck), clean)
    with pytest.raises(AssertionError):
        contract.levels_of_expression_are_those_of_the_training_cells(subject)


def test_a_mutant_that_keeps_what_it_learned_beside_its_state_is_caught(lab, tmp_path):
    spec = mutant(MeanShiftNet, finish=kept_beside_the_state, predict=predict_from_beside)
    with pytest.raises(AssertionError):
        state_restores_predictions_to_the_bit(Subject.fit("mutant", spec, lab), tmp_path)


@dataclass(kw_only=True)
class Loose:
    width: int = 8

    def __hash__(self):
        return self.width


def test_a_spec_that_is_not_frozen_is_caught(lab):
    with pytest.raises(AssertionError, match="width can be set"):
        contract.spec_is_frozen_and_pickles(Subject(name="loose", spec=Loose(), model=None, lab=lab))


def test_the_models_from_which_mutants_are_made_keep_the_contract(lab):
    """So that what is caught is the mutation."""
    drawing = "prediction_draws_from_the_generator_of_the_batch_alone"
    others = {law for _, law in MUTANTS.values()} - {drawing}
    for base, laws in ((LatentAdditiveNet, others | {drawing}), (MeanShiftNet, others), (CPANet, {drawing})):
        subject = Subject.fit("whole", mutant(base), lab)
        for law in laws:
            ANYWHERE[law](subject)
