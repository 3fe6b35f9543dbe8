"""A rewritten graph -> an ``ExportedProgram`` with the signature of what it now returns."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

from torch.export import ExportedProgram, ExportGraphSignature
from torch.export.graph_signature import (
    InputKind,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from dartfx import compat
from dartfx.export.decompositions import PLAIN
from dartfx.passes.frontend.exported import free_symbols, restore_regions, shape_env
from dartfx.passes.refusal import Refusal
from dartfx.passes.transform.inline_ops import inline_ops
from dartfx.runtime.keep_idx import keep_idx_in_prompt

_RETURNED = (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)

__all__ = ["finished", "require_plain_signature", "state_of"]


def state_of(program: ExportedProgram) -> set[str]:
    """Names of the placeholders that are not inputs of a call: parameters, buffers, constants."""
    specs = program.graph_signature.input_specs
    return {s.arg.name for s in specs if s.kind is not InputKind.USER_INPUT}


def require_plain_signature(program: ExportedProgram) -> None:
    """Raise Refusal for submodules whose call signatures the program keeps.

    They name values by which a submodule could be swapped; what is gathered before a decoder layer
    would not be among them.
    """
    kept = [e.fqn for e in program.module_call_graph if e.fqn and e.signature is not None]
    if kept:
        raise Refusal(
            f"the program keeps the call signature of {kept[0]!r}, which would no longer be true",
            advice="exporting without preserve_module_call_signature",
        )


def finished(program: ExportedProgram, module: GraphModule, tokens: bool) -> ExportedProgram:
    """The program that computes the pruned graph ``module``, in plain ATen.

    tokens: return the kept positions as well.  Shares weights and example inputs with
    ``program``.  Raises what torch's verifier finds wrong.
    """
    signature = copy.deepcopy(program.graph_signature)
    root, *calls = program.module_call_graph
    call = root.signature
    assert call is not None
    if tokens:
        _return_kept(module)
        call = replace(call, out_spec=_with_one_more(call.out_spec))
    _place_in_modules(module, program.graph)
    inline_ops(module, PLAIN)
    _require_portable(module)
    signature.output_specs = _output_specs(module, signature)
    outputs = [copy.copy(s.arg) for s in signature.output_specs if s.kind in _RETURNED]
    root = replace(root, signature=replace(call, outputs=outputs))
    module, signature = restore_regions(module, signature)
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta.pop("tensor_dict", None)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=dict(program.state_dict),
        range_constraints=_range_constraints(program, module),
        module_call_graph=[root, *map(copy.copy, calls)],
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=list(program.verifiers),
    )


def _return_kept(module: GraphModule) -> None:
    """Append the positions that are kept after the last cut to the outputs."""
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], keep_idx_in_prompt(module.graph)[-1]),)


def _with_one_more(result: Any) -> Any:
    """(what the result was, one tensor)"""
    return compat.pytree.TreeSpec(tuple, None, [result, compat.pytree.tree_structure(0)])


def _place_in_modules(module: GraphModule, original: Graph) -> None:
    """Give every new node the module of what follows it, as ``torch.export.unflatten`` needs it.

    The copy of the final norm, too: elsewhere the norm would be called twice, in different ways.
    """
    known = {n.name for n in original.nodes}
    stacks = [s for n in original.nodes if (s := n.meta.get("nn_module_stack"))]
    # Nodes outside of every inner module belong to the outermost one.
    stack = dict(itertools.islice(stacks[0].items(), 1)) if stacks else {}
    for node in reversed(module.graph.nodes):
        if node.name in known:
            stack = node.meta.get("nn_module_stack") or stack
        elif node.op == "call_function":
            node.meta["nn_module_stack"] = copy.copy(stack)


def _require_portable(module: GraphModule) -> None:
    for node in module.graph.nodes:
        if getattr(node.target, "namespace", "") == "dartfx":
            raise Refusal(f"{node.target} is known only where dartfx is imported", node)


def _output_specs(module: GraphModule, signature: ExportGraphSignature) -> list[OutputSpec]:
    """The outputs' kinds as they were, under the names that the graph returns now."""
    (output,) = module.graph.find_nodes(op="output")
    returned, old = output.args[0], list(signature.output_specs)
    new = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(""), None)] * (
        len(returned) - len(old)
    )
    specs = []
    for node, spec in zip(returned, [*old, *new], strict=True):
        argument = copy.copy(spec.arg)
        if isinstance(node, Node):
            argument.name = node.name
        specs.append(OutputSpec(spec.kind, argument, spec.target))
    return specs


def _range_constraints(program: ExportedProgram, module: GraphModule) -> dict[Any, Any]:
    """Those of the program, and those of sizes that the new assertions read."""
    ranges = shape_env(module.graph).var_to_range
    new = {s: ranges[s] for s in free_symbols(module.graph) if s in ranges}
    return {**new, **copy.deepcopy(program.range_constraints)}
