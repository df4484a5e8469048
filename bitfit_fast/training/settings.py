"""Hyper-parameters of a run, and the plan that they make with a selection and a dataset."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..encoder import MEMORY, PRECISIONS
from ..errors import BitFitError, BitFitWarning, listed
from ..kinds import KINDS, Kind
from ..methods import METHODS

__all__ = ["MIN_STEPS", "PAPER_LR", "SCHEDULES", "Plan", "Settings", "low_rate", "step_count"]

#: Fewer optimiser steps than this are the commonest cause of a poor BitFit run.
MIN_STEPS = 500
#: Range of learning rates that the BitFit paper used (Ben Zaken et al. 2022).
PAPER_LR = (1e-4, 1e-3)
DEFAULT_EPOCHS = 3
#: Settings whose default is the kind of task's.
_OF_KINDS = {name for kind in KINDS.values() for name in kind.options}
DEFAULT_EVALUATIONS = 10

#: Factor of the learning rate after warm-up, at progress 0..1 through the remaining steps.
SCHEDULES = {
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
}


def low_rate(lr: float) -> str | None:
    """Return what to say of a learning rate below those of the paper, or None."""
    low, high = PAPER_LR
    if lr >= low:
        return None
    return (
        f"learning rate {lr:g} is low for BitFit, which needs a larger one than full fine-tuning; "
        f"the paper used {low:g} to {high:g}"
    )


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a run.

    Attributes
    ----------
    lr : float, optional
        Peak learning rate of AdamW; by default the method's (BitFit: 1e-3).
    epochs : float, optional
        Passes over the training set.
    max_steps : int, optional
        Optimiser steps; with `epochs`, what ends first. With neither: 3 epochs, and no
        fewer than 500 steps.
    batch_size : int
        Examples a step.
    max_length : int, optional
        Tokens an example; by default 128, and 384 for a window of a span task.
    doc_stride, max_answer_length : int, optional
        Of span tasks: tokens that neighbouring windows of a text share, by default 128, and
        tokens of the longest answer, by default 30.
    warmup : float
        Share of the steps in which the learning rate rises from zero.
    schedule : str
        `linear` (down to zero) or `constant`.
    seed : int
        Of the order of the examples, dropout, and the subset of `train_fraction`; on the
        command line and in studies of a new head's weights, too.
    precision : str
        `fp32`, or `bf16`: autocast, and with the backend `fast` one copy of the layers' frozen
        weights in it; trained parameters and optimiser are fp32 in both.
    train_fraction : float
        Share of the training set to use, in (0, 1].
    train_examples : int, optional
        Number of training examples to use instead of a share. Of one seed, the smaller
        choice is a part of the larger one, in both ways to say it.
    grad_clip : float
        Largest norm of the gradient; 0 for no limit.
    eval_every : int, optional
        Steps between evaluations; by default a tenth of the run.
    patience : int, optional
        Evaluations without a better main metric after which the run ends.
    validate_once : bool
        Evaluate validation sets after the last step only, and a few training examples on the
        way, so that no choice can hang on the validation set; the checkpoint is the last
        step's.
    backend, device : str
        A key of `BACKENDS` or `auto`; a torch device or `auto`.
    memory : str
        How much the fast backend keeps for the backward pass: `fast`, `low`, `lower` or
        `lowest`; see `patch_encoder`.
    graph : bool
        Whether the fast backend captures steps on a GPU in CUDA graphs where it can.
    token_budget : tuple of int, optional
        Tokens of a batch that those graphs are made for; a batch of more than the largest is an
        error, on any device. By default as many as batches of `batch_size` and `max_length` need.

    Raises
    ------
    BitFitError
        For a value out of its range.
    """

    lr: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 16
    max_length: int | None = None
    doc_stride: int | None = None
    max_answer_length: int | None = None
    warmup: float = 0.06
    schedule: str = "linear"
    seed: int = 0
    precision: str = "fp32"
    train_fraction: float = 1.0
    grad_clip: float = 1.0
    eval_every: int | None = None
    patience: int | None = None
    backend: str = "auto"
    device: str = "auto"
    memory: str = MEMORY[0]
    train_examples: int | None = None
    validate_once: bool = False
    graph: bool = True
    token_budget: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, valid, ranges in (
            ("lr", lambda v: 0 < v <= 100, "above 0 and at most 100"),
            ("epochs", lambda v: 0 < v < math.inf, "above 0 and finite"),
            ("max_steps", lambda v: v >= 1, "at least 1"),
            ("batch_size", lambda v: v >= 1, "at least 1"),
            ("max_length", lambda v: v >= 8, "at least 8"),
            ("doc_stride", lambda v: v >= 0, "at least 0"),
            ("max_answer_length", lambda v: v >= 1, "at least 1"),
            ("warmup", lambda v: 0 <= v < 1, "from 0 to below 1"),
            ("schedule", lambda v: v in SCHEDULES, f"one of {listed(SCHEDULES)}"),
            ("seed", lambda v: 0 <= v < 2**31, "from 0 to 2147483647"),
            ("precision", lambda v: v in PRECISIONS, f"one of {listed(PRECISIONS)}"),
            ("memory", lambda v: v in MEMORY, f"one of {listed(MEMORY)}"),
            ("train_fraction", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("train_examples", lambda v: v >= 1, "at least 1"),
            ("grad_clip", lambda v: 0 <= v < math.inf, "at least 0 and finite"),
            ("eval_every", lambda v: v >= 1, "at least 1"),
            ("patience", lambda v: v >= 1, "at least 1"),
            ("token_budget", lambda v: v and min(v) >= 1, "numbers of at least 1"),
        ):
            value = getattr(self, name)
            if value is not None and not valid(value):
                raise BitFitError(f"{name.replace('_', '-')} must be {ranges}, not {value}")
        if self.train_examples is not None and self.train_fraction != 1:
            raise BitFitError(
                f"give train-fraction ({self.train_fraction}) or train-examples "
                f"({self.train_examples}), not both"
            )
        if self.validate_once and self.patience is not None:
            raise BitFitError(
                f"patience {self.patience} looks at the validation set on the way, "
                "which validate-once excludes"
            )

    def examples_of(self, available: int) -> int:
        """Return how many of `available` training examples are used.

        Raises
        ------
        BitFitError
            If there are fewer than `train_examples`.
        """
        if self.train_examples is None:
            return max(1, round(self.train_fraction * available))
        if self.train_examples > available:
            raise BitFitError(
                f"train-examples {self.train_examples} is more than the {available} examples "
                "of the training set"
            )
        return self.train_examples

    def for_kind(self, kind: Kind) -> Settings:
        """Return the settings with what depends on the kind of task filled in.

        Raises
        ------
        BitFitError
            For a setting that this kind does not know.
        """
        for name in sorted(_OF_KINDS - set(kind.options)):
            if getattr(self, name) is not None:
                raise BitFitError(
                    f"{name.replace('_', '-')} is not of a {kind.name} task; it takes "
                    f"{listed(option.replace('_', '-') for option in kind.options)}"
                )
        filled: dict[str, Any] = {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in kind.options.items()
        }
        return replace(self, **filled)

    def described(self) -> dict[str, Any]:
        """Return all settings but those that are left to the kind of task."""
        return {k: v for k, v in asdict(self).items() if not (k in _OF_KINDS and v is None)}


def step_count(settings: Settings, per_epoch: int) -> int:
    """Return how many steps a run takes whose epochs have `per_epoch` each."""
    limits = [settings.max_steps] if settings.max_steps else []
    if settings.epochs:
        # a share of an epoch that stands for a number of steps is that number
        limits.append(max(1, math.ceil(round(settings.epochs * per_epoch, 6))))
    return min(limits, default=max(MIN_STEPS, DEFAULT_EPOCHS * per_epoch))


@dataclass(frozen=True)
class Plan:
    """What a run will do, every default filled in.

    Attributes
    ----------
    steps, steps_per_epoch, warmup_steps, eval_every : int
        In optimiser steps.
    lr : float
        Peak learning rate.
    device : torch.device
        Where it trains.
    schedule, precision, grad_clip, batch_size, max_length, memory, graph, token_budget
        As in `Settings`.
    """

    steps: int
    steps_per_epoch: int
    warmup_steps: int
    eval_every: int
    lr: float
    schedule: str
    precision: str
    grad_clip: float
    batch_size: int
    max_length: int | None
    device: torch.device
    memory: str = MEMORY[0]
    graph: bool = True
    token_budget: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, settings: Settings, method: str, examples: int, device: torch.device | None = None
    ) -> Plan:
        """Fill in the defaults for `method` and a training set of `examples`.

        Warns where the learning rate or the number of steps is one with which BitFit is
        known to do poorly.
        """
        per_epoch = -(-examples // settings.batch_size)
        steps = step_count(settings, per_epoch)
        lr = settings.lr or METHODS[method].lr
        if method == "bitfit":
            low, high = PAPER_LR
            if (text := low_rate(lr)) is not None:
                warnings.warn(text, BitFitWarning, 3)
            if steps < MIN_STEPS:
                warnings.warn(
                    f"{steps} steps are few for BitFit; with the paper's learning rates of "
                    f"{low:g} to {high:g} it wants {MIN_STEPS} or more",
                    BitFitWarning,
                    3,
                )
        return cls(
            steps=steps,
            steps_per_epoch=per_epoch,
            warmup_steps=round(settings.warmup * steps),
            eval_every=settings.eval_every or -(-steps // DEFAULT_EVALUATIONS),
            lr=lr,
            schedule=settings.schedule,
            precision=settings.precision,
            grad_clip=settings.grad_clip,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            device=device or torch.device("cpu"),
            memory=settings.memory,
            graph=settings.graph,
            token_budget=settings.token_budget,
        )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * SCHEDULES[self.schedule](min(1.0, progress))
