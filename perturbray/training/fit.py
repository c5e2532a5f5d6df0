"""Fitting: the one loop for every model. Epochs, schedules, early stopping, the best weights, exact resume."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from perturbray.data.batches import BatchStream
from perturbray.data.sampling import Sampling, Unit
from perturbray.data.splits import TRAIN, VAL
from perturbray.errors import InputError
from perturbray.models.base import GradientModel, Model, Moment, StreamingModel

Report = Callable[[dict[str, float], Callable[[], dict]], None]  # values of an epoch, and a way to get the state
Judge = Callable[[Model], dict[str, float]]  # what a model in evaluation mode is worth, by name


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
    controls: str = (
        "random"  # what a cell is paired with: random, anew each epoch | fixed | mean of its context's controls
    )
    balance: bool = False  # contexts equally often in an epoch, whose length stays
    chunk: int = 0  # rows that stay together in the shuffle; 0: 1 up to 4 million cells, 64 beyond (data.sampling)
    clip_norm: float = 0.0  # gradient norm of what one optimiser moves; 0: not clipped
    bfloat16: bool = False  # matrix products of training in it, for GPUs; weights and predictions stay in float32
    compile: bool = False  # torch.compile of a model's parts: a minute first, then faster epochs on a GPU

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

    @property
    def curve(self) -> list[list[float]]:
        """Epoch, training loss and validation loss to six digits, a row an epoch."""
        names = ("train_loss", "val_loss")
        return [[row["epoch"], *[float(f"{row.get(name, math.nan):.6g}") for name in names]] for row in self.history]


class DivergedError(RuntimeError):
    """The loss became NaN or infinite: the trial ends, and nothing of it reaches a table."""


def fit(
    model: Model,
    stream: BatchStream,
    training: Training,
    *,
    report: Report | None = None,
    state: dict | None = None,
    judge: Judge | None = None,
    every: int = 1,
) -> Fit:
    """Fit in place; with ``state`` go on from there. Draws from torch's generator, which the caller seeds.

    ``judge``: asked each ``every`` epochs, and after the last, what the weights are worth with which training would end
    then; what it answers is reported beside the epoch's losses, and changes nothing of the training.
    """
    if isinstance(model, StreamingModel) and state is None:
        _pass(model, stream)
    if isinstance(model, GradientModel):
        return _Descent(model, stream, training).run(report, state, judge, every)
    return Fit()


@torch.no_grad()
def _pass(model: StreamingModel, stream: BatchStream) -> None:
    """Every training cell once, controls included, whatever cells the epochs of the model visit."""
    for batch in stream.every_cell(TRAIN):
        model.update(batch)
    model.finish()


class _Descent:
    """The fit of a model by gradient: what it is made of, and what a state restores."""

    def __init__(self, model: GradientModel, stream: BatchStream, training: Training) -> None:
        self.model, self.stream, self.training = model, stream, training
        self.optimisers = model.optimisers(training)
        self.schedules = {
            name: torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimiser, factor=training.plateau_factor, patience=training.plateau_patience
            )
            for name, optimiser in self.optimisers.items()
        }
        # Without a held-out condition for validation (a very small screen) the training loss decides.
        self.subset = VAL if len(stream.rows(VAL)) else TRAIN
        self.progress = {"epoch": 0, "step": 0, "best_epoch": 0, "best_loss": math.inf, "history": []}
        self.best = copy.deepcopy(model.state_dict())
        self.cells = 0  # of the last epoch
        # Where training ends within the warm-up, its last weights are the ones there are.
        self.warmup = min(model.warmup_epochs, training.epochs - 1)
        if training.compile:
            for part in model.compilable():
                part.compile(dynamic=True)

    def run(self, report: Report | None, state: dict | None, judge: Judge | None = None, every: int = 1) -> Fit:
        if state is not None:
            self.restore(state)
        while not self.done():
            values = self.epoch(self.progress["epoch"])
            if judge is not None and (self.progress["epoch"] % every == 0 or self.done()):
                values |= self.judged(judge)
            self.progress["history"].append(values)
            if report is not None:
                report(values, self.state)
        self.model.load_state_dict(self.best)
        kept = self.progress
        return Fit(
            epochs=kept["epoch"],
            best_epoch=kept["best_epoch"],
            best_loss=kept["best_loss"],
            history=kept["history"],
        )

    def done(self) -> bool:
        epoch = self.progress["epoch"]
        waited = epoch - max(self.progress["best_epoch"], self.warmup)
        return epoch >= self.training.epochs or waited >= self.training.patience

    def epoch(self, number: int) -> dict[str, float]:
        """Train, validate, and step the schedules; the values that are reported."""
        trained, watched = self.train(number), watch(self.model, self.stream, self.subset, self.training)
        self.check(number, trained, watched)
        loss = watched["loss"]
        for schedule in self.schedules.values():
            schedule.step(loss)
        self.progress["epoch"] = number + 1
        if number >= self.warmup and loss < self.progress["best_loss"]:
            self.progress["best_loss"], self.progress["best_epoch"] = loss, number + 1
            self.best = copy.deepcopy(self.model.state_dict())
        first = next(iter(self.optimisers))
        return {
            "epoch": number + 1,
            **{"train_loss" if name == first else f"train_{name}": value for name, value in trained.items()},
            **{f"val_{name}": value for name, value in watched.items()},
            "cells": self.cells,
            "lr": self.optimisers[first].param_groups[0]["lr"],
        }

    def judged(self, judge: Judge) -> dict[str, float]:
        """What the best weights so far are worth; asked once for the same weights."""
        kept = self.progress
        at = kept["best_epoch"] or kept["epoch"]  # within the warm-up the last weights are the ones there are
        if kept.get("judged_epoch") != at:
            last = None if at == kept["epoch"] else copy.deepcopy(self.model.state_dict())
            if last is not None:
                self.model.load_state_dict(self.best)
            self.model.eval()
            kept["judged_epoch"], kept["judged"] = at, judge(self.model)
            if last is not None:
                self.model.load_state_dict(last)
        return dict(kept["judged"])

    def train(self, number: int) -> dict[str, float]:
        """One epoch; for each optimiser that moved something the mean over cells of what it minimised."""
        self.model.train()
        totals = {name: _Mean(self.stream.device) for name in self.optimisers}
        parameters = {name: _parameters(optimiser) for name, optimiser in self.optimisers.items()}
        for batch in self.stream.epoch(TRAIN, number=number):
            with _autocast(self.stream, self.training):
                name, loss = self.model.step(batch, Moment(epoch=number, step=self.progress["step"]))
            optimiser = self.optimisers[name]
            optimiser.zero_grad(set_to_none=True)
            loss.backward(inputs=parameters[name])  # nothing else is moved, so nothing else needs a gradient
            if self.training.clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters[name], self.training.clip_norm)
            optimiser.step()
            totals[name].add(loss, len(batch))
            self.progress["step"] += 1
        self.cells = sum(total.cells for total in totals.values())
        return {name: total.value() for name, total in totals.items() if total.cells}

    def check(self, number: int, trained: dict[str, float], watched: dict[str, float]) -> None:
        """Raise DivergedError where a loss of the epoch is not finite."""
        name = "val" if self.subset == VAL else "train"
        values = {f"train {n}": value for n, value in trained.items()} | {f"{name} {n}": v for n, v in watched.items()}
        if not all(map(math.isfinite, values.values())):
            raise DivergedError(
                f"the loss is not finite in epoch {number + 1} ({', '.join(f'{n} {v}' for n, v in values.items())}); "
                f"lower training.lr (now {self.training.lr:g}) or set training.clip_norm"
            )

    def state(self) -> dict:
        on_gpu = self.stream.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
            "generator": torch.get_rng_state(),
            # Dropout draws from it.
            "gpu_generator": torch.cuda.get_rng_state(self.stream.device) if on_gpu else None,
            "progress": self.progress,
            "best": self.best,
        }

    def restore(self, state: dict) -> None:
        state = copy.deepcopy(state)  # the optimisers and the progress go on from it in place
        self.model.load_state_dict(state["model"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
            self.schedules[name].load_state_dict(state["schedules"][name])
        torch.set_rng_state(state["generator"])
        if self.stream.device.type == "cuda" and state["gpu_generator"] is not None:
            torch.cuda.set_rng_state(state["gpu_generator"], self.stream.device)
        self.progress, self.best = state["progress"], state["best"]


class _Mean:
    """A mean over cells that waits for no device before it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.total, self.cells = torch.zeros((), dtype=torch.float64, device=device), 0

    def add(self, mean: Tensor, cells: int) -> None:
        self.total += mean.detach() * cells
        self.cells += cells

    def value(self) -> float:
        return float(self.total) / max(self.cells, 1)


def _parameters(optimiser: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _autocast(stream: BatchStream, training: Training) -> torch.autocast:
    return torch.autocast(stream.device.type, dtype=torch.bfloat16, enabled=training.bfloat16)


@torch.no_grad()
def watch(model: GradientModel, stream: BatchStream, subset: int, training: Training) -> dict[str, float]:
    """What a model watches, as means over a subset's cells, every cell with the same control in every epoch."""
    model.eval()
    means: dict[str, _Mean] = {}
    for batch in stream.epoch(subset, shuffle=False, fixed=True):
        with _autocast(stream, training):
            values = model.watched(batch)
        for name, value in values.items():
            means.setdefault(name, _Mean(stream.device)).add(value, len(batch))
    return {name: mean.value() for name, mean in means.items()}


def validate(model: GradientModel, stream: BatchStream, subset: int) -> float:
    """The mean loss over a subset's cells, every cell with the same control in every epoch."""
    return watch(model, stream, subset, Training())["loss"]
