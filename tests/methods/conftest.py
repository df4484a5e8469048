"""Tiny models of several families, and what is done with them."""

from __future__ import annotations

import pytest
import torch
import transformers

from bitfit_fast import Split, TaskData

from .. import conftest as shared

SIZES = {**shared.SMALL, "vocab_size": 64}
#: By class prefix, the options that differ.
FAMILIES = {
    "Bert": SIZES,
    "Roberta": SIZES | {"pad_token_id": 0},
    "Albert": SIZES | {"embedding_size": 16},
    "DistilBert": {
        "vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64,
        "max_position_embeddings": 66, "initializer_range": 0.2,
    },
    "GPT2": {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 66,
        "pad_token_id": 0, "initializer_range": 0.2,
    },
    "FNet": SIZES | {"pad_token_id": 0, "use_tpu_fourier_optimizations": False},
    "ViT": SIZES | {"image_size": 8, "patch_size": 4},
}  # fmt: skip


@pytest.fixture(scope="session")
def build():
    """Make a model with random weights, and no dropout."""

    def make(prefix="Bert", head="ForSequenceClassification"):
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**FAMILIES[prefix])
        model = getattr(transformers, prefix + head)(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model.eval()

    return make


@pytest.fixture(scope="session")
def logits():
    """Return what a model gives."""
    return shared.logits


@pytest.fixture(scope="session")
def move():
    """Change everything that trains, as a training would."""
    return shared.train


@pytest.fixture(scope="session")
def data():
    """A task that is learned in a few steps."""

    def split(name, count):
        texts = tuple(("the plot was good" if i % 2 else "acting was dull",) for i in range(count))
        return Split(name, texts, tuple(i % 2 for i in range(count)))

    splits = {"train": split("train", 24), "validation": split("validation", 8)}
    return TaskData("toy", tuple(shared.LABELS), ("accuracy",), splits)
