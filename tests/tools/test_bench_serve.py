"""``python -m dartfx bench serve``: server errors, and its figures."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dartfx.cli.main import main
from dartfx.tools.bench import serve

MODELS = {
    "/v1/models": json.dumps({"data": [{"id": "small"}]}),
    "/empty/models": json.dumps({"data": []}),
    "/text/models": "<html>",
}


class Answers(BaseHTTPRequestHandler):
    """/v1 has a model and fails on requests; /empty has none; /text is no API; others are 404."""

    def do_GET(self) -> None:
        self.answer(200 if self.path in MODELS else 404, MODELS.get(self.path, ""))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(400, json.dumps({"error": {"message": "at most 0 images"}}))

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("localhost", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["bench", "serve", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["http://localhost:1/v1"], "'http://localhost:1/v1' gives the server no name; write "),
        (["http://localhost:1/v1?a=b"], "'http://localhost:1/v1?a=b' gives the server no name"),
        (["=http://localhost:1/v1"], "'=http://localhost:1/v1' gives the server no name"),
        (["plain=localhost:1"], "'localhost:1' of 'plain' is no URL with http:// or https://"),
        (["a=http://x/v1", "a=http://y/v1"], "two servers are called 'a': http://x/v1 and http"),
    ],
)
def test_a_server_that_is_given_wrongly_is_named(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(capsys, *given).startswith(f"error: argument NAME=URL: {message}")


@pytest.mark.parametrize("option", ["requests", "tokens", "repeat", "concurrency"])
def test_counts_are_at_least_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "plain=http://localhost:1/v1", f"--{option}", "0")
    assert error == f"error: argument --{option}: must be at least 1"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "/models answered HTTP 404; OpenAI servers have their URL end in /v1"),
        ("/text", "/text/models did not answer with a list of models, as OpenAI servers do"),
        ("/empty", "/empty/models did not answer with a list of models, as OpenAI servers do"),
    ],
)
def test_a_server_that_is_no_openai_server_is_named(
    path: str, why: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, f"good={url}/v1", f"other={url}{path}")
    assert error == f"error: server 'other': {url}{why}"


@pytest.mark.parametrize("port", ["1", "none"])
def test_a_server_that_cannot_be_reached_is_named(
    port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, f"plain=http://localhost:{port}/v1")
    assert error.startswith(f"error: server 'plain': http://localhost:{port}/v1/models ")


def test_the_model_of_a_server(url: str) -> None:
    assert serve.model_of("plain", f"{url}/v1/") == "small"


def test_a_server_that_fails_on_a_request_is_named(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    assert main(["bench", "serve", f"plain={url}/v1", "--size", "8", "8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: server 'plain' failed on a request: Error code: 400")
    assert "at most 0 images" in error


def test_rates_and_times_of_a_served_load() -> None:
    """Two rounds of two requests: rates are of the rounds, times of the requests."""
    loads = [
        serve.Load(2.0, (serve.Answer(0.1, 0.5, 5), serve.Answer(0.3, 0.7, 5))),
        serve.Load(4.0, (serve.Answer(0.2, 0.6, 5), serve.Answer(0.2, 0.2, 1))),
    ]
    cells = serve.row("pruned", 4, loads).strip("| ").split(" | ")
    assert cells == ["pruned", "4", "0.75", "3.2", "200 ms", "270 ms", "100.0 ms"]
