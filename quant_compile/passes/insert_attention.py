"""Replace attention by one ``sglq.attention`` over K and V that are not repeated, where something faster than what was written runs it.

Reads the plan's attention and its misses; writes the node, with what will run it in ``meta["choice"]``; all other attention stays as
the model wrote it, with the reason in the report. Runs after ``absorb_latent``, which
replaces some, and before all else: the nodes that both take out are no one else's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.attention import AttentionSite
from quant_compile.ir.graph import stand_for, verify
from quant_compile.ir.report import AttentionLine
from quant_compile.lowering.attention import (
    GROUPED,
    WRITTEN,
    AttentionChoice,
    AttentionProblem,
    layout_matters,
    problem_of,
)
from quant_compile.passes.plan import PassReport, Plan

KEPT = AttentionChoice(WRITTEN, "the policy keeps it (attention: keep)")


def insert_attention(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Rewrite every attention for which something else is chosen."""
    report = PassReport("insert_attention")
    for site in plan.attention:
        if site.node in plan.replaced:
            continue
        problem = problem_of(site)
        choice = _choice(site, problem, plan)
        expanded = plan.expanded.get(site.node)
        reason = choice.reason if expanded is None else f"{choice.reason}; {expanded}"
        report.attention.append(AttentionLine(problem.text, choice.runs, reason))
        if choice.runs == WRITTEN:
            report.refused.append(f"{site.node.name}: {choice.reason}")
            continue
        plan.replaced[site.node] = replace_attention(gm.graph, after(plan.replaced, site), choice)
        report.rewrote.append(f"{site.node.name}: {choice.runs}")
    for miss in plan.attention_misses:
        report.attention.append(AttentionLine("not matched", WRITTEN, miss.reason, missed=True))
        report.refused.append(f"{miss.node.name}: {miss.reason}")
    return verify(gm, "quantized"), report


def _choice(site: AttentionSite, problem: AttentionProblem, plan: Plan) -> AttentionChoice:
    if plan.choose_attention is None:
        return KEPT
    q = site.q.meta["example_value"].shape
    choice = plan.choose_attention(problem, q[0] * q[2])
    if choice.runs not in (WRITTEN, GROUPED) and layout_matters(site):
        return AttentionChoice(WRITTEN, "its result is viewed in a way that its order in memory must allow")
    return choice


def after(replaced: Mapping[fx.Node, fx.Node], site: AttentionSite) -> AttentionSite:
    """The site with operands as they are now: one may be the result of an attention that is already replaced."""
    operands = {name: getattr(site, name) for name in ("q", "k", "v", "mask", "sinks", "k_scale", "v_scale")}
    return replace(site, **{name: replaced.get(node, node) for name, node in operands.items()})


def replace_attention(graph: fx.Graph, site: AttentionSite, choice: AttentionChoice) -> fx.Node:
    """One attention becomes one node; what only it needed goes."""
    sinks = site.sinks
    with graph.inserting_before(site.node):
        if sinks is not None and sinks.meta["example_value"].dim() != 1:
            value = sinks.meta["example_value"]
            sinks = graph.call_method("reshape", (sinks, -1))
            sinks.meta["example_value"] = value.reshape(-1)
        arguments = (
            site.q, site.k, site.v, site.mask, site.scale, site.is_causal, site.softcap, sinks, site.softmax,
            *((site.k_scale, site.v_scale, site.codes) if site.codes else ()),
        )  # fmt: skip
        node = graph.call_function(ops.attention, arguments)
    node.meta = {"site": f"attention {choice.runs}", "choice": choice, "example_value": site.node.meta["example_value"]}
    stand_for(node, site.node)
    site.node.replace_all_uses_with(node)
    for inner in reversed(site.nodes):
        if not inner.users:
            graph.erase_node(inner)
    return node
