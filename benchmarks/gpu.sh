#!/usr/bin/env bash
# Tests, and benchmarks of kernels and whole steps, in nine minutes, from the checkout alone.
#
#     benchmarks/gpu.sh [OUT_DIR]
#
# OUT_DIR is $OUT, or else benchmarks/results. Leaves there seven files, as a machine that is lent
# may hand out no more than eight: gpu-tests.xml, step-DEVICE.json, step-compiled-DEVICE.json,
# memory-DEVICE.json, kernels-DEVICE.json, cost-model-DEVICE.json, and gpu.log of all parts.
# plot.py and plot_step.py draw the results afterwards. Goes on when a part fails, and fails at the
# end. What matters most comes first, and each part writes what it has so far. Nothing is installed
# or fetched; without a GPU it runs smaller sizes, and with BITFIT_FAST_QUICK=1 it only shows that
# everything works. PYTHON names the interpreter, and BITFIT_FAST_COMMIT the commit where the
# checkout has no history.
set -u -o pipefail

here=$(cd "$(dirname "$0")/.." && pwd) || exit 1
out=${1:-${OUT:-$here/benchmarks/results}}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
cd "$here" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# a machine that is lent may hold PyTorch uncompiled, which takes each process a minute to import
unset PYTHONDONTWRITEBYTECODE
# it would time the kernels in Triton's interpreter
unset TRITON_INTERPRET
failed=()
# where only whether it works is asked, a machine that does other things too may take its time
patience=1
[ "${BITFIT_FAST_QUICK:-}" = 1 ] && patience=4

# a shell in the background may have handed on that interrupts are ignored
hears=()
env --default-signal=INT true 2>/dev/null && hears=(env --default-signal=INT)

scratch=$(mktemp -d) || exit 1
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$scratch"' EXIT
log=$out/gpu.log
: >"$log"

part() { # name, seconds, command: its end goes to the screen
    local name=$1 limit=$(($2 * patience))
    shift 2
    local began=$SECONDS status=0 before
    echo "== $name: $*" >>"$log"
    before=$(wc -l <"$log")
    # what an interrupt does not stop is killed; processes of tests have 10 s to end by themselves
    timeout --signal=INT --kill-after=20 "$limit" "${hears[@]}" "$@" >>"$log" 2>&1 || status=$?
    tail -n "+$((before + 1))" "$log" | tail -n 5
    echo "== $name: exit status $status after $((SECONDS - began)) s"
    [ "$status" -eq 0 ] || failed+=("$name")
}

if [ "${BITFIT_FAST_QUICK:-}" = 1 ]; then
    tests=(tests/kernels/test_reduce.py)
else
    # whole encoders and captured steps first; compiling ahead of time, the kernels for CPUs and
    # PyTorch's definitions need no GPU, nor do most tests of steps
    tests=(-k "triton or kernels or gpu")
    tests+=(tests/encoder/test_kernels.py tests/training/test_{graph,passes,reference}.py)
    for tested in tests/kernels/test_*.py; do
        case $tested in
            *_compile.py | *_emulated.py | *_library.py | *_native*.py | *_tiles.py) ;;
            *) tests+=("$tested") ;;
        esac
    done
    tests+=(tests/ops tests/modules)
fi
# on a GPU most of their time is compilation, which cores share, and which that of the kernels for
# CPUs is left out of; what is measured by processes that share the GPU is not for the benchmarks
alone=()
# lets Triton compile and keep the kernels of some variants, and those of both ways of products
ready() { # in the background
    local running=
    trap 'kill $running 2>/dev/null; wait; exit' TERM
    for products in fused vendor; do
        "${alone[@]}" BITFIT_FAST_PRODUCTS=$products timeout --kill-after=5 95 \
            "$python" benchmarks/step.py \
            --model bert-base --task 64 --batch-size 128,16 --dropout 0.1,0 --batches 1 --repeats 2 \
            --seconds 80 --variants "$1" --output "$scratch/$1-$products.json" &
        running=$!
        wait "$running"
    done
}
if command -v nvidia-smi >/dev/null && "$python" -c 'import xdist' 2>/dev/null; then
    # few at a time, or one process gets all of the first
    tests+=(-n 11 --maxschedchunk 2)
    alone=(env CXX=false XDG_CACHE_HOME="$scratch")
    # one after the other it would take half of the steps' time
    for variants in fast-fp32 fast-bf16 fast-bf16-low,fast-bf16-lower,fast-bf16-lowest modules; do
        ready $variants >>"$scratch/ready.log" 2>&1 &
    done
fi
part tests 100 "${alone[@]}" "$python" -m pytest "${tests[@]}" -v -p no:cacheprovider --durations=10 \
    --junitxml="$out/gpu-tests.xml"
# what is measured from here on has the GPU to itself
kill $(jobs -p) 2>/dev/null
wait
touch "$scratch/began"

device=$("$python" -c 'import sys, torch; sys.path.insert(0, "benchmarks"); import provenance
print(provenance.slug(torch.device("cuda" if torch.cuda.is_available() else "cpu")))') || exit 1
# 8,192 and 1,024 tokens, the former first: it takes most of the time, and says most
steps=(--model bert-base --task 64 --batch-size 128,16 --batches 2 --repeats 30)
kept=(--model bert-base --task 64 --batch-size 128)
# with CUDA graphs, which the compiled ones are no slower for; there is time for the strongest
compiled=bf16,bf16-graph-compiled model=bert-base
vendor=,fast-bf16-graph-vendor
if [ "$device" = cpu ]; then
    steps=(--model minilm --task MRPC --batches 2 --repeats 10)
    kept=(--model minilm --task 64 --batch-size 16)
    compiled=autocast-compiled,bf16,bf16-compiled vendor=
fi
if [ "${BITFIT_FAST_QUICK:-}" = 1 ]; then
    compiled=autocast-compiled model=tiny
    steps=(--model tiny --task MRPC --batches 2 --repeats 10)
    kept=(--model tiny --task 64 --batch-size 16)
fi
part step 120 "$python" benchmarks/step.py "${steps[@]}" --seconds 85 \
    --output "$out/step-$device.json"
# to compile takes most of its time
part step-compiled 130 "$python" benchmarks/step.py "${steps[@]}" --seconds 100 \
    --variants autocast,$compiled,fast-bf16,fast-bf16-graph$vendor \
    --output "$out/step-compiled-$device.json"
part memory 35 "$python" benchmarks/memory.py "${kept[@]}" --output "$out/memory-$device.json"
# the operations say what they had no time for
part benchmarks 95 "$python" -m pytest benchmarks -q -p no:cacheprovider --benchmark-only \
    --benchmark-columns=median,iqr,rounds --results-dir="$out" --seconds=65
if [ "$out/kernels-$device.json" -nt "$scratch/began" ]; then
    timeout $((25 * patience)) "$python" benchmarks/plot.py "$out/kernels-$device.json" --output "$scratch" ||
        failed+=(table)
fi
# which needs neither a GPU nor the kernels for CPUs
part cost-model 20 env CXX=false "$python" benchmarks/cost_model.py --model $model --output "$out/cost-model-$device.json"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
