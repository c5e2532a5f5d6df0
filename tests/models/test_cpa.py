"""What CPA promises: an adversary that is one, and that takes from the basal state what the perturbation leaves in it."""

import math
from dataclasses import dataclass, replace

import numpy as np
import probes
import pytest
import simulated
import torch

from perturbray.data.splits import TEST, TRAIN
from perturbray.models.base import Moment, adam
from perturbray.models.cpa import CPA, CPANet, CPANoAdversary
from perturbray.training.fit import Training, fit

SMALL = CPA(width=16, latent_dim=6, adversary_width=16, warmup_epochs=1, adversary_steps=3)
AFTER = Moment(epoch=1, step=0)  # a step of the encoder after the warm-up of SMALL


def built(lab, spec=SMALL, seed=0):
    torch.manual_seed(seed)
    return spec.build(lab.vocabulary)


def first_batch(lab, size=64):
    return next(iter(lab.stream("all", batch_size=size).epoch(TRAIN)))


def moved(model, optimisers, batch, at):
    """The names of the parameters that a step moves, and of the optimiser that moved them."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    name, loss = model.step(batch, at)
    optimisers[name].zero_grad()
    loss.backward()
    optimisers[name].step()
    return name, {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def test_each_step_moves_the_parameters_of_one_side_alone(lab):
    model, batch = built(lab).train(), first_batch(lab)
    optimisers = model.optimisers(Training(lr=1e-2, weight_decay=0.0))
    sides = {"model": 0, "adversary": 0}
    for step in range(6):
        name, names = moved(model, optimisers, batch, Moment(epoch=1, step=step))
        assert name == ("adversary" if step % 3 else "model")
        assert names
        assert {n.startswith("classifiers.") for n in names} == {name == "adversary"}
        sides[name] += 1
    assert sides == {"model": 2, "adversary": 4}
    every = {id(p) for p in model.parameters()}
    held = [id(p) for o in optimisers.values() for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(every), "each parameter has one optimiser"


def test_there_is_no_adversary_before_the_warm_up_ends(lab):
    model = built(lab).train()
    assert {model.step(first_batch(lab), Moment(epoch=0, step=step))[0] for step in range(6)} == {"model"}


def test_a_step_of_the_encoder_against_the_classifiers_raises_their_loss(lab):
    raised = 0
    for seed in range(20):
        model, batch = built(lab, replace(SMALL, variational=False), seed), first_batch(lab)
        ours = [p for name, p in model.named_parameters() if not name.startswith("classifiers.")]

        def entropy(model=model, batch=batch):
            return model.entropy(model.encode(batch.expression, batch)[0], batch)

        optimiser, before = torch.optim.SGD(ours, lr=1e-3), entropy()
        (-before).backward()
        optimiser.step()
        raised += entropy().item() > before.item()
    assert raised == 20


def test_the_encoder_is_rewarded_for_what_the_classifiers_lose(lab):
    model, batch = built(lab).eval(), first_batch(lab)
    _, loss = model.step(batch, AFTER)
    terms = model.terms(batch)
    expected = terms["loss"] - SMALL.adversary_weight * model.entropy(terms["z"], batch)
    torch.testing.assert_close(loss, expected)
    assert expected < terms["loss"]


def test_the_reward_ends_at_chance_where_it_is_capped(lab):
    model, batch = built(lab), first_batch(lab)
    chance = [math.log(target.shape[1]) for target in model.targets(batch)]
    with torch.no_grad():
        for classifier in model.classifiers:
            classifier[-1].weight.mul_(100)
        z = torch.randn(len(batch), SMALL.latent_dim)
        assert model.entropy(z, batch) > sum(chance)
        assert float(model.entropy(z, batch, cap=True)) == pytest.approx(sum(chance), rel=1e-6)


def test_targets_are_shares_with_a_class_for_control(lab):
    conditions = lab.conditions
    codes = torch.arange(len(conditions))
    batch = replace(first_batch(lab), condition=codes, context=torch.from_numpy(conditions.context))
    target, context = built(lab).targets(batch)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(len(codes)))
    assert torch.equal(target[:, 0] == 1, torch.from_numpy(conditions.is_control))
    for row, singles in enumerate(conditions.singles):
        assert int((target[row] > 0).sum()) == max(len(singles), 1)
    assert torch.equal(context.argmax(dim=1), torch.from_numpy(conditions.context))


def test_the_penalty_is_the_squared_gradient_of_the_logits(lab):
    """Against central differences in float64."""
    model, z = built(lab).double(), torch.randn(5, SMALL.latent_dim, dtype=torch.float64)
    found, step, expected = model.penalty(z.clone().requires_grad_()), 1e-6, 0.0
    with torch.no_grad():
        for classifier in model.classifiers:
            gradient = torch.zeros_like(z)
            for d in range(z.shape[1]):
                up, down = z.clone(), z.clone()
                up[:, d] += step
                down[:, d] -= step
                gradient[:, d] = (classifier(up) - classifier(down)).sum(dim=1) / (2 * step)
            expected += float(gradient.square().mean())
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.classifiers.parameters())


def test_without_weight_the_adversary_changes_nothing_to_the_bit(lab):
    states = []
    for spec in (replace(SMALL, adversary_weight=0.0), CPANoAdversary(width=16, latent_dim=6)):
        model = built(lab, spec)
        torch.manual_seed(1)
        fit(model, lab.stream("all"), Training(epochs=2, batch_size=64))
        states.append({name: part for name, part in model.state_dict().items() if not name.startswith("classifiers.")})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(part, states[1][name]) for name, part in states[0].items())


def test_validation_watches_no_adversary(lab):
    model, batch = built(lab).eval(), first_batch(lab)
    before = model.watched(batch)
    with torch.no_grad():
        model.classifiers[0][-1].weight.mul_(50)
    after = model.watched(batch)
    assert torch.equal(before["loss"], after["loss"])
    assert not torch.equal(before["adversary"], after["adversary"])
    torch.testing.assert_close(before["loss"], before["recon"] + before["kl"])


# What the adversary reaches, on cells with a state of their own beside the perturbation.

TOY = {"width": 128, "layers": 1, "latent_dim": 16, "adversary_width": 64, "adversary_layers": 2, "warmup_epochs": 3}
AGAINST = {"adversary_weight": 3.0, "penalty_weight": 0.1, "adversary_steps": 5}


@dataclass(frozen=True, kw_only=True)
class Helped(CPA):
    """The defect of 2024: one optimiser, which adds the classifiers' loss."""

    def build(self, vocabulary):
        return HelpedNet(self, vocabulary)


class HelpedNet(CPANet):
    def optimisers(self, training):
        return {"model": adam(self.parameters(), training)}

    def step(self, batch, at):
        terms = self.terms(batch)
        return "model", terms["loss"] + self.spec.adversary_weight * self.entropy(terms["z"], batch)


def probed(spec: CPA, *, epochs: int, seed: int) -> float:
    """How well a linear probe finds the perturbation in the mean basal state of held-out cells."""
    lab = simulated.latent_factors(seed=seed).lab
    model = built(lab, spec, seed)
    plain = {"lr": 1e-3, "weight_decay": 0.0, "patience": epochs, "plateau_patience": epochs}
    fit(model, lab.stream("all", batch_size=256), Training(epochs=epochs, **plain))
    rows = np.flatnonzero(lab.split.cell == TEST)
    with torch.no_grad():
        mean, _ = model.eval().encoder(torch.from_numpy(lab.cells.dense(rows)))
    return probes.accuracy(mean, lab.conditions.cell_condition[rows])


def mean_probe(spec: CPA, epochs: int) -> float:
    return float(np.mean([probed(spec, epochs=epochs, seed=seed) for seed in range(3)]))


@pytest.mark.slow
def test_the_adversary_takes_the_perturbation_out_of_the_basal_state():
    without, against = mean_probe(CPANoAdversary(**TOY), 60), mean_probe(CPA(**TOY, **AGAINST), 60)
    assert against <= without - 0.08


@pytest.mark.slow
def test_an_encoder_that_helps_the_classifiers_keeps_the_perturbation():
    assert mean_probe(Helped(**TOY, adversary_weight=10.0), 20) >= 0.95


@pytest.mark.slow
def test_the_adversary_works_without_the_divergence_too():
    assert mean_probe(CPA(**TOY, **AGAINST, variational=False), 60) <= 0.80
