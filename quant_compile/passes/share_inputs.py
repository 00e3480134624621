"""Reorder or multiply an input once for all linears that read it so: the orders of ``desc_act``, the factors of AWQ.

Reads what ``sglq.quantize`` and ``sglq.linear`` read; of equal ``index_select`` and products with a weight's factor the first stays. Never
across a write into what they are made of, nor where one of them is written to itself.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.graph import erase_with_inputs, names_reading, verify
from quant_compile.ir.writes import Writes
from quant_compile.passes.plan import PassReport, Plan

SHARED = {"index_select", "mul", operator.mul, torch.mul, torch.index_select}


def share_inputs(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Redirect repeated inputs to the first."""
    report = PassReport("share_inputs")
    if not (plan.share_quant or plan.merge_siblings):
        return gm, report
    writes = Writes(gm.graph)
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in dict.fromkeys(_inputs(gm.graph)):
        if node.target not in SHARED or node.kwargs:
            continue
        key = (node.target, *node.args)
        if key not in first:
            first[key] = node
            continue
        writer = _written(first[key], node, writes)
        if writer is not None:
            report.miss(
                node.name, _readers(node), f"its input is made again, since {writer} writes to what it is made of"
            )
            first[key] = node
            continue
        node.replace_all_uses_with(first[key])
        report.rewrote.append(node.name)
        erase_with_inputs(gm.graph, node)
    return verify(gm, "quantized"), report


def _readers(node: fx.Node) -> tuple[str, ...]:
    """Names of the weights whose products read an input, quantized or not."""
    quantized = [name for user in node.users if user.target is ops.quantize for name in names_reading(user)]
    return tuple(dict.fromkeys((*names_reading(node), *quantized)))


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    """What linears and quantizations read, in graph order."""
    found: set[fx.Node] = set()
    for node in graph.find_nodes(op="call_function", target=ops.quantize):
        found.add(node.args[0])
    for node in graph.find_nodes(op="call_function", target=ops.linear):
        x = node.args[0]
        found.add(x if isinstance(x, fx.Node) else x[0])
    return [node for node in graph.nodes if node in found and node.op in ("call_function", "call_method")]


def _written(first: fx.Node, other: fx.Node, writes: Writes) -> str | None:
    for node in (first, other):
        writer = writes.anywhere(node)
        if writer is not None:
            return writer
    between = (writes.between(read, first, other) for read in first.all_input_nodes)
    return next((writer for writer in between if writer is not None), None)
