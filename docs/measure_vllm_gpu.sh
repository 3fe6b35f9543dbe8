#!/usr/bin/env bash
# dartfx inside vLLM on one GPU: docs/measure_vllm_gpu.sh FOLDER [STEP ...]
#
#   v2      parity: greedy tokens in Model Runner V2 against the oracle in hooks, other families,
#           n-gram drafts, LoRA adapters
#   v1      the same in Model Runner V1, blocks held, prefixes, logits, start and refusals
#   serve   throughput: three servers, plain, plain without CUDA graphs and pruned, asked in turns
#
# No GPU has run this yet; `serve` ran on a CPU, with the small model of examples/serve_vllm.py. It
# needs pip install 'dartfx[vllm]' openai pytest hypothesis. Parity runs in float32 without graphs;
# ENGINE adds arguments of vLLM's LLM as JSON (the default chooses attention in Triton, which takes
# float32). The text of each step goes to FOLDER, servers' logs too.
# PYTHON names the interpreter (python3), MODEL the model to serve (llava-hf/llava-1.5-7b-hf),
# RETAIN the vision tokens kept (64), REQUESTS, TOKENS, TEXT and REPEAT what is asked (200, 64,
# "Describe this picture.", 3), UTILIZATION each server's part of the memory (0.3), WITH more
# arguments of the servers.
# A step that fails does not keep the others from running.
set -uo pipefail
[ $# -gt 0 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=.:tests/support/serving/vllm_start
export VLLM_TEST_ENGINE=${ENGINE-'{"attention_backend": "TRITON_ATTN"}'}
tests=tests/integrations/vllm
servers=()

start() { # NAME, PORT, OTHER ARGUMENTS ...
    local name=$1 port=$2
    shift 2
    # shellcheck disable=SC2086 # WITH is a list of arguments
    $python -m vllm.entrypoints.openai.api_server --model "${MODEL:-llava-hf/llava-1.5-7b-hf}" \
        --port "$port" --gpu-memory-utilization "${UTILIZATION:-0.3}" ${WITH-} "$@" \
        >"$out/server-$name.log" 2>&1 &
    servers+=($!)
    # Servers measure free memory as they start, so one after the other.
    until $python -c "import urllib.request as r; r.urlopen('http://localhost:$port/health')" \
        2>/dev/null; do
        kill -0 "${servers[-1]}" || { tail -n 20 "$out/server-$name.log"; return 1; }
        sleep 2
    done
}

serve() {
    # In a subshell of its own, before tee.
    trap 'kill ${servers[@]+"${servers[@]}"} 2>/dev/null' EXIT
    local graphs='{"cudagraph_mode": "NONE"}'
    start plain 8000 &&
        start no-graphs 8001 --compilation-config "$graphs" &&
        start pruned 8002 --compilation-config "$graphs" \
            --additional-config "{\"dartfx\": {\"retain_tokens\": ${RETAIN:-64}}}" &&
        grep -h "dartfx keeps" "$out/server-pruned.log" &&
        $python -m dartfx bench serve plain=http://localhost:8000/v1 \
            no-graphs=http://localhost:8001/v1 pruned=http://localhost:8002/v1 \
            --concurrency 1 4 16 --requests "${REQUESTS:-200}" --tokens "${TOKENS:-64}" \
            --repeat "${REPEAT:-3}" --text "${TEXT:-Describe this picture.}"
}

step() {
    case $1 in
        # how1 is on two ranks, which need two GPUs.
        v2) $python -m pytest -q -k "not how1 and not V1" $tests/test_runner_v2.py \
            $tests/test_vllm_families.py ;;
        v1) $python -m pytest -q -m "not slow" --ignore $tests/test_runner_v2.py $tests ;;
        serve) serve ;;
        *) echo "no step is called $1" && return 1 ;;
    esac
}

[ $# -gt 0 ] || set -- v2 v1 serve
failed=0
for name in "$@"; do
    echo "== $name, $(date +%T)"
    step "$name" 2>&1 | tee "$out/$name.txt" || { echo "== $name failed" && failed=1; }
done
exit $failed
