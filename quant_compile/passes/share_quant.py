"""Quantize an input once for all linears that read it under the same scheme.

Reads ``sglq.quantize`` nodes; merges those of one input, spec and static scale; never across a write into that input.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.graph import ScaleRef, erase_with_inputs, names_reading, verify
from quant_compile.ir.writes import Writes
from quant_compile.passes.plan import PassReport, Plan


def share_quant(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Redirect repeated quantizations to the first."""
    report = PassReport("share_quant")
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


def _scale_class(node: fx.Node, plan: Plan) -> int | None:
    scale: Any = node.args[2] if len(node.args) > 2 else None
    if scale is None:
        return None
    ref: ScaleRef = scale.meta["plane"]
    return plan.scale_class.get(ref.slots[0], ref.slots[0])
