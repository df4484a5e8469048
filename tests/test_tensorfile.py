"""The file format: what goes in comes out, and nothing else is read."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bitfit_fast
from bitfit_fast import BitFitError, tensorfile
from bitfit_fast.tensorfile import align, digest, read_tensors, write_tensors

HEADER = {
    "kind": "test",
    "text": "café \u2028 \"quoted\" \\ 'x'",
    "number": 1e-05,
    "count": 3,
    "none": None,
    "nested": {"list": [1, 2.5, True], "b": {}, "a": {}},
}
TENSORS = {
    "b.bias": torch.arange(6, dtype=torch.float32) / 7,
    "a.bias": torch.tensor([1.5, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    "half": torch.ones(2, 3, dtype=torch.float16),
    "double": torch.zeros(1, dtype=torch.float64),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def same(a, b):
    """Bit for bit, which tells -0 from 0 and takes a NaN for itself."""
    return a.dtype == b.dtype and a.shape == b.shape and digest([("", a)]) == digest([("", b)])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "file.safetensors"
    write_tensors(path, HEADER, TENSORS)
    return path


def refusal(path):
    with pytest.raises(BitFitError) as info:
        read_tensors(path, "test")
    text = str(info.value)
    assert str(path) in text
    return text


def test_everything_comes_back_bit_for_bit(path):
    header, tensors = read_tensors(path, "test")
    assert header == HEADER
    assert set(tensors) == set(TENSORS)
    assert all(same(tensors[name], TENSORS[name]) for name in TENSORS)


def test_any_safetensors_reader_opens_it(path):
    assert set(load_file(path)) == set(TENSORS)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"bitfit_fast"}
        assert json.loads(file.metadata()["bitfit_fast"]).items() >= HEADER.items()


def test_the_usual_entry_for_the_format_does_no_harm(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(TENSORS, path, metadata={"format": "pt", **metadata})
    assert read_tensors(path, "test")[0] == HEADER
    save_file(TENSORS, path, metadata={"format": "np", **metadata})
    assert "altered" in refusal(path)


def test_the_same_content_makes_the_same_bytes(path, tmp_path):
    other = tmp_path / "other.safetensors"
    for _ in range(4):
        write_tensors(other, dict(reversed(HEADER.items())), dict(reversed(TENSORS.items())))
        assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda flat: {"a": flat[:3], "b": flat[3:]},
        lambda flat: {"a": flat, "b": flat},
        lambda flat: {"a": flat.view(2, 4), "b": flat.view(2, 4).t()},
        lambda flat: {"a": flat[::2], "b": flat[1:2].expand(5)},
        lambda flat: {"a": flat.requires_grad_(), "b": flat[2:]},
    ],
    ids=["views", "same", "transposed", "strided", "with gradients"],
)
def test_tensors_that_share_memory_are_written_apart(tmp_path, make):
    tensors = make(torch.arange(8.0))
    path = tmp_path / "views.safetensors"
    write_tensors(path, {"kind": "test"}, tensors)
    found = read_tensors(path, "test")[1]
    assert all(same(found[name], tensors[name].detach()) for name in tensors)
    assert path.stat().st_size < 1000


def test_the_digest_sees_names_types_shapes_and_order_of_bytes():
    one = torch.arange(4.0)
    variants = [
        [("a", one)],
        [("b", one)],
        [("a", one.flip(0))],
        [("a", one.view(2, 2))],
        [("a", one.view(torch.int32))],
        [("a", one), ("b", one)],
        [("a", one[:3])],
        [("a", torch.tensor([-0.0, 1.0, 2.0, 3.0]))],
    ]
    assert len({digest(v) for v in variants}) == len(variants)
    assert digest([("a", one)], "seed") != digest([("a", one)])
    assert digest([("b", one), ("a", one)]) == digest([("a", one), ("b", one)])
    assert digest([("a", one.view(2, 2).t())]) == digest([("a", one.view(2, 2).t().contiguous())])


def test_a_file_cut_short_anywhere_is_refused(path):
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), *range(len(whole) - 9, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(BitFitError):
            read_tensors(path, "test")
    path.write_bytes(whole + b"\0")
    assert "cut short or altered" in refusal(path)
    path.write_bytes(whole)
    read_tensors(path, "test")


@pytest.mark.parametrize(("first", "change"), [(0, 0x01), (1, 0x20), (2, 0x80)])
def test_a_byte_changed_anywhere_is_refused(path, first, change):
    whole = path.read_bytes()
    changed = bytearray(whole)
    for place in range(first, len(whole), 3):
        changed[place] ^= change
        path.write_bytes(changed)
        with pytest.raises(BitFitError):
            read_tensors(path, "test")
            pytest.fail(f"byte {place}, {whole[place : place + 1]} became {changed[place]:#x}")
        changed[place] ^= change


@pytest.mark.parametrize(
    "replace",
    [
        (b"1e-05", b"1E-05"),
        (b"00e9", b"00E9"),
        (b'"F32"', b'"I32"'),
        (b'"b.bias"', b'"c.bias"'),
        (rb"\"count\": 3", rb"\"count\":  "),
        (rb"\"count\": 3", rb"\"count\": 4"),
        (rb"\"kind\": \"test\"", rb"\"kind\": \"tesT\""),
        (b"__metadata__", b"__metadat___"),
    ],
)
def test_a_header_that_says_it_otherwise_is_refused(path, replace):
    whole = path.read_bytes()
    assert whole.count(replace[0]) >= 1
    path.write_bytes(whole.replace(*replace))
    text = refusal(path)
    assert "altered" in text or "not written by bitfit_fast" in text


def test_tensors_exchanged_are_refused(path, tmp_path):
    metadata = {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    other = tmp_path / "other.safetensors"
    save_file({**TENSORS, "b.bias": TENSORS["b.bias"] + 1}, other, metadata=metadata)
    assert "does not" in refusal(other) or "altered" in refusal(other)
    save_file({k: v for k, v in TENSORS.items() if k != "half"}, other, metadata=metadata)
    assert "altered" in refusal(other)


@pytest.mark.parametrize("entry", ["", "x", "[]", "3", "null", '"text"', "{}", '{"digest": 3}'])
def test_a_header_of_another_form_is_refused(tmp_path, entry):
    path = tmp_path / "file.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "bitfit_fast": entry})
    assert "altered" in refusal(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"other": "x"}])
def test_a_safetensors_file_of_other_origin_is_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata=metadata)
    assert "was not written by bitfit_fast" in refusal(path)


def test_a_file_of_another_kind_is_refused(path):
    with pytest.raises(BitFitError, match=r"holds a test, where a checkpoint is needed$"):
        read_tensors(path, "checkpoint")


@pytest.mark.parametrize("name", ["nothing.safetensors", "folder"])
def test_what_is_not_a_file_is_refused(path, name):
    assert "does not exist" in refusal(path.parent.parent / name)


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "text": "café"}])
def test_an_aligned_file_holds_the_same_at_aligned_places(tmp_path, metadata):
    path = tmp_path / "file.safetensors"
    tensors = TENSORS | {"a.first": torch.ones(3), "weight": torch.randn(1, 32)}
    save_file(tensors, path, metadata=metadata)
    align(path)
    found = load_file(path)
    assert all(same(found[name], tensors[name]) for name in tensors)
    assert found.keys() == tensors.keys()
    with safe_open(path, "pt") as file:
        assert (file.metadata() or None) == metadata
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 64 == 0
    assert header["weight"]["data_offsets"][0] % 64 == 0
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    for name, size in sizes.items():
        start, end = header[name]["data_offsets"]
        assert end - start == size
        assert size == 0 or start % math.gcd(size, 64) == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


class Trap:
    """Unpickling one makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def torch_saved(trap, **options):
    buffer = io.BytesIO()
    torch.save({"bias": torch.ones(2), "trap": trap}, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        torch_saved,
        lambda trap: torch_saved(trap, _use_new_zipfile_serialization=False),
        *(lambda trap, p=p: pickle.dumps(trap, protocol=p) for p in range(2, 6)),
        lambda trap: pickle.dumps({"bias": [1.0, 2.0], "trap": trap}),
    ],
    ids=["torch.save", "torch.save of old", *(f"protocol {p}" for p in range(2, 6)), "default"],
)
def test_a_pickle_is_refused_as_one_and_never_run(tmp_path, make):
    mark, path = tmp_path / "mark", tmp_path / "file.safetensors"
    path.write_bytes(make(Trap(mark)))
    assert "is a pickle, which can run code" in refusal(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_of_the_first_protocols_is_never_run_either(tmp_path, protocol):
    mark, path = tmp_path / "mark", tmp_path / "file.safetensors"
    path.write_bytes(pickle.dumps(Trap(mark), protocol=protocol))
    refusal(path)
    assert not mark.exists()


def _header_length(path, size):
    write_tensors(path, {"kind": "test", "pad": "x" * size}, {"bias": torch.ones(3)})
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    path = tmp_path / "file.safetensors"
    size = 0
    while (found := _header_length(path, size)) < length:
        size += length - found
    assert found == length
    assert path.read_bytes()[0] == 0x80
    assert read_tensors(path, "test")[0]["pad"] == "x" * size


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), RuntimeError("?")])
@pytest.mark.parametrize("before", [True, False])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(
    tmp_path, monkeypatch, error, before
):
    path = tmp_path / "file.safetensors"
    if before:
        write_tensors(path, {"kind": "test"}, {"bias": torch.ones(3)})
    listing = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(tensors, target, metadata):
        Path(target).write_bytes(b"half of a")
        raise error

    monkeypatch.setattr(tensorfile, "save_file", fail)
    with pytest.raises(type(error)):
        write_tensors(path, {"kind": "test"}, {"bias": torch.zeros(3)})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == listing


def test_a_header_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "file.safetensors", {"kind": {1, 2}}, TENSORS)
    assert list(tmp_path.iterdir()) == []


def modules():
    folder = Path(bitfit_fast.__file__).parent
    return {
        str(p.relative_to(folder)): ast.parse(p.read_text("utf-8")) for p in folder.rglob("*.py")
    }


def test_no_module_of_the_package_can_unpickle():
    unsafe = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                imported = [f"{node.value.id}.{node.attr}"]
            else:
                continue
            found += [
                (name, what)
                for what in imported
                if what.split(".")[0] in unsafe or what in ("torch.load", "torch.serialization")
            ]
    assert len(modules()) > 20
    assert found == []
