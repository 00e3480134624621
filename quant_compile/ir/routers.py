"""Find the routers of expert blocks in a Dynamo graph by what becomes of their results, whatever they are called.

A router is a small linear whose scores, one for each expert, go through operations that keep that dimension (softmax, casts,
a bias, a mask) to a choice along it (top-k, sort, argmax), and the choice goes on to pick experts: to index, scatter, compare
and mask. Output heads do not qualify: they are large, and what is sampled from their scores leaves the graph or looks up an
embedding. Nor do attention scores, which are no product with a Parameter. Reads a copied graph; changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import fx

from quant_compile.ir.probe import name_of, value_of
from quant_compile.ir.sites import LinearSite, Miss

# Without an expert weight that tells their number, experts are few beside the features that they are chosen by.
SHARE = 4
# Nodes that are looked at behind one linear, and behind one choice.
MOST_NODES = 200

_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "grouped_mm"}
_CHOICES = {"topk": 2, "sort": 1, "argsort": 1, "argmax": 1, "max": 1}  # position of dim among the arguments
_INDICES = {"argsort", "argmax"}  # return the indices alone
# What is done with a choice to pick experts: by itself, and together with other floats.
_COUNTS = {"one_hot", "nonzero", "bincount", "histc"}
_PICKS = {
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_put", "index_put_"),
    *("index_select", "where", "masked_fill", "masked_fill_", "grouped_mm", "mul", "imul", "__mul__", "matmul"),
    *("bmm", "einsum", "take_along_dim"),
}
_VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "clone", "detach"}
_CASTS = {"to", "type", "float", "half", "bfloat16", "double", "type_as"}


def routers(gm: fx.GraphModule, sites: Iterable[LinearSite], misses: Iterable[Miss] = ()) -> frozenset[int]:
    """Slots of the weights of routers.

    Args:
        gm: a graph from ``copy_graph``.
        sites: its linears.
        misses: products that are no sites; a router that is computed in another dtype than its weight is one.
    """
    experts = {
        int(value.shape[0])
        for node in gm.graph.find_nodes(op="placeholder")
        if (value := value_of(node)) is not None and value.dim() == 3
    }
    found: set[int] = set()
    for node, x, slots in (*_sites(sites), *_misses(misses)):
        scores, features = value_of(node), value_of(x)
        if scores is None or features is None or not scores.dim() or not features.dim():
            continue
        n, k = int(scores.shape[-1]), int(features.shape[-1])
        if n > 1 and (n in experts or n * SHARE <= k) and _routes(node, x, n):
            found |= set(slots)
    return frozenset(found)


def _sites(sites: Iterable[LinearSite]) -> Iterator[tuple[fx.Node, fx.Node, Sequence[int]]]:
    yield from ((site.node, site.x, (site.slot,)) for site in sites if not site.after)


def _misses(misses: Iterable[Miss]) -> Iterator[tuple[fx.Node, fx.Node, Sequence[int]]]:
    for miss in misses:
        inputs = miss.node.all_input_nodes
        if len(miss.slots) == 1 and inputs and name_of(miss.node) in _PRODUCTS:
            yield miss.node, inputs[0], miss.slots


def _routes(linear: fx.Node, x: fx.Node, n: int) -> bool:
    """Whether some choice among a linear's n results picks experts."""
    scores = _reached(linear, partial(_keeps_scores, n))
    for node in scores:
        for user in node.users:
            if user.args[:1] == (node,) and name_of(user) in _CHOICES and _along_last(user, node):
                for index in _indices(user):
                    if _picks(index, set(scores), linear, x):
                        return True
    return False


def _reached(start: fx.Node, follows: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """A node and those behind it that ``follows`` lets through, breadth first."""
    found = {start: None}
    waiting = [start]
    while waiting and len(found) < MOST_NODES:
        for user in waiting.pop(0).users:
            if user not in found and follows(user):
                found[user] = None
                waiting.append(user)
    return list(found)


def _keeps_scores(n: int, node: fx.Node) -> bool:
    value = value_of(node)
    name = name_of(node)
    if node.op == "output" or value is None or name in _PRODUCTS or name in _CHOICES or name.endswith("_like"):
        return False
    return value.dtype.is_floating_point and value.dim() > 0 and value.shape[-1] == n


def _along_last(node: fx.Node, source: fx.Node) -> bool:
    """Whether a choice is made along the last dimension; ``argmax`` and ``max`` without one look at all of them."""
    name, value = name_of(node), value_of(source)
    at = _CHOICES[name]
    given = node.kwargs.get("dim", node.args[at] if len(node.args) > at else None)
    if given is None:
        return name in ("topk", "sort", "argsort")
    return value is not None and given in (-1, value.dim() - 1)


def _indices(choice: fx.Node) -> list[fx.Node]:
    if name_of(choice) in _INDICES:
        return [choice]
    return [
        user
        for user in choice.users
        if (name_of(user) == "getitem" and user.args[1] == 1)
        or (name_of(user) == "getattr" and user.args[1] == "indices")
    ]


def _picks(index: fx.Node, scores: set[fx.Node], linear: fx.Node, x: fx.Node) -> bool:
    """Whether chosen indices select something other than the scores, or leave a graph that ends before the experts."""
    for node in _reached(index, _is_selection):
        for user in node.users:
            if user.op == "output":
                if _goes_on(x, linear):
                    return True
            elif name_of(user) in _COUNTS or (_is_float(user) and _picks_others(user, node, scores)):
                return True
    return False


def _picks_others(node: fx.Node, index: fx.Node, scores: set[fx.Node]) -> bool:
    """Whether a node selects from anything but the scores that the choice was made of."""
    if name_of(node) not in _PICKS and not _indexes(node, index):
        return False
    return any(other is not index and other not in scores for other in node.all_input_nodes)


def _is_float(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.dtype.is_floating_point


def _is_selection(node: fx.Node) -> bool:
    """Indices and masks made of indices, masks as numbers too."""
    value = node.meta.get("example_value")
    if node.op == "output" or name_of(node) in ("embedding", "gather"):
        return False
    if isinstance(value, tuple | list):
        return name_of(node) in _CHOICES
    if not isinstance(value, torch.Tensor):
        return False
    return not value.dtype.is_floating_point or name_of(node) in _CASTS


def _indexes(node: fx.Node, index: fx.Node) -> bool:
    """``values[index]``, alone or among other indices."""
    if name_of(node) not in ("getitem", "setitem", "__getitem__", "index"):
        return False
    where = node.args[1]
    return index in (where if isinstance(where, tuple | list) else (where,))


def _goes_on(x: fx.Node, linear: fx.Node) -> bool:
    """Whether what a linear reads is wanted by others too: tokens go to the experts, a classifier's features end there."""
    before = linear
    while True:
        if any(user is not before for user in x.users):
            return True
        if name_of(x) not in _VIEWS | _CASTS or not x.all_input_nodes:
            return False
        before, x = x, x.all_input_nodes[0]
