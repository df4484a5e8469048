"""BitFit fine-tuning of pretrained transformers: train the biases and the task head."""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .checkpoint import Checkpoint, Header, fingerprint, load, read, save, unload
from .data.load import load_task
from .data.task import Split, TaskData
from .errors import BitFitError, BitFitWarning
from .methods import METHODS, prepare
from .models.loading import load_model, load_tokenizer
from .opening import merge, open_model
from .patching import Patched, PatchedEncoder, patch, patch_encoder, unpatch
from .selection import Selection, select
from .training import Settings, train

if TYPE_CHECKING:
    from .training.trainer import BitFitTrainer

__all__ = [
    "METHODS",
    "BitFitError",
    "BitFitTrainer",
    "BitFitWarning",
    "Checkpoint",
    "Header",
    "Patched",
    "PatchedEncoder",
    "Selection",
    "Settings",
    "Split",
    "TaskData",
    "__version__",
    "fingerprint",
    "load",
    "load_model",
    "load_task",
    "load_tokenizer",
    "merge",
    "open_model",
    "patch",
    "patch_encoder",
    "prepare",
    "read",
    "save",
    "select",
    "train",
    "unload",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """Import `transformers.Trainer`, which takes seconds, only for whoever asks for ours."""
    if name == "BitFitTrainer":
        from .training.trainer import BitFitTrainer

        return BitFitTrainer
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
