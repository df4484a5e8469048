"""Safetensors files with a JSON header and a digest of both: the only format that is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import BitFitError
from .files import replace_file, to_json

__all__ = ["digest", "read_tensors", "write_tensors"]

_KEY = "bitfit_fast"


def digest(tensors: Iterable[tuple[str, Tensor]], seed: str = "") -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, after the text `seed`."""
    sha = hashlib.sha256(seed.encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(memoryview(flat.view(torch.uint8).numpy()))
    return sha.hexdigest()


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, in a storage that nothing shares."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def write_tensors(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and header, whole or not at all.

    Parameters
    ----------
    path : Path
        File to make or replace.
    header : mapping
        What JSON can hold; `digest` is added.
    tensors : mapping of str to Tensor
        Of any dtype and device.
    """
    tensors = {name: _own(tensor) for name, tensor in tensors.items()}
    text = to_json(dict(header), sort_keys=True)
    full = json.loads(text) | {"digest": digest(tensors.items(), text)}
    metadata = {"format": "pt", _KEY: to_json(full)}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `write_tensors` made, and check it.

    Parameters
    ----------
    path : Path
        The file.
    kind : str
        Expected value of the header's `kind`.

    Returns
    -------
    header, tensors
        The header without its digest; CPU tensors by name.

    Raises
    ------
    BitFitError
        If the file is missing, a pickle, cut short, altered, or of another kind.
    """
    if not path.is_file():
        raise BitFitError(f"the file {path} does not exist")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        raise BitFitError(
            f"{path} is a pickle, which can run code when it is read; only safetensors are loaded"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BitFitError(f"{path} is cut short or altered: {error}") from None
    try:
        header = json.loads(metadata[_KEY])
        found = header.pop("digest")
    except (KeyError, ValueError, AttributeError):
        raise BitFitError(f"{path} was not written by bitfit_fast: it has no header") from None
    if digest(tensors.items(), to_json(header, sort_keys=True)) != found:
        raise BitFitError(f"{path} is altered: its contents do not have the digest in its header")
    if header.get("kind") != kind:
        raise BitFitError(f"{path} holds a {header.get('kind')}, where a {kind} is needed")
    return header, tensors
