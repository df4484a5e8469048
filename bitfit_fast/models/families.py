"""Which bias is which: one table row per model family.

A row names, for every bias of a family, the term that the BitFit paper (Ben Zaken et al.,
ACL 2022) or its natural extension uses. Paths are exact, so a term never matches
a second kind of bias. Families without a row, and biases that a row does not know, fall back
to the type of the module that holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

__all__ = [
    "ALIASES",
    "FAMILIES",
    "PAPER_TERMS",
    "Bias",
    "Family",
    "StackRow",
    "biases",
    "family_of",
    "fused_pairs",
    "head_prefix",
]

#: The paper's kinds of bias, in the order in which a transformer layer meets them.
PAPER_TERMS = (
    "embedding-layernorm",
    "query",
    "key",
    "value",
    "attention-output",
    "attention-layernorm",
    "intermediate",
    "output",
    "output-layernorm",
    "pooler",
)

#: The paper's symbols for them.
ALIASES = {
    "m1": "attention-output",
    "ln1": "attention-layernorm",
    "m2": "intermediate",
    "m3": "output",
    "ln2": "output-layernorm",
}
ALIASES |= {f"b_{symbol}": term for symbol, term in ALIASES.items()}
ALIASES |= {"b_q": "query", "b_k": "key", "b_v": "value"}

_BIAS_NAME = re.compile(r"^bias$|_bias$|^bias_")


@dataclass(frozen=True)
class StackRow:
    """What it takes to run all layers of a family as one operation.

    Attributes
    ----------
    container : str
        Path, below the base model, of the module that runs the layers.
    dropouts : dict of str to str
        Term -> path, below a layer, of the dropout of what that linear layer gives; `query`
        stands for the one of attention's probabilities. Those of a number, not a module, are
        the paths of the attribute.
    activation : str
        Path of the activation below a layer.
    positions : str
        `index`, or `padding` where positions count from behind the padding's index.
    first : tuple of str
        How the names of classes end whose head reads nothing but the first token.
    padding : tuple of str
        How those end whose head looks at tokens of padding, too.
    score_bias : str, optional
        Path, below the container, of the embedding that adds to attention's scores what
        the container's `compute_position_bias` makes of it.
    """

    container: str
    dropouts: dict[str, str]
    activation: str
    positions: str = "index"
    first: tuple[str, ...] = (
        "ForSequenceClassification",
        "ForMultipleChoice",
        "ForImageClassification",
    )
    # the scores of a question's answers are compared with those at padding
    padding: tuple[str, ...] = ("ForQuestionAnswering",)
    score_bias: str | None = None


@dataclass(frozen=True)
class Family:
    """Where one family of models keeps its biases.

    Attributes
    ----------
    layer : str
        Path of an encoder layer below the base model, `*` for each number, `**.` for any
        modules above. Layers are counted in the order of the model, so families with
        shared layers (ALBERT) have as many layers as they have sets of parameters.
    inside : dict of str to str
        Term -> path of its bias below a layer.
    outside : dict of str to str
        Term -> path of its bias below the base model.
    fused : dict of str to str
        Term of a linear layer's bias -> path, below a layer, of the activation or LayerNorm
        that takes its output: straight, or after dropout and a residual.
    pre_norm : bool
        Whether what such a LayerNorm takes goes on beside it, as a residual.
    zero_gradient : tuple of str
        Terms whose gradient is identically zero. Softmax does not change when a number is
        added to all scores of a query, and a key bias does no more than that, as long as
        position enters neither queries nor keys after the bias.
    stack : StackRow, optional
        For families whose layers can run as one operation.
    """

    layer: str
    inside: dict[str, str]
    outside: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    pre_norm: bool = False
    zero_gradient: tuple[str, ...] = ()
    stack: StackRow | None = None

    def layer_path(self) -> re.Pattern[str]:
        """Return `layer` as a regular expression that ends behind the layer's dot."""
        path = re.escape(self.layer).replace(r"\*\*\.", r"(?:[^.]+\.)*?")
        return re.compile(path.replace(r"\*", r"\d+") + r"\.")


@dataclass(frozen=True)
class Bias:
    """One bias parameter of a model.

    Attributes
    ----------
    name : str
        Name in `model.named_parameters()`.
    term : str
        What kind of bias it is.
    layer : int or None
        Encoder layer that holds it, None outside of the layers.
    named : bool
        False where only the fallback by module type knew a term.
    zero_gradient : bool
        Whether its gradient is identically zero.
    """

    name: str
    term: str
    layer: int | None
    named: bool
    zero_gradient: bool = False


def _module(bias: str) -> str:
    """Return the path of the module that holds a bias."""
    return bias.removesuffix(".bias")


_BERT_STACK = StackRow(
    "encoder",
    {
        "query": "attention.self.dropout",
        "attention-output": "attention.output.dropout",
        "output": "output.dropout",
    },
    "intermediate.intermediate_act_fn",
)


def _bert(stack: StackRow | None = _BERT_STACK, **changes: str) -> Family:
    """Return BERT's row, with the bias paths named in `changes` put elsewhere."""
    inside = {
        "query": "attention.self.query.bias",
        "key": "attention.self.key.bias",
        "value": "attention.self.value.bias",
        "attention-output": "attention.output.dense.bias",
        "attention-layernorm": "attention.output.LayerNorm.bias",
        "intermediate": "intermediate.dense.bias",
        "output": "output.dense.bias",
        "output-layernorm": "output.LayerNorm.bias",
    }
    outside = {
        "embedding-layernorm": "embeddings.LayerNorm.bias",
        "pooler": "pooler.dense.bias",
        "embedding-projection": "embeddings_project.bias",  # ELECTRA small
    }
    inside.update({term.replace("_", "-"): path for term, path in changes.items()})
    fused = {
        "intermediate": "intermediate.intermediate_act_fn",
        "attention-output": _module(inside["attention-layernorm"]),
        "output": _module(inside["output-layernorm"]),
    }
    return Family("encoder.layer.*", inside, outside, fused, zero_gradient=("key",), stack=stack)


_BERT = _bert()
_ROBERTA = _bert(replace(_BERT_STACK, positions="padding"))
_DEBERTA_OUTSIDE = {
    "embedding-layernorm": "embeddings.LayerNorm.bias",
    "relative-layernorm": "encoder.LayerNorm.bias",
    "convolution": "encoder.conv.conv.bias",
    "convolution-layernorm": "encoder.conv.LayerNorm.bias",
}
_VIT = Family(
    "layers.*",
    {
        "query": "attention.q_proj.bias",
        "key": "attention.k_proj.bias",
        "value": "attention.v_proj.bias",
        "attention-output": "attention.o_proj.bias",
        # pre-norm: each LayerNorm stands before the block that it is named after
        "attention-layernorm": "layernorm_before.bias",
        "output-layernorm": "layernorm_after.bias",
        "intermediate": "mlp.fc1.bias",
        "output": "mlp.fc2.bias",
    },
    {
        "patch-embedding": "embeddings.patch_embeddings.projection.bias",
        "final-layernorm": "layernorm.bias",
        "pooler": "pooler.dense.bias",
    },
    {"intermediate": "mlp.activation_fn", "attention-output": "layernorm_after"},
    pre_norm=True,
    zero_gradient=("key",),
    stack=StackRow(
        "layers",
        {
            "query": "attention.attention_dropout",
            "attention-output": "dropout",
            "output": "dropout",
        },
        "mlp.activation_fn",
    ),
)

#: Rows by the `model_type` of the model's configuration.
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _BERT,
    "mpnet": _bert(
        StackRow(
            "encoder",
            {
                "query": "attention.attn.dropout",
                "attention-output": "attention.dropout",
                "output": "output.dropout",
            },
            "intermediate.intermediate_act_fn",
            positions="padding",
            score_bias="relative_attention_bias",
        ),
        query="attention.attn.q.bias",
        key="attention.attn.k.bias",
        value="attention.attn.v.bias",
        attention_output="attention.attn.o.bias",
        attention_layernorm="attention.LayerNorm.bias",
    ),
    "distilbert": Family(
        "transformer.layer.*",
        {
            "query": "attention.q_lin.bias",
            "key": "attention.k_lin.bias",
            "value": "attention.v_lin.bias",
            "attention-output": "attention.out_lin.bias",
            "attention-layernorm": "sa_layer_norm.bias",
            "intermediate": "ffn.lin1.bias",
            "output": "ffn.lin2.bias",
            "output-layernorm": "output_layer_norm.bias",
        },
        {"embedding-layernorm": "embeddings.LayerNorm.bias"},
        {
            "intermediate": "ffn.activation",
            "attention-output": "sa_layer_norm",
            "output": "output_layer_norm",
        },
        zero_gradient=("key",),
        stack=StackRow(
            "transformer",
            {"query": "attention.dropout", "output": "ffn.dropout"},
            "ffn.activation",
        ),
    ),
    "albert": Family(
        "encoder.albert_layer_groups.*.albert_layers.*",
        {
            "query": "attention.query.bias",
            "key": "attention.key.bias",
            "value": "attention.value.bias",
            "attention-output": "attention.dense.bias",
            "attention-layernorm": "attention.LayerNorm.bias",
            "intermediate": "ffn.bias",
            "output": "ffn_output.bias",
            "output-layernorm": "full_layer_layer_norm.bias",
        },
        {
            "embedding-layernorm": "embeddings.LayerNorm.bias",
            "embedding-projection": "encoder.embedding_hidden_mapping_in.bias",
            "pooler": "pooler.bias",
        },
        {
            "intermediate": "activation",
            "attention-output": "attention.LayerNorm",
            "output": "full_layer_layer_norm",
        },
        zero_gradient=("key",),
    ),
    "deberta": Family(
        "encoder.layer.*",
        # one projection makes q, k and v; only q and v have a bias, kept beside it
        {
            **_BERT.inside,
            "query": "attention.self.q_bias",
            "value": "attention.self.v_bias",
            "position-query": "attention.self.pos_q_proj.bias",
        },
        _DEBERTA_OUTSIDE,
        _BERT.fused,
    ),
    "deberta-v2": Family(
        "encoder.layer.*",
        {
            **_BERT.inside,
            "query": "attention.self.query_proj.bias",
            "key": "attention.self.key_proj.bias",
            "value": "attention.self.value_proj.bias",
            "position-query": "attention.self.pos_query_proj.bias",
            "position-key": "attention.self.pos_key_proj.bias",
        },
        _DEBERTA_OUTSIDE,
        _BERT.fused,
    ),
    "vit": _VIT,
    "deit": _VIT,
    "gpt2": Family(
        "h.*",
        {
            "query-key-value": "attn.c_attn.bias",
            "attention-output": "attn.c_proj.bias",
            # pre-norm, as above
            "attention-layernorm": "ln_1.bias",
            "output-layernorm": "ln_2.bias",
            "intermediate": "mlp.c_fc.bias",
            "output": "mlp.c_proj.bias",
        },
        {"final-layernorm": "ln_f.bias"},
        {"intermediate": "mlp.act", "attention-output": "ln_2"},
        pre_norm=True,
    ),
    "opt": Family(
        "decoder.layers.*",
        {
            "query": "self_attn.q_proj.bias",
            "key": "self_attn.k_proj.bias",
            "value": "self_attn.v_proj.bias",
            "attention-output": "self_attn.out_proj.bias",
            # pre-norm but for OPT-350m
            "attention-layernorm": "self_attn_layer_norm.bias",
            "output-layernorm": "final_layer_norm.bias",
            "intermediate": "fc1.bias",
            "output": "fc2.bias",
        },
        {"final-layernorm": "decoder.final_layer_norm.bias"},
        {"intermediate": "activation_fn", "attention-output": "final_layer_norm"},
        pre_norm=True,
        zero_gradient=("key",),
    ),
}


#: A model without a row: no bias has a name, and the first number in a path counts the layers.
_UNKNOWN = Family("**.*", {})


def family_of(model: nn.Module) -> Family:
    """Return the row of a model's family, or the one for models without a row."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""), _UNKNOWN)


def head_prefix(model: nn.Module) -> str | None:
    """Return the name prefix that separates the pretrained base from the task head.

    Parameters
    ----------
    model : nn.Module
        A transformers model, or any module.

    Returns
    -------
    str or None
        Names with this prefix belong to the base and all others to the head; empty for a
        model without a head. None if the model does not say, as a plain `nn.Module`.
    """
    prefix = getattr(model, "base_model_prefix", None)
    if prefix is None:
        return None
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _fallback_term(module: nn.Module) -> str:
    kind = type(module).__name__
    if "Norm" in kind:
        return "layernorm"
    if isinstance(module, nn.Linear) or kind == "Conv1D":  # GPT-2's transposed linear
        return "linear"
    if "Conv" in kind:
        return "convolution"
    return "other"


def biases(model: nn.Module) -> Iterator[Bias]:
    """Yield every bias parameter of the model's base (not of its head), in model order.

    Parameters
    ----------
    model : nn.Module
        A transformers model of any kind, or any module.

    Yields
    ------
    Bias
        A parameter shared by several modules comes once, under its first name.
    """
    prefix = head_prefix(model) or ""
    family = family_of(model)
    outside = {path: term for term, path in family.outside.items()}
    inside = {path: term for term, path in family.inside.items()}
    layer_path = family.layer_path()
    layers: dict[str, int] = {}
    for name, _ in model.named_parameters():
        if not name.startswith(prefix):
            continue
        path = name[len(prefix) :]
        match = layer_path.match(path)
        layer = layers.setdefault(match.group(), len(layers)) if match else None
        owner, _, attribute = name.rpartition(".")
        if not _BIAS_NAME.search(attribute):
            continue
        term = inside.get(path[match.end() :]) if match else outside.get(path)
        named, term = term is not None, term or _fallback_term(model.get_submodule(owner))
        yield Bias(name, term, layer, named, named and term in family.zero_gradient)


def fused_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of linear layers and of what takes their output in each layer.

    What takes it is an activation or a LayerNorm. Modules that this model lacks are left out.
    """
    prefix = head_prefix(model) or ""
    family = family_of(model)
    names = dict(model.named_modules())
    layer_path = family.layer_path()
    for name in names:
        path = f"{name}.".removeprefix(prefix)
        if not name.startswith(prefix) or not layer_path.fullmatch(path):
            continue
        for term, taker in family.fused.items():
            pair = (f"{name}.{_module(family.inside[term])}", f"{name}.{taker}")
            if all(member in names for member in pair):
                yield pair
