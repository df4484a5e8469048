"""Loss, metrics and predictions over a whole split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Collate, evaluation_batches, move
from ..encoder import encoder_of, for_model
from ..kinds import KINDS, Encoded, forward
from ..random_state import device_of

__all__ = ["evaluate", "predict"]


def predict(
    model: nn.Module,
    encoded: Encoded,
    collate: Collate,
    batch_size: int = 32,
    precision: str = "fp32",
) -> tuple[Any, float | None]:
    """Run the model over all examples.

    Parameters
    ----------
    model : nn.Module
        Put into evaluation mode for the call.
    encoded : Encoded
        A split as the kind's `encode` made it.
    collate : callable
        How batches are formed.
    batch_size : int
        Features a batch.
    precision : str
        `fp32`, or `bf16` for autocast; an encoder that runs as one operation computes in its
        own precision, and the head behind it in that of its weights, as they train.

    Returns
    -------
    predictions : sequence
        One an example, as the kind's `decode` makes them: logits `[N, classes]`, the best
        answers of each question, the tags of each sentence's words.
    loss : float or None
        Mean over what the loss is of: examples, windows, or words; None without labels.
    """
    device = device_of(model)
    kind, features = KINDS[encoded.kind], encoded.features
    labelled = encoded.split.labels is not None
    kept: list[Tensor] = [torch.empty(0)] * len(features)
    total, weight = torch.zeros((), device=device, dtype=torch.float64), 0
    encoder = encoder_of(model)
    # a patched encoder in bf16 needs no casts, and the head is to be as it was trained
    casts = precision == "bf16" and (encoder is None or encoder.stack.dtype != torch.bfloat16)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, casts):
            for indices, batch in evaluation_batches(features, collate, batch_size):
                weighs = kind.weigh(batch) if labelled else 0
                output = forward(model, for_model(move(batch, device)))
                for i, row in zip(indices, kind.keep(output)):
                    kept[i] = row
                if weighs:  # the mean of nothing is not a number
                    total += output.loss.double() * weighs
                    weight += weighs
    finally:
        model.train(was_training)
    return kind.decode(encoded, kept), total.item() / max(1, weight) if labelled else None


def evaluate(
    model: nn.Module,
    encoded: Encoded,
    collate: Collate,
    metrics: Sequence[str],
    precision: str = "fp32",
) -> dict[str, float]:
    """Return `loss` and the metrics over labelled examples."""
    predictions, loss = predict(model, encoded, collate, precision=precision)
    scores = KINDS[encoded.kind].score(metrics, predictions, encoded.split)
    return {"loss": loss or 0.0, **scores}
