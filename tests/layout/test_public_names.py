"""The public API by name: none of these may change unnoticed, whatever moves inside dartfx.

A new line here is a new feature; a changed or removed one breaks users and needs a note in
CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import dartfx
from dartfx.cli.main import COMMANDS

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

NAMES = """
    ChangedOutput ConfigError DartConfig DartfxError ExportedPruning KernelUnavailableError PrePass
    PruningWarning RanksError Report SelectionError UnsupportedGraphError Verification as_pre_pass
    budget compile explain exported_pruning kept_positions kept_tokens load_cache media_tokens
    overlay overlay_html prune_exported register_selector reports reset save_cache select_tokens
    uncompile verify vision_tokens
"""

ENTRY_POINTS = {
    "torch_dynamo_backends": {"dart": "dartfx.backend:dart"},
    "lmms_eval.models": {"dartfx": "dartfx.integrations:lmms_eval_manifest"},
    "vllm.general_plugins": {"dartfx": "dartfx.integrations.vllm:register"},
}

OPTIONS = {
    "retain_tokens": None,
    "reduction_ratio": 0.778,
    "layer": 2,
    "pivot_image_tokens": 4,
    "pivot_text_tokens": 4,
    "selector": "dart",
    "kv_layout": "auto",
    "order_mixing": "allow",
    "kernel": "auto",
    "lowering": "inductor",
    "inductor": {},
    "mode": None,
    "on_unsupported": "warn",
    "dump": None,
    "tokens": False,
    "check_ranks": False,
    "quota": "joint",
    "min_tokens": 1,
    "dump_graphs": None,
    "dump_passes": None,
    "outline_layers": True,
    "merge": "none",
    "calibrate": False,
}

ARGUMENTS = {
    "bench generate": "--batch --device --dtype --dynamic --gate --image --images --json --layer "
    "--lowering --model --model-shape --new-tokens --plot --profile --prompt --repeat "
    "--retain-tokens --rows --threads --turns --warmup",
    "bench kernel": "--backend --device --dtype --json --quick --repeat --selectors --shape "
    "--threads",
    "bench ranks": "--repeat",
    "bench serve": "--concurrency --repeat --requests --size --text --tokens servers",
    "diff": "--html dumps",
    "doctor": "--lowering --quick",
    "eval": "--batch --dtype --from --jobs --json --layers --max-new-tokens --model --pictures "
    "--plot --questions --quick --retain --retain-elsewhere --seeds --selectors --write",
    "explain": "--device --dtype --dump --forward --image --layer --model --prompt "
    "--retain-tokens --selector --tokens",
    "families": "--json --list --lowering --new --quick --traces --write names",
    "profile": "--device --dtype --dump --image --layer --model --prompt --retain-tokens "
    "--selector --trace folder",
    "show": "--anyres --device --dtype --grid --image --layer --model --out --overview --prompt "
    "--retain-tokens --selector --tiles",
}


def test_names_of_the_package() -> None:
    assert dartfx.__all__ == NAMES.split()
    for name in dartfx.__all__:
        assert getattr(dartfx, name).__doc__, name


def test_entry_points() -> None:
    assert PROJECT["entry-points"] == ENTRY_POINTS
    for points in ENTRY_POINTS.values():
        for target in points.values():
            module, _, name = target.partition(":")
            assert callable(getattr(import_module(module), name))


def test_options_and_their_defaults() -> None:
    defaults = dataclasses.asdict(dartfx.DartConfig())
    assert defaults == OPTIONS
    assert list(defaults) == list(OPTIONS), "positional arguments of DartConfig"
    synonym = dartfx.DartConfig.from_options({"pivot_media_tokens": 3})
    assert synonym.pivot_image_tokens == 3


def arguments_of(name: str, parser: argparse.ArgumentParser) -> dict[str, str]:
    """The arguments that a command and its sub-commands take, by the command's words."""
    found: dict[str, str] = {}
    taken = []
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for sub_command, sub_parser in action.choices.items():
                found |= arguments_of(f"{name} {sub_command}", sub_parser)
        elif action.dest != "help":
            taken.append(max(action.option_strings, key=len, default=action.dest))
    return found or {name: " ".join(sorted(taken))}


def test_commands() -> None:
    assert sorted(COMMANDS) == sorted({line.split()[0] for line in ARGUMENTS})


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_of_a_command(command: str) -> None:
    parser = argparse.ArgumentParser()
    module: Any = import_module(COMMANDS[command][0])
    module.configure(parser)
    wanted = {k: v for k, v in ARGUMENTS.items() if k.split()[0] == command}
    assert arguments_of(command, parser) == wanted
