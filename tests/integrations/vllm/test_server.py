"""vLLM's server with a pruned model, queried over HTTP by the package openai."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dartfx.cli.main import main
from dartfx.integrations.vllm import vllm_api
from tests.support.serving.vllm_oracle import HELD_OUT, RETAIN
from tests.support.serving.vllm_serving import ENVIRONMENT, ROOT

pytestmark = [
    pytest.mark.skipif(vllm_api.installed() is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    counters = folder / "counters"
    counters.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--port", str(port), "--max-model-len", "1024", "--dtype", "float32", "--enforce-eager"),
        *("--gpu-memory-utilization", "0.1", "--max-num-batched-tokens", "200"),
        *("--additional-config", f'{{"dartfx": {{"retain_tokens": {RETAIN}}}}}'),
    ]
    environment = os.environ | ENVIRONMENT | {"PROMETHEUS_MULTIPROC_DIR": str(counters)}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            wait_for(f"http://localhost:{port}/health", server, folder / "log")
            yield f"http://localhost:{port}"
        finally:
            server.terminate()
            server.wait(60)


def wait_for(health: str, server: Any, log: Path) -> None:
    while True:
        assert server.poll() is None, log.read_text()[-6000:]
        try:
            urllib.request.urlopen(health, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return


def ask(url: str, picture: bytes, question: str, **more: Any) -> Any:
    from openai import OpenAI

    data = base64.b64encode(picture).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    message: Any = {"role": "user", "content": content}
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        made = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[message],
            max_tokens=8,
            temperature=0,
            **more,
        )
        return list(made) if "stream" in more else made


def test_a_streamed_answer_and_two_clients_at_once(url: str) -> None:
    prompts = [((HELD_OUT / f"{i:03d}.png").read_bytes(), "read row four ?") for i in range(6)]
    alone = [ask(url, *each).choices[0].message.content for each in prompts]
    streamed = ask(url, *prompts[0], stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == alone[0]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(2) as clients:
        both = list(clients.map(lambda each: ask(url, *each).choices[0].message.content, prompts))
    assert both == alone


@pytest.mark.parametrize(
    ("picture", "more"),
    [(b"no picture", {}), (None, {"extra_body": {"prompt_logprobs": 1}})],
)
def test_a_request_that_cannot_be_answered_leaves_the_server_running(
    url: str, picture: bytes | None, more: dict[str, Any]
) -> None:
    from openai import BadRequestError

    good = (HELD_OUT / "000.png").read_bytes()
    with pytest.raises(BadRequestError):
        ask(url, picture or good, "read row four ?", **more)
    assert ask(url, good, "read row four ?").choices[0].message.content


def test_a_client_cannot_say_what_is_dropped(url: str) -> None:
    good = (HELD_OUT / "000.png").read_bytes()
    forged = {"extra_body": {"vllm_xargs": {"dartfx": "first"}}}
    said = [ask(url, good, "read row four ?", **more) for more in ({}, forged)]
    assert said[0].choices[0].message.content == said[1].choices[0].message.content


def test_the_counters_and_the_benchmark(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--requests", "4", "--tokens", "3", "--concurrency", "1", "2"]
    assert main(["bench", "serve", f"pruned={url}/v1", *given, "--text", "read row four ?"]) == 0
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows == [[" pruned ", " 1 "], [" pruned ", " 2 "]]
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        page = answer.read().decode()
    kept, dropped = (
        float(line.split()[1])
        for name in ("kept", "dropped")
        for line in page.splitlines()
        if line.startswith(f"dartfx:vision_tokens_{name}_total")
    )
    assert kept >= 10 * RETAIN
    assert dropped == kept / RETAIN * (576 - RETAIN)
