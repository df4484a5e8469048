"""What the tests of whole encoders share: small models, true gradients, the tolerance rule."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bitfit_fast
from bitfit_fast.encoder import Encoder
from bitfit_fast.models.families import biases

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
# fewer positions than a packed batch has tokens
TEXT = SIZES | {"vocab_size": 90, "max_position_embeddings": 20, "pad_token_id": 1}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 2}
IMAGE = SIZES | {"image_size": 16, "patch_size": 4}
DISTILBERT = {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 3,
    "hidden_dim": 80,
    "initializer_range": 0.2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "qa_dropout": 0.0,
    "num_labels": 3,
    "vocab_size": 90,
    "max_position_embeddings": 20,
}

#: name: (prefix of the classes, options)
MODELS = {
    "bert": ("Bert", TEXT),
    "roberta": ("Roberta", TEXT | SPECIAL),
    "xlm-roberta": ("XLMRoberta", TEXT | SPECIAL),
    "camembert": ("Camembert", TEXT | SPECIAL),
    "electra": ("Electra", TEXT | {"embedding_size": 16}),
    "electra, as wide": ("Electra", TEXT | {"embedding_size": 48}),
    "mpnet": ("MPNet", TEXT | SPECIAL),
    "distilbert": ("DistilBert", DISTILBERT),
    "vit": ("ViT", IMAGE),
    "deit": ("DeiT", IMAGE),
}
IMAGES = ("vit", "deit")
#: Tokens of each sequence of a batch: the first and the last are as long as the batch is wide.
LENGTHS = (16, 7, 1, 12, 4, 16)

BASE, SEQUENCE, TOKEN = "Model", "ForSequenceClassification", "ForTokenClassification"
QUESTION, CHOICE = "ForQuestionAnswering", "ForMultipleChoice"


@pytest.fixture(autouse=True)
def backend(request, choose_backend):
    """Which implementation runs: PyTorch's, unless a test asks for another."""
    return choose_backend(getattr(request, "param", "torch"))


@pytest.fixture(params=MODELS)
def family(request):
    """Every model of the table that has a row for whole encoders."""
    return request.param


@pytest.fixture(params=["fast", "low", "lower", "lowest"])
def memory(request):
    """How much is kept for the backward pass."""
    return request.param


def _class(family, head):
    return getattr(transformers, MODELS[family][0] + head.replace("Sequence", _kind(family)))


def _kind(family):
    return "Image" if family in IMAGES else "Sequence"


@functools.cache
def _made(family, head, changes):
    prefix, options = MODELS[family]
    options = options | ({"num_labels": 2} if head == QUESTION else {}) | dict(changes)
    config = getattr(transformers, f"{prefix}Config")(**options)
    torch.manual_seed(0)
    model = _class(family, head)(config)
    # scales and biases off their first values, so that no gradient vanishes by chance
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if hasattr(model, "pre_classifier"):
            # a ReLU comes behind it, and a rounding may change on which side of 0 something is
            model.pre_classifier.bias.add_(8.0)
    return model.train()


@pytest.fixture(scope="session")
def build():
    """Make a model of a family with a head, without dropout, in training mode."""

    def make(family="bert", head=SEQUENCE, **changes):
        model = _made(family, head, tuple(sorted(changes.items())))
        # the copies' configurations are their own
        return copy.deepcopy(model)

    return make


@pytest.fixture(scope="session")
def batch():
    """Make the input of a model: sequences of unequal lengths, padded on the right."""

    def make(model, lengths=LENGTHS, seed=1):
        generator = torch.Generator().manual_seed(seed)
        head, rows, width = type(model).__name__, len(lengths), max(lengths)
        labels = torch.tensor([0, 2, 1, 0])[torch.arange(rows) % 4]
        if hasattr(model.config, "image_size"):
            inputs = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
            return inputs if head.endswith(BASE) else inputs | {"labels": labels}
        ids = torch.randint(5, 90, (rows, width), generator=generator)
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        ids[mask == 0] = model.config.pad_token_id
        inputs = {"input_ids": ids, "attention_mask": mask}
        if head.endswith(SEQUENCE):
            inputs["labels"] = labels
        elif head.endswith(TOKEN):
            inputs["labels"] = torch.randint(0, 3, ids.shape, generator=generator)
            inputs["labels"][mask == 0] = -100
        elif head.endswith(QUESTION):
            inputs["start_positions"] = torch.tensor(lengths) // 2
            inputs["end_positions"] = torch.tensor(lengths) - 1
        elif head.endswith(CHOICE):
            inputs = {name: t.unflatten(0, (rows // 2, 2)) for name, t in inputs.items()}
            inputs["labels"] = labels[: rows // 2] % 2
        return inputs

    return make


def _objective(out, inputs):
    """Return the loss, or for a base model some function of what it returns for tokens."""
    if "loss" in out:
        return out.loss
    hidden = out.last_hidden_state
    weights = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype).cos()
    total = (hidden * weights).tanh().mean(-1)
    if "attention_mask" in inputs:  # what stands at padding means nothing
        total = total * inputs["attention_mask"]
    loss = total.mean() + 1
    return loss if out.get("pooler_output") is None else loss + out.pooler_output.square().mean()


@pytest.fixture(scope="session")
def measure():
    """Run a step and return the loss and every gradient by name."""

    def run(model, inputs, call=None, seed=2, **backward):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        loss = _objective((model if call is None else call)(**inputs), inputs)
        loss.backward(**backward)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach()} | grads

    return run


@pytest.fixture(scope="session")
def to_double():
    """Return a model and its inputs in float64."""

    def convert(model, inputs):
        wide = {
            name: t.double() if t is not None and t.is_floating_point() else t
            for name, t in inputs.items()
        }
        return copy.deepcopy(model).double(), wide

    return convert


@pytest.fixture(scope="session")
def key_biases():
    """Return the names of the biases whose gradient is zero but for rounding."""

    def names(model):
        return {bias.name for bias in biases(model) if bias.zero_gradient}

    return names


@dataclass
class Case:
    """A model, its input, and loss and gradients: the true ones and PyTorch's."""

    model: torch.nn.Module
    inputs: dict
    exact: dict
    fp32: dict
    bf16: dict


@pytest.fixture(scope="session")
def case(build, batch, measure, to_double, key_biases):
    """Make a case of a family and a head, in which all biases and the head train."""
    made = {}

    def make(family="bert", head=SEQUENCE, lengths=LENGTHS, **changes):
        key = (family, head, lengths, *sorted(changes.items()))
        if key not in made:
            model = build(family, head, **changes)
            inputs = batch(model, lengths)
            bitfit_fast.select(model)
            exact = measure(*to_double(model, inputs))
            fp32 = measure(copy.deepcopy(model), inputs)
            with torch.autocast("cpu", torch.bfloat16):
                bf16 = measure(copy.deepcopy(model), inputs)
            for name in key_biases(model):
                for measured in (exact, fp32, bf16):
                    del measured[name]
            made[key] = model, inputs, exact, fp32, bf16
        model, *others = made[key]
        return Case(copy.deepcopy(model), *others)

    return make


@pytest.fixture(scope="session")
def as_exact():
    """Assert the tolerance rule: at most twice PyTorch's error, above a floor.

    Errors are lengths of vectors; the floor is `roundings` of the exact one. Gradients that
    are identically zero, such as that of the bias of one score for each choice, are rounding
    noise and have to be as small as that.
    """

    def judge(found, pytorch, exact, roundings=16, eps=2.0**-23, label=""):
        bad = {}
        largest = max(t.norm().item() for t in exact.values())
        for name, value in found.items():
            true = exact[name].double()
            assert value.shape == true.shape, (label, name)
            error = (value.double() - true).norm().item()
            theirs, size = (pytorch[name].double() - true).norm().item(), true.norm().item()
            if size < 1e-12 * largest:
                size = largest
            if not error <= 2 * theirs + roundings * eps * size:
                bad[name] = f"error {error / size:.1e}, PyTorch's {theirs / size:.1e}"
        assert not bad, (label, bad)

    return judge


@pytest.fixture
def float64_softmax(monkeypatch):
    """Let eager attention, which asks for a softmax in fp32, keep float64."""
    pytorch = F.softmax

    def softmax(input, dim=None, _stacklevel=3, dtype=None):
        return pytorch(input, dim, dtype=None if input.dtype == torch.float64 else dtype)

    monkeypatch.setattr(F, "softmax", softmax)


class Calls(TorchDispatchMode):
    """Notes every operation below autograd: its name and the shapes it gets and gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else [out]
        given, made = (
            [tuple(t.shape) for t in some if isinstance(t, torch.Tensor)] for some in (args, outs)
        )
        self.seen.append((func._schema.name, given, made))
        return out

    def count(self, *names):
        """Count the calls of some operations."""
        return sum(name in names for name, _, _ in self.seen)

    @property
    def products(self):
        """The shapes of all products of two matrices."""
        names = ("aten::mm", "aten::addmm", "aten::addmm_")
        return [(given[-2:], made[0]) for name, given, made in self.seen if name in names]


@pytest.fixture
def calls():
    return Calls


@pytest.fixture
def patched(build):
    """Make a patched model in fp32, all of whose biases train."""

    def make(family="bert", head=SEQUENCE, terms="all", precision="fp32", memory="fast", **changes):
        model = build(family, head, **changes)
        bitfit_fast.select(model, terms)
        bitfit_fast.patch_encoder(model, precision=precision, memory=memory)
        return model

    return make


@pytest.fixture
def runs_as_one(monkeypatch):
    """Count how often a stack of layers runs."""
    runs = []
    run = Encoder.run

    def counting(self, module, hidden):
        runs.append(tuple(hidden.shape))
        return run(self, module, hidden)

    monkeypatch.setattr(Encoder, "run", counting)
    return runs


@pytest.fixture(scope="session")
def every_model():
    return list(MODELS)
