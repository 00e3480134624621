"""Replace planned linears by ``sglq`` ops over plane placeholders. The result runs on any device as plain torch.

Reads the plan's sites; writes quantize and linear nodes and plane placeholders; leaves alone those that are kept
or that attention has absorbed.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.family import family_of
from quant_compile.ir.graph import (
    PlaneRef,
    add_input_scale,
    add_named_plane,
    erase_with_inputs,
    multiply_input,
    stand_for,
    verify,
)
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.sites import LinearSite, Step
from quant_compile.ir.stored import TRANSPOSES, only_turned
from quant_compile.ir.writes import Writes
from quant_compile.passes.plan import PassReport, Plan, SiteDecision


def insert_quant(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Rewrite every site whose decision is a scheme."""
    report = PassReport("insert_quant")
    prepared = _Prepared(gm.graph, Writes(gm.graph), plan)
    for site in plan.sites:
        if site.node in plan.absorbed:
            continue
        decision = plan.decisions[site.node.name]
        if decision.scheme is None:
            report.refused.append(f"{decision.name}: {decision.guard or decision.reason}")
            continue
        _replace(gm.graph, site, decision, decision.scheme, prepared)
        report.rewrote.append(decision.name)
    return verify(gm, "quantized"), report


def _replace(graph: fx.Graph, site: LinearSite, decision: SiteDecision, scheme: Scheme, prepared: _Prepared) -> None:
    spec, node = scheme.spec, site.node
    w = weight_planes(graph, site, scheme, decision.name)
    x = prepared.input_of(site, decision.name)
    with graph.inserting_before(node):
        planes: Any = [x]
        if scheme.input_activations is not None:
            scale = [add_input_scale(graph, site.slot, site.weight, decision.name)] if scheme.static else []
            planes = graph.call_function(ops.quantize, (x, spec, *scale))
            planes.meta["site"] = f"input of {decision.name}"
        bias = site.bias
        if bias is not None and bias.meta["example_value"].dtype != site.dtype:
            bias = graph.call_method("to", (bias, site.dtype))
        y = graph.call_function(ops.linear, (planes, w, bias, spec, site.dtype))
        y.meta |= {
            "site": f"{decision.name} {spec}",
            "names": (decision.name,),
            "example_value": node.meta["example_value"],
        }
        result = y
        for method, arguments in map(_inverse, reversed(site.after)):
            y.meta["example_value"] = getattr(y.meta["example_value"], method)(*arguments)
        for method, arguments in site.after:
            turned = graph.call_method(method, (result, *arguments))
            turned.meta["example_value"] = getattr(result.meta["example_value"], method)(*arguments)
            result = turned
        if site.after and site.after[-1][0] in TRANSPOSES and not only_turned(node):
            result = graph.call_method("contiguous", (result,))
            result.meta["example_value"] = node.meta["example_value"]
    stand_for(result, node)
    node.replace_all_uses_with(result)
    prepared.replaced[node] = result
    erase_with_inputs(graph, node)


def _inverse(step: Step) -> Step:
    """What undoes one of the steps of ``LinearSite.after``; views share the storage, so that writes to them are seen."""
    method, arguments = step
    if method == "permute":
        return method, tuple(arguments.index(i) for i in range(len(arguments)))
    if method == "unflatten":
        return "flatten", (-len(arguments[1]),)
    return ("unsqueeze" if method == "squeeze" else method), arguments


def weight_planes(graph: fx.Graph, site: LinearSite, scheme: Scheme, name: str) -> list[fx.Node]:
    """Placeholders of all planes of a site's weight, in row form."""
    nodes: list[fx.Node] = []
    for i, spec in enumerate(family_of(scheme).weight_planes(scheme, site.n, site.k, site.dtype)):
        ref = PlaneRef((site.slot,), (site.transposed,), scheme.spec, "rows", site.dtype, i, (site.view,))
        nodes.append(add_named_plane(graph, ref, spec, site.weight, name))
    return nodes


class _Prepared:
    """Inputs as linears read them: turned into rows, cast as autocast would, times factors; shared unless written in between."""

    def __init__(self, graph: fx.Graph, writes: Writes, plan: Plan) -> None:
        self.graph, self.writes, self.replaced = graph, writes, plan.replaced
        self.factor_class = plan.factor_class
        self.made: dict[tuple[Any, ...], tuple[fx.Node, fx.Node]] = {}

    def input_of(self, site: LinearSite, name: str) -> fx.Node:
        """The node to quantize or multiply; it may be the result of an earlier site, whose own node is gone by then."""
        x, value = self.replaced.get(site.x, site.x), site.x.meta["example_value"]
        steps = list(site.before)
        if value.dtype != site.dtype:
            steps.append(("to", (site.dtype,)))
        for method, arguments in steps:
            x = self._step(x, method, arguments, site)
        factor = self.factor_class.get(site.slot)
        return x if factor is None else self._multiplied(x, factor, site, name)

    def _multiplied(self, x: fx.Node, factor: int, site: LinearSite, name: str) -> fx.Node:
        key = (x, "factor", factor)
        found = self._made(key, site)
        if found is None:
            with self.graph.inserting_before(site.node):
                found = multiply_input(self.graph, x, site.slot, site.weight, name, site.dtype)
            self.made[key] = (found, site.node)
        return found

    def _made(self, key: tuple[Any, ...], site: LinearSite) -> fx.Node | None:
        """What an earlier site has made of the same input, unless that was written to since."""
        node, first = self.made.get(key, (None, site.node))
        return node if node is None or self.writes.between(site.x, first, site.node) is None else None

    def _step(self, x: fx.Node, method: str, arguments: tuple[Any, ...], site: LinearSite) -> fx.Node:
        key = (x, method, arguments)
        found = self._made(key, site)
        if found is not None:
            return found
        with self.graph.inserting_before(site.node):
            node = self.graph.call_method(method, (x, *arguments))
        node.meta["example_value"] = getattr(x.meta["example_value"], method)(*arguments)
        self.made[key] = (node, site.node)
        return node
