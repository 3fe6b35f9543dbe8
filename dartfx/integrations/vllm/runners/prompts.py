"""The prompt in each row of the running batch.

Attention metadata does not identify its rows' requests.  The scheduler knows a request's images and
writes what is dropped into its sampling parameters, which vLLM sends to the workers.  How they map
to batch rows there differs between vLLM's model runners: v1.py and v2.py each keep
:func:`prompts_of` in step with the batch before a forward pass, and the cut is independent of the
runner.
"""

from __future__ import annotations

import copy
from typing import Any

from dartfx.integrations.vllm import options
from dartfx.integrations.vllm.batch import Prompt

__all__ = ["check_request", "prompts_of", "read", "write"]

_ROWS: dict[str, dict[int, Prompt]] = {}


def prompts_of(vllm_config: Any) -> dict[int, Prompt]:
    """The prompts that drop tokens, by batch row, of the engine with this config."""
    return _ROWS.setdefault(vllm_config.instance_id, {})


def write(params: Any, prompt: Prompt | None) -> Any:
    """Sampling parameters that carry ``prompt`` to the workers, replacing any client's value."""
    given = {k: v for k, v in (params.extra_args or {}).items() if k != options.KEY}
    if prompt is None and len(given) == len(params.extra_args or {}):
        return params
    params = copy.copy(params)  # several requests of one process may share them
    if prompt is not None:
        given[options.KEY] = {
            "tokens": prompt.tokens,
            "first": prompt.first,
            "dropped": prompt.dropped,
        }
    params.extra_args = given
    return params


def read(params: Any) -> Prompt | None:
    """The prompt that :func:`write` put there: the same object for the request's lifetime.

    A request that leaves the batch for an unscheduled step and returns finds its held rows; they
    are freed with its parameters when it ends.
    """
    given = (getattr(params, "extra_args", None) or {}).get(options.KEY)
    if given is None:
        return None
    if "prompt" not in given:
        given["prompt"] = Prompt(given["tokens"], given["first"], given["dropped"])
    prompt: Prompt = given["prompt"]
    return prompt


def check_request(params: Any) -> None:
    """Refuse a request for log-probabilities of prompt tokens, some of which are dropped.

    Raises ValueError, which vLLM returns as the request's error.
    """
    if getattr(params, "prompt_logprobs", None) is not None:
        raise ValueError(
            "prompt_logprobs cannot be given where dartfx drops vision tokens of the prompt; "
            "leave it out, or serve without dartfx in --additional-config"
        )
