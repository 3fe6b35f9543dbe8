"""Error messages of commands for unusable arguments."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dartfx.cli.main import main
from dartfx.integrations import hf
from tests.cli.conftest import call


def test_a_prompt_that_holds_the_image_token_is_the_whole_prompt(saved: Path) -> None:
    processor = hf.load_processor(str(saved))
    image = hf.read_image(saved / "image.png")
    whole = hf.prompt_inputs(processor, image, "<image> a b")["input_ids"]
    by_hand = processor(images=image, text="<image> a b", return_tensors="pt")["input_ids"]
    assert torch.equal(whole, by_hand)
    templated = hf.prompt_inputs(processor, image, "a b")["input_ids"]
    assert templated.shape[1] > whole.shape[1]  # USER: and ASSISTANT:


def test_more_tokens_to_retain_than_there_are_is_said(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("explain", saved, "--retain-tokens", "17") == 1
    assert "nothing to drop: 17 tokens to retain of 16" in capsys.readouterr().out


@pytest.fixture(scope="module")
def broken(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that commands cannot use, each under its name."""
    root = tmp_path_factory.mktemp("broken")
    (root / "text.png").write_text("not a picture\n")
    (root / "half.png").write_bytes((saved / "image.png").read_bytes()[:200])
    for name in ("no_processor", "no_weights", "half_weights", "bad_config", "no_words"):
        shutil.copytree(saved, root / name)
    for file in (*root.glob("no_processor/*processor*"), root / "no_weights/model.safetensors"):
        file.unlink()
    weights = root / "half_weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (root / "bad_config/config.json").write_text("{")
    tokenizer = root / "no_words/tokenizer.json"
    message = json.loads(tokenizer.read_text())
    words = {w: n for w, n in message["model"]["vocab"].items() if w != "<unk>"}
    message["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    message["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    tokenizer.write_text(json.dumps(message))
    return root


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("image", "{root}/none.png", "there is no file"),
        ("image", "{root}/text.png", "is not a picture"),
        ("image", "{root}/half.png", "cannot read"),
        ("image", "{root}", "cannot read"),
        ("model", "{root}/none", "there is no folder"),
        ("model", "{root}/text.png", "is not a model folder"),
        ("model", "{root}", "it has no config.json"),
        ("model", "{root}/no_processor", "processor"),
        ("model", "{root}/no_weights", "cannot load the model"),
        ("model", "{root}/half_weights", "cannot load the model"),
        ("model", "{root}/bad_config", "cannot load"),
        ("device", "abacus", "'abacus' cannot be used here"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(
    option: str,
    value: str,
    message: str,
    saved: Path,
    broken: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("explain", saved, f"--{option}", value.format(root=broken)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: argument --{option}: ")
    assert message in last


def test_a_word_that_the_tokenizer_lacks(
    saved: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("explain", saved, "--model", str(broken / "no_words")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: argument --prompt: the processor cannot make inputs of 'What is")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "--out", "{root}/none/kept.png"], "--out: there is no folder"),
        (["show", "--image", "{root}/half.png"], "--image: cannot read"),
        (["explain", "--dump", "{root}/text.png"], "--dump: '{root}/text.png' is a file"),
        (["bench", "generate", "--json", "{root}/none/a.json"], "--json: there is no folder"),
        (["bench", "generate", "--json", "{root}"], "--json: '{root}' is a folder"),
        (
            ["bench", "generate", "--image", "{root}/text.png"],
            "--image: '{root}/text.png' is not a",
        ),
        (["bench", "kernel", "--json", "{root}/none/a.json"], "--json: there is no folder"),
        (["families", "--write", "{root}/none/a.md"], "--write: there is no folder"),
        (["families", "--traces", "{root}/text.png"], "--traces: '{root}/text.png' is a file"),
        (["eval", "--json", "{root}/none/a.json"], "--json: there is no folder"),
        (["eval", "--questions", "{root}/half.png"], "--questions: cannot read"),
    ],
)
def test_outputs_are_checked_before_the_work(
    argv: list[str], message: str, broken: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [part.format(root=broken) for part in argv]
    if argv[0] in ("show", "explain"):
        image = [] if "--image" in argv else ["--image", str(saved / "image.png")]
        argv += ["--model", "nothing/is/loaded", *image]
    if argv[:2] == ["bench", "generate"]:
        argv += ["--model-shape", "tiny"]
    assert main(argv) == 2
    message = message.format(root=broken)
    assert capsys.readouterr().err.splitlines() == [Matching(f"error: argument {message}")]


class Matching(str):
    """Equal to whatever starts with it."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and other.startswith(str(self))


def test_the_console_script_is_the_module() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="dartfx")
    assert script.load() is main
    done = subprocess.run(
        [Path(sys.executable).with_name("dartfx"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: dartfx ")
