"""Quantize an input once for all linears that read it under the same scheme.

Reads ``sglq.quantize`` nodes; merges those of one input, spec and static scale; leaves inputs that are written in place.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.graph import ScaleRef, erase_with_inputs, verify
from quant_compile.passes.plan import PassReport, Plan


def share_quant(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Redirect repeated quantizations to the first."""
    report = PassReport("share_quant")
    if not plan.share_quant:
        return gm, report
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=ops.quantize)):
        key = (node.args[0], node.args[1], _scale_class(node, plan))
        writer = written_in_place(node.args[0])
        if writer is not None:
            report.refused.append(f"{node.meta['site']}: {node.args[0]} is written by {writer}")
        elif key in first:
            node.replace_all_uses_with(first[key])
            erase_with_inputs(gm.graph, node)
            report.rewrote.append(node.meta["site"])
        else:
            first[key] = node
    return verify(gm, "quantized"), report


def _scale_class(node: fx.Node, plan: Plan) -> int | None:
    scale: Any = node.args[2] if len(node.args) > 2 else None
    if scale is None:
        return None
    ref: ScaleRef = scale.meta["plane"]
    return plan.scale_class.get(ref.slots[0], ref.slots[0])


def written_in_place(x: Any) -> str | None:
    """Name of a node that may write into x, or None. Views of x are followed one step."""
    for user in x.users:
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or (name.startswith("i") and name in _IN_PLACE) or "out" in user.kwargs:
            if user.args and user.args[0] is x or user.kwargs.get("out") is x:
                return user.name
    return None


_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "iand", "ior", "ixor", "ifloordiv", "imod"}
