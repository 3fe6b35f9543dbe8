"""A pruned model inside vLLM's engine: greedy tokens of the oracle, and KV blocks saved.

`make test-vllm` runs these in a separate environment with vLLM's CPU wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dartfx.integrations.vllm import vllm_api
from tests.support.serving.vllm_oracle import RETAIN, oracle, oracle_logits, write_adapter
from tests.support.serving.vllm_serving import COMPILED, ENGINE, serve
from tests.support.tolerances import VLLM

pytestmark = [
    pytest.mark.skipif(vllm_api.installed() is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("default"),
]

PRUNED = {"additional_config": {"dartfx": {"retain_tokens": RETAIN}}}
LOGITS = {"logprobs_mode": "raw_logits", "max_logprobs": -1}
VISION = 576
PIVOTS = 16
BUDGET = 200


@pytest.fixture(scope="module")
def run(checkpoint: Path, requests: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All requests in one queue: prefill and decode meet in one step."""
    folder = tmp_path_factory.mktemp("run")
    return serve(folder, requests, model=str(checkpoint), max_model_len=2048, **PRUNED, **LOGITS)


def test_tokens_are_those_of_the_oracle(run: Any, wanted: list[list[int]]) -> None:
    assert run["tokens"] == wanted


def test_the_oracle_tells_pruned_from_unpruned(
    requests: list[Any], wanted: list[list[int]]
) -> None:
    pictures = [i for i, request in enumerate(requests) if request[1]]
    differ = sum(oracle(requests[i], None) != wanted[i] for i in pictures)
    assert differ > len(pictures) // 2


def test_rows_leave_at_the_cut(run: Any, requests: list[Any]) -> None:
    before, behind = run["rows"]
    dropped = sum(VISION * len(request[1]) - RETAIN for request in requests if request[1])
    assert before - behind == dropped


def test_layers_behind_the_cut_hold_blocks_for_the_kept_tokens(
    run: Any, requests: list[Any]
) -> None:
    behind = [i for i, name in enumerate(run["groups"]) if name == "BehindCutSpec"]
    assert len(behind) == 3  # of two layers, as layers 0 and 1
    for number, (request, prompt) in enumerate(zip(requests, run["prompts"], strict=True)):
        kept = prompt - VISION * len(request[1]) + RETAIN * bool(request[1])
        # The last token is sampled and never stored; scheduling runs one token ahead.
        stored = [kept + request[2] - 1, kept + request[2]]
        blocks = {-(-tokens // ENGINE["block_size"]) for tokens in stored}
        assert {run["blocks"][group][str(number)] for group in behind} <= blocks


def test_what_is_pruned_stands_in_the_log(run: Any, requests: list[Any]) -> None:
    assert "dartfx keeps at most 64 vision tokens of each prompt" in run["log"]
    assert "from decoder layer 2 of 8 on" in run["log"]
    pictures = sum(bool(request[1]) for request in requests)
    assert run["counters"].startswith(f"dartfx: {pictures} requests with vision tokens, ")
    assert f" {pictures * RETAIN} of {(pictures + 1) * VISION} vision tokens" in run["counters"]


def test_preempted_requests_keep_the_same_tokens(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    """More text pivots than a prompt has text: generated tokens must not become some."""
    long = [[request[0], request[1], 40] for request in requests if len(request[1]) == 1]
    few = {"max_model_len": 700, "num_gpu_blocks_override": 90, "max_num_batched_tokens": BUDGET}
    given = {"retain_tokens": RETAIN, "pivot_text_tokens": PIVOTS}
    made = serve(tmp_path, long, model=str(checkpoint), additional_config={"dartfx": given}, **few)
    assert made["preemptions"] > 0
    assert made["tokens"] == [oracle(request, RETAIN, PIVOTS) for request in long]


def test_logits_in_float32_are_those_of_the_oracle(run: Any, requests: list[Any]) -> None:
    for request, logits in zip(requests, run["logits"], strict=True):
        torch.testing.assert_close(
            torch.tensor(logits), oracle_logits(request, RETAIN), **VLLM[torch.float32]
        )


def test_logits_in_bfloat16_are_near_those_of_the_oracle(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    """Tokens kept by position, so that no rounding chooses others; logits have a deviation of 3.

    The unpruned model differs by as much, 0.27 at most.
    """
    given = {"retain_tokens": RETAIN, "selector": "uniform"}
    made = serve(
        tmp_path, requests, model=str(checkpoint), max_model_len=2048, dtype="bfloat16",
        additional_config={"dartfx": given}, **LOGITS,
    )  # fmt: skip
    for request, logits, tokens in zip(requests, made["logits"], made["tokens"], strict=True):
        exact = oracle_logits(request, RETAIN, evenly=True)
        same = [*(torch.tensor(tokens) == exact.argmax(-1)).tolist(), False]
        common = min(same.index(False) + 1, len(tokens))  # from the next on prompts differ
        torch.testing.assert_close(
            torch.tensor(logits[:common]), exact[:common], **VLLM[torch.bfloat16]
        )


def test_prompts_in_chunks_give_the_same_tokens(
    checkpoint: Path, requests: list[Any], wanted: list[list[int]], tmp_path: Path
) -> None:
    """A third of a prompt in a step, so that pictures are cut, and rows wait for several steps."""
    made = serve(
        tmp_path, requests, model=str(checkpoint), max_model_len=2048,
        max_num_batched_tokens=BUDGET, **PRUNED,
    )  # fmt: skip
    assert made["chunks"] >= sum(VISION * len(request[1]) // BUDGET for request in requests)
    assert made["tokens"] == wanted
    before, behind = made["rows"]
    dropped = sum(VISION * len(request[1]) - RETAIN for request in requests if request[1])
    assert before - behind == dropped


def test_more_kept_rows_than_the_layers_take_at_a_time(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    some = [request for request in requests if request[1]][:3]
    many = {"additional_config": {"dartfx": {"retain_tokens": 2 * BUDGET}}}
    made = serve(
        tmp_path, some, model=str(checkpoint), max_model_len=2048, max_num_batched_tokens=BUDGET,
        **many,
    )  # fmt: skip
    assert made["tokens"] == [oracle(request, 2 * BUDGET) for request in some]


@pytest.mark.parametrize("budget", [4096, BUDGET])
def test_text_before_the_first_picture_is_computed_once(
    budget: int, checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    words = next(request[0] for request in requests if not request[1])
    prefix = " ".join([words] * 12)
    pictures = [request for request in requests if len(request[1]) == 1][:3]
    batch = [[f"{prefix} {text}", images, 6] for text, images, _ in pictures]
    batch += [batch[0], [prefix, [], 5], [f"{prefix} {words} {words}", [], 6]]
    made = serve(
        tmp_path, batch, model=str(checkpoint), max_model_len=2048, max_num_seqs=1,
        max_num_batched_tokens=budget, **PRUNED,
    )  # fmt: skip
    assert made["tokens"] == [oracle(each, RETAIN) for each in batch]
    shared = made["prompts"][4] // ENGINE["block_size"] * ENGINE["block_size"]
    assert shared >= ENGINE["block_size"]
    # Of layers with windows vLLM keeps a prefix once two requests had it.  The fourth request is
    # the first once more: its picture and what follows are not shared.
    assert made["cached"] == [0, 0, shared, shared, shared, shared]


def test_each_request_has_its_lora_adapter_behind_the_cut(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    """Two adapters and none in a step, prompts in chunks: kept rows take their request's along.

    vLLM's operators for the CPU give rows without an adapter the last slot, so that stays empty.
    """
    folders = [[str(write_adapter(tmp_path / f"adapter{i}", i))] for i in range(2)]
    given = [*folders, [], *folders, []]
    batch = [[*each, *given[i]] for i, each in enumerate(requests[: len(given)])]
    made = serve(
        tmp_path, batch, model=str(checkpoint), max_model_len=2048, max_num_batched_tokens=BUDGET,
        enable_lora=True, max_loras=3, **PRUNED,
    )  # fmt: skip
    wanted = [oracle(each, RETAIN) for each in batch]
    assert made["tokens"] == wanted
    assert wanted != [oracle(each[:3], RETAIN) for each in batch]


def test_without_the_key_nothing_changes(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    some = requests[:3]
    made = serve(tmp_path, some, model=str(checkpoint))
    assert made["tokens"] == [oracle(request, None) for request in some]
    assert made["rows"] is None
    assert not {"BeforeCutSpec", "BehindCutSpec"} & set(made["groups"])
    assert "dartfx" not in made["log"].replace(str(Path(__file__).parents[3]), "")


def test_a_budget_larger_than_the_picture_drops_nothing(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    some = requests[:2]
    large = {"additional_config": {"dartfx": {"retain_tokens": VISION + 1}}}
    made = serve(tmp_path, some, model=str(checkpoint), **large)
    assert made["tokens"] == [oracle(request, None) for request in some]
    assert made["rows"][0] == made["rows"][1]


@pytest.mark.slow
def test_many_prompts_begun_at_once_and_pushed_out_in_their_middle(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    """Sixty tokens of each prompt in a step, and too few blocks for those that are let in."""
    batch = [[prompt, pictures, 30] for prompt, pictures, _ in requests if len(pictures) < 2]
    made = serve(
        tmp_path, 3 * batch, model=str(checkpoint), max_model_len=640, max_num_batched_tokens=400,
        long_prefill_token_threshold=60, max_num_seqs=24, scheduler_reserve_full_isl=False,
        num_gpu_blocks_override=77, **PRUNED,
    )  # fmt: skip
    assert made["preempted_in_prompt"] > len(batch)
    assert made["tokens"] == 3 * [oracle(each, RETAIN) for each in batch]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [4096, BUDGET])
@pytest.mark.parametrize("how", [COMPILED, {"tensor_parallel_size": 2}])
def test_compiled_and_on_two_ranks(
    how: dict[str, Any],
    budget: int,
    checkpoint: Path,
    requests: list[Any],
    wanted: list[list[int]],
    tmp_path: Path,
) -> None:
    made = serve(
        tmp_path, requests, in_process=False, model=str(checkpoint), max_model_len=2048,
        max_num_batched_tokens=budget, **PRUNED, **how,
    )  # fmt: skip
    assert made["tokens"] == wanted
