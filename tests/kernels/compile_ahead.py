"""Compile every kernel for GPUs that need not be there, and print what each one takes.

Run by `test_compile.py` in a process without Triton's interpreter; prints one line of JSON for
each kernel, configuration and architecture: registers, spilled bytes and shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from bitfit_fast.kernels import _reduce, activation, column_sum, layer_norm
from bitfit_fast.kernels._launch import column_config

POINTERS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
#: (rows, columns) of the shapes whose configurations are compiled.
SHAPES = ((8192, 768), (64, 1), (100, 30))


def variants():
    """Yield name, kernel, signature, constants and warps of everything that can be launched."""
    for rows, columns in SHAPES:
        config = column_config(rows, columns, 132)
        config.pop("P")
        warps = config.pop("num_warps")
        for dtype, pointer in POINTERS.items():
            # what a launch specialises on: addresses and strides in whole 16-byte loads
            aligned = ("dy_ptr", "partial_ptr", "stride_ym", "N") if columns % 16 == 0 else ()
            for segmented in (False, True):
                signature = {
                    "dy_ptr": pointer,
                    "offsets_ptr": "*i64" if segmented else pointer,
                    "partial_ptr": "*fp32",
                    **dict.fromkeys(("M", "N", "P", "stride_ym"), "i32"),
                    "stride_yn": "constexpr",
                }
                constants = {"stride_yn": 1, "HAS_OFFSETS": segmented, **config}
                name = f"column_sum {dtype} {columns} segmented={segmented}"
                yield name, column_sum._column_sum_kernel, signature, aligned, constants, warps
    config = column_config(8192, 3072, 132)
    config.pop("P")
    warps = config.pop("num_warps")
    for dtype, pointer in POINTERS.items():
        # the dtype changes loads and stores, the activation what is between them
        for act in activation.ACTIVATIONS if dtype == "bf16" else ("gelu",):
            for few_bits in (False, True):
                options = {"ACT": act, "HAS_BIAS": not few_bits, "FEW_BITS": few_bits}
                constants = {**activation._quantisation(act), **options, **config}
                kept = "*u8" if few_bits else pointer
                tail = f"{dtype} {act} few_bits={few_bits}"
                strides = {"stride_xm": "i32", "stride_xn": "constexpr"}
                yield (
                    f"activation_fwd {tail}",
                    activation._activation_fwd_kernel,
                    {
                        "x_ptr": pointer, "b_ptr": "*fp32", "h_ptr": pointer, "d_ptr": "*u8",
                        "M": "i32", "N": "i32", **strides,
                    },
                    ("x_ptr", "b_ptr", "h_ptr", "d_ptr", "N", "stride_xm"),
                    {"stride_xn": 1, **constants},
                    warps,
                )  # fmt: skip
                yield (
                    f"activation_bwd {tail}",
                    activation._activation_bwd_kernel,
                    {
                        "x_ptr": kept, "b_ptr": "*fp32", "dh_ptr": pointer, "dz_ptr": pointer,
                        "partial_ptr": "*fp32", "M": "i32", "N": "i32", "P": "i32", **strides,
                        "stride_hm": "i32", "stride_hn": "constexpr",
                    },
                    ("x_ptr", "b_ptr", "dh_ptr", "dz_ptr", "N", "stride_xm", "stride_hm"),
                    {"stride_xn": 1, "stride_hn": 1, **constants},
                    warps,
                )  # fmt: skip
    for columns, dtype in ((768, "fp32"), (768, "bf16"), (4096, "bf16")):
        config = layer_norm.layer_norm_config(8192, columns, 132)
        config.pop("P")
        warps = config.pop("num_warps")
        pointer = POINTERS[dtype]
        vectors = dict.fromkeys(("b_ptr", "gamma_ptr", "beta_ptr", "rstd_ptr"), "*fp32")
        sizes = {"M": "i32", "N": "i32", "p": "fp32", "seed_ptr": "*i64"}
        for dropout in (False, True):
            forward = {
                **dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr", "xhat_ptr"), pointer),
                **vectors, **sizes, "eps": "fp32", "stride_xm": "i32", "stride_rm": "i32",
            }  # fmt: skip
            options = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "HAS_BETA": True}
            yield (
                f"layer_norm_fwd {dtype} {columns} dropout={dropout}",
                layer_norm._layer_norm_fwd_kernel,
                forward,
                tuple(n for n in forward if n.endswith("_ptr") or n in ("N", "stride_xm")),
                {"stride_xn": 1, "stride_rn": 1, "HAS_DROPOUT": dropout, **options, **config},
                warps,
            )
            for dgamma in (False, True):
                backward = {
                    **dict.fromkeys(("dy_ptr", "xhat_ptr", "ds_ptr", "dx_ptr"), pointer),
                    "rstd_ptr": "*fp32", "gamma_ptr": "*fp32", "partial_ptr": "*fp32", **sizes,
                    "P": "i32", "stride_ym": "i32",
                }  # fmt: skip
                options = {"HAS_DROPOUT": dropout, "NEEDS_DB": True, "NEEDS_DGAMMA": dgamma}
                yield (
                    f"layer_norm_bwd {dtype} {columns} dropout={dropout} dgamma={dgamma}",
                    layer_norm._layer_norm_bwd_kernel,
                    backward,
                    tuple(n for n in backward if n.endswith("_ptr") or n in ("N", "stride_ym")),
                    {"stride_yn": 1, **options, **config},
                    warps,
                )
    constants = {"BLOCK_P": _reduce._BLOCK_P, "BLOCK_N": _reduce._BLOCK_N}
    signature = {"partial_ptr": "*fp32", "out_ptr": "*fp32", "P": "i32", "N": "i32"}
    yield "add_partial_rows", _reduce._add_partial_rows_kernel, signature, (), constants, 4


def compiled(kernel, signature, aligned, constants, warps, capability):
    """Return registers, spilled bytes and shared memory of one kernel."""
    given = {**signature, **dict.fromkeys(constants, "constexpr")}
    signature = {name: given[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"num_warps": warps})
    architecture = re.search(r"\.target (sm_\w+)", built.asm["ptx"])[1]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(built.asm["ptx"])
        command = [get_ptxas(capability).path, "-v", f"-arch={architecture}", str(ptx)]
        done = subprocess.run(
            [*command, "-o", str(ptx.with_suffix(".cubin"))],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return {
        "registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))),
        "shared": built.metadata.shared,
    }


def with_ones():
    """Yield the variants, and one of each kernel with every size equal to 1.

    A launch makes constants of integers that are 1, and constants are not tensors.
    """
    seen = set()
    for name, kernel, signature, aligned, constants, warps in variants():
        yield name, kernel, signature, aligned, constants, warps
        if kernel.__name__ not in seen:
            seen.add(kernel.__name__)
            ones = {n: 1 for n in ("M", "N", "P", "stride_xm", "stride_ym") if n in signature}
            left = tuple(n for n in aligned if n not in ones)
            yield f"{name} with ones", kernel, signature, left, {**constants, **ones}, warps


def main():
    """Compile for the architectures named on the command line."""
    for capability in map(int, sys.argv[1:]):
        for name, *what in with_ones():
            print(json.dumps({"name": name, "sm": capability, **compiled(*what, capability)}))


if __name__ == "__main__":
    main()
