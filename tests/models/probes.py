"""A probe: how well a linear classifier reads labels out of codes, on codes that it was not fitted to."""

import numpy as np
import torch
from torch.nn import functional


def accuracy(codes: torch.Tensor, labels: np.ndarray, *, decay: float = 1e-3, seed: int = 0) -> float:
    """The share of the second half of the rows, in random order, that a logistic regression on the first half calls
    right. Codes are standardised, so that a faint trace counts as much as a loud one."""
    codes = codes.detach().double()
    codes = (codes - codes.mean(dim=0)) / codes.std(dim=0).clamp(min=1e-12)
    target = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    fitted, judged = order[: len(order) // 2], order[len(order) // 2 :]
    weight = torch.zeros(codes.shape[1], int(target.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = functional.cross_entropy(codes[fitted] @ weight + bias, target[fitted]) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        said = (codes[judged] @ weight + bias).argmax(dim=1)
    return float((said == target[judged]).double().mean())
