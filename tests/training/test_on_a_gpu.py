"""The step as a GPU runs it, without one: nothing waits for the device, nothing lies elsewhere.

All tensors are on the CPU in truth. Two modes pretend that some of them are on a GPU: one answers
Python's questions, the other sees every operation, forward and backward. Kernels are replaced by
their definitions. What a GPU would have to be waited for, and an operation on tensors of two
devices, is an error, which no test on a CPU would notice otherwise.
"""

import contextlib
import os
from collections import OrderedDict
from dataclasses import replace
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import bitfit_fast
from bitfit_fast.encoder.sums import Sums
from bitfit_fast.kernels import _launch, attention, attention_bwd
from bitfit_fast.ops import attention as definitions
from bitfit_fast.ops._backend import BACKEND_VARIABLE
from bitfit_fast.ops.dropout import drawn
from bitfit_fast.training.fast import FastBackend, FastStep
from bitfit_fast.training.settings import Plan

pytest.importorskip("triton", reason="kernels are chosen where triton is installed")

aten = torch.ops.aten
GPU, CPU, PINNED = torch.device("cuda", 0), torch.device("cpu"), "pinned"
#: What the host needs numbers of, or whose output is as large as they say.
WAITS = {
    aten._local_scalar_dense, aten._unique2, aten.equal, aten.is_nonzero, aten.masked_select,
    aten.nonzero, aten.repeat_interleave, aten.unique_consecutive, aten.unique_dim,
}  # fmt: skip
#: What makes tensors of numbers that the host has.
OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.from_numpy)
LENGTHS = [(9, 30, 5, 12), (30, 40, 20, 10), (3, 4, 5, 6)]


class Waits(RuntimeError):
    """The host would wait for the device."""


class Places:
    """Where each memory is said to be, by its address; what is new is told at once."""

    def __init__(self):
        self.of_storage = {}

    def __getitem__(self, tensor):
        return self.of_storage.get(tensor.untyped_storage()._cdata, CPU)

    def __setitem__(self, tensor, place):
        self.of_storage[tensor.untyped_storage()._cdata] = place

    def copies(self, source, to, non_blocking):
        """Refuse a copy between devices that the host waits for."""
        there = self[source]
        if (there == GPU) != (to == GPU) and not (non_blocking and there == PINNED):
            raise Waits(f"a copy of {tuple(source.shape)} from {there} to {to} is waited for")


def unwatched(function, *args, **kwargs):
    """Call a function that no mode looks into, with PyTorch's operations for kernels."""
    with (
        mock.patch.dict(os.environ, {BACKEND_VARIABLE: "torch"}),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        return function(*args, **kwargs)


class Operations(TorchDispatchMode):
    """Runs operations on the CPU, if a GPU could with what lies there."""

    def __init__(self, places):
        super().__init__()
        self.places, self.seen = places, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = {str(self.places[t]) for t in given}
        on_gpu = str(GPU) in there
        if packet is aten.copy_:
            to, source, *rest = args
            waits_not = rest[0] if rest else kwargs.get("non_blocking", False)
            self.places.copies(source, self.places[to], waits_not)
        elif on_gpu:
            self.seen += 1
            self._check(func, packet, args, given)
        out = unwatched(func, *args, **kwargs)
        known = {t.untyped_storage()._cdata for t in given}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in known:
                self.places[made] = GPU if on_gpu else CPU
        return out

    def _check(self, func, packet, args, given):
        if packet in WAITS:
            raise Waits(f"{func} is waited for")
        if packet in (aten.index, aten.index_put, aten.index_put_):
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    raise Waits(f"{func} by a mask is waited for")
        for tensor in given:
            # numbers on the host are given to kernels by value, which a graph would keep
            if self.places[tensor] != GPU:
                raise RuntimeError(f"{func} on the GPU has a {tuple(tensor.shape)} of the CPU")


class Questions(TorchFunctionMode):
    """Answers where tensors are, and makes them where they are wanted."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__":
            owner = func.__self__
            at = None if first is None else self.places[first]
            if owner is Tensor.device:
                return GPU if at == GPU else CPU
            if owner is Tensor.is_cuda:
                return at == GPU
            if owner is Tensor.is_cpu:
                return at != GPU
            return func(*args, **kwargs)
        if func is Tensor.backward:
            # what it comes to; as it is, it would run without this mode
            with self:
                ones = torch.ones_like(first)
                return _engine_run_backward(
                    (first,), (ones,), False, False, (), allow_unreachable=True,
                    accumulate_grad=True,
                )  # fmt: skip
        if func is Tensor.pin_memory:
            if self.places[first] == GPU:
                raise RuntimeError("what lies on the GPU cannot be pinned")
            return self._placed(first.clone(), PINNED)
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and self.places[first] == GPU:
            raise Waits(f"{name} is waited for")
        if func in (Tensor.cuda, Tensor.cpu):
            return self._moved(first, GPU if func is Tensor.cuda else CPU, None, False)
        if func is Tensor.to and not (len(args) > 1 and isinstance(args[1], Tensor)):
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None:
                return self._moved(first, device, dtype, non_blocking)
        device, pins = kwargs.get("device"), kwargs.pop("pin_memory", False)
        if device is None:
            out = func(*args, **kwargs)
            # what is made of the host's numbers, no operation saw
            return self._placed(out, CPU) if func in OF_NUMBERS else out
        goes = torch.device(device).type == "cuda"
        if goes and func in OF_NUMBERS:
            raise Waits(f"{name} of the host's numbers is waited for")
        out = func(*args, **{**kwargs, "device": "cpu"})
        return self._placed(out, GPU if goes else PINNED if pins else CPU)

    def _placed(self, tensor, place):
        self.places[tensor] = place
        return tensor

    def _moved(self, tensor, device, dtype, non_blocking):
        to, there = GPU if device.type == "cuda" else CPU, self.places[tensor]
        if (to == GPU) == (there == GPU):
            return tensor if dtype is None else tensor.to(dtype)
        self.places.copies(tensor, to, non_blocking)
        return self._placed(tensor.to(dtype or tensor.dtype, copy=True), to)


class Attention:
    """The definition of attention in the place of its launchers."""

    def __init__(self, places):
        self.places = places

    def _run(self, function, given):
        assert {str(self.places[t]) for t in given if isinstance(t, Tensor)} == {str(GPU)}
        out = unwatched(function)
        for made in tree_leaves(out):
            if made is not None:
                self.places[made] = GPU
        return out

    def fwd(self, q, k, v, starts_q, starts_k, max_q, max_k, p=0.0, seed=None, bias=None):
        def run():
            keep = drawn(q.shape[0] * q.shape[1], max_k, p, seed)
            return definitions.forward_definition(q, k, v, starts_q, starts_k, p, keep, bias)

        return self._run(run, (q, k, v, starts_q, starts_k, seed, bias))

    def bwd(
        self, do, q, k, v, starts_q, starts_k, max_q, max_k, p=0.0, seed=None, bias=None,
        needs_kv=True, q_sums=None, v_sums=None,
    ):  # fmt: skip
        def run():
            keep = drawn(q.shape[0] * q.shape[1], max_k, p, seed)
            given = (do, q, k, v, starts_q, starts_k, p, keep, bias)
            dq, dkv = definitions.backward_definition(*given)
            if len(q) == len(k):
                joined = torch.cat((dq[:, None], dkv), 1)
                dq, dkv = joined[:, 0], joined[:, 1:]
            if q_sums is not None:
                for total, d in ((q_sums, dq), (v_sums, dkv[:, 1])):
                    total.zero_()
                    total[0, 0] = d.flatten(1).sum(0, dtype=torch.float32)
            return dq, dkv if needs_kv else None

        return self._run(run, (do, q, k, v, starts_q, starts_k, seed, bias, q_sums, v_sums))


@contextlib.contextmanager
def on_gpu(model):
    """Pretend that there is a GPU, and that the model lies there."""
    places, group = Places(), Optimizer._group_tensors_by_device_and_dtype

    def grouped(tensors, with_indices=False):
        # made in C++, which asks nobody where tensors are
        return {(GPU, key[1]): of_key for key, of_key in group(tensors, with_indices).items()}

    stands_in, cuda = Attention(places), torch.cuda
    with (
        mock.patch.dict(os.environ, {BACKEND_VARIABLE: "auto"}),
        mock.patch.object(attention, "attention_fwd", stands_in.fwd),
        mock.patch.object(attention_bwd, "attention_bwd", stands_in.bwd),
        mock.patch.object(_launch, "_multiprocessors", lambda index: 132),
        mock.patch.object(cuda, "get_device_capability", lambda device: (9, 0)),
        mock.patch.object(cuda, "mem_get_info", lambda device: (2**30, 2**30)),
        mock.patch.object(cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(Sums, "_tables", OrderedDict()),
        mock.patch.object(Optimizer, "_group_tensors_by_device_and_dtype", grouped),
        Operations(places) as operations,
        Questions(places),
    ):
        for tensor in (*model.parameters(), *model.buffers()):
            places[tensor] = GPU
        yield operations


def batch(lengths, seed=0):
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(4, 64, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": ids * mask,
        "token_type_ids": (ids % 2) * mask,
        "attention_mask": mask,
        "labels": ids[:, 0] % 2,
        "packed_lengths": lengths,
    }


def plan(**changes):
    options = {
        "steps": 100, "steps_per_epoch": 10, "warmup_steps": 4, "eval_every": 10, "lr": 1e-3,
        "schedule": "linear", "precision": "bf16", "grad_clip": 1.0, "batch_size": 4,
        "max_length": 64, "device": GPU, "graph": False,
    }  # fmt: skip
    return Plan(**(options | changes))


def lies_there(batch, places):
    for value in batch.values():
        if isinstance(value, Tensor):
            places[value] = GPU
    return batch


def train(model, given, batches, fixed=False, terms="all"):
    """Take a step with each batch; return losses and values."""
    selection = bitfit_fast.select(model, terms)
    FastBackend().patch(model, selection, given)
    step = FastStep(model, given)
    if fixed:
        step.fixed = step.of_fixed_size(after=0)
    torch.manual_seed(1)
    losses = torch.stack([step(batch) for batch in batches])
    assert not fixed or len(step.fixed._made) == 2
    return losses, step.arena.values


def loaded(folder, dropout=0.1):
    model = bitfit_fast.load_model(str(folder), ["no", "yes"], 0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("memory", ["fast", "low", "lower", "lowest"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_and_all_is_where_it_should_be(bert_folder, precision, memory, fixed):
    given, ends = plan(precision=precision, memory=memory), []
    batches = [batch(lengths) for lengths in LENGTHS]
    model = loaded(bert_folder)
    with on_gpu(model) as operations:
        ends.append(train(model, given, batches, fixed))
        assert operations.seen > 100 * len(batches)
    # the same as without a GPU
    ends.append(train(loaded(bert_folder), replace(given, device=CPU), batches))
    exact = precision == "fp32" and memory != "low"
    for found, expected in zip(*ends):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if exact else 2e-2)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("terms", ["embedding-layernorm", "query", "output-layernorm"])
def test_backward_passes_that_end_early(bert_folder, terms, dropout, fixed):
    model = loaded(bert_folder, dropout)
    with on_gpu(model):
        train(model, plan(), [batch(lengths) for lengths in LENGTHS], fixed, terms)


@pytest.mark.parametrize("fixed", [False, True])
def test_batches_that_are_there_already_and_other_positions(roberta_folder, fixed):
    model = loaded(roberta_folder)
    with on_gpu(model) as operations:
        batches = [lies_there(batch(lengths), operations.places) for lengths in LENGTHS]
        for each in batches:
            del each["token_type_ids"]
        train(model, plan(), batches, fixed)


@pytest.mark.parametrize("fixed", [False, True])
def test_what_is_added_to_scores_is_computed_once_for_many_lengths(fixed):
    config = transformers.MPNetConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=66,
    )  # fmt: skip
    model = transformers.MPNetForSequenceClassification(config).train()
    computed, sizes = type(model.mpnet.encoder).compute_position_bias, []
    with on_gpu(model) as operations:

        def compute(self, x):
            # the host waits for it
            sizes.append(x.shape[1])
            bias = unwatched(computed, self, x)
            operations.places[bias] = GPU
            return bias

        batches = [batch(lengths) for lengths in LENGTHS]
        for given in batches:
            del given["token_type_ids"]
        with mock.patch.object(type(model.mpnet.encoder), "compute_position_bias", compute):
            train(model, plan(), batches, fixed)
    assert sizes == [64]


def test_what_would_be_waited_for_is_noticed(bert_folder):
    model = loaded(bert_folder)
    with on_gpu(model) as operations:
        weight = model.bert.pooler.dense.weight
        assert weight.is_cuda and weight.device == GPU and (weight + 1).is_cuda
        for waits in (
            lambda: weight.sum().item(),
            lambda: bool(weight.isfinite().all()),
            lambda: weight[0].tolist(),
            lambda: weight[weight > 0],
            lambda: weight.nonzero(),
            lambda: weight.cpu(),
            lambda: torch.ones(3).to(GPU, non_blocking=True),
            lambda: torch.ones(3).pin_memory().to(GPU),
            lambda: torch.tensor([1, 2], device=GPU),
            # a mask without its lengths has to be looked at
            lambda: train(model, plan(), [{**batch((3, 4)), "packed_lengths": (3,)}]),
        ):
            with pytest.raises(Waits):
                waits()
        with pytest.raises(RuntimeError, match="of the CPU"):
            weight + torch.ones(weight.shape)
        assert torch.ones(3).pin_memory().to(GPU, non_blocking=True).is_cuda
        assert operations.seen > 0
