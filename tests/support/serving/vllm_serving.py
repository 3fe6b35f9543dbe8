"""One run of vLLM in a process of its own: ``python -m tests.support.serving.vllm_serving IN OUT``.

IN and OUT are files of JSON.  IN: engine (arguments of vLLM's LLM), requests ([prompt, [picture],
tokens], then the folder of a LoRA adapter where there is one).  OUT: tokens of each request, and
what the engine did meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[3]
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "block_size": 32,
    "gpu_memory_utilization": 0.1,
    "limit_mm_per_prompt": {"image": 2},
    **json.loads(os.environ.get("VLLM_TEST_ENGINE", "{}")),
}
COMPILED = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support/serving/vllm_start'}",
}
# Model Runner V2 needs Triton; where there is no GPU its interpreter will do.
INTERPRETED = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
RUNNERS = {
    "V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {"VLLM_USE_V2_MODEL_RUNNER": "1", **INTERPRETED},
}


def serve(
    folder: Path,
    requests: list[Any],
    *,
    in_process: bool = True,
    runner: str = "V1",
    **engine: Any,
) -> Any:
    """What a run answered; raises AssertionError with the end of its log where it failed."""
    given, made = folder / "in.json", folder / "out.json"
    given.write_text(json.dumps({"engine": ENGINE | engine, "requests": requests}))
    multiprocessing = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not in_process))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.serving.vllm_serving", given, made],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | multiprocessing | RUNNERS[runner],
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return json.loads(made.read_text()) | {"log": log}


def watch(llm: Any) -> dict[str, Any]:
    """Figures of an engine in this process, which grow while it works."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    pool = scheduler.kv_cache_manager.block_pool
    seen: dict[str, Any] = {
        "groups": [type(manager.kv_cache_spec).__name__ for manager in managers],
        "blocks": [{} for _ in managers],
        "peak": 0,
        "preemptions": 0,
        "preempted_in_prompt": 0,
        "chunks": 0,
        "scheduler": scheduler,
    }
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def watched(*arguments: Any, **named: Any) -> Any:
        output = schedule(*arguments, **named)
        running = [scheduler.requests[request] for request in output.num_scheduled_tokens]
        seen["chunks"] += sum(request.is_prefill_chunk for request in running)
        for manager, blocks in zip(managers, seen["blocks"], strict=True):
            for request, held in manager.req_to_blocks.items():
                number = request.split("-")[0]
                blocks[number] = max(blocks.get(number, 0), len(held))
        seen["peak"] = max(seen["peak"], pool.num_gpu_blocks - pool.get_num_free_blocks() - 1)
        return output

    def counted(request: Any, *arguments: Any, **named: Any) -> Any:
        seen["preemptions"] += 1
        computed = request.num_computed_tokens
        seen["preempted_in_prompt"] += 0 < computed < request.num_prompt_tokens
        return preempt(request, *arguments, **named)

    scheduler.schedule, scheduler._preempt_request = watched, counted
    count_drafts(scheduler, seen)
    return seen


def count_drafts(scheduler: Any, seen: dict[str, Any]) -> None:
    """Speculative decoding: tokens that were drafted, and those that stayed."""
    seen["drafts"] = seen["accepted"] = 0
    observe = scheduler.make_spec_decoding_stats

    def verified(stats: Any, **counts: Any) -> Any:
        seen["drafts"] += counts["num_draft_tokens"]
        seen["accepted"] += counts["num_accepted_tokens"]
        return observe(stats, **counts)

    scheduler.make_spec_decoding_stats = verified


def figures(llm: Any, seen: dict[str, Any]) -> dict[str, Any]:
    """The figures as plain data, with those of the model."""
    scheduler = seen.pop("scheduler")
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.model
    pruned = model.__dict__.get("dartfx_decoder")
    rows = (pruned.tokens, pruned.tokens_behind_cut) if pruned is not None else None
    counters = str(getattr(scheduler, "counters", ""))
    return seen | {
        "rows": rows,
        "counters": counters,
        "model": type(model).__name__,
        "runner": type(runner).__module__,
    }


def logits_of(completion: Any) -> list[list[float]]:
    """[tokens, vocabulary] logits, where vLLM returns these as log-probabilities."""
    return [[row[i].logprob for i in sorted(row)] for row in completion.logprobs]


def main() -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given, made = map(Path, sys.argv[1:])
    job = json.loads(given.read_text())
    llm = LLM(**job["engine"])
    in_process = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    seen = watch(llm) if in_process else {}
    prompts: list[Any] = []
    for prompt, pictures, *_ in job["requests"]:
        images = [Image.open(picture).convert("RGB") for picture in pictures]
        prompts.append({"prompt": prompt, "multi_modal_data": {"image": images}})
    raw = job["engine"].get("logprobs_mode") == "raw_logits"
    how = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=-1 if raw else None
        )
        for _, _, tokens, *_ in job["requests"]
    ]
    folders = sorted({folder for request in job["requests"] for folder in request[3:]})
    adapters = {folder: LoRARequest(folder, i + 1, folder) for i, folder in enumerate(folders)}
    chosen = [adapters[r[3]] if r[3:] else None for r in job["requests"]]
    outputs = llm.generate(prompts, how, use_tqdm=False, lora_request=chosen if folders else None)
    answered = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompts": [len(output.prompt_token_ids) for output in outputs],
        "logits": [logits_of(output.outputs[0]) for output in outputs] if raw else None,
        "cached": [output.num_cached_tokens for output in outputs],
    }
    made.write_text(json.dumps(answered | (figures(llm, seen) if in_process else {})))


if __name__ == "__main__":
    main()
