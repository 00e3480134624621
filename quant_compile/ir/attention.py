"""Find attention in a Dynamo graph by what values flow where: ``scaled_dot_product_attention``, or two products around a softmax.

K and V are followed back through what repeats their heads (``repeat_kv``) to the tensors that are kept. What nearly is attention
that we know is a miss with its reason and stays as it was written. Reads a copied graph; changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from quant_compile.ir.family import Reject
from quant_compile.ir.graph import CACHED
from quant_compile.ir.operands import op_of, operands_of
from quant_compile.ir.scores import (
    Scores,
    agrees,
    known,
    passed,
    read_scores,
    same_size,
    same_sizes,
    source_of,
    tensor_of,
)
from quant_compile.ir.writes import Writes, storage_of

SDPA = "scaled_dot_product_attention"
VIEWS = {"expand", "reshape", "view", "unsqueeze", "getitem", "contiguous", "to"}


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention; shapes and meaning of the operands are those of ``ir/attend.py``.

    Attributes:
        node: holds its result [B, Hq, T, Dv].
        nodes: all nodes that only it needs, in graph order; ``node`` is the last.
        k, v: with the heads that are kept, Hkv of them.
        softmax: as in ``attend``; None: written as ``scaled_dot_product_attention``.
        repeated: the model repeats K and V in memory.
        cached: K and V are inputs of the graph, which it has written to before: a static cache.
        k_scale, v_scale: of the codes that k and v are then.
        codes: their format in ``ir/kv.py``; empty: k and v are values.
    """

    node: fx.Node
    nodes: tuple[fx.Node, ...]
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    is_causal: bool = False
    softcap: float = 0.0
    sinks: fx.Node | None = None
    softmax: torch.dtype | None = None
    repeated: bool = False
    cached: bool = False
    k_scale: fx.Node | None = None
    v_scale: fx.Node | None = None
    codes: str = ""


@dataclass(frozen=True, eq=False)
class AttentionMiss:
    """What looks like attention and is left as it is."""

    node: fx.Node
    reason: str


def find_attention(
    gm: fx.GraphModule, taken: Collection[fx.Node] = ()
) -> tuple[list[AttentionSite], list[AttentionMiss]]:
    """All attention of a graph, in its order, and what nearly is some; nodes of ``taken`` belong to something else."""
    sites: list[AttentionSite] = []
    misses: list[AttentionMiss] = []
    memory: Memory | None = None
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or node in taken:
            continue
        parts = _parts(node)
        if parts is None:
            continue
        memory = memory or Memory.of(gm.graph)
        found = parts if isinstance(parts, Reject) else _site(parts, memory)
        if isinstance(found, Reject):
            misses.append(AttentionMiss(node, found.reason))
        elif not any(inner in taken for inner in found.nodes):
            sites.append(found)
    return sites, misses


@dataclass(frozen=True, eq=False)
class Memory:
    """What a graph writes in place, and the storages of its inputs."""

    writes: Writes
    inputs: frozenset[int | None]

    @staticmethod
    def of(graph: fx.Graph) -> Memory:
        """Of a graph as it is now."""
        return Memory(Writes(graph), frozenset(map(storage_of, graph.find_nodes(op="placeholder"))))


@dataclass(frozen=True, eq=False)
class _Parts:
    """An attention as it is written: K and V perhaps repeated, sinks perhaps expanded."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    is_causal: bool = False
    softcap: float = 0.0
    sinks: fx.Node | None = None
    softmax: torch.dtype | None = None
    grouped: bool = False


def _parts(node: fx.Node) -> _Parts | Reject | None:
    name = op_of(node)
    if name == SDPA:
        return _of_sdpa(node)
    if name in ("softmax", "_softmax"):
        found = read_scores(node)
        return _of_scores(found) if isinstance(found, Scores) else found
    return None


def _of_scores(s: Scores) -> _Parts:
    return _Parts(s.node, s.q, s.k, s.v, s.mask, s.scale, False, s.softcap, s.sinks, s.softmax)


def _of_sdpa(node: fx.Node) -> _Parts | Reject:
    given = operands_of(node)
    if given is None:
        return Reject("its arguments fit no form of scaled_dot_product_attention that is known")
    q, k, v, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    value = tensor_of(q)
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)) or value is None:
        return Reject("an operand is not a tensor of the graph")
    if given.get("dropout_p", 0.0) not in (0, 0.0):
        return Reject(f"it drops out weights at random (dropout_p={given.get('dropout_p')})")
    scale, causal = given.get("scale"), given.get("is_causal", False)
    if scale is None and (size := known(value.shape[-1])):
        scale = size**-0.5
    if not isinstance(scale, int | float) or not isinstance(causal, bool):
        return Reject("its scale, or whether it is causal, is computed in the graph")
    if mask is not None and (not isinstance(mask, fx.Node) or tensor_of(mask) is None):
        return Reject("its mask is not a tensor of the graph")
    if mask is not None and causal:
        return Reject("it has a mask and is causal as well")
    return _Parts(node, q, k, v, mask, float(scale), causal, grouped=bool(given.get("enable_gqa", False)))


def _site(p: _Parts, memory: Memory) -> AttentionSite | Reject:
    k, v = unrepeated(p.k), unrepeated(p.v)
    if _heads(k) != _heads(v) or _heads(k) is None:
        k, v = p.k, p.v
    shapes = _shapes(p, k, v)
    if shapes is not None:
        return shapes
    sinks = None if p.sinks is None else _sinks(p.sinks, p.q)
    if isinstance(sinks, Reject):
        return sinks
    repeated = k is not p.k and _heads(k) != _heads(p.k)
    codes = coded(k, v)
    if codes is not None:
        k, v = codes.k, codes.v
    scales = () if codes is None else (codes.k_scale, codes.v_scale)
    leaves = [leaf for leaf in (p.q, k, v, p.mask, sinks, *scales) if leaf is not None]
    nodes = tuple(_between(p.node, leaves))
    written = _written(nodes, leaves, p.node, memory.writes)
    if written is not None:
        return written
    cached = all(is_cache(x, p.node, memory) for x in (k, v))
    more = (None, None, "") if codes is None else (codes.k_scale, codes.v_scale, codes.format)
    return AttentionSite(
        p.node, nodes, p.q, k, v, p.mask, p.scale, p.is_causal, p.softcap, sinks, p.softmax, repeated, cached, *more
    )


@dataclass(frozen=True, eq=False)
class Coded:
    """K and V of a quantized cache: codes [B, Hkv, L, D], scales that broadcast to them."""

    k: fx.Node
    v: fx.Node
    k_scale: fx.Node
    v_scale: fx.Node
    format: str


def coded(k: fx.Node, v: fx.Node) -> Coded | None:
    """What is behind ``cache_values`` that give k and v as they are, in one format; None where these are values."""
    if op_of(k) != CACHED or op_of(v) != CACHED:
        return None
    (k_codes, k_scale, k_format, _), (v_codes, v_scale, v_format, _) = k.args, v.args
    nodes = (k_codes, k_scale, v_codes, v_scale)
    if k_format != v_format or not all(isinstance(node, fx.Node) for node in nodes):
        return None
    return Coded(k_codes, v_codes, k_scale, v_scale, str(k_format))  # type: ignore[arg-type]


def _heads(node: fx.Node) -> int | None:
    value = tensor_of(node)
    return known(value.shape[1]) if value is not None and value.dim() == 4 else None


def _shapes(p: _Parts, k: fx.Node, v: fx.Node) -> Reject | None:
    values = [tensor_of(x) for x in (p.q, k, v)]
    if any(value is None or value.dim() != 4 for value in values):
        return Reject("q, k and v have not four dimensions: batch, heads, tokens, size")
    q, key, value = (x for x in values if x is not None)
    sizes = [*q.shape[1::2], *key.shape[1::2], *value.shape[1::2]]
    if not all(map(known, sizes)):
        return Reject("its heads or their size are not known when it is compiled")
    if q.shape[1] % key.shape[1] or q.shape[3] != key.shape[3]:
        return Reject(f"q has {q.shape[1]} heads of {q.shape[3]}, and k {key.shape[1]} of {key.shape[3]}")
    alike = ((q, key, 0), (key, value, 0), (key, value, 1), (key, value, 2))
    if not all(agrees(a.shape[dim], b.shape[dim]) for a, b, dim in alike):
        return Reject("q, k and v are broadcast to each other")
    if not all(x.dtype == q.dtype and x.dtype.is_floating_point and x.device == q.device for x in (q, key, value)):
        return Reject("q, k and v differ in dtype or device")
    result = tensor_of(p.node)
    if result is None or result.dtype != q.dtype:
        return Reject("its result has another dtype than q (autocast)")
    mask = tensor_of(p.mask)
    if mask is None or mask.dim() < 4:
        return None
    if mask.dim() > 4:
        return Reject("its mask has more than four dimensions")
    wide = known(q.shape[0]) == 1 and known(mask.shape[0]) not in (None, 1)
    return Reject("its mask has more rows than q") if wide else None


def unrepeated(node: fx.Node) -> fx.Node:
    """[B, Hkv, L, D] behind what repeats its heads to [B, Hkv * g, L, D]; the node itself where nothing does."""
    inner = passed(node)
    name, given = op_of(inner), operands_of(inner) or {}
    source = given.get("self")
    if not isinstance(source, fx.Node):
        return node
    if name == "repeat_interleave":
        times = given.get("repeats")
        return passed(source) if given.get("dim") == 1 and isinstance(times, int) and _grows(source, inner) else node
    if name == "expand" and _heads(source) == 1 and _grows(source, inner):
        return passed(source)
    if name not in ("reshape", "view", "flatten") or not _grows(_expanded(passed(source)), inner):
        return node
    return _expanded(passed(source)) or node


def _expanded(node: fx.Node) -> fx.Node | None:
    """k of ``k[:, :, None].expand(B, Hkv, g, L, D)``."""
    given = operands_of(node) or {}
    source = given.get("self")
    if op_of(node) != "expand" or not isinstance(source, fx.Node):
        return None
    whole, added = tensor_of(node), passed(source)
    inner, given = source_of(added), operands_of(added) or {}
    name, before = op_of(added), tensor_of(inner)
    if whole is None or inner is None or before is None or before.dim() != 4 or whole.dim() != 5:
        return None
    at_two = name == "unsqueeze" and given.get("dim") in (2, -3)
    items = given.get("index") if name == "getitem" else None
    if isinstance(items, tuple) and len(items) >= 3:
        at_two = items[2] is None and all(item == slice(None) for item in (*items[:2], *items[3:]))
    kept = (*whole.shape[:2], *whole.shape[3:])
    return passed(inner) if at_two and same_sizes(kept, before.shape) else None


def _grows(source: fx.Node | None, node: fx.Node) -> bool:
    """Whether all but the heads are the same, of which there are a whole number of times as many."""
    before, after = tensor_of(source), tensor_of(node)
    if before is None or after is None or before.dim() != 4 or after.dim() != 4:
        return False
    few, many = known(before.shape[1]), known(after.shape[1])
    if not few or not many or many % few:
        return False
    same = (same_size(a, b) for i, (a, b) in enumerate(zip(before.shape, after.shape, strict=True)) if i != 1)
    return before.dtype == after.dtype and all(same)


def _sinks(node: fx.Node, q: fx.Node) -> fx.Node | Reject:
    """[Hq] (or [1, Hq, 1, 1]) behind views that repeat it for every row."""
    heads, value = _heads(q), tensor_of(node)
    if value is None or value.dim() != 4 or value.shape[1] != heads:
        return Reject("its sinks are not one for each head")
    path = [node]
    while op_of(node) in VIEWS:
        source = source_of(node)
        below = tensor_of(source)
        if source is None or below is None or below.dtype != value.dtype or _picks(node):
            break
        node = source
        path.append(node)
    shapes = [tuple(found.shape) for inner in path if (found := tensor_of(inner)) is not None]
    sized = [shape for shape in shapes if math.prod(shape) == heads]
    # One for each head all along, in the place of the heads; only ``expand`` repeats it.
    in_place = all(len(shape) == 1 or shape[-3:] == (heads, 1, 1) for shape in sized)
    repeats = all(op_of(inner) == "expand" for inner, shape in zip(path, shapes, strict=True) if shape not in sized)
    if not sized or shapes[-1] not in sized or not in_place or not repeats:
        return Reject("its sinks are not one for each head")
    return node


def _picks(node: fx.Node) -> bool:
    """Whether a node takes some elements, in some order, rather than all of them."""
    index = (operands_of(node) or {}).get("index") if op_of(node) == "getitem" else ()
    items = index if isinstance(index, tuple) else (index,)
    return any(item is not None and item is not ... and item != slice(None) for item in items)


def _between(node: fx.Node, leaves: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """Nodes that ``node`` is computed by from the leaves, in graph order, and ``node``."""
    found, waiting, stop = {node}, [node], set(leaves)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            tensors = isinstance(source.meta.get("example_value"), torch.Tensor | tuple)
            if source not in stop and source not in found and tensors and source.op != "placeholder":
                found.add(source)
                waiting.append(source)
    return (inner for inner in node.graph.nodes if inner in found)


def _written(nodes: Sequence[fx.Node], leaves: Iterable[fx.Node], last: fx.Node, writes: Writes) -> Reject | None:
    """Each leaf would be read where the result is made, and not where it is read now: nothing may write to it in between.

    Nor to what is computed of it on the way, but for the attention's own steps.
    """
    for leaf in leaves:
        first = next((node for node in nodes if leaf in node.all_input_nodes), last)
        writer = writes.between(leaf, first, last) if first is not last else None
        if writer is not None:
            return Reject(f"{leaf.name} is written by {writer} while it is read")
    for inner in nodes[:-1]:
        writer = writes.between(inner, inner, last)
        if writer is not None and writer not in (own.name for own in nodes):
            return Reject(f"{inner.name}, a part of it, is written by {writer}")
    return None


def is_cache(node: fx.Node, last: fx.Node, memory: Memory) -> bool:
    """Whether a node is an input, or a view of one, that is written to before ``last``."""
    storage = storage_of(node)
    if storage is None or storage not in memory.inputs:
        return False
    return memory.writes.between(node, next(iter(node.graph.nodes)), last) is not None
