"""Throughput and time to first token of running OpenAI servers, in turns, by concurrency.

    python -m dartfx bench serve plain=http://localhost:8000/v1 pruned=http://localhost:8001/v1

Each request brings one new picture of noise, so that no cache of images or prefixes helps, and
takes its answer as a stream.  Needs the package openai.  Give a request's text and the pictures'
size as your traffic has them: short answers about large pictures gain most from pruning.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from dartfx.errors import ConfigError
from dartfx.tools.bench.timing import device_name

__all__ = ["HELP", "Answer", "Load", "Server", "Setting", "configure", "row", "run"]

HELP = "throughput and time to first token of OpenAI servers that run already"

TITLES = "server", "at once", "requests/s", "tokens/s", "first token", "90 %", "each next"


@dataclass(frozen=True)
class Setting:
    """What is asked: text, picture size (width, height), tokens of an answer, requests."""

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
    """A client of the package openai, and the model that its server has."""

    client: Any
    model: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("servers", nargs="+", metavar="NAME=URL", help="a server and its name")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64, help="each time (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (%(default)s)")
    parser.add_argument("--text", default="Describe this picture.", help="(%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=[336, 336], metavar=("W", "H"))
    parser.add_argument("--repeat", type=int, default=1, help="rounds (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; raises ConfigError without the package openai."""
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ConfigError("bench serve needs the package openai: pip install openai") from error
    import torch

    width, height = arguments.size
    setting = Setting(arguments.text, (width, height), arguments.tokens, arguments.requests)
    servers = dict(server.split("=", 1) for server in arguments.servers)
    clients = {
        name: AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        for name, url in servers.items()
    }
    print(f"client on {device_name(torch.device('cpu'))}; {setting}\n")
    print(f"| {' | '.join(TITLES)} |\n|---|{'---:|' * (len(TITLES) - 1)}")
    asyncio.run(_measure(clients, setting, arguments.concurrency, arguments.repeat))
    return 0


async def _measure(
    clients: dict[str, Any], setting: Setting, levels: Iterable[int], repeat: int
) -> None:
    servers = {
        name: Server(client, (await client.models.list()).data[0].id)
        for name, client in clients.items()
    }
    # Pictures that no earlier call of this benchmark had either.
    begin = time.time_ns() // 1000
    seeds = range(begin, begin + 2)
    for server in servers.values():
        await _load(server, setting, 1, seeds)
    for at_once in levels:
        made: dict[str, list[Load]] = {name: [] for name in servers}
        for _ in range(repeat):
            seeds = range(seeds.stop, seeds.stop + setting.requests)
            for name, server in servers.items():
                made[name].append(await _load(server, setting, at_once, seeds))
        for name, loads in made.items():
            print(row(name, at_once, loads), flush=True)
    for client in clients.values():
        await client.close()


async def _load(server: Server, setting: Setting, at_once: int, seeds: range) -> Load:
    """A request for each seed, ``at_once`` of them at a time."""
    pictures = [_picture(setting.size, seed) for seed in seeds]
    free = asyncio.Semaphore(at_once)

    async def one(picture: str) -> Answer:
        async with free:
            return await _ask(server, setting, picture)

    start = time.perf_counter()
    answers = await asyncio.gather(*map(one, pictures))
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
