"""Replace planned expert blocks by one ``sglq.moe`` over plane placeholders. The result runs on any device as plain torch.

Reads the plan's blocks; writes a quantize node for the tokens, the moe node and plane placeholders; leaves kept blocks alone.
Runs before ``insert_quant``, which finds in ``plan.replaced`` what became of a block's result.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.experts import MoeSite, leading_sizes
from quant_compile.ir.family import PlaneSpec, family_of
from quant_compile.ir.graph import (
    ExpertBiasRef,
    ExpertRef,
    add_expert_planes,
    add_input_scale,
    add_named_plane,
    multiply_input,
    stand_for,
    verify,
)
from quant_compile.ir.moe import NONE, spec_of
from quant_compile.ir.scheme import Scheme
from quant_compile.passes.plan import PassReport, Plan, SiteDecision


def insert_moe(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Rewrite every block whose decision is a scheme."""
    report = PassReport("insert_moe")
    for block in plan.blocks:
        decision = plan.decisions[block.node.name]
        if decision.schemes is None:
            report.refused.append(f"{decision.name}: {decision.reason}")
            continue
        plan.replaced[block.node] = replace_block(gm.graph, after(plan.replaced, block), decision, plan.factor_class)
        report.rewrote.append(decision.name)
    return verify(gm, "quantized"), report


def after(replaced: Mapping[fx.Node, fx.Node], block: MoeSite) -> MoeSite:
    """The block with inputs as they are now: one may be the result of a block that is already replaced."""
    now = {name: replaced.get(getattr(block, name), getattr(block, name)) for name in ("x", "ids", "weights")}
    return replace(block, **now)


def replace_block(graph: fx.Graph, block: MoeSite, decision: SiteDecision, factors: Collection[int] = ()) -> fx.Node:
    """One block becomes one node, whose (reshaped) result is returned; a decision without schemes keeps the weights' own values.

    Args:
        factors: slots of weights whose inputs have factors.
    """
    names = weight_names(decision.name, block)
    schemes = decision.schemes
    first, second = schemes or (None, None)
    spec = NONE if schemes is None else spec_of(schemes)
    value = block.node.meta["example_value"]
    dtype = block.x.meta["example_value"].dtype
    w13 = _weight_planes(graph, block, 0, first, dtype, names[0])
    w2 = _weight_planes(graph, block, 1, second, dtype, names[1])
    b13, b2 = _bias(graph, block, 0, dtype, names[0]), _bias(graph, block, 1, dtype, names[1])
    static = first is not None and first.static
    weights = zip(block.slots, (block.w13, block.w2), names, strict=True)
    scales = [add_input_scale(graph, *weight) for weight in weights] if static else []
    with graph.inserting_before(block.node):
        x = _rows(graph, block.x, block.hidden)
        if block.slots[0] in factors and first is not None:
            x = multiply_input(graph, x, block.slots[0], block.w13, names[0], dtype)
        planes: Any = [x]
        if first is not None and first.input_activations is not None:
            planes = graph.call_function(ops.quantize, (x, first.spec, *scales[:1]))
            planes.meta["site"] = f"input of {decision.name}"
        scale2 = scales[1] if scales else None
        arguments = (planes, block.ids, block.weights, w13, b13, w2, b2, scale2, spec, block.activation.text, dtype)
        y = result = graph.call_function(ops.moe, arguments)
        y.meta |= {"site": f"{decision.name} {spec}", "names": (decision.name,), "block": block}
        y.meta["example_value"] = _fake_rows(x, block.hidden)
        if value.dtype != dtype:
            result = graph.call_method("to", (result, value.dtype))
        if value.dim() != 2:
            result = graph.call_method("reshape", (result, *_sizes(graph, block)))
        if result is not y:
            result.meta["example_value"] = value
    inputs = dict.fromkeys(i for n in block.nodes for i in n.all_input_nodes if _is_tensor_input(i))
    stand_for(result, block.node)
    block.node.replace_all_uses_with(result)
    for node in reversed(block.nodes):
        graph.erase_node(node)
    for node in inputs:
        if not node.users:
            graph.erase_node(node)
    return result


def _is_tensor_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("example_value"), torch.Tensor)


def weight_names(name: str, block: MoeSite) -> tuple[str, str]:
    """Names of both weights for planes and errors."""
    return f"{name}.{_attribute(block.w13, 'w13')}", f"{name}.{_attribute(block.w2, 'w2')}"


def _attribute(node: fx.Node, default: str) -> str:
    for attribute in ("gate_up_proj", "down_proj"):
        if attribute in node.name:
            return attribute
    return default


def _fake_rows(x: fx.Node, hidden: int) -> torch.Tensor:
    value = x.meta["example_value"]
    with value.fake_mode:
        return value.new_empty((value.shape[0], hidden))


def _rows(graph: fx.Graph, x: fx.Node, hidden: int) -> fx.Node:
    value = x.meta["example_value"]
    if value.dim() == 2:
        return x
    rows = graph.call_method("reshape", (x, -1, hidden))
    rows.meta["example_value"] = value.reshape(-1, value.shape[-1])
    return rows


def _sizes(graph: fx.Graph, block: MoeSite) -> list[Any]:
    """The result's sizes, as arguments of a reshape."""
    return [*(_size(graph, size) for size in leading_sizes(block) or (-1,)), block.hidden]


def _size(graph: fx.Graph, size: int | fx.Node | tuple[fx.Node, int]) -> int | fx.Node:
    if not isinstance(size, tuple):
        return size
    if isinstance(size[0].meta["example_value"], torch.Size):
        return graph.call_function(operator.getitem, size)
    return graph.call_method("size", size)


def _weight_planes(
    graph: fx.Graph, block: MoeSite, which: int, scheme: Scheme | None, dtype: torch.dtype, name: str
) -> list[fx.Node]:
    n, k = (block.up_rows, block.hidden) if which == 0 else (block.hidden, block.intermediate)
    weight = (block.w13, block.w2)[which]
    specs = (PlaneSpec("data", (n, k), dtype),)
    if scheme is not None:
        specs = family_of(scheme).weight_planes(scheme, n, k, dtype)
    spec = NONE if scheme is None else scheme.spec
    interleaved = which == 0 and block.interleaved
    ref = ExpertRef(block.slots[which], block.transposed[which], interleaved, spec, "experts", dtype, 0)
    return add_expert_planes(graph, ref, specs, block.experts, weight, name)


def _bias(graph: fx.Graph, block: MoeSite, which: int, dtype: torch.dtype, name: str) -> fx.Node | None:
    bias = (block.b13, block.b2)[which]
    if bias is None:
        return None
    ref = ExpertBiasRef(bias.meta["argument"], which == 0 and block.interleaved, dtype)
    shape = tuple(bias.meta["example_value"].shape)
    return add_named_plane(graph, ref, PlaneSpec("bias", shape, dtype), bias, name)
