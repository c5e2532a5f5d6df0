"""Loops: energy distance and MMD to control as one writes them first, a pair of conditions at a time, with torch.cdist."""

import numpy as np
import torch
from serve import serve


def _pairs(path, every, precision):
    torch.set_num_threads(1)
    data = np.load(path)
    kind = getattr(torch, precision)
    control = torch.tensor(data["control"], dtype=kind)
    return [torch.tensor(cells, dtype=kind) for cells in data["conditions"][::every]], control, data["sigmas"]


def energy(path, every=1, precision="float64", exact=False):
    """``exact``: by direct differences, which keep the digits that norms minus product lose."""
    conditions, control, _ = _pairs(path, every, precision)
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist_if_necessary"

    def distance(x, y):
        between, own, other = (torch.cdist(*pair, compute_mode=mode) for pair in ((x, y), (x, x), (y, y)))
        n, m = len(x), len(y)
        return float(2 * between.mean() - own.sum() / (n * (n - 1)) - other.sum() / (m * (m - 1)))

    return lambda: [distance(cells, control) for cells in conditions]


def mmd(path, every=1, precision="float64"):
    conditions, control, sigmas = _pairs(path, every, precision)

    def discrepancy(x, y):
        between, own, other = torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)
        n, m = len(x), len(y)
        total = 0.0
        for sigma in sigmas:
            kernels = [torch.exp(-(distance**2) / (2 * sigma**2)) for distance in (between, own, other)]
            total += kernels[1].sum().sub(n) / (n * (n - 1)) + kernels[2].sum().sub(m) / (m * (m - 1))
            total -= 2 * kernels[0].mean()
        return float(total / len(sigmas))

    return lambda: [discrepancy(cells, control) for cells in conditions]


if __name__ == "__main__":
    serve({"energy": energy, "mmd": mmd})
