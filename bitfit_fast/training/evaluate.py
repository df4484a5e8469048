"""Loss, metrics and predictions over a whole split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.batches import Collate, Features, evaluation_batches, move
from ..encoder import for_model

__all__ = ["evaluate", "predict"]


def predict(
    model: nn.Module,
    features: Features,
    collate: Collate,
    batch_size: int = 32,
    precision: str = "fp32",
) -> tuple[Tensor, float | None]:
    """Run the model over all examples.

    Parameters
    ----------
    model : nn.Module
        Put into evaluation mode for the call.
    features : list of dict
        From `tokenize`.
    collate : callable
        How batches are formed.
    batch_size : int
        Examples a batch.
    precision : str
        `fp32` or `bf16`.

    Returns
    -------
    logits : Tensor
        `[N, classes]` fp32 on the CPU, in the order of `features`.
    loss : float or None
        Mean over examples; None without labels.
    """
    device = next(model.parameters()).device
    labelled = "labels" in features[0]
    logits: list[Tensor] = [torch.empty(0)] * len(features)
    total = torch.zeros((), device=device, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
            for indices, batch in evaluation_batches(features, collate, batch_size):
                output = model(**for_model(model, move(batch, device)))
                for i, row in zip(indices, output.logits.float().cpu()):
                    logits[i] = row
                if labelled:
                    total += output.loss.double() * len(indices)
    finally:
        model.train(was_training)
    return torch.stack(logits), total.item() / len(features) if labelled else None


def evaluate(
    model: nn.Module,
    features: Features,
    collate: Collate,
    metrics: Sequence[str],
    precision: str = "fp32",
) -> dict[str, float]:
    """Return `loss` and the metrics over labelled examples."""
    from ..metrics import compute  # torchmetrics takes a second that --help need not wait for

    logits, loss = predict(model, features, collate, precision=precision)
    labels = [feature["labels"] for feature in features]
    return {"loss": loss or 0.0, **compute(metrics, logits, labels)}
