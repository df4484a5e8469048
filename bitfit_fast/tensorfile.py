"""Safetensors files with a JSON header and a digest of both: the only format that is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import BitFitError, listed
from .files import replace_file, to_json

__all__ = ["ALIGNMENT", "align", "digest", "read_tensors", "saving", "write_tensors"]

_KEY = "bitfit_fast"
#: Bytes to which PyTorch aligns the memory of a tensor that it makes itself.
ALIGNMENT = 64
#: What some tools add to the files of PyTorch's that they touch.
_FORMAT = {"format": "pt"}


def digest(tensors: Iterable[tuple[str, Tensor]], seed: str = "") -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, after the text `seed`."""
    sha = hashlib.sha256(seed.encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each in a storage that it fills and shares with none."""
    owned: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        owned[name] = tensor if whole and storage.data_ptr() not in taken else tensor.clone()
        taken.add(storage.data_ptr())
    return owned


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
    owned = _own(tensors)
    text = to_json(dict(header), sort_keys=True)
    full = json.loads(text) | {"digest": digest(owned.items(), text)}
    # one entry, as several would be written in no certain order: equal runs make equal files
    metadata = {_KEY: to_json(full)}
    with saving(path):
        replace_file(path, lambda temporary: save_file(owned, temporary, metadata=metadata))


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Name the file where safetensors cannot write it, as on a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise BitFitError(f"{path} could not be written: {error}") from None


def align(path: Path) -> None:
    """Lay out any safetensors file anew so that its tensors begin at aligned places.

    Readers map the file into memory, where matrix kernels may sum a row that begins at an
    odd place in another order: the same weights would give other last bits.

    Parameters
    ----------
    path : Path
        A whole file; replaced by one with equal contents.
    """

    def write(temporary: Path) -> None:
        with path.open("rb") as source, temporary.open("wb") as target:
            length = int.from_bytes(source.read(8), "little")
            header = json.loads(source.read(length))
            metadata = header.pop("__metadata__", {})
            spans = {name: entry["data_offsets"] for name, entry in header.items()}
            # no gaps are allowed, so the sizes that would put the next one off come last
            order = sorted(
                spans, key=lambda n: (-math.gcd(spans[n][1] - spans[n][0], ALIGNMENT), n)
            )
            end = 0
            for name in order:
                start, end = end, end + spans[name][1] - spans[name][0]
                header[name]["data_offsets"] = [start, end]
            text = json.dumps({"__metadata__": metadata, **header}).encode()
            text += b" " * (-(8 + len(text)) % ALIGNMENT)
            target.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                first, last = spans[name]
                source.seek(8 + length + first)
                target.write(source.read(last - first))

    replace_file(path, write)


def _is_pickle(path: Path) -> bool:
    """Tell a pickle, bare or in PyTorch's zip archive, by its first bytes.

    A safetensors file begins with the eight bytes of its header's length and a brace. That
    length can look like the beginning of a pickle, so the brace decides.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[4:] == b"\0\0\0\0{":
        return False
    return start.startswith((b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6))))


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
    try:
        if _is_pickle(path):
            raise BitFitError(
                f"{path} is a pickle, which can run code when it is read; "
                "only safetensors are loaded"
            )
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # first, so that the gigabytes of another file stay where they are
            header, found = _header(path, metadata)
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise BitFitError(f"{path} is cut short or altered: {error}") from None
    if digest(tensors.items(), to_json(header, sort_keys=True)) != found:
        raise BitFitError(f"{path} is altered: its contents do not have the digest in its header")
    if header.get("kind") != kind:
        raise BitFitError(f"{path} holds a {header.get('kind')}, where a {kind} is needed")
    return header, tensors


def _header(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    if _KEY not in metadata:
        raise BitFitError(
            f"{path} was not written by bitfit_fast: its header has no entry {_KEY} "
            f"(entries: {listed(metadata) or 'none'})"
        )
    text = metadata[_KEY]
    try:
        full = json.loads(text)
        # one text for each content: what JSON lets one write otherwise is an alteration too
        if {**_FORMAT, **metadata} == {**_FORMAT, _KEY: to_json(full)}:
            return {key: full[key] for key in full if key != "digest"}, full["digest"]
    except (ValueError, TypeError, KeyError):
        pass
    raise BitFitError(f"{path} is altered: its header is not as it was written")
