"""Fused operations: for each its PyTorch definition, its custom operations, its Function.

On a CUDA tensor they run Triton kernels, on a CPU their definitions in PyTorch, and with
`TRITON_INTERPRET=1` the kernels in Triton's interpreter. `BITFIT_FAST_BACKEND` forces one:
`auto`, `triton` or `torch`.
"""

from .activation import ACTIVATIONS, bias_activation
from .column_sum import column_sum
from .layer_norm import dropout_add_layer_norm, layer_norm
from .linear import feed_forward, linear

__all__ = [
    "ACTIVATIONS",
    "bias_activation",
    "column_sum",
    "dropout_add_layer_norm",
    "feed_forward",
    "layer_norm",
    "linear",
]
