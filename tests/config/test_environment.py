"""Options from DARTFX_OPTIONS, for callers that can only name a backend."""

from __future__ import annotations

import pytest
import torch

import dartfx
from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError
from tests.support.plain.decoders import Decoder, Sizes, prompt

SIZES = Sizes(seq=24, vision=12, layers=3)


def test_it_stands_in_for_options_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARTFX_OPTIONS", '{"retain_tokens": [9, 5], "layer": [1, 2]}')
    wanted = DartConfig(retain_tokens=(9, 5), layer=(1, 2))
    assert DartConfig.of_call(None) == DartConfig.of_call({}) == wanted
    assert DartConfig.of_call(None).fingerprint() == wanted.fingerprint()
    assert DartConfig.of_call({"layer": 3}) == DartConfig(layer=3)
    assert DartConfig.of_call(None, "reduce-overhead").mode == "reduce-overhead"
    monkeypatch.setenv("DARTFX_OPTIONS", "")
    assert DartConfig.of_call(None) == DartConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retain_tokens=64", "is not JSON"),
        ("[64]", "must hold a JSON object"),
        ('{"retain_token": 64}', "did you mean 'retain_tokens'"),
        ('{"retain_tokens": "64"}', "retain_tokens must be an int"),
    ],
)
def test_what_is_wrong_with_it_names_the_variable(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARTFX_OPTIONS", text)
    with pytest.raises(ConfigError, match=f"^the environment's DARTFX_OPTIONS: .*{message}"):
        dartfx.compile(torch.nn.Linear(2, 2))


def test_a_backend_that_is_only_named_prunes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARTFX_OPTIONS", '{"retain_tokens": 5, "lowering": "eager"}')
    with torch.no_grad():
        torch.compile(Decoder(SIZES), backend="dart")(**prompt(SIZES))
    (cut,) = next(r.outcome for r in dartfx.reports() if r.pruned).cuts
    assert cut.retained == 5
