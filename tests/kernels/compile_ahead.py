"""Compile every kernel for GPUs that need not be there, and print what each one takes.

Run by `test_compile.py` in a process without Triton's interpreter. The launchers run as they do
in training, on tensors without data, with a driver that only names the architecture: what is
compiled is what a launch compiles, specialised as a launch specialises. Prints one line of JSON
for each kernel: registers, spilled bytes, shared memory.
"""

import contextlib
import functools
import io
import itertools
import json
import re
import sys

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bitfit_fast.kernels import (
    _reduce,
    activation,
    adamw,
    attention,
    attention_bwd,
    column_sum,
    dropout,
    embedding,
    layer_norm,
    linear,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: BERT's width, and all that are compiled for the architecture that has everything; the widest is
#: everywhere.
BERT = 768
WIDTHS = (384, BERT, 1024, 4096)
#: Sizes of 1, of which a launch makes constants, and misaligned rows.
ODD = ((64, 1), (1, 64), (100, 30))
ROWS = 8192
#: Heads of attention, the sizes of one, and the longest sequence in queries and in keys.
HEADS = 12
HEAD_SIZES = {"bf16": (32, 64, 128), "fp32": (64,)}
LENGTHS = ((512, 512), (128, 128), (64, 64), (1, 64))
#: Capability of the architecture that what hangs on none is compiled for.
WHOLE = 90
#: Multiprocessors of an H200, by which tiles are chosen.
PROCESSORS = 132


class NamedDriver:
    """Says which architecture to compile for, and nothing else."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def empty(*size, dtype=torch.float32):
    return torch.empty(*size, dtype=dtype, device="meta")


def attention_inputs(tokens, queries, d, sequences, dtype):
    """Return what attention takes in every pass, of packed keys and values and of queries."""
    k, v = empty(tokens, 3, HEADS, d, dtype=dtype)[:, 1:].unbind(1)
    q = empty(queries, 3, HEADS, d, dtype=dtype)[:, 0]
    starts = empty(sequences + 1, dtype=torch.int32)
    return q, k, v, starts, starts


def sums_of(queries, longest, d, sequences, dtype, needs_kv=True):
    """Return where attention's backward pass puts the partial rows of two sums."""
    given = (sequences, *longest, d, dtype.itemsize, needs_kv)
    return tuple(empty(rows, HEADS * d) for rows in attention_bwd.attention_sums(*given))


def segments(count):
    return empty(1000), empty(count, 5, dtype=torch.int32), 768, empty(1000)


def launches_of_adamw(name, size):
    """Yield both launches of an update."""
    buffers, number = [empty(size)] * 4, empty(1)[0]
    yield name, adamw.squares, (buffers[0], empty(200))
    options = (empty(100), 1.0, 0.9, 0.999, 1e-8, 0.01, False)
    yield name, adamw.adamw, (*buffers, number, number, *options)


def launches_of_row_counts():
    """Yield what every row count but a GEMM's block of rows shares."""
    for m in (1, 2, 15, 16, 17, 63, 64):
        a, v, rstd = empty(m, 768, dtype=torch.bfloat16), empty(768), empty(m)
        yield f"{m} rows", column_sum.column_sum, (a,)
        yield f"{m} rows", dropout.dropout, (a, 0.1, empty(1, dtype=torch.int64))
        yield f"{m} rows", activation.activation_fwd, (a, v)
        yield f"{m} rows", activation.activation_bwd, (a, a, v)
        yield f"{m} rows", layer_norm.layer_norm_fwd, (a, v, v, v, a)
        yield f"{m} rows", layer_norm.layer_norm_bwd, (a, a, None, rstd, v)
        ids, tables = [empty(m, dtype=torch.int64)] * 3, [empty(m + 1, 768)] * 3
        given = (v, v, ids, tables, 0.1, empty(1, dtype=torch.int64), 1e-12, torch.bfloat16)
        yield f"{m} rows", embedding.embedding_layer_norm, given
        w = empty(768, 768, dtype=torch.bfloat16)
        yield f"{m} rows", linear.linear_fwd, (a, w.t(), v)
        yield f"{m} rows", linear.linear_bwd, (a, w, a, v)
        inputs = attention_inputs(m, m, 64, m, torch.bfloat16)
        for most in (64 + m, 512 + m):
            options = (most, most, 0.1, empty(1, dtype=torch.int64), empty(HEADS, most, most))
            yield f"{m} rows", attention.attention_fwd, (*inputs, *options)
            places = sums_of(m, (most, most), 64, m, torch.bfloat16)
            given = (inputs[0], *inputs, *options, True, *places)
            yield f"{m} rows", attention_bwd.attention_bwd, given
        yield f"{m} rows", _reduce.add_segments, segments(m)
        yield from launches_of_adamw(f"{m} rows", 1000 * m)


def launches_of_attention(whole):
    """Yield every block size of attention, at each size of a head.

    Where not the whole is asked for, BERT's heads with dropout, and the widest of the others.
    """
    seed, bias = empty(1, dtype=torch.int64), empty(HEADS, 512, 512)
    sizes = [(name, d) for name, of_dtype in HEAD_SIZES.items() for d in of_dtype]
    for (name, d), (max_q, max_k) in itertools.product(sizes, LENGTHS):
        # of a few queries the tiles are the least, so that BERT's heads will do
        if not (usual := (name, d) == ("bf16", 64)) and max_q == 1:
            continue
        if not whole and not usual and (d == 32 or max_q < 512):
            continue
        # dropout takes the most registers; without it, and with a bias, BERT's heads will do
        kinds = ((0.1, None), (0.1, bias), (0.0, None)) if usual else ((0.1, None),)
        for p, added in kinds[:2] if max_q == 1 or not whole else kinds:
            queries = ROWS if max_q == max_k else ROWS // 64
            inputs = attention_inputs(ROWS, queries, d, 64, DTYPES[name])
            options = (max_q, max_k, p, seed, added)
            tail = f"{name} {max_q}x{max_k} D={d} dropout={p} bias={added is not None}"
            yield f"attention_fwd {tail}", attention.attention_fwd, (*inputs, *options)
            do = empty(queries, HEADS, d, dtype=DTYPES[name])
            places = sums_of(queries, (max_q, max_k), d, 64, DTYPES[name])
            what, arguments = f"attention_bwd {tail}", (do, *inputs, *options, True)
            yield f"{what} sums", attention_bwd.attention_bwd, (*arguments, *places)
            # the sums take registers more; without them, and at the bottom of a stack without
            # dkv, where short sequences tell enough, BERT's dropout will do
            if usual and p and added is None:
                yield what, attention_bwd.attention_bwd, arguments
                if max_q == 64:
                    arguments = (do, *inputs, *options, False)
                    yield f"{what} without dkv", attention_bwd.attention_bwd, arguments


def launches_of_layer_norm(name, m, n, usual):
    """Yield a row's kernels: all that can be asked of BERT's, and elsewhere the most and the least.

    The most is dropout, before a block with a third sum and without one, which has registers of its
    own number, and after it without.
    """
    dtype, at, seed = DTYPES[name], f"{name} {m}x{n}", empty(1, dtype=torch.int64)
    a, v, rstd = empty(m, n, dtype=dtype), empty(n), empty(m)
    for p, prenorm in itertools.product((0.0, 0.1) if usual else (0.1,), (False, True)):
        tail = f"{at} dropout={p} prenorm={prenorm}"
        arguments = (a, v, v, v, a, p, seed, 1e-5, dtype, True, prenorm)
        yield f"layer_norm_fwd {tail}", layer_norm.layer_norm_fwd, arguments
        mean, dsum = (rstd, a) if prenorm else (None, None)
        after = (a, mean, rstd, v, dsum, p, seed, dtype, dtype, True, True)
        # dropout takes registers more, with which a third sum shows whether all fit
        for dgamma in (False, True) if (p if usual else prenorm) else (False,):
            what = f"layer_norm_bwd {tail} dgamma={dgamma}"
            yield what, layer_norm.layer_norm_bwd, (a, *after, dgamma)
        if name == "bf16" and not prenorm and (m, n) not in ODD:  # the last one of a stack
            arguments = (*arguments[:8], torch.float32, True, False, dtype)
            yield f"layer_norm_fwd {tail} to fp32", layer_norm.layer_norm_fwd, arguments
            what = f"layer_norm_bwd {tail} from fp32"
            yield what, layer_norm.layer_norm_bwd, (empty(m, n), *after)
    yield f"layer_norm_fwd {at} alone", layer_norm.layer_norm_fwd, (a, v, v)
    for dgamma in (False, True) if usual else (False,):
        arguments = (a, a, rstd, rstd, v)
        what = f"layer_norm_bwd {at} alone dgamma={dgamma}"
        needs = {"needs_db": False, "needs_dgamma": dgamma}
        yield what, functools.partial(layer_norm.layer_norm_bwd, **needs), arguments
    for count, p in itertools.product(range(1, 4), (0.0, 0.1)) if usual else ((3, 0.1),):
        ids, tables = [empty(m, dtype=torch.int64)] * count, [empty(30000, n)] * count
        what = f"embedding_layer_norm {at} {count} tables dropout={p}"
        yield what, embedding.embedding_layer_norm, (v, v, ids, tables, p, seed, 1e-12, dtype)


def launches_of_products(odd):
    """Yield products with an activation, in high and in low tiles; a width changes none of them.

    All activations where odd sizes are asked for, too, in the high tiles; in the low ones, where
    they differ by few registers, and elsewhere the longest; GELU in fp32 and at odd sizes.
    """
    most = ("gelu_tanh",)
    sizes = [("bf16", ROWS, BERT, tuple(activation.ACTIVATIONS) if odd else most)]
    sizes += [("bf16", ROWS // 8, BERT, most)]
    sizes += [("fp32", ROWS, BERT, ("gelu",)), *(("bf16", *shape, ("gelu",)) for shape in odd[-1:])]
    for name, m, n, acts in sizes:
        at, dtype = f"{name} {m}x{n}", DTYPES[name]
        a, v, w, few = empty(m, n, dtype=dtype), empty(n), empty(n, n, dtype=dtype), empty(m, n)
        few, forward = few.to(torch.uint8), w.t()
        for act in acts:
            yield f"linear_fwd {at} {act}", linear.linear_fwd, (a, forward, v, act)
            yield f"linear_bwd {at} {act}", linear.linear_bwd, (a, w, a, v, act)
        yield f"linear_fwd {at} 8-bit", linear.linear_fwd, (a, forward, v, act, True)
        yield f"linear_bwd {at} 8-bit", linear.linear_bwd, (a, w, few, v, act)
        if len(acts) > 1:
            nothing = (a, forward, v, "gelu", False, False)
            yield f"linear_fwd {at} keeps nothing", linear.linear_fwd, nothing


def launches(whole):
    """Yield a name, a launcher and its arguments for everything that can be launched.

    What hangs on no architecture is there where the `whole` is asked for: odd sizes, all widths but
    BERT's and the widest, small heads of attention, most activations of products, and of the dtypes
    of 16 bits, which differ in their conversions alone, the second. Flags and activations are
    crossed at BERT's width in bf16. Other dtypes, widths and strides change loads, stores and
    tiles, not what is between them: there the flags are those that ask for the most registers, and
    for the least.
    """
    seed, offsets = empty(1, dtype=torch.int64), empty(3, dtype=torch.int64)
    widest, odd = layer_norm.MAX_COLUMNS, ODD if whole else ()
    shapes = [
        (name, ROWS, n)
        for name in DTYPES
        if name != "fp16" or whole
        for n in ((*WIDTHS, widest) if name != "fp16" and whole else (BERT, widest))
    ]
    for name, m, n in [*shapes, *(("bf16", *shape) for shape in odd)]:
        dtype, at, usual = DTYPES[name], f"{name} {m}x{n}", (name, n) == ("bf16", BERT)
        a, v = empty(m, n, dtype=dtype), empty(n)
        flags = itertools.product((0.0, 0.1), (None, offsets))
        for p, cuts in flags if usual else ((0.0, None), (0.1, offsets)):
            what = f"column_sum {at} dropout={p} segments={cuts is not None}"
            yield what, column_sum.column_sum, (a, cuts, p, seed)
        yield f"dropout {at}", dropout.dropout, (a, 0.1, seed)
        for act in activation.ACTIVATIONS if usual else ("gelu",):
            tail = f"{at} {act}"
            yield f"activation_fwd {tail}", activation.activation_fwd, (a, v, act)
            yield f"activation_fwd {tail} 8-bit", activation.activation_fwd, (a, v, act, True)
            yield f"activation_bwd {tail}", activation.activation_bwd, (a, a, v, act)
        # of a derivative in 8 bits, activations differ in two constants
        few = empty(m, n, dtype=torch.uint8)
        yield f"activation_bwd {tail} 8-bit", activation.activation_bwd, (a, few, v, act)
        yield from launches_of_layer_norm(name, m, n, usual)
    for adds in (False, True):
        yield f"add_segments adds={adds}", _reduce.add_segments, (*segments(70), adds)
    yield from launches_of_adamw("adamw", 100_000)
    yield from launches_of_attention(whole)
    yield from launches_of_products(odd)


def compiled(capability, launches):
    """Yield what the assembler says of each kernel that the launches need."""
    for module in (activation, column_sum, embedding, layer_norm, linear):
        module.processors = lambda tensor: PROCESSORS
    driver.set_active(NamedDriver(capability))
    # the log comes with an assembler's run, not from the cache
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    log, seen = io.StringIO(), {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        with contextlib.redirect_stdout(log):
            built = run(self, *args, grid=grid, warmup=True, **options)
        seen.setdefault(built.hash, (self.__name__.strip("_"), built))

    JITFunction.run = compile_only
    for name, launcher, arguments in launches:
        known = len(seen)
        launcher(*arguments)
        said = log.getvalue()
        log.seek(0)
        log.truncate()
        registers = map(int, re.findall(r"Used (\d+) registers", said))
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        for kernel, built in list(seen.values())[known:]:
            yield {
                "kernel": kernel,
                "of": name,
                "sm": capability,
                "registers": next(registers),
                "spilled": sum(map(int, spills.pop(0))),
                "shared": built.metadata.shared,
            }
    JITFunction.run = run


def main():
    """Compile for the architecture named on the command line; for one, all that there is."""
    capability = int(sys.argv[1])
    whole = capability == WHOLE
    # row counts come first: what they compile is not compiled again
    wanted = launches_of_row_counts() if whole else ()
    wanted = itertools.chain(wanted, launches(whole))
    for row in compiled(capability, wanted):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
