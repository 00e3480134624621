"""Replace planned linears by ``sglq`` ops over plane placeholders. The result runs on any device as plain torch.

Reads the plan's sites; writes quantize and linear nodes and plane placeholders; leaves kept sites alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.family import PlaneSpec, family_of
from quant_compile.ir.graph import PlaneRef, ScaleRef, add_plane, erase_with_inputs, plane_name, verify
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.sites import LinearSite
from quant_compile.passes.plan import PassReport, Plan, SiteDecision


def insert_quant(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Rewrite every site whose decision is a scheme."""
    report = PassReport("insert_quant")
    prepared: dict[tuple[Any, ...], fx.Node] = {}
    for site in plan.sites:
        decision = plan.decisions[site.node.name]
        if decision.scheme is None:
            report.refused.append(f"{decision.name}: {decision.reason}")
            continue
        _replace(gm.graph, site, decision, decision.scheme, prepared)
        report.rewrote.append(decision.name)
    return verify(gm, "quantized"), report


def _replace(graph: fx.Graph, site: LinearSite, decision: SiteDecision, scheme: Scheme, prepared: dict[tuple[Any, ...], fx.Node]) -> None:
    spec, node = scheme.spec, site.node
    w = _weight_planes(graph, site, scheme, decision.name)
    x = _input(graph, site, prepared)
    with graph.inserting_before(node):
        planes: Any = [x]
        if scheme.input_activations is not None:
            scale = [_scale(graph, site, decision.name)] if scheme.static else []
            planes = graph.call_function(ops.quantize, (x, spec, *scale))
            planes.meta["site"] = f"input of {decision.name}"
        bias = site.bias
        if bias is not None and bias.meta["example_value"].dtype != site.dtype:
            bias = graph.call_method("to", (bias, site.dtype))
        y = graph.call_function(ops.linear, (planes, w, bias, spec, site.dtype))
        y.meta |= {"site": f"{decision.name} {spec}", "names": (decision.name,), "example_value": node.meta["example_value"]}
        result = y
        if site.flipped:
            result = graph.call_method("t", (y,))
            result.meta["example_value"] = node.meta["example_value"]
            y.meta["example_value"] = node.meta["example_value"].t()
    node.replace_all_uses_with(result)
    erase_with_inputs(graph, node)


def _weight_planes(graph: fx.Graph, site: LinearSite, scheme: Scheme, name: str) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    for i, spec in enumerate(family_of(scheme).weight_planes(scheme, site.n, site.k, site.dtype)):
        ref = PlaneRef((site.slot,), (site.transposed,), scheme.spec, "rows", site.dtype, i)
        plane = add_plane(graph, ref, spec, site.weight, plane_name(name, spec.name))
        plane.meta["parameter"] = name
        nodes.append(plane)
    return nodes


def _scale(graph: fx.Graph, site: LinearSite, name: str) -> fx.Node:
    spec = PlaneSpec("input_scale", (1,), torch.float32)
    node = add_plane(graph, ScaleRef((site.slot,)), spec, site.weight, plane_name(name, spec.name))
    node.meta["parameter"] = name
    return node


def _input(graph: fx.Graph, site: LinearSite, prepared: dict[tuple[Any, ...], fx.Node]) -> fx.Node:
    """The input as the linear reads it: transposed for weight @ x, cast as autocast would; one node per distinct need."""
    x = site.x
    value = x.meta["example_value"]
    steps: list[tuple[str, tuple[Any, ...]]] = []
    if site.flipped:
        steps.append(("t", ()))
    if value.dtype != site.dtype:
        steps.append(("to", (site.dtype,)))
    for method, arguments in steps:
        key = (x, method, arguments)
        if key not in prepared:
            with graph.inserting_after(x):
                prepared[key] = graph.call_method(method, (x, *arguments))
            prepared[key].meta["example_value"] = getattr(value, method)(*arguments)
        x, value = prepared[key], prepared[key].meta["example_value"]
    return x
