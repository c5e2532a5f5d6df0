"""Device: rows of cells become dense tensors where the model is. CSR travels to a GPU, an eighth of the bytes; it densifies."""

import numpy as np
import torch
from torch import Tensor

from perturbray.data.buffers import Buffers
from perturbray.data.rows import Rows

TURNS = 3  # pinned memories in use at once: one filled, one copied, one to spare


def densify(length: Tensor, indices: Tensor, values: Tensor, *, genes: int) -> Tensor:
    """(rows, genes) float32 on the device of the tensors, from the lengths of rows, (rows,) int64, and CSR's flat arrays.

    Two-byte indices come as int16 with the same bits, since torch computes little with uint16.
    """
    row = torch.repeat_interleave(torch.arange(len(length), device=length.device), length, output_size=len(indices))
    gene = indices.long()
    if indices.dtype == torch.int16:
        gene &= 0xFFFF
    flat = torch.zeros(len(length) * genes, device=length.device)
    return flat.scatter_(0, row.mul_(genes).add_(gene), values).view(-1, genes)


class Densifier:
    """Dense tensors of rows, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = Buffers()
        self._turns = [_Pinned() for _ in range(TURNS)] if device.type == "cuda" else []
        self._turn = 0

    def dense(self, cells: "Cells", rows: np.ndarray) -> Tensor:  # noqa: F821  # batches imports this module
        """(len(rows), genes) float32; not written again as long as anybody holds it."""
        if self.device.type == "cpu":
            return torch.from_numpy(cells.dense(rows, out=self._buffers.take(len(rows), cells.genes)))
        if not self._turns:
            return on_device(cells.collect(rows), self.device)
        self._turn = (self._turn + 1) % TURNS
        pinned = self._turns[self._turn]
        pinned.wait()
        found = on_device(cells.collect(rows, allocate=pinned.allocate), self.device)
        pinned.copied()
        return found


def on_device(rows: Rows, device: torch.device | str) -> Tensor:
    """Rows as a dense tensor on a device; the copies of pinned memory do not wait for each other."""
    indices = rows.indices.view(np.int16) if rows.indices.dtype == np.uint16 else rows.indices
    parts = [np.diff(rows.indptr), indices, rows.values]
    length, indices, values = (torch.from_numpy(part).to(device, non_blocking=True) for part in parts)
    return densify(length, indices, values, genes=rows.genes)


class _Pinned:
    """Page-locked memory for one batch, by kind of value; not to be written while it is copied."""

    def __init__(self) -> None:
        self._memory: dict[np.dtype, np.ndarray] = {}
        self._event = torch.cuda.Event()

    def allocate(self, size: int, kind: np.dtype) -> np.ndarray:
        kind = np.dtype(kind)
        if kind not in self._memory or len(self._memory[kind]) < size:
            room = torch.empty(max(1, size * 5 // 4) * kind.itemsize, dtype=torch.uint8, pin_memory=True)
            self._memory[kind] = room.numpy().view(kind)  # the array keeps the tensor alive
        return self._memory[kind][:size]

    def copied(self) -> None:
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()
