"""Epochs: training of a linear and a latent additive model on a screen, in the engine's loop and in a plain PyTorch one."""

import numpy as np
import torch
from scipy import sparse
from serve import serve
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from perturbray.data import store
from perturbray.data.batches import BatchStream
from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import TRAIN, VAL, CovariateTransfer
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.latent_additive import LatentAdditive
from perturbray.models.layers import MLP
from perturbray.models.linear_additive import LinearAdditive
from perturbray.training.fit import Training, fit

WIDTHS = {"width": 512, "layers": 1, "latent_dim": 64, "dropout": 0.1}
SPECS = {"linear": LinearAdditive(), "latent": LatentAdditive(**WIDTHS)}


def _screen(path):
    """The cells of a file, its conditions and a split."""
    torch.set_num_threads(1)
    spec = DatasetSpec(path=str(path))
    conditions = spec.conditions()
    cells = store.ingest(spec, conditions).cells()
    return cells, conditions, CovariateTransfer().split(conditions)


def ours(path, model, batch_size, epochs):
    cells, conditions, split = _screen(path)
    vocabulary, spec = Vocabulary.of(conditions, split), SPECS[model]
    training = Training(epochs=epochs, batch_size=batch_size, lr=1e-3, patience=epochs)

    def run():
        stream = BatchStream(cells, conditions, split, batch_size=batch_size, seed=0, mode=spec.mode)
        torch.manual_seed(0)
        done = fit(spec.build(vocabulary), stream, training)
        return {"cells": epochs * len(stream.rows(TRAIN)), "loss": done.history[-1]["val_loss"]}

    return run


class PlainDataset(Dataset):
    """Perturbed cells one by one, each with a control of its context that is looked up when it is asked for."""

    def __init__(self, rows: sparse.csr_matrix, conditions, split, vocabulary, subset) -> None:
        self.rows, self.conditions, self.vocabulary = rows, conditions, vocabulary
        self.cells = split.cells(subset, conditions=conditions, controls=False)
        controls = split.cells(subset, conditions=conditions, controls=True)
        self.controls = {}
        for row in controls:
            self.controls.setdefault(self.context(row), []).append(row)
        self.rng = np.random.default_rng(0)

    def context(self, row):
        return self.conditions.contexts[self.conditions.context[self.conditions.cell_condition[row]]]

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, item):
        row = self.cells[item]
        control = self.rng.choice(self.controls[self.context(row)])
        condition = self.conditions.cell_condition[row]
        return {
            "expression": torch.from_numpy(self.rows[row].toarray().ravel()),
            "control": torch.from_numpy(self.rows[control].toarray().ravel()),
            "perturbation": torch.from_numpy(self.vocabulary.multi_hot[condition]),
            "covariates": torch.from_numpy(self.vocabulary.one_hot[self.conditions.context[condition]]),
        }


class PlainLinear(nn.Module):
    def __init__(self, genes, perturbations, levels):
        super().__init__()
        self.effect = nn.Linear(perturbations + levels, genes)

    def forward(self, batch):
        inputs = torch.cat([batch["perturbation"], batch["covariates"]], dim=1)
        return functional.softplus(batch["control"] + self.effect(inputs))


class PlainLatent(nn.Module):
    def __init__(self, genes, perturbations, levels):
        super().__init__()
        latent, shape = WIDTHS["latent_dim"], {name: WIDTHS[name] for name in ("width", "layers", "dropout")}
        self.encoder, self.decoder = MLP(genes + levels, latent, **shape), MLP(latent + levels, genes, **shape)
        self.perturbation_encoder = MLP(perturbations, latent, **shape)

    def forward(self, batch):
        latent = self.encoder(torch.cat([batch["control"], batch["covariates"]], dim=1))
        latent = latent + self.perturbation_encoder(batch["perturbation"])
        return functional.softplus(self.decoder(torch.cat([latent, batch["covariates"]], dim=1)))


def plain(path, model, batch_size, epochs):
    cells, conditions, split = _screen(path)
    rows = cells.select(np.arange(len(cells)))
    vocabulary = Vocabulary.of(conditions, split)
    sizes = len(vocabulary.genes), len(vocabulary.perturbations), vocabulary.one_hot.shape[1]

    def run():
        torch.manual_seed(0)
        data = {subset: PlainDataset(rows, conditions, split, vocabulary, subset) for subset in (TRAIN, VAL)}
        net = (PlainLinear if model == "linear" else PlainLatent)(*sizes)
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-6)
        for _ in range(epochs):
            net.train()
            for batch in DataLoader(data[TRAIN], batch_size=batch_size, shuffle=True):
                optimiser.zero_grad()
                functional.mse_loss(net(batch), batch["expression"]).backward()
                optimiser.step()
            net.eval()
            with torch.no_grad():
                losses = [
                    functional.mse_loss(net(batch), batch["expression"]).item() * len(batch["expression"])
                    for batch in DataLoader(data[VAL], batch_size=batch_size)
                ]
        return {"cells": epochs * len(data[TRAIN]), "loss": sum(losses) / len(data[VAL])}

    return run


if __name__ == "__main__":
    serve({"ours": ours, "plain": plain})
