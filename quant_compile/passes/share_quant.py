"""Quantize an input once for all linears that read it under the same scheme.

Reads ``sglq.quantize`` nodes; merges those of one input, spec and static scale; never across a write into that input.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.graph import ScaleRef, erase_with_inputs, names_reading, verify
from quant_compile.ir.writes import Writes
from quant_compile.page.views import tail
from quant_compile.passes.plan import PassReport, Plan

TURNED_OFF = "the policy's `fuse` turns share_quant off"


def share_quant(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Redirect repeated quantizations to the first."""
    report = PassReport("share_quant")
    _say_why_apart(gm.graph, plan, report)
    if not plan.share_quant:
        return gm, report
    writes = Writes(gm.graph)
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=ops.quantize)):
        key = (node.args[0], node.args[1], _scale_class(node, plan))
        if key not in first:
            first[key] = node
            continue
        x: Any = node.args[0]
        writer = writes.between(x, first[key], node)
        if writer is not None:
            report.miss(node.meta["site"], names_reading(node), f"{x} is written by {writer}")
            first[key] = node
            continue
        node.replace_all_uses_with(first[key])
        erase_with_inputs(gm.graph, node)
        report.rewrote.append(node.meta["site"])
    return verify(gm, "quantized"), report


def _say_why_apart(graph: fx.Graph, plan: Plan, report: PassReport) -> None:
    """Of quantizations of one input: why some of them are not one."""
    by_input: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=ops.quantize):
        by_input.setdefault(node.args[0], []).append(node)
    for first, *others in by_input.values():
        for other in others:
            names = names_reading(other)
            beside = " + ".join(map(tail, names_reading(first)))  # so that layers alike say the same
            if other.args[1] != first.args[1]:
                what = f"{other.args[1]}, that of {beside} as {first.args[1]}"
                report.nearly(names, f"its input is quantized on its own: as {what}")
            elif _scale_class(other, plan) != _scale_class(first, plan):
                report.nearly(names, f"its input is quantized on its own: its calibrated scale is not that of {beside}")
            elif not plan.share_quant:
                report.nearly(names, f"its input is quantized again, as for {beside}: {TURNED_OFF}")


def _scale_class(node: fx.Node, plan: Plan) -> int | None:
    scale: Any = node.args[2] if len(node.args) > 2 else None
    if scale is None:
        return None
    ref: ScaleRef = scale.meta["plane"]
    return plan.scale_class.get(ref.slots[0], ref.slots[0])
