"""How deep the backward pass goes: to the lowest place at which something needs a gradient."""

from __future__ import annotations

from collections.abc import Sequence

from .stack import KEY, QUERY, ROLES, UP, VALUE, Stack

__all__ = ["END", "ENTRY", "INNER", "INPUT", "MIDDLE", "QKV", "lowest", "place"]

#: Places at which a parameter can be, from the bottom: the input, the first junction of a
#: pre-norm encoder, and in each layer its q, k and v, a junction, the first projection of the
#: feed-forward block, and another junction.
INPUT, ENTRY = 0, 1
QKV, MIDDLE, INNER, END = range(4)


def place(layer: int, part: int) -> int:
    """Return the place of a part of a layer; those above have greater numbers."""
    return 2 + 4 * layer + part


def lowest(stack: Stack, needs: Sequence[bool], needs_below: bool) -> int:
    """Return the lowest place at which something needs a gradient.

    Parameters
    ----------
    stack : Stack
        Whose biases these are.
    needs : sequence of bool
        Whether each bias needs one.
    needs_below : bool
        Whether anything below the layers does.
    """
    if needs_below or not stack.stops:
        return INPUT
    places = [_place_of(stack, i) for i, needed in enumerate(needs) if needed]
    return min(places, default=place(len(stack.layers), 0))


def _place_of(stack: Stack, index: int) -> int:
    layer, role = divmod(index, len(ROLES))
    if role in (QUERY, KEY, VALUE):
        return place(layer, QKV)
    if role == UP:
        return place(layer, INNER)
    for number, one in enumerate(stack.layers):
        if index in (one.middle.bias, one.middle.beta):
            return place(number, MIDDLE)
        if index in (one.end.bias, one.end.beta):
            return place(number, END)
    return ENTRY
