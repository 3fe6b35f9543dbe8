"""transformers' OpenAI server in a separate process, with models compiled by dartfx."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dartfx.tools.zoo import hooked
from tests.support.tolerances import RETAIN

ROOT = Path(__file__).parents[2]
QUESTIONS = ["what?", "and what is shown here?"]
TOKENS = 5

missing = [n for n in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(n) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"transformers serve needs {', '.join(missing)}"),
]


@pytest.fixture
def served(saved: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a server with the saved model, which dumps its graphs into ``tmp_path``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = {"retain_tokens": RETAIN, "lowering": "eager", "dump": str(tmp_path)}
    environment = {
        "DARTFX_OPTIONS": json.dumps(options | {"on_unsupported": "error"}),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, ROOT / "examples/serve_transformers.py", "serve", saved]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://localhost:{port}"
        until_it_answers(f"{address}/health", server, log)
        yield f"{address}/v1"
    finally:
        server.terminate()
        server.wait()


def until_it_answers(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)


def chat(question: str, image: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def expected(saved: Path) -> list[str]:
    """The answers of the model pruned by hooks."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(saved)
    model = AutoModelForImageTextToText.from_pretrained(saved).eval()
    answers = []
    for question in QUESTIONS:
        inputs = processor.apply_chat_template(
            chat(question, {"type": "image", "image": str(saved / "image.png")}),
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        made = hooked.pruned_generate(
            model, dict(inputs), retain=RETAIN, max_new_tokens=TOKENS, kv_layout="uniform"
        )
        answers.append(processor.decode(made.token_ids[0], skip_special_tokens=True))
    return answers


def test_two_clients_at_once_with_streams(served: str, saved: Path, tmp_path: Path) -> None:
    from openai import OpenAI

    data = base64.b64encode((saved / "image.png").read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    def ask(question: str) -> str:
        stream = OpenAI(base_url=served, api_key="none").chat.completions.create(
            model=str(saved), messages=chat(question, image), max_tokens=TOKENS, temperature=0,
            stream=True,
        )  # fmt: skip
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    right = expected(saved)
    with ThreadPoolExecutor(2) as clients:
        for _ in range(2):  # while it compiles, and after
            assert list(clients.map(ask, QUESTIONS)) == right
    facts = [json.loads(path.read_text()) for path in tmp_path.glob("graph_*/report.json")]
    assert "pruned" in {fact["kind"] for fact in facts}
