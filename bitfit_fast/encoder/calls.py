"""How a patched model is called: its base model takes the padding out, its layers are the stack.

No forward method is written again. The base model's own runs, on packed tokens; where it would
run the layers, the stack runs instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BitFitError
from ..packing import Packing
from .encoder import Encoder

__all__ = ["ENCODER", "LENGTHS", "base_class", "container_class", "for_model", "head_class"]

#: Attribute of a base model, and of the module that runs its layers.
ENCODER = "_bitfit_fast_encoder"

#: Key of a batch, and attribute of its mask: the tokens of each sequence, of a mask that is ones,
#: then zeros. To read them off the mask would wait for a GPU.
LENGTHS = "packed_lengths"

#: Arguments of base models that say what is known anyway, or nothing.
_HARMLESS = {
    "num_items_in_batch",
    "return_dict",
    "use_cache",
    "interpolate_pos_encoding",
    "bool_masked_pos",
}


def for_model(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what a model takes of a batch, with the lengths on its mask.

    Heads hand the mask on as it is, and not all of them other arguments.
    """
    if LENGTHS not in batch:
        return batch
    given = dict(batch)
    lengths, mask = given.pop(LENGTHS), given.get("attention_mask")
    if mask is not None:
        # not the caller's own, who may fill it with another batch
        given["attention_mask"] = mask = mask.detach()
        setattr(mask, LENGTHS, lengths)
    return given


def base_class(kind: Any) -> Any:
    """Return the class of a base model that takes the padding out of its input."""
    return _subclass(_untraced_base(), kind, base_class)


def container_class(kind: Any) -> Any:
    """Return the class of the module that runs the layers, which runs the stack instead."""
    mixin = _List if issubclass(kind, nn.ModuleList) else _Container
    return _subclass(mixin, kind, container_class)


def head_class(kind: Any) -> Any:
    """Return the class of a whole model that says when its base model is called by its head."""

    # its signature is read: which columns of a data set it takes, and whether more
    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        encoder: Encoder | None = vars(self).get(ENCODER)
        if encoder is None:  # another model of this class
            return kind.forward(self, *args, **kwargs)
        before, encoder.in_head = encoder.in_head, True
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            encoder.in_head = before

    return _subclass(type("_Head", (), {"forward": forward}), kind, head_class)


#: Patched classes by what makes them, and of which class: those of copies are the same.
_MADE: dict[tuple[Any, Any], Any] = {}


def _subclass(mixin: type, kind: type[nn.Module], maker: Callable[..., Any]) -> Any:
    if (maker, kind) in _MADE:
        return _MADE[maker, kind]

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        # by its name, the class of the model would be found instead
        return _instance, (maker, kind), *kind.__reduce_ex__(self, protocol)[2:]

    # transformers looks up by the class's full name which inner states it can return
    names = ("__module__", "__qualname__", "__doc__")
    fields = {"_replaces": kind, "__reduce_ex__": reduced}
    fields |= {name: getattr(kind, name) for name in names}
    return _MADE.setdefault((maker, kind), type(kind.__name__, (mixin, kind), fields))


def _instance(maker: Callable[..., Any], kind: type[nn.Module]) -> Any:
    """Return an empty module of a patched class, which a copy or a pickle is made in."""
    made = maker(kind)
    return made.__new__(made)


class _Base:
    """A base model that takes the padding out before its own forward method runs.

    The compiler is not to trace that.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        encoder: Encoder = vars(self)[ENCODER]
        if getattr(self, "_is_replica", False):
            raise BitFitError(
                "nn.DataParallel cannot run a patched encoder, whose weights are on one device; "
                "use DistributedDataParallel, or unpatch the model"
            )
        forward = super().forward  # type: ignore[misc]
        main = self.main_input_name  # type: ignore[attr-defined]
        names = (main, "attention_mask")
        if encoder.fixed is not None:
            fixed, own = encoder.fixed
            with encoder.running(fixed):
                return forward(**{**dict(zip(names, args)), **kwargs, **own})
        # who calls it without the head may read every token
        if len(args) > len(names) or encoder.in_head is False:
            return forward(*args, **kwargs)
        given = {**dict(zip(names, args)), **kwargs}
        inputs = {key: value for key, value in given.items() if value is not None}
        x, mask = inputs.pop(main, None), inputs.pop("attention_mask", None)
        if x is None or not x.numel() or not _understood(self, inputs):  # type: ignore[arg-type]
            return forward(*args, **kwargs)
        if main != "input_ids":
            if mask is not None or inputs.get("interpolate_pos_encoding"):
                return forward(*args, **kwargs)
            positions: Any = encoder.embeddings.position_embeddings
            with encoder.running(Packing.uniform(x.shape[0], positions.shape[1], x.device)):
                return forward(*args, **kwargs)
        if mask is not None and mask.shape != x.shape:
            return forward(*args, **kwargs)
        lengths: Any = getattr(mask, LENGTHS, None)
        packing: Packing | None
        if mask is None:
            packing = Packing.uniform(x.shape[0], x.shape[1], x.device)
        elif _fit(lengths, x):
            packing = Packing(tuple(lengths), x.shape[1], x.device)
        else:
            packing = Packing.of_mask(mask)
        if packing is None or (encoder.reads_padding and packing.tokens < x.numel()):
            return forward(*args, **kwargs)
        if "position_ids" not in inputs:
            longest = None if mask is None else packing.longest
            inputs["position_ids"] = encoder.positions(x, longest)
        for key in ("position_ids", "token_type_ids"):
            if key in inputs:
                inputs[key] = packing.pack(inputs[key].expand_as(x))[None]
        with encoder.running(packing):
            return forward(**{main: packing.pack(x)[None], **inputs})


@functools.cache
def _untraced_base() -> type:
    """Return `_Base` for patched classes; to say so imports the compiler, which takes seconds."""
    return type("_Base", (_Base,), {"forward": torch.compiler.disable(_Base.forward)})


def _fit(lengths: Sequence[int] | None, ids: Tensor) -> bool:
    if lengths is None or len(lengths) != len(ids):
        return False
    return min(lengths) >= 1 and max(lengths) <= ids.shape[1]


def _understood(base: nn.Module, inputs: dict[str, Any]) -> bool:
    """Return whether nothing is asked for but the output of tokens."""
    config: Any = base.config
    if config.output_hidden_states or config.output_attentions:
        return False
    known = {"token_type_ids", "position_ids"}
    return all(
        key in known or key in _HARMLESS or (not isinstance(value, Tensor) and not value)
        for key, value in inputs.items()
    )


class _Container:
    """A module that runs the layers, as the stack where its input is packed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        encoder: Encoder = vars(self)[ENCODER]
        if encoder.packing is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        from transformers import modeling_outputs

        return modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=encoder.run(self, hidden_states)
        )


class _List:
    """A list of layers, which is one layer where the stack runs."""

    def __iter__(self) -> Iterator[Any]:
        encoder: Encoder = vars(self)[ENCODER]
        if encoder.packing is None:
            yield from super().__iter__()  # type: ignore[misc]
        else:
            yield lambda hidden, *args, **kwargs: encoder.run(self, hidden)
