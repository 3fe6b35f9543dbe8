"""dartfx's options in vLLM: configs, refusals at start, decoders of its models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from dartfx.errors import ConfigError
from dartfx.integrations.vllm import options, vllm_api
from tests.support.serving.vllm_serving import ENGINE, ENVIRONMENT, RUNNERS, serve

pytestmark = [
    pytest.mark.skipif(vllm_api.installed() is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (ENVIRONMENT | RUNNERS["V1"]).items():
        monkeypatch.setenv(name, value)


def config_of(checkpoint: Path, given: Any, **engine: Any) -> Any:
    """The config that vLLM makes of its arguments, with the installed plugin."""
    from vllm.engine.arg_utils import EngineArgs

    extra = {} if given is None else {"additional_config": {"dartfx": given}}
    arguments = ENGINE | {"model": str(checkpoint)} | extra | engine
    return EngineArgs(**arguments).create_engine_config()


def test_every_name_of_vllm_is_there() -> None:
    assert vllm_api.missing() == []


def test_the_options_decide_what_compiled_code_is_reused(checkpoint: Path) -> None:
    hashes = {
        config_of(checkpoint, given).compute_hash()
        for given in (None, {"retain_tokens": 64}, {"retain_tokens": 64, "layer": 3})
    }
    assert len(hashes) == 3


def test_the_config_gets_what_pruning_needs(checkpoint: Path) -> None:
    config = config_of(checkpoint, {"retain_tokens": 64})
    assert config.scheduler_config.scheduler_cls == options.SCHEDULER
    assert config.model_config.logits_processors == [options.LOGITS_PROCESSORS["V1"]]
    plain = config_of(checkpoint, None)
    assert plain.scheduler_config.scheduler_cls is None
    assert not plain.model_config.logits_processors


@pytest.mark.parametrize(
    ("given", "engine", "message"),
    [
        ({"retain_token": 64}, {}, "did you mean 'retain_tokens'"),
        ({}, {"disable_hybrid_kv_cache_manager": True}, "--no-enable-prefix-caching"),
        ({}, {"scheduler_cls": "of.the_user"}, "leave out --scheduler-cls"),
        ({}, {"enable_prompt_embeds": True}, "leave out --enable-prompt-embeds"),
    ],
)
def test_a_start_that_cannot_prune_ends_with_the_reason(
    checkpoint: Path, given: Any, engine: Any, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        config_of(checkpoint, given, **engine)


def test_a_window_behind_the_cut_ends_the_start(checkpoint: Path, tmp_path: Path) -> None:
    early = {"additional_config": {"dartfx": {"layer": 1}}}
    with pytest.raises(AssertionError, match="decoder layer 1 attends within a window of 8"):
        serve(tmp_path, [], model=str(checkpoint), **early)


def model_with(decoder_class: Any) -> Any:
    """A model whose decoder is of a class of vLLM, with nothing in it."""
    decoder = decoder_class.__new__(decoder_class)
    nn.Module.__init__(decoder)
    decoder.layers, decoder.norm = nn.ModuleList(), nn.Identity()
    return SimpleNamespace(get_language_model=lambda: SimpleNamespace(model=decoder))


def test_decoders_of_the_common_form_are_found() -> None:
    from vllm.model_executor.models.internlm2 import InternLM2Model
    from vllm.model_executor.models.llama import LlamaModel
    from vllm.model_executor.models.qwen2 import Qwen2Model
    from vllm.model_executor.models.qwen3 import Qwen3Model

    from dartfx.integrations.vllm import models

    for decoder_class in (InternLM2Model, LlamaModel, Qwen2Model, Qwen3Model):
        assert isinstance(models.find_decoder(model_with(decoder_class)), decoder_class)


def test_visual_features_for_later_layers_are_refused() -> None:
    from vllm.model_executor.models.qwen3_vl import Qwen3LLMModel

    from dartfx.integrations.vllm import models

    with pytest.raises(ConfigError, match="Qwen3LLMModel also takes deepstack_input_embeds"):
        models.find_decoder(model_with(Qwen3LLMModel))


def test_prompts_follow_the_rows_of_the_batch() -> None:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

    from dartfx.integrations.vllm.batch import Prompt
    from dartfx.integrations.vllm.runners import prompts, v1

    forged = SamplingParams(extra_args={"dartfx": {"tokens": 9, "first": 0, "dropped": 5}})
    own = SamplingParams(extra_args={"other": 1})
    drops = [prompts.write(own, Prompt(9 + i, 1, 5)) for i in range(2)]
    assert own.extra_args == {"other": 1}
    assert drops[0].extra_args["other"] == 1
    processor = v1.Requests(SimpleNamespace(instance_id="a test"), None, False)

    def update(**changes: Any) -> dict[int, int]:
        given: Any = {"batch_size": 3, "removed": [], "added": [], "moved": []} | changes
        processor.update_state(BatchUpdate(**given))
        return {row: prompt.tokens for row, prompt in processor.rows.items()}

    added = [(0, drops[0], [], []), (1, prompts.write(forged, None), [], []), (2, drops[1], [], [])]
    assert update(added=added) == {0: 9, 2: 10}
    held = processor.rows[0]
    assert update(moved=[(0, 2, MoveDirectionality.SWAP)]) == {0: 10, 2: 9}
    assert update(moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)]) == {0: 10, 1: 9}
    assert update(removed=[0], added=[(1, own, [], [])]) == {}
    update(added=[(0, drops[0], [], [])])
    assert processor.rows[0] is held, "it was not scheduled in a step; what is held is still there"
