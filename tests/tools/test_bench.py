"""``python -m dartfx bench kernel``: its baselines are what they claim, its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dartfx.cli.main import main
from dartfx.ops import select_tokens
from dartfx.tools.bench import kernel
from dartfx.tools.bench.baselines import Layer, published


def test_the_published_loop_keeps_all_text_and_mostly_what_the_node_keeps() -> None:
    """Pivots and quotas are the same; the order of pivots differs, so a few picks may."""
    torch.manual_seed(0)
    hidden, keys = torch.randn(1, 60, 32), torch.randn(1, 2, 60, 16)
    vision = torch.zeros(1, 60, dtype=torch.bool)
    vision[:, 10:50] = True
    kept = published(hidden, keys, 10, 40, 16)
    text = {*range(10), *range(50, 60)}
    assert text <= set(kept.tolist())
    assert kept.shape == (20 + 4 + 16,)
    assert bool((kept.diff() > 0).all())
    ours = set(select_tokens(hidden, keys, vision, 20)[0].tolist())
    assert len(ours & set(kept.tolist())) >= 36


def test_the_layer_is_causal_and_grouped() -> None:
    torch.manual_seed(0)
    layer = Layer(width=32, heads=4, key_heads=2, head=8, inner=48)
    hidden = torch.randn(2, 9, 32)
    out = layer(hidden)
    changed = hidden.clone()
    changed[:, 6:] = 0
    assert out.shape == hidden.shape
    torch.testing.assert_close(layer(changed)[:, :6], out[:, :6])


def test_prints_and_writes_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = kernel.Shape(70, 50, 16, 64, heads=8, key_heads=8, head=8, inner=64, layers=3, first=5)
    monkeypatch.setitem(kernel.SHAPES, "image", small)
    monkeypatch.setattr(kernel, "_COPY_BYTES", 1 << 12)
    file = tmp_path / "figures.json"
    arguments = ["--quick", "--backend", "eager", "--repeat", "2", "--device", "cpu"]
    arguments += ["--selectors", "spread"]
    assert main(["bench", "kernel", "--shape", "image", *arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "| published loop |" in printed
    assert "| selector spread, compiled |" in printed
    assert "image: B=1 S=70 N=50 R=16 D=8 Hkv=1 Dh=8, 3 layers" in printed
    figures = json.loads(file.read_text())["shapes"]["image"]
    assert figures["bytes"] == (70 * 8 + 50 * 8) * 4
    seconds = figures["seconds"]
    assert set(seconds) == {"node", "torch", "published", "selector spread", "layer"}
    assert all(value > 0 for value in seconds.values())
    assert figures["of_prefill"] == pytest.approx(seconds["node"] / (3 * seconds["layer"]))
