"""Checkpoints: a state that restores a fit to the last bit. Tensors and plain values only, so that loading runs no code."""

import os
import pickle
from pathlib import Path

import torch

NAME = "checkpoint.pt"
UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    pickle.UnpicklingError,
)  # what ``load`` raises of a broken file


def save(folder: str | Path, state: dict) -> None:
    """Write a state of tensors, numbers, strings, lists and dictionaries; complete or not at all."""
    place = Path(folder) / NAME
    temporary = place.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(place)


def load(folder: str | Path) -> dict:
    """The state written by ``save``. Raises if the file is cut off or holds anything but plain values."""
    return torch.load(Path(folder) / NAME, map_location="cpu", weights_only=True)
