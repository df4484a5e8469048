"""What the kernels and their PyTorch definitions have in common; nothing here needs Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "MAX_COLUMNS",
    "MOST_PARTS",
    "MOST_TABLES",
    "PART",
    "ROUNDS",
    "keeps_sum",
    "quantisation",
    "sum_dtype",
    "threshold",
]

#: Range of each activation's derivative, rounded outwards.
ACTIVATIONS = {
    "gelu": (-0.13, 1.13),
    "gelu_tanh": (-0.13, 1.13),
    "relu": (0.0, 1.0),
    "silu": (-0.1, 1.1),
    "tanh": (0.0, 1.0),
}

#: The widest row of the LayerNorm kernels, which hold one in registers.
MAX_COLUMNS = 8192

#: Tables of embeddings whose rows one kernel adds.
MOST_TABLES = 3

#: Numbers that a program of the optimiser takes at once, and the most partial sums of squares,
#: which every program of the update adds up again.
PART, MOST_PARTS = 1024, 512

#: Rounds of Philox4x32: the fewest that pass its statistical tests (Salmon et al. 2011).
ROUNDS = 7


def quantisation(act: str) -> tuple[float, float]:
    """Return where the range of an activation's derivative begins, and its 255th part."""
    low, high = ACTIVATIONS[act]
    return low, (high - low) / 255


def threshold(p: float) -> int:
    """Return the 16-bit number below which dropout drops an element."""
    return round(65536 * p)


def keeps_sum(b: Any, residual: Any, p: float, returns_sum: bool) -> bool:
    """Return whether what LayerNorm normalises is in memory anyway, as its input or output.

    It is then kept for the backward pass, and the normalised rows are not.
    """
    return returns_sum or (b is None and residual is None and not p)


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Return the dtype of the sum that LayerNorm normalises, as PyTorch adds."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
