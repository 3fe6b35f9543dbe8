"""Fixtures of the tests inside vLLM: checkpoint, requests, the oracle's tokens."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving.vllm_oracle import EXAMPLES, RETAIN, make_requests, oracle


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained model as vLLM reads it, with room for two pictures."""
    write = runpy.run_path(str(EXAMPLES / "serve_vllm.py"))["write_checkpoint"]
    folder: Path = write(tmp_path_factory.mktemp("checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def requests() -> list[Any]:
    """[prompt, pictures, tokens], among them some without a picture and one with two."""
    return make_requests()


@pytest.fixture(scope="session")
def wanted(requests: list[Any]) -> list[list[int]]:
    """The pruned oracle's tokens for each request."""
    return [oracle(request, RETAIN) for request in requests]
