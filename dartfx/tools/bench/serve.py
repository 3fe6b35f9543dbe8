"""Throughput and time to first token of running OpenAI servers, in turns, by concurrency.

    python -m dartfx bench serve plain=http://localhost:8000/v1 pruned=http://localhost:8001/v1

Each request has a new image of noise, so that no cache of images or prefixes helps, and
streams its answer.  Needs the package openai.  Give a request's text and the pictures'
size as your traffic has them: short answers about large pictures gain most from pruning.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from dartfx.errors import ConfigError, InputError
from dartfx.tools.bench.timing import device_name

__all__ = [
    "HELP",
    "Answer",
    "Load",
    "Server",
    "Setting",
    "configure",
    "model_of",
    "parse_servers",
    "row",
    "run",
]

HELP = "throughput and time to first token of OpenAI servers that run already"

_SERVER = "NAME=URL"
_EXAMPLE = "plain=http://localhost:8000/v1"
_SECONDS_TO_ANSWER = 30.0

TITLES = "server", "at once", "requests/s", "tokens/s", "first token", "90 %", "each next"


@dataclass(frozen=True)
class Setting:
    """One load: the text, the picture's size (width, height), tokens of an answer, requests."""

    text: str
    size: tuple[int, int]
    tokens: int
    requests: int


@dataclass(frozen=True)
class Answer:
    """Seconds from the request to the first and to the last token, and the number of tokens."""

    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class Load:
    """Seconds that all of some requests took together, and their answers."""

    seconds: float
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Server:
    """A server's name, a client of the package openai, and the model that it has."""

    name: str
    client: Any
    model: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("servers", nargs="+", metavar=_SERVER, help="a server and its name")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64, help="each time (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (%(default)s)")
    parser.add_argument("--text", default="Describe this picture.", help="(%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=[336, 336], metavar=("W", "H"))
    parser.add_argument("--repeat", type=int, default=1, help="rounds (%(default)s)")


def parse_servers(given: Sequence[str]) -> dict[str, str]:
    """URLs by name.  Raises InputError for one without a name or URL, and for a name twice."""
    servers: dict[str, str] = {}
    for each in given:
        name, sign, url = each.partition("=")
        if not sign or not name or "/" in name:
            raise InputError(_SERVER, f"{each!r} gives the server no name; write {_EXAMPLE}")
        if not url.startswith(("http://", "https://")):
            why = f"{url!r} of {name!r} is no URL with http:// or https://; write {_EXAMPLE}"
            raise InputError(_SERVER, why)
        if name in servers:
            why = f"two servers are called {name!r}: {servers[name]} and {url}; rename one"
            raise InputError(_SERVER, why)
        servers[name] = url
    return servers


def model_of(name: str, url: str) -> str:
    """The model that a server has.  Raises ConfigError that names the server and what was wrong."""
    address = f"{url.rstrip('/')}/models"
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS_TO_ANSWER) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except urllib.error.HTTPError as error:
        why = f"answered HTTP {error.code}; OpenAI servers have their URL end in /v1"
    except (ValueError, LookupError, TypeError, http.client.HTTPException):
        why = "did not answer with a list of models, as OpenAI servers do"
    except OSError as error:  # what urllib raises, and a connection that breaks off
        why = f"cannot be reached ({getattr(error, 'reason', error)}); is it running?"
    raise ConfigError(f"server {name!r}: {address} {why}")


def run(arguments: argparse.Namespace) -> int:
    """Print the table.

    Raises InputError and ConfigError for arguments that cannot be used, a server that does not
    answer as it should, and without the package openai.
    """
    named = parse_servers(arguments.servers)
    for option in ("requests", "tokens", "repeat", "concurrency", "size"):
        value = getattr(arguments, option)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise InputError(option, "must be at least 1")
    models = {name: model_of(name, url) for name, url in named.items()}
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ConfigError("bench serve needs the package openai: pip install openai") from error
    import torch

    width, height = arguments.size
    setting = Setting(arguments.text, (width, height), arguments.tokens, arguments.requests)
    servers = [
        Server(name, AsyncOpenAI(base_url=url, api_key="none", max_retries=0), models[name])
        for name, url in named.items()
    ]
    print(f"client on {device_name(torch.device('cpu'))}; {setting}\n")
    print(f"| {' | '.join(TITLES)} |\n|---|{'---:|' * (len(TITLES) - 1)}")
    asyncio.run(_measure(servers, setting, arguments.concurrency, arguments.repeat))
    return 0


async def _measure(
    servers: Sequence[Server], setting: Setting, levels: Iterable[int], repeat: int
) -> None:
    # Pictures that no earlier call of this benchmark had either.
    begin = time.time_ns() // 1000
    seeds = range(begin, begin + 2)
    for server in servers:
        await _load(server, setting, 1, seeds)
    for at_once in levels:
        made: dict[str, list[Load]] = {server.name: [] for server in servers}
        for _ in range(repeat):
            seeds = range(seeds.stop, seeds.stop + setting.requests)
            for server in servers:
                made[server.name].append(await _load(server, setting, at_once, seeds))
        for name, loads in made.items():
            print(row(name, at_once, loads), flush=True)
    for server in servers:
        await server.client.close()


async def _load(server: Server, setting: Setting, at_once: int, seeds: range) -> Load:
    """A request for each seed, ``at_once`` at a time; raises ConfigError where one fails."""
    from openai import OpenAIError

    pictures = [_picture(setting.size, seed) for seed in seeds]
    free = asyncio.Semaphore(at_once)

    async def one(picture: str) -> Answer:
        async with free:
            return await _ask(server, setting, picture)

    start = time.perf_counter()
    try:
        answers = await asyncio.gather(*map(one, pictures))
    except OpenAIError as error:
        raise ConfigError(f"server {server.name!r} failed on a request: {error}") from error
    return Load(time.perf_counter() - start, tuple(answers))


async def _ask(server: Server, setting: Setting, picture: str) -> Answer:
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": setting.text},
    ]
    start = time.perf_counter()
    stream = await server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": content}],
        max_tokens=setting.tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    first, tokens = 0.0, 0
    async for chunk in stream:
        # The first chunk names the role and has no text.
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    last = time.perf_counter() - start
    return Answer(first or last, last, tokens)


def _picture(size: tuple[int, int], seed: int) -> str:
    import numpy as np
    from PIL import Image

    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(noise.astype("uint8")).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def row(name: str, at_once: int, loads: list[Load]) -> str:
    """One line of the table: medians over rounds for rates, over requests for times."""
    requests = median(len(load.answers) / load.seconds for load in loads)
    tokens = median(sum(a.tokens for a in load.answers) / load.seconds for load in loads)
    every = [answer for load in loads for answer in load.answers]
    first = [answer.first for answer in every]
    late = quantiles(first, n=10, method="inclusive")[-1] if len(first) > 1 else first[0]
    each = median((a.last - a.first) / max(a.tokens - 1, 1) for a in every)
    times = f"{median(first) * 1e3:.0f} ms | {late * 1e3:.0f} ms | {each * 1e3:.1f} ms"
    return f"| {name} | {at_once} | {requests:.2f} | {tokens:.1f} | {times} |"
