"""Forward and backward passes of `transformers.Trainer`, of a fixed size so that they are captured.

What is captured is the trainer's own `training_step`, with all that it does to the loss. The
numbers that it divides by change from step to step, so they lie in tensors. Clipping, messages
between processes and the update are the trainer's, after the passes of all batches of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arena import Arena
from ..data.batches import Batch
from ..encoder import Encoder
from .fixed import FixedSteps

__all__ = ["Passes"]


class Passes:
    """Forward and backward passes that add to the gradients in an arena.

    Parameters
    ----------
    model, encoder, given, record, after, say
        As for `FixedSteps`.
    arena : Arena
        Where gradients are, all in place before a pass.
    run : callable
        Takes the model's inputs, the number of labels in all batches of a step or None, and
        the number of these batches, both as tensors; returns the loss.

    Attributes
    ----------
    steps : FixedSteps
        What runs them.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        arena: Arena,
        run: Callable[[dict[str, Any], Tensor | None, Tensor], Tensor],
        given: Sequence[int],
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
        after: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._run = run
        self._batches = arena.values.new_ones(())
        self._labels: dict[tuple[torch.dtype, torch.Size], Tensor] = {}
        self._now: Tensor | None = None
        self._trained = list(arena.parameters.values())
        rates = [
            rate
            for layer in encoder.stack.layers
            for rate in (layer.dropout, layer.middle.dropout, layer.end.dropout)
        ]
        self._rates = [rate for rate in rates if rate is not None]
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        self.steps = FixedSteps(
            model, encoder, self._pass, given, arena.values.device, record, after, say
        )

    def __call__(self, batch: Batch, labels: Any, batches: int) -> Tensor | None:
        """Run a batch; return its loss, or None if it has to go another way.

        Parameters
        ----------
        batch : dict
            On any device.
        labels : Tensor, int or None
            How many there are in all batches of the step.
        batches : int
            How many these are.
        """
        self._now = kind = None
        if labels is not None:
            labels = torch.as_tensor(labels)
            kind = labels.dtype, labels.shape
            if kind not in self._labels:
                self._labels[kind] = torch.ones_like(labels, device=self._batches.device)
            self._now = self._labels[kind].copy_(labels, non_blocking=True)
        self._batches.fill_(batches)
        return self.steps(batch, also=(kind, *self._model()))

    def _pass(self, inputs: dict[str, Any], lr: Tensor) -> Tensor:
        return self._run(inputs, self._now, self._batches)

    def _model(self) -> tuple[Any, ...]:
        """Return what callbacks may change of a model while it trains."""
        trains = tuple(parameter.requires_grad for parameter in self._trained)
        drops = [dropout.p for dropout in self._dropouts] + [rate() for rate in self._rates]
        return trains, tuple(drops)
