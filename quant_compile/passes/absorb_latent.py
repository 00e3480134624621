"""Replace attention over a cache of latents, and the linear that makes K and V of it, by one ``sglq.latent_attention`` over the cache.

Reads the plan's attention and linears; writes the node, and what makes the linear's weight of its planes; notes in the plan which
attention and linears are gone, and why others stay as the model wrote them. Runs first: the nodes that it takes out are no one else's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.attention import AttentionSite
from quant_compile.ir.graph import CACHED, fake_mode_of, is_view, multiply_input, stand_for, verify
from quant_compile.ir.latent import LatentMiss, LatentSite, find_latent
from quant_compile.ir.operands import op_of
from quant_compile.ir.report import AttentionLine
from quant_compile.ir.scores import tensor_of
from quant_compile.ir.sites import LinearSite
from quant_compile.lowering.attention import WRITTEN, AttentionChoice, layout_matters
from quant_compile.lowering.latent import LatentProblem, problem_of
from quant_compile.lowering.registry import Problem
from quant_compile.passes.insert_attention import KEPT, after
from quant_compile.passes.insert_quant import weight_planes
from quant_compile.passes.plan import PassReport, Plan, SiteDecision

EXPANDED = "K and V are computed of the whole cache at each step"


def absorb_latent(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Rewrite every attention over latents for which the absorbed form is chosen."""
    report = PassReport("absorb_latent")
    for site in find_latent(gm, plan.attention, plan.sites):
        node = site.attention.node
        if isinstance(site, LatentMiss):
            plan.expanded[node] = f"{EXPANDED}: {site.reason}"
            report.refused.append(f"{node.name}: {site.reason}")
            continue
        decision = plan.decisions[site.linear.node.name]
        problem, choice = _choice(site, decision, plan)
        if choice.runs == WRITTEN:
            plan.expanded[node] = f"{EXPANDED}: {choice.reason}"
            report.refused.append(f"{node.name}: {choice.reason}")
            continue
        report.attention.append(AttentionLine(problem.text, choice.runs, choice.reason))
        report.rewrote.append(f"{node.name}: {choice.runs}, with {decision.name}")
        plan.absorbed.add(site.linear.node)
        attention = after(plan.replaced, site.attention)
        scaled = site.linear.slot in plan.factor_class
        plan.replaced[node] = replace_latent(gm.graph, site, decision, attention, choice, scaled)
    return verify(gm, "quantized"), report


def _choice(site: LatentSite, decision: SiteDecision, plan: Plan) -> tuple[LatentProblem, AttentionChoice]:
    problem, linear = problem_of(site, decision.scheme), site.linear
    if plan.choose_latent is None:
        return problem, KEPT
    choice = plan.choose_latent(problem)
    if choice.runs != WRITTEN and layout_matters(site.attention):
        return problem, AttentionChoice(WRITTEN, "its result is viewed in a way that its order in memory must allow")
    if choice.runs == WRITTEN or decision.scheme is None:
        return problem, choice
    dispatch = plan.choose(Problem(decision.scheme, linear.n, linear.k, linear.dtype), decision.name)
    problem = replace(problem, layout=dispatch.layout)
    return problem, plan.choose_latent(problem)


def replace_latent(
    graph: fx.Graph,
    site: LatentSite,
    decision: SiteDecision,
    attention: AttentionSite,
    choice: AttentionChoice,
    scaled: bool = False,
) -> fx.Node:
    """One attention and its linear become one node.

    Args:
        attention: with operands as they are now.
        scaled: the linear's planes belong to an input times factors.
    """
    node, value = site.attention.node, site.attention.node.meta["example_value"]
    with graph.inserting_before(node):
        weight = _weight(graph, site.linear, decision, scaled)
        arguments = (
            attention.q, weight, site.latent, site.rope, attention.mask, attention.scale, site.rope_at, site.key_row,
            site.value_row, int(value.shape[3]), *((site.latent_scale, site.rope_scale, site.codes) if site.codes else ()),
        )  # fmt: skip
        made = graph.call_function(ops.latent_attention, arguments)
    made.meta = {"site": f"attention {choice.runs}, {decision.name}", "choice": choice, "example_value": value}
    stand_for(made, node)
    node.replace_all_uses_with(made)
    inputs = dict.fromkeys(
        source for inner in site.nodes for source in inner.all_input_nodes if source not in site.nodes
    )
    for inner in reversed(site.nodes):
        graph.erase_node(inner)
    _erase_unread(graph, inputs)
    return made


def _erase_unread(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase what nothing reads any more: the weight's own placeholder, values of a cache in codes, views."""
    waiting, gone = list(nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        pure = tensor_of(node) is not None and (node.op == "placeholder" or op_of(node) == CACHED or is_view(node))
        if pure and not node.users and node not in gone:
            waiting += node.all_input_nodes
            graph.erase_node(node)
            gone.add(node)


def _weight(graph: fx.Graph, linear: LinearSite, decision: SiteDecision, scaled: bool) -> fx.Node:
    """[n, r] in the dtype of the linear's result."""
    if decision.scheme is not None:
        planes = weight_planes(graph, linear, decision.scheme, decision.name)
        node = graph.call_function(ops.dequantize, (planes, decision.scheme.spec, linear.k))
        node.meta = {
            "site": f"{decision.name} {decision.scheme.spec}",
            "names": (decision.name,),
            "dtype": linear.dtype,
        }
        node = graph.call_method("to", (node, linear.dtype))
        if not scaled:
            return node
        device = linear.weight.meta["example_value"].device
        with fake_mode_of(graph):
            node.meta["example_value"] = torch.empty(linear.n, linear.k, dtype=linear.dtype, device=device)
        return multiply_input(graph, node, linear.slot, linear.weight, decision.name, linear.dtype)
    node = linear.weight
    if linear.view:
        node = graph.call_method("reshape", (node, linear.view))
    return graph.call_method("t", (node,)) if linear.transposed else node
