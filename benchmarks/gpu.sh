#!/usr/bin/env bash
# Tests, and benchmarks of kernels and whole steps, in eight minutes, from the checkout alone.
#
#     benchmarks/gpu.sh [OUT_DIR]
#
# OUT_DIR is $OUT, or else benchmarks/results. Leaves there gpu-tests.xml, kernels-DEVICE.json,
# step-DEVICE.json, step-compiled-DEVICE.json, a picture of each of these, memory-DEVICE.json,
# cost-model.json, and gpu-PART.log for each part. Goes on when a part fails, and fails at the
# end. Nothing is installed or fetched; without a GPU it runs smaller sizes, and with
# BITFIT_FAST_QUICK=1 it only shows that everything works. PYTHON names the interpreter, and
# BITFIT_FAST_COMMIT the commit where the checkout has no history.
set -u -o pipefail

here=$(cd "$(dirname "$0")/.." && pwd) || exit 1
out=${1:-${OUT:-$here/benchmarks/results}}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
cd "$here" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# it would time the kernels in Triton's interpreter
unset TRITON_INTERPRET
failed=()
# where only whether it works is asked, a machine that does other things too may take its time
patience=1
[ "${BITFIT_FAST_QUICK:-}" = 1 ] && patience=4

part() { # name, seconds, command: its end goes to the screen
    local name=$1 limit=$(($2 * patience))
    shift 2
    local began=$SECONDS status=0
    # what an interrupt does not stop is killed
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$out/gpu-$name.log" 2>&1 || status=$?
    tail -n 5 "$out/gpu-$name.log"
    echo "== $name: exit status $status after $((SECONDS - began)) s"
    [ "$status" -eq 0 ] || failed+=("$name")
}

# compiling ahead of time needs no GPU, and takes a minute of the eight
tests=()
if [ "${BITFIT_FAST_QUICK:-}" = 1 ]; then
    tests=(tests/kernels/test_dropout.py)
else
    for tested in tests/kernels tests/ops tests/modules tests/models tests/encoder/test_kernels.py \
        tests/training/test_graph.py; do
        [ -e "$tested" ] && tests+=("$tested")
    done
    tests+=(--ignore=tests/kernels/test_compile.py)
fi
# on a GPU most of their time is compilation, which cores share
if command -v nvidia-smi >/dev/null && "$python" -c 'import xdist' 2>/dev/null; then
    tests+=(-n 8)
fi
part tests 110 "$python" -m pytest "${tests[@]}" -q -p no:cacheprovider --durations=10 \
    --junitxml="$out/gpu-tests.xml"
touch "$out/.gpu-began"

device=$("$python" -c 'import sys, torch; sys.path.insert(0, "benchmarks"); import provenance
print(provenance.slug(torch.device("cuda" if torch.cuda.is_available() else "cpu")))') || exit 1
# 1,024 and 8,192 tokens
steps=(--model bert-base --task 64 --batch-size 16,128 --batches 2 --repeats 30)
kept=(--model bert-base --task 64 --batch-size 128)
# with CUDA graphs, which the compiled ones are no slower for
compiled=autocast-graph-compiled,bf16,bf16-graph-compiled model=bert-base
if [ "$device" = cpu ]; then
    steps=(--model minilm --task MRPC --batches 2 --repeats 10)
    kept=(--model minilm --task 64 --batch-size 16)
    compiled=autocast-compiled,bf16,bf16-compiled
fi
if [ "${BITFIT_FAST_QUICK:-}" = 1 ]; then
    compiled=autocast-compiled model=tiny
fi
part step 75 "$python" benchmarks/step.py "${steps[@]}" --seconds 45 \
    --output "$out/step-$device.json"
# to compile takes most of its time
part step-compiled 120 "$python" benchmarks/step.py "${steps[@]}" --seconds 90 \
    --variants autocast,$compiled,fast-bf16,fast-bf16-graph \
    --output "$out/step-compiled-$device.json"
part memory 25 "$python" benchmarks/memory.py "${kept[@]}" --output "$out/memory-$device.json"
part cost-model 20 "$python" benchmarks/cost_model.py --model $model --output "$out/cost-model.json"
# the operations last, which say what they had no time for
part benchmarks 95 "$python" -m pytest benchmarks -q -p no:cacheprovider --benchmark-only \
    --benchmark-columns=median,iqr,rounds --results-dir="$out" --seconds=65
for name in step step-compiled kernels; do
    results=$out/$name-$device.json script=benchmarks/plot_step.py
    [ $name = kernels ] && script=benchmarks/plot.py
    if [ "$results" -nt "$out/.gpu-began" ]; then
        timeout 25 "$python" $script "$results" || failed+=(plot)
    fi
done
rm -f "$out/.gpu-began"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
