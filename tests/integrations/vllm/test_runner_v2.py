"""Model Runner V2, the default on GPUs: the same tokens, and n-gram drafts.

vLLM's own runner runs here on the CPU, with its kernels in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dartfx.integrations.vllm import vllm_api
from dartfx.integrations.vllm.batch import Prompt
from dartfx.integrations.vllm.runners.prompts import write
from tests.support.serving.vllm_oracle import RETAIN, oracle, write_adapter
from tests.support.serving.vllm_serving import COMPILED, serve

pytestmark = [
    pytest.mark.skipif(vllm_api.installed() is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("default"),
]

# On a CPU a subclass of the GPU's, without graphs.
RUNNERS = "vllm.v1.worker.cpu.model_runner", "vllm.v1.worker.gpu.model_runner"
PRUNED = {"additional_config": {"dartfx": {"retain_tokens": RETAIN}}}
VISION = 576
BUDGET = 200
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
NGRAMS["prompt_lookup_max"] = 3


def dropped_of(requests: list[Any]) -> int:
    return sum(VISION * len(request[1]) - RETAIN for request in requests if request[1])


@pytest.mark.parametrize("budget", [4096, BUDGET])
def test_tokens_are_those_of_the_oracle(
    budget: int, checkpoint: Path, requests: list[Any], wanted: list[list[int]], tmp_path: Path
) -> None:
    """All requests in one queue; prompts whole, and in chunks."""
    made = serve(
        tmp_path, requests, runner="V2", model=str(checkpoint), max_model_len=2048,
        max_num_batched_tokens=budget, **PRUNED,
    )  # fmt: skip
    assert made["runner"] in RUNNERS
    assert made["tokens"] == wanted
    before, behind = made["rows"]
    assert before - behind == dropped_of(requests)


def test_drafts_change_no_token(
    checkpoint: Path, requests: list[Any], wanted: list[list[int]], tmp_path: Path
) -> None:
    """Accepted and rejected ones behind the cut, while prompts come in chunks."""
    made = serve(
        tmp_path, requests, runner="V2", model=str(checkpoint), max_model_len=2048,
        max_num_batched_tokens=BUDGET, speculative_config=NGRAMS, disable_log_stats=False, **PRUNED,
    )  # fmt: skip
    assert made["tokens"] == wanted
    assert 0 < made["accepted"] < made["drafts"]


@pytest.mark.slow
def test_drafts_and_preempted_requests(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    """Sixty tokens of each prompt in a step, and too few blocks for those that are let in."""
    long = 2 * [[request[0], request[1], 30] for request in requests if len(request[1]) == 1]
    made = serve(
        tmp_path, long, runner="V2", model=str(checkpoint), max_model_len=640, max_num_seqs=16,
        max_num_batched_tokens=400, long_prefill_token_threshold=60, num_gpu_blocks_override=77,
        scheduler_reserve_full_isl=False, speculative_config=NGRAMS, disable_log_stats=False,
        **PRUNED,
    )  # fmt: skip
    assert made["preemptions"] > 0
    assert 0 < made["accepted"] < made["drafts"]
    assert made["tokens"] == [oracle(request, RETAIN) for request in long]


@pytest.mark.slow
def test_each_request_has_its_lora_adapter_behind_the_cut(
    checkpoint: Path, requests: list[Any], tmp_path: Path
) -> None:
    folders = [[str(write_adapter(tmp_path / f"adapter{i}", i))] for i in range(2)]
    given = [*folders, [], *folders, []]
    batch = [[*each, *given[i]] for i, each in enumerate(requests[: len(given)])]
    made = serve(
        tmp_path, batch, runner="V2", model=str(checkpoint), max_model_len=2048,
        max_num_batched_tokens=BUDGET, enable_lora=True, max_loras=3, **PRUNED,
    )  # fmt: skip
    assert made["tokens"] == [oracle(each, RETAIN) for each in batch]


@pytest.mark.slow
@pytest.mark.parametrize("how", [COMPILED, {"tensor_parallel_size": 2}])
def test_compiled_and_on_two_ranks(
    how: dict[str, Any],
    checkpoint: Path,
    requests: list[Any],
    wanted: list[list[int]],
    tmp_path: Path,
) -> None:
    made = serve(
        tmp_path, requests, runner="V2", in_process=False, model=str(checkpoint),
        max_model_len=2048, max_num_batched_tokens=BUDGET, **PRUNED, **how,
    )  # fmt: skip
    assert made["tokens"] == wanted


class State:
    """As much of a model state as the subclass calls."""

    def __init__(self, vllm_config: Any, *more: Any) -> None:
        self.seen: list[str] = []

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.seen.append(new_req_data.req_id)

    def remove_request(self, req_id: str) -> None:
        self.seen.remove(req_id)

    def prepare_attn(self, input_batch: Any, *more: Any, for_capture: bool = False) -> Any:
        return input_batch.req_ids, more, for_capture


def test_prompts_follow_the_rows_of_the_batch() -> None:
    from vllm import SamplingParams

    from dartfx.integrations.vllm.runners import v2

    state = v2.state_class(State)(SimpleNamespace(instance_id="a test of V2"))
    for number, name in enumerate("abc"):
        prompt = None if name == "b" else Prompt(9 + number, 1, 5)
        params = write(SamplingParams(), prompt)
        state.add_request(number, SimpleNamespace(req_id=name, sampling_params=params))

    def rows(*names: str) -> dict[int, int]:
        batch = SimpleNamespace(req_ids=list(names))
        made = state.prepare_attn(batch, "tables", for_capture=True)
        assert made == (list(names), ("tables",), True)
        return {row: prompt.tokens for row, prompt in state.dartfx_rows.items()}

    assert rows("a", "b", "c") == {0: 9, 2: 11}
    assert rows("c", "a") == {0: 11, 1: 9}
    assert rows("of a dummy run", "b") == {}
    held = state.dartfx_prompts["a"]
    state.remove_request("c")
    assert rows("c", "a") == {1: 9}
    assert state.dartfx_rows[1] is held
    assert state.seen == ["a", "b"]


def test_a_model_with_a_state_of_its_own_is_refused() -> None:
    from dartfx.integrations.vllm.runners import v2

    model = SimpleNamespace(get_model_state_cls=lambda: State)
    assert v2.attach(model, None) == "in Model Runner V2 it has a state of its own (State)"


def test_requests_for_log_probabilities_of_the_prompt_are_refused() -> None:
    from vllm import SamplingParams

    from dartfx.integrations.vllm.runners import v2

    v2.Requests.validate_params(SamplingParams())
    with pytest.raises(ValueError, match="prompt_logprobs cannot be given where dartfx"):
        v2.Requests.validate_params(SamplingParams(prompt_logprobs=1))
