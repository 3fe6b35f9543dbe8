"""Weights that are not plain tensors: pruned like the hook-pruned model with equal weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.plain.decoders import Decoder, Layer, changed, prompt
from tests.support.plain.refusals import SMALL, assert_pruned
from tests.support.tolerances import RETAIN

OPTIONS: dict[str, Any] = {"retain_tokens": RETAIN, "on_unsupported": "error"}


class Halved(Tensor):
    """A weight held as codes and a scale, of which it makes a linear layer by itself."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Halved:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight: Tensor) -> Halved:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Halved:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is nn.functional.linear:
            x, weight, *bias = args
            product = (x @ weight.codes.to(x.dtype).t()) * weight.scale.squeeze(1)
            return product + bias[0] if bias and bias[0] is not None else product
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(str(function))


def of_our_own(model: nn.Module) -> None:
    for module in model.model.language_model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Halved.of(module.weight.detach()), requires_grad=False)


def by_torchao(name: str, **settings: Any) -> Any:
    def quantise(model: nn.Module) -> None:
        quantization = pytest.importorskip("torchao.quantization")

        def in_decoder(module: nn.Module, path: str) -> bool:
            return isinstance(module, nn.Linear) and "language_model" in path

        quantization.quantize_(model, getattr(quantization, name)(**settings), in_decoder)

    return quantise


def by_torchao_in_four_bits(name: str, weight: str) -> Any:
    def quantise(model: nn.Module) -> None:
        granularity = pytest.importorskip("torchao.quantization.granularity").PerGroup(32)
        by_torchao(name, weight_dtype=torch.int4, **{weight: granularity})(model)

    return quantise


def by_quanto(name: str) -> Any:
    def quantise(model: nn.Module) -> None:
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(model.model.language_model, weights=getattr(quanto, name))
        quanto.freeze(model.model.language_model)

    return quantise


def each_linear(model: nn.Module, replace: Callable[[nn.Linear], nn.Module]) -> None:
    for parent in list(model.model.language_model.layers.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, replace(module))


def by_hqq(model: nn.Module) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    four = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
    each_linear(
        model,
        lambda linear: hqq.HQQLinear(linear, four, compute_dtype=torch.float32, device="cpu"),
    )


def by_bitsandbytes(model: nn.Module) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def replace(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features
        eight = bitsandbytes.nn.Linear8bitLt(
            *sizes, bias=linear.bias is not None, has_fp16_weights=False
        )
        eight.load_state_dict(linear.state_dict())
        return eight.to("cpu")

    each_linear(model, replace)


QUANTISED = {
    "own subclass": of_our_own,
    "int8 weight only": by_torchao("Int8WeightOnlyConfig"),
    "int8 dynamic": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "fp8 weight only": by_torchao("Float8WeightOnlyConfig"),
    "int4 weight only": by_torchao_in_four_bits("IntxWeightOnlyConfig", "granularity"),
    "int4 dynamic": by_torchao_in_four_bits(
        "Int8DynamicActivationIntxWeightConfig", "weight_granularity"
    ),
    "quanto int8": by_quanto("qint8"),
    "quanto fp8": by_quanto("qfloat8"),
    "hqq int4": by_hqq,
    "bitsandbytes int8": by_bitsandbytes,
}


@pytest.fixture
def built() -> Family:
    family = load("llava", layers=3)
    family.model.requires_grad_(False)
    return family


@pytest.mark.parametrize(
    ("quantise", "lowering"),
    [(quantise, "eager") for quantise in QUANTISED.values()]
    + [(QUANTISED["int8 weight only"], "aot_eager")],
    ids=[*QUANTISED, "int8 weight only, aot_eager"],
)
def test_generates_as_with_hooks(built: Family, quantise: Any, lowering: str) -> None:
    quantise(built.model)
    inputs = built.make_inputs("one")
    oracle = hooked.pruned_generate(
        built.model, inputs, retain=RETAIN, max_new_tokens=3, kv_layout="uniform"
    )
    dartfx.compile(built.model, lowering=lowering, **OPTIONS)
    found = built.model.generate(
        **inputs,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert any(report.pruned for report in dartfx.reports())
    torch.testing.assert_close(torch.stack(found.logits, 1), oracle.logits)


@torch.no_grad()
def test_quanto_in_four_bits_is_refused(built: Family) -> None:
    by_quanto("qint4")(built.model)
    dartfx.compile(built.model, lowering="eager", **OPTIONS)
    with pytest.raises(dartfx.UnsupportedGraphError, match="could not be re-traced"):
        built.model(**built.make_inputs("one"))


def test_mask_from_an_earlier_graph(built: Family) -> None:
    """The decoder's graph is re-traced on inputs of its own, subclasses and all."""
    of_our_own(built.model)
    inputs = built.make_inputs("one")
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    built.model.compile(backend="dart", options={**OPTIONS, "lowering": "eager"})
    with torch.no_grad():
        logits = built.model(**inputs).logits
    assert any(report.pruned for report in dartfx.reports())
    torch.testing.assert_close(logits, oracle.logits)


def test_explain_and_dump(built: Family, tmp_path: Path) -> None:
    of_our_own(built.model)
    options = {**OPTIONS, "dump": str(tmp_path)}
    with torch.no_grad():
        assert dartfx.explain(built.model, **built.make_inputs("one"), options=options).pruned
    assert list(tmp_path.glob("*/report.html"))


def test_gradients_of_such_weights_are_refused(built: Family) -> None:
    of_our_own(built.model)
    layer = built.model.model.language_model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(copy.copy(layer.weight.data), requires_grad=True)
    dartfx.compile(built.model, lowering="eager", **OPTIONS)
    with pytest.raises(dartfx.UnsupportedGraphError, match=r"not a plain tensor \(Halved\)"):
        built.model(**built.make_inputs("one"), use_cache=False)


def test_a_packed_product_keeps_its_rows() -> None:
    def change(layer: Layer, x: Tensor) -> Tensor:
        codes = layer.table[: x.shape[-1]].mul(20).to(torch.int8)
        rows = torch.ops.aten._weight_int8pack_mm(x.flatten(0, 1), codes, layer.table[0] / 20)
        return x + rows.view_as(x)

    assert_pruned(Decoder(SMALL, layer=changed(change)), prompt(SMALL))
