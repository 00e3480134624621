"""What stands around an expert block where ranks share its work, and is none of it: choosing this rank's tokens, and the sum over ranks.

Expert parallelism gives each rank some experts and all tokens: the ids of experts that other ranks have become a sentinel, the number
of experts here, with a router weight of zero. Tensor parallelism gives each rank a slice of every expert. In both a collective adds
the ranks' results. Reads a Dynamo graph; changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import fx

from quant_compile.ir.operands import op_of, operands_of

COLLECTIVES = "_c10d_functional::"


def around_block(nodes: Sequence[fx.Node], readers: Collection[fx.Node], experts: Collection[int]) -> set[fx.Node]:
    """Nodes of a module that do not belong to its expert block.

    Args:
        nodes: all of the module's, in graph order.
        readers: those that lead from its expert weights to their products.
        experts: how many experts these weights have here.
    """
    collective = [i for i, node in enumerate(nodes) if op_of(node).startswith(COLLECTIVES)]
    last = max((i for i, node in enumerate(nodes) if node in readers), default=-1)
    after = next((i for i in collective if i > last), len(nodes))
    return {*nodes[after:], *_choice(nodes[:after], experts)}


def _choice(nodes: Sequence[fx.Node], experts: Collection[int]) -> set[fx.Node]:
    """Sentinels for experts of other ranks, router weights without theirs, and what these are computed of."""
    masks = {mask for node in nodes if (mask := _sentinel_mask(node, experts)) is not None}
    inside = set(nodes)
    ends = [node for node in nodes if (operands := _masked(node)) and operands["mask"] in masks]
    return set(_with_sources(ends, inside))


def _sentinel_mask(node: fx.Node, experts: Collection[int]) -> fx.Node | None:
    """The mask of a node that puts the number of experts in place of some ids."""
    operands = _masked(node)
    value = node.meta.get("example_value")
    if operands is None or not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
        return None
    filled, mask = operands["filled"], operands["mask"]
    return mask if type(filled) is int and filled in experts and isinstance(mask, fx.Node) else None


def _masked(node: fx.Node) -> Mapping[str, object] | None:
    """``mask`` and the value that is ``filled`` in, of ``where(mask, filled, x)`` and ``x.masked_fill(mask, filled)``."""
    name, given = op_of(node), operands_of(node) if op_of(node) in ("where", "masked_fill") else None
    if given is None:
        return None
    if name == "where":
        return {"mask": given.get("condition", given.get("self")), "filled": _first_number(given)}
    return {"mask": given.get("mask"), "filled": given.get("value")}


def _first_number(given: Mapping[str, object]) -> object:
    return next((value for value in given.values() if isinstance(value, int | float)), None)


def _with_sources(ends: Iterable[fx.Node], inside: Collection[fx.Node]) -> Iterable[fx.Node]:
    """Nodes, and all that they are computed of, as far as that is ``inside``."""
    found: dict[fx.Node, None] = dict.fromkeys(ends)
    queue = list(found)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source in inside and source not in found:
                found[source] = None
                queue.append(source)
    return found
