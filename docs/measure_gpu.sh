#!/usr/bin/env bash
# Repeat the measurements on a GPU that the docs tell of: docs/measure_gpu.sh FOLDER [STEP ...]
#
#   tests           the Triton kernels against the float64 oracle, on the device
#   kernel          docs/kernel.md: the selection beside its floor
#   llava-1.5-7b    docs/benchmarks.md: the first token (any shape of `bench generate`)
#   llava-next-7b
#   qwen2.5-vl-7b
#   decode          answers of 8, 64 and 256 tokens as well, LLaVA-NeXT-7B; not among the defaults
#
# Figures go to FOLDER as JSON and text. PYTHON names the interpreter (python3). A step that fails
# does not keep the others from running. Every shape takes minutes, most of them compilation.
set -uo pipefail
[ $# -gt 0 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
generate="$python -m dartfx bench generate"

step() {
    case $1 in
        # pytest-benchmark, where it is installed, warns beside xdist, and warnings are errors here.
        tests) $python -m pytest -q -m gpu -n 8 -p no:benchmark tests/ops/test_triton.py tests/ops/test_triton_gpu.py ;;
        kernel) $python -m dartfx bench kernel --json "$out/kernel.json" ;;
        decode) $generate --model-shape llava-next-7b --json "$out/decode.json" ;;
        *) $generate --model-shape "$1" --rows eager hooks plain dart --new-tokens 1 --repeat 9 \
            --json "$out/$1.json" ;;
    esac
}

[ $# -gt 0 ] || set -- tests kernel llava-1.5-7b llava-next-7b qwen2.5-vl-7b
failed=0
for name in "$@"; do
    echo "== $name, $(date +%T)"
    if ! step "$name" 2>"$out/$name.err" | tee "$out/$name.txt"; then
        failed=1
        tail -n 20 "$out/$name.err"
    fi
done
exit $failed
