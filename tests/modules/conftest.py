"""What the tests of patched models share: small models, their gradients, the tolerance rule."""

import copy

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bitfit_fast
from bitfit_fast.models.families import biases
from bitfit_fast.modules import Deferred, original
from bitfit_fast.ops.dropout import kept, new_seed

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "num_labels": 3,
}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 40, "pad_token_id": 0}
IMAGE = SIZES | {"image_size": 16, "patch_size": 8}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
OPT = TEXT | SPECIAL | {"ffn_dim": 48, "word_embed_proj_dim": 32}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48, "n_positions": 40}

#: name: (prefix of the classes, options)
MODELS = {
    "bert": ("Bert", TEXT),
    "roberta": ("Roberta", TEXT | SPECIAL),
    "xlm-roberta": ("XLMRoberta", TEXT | SPECIAL),
    "electra": ("Electra", TEXT | {"embedding_size": 16}),
    "distilbert": ("DistilBert", TEXT | DISTILBERT),
    "mpnet": ("MPNet", TEXT | SPECIAL),
    "albert": ("Albert", TEXT | SPECIAL | {"embedding_size": 16}),
    "albert, two groups": (
        "Albert",
        TEXT | SPECIAL | {"embedding_size": 16, "num_hidden_groups": 2},
    ),
    "deberta": ("Deberta", TEXT | RELATIVE),
    "deberta-v2": (
        "DebertaV2",
        TEXT
        | RELATIVE
        | {"share_att_key": False, "conv_kernel_size": 3, "norm_rel_ebd": "layer_norm"},
    ),
    "vit": ("ViT", IMAGE),
    "gpt2": ("GPT2", TEXT | SPECIAL | GPT2),
    "opt": ("OPT", OPT),
    "opt, post-norm": ("OPT", OPT | {"do_layer_norm_before": False}),
}
#: Those whose key bias the softmax does not see.
PLAIN = [name for name in MODELS if name not in ("deberta", "deberta-v2", "gpt2")]


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def replaced(model):
    return [n for n, m in model.named_modules() if original(m) is not type(m)]


def seeded(module):
    """Give a module's parameters numbers that do not depend on what was made before it."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def gradients(model, x, loss=None):
    """Return the output and every gradient, the input's included."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = model(x)
    (loss or (lambda y: y.square().sum()))(out).backward()
    return {"out": out.detach(), "x": x.grad} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def only_biases(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] == "bias")
    return model


@pytest.fixture(autouse=True)
def backend(request, choose_backend):
    """Which implementation runs: PyTorch's, unless a test asks for `triton`."""
    return choose_backend(getattr(request, "param", "torch"))


@pytest.fixture(params=MODELS)
def family(request):
    """Every model of the table."""
    return request.param


@pytest.fixture(params=PLAIN)
def plain_family(request):
    """Every model whose key bias has no effect."""
    return request.param


@pytest.fixture(scope="session")
def perturb():
    """Move scales and biases off their first values, so that no gradient vanishes by chance."""

    def change(model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return change


@pytest.fixture(scope="session")
def build(perturb):
    """Make a classifier of a family, with eager attention, in evaluation mode.

    Attention's fused form draws its own dropout mask, of which nothing is known here.
    """
    made = {}

    def make(family, device="cpu", **changes):
        key = (family, *((name, str(value)) for name, value in changes.items()))
        if key not in made:
            prefix, options = MODELS[family]
            config = getattr(transformers, f"{prefix}Config")(**options | changes)
            config._attn_implementation = "eager"
            task = "Image" if "image_size" in options else "Sequence"
            torch.manual_seed(0)
            model = getattr(transformers, f"{prefix}For{task}Classification")(config)
            made[key] = perturb(model).eval()
        return copy.deepcopy(made[key]).to(device)

    return make


@pytest.fixture(scope="session")
def batch():
    """Make the input of a model: three rows, one of them with padding."""

    def make(model, seed=1, rows=3, tokens=12):
        like = next(p for p in model.parameters() if p.is_floating_point())
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor([0, 2, 1])[torch.arange(rows) % 3]
        if hasattr(model.config, "image_size"):
            pixels = torch.randn(rows, 3, 16, 16, generator=generator)
            inputs = {"pixel_values": pixels.to(like.dtype), "labels": labels}
        else:
            ids = torch.randint(5, 64, (rows, tokens), generator=generator)
            mask = torch.ones_like(ids)
            mask[1, 7:] = 0
            ids[1, 7:] = 0
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: t.to(like.device) for name, t in inputs.items()}

    return make


@pytest.fixture(scope="session")
def measure():
    """Run a step and return loss, logits and every gradient by name."""

    def run(model, inputs, call=None):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(2)
        out = (model if call is None else call)(**inputs)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": out.loss.detach(), "logits": out.logits.detach()} | grads

    return run


@pytest.fixture(scope="session")
def changed():
    """Return all of what was measured but loss and logits: the names with a gradient."""

    def names(measured):
        return set(measured) - {"loss", "logits"}

    return names


@pytest.fixture(scope="session")
def as_exact():
    """Assert the tolerance rule: at most twice PyTorch's error in the same dtype, above a floor.

    Errors are lengths of vectors; the floor is `roundings` of the exact one.
    """

    def judge(ours, pytorch, exact, roundings=16, label=""):
        for name, value in ours.items():
            true = exact[name].double()
            assert value.shape == true.shape, (label, name)
            error = (value.double() - true).norm()
            eps = torch.finfo(value.dtype).eps
            allowed = 2 * (pytorch[name].double() - true).norm() + roundings * eps * true.norm()
            assert bool(error <= allowed), (label, name, error.item(), allowed.item())

    return judge


@pytest.fixture(scope="session")
def without_gradient():
    """Return the names of the biases whose gradient is zero but for rounding."""

    def names(model):
        # the bias of a key that stands for a distance adds as little as a key's own
        return {b.name for b in biases(model) if b.zero_gradient or b.term == "position-key"}

    return names


@pytest.fixture
def float64_softmax(monkeypatch):
    """Let eager attention, which asks for a softmax in fp32, keep float64."""
    pytorch = F.softmax

    def softmax(input, dim=None, _stacklevel=3, dtype=None):
        return pytorch(input, dim, dtype=None if input.dtype == torch.float64 else dtype)

    monkeypatch.setattr(F, "softmax", softmax)


@pytest.fixture
def same_dropout(backend, float64_softmax, monkeypatch):
    """Let PyTorch's dropout take its mask from where the fused operations take theirs."""
    pytorch = F.dropout

    def dropout(input, p=0.5, training=True, inplace=False):
        if isinstance(input, Deferred):  # brings it to Deferred, with this very function
            return pytorch(input, p, training, inplace)
        if not training or not p:
            return input
        rows = input.reshape(-1, input.shape[-1])
        keep = kept(*rows.shape, p, new_seed(input.device))
        return torch.where(keep.view(input.shape), input / (1 - p), 0)

    monkeypatch.setattr(F, "dropout", dropout)


class Calls(TorchDispatchMode):
    """Notes every operation below autograd: its name, its arguments and the outputs' shapes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else [out]
        shapes = [tuple(t.shape) for t in outs if isinstance(t, torch.Tensor)]
        given = [arg is not None and arg is not False for arg in args]
        self.seen.append((func._schema.name, given, shapes))
        return out

    def count(self, name, *given):
        """Count the calls of an operation that had a value for each of these arguments."""
        return sum(n == name and all(g[i] for i in given) for n, g, _ in self.seen)

    @property
    def fused(self):
        """How many LayerNorms added a bias; a residual; returned that sum; how many activations."""
        norm = "bitfit_fast::layer_norm_fwd"
        activation = "bitfit_fast::activation_fwd"
        norms = (self.count(norm, 3), self.count(norm, 3, 4), self.count(norm, 3, 10))
        return *norms, self.count(activation, 1)


@pytest.fixture
def calls():
    return Calls


@pytest.fixture
def patched(build):
    """Make a patched classifier with all its biases selected."""

    def make(family="bert", terms="all", device="cpu", fuse=True, few_bits=False, **changes):
        model = build(family, device, **changes)
        bitfit_fast.select(model, terms)
        bitfit_fast.patch(model, fuse=fuse, few_bits=few_bits)
        return model

    return make


@pytest.fixture(scope="session")
def every_model():
    return list(MODELS)
