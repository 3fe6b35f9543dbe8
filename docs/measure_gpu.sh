#!/usr/bin/env bash
# Repeat the measurements on a GPU that the docs show: docs/measure_gpu.sh [-j] FOLDER [STEP[:SECONDS] ...]
#
#   tests           the Triton kernels against the float64 oracle, on the device
#   kernel          docs/kernel.md: the selection and its floor
#   llava-1.5-7b    docs/benchmarks.md: the first token (any shape of `bench generate`)
#   llava-next-7b
#   qwen2.5-vl-7b
# and, not among the defaults,
#   candidate       the kernels with docs/kernel_candidate.patch: their tests, then today's and these timed
#   selectors       docs/selectors.md: the other selectors, at LLaVA-NeXT-7B's shape
#   decode          docs/benchmarks.md: answers of 64 and 256 tokens, LLaVA-NeXT-7B, growing cache
#   decode-static   the same with a static cache, decode in CUDA graphs
#   batch-N         the first token of N prompts at once, LLaVA-NeXT-7B
#   images-N        the first token of a prompt of N images, LLaVA-NeXT-7B
#   decode-static-ROW  the same of one row, plain or dart: with -j the two compile side by side
#   turns           second and third turns of a conversation, LLaVA-NeXT-7B with 8 of its 32 layers
#   turns-ROW       the same of one row
#   profile         kernels, gaps and launches of the first token, LLaVA-NeXT-7B: plain, dart, dart
#                   with every layer compiled, and with prefills in CUDA graphs
#   profile-graphs  the same of padded prompts, and with mode="reduce-overhead"
#
# Figures go to FOLDER as JSON and text. PYTHON names the interpreter (python3), SECONDS or
# SECONDS_EACH how long a step may take (900); what it had measured by then is in its JSON. A step
# that fails does not keep the others from running. Every shape takes minutes, most of them
# compilation: with -j the steps compile side by side, each with a model of its own on the device,
# and those of `bench generate` are timed one after the other, when all have compiled and `tests`,
# if among them, has ended.
#
# Run on an H200 on 2026-11-27: tests, kernel, profile, profile-graphs, qwen2.5-vl-7b, the last three
# again on 2026-11-28; before that selectors and the first runs of decode, decode-static, batch-4,
# batch-16, images-5 (docs/benchmarks.md). On 2026-11-28 `tests` had not ended after 120 s (87 of 90
# reported, one failed, its name was not printed).
# What no GPU has run yet: outlined layers, which are the default, and the one recording that
# prefill="graphs" makes of a call (`profile`: does it reach 5 times plain's prefill, and is dart as
# fast as dart_flat?); today's tiles of the kernels in `tests` and `kernel`; the kernel behind cover and
# relevant (`tests` compares it with its plain form, `selectors` times it); images-6 (17,622 tokens),
# batch-8, turns, and decode-static since static caches got shorter. In an order for 9 minutes on 16
# cores and 139 GiB of GPU memory (on 78 GiB without images-6 and batch-8), with the seconds that it
# should take, estimated from earlier compilations:
#   docs/measure_gpu.sh -j FOLDER profile:380 decode-static-plain:370 decode-static-dart:370 \
#       images-6:360 batch-8:360 turns-plain:360 turns-dart:360 tests:240                       320
#   docs/measure_gpu.sh FOLDER candidate:120 selectors:60                                       180
# then, if there is time, -j batch-16 decode. A static cache compiled in 76 s (plain) and 44 s (dart),
# one after the other; as two steps they take as long as the slower, and are timed one after the other
# instead of in turns. --dynamic takes more than 3 minutes to compile 32 layers, so turns have 8: their
# ratios are of another shape. The peak memory of images-6 and of `kernel` (shape video, 16,384 tokens)
# is in their JSON.
set -uo pipefail
together=
[ "${1-}" != -j ] || { together=1; shift; }
[ $# -gt 0 ] || { sed -n '2,48s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

generate() { # NAME OF THE JSON, SHAPE, OTHER ARGUMENTS ...
    local name=$1 shape=$2
    shift 2
    $python -m dartfx bench generate --model-shape "$shape" "$@" --json "$out/$name.json" \
        ${together:+--gate "$out/gate"}
}

step() {
    local next=llava-next-7b
    local python="timeout -k 20 $2 ${PYTHON:-python3}"
    case $1 in
        # pytest-benchmark, where it is installed, warns when xdist runs, and warnings are errors here.
        # A test that hangs says where, one that ran has its name printed at once, and when time is
        # up an interrupt makes pytest print why tests failed until then.
        tests) ${together:+nice flock -s "$out/gate"} timeout -s INT -k 20 "$2" ${PYTHON:-python3} -m pytest -v -m gpu -n 8 \
            -p no:benchmark -o faulthandler_timeout=60 tests/ops/test_triton.py tests/ops/test_triton_gpu.py \
            tests/model/test_prefill_gpu.py tests/caches/test_offloaded_gpu.py ;;
        kernel) $python -m dartfx bench kernel --json "$out/kernel.json" ;;
        candidate)
            local tree=$out/candidate
            rm -rf "$tree" && mkdir "$tree" && cp -r dartfx passes tests pyproject.toml "$tree" || return
            (cd "$tree" && git apply "$OLDPWD/docs/kernel_candidate.patch" && PYTHONPATH=. $python -m pytest -q -m gpu \
                -n 8 -p no:benchmark tests/ops/test_triton.py tests/ops/test_triton_gpu.py) &&
                $python -m dartfx bench kernel --json "$out/kernel.json" &&
                (cd "$tree" && PYTHONPATH=. $python -m dartfx bench kernel --json "$out/candidate.json") ;;
        selectors) $python -m dartfx bench kernel --shape tiles --selectors spread cover relevant tiled uniform \
            random --json "$out/selectors.json" ;;
        decode) generate "$1" $next --rows eager plain dart --new-tokens 64 256 --warmup 1 --repeat 3 ;;
        decode-static*)
            local static=${1#decode-static}
            static=${static:-plain dart}
            # shellcheck disable=SC2086 # two words
            generate "$1" $next --rows $(printf '%s_static ' ${static#-}) --new-tokens 64 256 \
                --warmup 2 --repeat 3 ;;
        batch-*) generate "$1" $next --rows plain dart --new-tokens 1 --repeat 7 --batch "${1#*-}" ;;
        turns*)
            local rows=${1#turns}
            rows=${rows:-plain dart}
            # shellcheck disable=SC2086 # two words
            generate "$1" llava-next-8 --rows ${rows#-} --dynamic --new-tokens 32 --warmup 1 --repeat 3 \
                --turns 3 ;;
        images-*) generate "$1" $next --rows plain dart --new-tokens 1 --repeat 7 --images "${1#*-}" ;;
        profile) generate "$1" $next --rows plain dart dart_flat dart_graphs --new-tokens 1 \
            --repeat 9 --warmup 3 --profile ;;
        profile-graphs) generate "$1" $next --rows dart_bucketed dart_reduced --new-tokens 1 --repeat 9 \
            --warmup 3 --profile ;;
        qwen*) generate "$1" "$1" --rows eager hooks plain dart dart_eager_tower --new-tokens 1 \
            --repeat 9 ;;
        *) generate "$1" "$1" --rows eager hooks plain dart --new-tokens 1 --repeat 9 ;;
    esac
}

run() {
    local name=${1%%:*} seconds=${1#*:}
    [ "$seconds" != "$name" ] || seconds=${SECONDS_EACH:-900}
    echo "== $name, $(date +%T)"
    step "$name" "$seconds" 2>"$out/$name.err" | tee "$out/$name.txt" && return
    echo "== $name failed, $(date +%T)"
    tail -n 20 "$out/$name.err"
    return 1
}

[ $# -gt 0 ] || set -- tests kernel llava-1.5-7b llava-next-7b qwen2.5-vl-7b
failed=0
started=()
for name in "$@"; do
    if [ -n "$together" ]; then
        run "$name" &
        started+=($!)
    else
        run "$name" || failed=1
    fi
done
for id in ${started[@]+"${started[@]}"}; do
    wait "$id" || failed=1
done
exit $failed
