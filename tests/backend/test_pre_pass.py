"""``dartfx.as_pre_pass`` in backends that are not dartfx's."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

import dartfx
from dartfx.config import fingerprint
from dartfx.passes.refusal import Declined
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from tests.support.families import called
from tests.support.plain.decoders import Decoder, Sizes, prompt
from tests.support.tolerances import CLOSE, RETAIN

Backend = Callable[[GraphModule, list[Any]], Callable[..., Any]]


@pytest.fixture(scope="module")
def llava() -> Family:
    return called("llava")


class Convertible(OperatorSupportBase):
    """What a converter to another runtime knows: matrix products and pointwise arithmetic."""

    def is_node_supported(self, submodules: Any, node: torch.fx.Node) -> bool:
        kind = getattr(node.target, "overloadpacket", None)
        return kind in {getattr(torch.ops.aten, n) for n in ("mm", "mul", "add", "sigmoid", "view")}


def converting(pre_pass: dartfx.PrePass, engines: list[GraphModule]) -> Backend:
    """A host like torch_tensorrt's: engines for what it can convert, torch for the rest."""

    def build(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        partitioner = CapabilityBasedPartitioner(module, Convertible())
        fused = partitioner.partition_and_fuse()
        engines.extend(m for name, m in fused.named_children() if name.startswith("fused"))
        return fused.forward

    lower = aot_autograd(fw_compiler=build, inference_compiler=build)

    def host(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return lower(pre_pass(module, inputs), inputs)

    return host


def run(family: Family, backend: Backend, fullgraph: bool = True, **inputs: Any) -> Any:
    with torch.no_grad():
        return torch.compile(family.model, backend=backend, fullgraph=fullgraph)(**inputs)


def assert_pruned(family: Family, output: Any, inputs: dict[str, Tensor]) -> None:
    wanted = hooked.pruned_forward(family.model, inputs, retain=RETAIN, kv_layout="uniform")
    torch.testing.assert_close(output.logits, wanted.logits, **CLOSE)
    assert [e.keys.shape[2] for e in output.past_key_values.layers] == wanted.kv_lengths


def hosts() -> list[Any]:
    def through(lower: Backend) -> Callable[[dartfx.PrePass], Backend]:
        return lambda dart: lambda module, inputs: lower(dart(module, inputs), inputs)

    eager: Backend = lambda module, inputs: module.forward  # noqa: E731
    return [
        pytest.param(through(eager), id="eager"),
        pytest.param(through(aot_eager), id="aot_eager", marks=pytest.mark.slow),
        pytest.param(through(compile_fx), id="inductor", marks=pytest.mark.slow),
        pytest.param(lambda dart: converting(dart, []), id="converter"),
    ]


@pytest.mark.parametrize("host", hosts())
def test_hosts(llava: Family, host: Callable[[dartfx.PrePass], Backend]) -> None:
    inputs = llava.make_inputs("pad2")
    pre_pass = dartfx.as_pre_pass({"retain_tokens": RETAIN})
    assert_pruned(llava, run(llava, host(pre_pass), **inputs), inputs)
    (report,) = dartfx.reports()
    assert report.pruned


def test_the_converter_converts(llava: Family) -> None:
    engines: list[GraphModule] = []
    run(llava, converting(dartfx.as_pre_pass(), engines), **llava.make_inputs())
    targets = {n.target for e in engines for n in e.graph.nodes if n.op == "call_function"}
    assert torch.ops.aten.mm.default in targets
    assert operator.getitem not in targets


def test_generate_decodes_with_graphs_left_as_they_are(llava: Family) -> None:
    inputs, same = llava.make_inputs(), []
    pre_pass = dartfx.as_pre_pass({"retain_tokens": RETAIN})

    def host(module: GraphModule, given: list[Any]) -> Callable[..., Any]:
        rewritten = pre_pass(module, given)
        same.append(rewritten is module)
        return rewritten.forward

    wanted = hooked.pruned_generate(
        llava.model, inputs, retain=RETAIN, max_new_tokens=4, kv_layout="layered"
    )
    llava.model.compile(backend=host, fullgraph=True)
    try:
        ids = llava.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    finally:
        llava.model._compiled_call_impl = None
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], wanted.token_ids)
    assert same[0] is False
    assert all(same[1:])
    assert len(same) > 1


class Broken(torch.nn.Module):
    """Merges features into embeddings in one graph, and decodes in the next."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.model, self.image = family.model, family.image_token_id

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter((input_ids == self.image)[..., None], features)
        torch._dynamo.graph_break()
        core = self.model.model.language_model
        logits: Tensor = self.model.lm_head(core(inputs_embeds=embeds).last_hidden_state)
        return logits


@pytest.mark.parametrize("loud", ["warn", "error"])
def test_a_merge_in_an_earlier_graph_is_refused(llava: Family, loud: str) -> None:
    broken, ids = Broken(llava), llava.make_inputs()["input_ids"]
    features = torch.randn(llava.tokens_per_image, 64)
    pre_pass = dartfx.as_pre_pass({"retain_tokens": RETAIN, "on_unsupported": loud})
    compiled = torch.compile(broken, backend=lambda module, given: pre_pass(module, given).forward)
    with torch.no_grad():
        if loud == "error":
            with pytest.raises(Exception, match="a later one, and a pass on one graph cannot"):
                compiled(ids, features)
            return
        with pytest.warns(dartfx.PruningWarning, match=r"a later one.*fullgraph=True"):
            logits = compiled(ids, features)
        torch.testing.assert_close(logits, broken(ids, features), **CLOSE)
    kinds = [type(r.outcome) for r in dartfx.reports()]
    assert kinds.count(Declined) == 1
    assert not any(r.pruned for r in dartfx.reports())


def test_a_given_mask_is_refused(llava: Family) -> None:
    inputs = llava.make_inputs("text")
    pre_pass = dartfx.as_pre_pass({"retain_tokens": RETAIN, "on_unsupported": "error"})
    host: Backend = lambda module, given: pre_pass(module, given).forward  # noqa: E731
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, 5:21] = True
    with (
        dartfx.vision_tokens(mask),
        pytest.raises(Exception, match="comes from outside of it"),
    ):
        run(llava, host, **inputs)
    assert not any(r.pruned for r in dartfx.reports())


def test_uuid_identifies_options_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    one = dartfx.as_pre_pass({"retain_tokens": 6}).uuid()
    assert one == dartfx.as_pre_pass({"retain_tokens": 6, "dump": None}).uuid()
    assert one != dartfx.as_pre_pass({"retain_tokens": 7}).uuid()
    monkeypatch.setattr(fingerprint, "source_digest", lambda: "edited")
    assert one != dartfx.as_pre_pass({"retain_tokens": 6}).uuid()


def test_cached_code_of_an_edited_operator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of torch hash the graph that the host compiles, not what an operator is made of."""
    z = Sizes(layers=2, vocab=42)  # no other test's: the caches are those of the whole run
    model, inputs = Decoder(z).eval(), prompt(z)
    options = {"retain_tokens": RETAIN, "layer": 1, "selector": "uniform"}

    def hits() -> int:
        counters.clear()
        torch._dynamo.reset()
        pre_pass = dartfx.as_pre_pass(options)
        host: Backend = lambda module, given: compile_fx(pre_pass(module, given), given)  # noqa: E731
        with torch.no_grad():
            torch.compile(model, backend=host, fullgraph=True)(**inputs)
        return int(counters["aot_autograd"]["autograd_cache_hit"])

    assert hits() == 0
    assert hits() == 1
    monkeypatch.setattr(fingerprint, "source_digest", lambda: "edited")
    assert hits() == 0
    assert all(report.pruned for report in dartfx.reports())


@pytest.mark.parametrize("option", ["lowering", "inductor", "mode", "tokens", "outline_layers"])
def test_options_of_the_host(option: str) -> None:
    with pytest.raises(dartfx.ConfigError, match=f"{option} does not apply to dartfx.as_pre_pass"):
        dartfx.as_pre_pass({option: "eager"})
    with pytest.raises(dartfx.ConfigError, match="did you mean 'layer'"):
        dartfx.as_pre_pass({"layr": 2})
