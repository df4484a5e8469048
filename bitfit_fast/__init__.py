"""BitFit fine-tuning of pretrained transformers: train the biases and the task head."""

from ._version import __version__
from .checkpoint import Checkpoint, Header, fingerprint, load, merge, open_model, read, save, unload
from .data.load import load_task
from .data.task import Split, TaskData
from .errors import BitFitError, BitFitWarning
from .models.loading import load_model, load_tokenizer
from .patching import Patched, patch, unpatch
from .selection import Selection, select
from .training import Settings, train

__all__ = [
    "BitFitError",
    "BitFitWarning",
    "Checkpoint",
    "Header",
    "Patched",
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
    "read",
    "save",
    "select",
    "train",
    "unload",
    "unpatch",
]
