"""Fitting: the one loop for every model. Epochs, schedule, early stopping, the best weights, exact resume."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from perturbray.data.batches import BatchStream
from perturbray.data.sampling import Sampling, Unit
from perturbray.data.splits import TRAIN, VAL
from perturbray.errors import InputError
from perturbray.models.base import GradientModel, Model, StreamingModel

Report = Callable[[dict[str, float], Callable[[], dict]], None]  # values of an epoch, and a way to get the state


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model with a gradient is fitted. Models without one ignore it but for the batch size."""

    epochs: int = 60
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 1e-6
    patience: int = 8  # epochs without a better validation loss before stopping
    plateau_factor: float = 0.2  # by which the learning rate falls ...
    plateau_patience: int = 4  # ... after so many epochs without a better validation loss
    clip_norm: float = 0.0  # gradient norm; 0: not clipped
    controls: str = (
        "random"  # what a cell is paired with: random, anew each epoch | fixed | mean of its context's controls
    )
    balance: bool = False  # contexts equally often in an epoch, whose length stays
    chunk: int = 0  # rows that stay together in the shuffle; 0: 1 up to 4 million cells, 64 beyond (data.sampling)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name}={getattr(self, name)}: at least 1")
        if not self.lr > 0:
            raise InputError(f"training.lr={self.lr}: above 0")
        if not 0 < self.plateau_factor < 1:
            raise InputError(f"training.plateau_factor={self.plateau_factor}: above 0 and below 1")
        self.sampling()

    def sampling(self, unit: Unit = "cell", set_size: int = 0) -> Sampling:
        """How an epoch is drawn for a model whose batches are made of ``unit``. Raises InputError."""
        return Sampling(controls=self.controls, balance=self.balance, chunk=self.chunk, unit=unit, set_size=set_size)


@dataclass(kw_only=True)
class Fit:
    """What fitting did."""

    epochs: int = 0
    best_epoch: int = 0
    best_loss: float = math.nan
    history: list[dict[str, float]] = field(default_factory=list)


class DivergedError(RuntimeError):
    """The loss became NaN or infinite: the trial ends, and nothing of it reaches a table."""


def fit(
    model: Model, stream: BatchStream, training: Training, *, report: Report | None = None, state: dict | None = None
) -> Fit:
    """Fit in place; with ``state`` go on from there. Draws from torch's generator, which the caller seeds."""
    if isinstance(model, StreamingModel):
        with torch.no_grad():
            for batch in stream.epoch(TRAIN, shuffle=False):
                model.update(batch)
            model.finish()
        return Fit()
    if isinstance(model, GradientModel):
        return _descend(model, stream, training, report, state)
    return Fit()


def _descend(
    model: GradientModel, stream: BatchStream, training: Training, report: Report | None, state: dict | None
) -> Fit:
    optimiser = torch.optim.Adam(
        model.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True
    )  # fused: a sixth less time an epoch for small networks on a CPU
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=training.plateau_factor, patience=training.plateau_patience
    )
    # Without a held-out condition for validation (a very small screen) the training loss decides.
    watched = VAL if len(stream.rows(VAL)) else TRAIN
    progress = {"epoch": 0, "best_epoch": 0, "best_loss": math.inf, "history": []}
    best = copy.deepcopy(model.state_dict())
    on_gpu = stream.device.type == "cuda"
    if state is not None:
        state = copy.deepcopy(state)  # the optimiser and the progress go on from it in place
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["generator"])
        if on_gpu and state["gpu_generator"] is not None:
            torch.cuda.set_rng_state(state["gpu_generator"], stream.device)
        progress, best = state["progress"], state["best"]

    def snapshot() -> dict:
        return {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": torch.get_rng_state(),
            "gpu_generator": torch.cuda.get_rng_state(stream.device) if on_gpu else None,  # dropout draws from it
            "progress": progress,
            "best": best,
        }

    while progress["epoch"] < training.epochs and progress["epoch"] - progress["best_epoch"] < training.patience:
        number = progress["epoch"]
        train_loss = _train(model, stream, optimiser, training, number)
        loss = validate(model, stream, watched)
        if not math.isfinite(train_loss) or not math.isfinite(loss):
            raise DivergedError(
                f"the loss is not finite in epoch {number + 1} (train {train_loss}, {'val' if watched == VAL else 'train'} "
                f"{loss}); lower training.lr (now {training.lr:g}) or set training.clip_norm"
            )
        schedule.step(loss)
        progress["epoch"] = number + 1
        if loss < progress["best_loss"]:
            progress["best_loss"], progress["best_epoch"] = loss, number + 1
            best = copy.deepcopy(model.state_dict())
        values = {
            "epoch": number + 1,
            "train_loss": train_loss,
            "val_loss": loss,
            "lr": optimiser.param_groups[0]["lr"],
        }
        progress["history"].append(values)
        if report is not None:
            report(values, snapshot)
    model.load_state_dict(best)
    return Fit(
        epochs=progress["epoch"],
        best_epoch=progress["best_epoch"],
        best_loss=progress["best_loss"],
        history=progress["history"],
    )


def _train(
    model: GradientModel, stream: BatchStream, optimiser: torch.optim.Optimizer, training: Training, number: int
) -> float:
    """One epoch; the mean loss over cells."""
    model.train()
    total, cells = torch.zeros((), dtype=torch.float64, device=stream.device), 0
    for batch in stream.epoch(TRAIN, number=number):
        loss = model.loss(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if training.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimiser.step()
        total += loss.detach() * len(batch)
        cells += len(batch)
    return float(total) / max(cells, 1)


@torch.no_grad()
def validate(model: GradientModel, stream: BatchStream, subset: int) -> float:
    """The mean loss over a subset's cells, every cell with the same control in every epoch."""
    model.eval()
    total, cells = torch.zeros((), dtype=torch.float64, device=stream.device), 0
    for batch in stream.epoch(subset, shuffle=False, fixed=True):
        total += model.loss(batch) * len(batch)
        cells += len(batch)
    return float(total) / max(cells, 1)
