"""Replace planned products with all experts by ``sglq.batched`` over plane placeholders.

Reads the plan's batched sites; writes a quantize node for the operand, the batched node and what orders its dimensions.
Runs with ``insert_moe`` before ``insert_quant``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.batched import BatchedSite
from quant_compile.ir.family import family_of
from quant_compile.ir.graph import (
    ExpertRef,
    add_expert_planes,
    add_input_scale,
    erase_with_inputs,
    fake_mode_of,
    multiply_input,
    stand_for,
    verify,
)
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.stored import only_turned
from quant_compile.passes.plan import PassReport, Plan, SiteDecision


def insert_batched(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Rewrite every batched site whose decision is a scheme."""
    report = PassReport("insert_batched")
    for site in plan.batched:
        decision = plan.decisions[site.node.name]
        if decision.scheme is None:
            report.refused.append(f"{decision.name}: {decision.reason}")
            continue
        plan.replaced[site.node] = _replace(gm.graph, site, decision, decision.scheme, plan)
        report.rewrote.append(decision.name)
    return verify(gm, "quantized"), report


def _replace(graph: fx.Graph, site: BatchedSite, decision: SiteDecision, scheme: Scheme, plan: Plan) -> fx.Node:
    name, node = decision.name, site.node
    specs = family_of(scheme).weight_planes(scheme, site.n, site.k, site.dtype)
    ref = ExpertRef(site.slot, site.transposed, False, scheme.spec, "experts", site.dtype, 0, view=site.view)
    w = add_expert_planes(graph, ref, specs, site.experts, site.weight, name)
    scale = [add_input_scale(graph, site.slot, site.weight, name)] if scheme.static else []
    with graph.inserting_before(node):
        w = _one_of(graph, w, site.index)
        x = plan.replaced.get(site.x, site.x)
        if site.squeezed:
            x = graph.call_method("squeeze", (x, site.squeezed))
        rows = [letter for letter in site.x_letters if letter not in "ek"]
        each = ["e"] if "e" in site.x_letters else []
        sizes = [graph.call_method("size", (x, site.x_letters.index(letter))) for letter in rows]
        ordered = _ordered(graph, x, site.x_letters, [*each, *rows, "k"])
        flat = graph.call_method("reshape", (ordered, *([site.experts] if each else []), -1, site.k))
        value = flat.meta["example_value"] = _fake(site)
        if value.dtype != site.dtype:
            flat = graph.call_method("to", (flat, site.dtype))
            value = flat.meta["example_value"] = value.to(site.dtype)
        if site.slot in plan.factor_class:
            flat = multiply_input(graph, flat, site.slot, site.weight, name, site.dtype)
        planes: Any = [flat]
        if scheme.input_activations is not None:
            planes = graph.call_function(ops.quantize, (flat, scheme.spec, *scale))
            planes.meta["site"] = f"input of {name}"
        y = graph.call_function(ops.batched, (planes, w, scheme.spec, site.dtype))
        y.meta |= {"site": f"{name} {scheme.spec}", "names": (name,), "batched": site}
        with fake_mode_of(graph):
            experts = site.experts if site.index is None else 1
            y.meta["example_value"] = value.new_empty((experts, value.shape[-2], site.n))
        lead = [] if site.index is not None else [site.experts]
        result = graph.call_method("reshape", (y, *lead, *sizes, site.n))
        turned = _ordered(graph, result, [*("e" * len(lead)), *rows, "n"], list(site.out_letters))
        if turned is not result and not only_turned(node):
            turned = graph.call_method("contiguous", (turned,))
        result = turned
        if site.bias is not None:
            result.meta["example_value"] = node.meta["example_value"]
            result = graph.call_function(torch.add, (result, graph.call_method("to", (site.bias, site.dtype))))
        result.meta["example_value"] = node.meta["example_value"]
    stand_for(result, node)
    node.replace_all_uses_with(result)
    erase_with_inputs(graph, node)
    return result


def _one_of(graph: fx.Graph, planes: list[fx.Node], index: Any) -> list[fx.Node]:
    """Planes [1, ...] of the one expert that a product reads."""
    if index is None:
        return planes
    if isinstance(index, int):
        return [graph.call_method("narrow", (plane, 0, index, 1)) for plane in planes]
    device = planes[0].meta["example_value"].device
    if isinstance(index.meta["example_value"], torch.SymInt):
        index = graph.call_function(torch.full, ((1,), index), {"dtype": torch.int64, "device": device})
    else:
        index = graph.call_method("reshape", (index, (1,)))
    return [graph.call_method("index_select", (plane, 0, index)) for plane in planes]


def _ordered(graph: fx.Graph, x: fx.Node, have: Any, want: list[str]) -> fx.Node:
    order = tuple(list(have).index(letter) for letter in want)
    return x if order == tuple(range(len(order))) else graph.call_method("permute", (x, order))


def _fake(site: BatchedSite) -> torch.Tensor:
    value = site.x.meta["example_value"].squeeze(site.squeezed) if site.squeezed else site.x.meta["example_value"]
    order = [site.x_letters.index(letter) for letter in site.x_letters if letter not in "ek"]
    with value.fake_mode:
        if "e" in site.x_letters:
            moved = value.permute(site.x_letters.index("e"), *order, site.x_letters.index("k"))
            return moved.reshape(site.experts, -1, site.k)
        return value.permute(*order, site.x_letters.index("k")).reshape(-1, site.k)
