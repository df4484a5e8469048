"""Which elements dropout keeps: a counter-based generator, so that no mask is ever stored.

Element (m, n) of an `[M, N]` tensor has the 16-bit number n mod 8 of the Philox4x32 call with key
`seed + m` and counter n div 8 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"; 7 rounds are the fewest that pass all of its statistical tests). It is kept where that
number is at least `65536 p`, rounded. One call serves 8 elements, since the ten or so integer
instructions of a round would otherwise take longer than moving the element.

One key a row, so that no counter passes 2^32 however many rows there are. The seed lies in
device memory, so that a captured graph can draw a new one at each replay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._constants import ROUNDS

__all__ = ["kept"]

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def kept(seed_ptr, rows, first, threshold, BLOCK_N: tl.constexpr):
    """Return which elements of a tile are kept, `[BLOCK_M, BLOCK_N]`.

    `rows` is `[BLOCK_M]` int64, `first` the tile's first column, a multiple of 8.
    """
    key = tl.load(seed_ptr) + rows
    counter = first // 8 + tl.arange(0, BLOCK_N // 8)
    a, b, c, d = tl.randint4x(key[:, None], counter[None, :], _ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d)).to(tl.uint32, bitcast=True)
    numbers = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(numbers, (rows.shape[0], BLOCK_N)).to(tl.int32) >= threshold
