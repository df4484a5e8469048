"""Let a model run its encoder as one operation, in place, and undo that.

No forward method is written again. The base model's own runs, on packed tokens: its class becomes
a subclass that takes the padding out before, and the module that runs the layers becomes one that
runs the stack instead. Everything else, embeddings, poolers, heads, losses, is the model's.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..additions import obstacle
from ..arena import Arena
from ..errors import BitFitError, listed
from ..models.families import FAMILIES, Family, StackRow, family_of, head_prefix
from ..modules import Dropout, LayerNorm, activation_name, original
from ..ops.embedding import gathers
from ..packing import Packing
from .embeddings import Embedding
from .operation import run_stack
from .product import Product
from .stack import MEMORY, ROLES, Junction, Layer, Rate, Stack

__all__ = [
    "LENGTHS",
    "PRECISIONS",
    "Encoder",
    "encoder_of",
    "fixed_refusal",
    "for_model",
    "install",
    "refusal",
    "uninstall",
]

#: Dtypes of frozen weights and activations, by name.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Attribute of a base model, and of the module that runs its layers.
_ENCODER = "_bitfit_fast_encoder"

#: Argument of a patched model: the tokens of each sequence, of a mask that is ones, then zeros.
#: To read them off the mask would wait for a GPU.
LENGTHS = "packed_lengths"

#: How the names of classes end whose head looks at nothing but tokens' outputs and labels.
_FIXED = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")

#: Arguments of base models that say what is known anyway, or nothing.
_HARMLESS = {
    "num_items_in_batch",
    "return_dict",
    "use_cache",
    "interpolate_pos_encoding",
    "bool_masked_pos",
}


#: What takes the place of modules of the embeddings.
_DROP_INS: tuple[Any, ...] = (LayerNorm, Dropout, Embedding)


@dataclass
class Encoder:
    """A model's encoder as one operation, and what its forward pass needs to know.

    Attributes
    ----------
    stack : Stack
        The layers.
    names : list of str or None
        Of the biases, in the order of the stack's inputs.
    owners : list of nn.Module
        The modules that hold these biases, and the weights.
    frozen : dict of str to Parameter
        The weights, which must not change.
    row : StackRow
        The family's.
    embeddings : nn.Module
        What the stack's input comes from.
    embedding_name : str or None
        Of the bias of their LayerNorm.
    sinks : list of Tensor or None, optional
        Where gradients are added; see `Stack`.
    overwrites : bool
        Whether those of the next batch take the place of what is there.
    projects : bool
        Whether there is a projection between embeddings and layers.
    reads_padding : bool
        Whether the head looks at tokens of padding, which then are computed, too.
    packing, beta
        Of the batch that is running.
    dtype : torch.dtype, optional
        Of the embeddings of that batch, which the model goes on with behind the layers, where
        the layers are given them in another.
    fixed : (Packing, dict), optional
        A packing, and the base model's inputs packed like that, in the place of those that
        it is given; see `given`.
    marks : list of (int, int)
        By which a change of the weights is found.
    sums : list of Tensor
        By which it is told from a weight being overwritten with itself, as data-parallel
        wrappers do.
    """

    stack: Stack
    names: list[str | None]
    owners: list[nn.Module]
    frozen: dict[str, nn.Parameter]
    row: StackRow
    embeddings: nn.Module
    embedding_name: str | None = None
    sinks: Sequence[Tensor | None] | None = None
    overwrites: bool = False
    projects: bool = False
    reads_padding: bool = False
    packing: Packing | None = None
    beta: nn.Parameter | None = None
    dtype: torch.dtype | None = None
    fixed: tuple[Packing, dict[str, Tensor]] | None = None
    marks: list[tuple[int, int]] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.marks = [_mark(weight) for weight in self.frozen.values()]
        self.sums = [_sums(weight) for weight in self.frozen.values()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        """Return what a copied model runs, whose gradients are its own."""
        made = memo[id(self)] = copy.copy(self)
        for each in fields(self):
            setattr(made, each.name, copy.deepcopy(getattr(self, each.name), memo))
        made.sinks = None
        made.__post_init__()
        return made

    def write_to(self, arena: Arena | None) -> None:
        """Add gradients where an arena has them, from now on; None hands them to autograd."""
        if arena is None:
            self.sinks = None
            return
        self.sinks = [
            None if name not in arena.slices else arena.view(name, arena.gradients)
            for name in (*self.names, self.embedding_name)
        ]

    @property
    def biases(self) -> list[Tensor | None]:
        """The biases, or what stands in for them in a functional call."""
        return [owner._parameters["bias"] for owner in self.owners]

    def check(self) -> None:
        """Check that no weight changed, and none trains.

        Raises
        ------
        BitFitError
            With the name of one that did.
        """
        for i, ((name, weight), owner) in enumerate(zip(self.frozen.items(), self.owners)):
            found = _mark(weight)
            written = found != self.marks[i] and found[1] == self.marks[i][1]
            if written and torch.equal(_sums(weight), self.sums[i]):
                self.marks[i] = found
            if owner._parameters["weight"] is not weight or found != self.marks[i]:
                raise BitFitError(
                    f"the weight {name} was changed after the encoder was patched; "
                    "unpatch the model before changing weights, and patch it again"
                )
            if weight.requires_grad:
                raise BitFitError(
                    f"the weight {name} trains now, and the patched encoder computes no gradient "
                    "of weights; unpatch the model first"
                )

    @contextlib.contextmanager
    def running(self, packing: Packing) -> Iterator[None]:
        """Let the layers run as the stack, on a batch packed like this."""
        self.check()
        norm, tables = self._embedding_norm(), self._waiting_tables()
        self.packing, self.beta = packing, None if norm is None else norm.bias
        if norm is not None:
            norm._leaves_bias = True
        for table in tables:
            self.dtype = table.weight.dtype
            # what is between the LayerNorm and the layers has the model's dtype
            between = self.projects or self._drops()
            table._goes_on_in = self.dtype if between else self.stack.dtype
        try:
            yield
        finally:
            self.packing = self.beta = self.dtype = None
            if norm is not None:
                del norm._leaves_bias
            for table in tables:
                del table._goes_on_in

    @contextlib.contextmanager
    def given(self, packing: Packing, inputs: dict[str, Tensor]) -> Iterator[None]:
        """Let the base model run on inputs that are packed already, whatever it is called with."""
        self.fixed = packing, inputs
        try:
            yield
        finally:
            self.fixed = None

    def positions(self, ids: Tensor) -> Tensor:
        """Return the `[B, S]` positions that the model would give to padded tokens."""
        if self.row.positions == "index":
            return torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
        padding = int(self.embeddings.padding_idx)  # type: ignore[arg-type]
        real = ids.ne(padding)
        return real.cumsum(1) * real + padding

    def _embedding_norm(self) -> Any:
        """Return the LayerNorm that the stack's input is the output of, if its bias trains.

        The stack computes that bias's gradient without the gradient of its input.
        """
        norm = getattr(self.embeddings, "LayerNorm", None)
        if type(norm) is not LayerNorm or self.projects or norm.bias is None:
            return None
        if not norm.bias.requires_grad or self._drops() or not torch.is_grad_enabled():
            return None
        return norm

    def _drops(self) -> bool:
        """Return whether elements of the embeddings are dropped."""
        dropout = getattr(self.embeddings, "dropout", None)
        return dropout is not None and Rate(dropout, "p")() > 0

    def _waiting_tables(self) -> list[Embedding]:
        """Return the tables whose rows the LayerNorm behind them can read and add itself.

        That saves launches, and is done where they matter.
        """
        words = getattr(self.embeddings, "word_embeddings", None)
        if type(words) is not Embedding or not gathers(words.weight):
            return []
        tables = [m for m in self.embeddings.children() if type(m) is Embedding]
        norm = getattr(self.embeddings, "LayerNorm", None)
        dtypes = {module.weight.dtype for module in (norm, *tables) if module is not None}
        plain = type(norm) is LayerNorm and dtypes == {torch.float32}
        if not plain or any(map(_hooked, self.embeddings.modules())):
            return []
        return tables

    def run(self, module: Any, hidden: Tensor) -> Tensor:
        """Run the stack on `[1, T, d]` packed or `[B, S, d]` unpadded embeddings."""
        packing = self.packing
        assert packing is not None
        bias = None
        if self.row.score_bias is not None:
            dummy = hidden.new_empty(1, packing.longest, 1)
            bias = module.compute_position_bias(dummy)[0].float()
            # rows that vectors may read to their end
            bias = F.pad(bias, (0, -packing.longest % 16))
            if bias.requires_grad:
                raise BitFitError(
                    f"the weight of {self.row.score_bias} trains now, and the patched encoder "
                    "computes no gradient of weights; unpatch the model first"
                )
        rows, dtype = hidden.flatten(0, 1), self.dtype or hidden.dtype
        overwrites, self.overwrites = self.overwrites, False
        given = (rows, self.biases, packing, bias, self.beta, self.sinks, dtype, overwrites)
        y = run_stack(self.stack, *given)
        return y[:, None] if self.stack.first_only else packing.pad(y)


def _mark(weight: Tensor) -> tuple[int, int]:
    """Return what is another number after a change in place, or of the memory."""
    return weight._version, weight.data_ptr()


@torch.no_grad()
def _sums(weight: Tensor) -> Tensor:
    """Return the sum of a weight's elements, and its length as a vector."""
    total = weight.sum(dtype=torch.float64)
    return torch.stack((total, torch.linalg.vector_norm(weight, dtype=torch.float64)))


def encoder_of(model: nn.Module) -> Encoder | None:
    """Return the encoder that was installed in a model, or None."""
    return vars(_base(model)).get(_ENCODER)


def _base(model: nn.Module) -> nn.Module:
    prefix = (head_prefix(model) or "").removesuffix(".")
    return model.get_submodule(prefix)


def _layers(family: Family, base: nn.Module) -> list[tuple[str, nn.Module]]:
    path = family.layer_path()
    return [(name, m) for name, m in base.named_modules() if path.fullmatch(f"{name}.")]


def _linears(family: Family, layer: nn.Module) -> dict[str, Any]:
    """Return a layer's linear modules and LayerNorms by the term of their bias."""
    return {role: layer.get_submodule(family.inside[role].removesuffix(".bias")) for role in ROLES}


def _hooked(module: nn.Module) -> bool:
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )
    # those with which transformers collects inner states stay for good, and do nothing mostly
    return any(not str(getattr(h, "__module__", "")).startswith("transformers.") for h in hooks)


def refusal(model: nn.Module) -> str | None:
    """Return why a model's encoder cannot run as one operation, or None."""
    if (reason := obstacle(model)) is not None:
        return reason
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = family_of(model)
    if family.stack is None:
        known = listed([name for name, row in FAMILIES.items() if row.stack is not None], 20)
        return f"it is of type '{kind}', and the table has whole encoders for {known}"
    config: Any = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return f"its positions are '{config.position_embedding_type}', not 'absolute'"
    layers = _layers(family, _base(model))
    if not layers:
        return "it has no layers"
    if family.stack.score_bias is not None:
        path = f"{family.stack.container}.{family.stack.score_bias}"
        if _base(model).get_submodule(path).weight.requires_grad:
            return f"the weight of {path} trains"
    for name, layer in layers:
        for role, module in _linears(family, layer).items():
            expected = nn.LayerNorm if "layernorm" in role else nn.Linear
            path = f"{name}.{family.inside[role].removesuffix('.bias')}"
            if type(module) is not expected or "forward" in vars(module):
                return f"{path} is a {type(module).__name__}, not a plain {expected.__name__}"
            if parametrize.is_parametrized(module):
                return f"{path} is parametrized"
            if module.weight is None:
                return f"{path} has no weight"
            if module.weight.requires_grad:
                return f"the weight of {path} trains"
            if not module.weight.is_floating_point() or type(module.weight.data) is not Tensor:
                return f"the weight of {path} is {module.weight.dtype}"
            if module.bias is not None and module.bias.dtype != torch.float32:
                return f"the bias of {path} is {module.bias.dtype}, not torch.float32"
        if hooked := [n for n, m in layer.named_modules() if _hooked(m)]:
            return f"there are hooks on {listed([f'{name}.{n}'.strip('.') for n in hooked], 3)}"
        activation = layer.get_submodule(family.stack.activation)
        if activation_name(activation) is None:
            return f"its activation is {type(activation).__name__}"
    return None


def install(
    model: nn.Module,
    precision: str = "bf16",
    memory: str = "fast",
    first_only: bool | None = None,
    stops: bool = True,
    reads_padding: bool | None = None,
) -> Encoder:
    """Let a model run its encoder as one operation, in place.

    Parameters
    ----------
    model : nn.Module
        Of a family with a row for it, with frozen weights.
    precision : str
        `fp32`, or `bf16`: a copy of the layers' weights in bf16 is made once, and everything
        between embeddings and head is computed in it.
    memory : str
        One of `MEMORY`.
    first_only : bool, optional
        Whether the last layer computes only what a head reads that takes the first token; by
        default where the table says that it does.
    stops : bool
        Whether the backward pass ends at the lowest bias that trains.
    reads_padding : bool, optional
        Whether what comes behind the encoder looks at tokens of padding; by default where
        the table says that the model's head does.

    Returns
    -------
    Encoder
        What runs now.

    Raises
    ------
    BitFitError
        For a model that cannot, or an unknown precision or memory mode.
    """
    if (reason := refusal(model)) is not None:
        raise BitFitError(f"this encoder cannot run as one operation: {reason}")
    for value, valid, what in (
        (precision, PRECISIONS, "precision"),
        (memory, MEMORY, "memory mode"),
    ):
        if value not in valid:
            raise BitFitError(f"unknown {what} '{value}'; valid ones are {listed(valid)}")
    family, base = family_of(model), _base(model)
    row = family.stack
    assert row is not None
    dtype, config = PRECISIONS[precision], getattr(model, "config", None)
    prefix = head_prefix(model) or ""
    names: list[str | None] = []
    owners: list[nn.Module] = []
    frozen: dict[str, nn.Parameter] = {}
    layers = _layers(family, base)
    built, parts = [], []
    for number, (name, layer) in enumerate(layers):
        linears = _linears(family, layer)
        for role, module in linears.items():
            path = f"{prefix}{name}.{family.inside[role]}"
            names.append(None if module.bias is None else path)
            owners.append(module)
            frozen[f"{path.removesuffix('bias')}weight"] = module.weight
        made, thirds = _layer(family, row, number, len(layers), layer, linears, layers, dtype)
        built.append(made)
        parts += thirds
    entry = None
    if family.pre_norm:
        norm = _linears(family, layers[0][1])["attention-layernorm"]
        index = ROLES.index("attention-layernorm")
        entry = Junction(None, index, norm.weight.detach().float(), norm.eps, None)
    head = type(model).__name__
    # ELECTRA's may be told to read something else
    reads = getattr(config, "summary_type", "first")
    elsewhere = head.endswith("ForMultipleChoice") and reads != "first"
    reads_first = head.endswith(row.first) and _is_known_head(model) and not elsewhere
    encoder = Encoder(
        Stack(
            built,
            int(config.num_attention_heads),  # type: ignore[union-attr]
            dtype,
            family.pre_norm,
            entry,
            memory,
            reads_first if first_only is None else first_only,
            stops,
        ),
        names,
        owners,
        frozen,
        row,
        base.embeddings,  # type: ignore[arg-type]
        f"{prefix}{family.outside['embedding-layernorm']}"
        if "embedding-layernorm" in family.outside
        else None,
        projects=hasattr(base, "embeddings_project"),
        reads_padding=(
            head.endswith(row.padding) or elsewhere if reads_padding is None else reads_padding
        ),
    )
    container = base.get_submodule(row.container)
    kinds = [(base, _Base), (container, _container(container))]
    subclasses = [(module, _subclass(mixin, type(module))) for module, mixin in kinds]
    # all that could fail is done: until here the model is as it was
    for weight, part in parts:
        weight.data = part
    encoder.marks = [_mark(weight) for weight in frozen.values()]
    for module, subclass in subclasses:
        vars(module)[_ENCODER] = encoder
        module.__class__ = subclass
    for module in base.embeddings.children():  # type: ignore[union-attr]
        for drop_in in _DROP_INS:
            if type(module) is drop_in._replaces and not _hooked(module):
                module.__class__ = drop_in
    return encoder


def _is_known_head(model: nn.Module) -> bool:
    """Return whether a model's head is made by transformers, of its own parts and PyTorch's.

    Others may read what they like, whatever their name.
    """
    parts = [type(part) for part in model.children() if part is not _base(model)]
    return type(model).__module__.startswith("transformers.models.") and all(
        part.__module__.startswith(("transformers.", "torch.")) for part in parts
    )


@functools.cache
def _takes_more(forward: Any) -> bool:
    kinds = (parameter.kind for parameter in inspect.signature(forward).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def fixed_refusal(model: nn.Module) -> str | None:
    """Return why a patched model cannot run on packed inputs of a fixed size, or None.

    Its head may look at what it is called with, which is then of another shape.
    """
    config: Any = model.config
    head = type(model).__name__
    if not head.endswith(_FIXED) or not _is_known_head(model):
        return f"{head} may look at the padded batch"
    if config.output_hidden_states or config.output_attentions:
        return "hidden states or attentions are asked for"
    return None


def for_model(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch without its lengths, if the model's forward method would refuse them."""
    if LENGTHS not in batch or _takes_more(type(model).forward):
        return batch
    return {key: value for key, value in batch.items() if key != LENGTHS}


def uninstall(model: nn.Module) -> None:
    """Undo `install`: modules have the classes and weights the memory that they had."""
    base, encoder = _base(model), encoder_of(model)
    if encoder is None:
        return
    for module in (base, base.get_submodule(encoder.row.container)):
        module.__class__ = original(module)
        del vars(module)[_ENCODER]
    for module in encoder.embeddings.children():
        if type(module) in _DROP_INS:
            module.__class__ = original(module)
    for weight in encoder.frozen.values():
        if weight.data.untyped_storage().nbytes() > weight.nbytes:
            weight.data = weight.data.clone()


def _layer(
    family: Family,
    row: StackRow,
    number: int,
    count: int,
    layer: nn.Module,
    linears: dict[str, Any],
    layers: list[tuple[str, nn.Module]],
    dtype: torch.dtype,
) -> tuple[Layer, list[tuple[nn.Parameter, Tensor]]]:
    """Return a layer, and the weights that are to look at a part of its one buffer."""

    def product(role: str) -> Product:
        return Product(linears[role].weight.detach().to(dtype))

    def rate(term: str) -> Rate | None:
        if term not in row.dropouts:
            return None
        path = row.dropouts[term]
        owner, _, attribute = path.rpartition(".")
        found = getattr(layer.get_submodule(owner), attribute)
        if isinstance(found, nn.Module):
            return Rate(found, "p")
        return Rate(layer.get_submodule(owner), attribute)

    def junction(bias: str, norm: str, at: int, module: Any) -> Junction:
        gamma = module.weight.detach().float()
        return Junction(
            number * len(ROLES) + ROLES.index(bias),
            at * len(ROLES) + ROLES.index(norm),
            gamma,
            module.eps,
            rate(bias),
        )

    projections = [linears[role] for role in ("query", "key", "value")]
    joined = torch.cat([module.weight.detach() for module in projections])
    parts = []
    if joined.dtype == dtype:
        # the modules look at the one buffer, so that there is no second copy
        parts = [(m.weight, part) for m, part in zip(projections, joined.chunk(3))]
    act = activation_name(layer.get_submodule(row.activation))
    assert act is not None
    if not family.pre_norm:
        middle = junction(
            "attention-output", "attention-layernorm", number, linears["attention-layernorm"]
        )
        end = junction("output", "output-layernorm", number, linears["output-layernorm"])
    else:
        # the LayerNorm behind a block is named after the block before which it stands
        middle = junction(
            "attention-output", "output-layernorm", number, linears["output-layernorm"]
        )
        if number + 1 < count:
            above = _linears(family, layers[number + 1][1])["attention-layernorm"]
            end = junction("output", "attention-layernorm", number + 1, above)
        else:
            index = number * len(ROLES) + ROLES.index("output")
            end = Junction(index, None, None, 0.0, rate("output"))
    made = Layer(
        Product(joined.to(dtype)),
        product("attention-output"),
        product("intermediate"),
        product("output"),
        act,
        rate("query"),
        middle,
        end,
    )
    return made, parts


# ------------------------------------------------------------------------------- subclasses


def _subclass(mixin: type, kind: type[nn.Module]) -> Any:
    # transformers looks up by the class's full name which inner states it can return
    names = ("__module__", "__qualname__", "__doc__")
    fields = {"_replaces": kind, **{name: getattr(kind, name) for name in names}}
    return type(kind.__name__, (mixin, kind), fields)


class _Base:
    """A base model that takes the padding out before its own forward method runs."""

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        encoder: Encoder = vars(self)[_ENCODER]
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
        lengths = kwargs.pop(LENGTHS, None)
        if len(args) > len(names):
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
        packing: Packing | None
        if mask is None:
            packing = Packing.uniform(x.shape[0], x.shape[1], x.device)
        elif _fit(lengths, x):
            packing = Packing(tuple(lengths), x.shape[1], x.device)
        else:
            packing = Packing.of_mask(mask)
        if packing is None or (encoder.reads_padding and packing.tokens < x.numel()):
            return forward(*args, **kwargs)
        inputs.setdefault("position_ids", encoder.positions(x))
        for key in ("position_ids", "token_type_ids"):
            if key in inputs:
                inputs[key] = packing.pack(inputs[key].expand_as(x))[None]
        with encoder.running(packing):
            return forward(**{main: packing.pack(x)[None], **inputs})


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
    return all(key in known or key in _HARMLESS or not value for key, value in inputs.items())


class _Container:
    """A module that runs the layers, as the stack where its input is packed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        encoder: Encoder = vars(self)[_ENCODER]
        if encoder.packing is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        from transformers import modeling_outputs

        return modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=encoder.run(self, hidden_states)
        )


class _List:
    """A list of layers, which is one layer where the stack runs."""

    def __iter__(self) -> Iterator[Any]:
        encoder: Encoder = vars(self)[_ENCODER]
        if encoder.packing is None:
            yield from super().__iter__()  # type: ignore[misc]
        else:
            yield lambda hidden, *args, **kwargs: encoder.run(self, hidden)


def _container(module: nn.Module) -> type:
    return _List if isinstance(module, nn.ModuleList) else _Container
