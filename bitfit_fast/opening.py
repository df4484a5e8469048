"""Checkpoints with the base models that they name: opened, or merged into ordinary folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .additions import fold
from .checkpoint import Checkpoint, added_kind, load, read
from .errors import BitFitError
from .models.loading import ensure_padding, load_model, load_tokenizer
from .tensorfile import align, saving

__all__ = ["merge", "open_model"]


def open_model(
    path: str | os.PathLike[str], base: str | None = None, any_base: bool = False
) -> tuple[Any, Any, Checkpoint]:
    """Load a checkpoint together with the base model that it names.

    Parameters
    ----------
    path : str or PathLike
        Checkpoint or run folder.
    base : str, optional
        Hub name or folder of the base model, where it is not to be had by the name in
        the file.
    any_base : bool
        See `load`.

    Returns
    -------
    model, tokenizer, checkpoint
        The model in evaluation mode.
    """
    checkpoint = read(path)
    header = checkpoint.header
    name = base or header.base
    if not name:
        raise BitFitError(f"{checkpoint.path} does not say its base model; name it (--base)")
    model = load_model(name, header.labels, kind=checkpoint.kind.name)
    load(model, checkpoint, any_base=any_base)
    tokenizer = load_tokenizer(name)
    ensure_padding(model, tokenizer)
    return model.eval(), tokenizer, checkpoint


def merge(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    base: str | None = None,
    any_base: bool = False,
) -> Path:
    """Write an ordinary Hugging Face folder, which needs this package no more.

    Parameters
    ----------
    path : str or PathLike
        Checkpoint or run folder.
    output : str or PathLike
        Folder to make; it appears whole or not at all.
    base, any_base
        See `open_model`.

    Returns
    -------
    Path
        The folder: `from_pretrained` and `pipeline` open it with identical outputs.

    Raises
    ------
    BitFitError
        If the folder exists and is not empty, the checkpoint cannot be loaded, or its method
        adds what an ordinary model cannot hold.
    """
    folder = Path(output).resolve()  # a rename needs the folder itself, not a link to it or "."
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BitFitError(f"{output} exists already; name a new folder to merge into")
    checkpoint = read(path)
    kind = added_kind(checkpoint)
    if kind is not None and kind.cannot_merge is not None:
        raise BitFitError(
            f"{checkpoint.path} is of the method '{checkpoint.header.method}', which cannot be "
            f"merged: {kind.cannot_merge}"
        )
    model, tokenizer, _ = open_model(path, base, any_base)
    fold(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with saving(folder):
            model.save_pretrained(temporary)
        for file in temporary.glob("*.safetensors"):
            align(file)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(output)
