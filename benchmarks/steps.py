"""What whole steps are measured on: models, batches, and the ways to train them.

A way to train is a `Variant`. The references leave the model as it is; the rungs of the ladder
add the parts of the fast step one after the other, down to the product as it is used.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from provenance import QUICK
from torch import Tensor, nn
from torch.nn import functional as F

import bitfit_fast
from bitfit_fast.encoder import LENGTHS as TOKENS
from bitfit_fast.encoder import install
from bitfit_fast.methods import METHODS
from bitfit_fast.models.families import biases
from bitfit_fast.models.loading import DEFAULT_MODEL
from bitfit_fast.ops._backend import BACKEND_VARIABLE, PRODUCTS_VARIABLE
from bitfit_fast.training.fast import FastBackend, FastStep
from bitfit_fast.training.modules import ModulesBackend
from bitfit_fast.training.reference import ReferenceStep
from bitfit_fast.training.settings import Plan

__all__ = [
    "LENGTHS",
    "MODELS",
    "VARIANTS",
    "Setting",
    "Variant",
    "batches",
    "bias_gradients",
    "build",
    "load",
    "numbers",
    "plan",
    "relative_error",
]

#: Token lengths of the examples of GLUE tasks: {task: {length: examples}}.
LENGTHS = Path(__file__).parent / "lengths.json"
#: The paper's setting pads every example to this, and cuts longer ones.
MAX_LENGTH = 128
MODELS = ("minilm", "bert-base", "tiny")
_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 2000,
}
#: The first tokens of BERT's vocabulary are special.
_FIRST_TOKEN = 1000

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What is trained on: everything that variants have in common.

    Attributes
    ----------
    model : str
        One of `MODELS`.
    task : str
        A task of `LENGTHS`, or a number of tokens that every example has.
    batch_size : int
    dropout : float
        Of attention's probabilities and of hidden states.
    device : torch.device
    """

    model: str
    task: str
    batch_size: int
    dropout: float
    device: torch.device

    def named(self) -> dict[str, Any]:
        """Return it as it stands in results."""
        names = ("model", "task", "batch_size", "dropout")
        return {name: getattr(self, name) for name in names}


@functools.lru_cache(maxsize=1)
def _template(model: str, device: torch.device, seed: int) -> Any:
    """Return a model that is only to be copied."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if model == "minilm":
        made = bitfit_fast.load_model(DEFAULT_MODEL, ["0", "1"], seed)
    else:
        torch.manual_seed(seed)
        config = transformers.BertConfig(**(_TINY if model == "tiny" else {}))
        made = transformers.BertForSequenceClassification(config)
    bitfit_fast.select(made)
    return made.to(device).train()


def load(setting: Setting, attention: str = "sdpa", seed: int = 0) -> Any:
    """Return a model with a new head, its biases and head to be trained, in training mode."""
    model = copy.deepcopy(_template(setting.model, setting.device, seed))
    model.set_attn_implementation(attention)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = setting.dropout
    return model


def _lengths(setting: Setting, count: int, generator: torch.Generator) -> list[int]:
    total = count * setting.batch_size
    if setting.task.isdigit():
        return [int(setting.task)] * total
    histogram = json.loads(LENGTHS.read_text(encoding="utf-8"))[setting.task]
    weights = torch.tensor(list(histogram.values()), dtype=torch.float64)
    drawn = torch.multinomial(weights, total, replacement=True, generator=generator)
    return [int(list(histogram)[i]) for i in drawn.tolist()]


def batches(setting: Setting, count: int, seed: int = 0) -> list[Batch]:
    """Return batches of random tokens, padded to the longest example of each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = _lengths(setting, count, generator)
    vocabulary = _TINY["vocab_size"] if setting.model == "tiny" else 30522
    made = []
    for first in range(0, len(lengths), setting.batch_size):
        some = torch.tensor(lengths[first : first + setting.batch_size])
        shape = len(some), int(some.max())
        mask = (torch.arange(shape[1]) < some[:, None]).long()
        ids = torch.randint(_FIRST_TOKEN, vocabulary, shape, generator=generator) * mask
        labels = torch.randint(0, 2, (len(some),), generator=generator)
        batch = {
            "input_ids": ids,
            "token_type_ids": torch.zeros_like(ids),
            "attention_mask": mask,
            "labels": labels,
        }
        made.append({key: value.to(setting.device) for key, value in batch.items()})
    return made


def _padded(batch: Batch) -> Batch:
    """Pad a batch to the paper's length."""
    more = MAX_LENGTH - batch["input_ids"].shape[1]
    return {k: F.pad(v, (0, more)) if v.ndim == 2 else v for k, v in batch.items()}


def _as_tokens(batch: Batch) -> Batch:
    """Let a batch's padding be tokens like the others."""
    return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


def _with_lengths(batch: Batch) -> Batch:
    """Tell the lengths of a batch, as the product's collation does."""
    mask = batch.get("attention_mask")
    known: Any = {} if mask is None else {TOKENS: tuple(mask.sum(1).tolist())}
    return {**batch, **known}


def plan(setting: Setting, **options: Any) -> Plan:
    """Return a plan whose learning rate is constant, and too small to matter."""
    settings = bitfit_fast.Settings(
        lr=1e-6,
        max_steps=1_000_000,
        warmup=0.0,
        schedule="constant",
        batch_size=setting.batch_size,
        max_length=int(setting.task) if setting.task.isdigit() else MAX_LENGTH,
        **options,
    )
    return Plan.of(settings, "frozen", setting.batch_size, setting.device)


# --------------------------------------------------------------------- pure bf16, by hand


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias.to(x.dtype))


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias.to(x.dtype), self.eps)


class _Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight, self.bias)


def _store_in_bf16(model: nn.Module) -> None:
    """Store frozen weights in bf16; biases and head stay in fp32 and are cast where used."""
    classes = {nn.Linear: _Linear, nn.LayerNorm: _LayerNorm}
    for name, module in model.named_modules():
        if name == "classifier":
            module.__class__ = _Head
        elif type(module) in classes:
            module.__class__ = classes[type(module)]
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


# ------------------------------------------------------------------------------ variants


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes
    ----------
    name, says : str
        The second in words.
    group : str
        `reference`, `other` (methods that train something else), `ladder` or `fast`.
    precision : str
        Of its gradients: `fp32` or `bf16`.
    make : callable
        `(setting, plan)` to a step.
    input : callable
        What becomes of a batch before it is timed.
    environment : mapping of str to str
        Variables that are set while it runs.
    begins : int
        Steps on batches of a kind after which it goes as it will go on.
    """

    name: str
    says: str
    group: str
    precision: str
    make: Callable[[Setting, Plan], Any]
    input: Callable[[Batch], Batch] = lambda batch: batch
    environment: Mapping[str, str] = field(default_factory=dict)
    begins: int = 1


def _reference(setting: Setting, plan: Plan) -> ReferenceStep:
    return ReferenceStep(load(setting), plan)


def _pure(setting: Setting, plan: Plan) -> ReferenceStep:
    # on a CPU its flash attention is slow in bf16
    model = load(setting, "eager" if setting.device.type == "cpu" else "sdpa")
    _store_in_bf16(model)
    return ReferenceStep(model, replace(plan, precision="fp32"))


def _compiled(make: Callable[[Setting, Plan], ReferenceStep], graph: bool = False) -> Any:
    def compiled(setting: Setting, plan: Plan) -> ReferenceStep:
        torch._dynamo.config.recompile_limit = 64
        step = make(setting, plan)
        # a run that only shows that all works has no minutes to compile in
        how: dict[str, Any] = {"backend": "aot_eager" if QUICK else "inductor"}
        if graph and not QUICK:
            how["mode"] = "reduce-overhead"
        # a graph is for one shape
        step.model = torch.compile(step.model, dynamic=not graph, **how)
        return step

    return compiled


def _full(setting: Setting, plan: Plan) -> ReferenceStep:
    model = load(setting)
    METHODS["full"].select(model, "all", None, True)
    return ReferenceStep(model, plan)


def _lora(setting: Setting, plan: Plan) -> ReferenceStep:
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]
    )
    return ReferenceStep(peft.get_peft_model(load(setting), config).train(), plan)


def _modules(setting: Setting, plan: Plan) -> ReferenceStep:
    model = load(setting)
    ModulesBackend().patch(model, bitfit_fast.Selection.of(model), plan)
    return ReferenceStep(model, plan)


def _rung(first_only: bool | None, stops: bool) -> Any:
    def rung(setting: Setting, plan: Plan) -> ReferenceStep:
        model = load(setting)
        for bias in biases(model):
            if bias.zero_gradient:
                model.get_parameter(bias.name).requires_grad_(False)
        install(model, plan.precision, first_only=first_only, stops=stops)
        return ReferenceStep(model, plan)

    return rung


def _fast(memory: str = "fast", graph: bool = False) -> Any:
    def fast(setting: Setting, plan: Plan) -> FastStep:
        model = load(setting)
        plan = replace(plan, memory=memory, graph=graph)
        FastBackend().patch(model, bitfit_fast.Selection.of(model), plan)
        return FastStep(model, plan)

    return fast


def _variants() -> Iterator[Variant]:
    references = (
        ("autocast", "autocast to bf16", "bf16", _reference),
        ("bf16", "frozen weights stored in bf16", "bf16", _pure),
    )
    yield Variant(
        "fp32-128", "fp32, padded to 128 tokens", "reference", "fp32", _reference, _padded
    )
    yield Variant("fp32", "fp32, padded to the longest", "reference", "fp32", _reference)
    for name, says, precision, make in references:
        yield Variant(name, says, "reference", precision, make)
    yield Variant(
        "fp32-128-compiled",
        "fp32, padded to 128 tokens, compiled",
        "reference",
        "fp32",
        _compiled(_reference),
        _padded,
    )
    yield Variant("fp32-compiled", "fp32, compiled", "reference", "fp32", _compiled(_reference))
    for name, says, precision, make in references:
        compiled = _compiled(make)
        yield Variant(f"{name}-compiled", f"{says}, compiled", "reference", precision, compiled)
        yield Variant(
            f"{name}-graph-compiled",
            f"{says}, compiled, in CUDA graphs",
            "reference",
            precision,
            _compiled(make, graph=True),
            begins=3,
        )
    for name, says, make in (("full", "full fine-tuning", _full), ("lora", "LoRA, rank 8", _lora)):
        yield Variant(f"{name}-fp32", f"{says}, fp32", "other", "fp32", make)
        yield Variant(f"{name}-autocast", f"{says}, autocast to bf16", "other", "bf16", make)
    yield Variant(
        "encoder",
        "the encoder as one operation, padding computed",
        "ladder",
        "fp32",
        _rung(False, False),
        _as_tokens,
    )
    yield Variant("packing", "+ without padding", "ladder", "fp32", _rung(False, False))
    yield Variant(
        "last", "+ the last layer's first tokens only", "ladder", "fp32", _rung(None, False)
    )
    yield Variant(
        "stops", "+ backward ends at the lowest bias", "ladder", "fp32", _rung(None, True)
    )
    for name, says, precision, graph in (
        ("fast-fp32", "fast, fp32: + one flat buffer", "fp32", False),
        ("fast-bf16", "fast, bf16: + frozen weights in bf16", "bf16", False),
        ("fast-bf16-graph", "fast, bf16, + a CUDA graph of the step", "bf16", True),
    ):
        yield Variant(
            name, says, "ladder", precision, _fast(graph=graph), _with_lengths,
            begins=3 if graph else 1,
        )  # fmt: skip
    yield Variant("modules", "bias-only modules, fp32", "fast", "fp32", _modules)
    for memory in ("low", "lower", "lowest"):
        says = f"fast, bf16, memory mode {memory}"
        yield Variant(f"fast-bf16-{memory}", says, "fast", "bf16", _fast(memory), _with_lengths)
    for precision in ("fp32", "bf16"):
        yield Variant(
            f"fast-{precision}-torch",
            f"fast, {precision}, PyTorch's operations for ours",
            "fast",
            precision,
            _fast(),
            _with_lengths,
            environment={BACKEND_VARIABLE: "torch"},
        )
    yield Variant(
        "fast-bf16-graph-vendor",
        "fast, bf16, in a CUDA graph, with the vendor's products alone",
        "fast",
        "bf16",
        _fast(graph=True),
        _with_lengths,
        environment={PRODUCTS_VARIABLE: "vendor"},
        begins=3,
    )


#: By name.
VARIANTS = {variant.name: variant for variant in _variants()}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Let variables have these values, and touch no others: threads may be reading them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def build(variant: Variant, setting: Setting, **options: Any) -> Callable[[Batch], Tensor]:
    """Return a variant's step; `options` are settings of its plan.

    Its attribute `inner` is the product's step.
    """
    with _environment(variant.environment):
        inner = variant.make(setting, plan(setting, precision=variant.precision, **options))

    @functools.wraps(inner.__call__)
    def step(batch: Batch) -> Tensor:
        with _environment(variant.environment):
            return inner(batch)

    step.inner = inner  # type: ignore[attr-defined]
    return step


# ----------------------------------------------------------------------------- gradients


def _trained_biases(model: nn.Module) -> list[str]:
    return [bias.name for bias in biases(model) if not bias.zero_gradient]


def bias_gradients(variant: Variant | None, setting: Setting, batch: Batch) -> Tensor:
    """Return one step's gradient of the biases in one vector, without dropout.

    Without a variant, that of the reference in float64.
    """
    setting = replace(setting, dropout=0.0)
    if variant is None:
        model = load(setting).double()
        model(**batch).loss.backward()
    else:
        step = build(variant, setting, grad_clip=0.0)
        model = step.inner.model  # type: ignore[attr-defined]
        for _ in range(variant.begins):
            step(variant.input(batch))
    model = getattr(model, "_orig_mod", model)
    names = [n for n in _trained_biases(model) if not n.startswith("classifier")]
    parts = []
    for name in names:
        gradient = model.get_parameter(name).grad
        if gradient is None:
            raise ArithmeticError(f"there is no gradient of {name}")
        parts.append(gradient.detach().double().flatten().cpu())
    return torch.cat(parts)


def relative_error(gradients: Tensor, reference: Tensor) -> float:
    """Return ‖g - ref‖ / ‖ref‖."""
    return float((gradients - reference).norm() / reference.norm())


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """Return what reads values of a kind, separated by commas, from the command line."""
    return lambda text: [kind(part) for part in text.split(",")]
