"""Find attention whose K and V are computed at each step from a static cache of latents, by one linear for all heads (DeepSeek's MLA).

    y = latent @ W.T [B, 1, L, Hq * per] -> per head: k_nope, v = parts of its ``per`` columns,  k = (k_nope, rope of all heads)

Since (q W_k) latent^T is q (latent W_k^T)^T, the linear can be absorbed: its rows of K are multiplied with q, those of V with what
the weights make of the latents, and the cache is read as it is. Follows values, whatever modules and variables are called. What nearly
is such an attention is a miss with its reason. Reads a copied graph; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from quant_compile.ir.attention import AttentionSite, Memory, coded, is_cache, unrepeated
from quant_compile.ir.family import Reject
from quant_compile.ir.operands import op_of, operands_of
from quant_compile.ir.scores import known, passed, same_size, same_sizes, source_of, tensor_of
from quant_compile.ir.sites import LinearSite
from quant_compile.ir.stored import PARTS, permutation

EMPTY = {"new_empty", "new_zeros", "empty", "zeros"}
FILLS = {"copy_", "setitem"}
VIEWS = {"view", "reshape", "unflatten", "_unsafe_view"}


@dataclass(frozen=True, eq=False)
class LatentSite:
    """One attention that its linear can be absorbed into.

    Attributes:
        attention: the site, whose k and v are computed.
        linear: [B, 1, L, r] -> [B, 1, L, Hq * per], a head's rows of the weight next to each other.
        nodes: all nodes that only the attention needs, and its own, in graph order.
        latent, rope: [B, 1, L, r] and [B, 1, L, p], codes or values, as they are cached.
        key_row, value_row: where K's and V's rows begin among the ``per`` rows of a head.
        rope_at: where the rope's columns begin in k, the others are K's rows: 0, or the size of these.
        latent_scale, rope_scale, codes: as those of ``AttentionSite``.
    """

    attention: AttentionSite
    linear: LinearSite
    nodes: tuple[fx.Node, ...]
    latent: fx.Node
    rope: fx.Node
    key_row: int
    value_row: int
    rope_at: int
    latent_scale: fx.Node | None = None
    rope_scale: fx.Node | None = None
    codes: str = ""


@dataclass(frozen=True, eq=False)
class LatentMiss:
    """An attention whose V is a linear's of a cache, and which is left as it is."""

    attention: AttentionSite
    reason: str


def find_latent(
    gm: fx.GraphModule, attention: Sequence[AttentionSite], linears: Sequence[LinearSite]
) -> list[LatentSite | LatentMiss]:
    """The attention over latents among a graph's sites, in their order."""
    found: list[LatentSite | LatentMiss] = []
    by_node = {site.node: site for site in linears}
    memory: Memory | None = None
    for site in attention:
        value = _rows(site.v, by_node)
        if value is None:
            continue
        memory = memory or Memory.of(gm.graph)
        made = _site(site, value, by_node, memory)
        if isinstance(made, Reject):
            found.append(LatentMiss(site, made.reason))
        elif made is not None:
            found.append(made)
    return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """A value [B, Hq, L, size] that is ``size`` rows of each head of a linear, from ``start`` on; ``path``: the nodes from the linear."""

    linear: LinearSite
    start: int
    size: int
    per: int
    path: tuple[fx.Node, ...]


def _rows(node: fx.Node, linears: Mapping[fx.Node, LinearSite]) -> _Rows | None:
    """What a value is of a linear, through a view of its columns as heads, a transpose, and slices of a head's columns."""
    value = tensor_of(node)
    if value is None or value.dim() != 4 or known(value.shape[3]) is None:
        return None
    start, size, per, path = 0, int(value.shape[3]), 0, list[fx.Node]()
    turned = False
    while node not in linears:
        path.append(node)
        source, part = source_of(node), _slice(node)
        if source is None:
            return None
        if part is not None:
            start += part.start
            path += part.between
            source = part.source
        elif permutation(op_of(node), operands_of(node) or {}, 4) == (0, 2, 1, 3) and not turned and not per:
            turned = True
        elif op_of(node) in VIEWS and turned and not per and _splits(source, node, linears):
            per = int(node.meta["example_value"].shape[3])
        elif passed(node) is node:
            return None
        node = source
    return _Rows(linears[node], start, size, per, (*path, node)) if per else None


def _splits(linear: fx.Node, node: fx.Node, linears: Mapping[fx.Node, LinearSite]) -> bool:
    """Whether a node views a linear's result [B, 1, L, Hq * per] as [B, L, Hq, per]."""
    before, after = tensor_of(linear), tensor_of(node)
    if linear not in linears or before is None or after is None or before.dim() != 4 or after.dim() != 4:
        return False
    batch, one, length, _ = before.shape
    return known(one) == 1 and same_sizes((batch, length), after.shape[:2]) and None not in map(known, after.shape[2:])


@dataclass(frozen=True, eq=False)
class _Slice:
    """Columns of ``source`` from ``start`` on; ``between``: further nodes that the slice goes through."""

    source: fx.Node
    start: int
    between: tuple[fx.Node, ...] = ()


def _slice(node: fx.Node) -> _Slice | None:
    """What a node takes of the last of four dimensions; None: it is no such slice."""
    given, source = operands_of(node) or {}, source_of(node)
    if source is None or op_of(node) not in ("getitem", "narrow"):
        return None
    if op_of(node) == "getitem" and op_of(source) in PARTS:
        return _part(source, given.get("index"))
    value = tensor_of(source)
    if value is None or value.dim() != 4:
        return None
    if op_of(node) == "narrow":
        at, start = given.get("dim"), given.get("start")
        return _Slice(source, start) if at in (-1, 3) and isinstance(start, int) and start >= 0 else None
    span = _span(given.get("index"), value.shape[3])
    return None if span is None else _Slice(source, span[0])


def _part(parts: fx.Node, index: Any) -> _Slice | None:
    """A part of ``split`` or ``chunk`` over the last dimension."""
    given, whole, values = operands_of(parts) or {}, source_of(parts), parts.meta.get("example_value")
    if whole is None or not isinstance(values, tuple | list) or not isinstance(index, int) or op_of(parts) == "unbind":
        return None
    if given.get("dim", 0) not in (-1, 3) or not 0 <= index < len(values):  # pyright: ignore[reportUnknownArgumentType]
        return None
    sizes = [known(value.shape[3]) for value in values[:index]]  # pyright: ignore[reportUnknownVariableType]
    return None if None in sizes else _Slice(whole, sum(map(int, sizes)), (parts,))  # type: ignore[arg-type]


def _span(index: Any, size: Any) -> tuple[int, int] | None:
    """(start, end) of an index that slices the last of four dimensions alone."""
    items = list(index) if isinstance(index, tuple | list) else [index]
    whole = items[:-1] == [Ellipsis] or items[:-1] == [slice(None)] * 3
    last, size = items[-1], known(size)
    if not whole or not isinstance(last, slice) or size is None:
        return None
    ends = (last.start, last.stop, last.step)
    if not all(end is None or isinstance(end, int) for end in ends):
        return None
    start, end, step = last.indices(size)
    return (start, end) if step == 1 else None


@dataclass(eq=False)
class _Key:
    """What a key is made of: (columns from, to, value) of each part, and the nodes that make it."""

    parts: list[tuple[int, int, fx.Node]]
    path: list[fx.Node] = field(default_factory=list)


def _key(node: fx.Node) -> _Key | Reject | None:
    """A key that is joined of parts, by ``cat`` or by copies into a tensor that is empty before; None: it is not."""
    key = passed(node)
    path = [node] if key is not node else []
    while path and (source := source_of(path[-1])) is not None and source is not key:
        path.append(source)
    if op_of(key) == "cat":
        found = _joined(key)
    elif op_of(key) in EMPTY:
        found = _filled(key)
    else:
        return None
    if isinstance(found, _Key):
        found.path += path
    return found


def _joined(key: fx.Node) -> _Key | Reject:
    given = operands_of(key) or {}
    tensors: Any = given.get("tensors")
    if given.get("dim") not in (-1, 3) or not isinstance(tensors, list | tuple):
        return Reject("its key is joined of parts that are not columns")
    at, parts = 0, list[tuple[int, int, fx.Node]]()
    for part in tensors:  # pyright: ignore[reportUnknownVariableType]
        value = tensor_of(part)
        size = None if value is None else known(value.shape[-1])
        if size is None:
            return Reject("the size of a part of its key is not known when it is compiled")
        parts.append((at, at + size, part))  # pyright: ignore[reportUnknownArgumentType]
        at += size
    return _Key(parts, [key])


def _filled(key: fx.Node) -> _Key | Reject:
    """Of all that is done with an empty tensor: the copies into its columns; other users are for ``_only`` to see."""
    size, parts, path = tensor_of(key).shape[3], list[tuple[int, int, fx.Node]](), [key]  # type: ignore[union-attr]
    for user in key.users:
        if op_of(user) == "setitem" and user.args[0] is key:
            span, value, fill = _span(user.args[1], size), user.args[2], [user]
        elif op_of(user) == "getitem" and len(user.users) == 1 and op_of(next(iter(user.users))) == "copy_":
            (copy,) = user.users
            span, value, fill = _span(user.args[1], size), copy.args[1], [user, copy]
        else:
            continue
        if span is None or not isinstance(value, fx.Node) or any(node.kwargs for node in fill) or fill[-1].users:
            return Reject(f"{fill[-1].name} does not copy into columns of its key")
        parts.append((*span, value))
        path += fill
    return _Key(sorted(parts, key=lambda part: part[0]), path)


def _site(
    site: AttentionSite, value: _Rows, linears: Mapping[fx.Node, LinearSite], memory: Memory
) -> LatentSite | Reject | None:
    key = _key(site.k)
    if not isinstance(key, _Key):
        return key
    halves = [(start, end, part, _rows(part, linears)) for start, end, part in key.parts]
    own = [half for half in halves if half[3] is not None and half[3].linear is value.linear]
    others = [half for half in halves if half not in own]
    if len(own) != 1 or len(others) != 1:
        return None if not own else Reject("its key is not one part of the linear and one that all heads share")
    (start, end, _, rows), (rope_start, rope_end, part, _) = own[0], others[0]
    assert rows is not None
    shared = unrepeated(part)
    refused = _refused(site, value, rows, key, shared)
    if refused is not None:
        return refused
    linear = value.linear
    whole = max(start, rope_start) == (rope_end if rope_start == 0 else end) and min(start, rope_start) == 0
    if not whole or (end - start, rope_end - rope_start) != (rows.size, _columns(shared)):
        return Reject("its key has columns that are none of its parts, or of two")
    x, codes = passed(linear.x), coded(passed(linear.x), shared)
    stored = (x, shared) if codes is None else (codes.k, codes.v)
    scales = () if codes is None else (codes.k_scale, codes.v_scale)
    if not all(is_cache(node, site.node, memory) for node in stored):
        return Reject("its latents are no static cache that the graph writes to")
    inside = {*site.nodes, *key.path, *rows.path, *value.path, *_between(part, shared), *_between(linear.x, x)}
    refused = _only(inside, site, key) or _unwritten((*stored, *scales), inside | {x, shared}, site.node, memory)
    if refused is not None:
        return refused
    nodes = tuple(node for node in site.node.graph.nodes if node in inside)
    more = (None, None, "") if codes is None else (codes.k_scale, codes.v_scale, codes.format)
    return LatentSite(site, linear, nodes, *stored, rows.start, value.start, rope_start, *more)


def _columns(node: fx.Node) -> int | None:
    found = tensor_of(node)
    return None if found is None else known(found.shape[-1])


def _refused(site: AttentionSite, value: _Rows, rows: _Rows, key: _Key, shared: fx.Node) -> Reject | None:
    """What the absorbed form does not compute."""
    q, k, v, x, rope = (tensor_of(node) for node in (site.q, site.k, site.v, value.linear.x, shared))
    assert q is not None and k is not None and v is not None and x is not None
    linear = value.linear
    if site.is_causal or site.softcap or site.sinks is not None:
        return Reject("it is causal without a mask, or has a softcap or sinks")
    if linear.bias is not None or linear.before or linear.after:
        return Reject("the linear of its K and V has a bias, or turns its input or result")
    if rope is None or rope.dim() != 4 or known(rope.shape[1]) != 1 or known(x.shape[1]) != 1:
        return Reject("the other part of its key is not one head that all share")
    heads = q.shape[1]
    if any(y.shape[1] != heads for y in (k, v)) or linear.n != heads * rows.per or rows.per != value.per:
        return Reject("it has not a K and a V of the linear for each head of q")
    same = all(
        same_size(a, b) for a, b in zip((*x.shape[:1], x.shape[2]), (*rope.shape[:1], rope.shape[2]), strict=True)
    )
    if not same or len({q.dtype, k.dtype, x.dtype, rope.dtype, linear.dtype}) > 1:
        return Reject("its latents and the other part of its key differ in batch, length or dtype")
    return None


def _between(node: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """Nodes of first operands from ``node`` to before ``end``."""
    while node is not end:
        yield node
        source = source_of(node)
        if source is None:
            return
        node = source


def _only(inside: set[fx.Node], site: AttentionSite, key: _Key) -> Reject | None:
    """Nothing but the attention reads what it computes of the latents, and its key is whole before it is read."""
    for node in inside - {site.node}:
        other = next((user for user in node.users if user not in inside), None)
        if other is not None:
            return Reject(f"{node.name}, of which K or V is made, is read by {other.name} as well")
    order = {node: i for i, node in enumerate(site.node.graph.nodes)}
    first = min(order[node] for node in site.nodes)
    return Reject("its key is written to after it is read") if any(order[node] > first for node in key.path) else None


def _unwritten(leaves: Sequence[fx.Node], inside: set[fx.Node], last: fx.Node, memory: Memory) -> Reject | None:
    """The cache would be read where the result is made, and not where it is read now."""
    for leaf in leaves:
        first = next(node for node in last.graph.nodes if node in inside and leaf in node.all_input_nodes)
        writer = memory.writes.between(leaf, first, last)
        if writer is not None:
            return Reject(f"{leaf.name} is written by {writer} while it is read")
    return None
