"""Join a sum over ranks with what follows it: the residual add, the RMSNorm, and the codes of each token; else the sum alone.

Reads ``_c10d_functional.all_reduce`` nodes and what their results go into, at small sizes that are known, where the plan says that the
ranks share memory. Writes ``sglq_kernels.all_reduce``. Leaves alone sums of other sizes, and all of them where the plan has no answer.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from quant_compile.ir import ops
from quant_compile.ir.dispatch import COLLECTIVES
from quant_compile.ir.family import Reject
from quant_compile.ir.graph import is_view, stand_for, verify
from quant_compile.ir.operands import op_of
from quant_compile.ir.scheme import parse
from quant_compile.ir.sums import GROUP
from quant_compile.ir.writes import Writes, storage_of
from quant_compile.lowering import collectives
from quant_compile.lowering.symmetric import group_of
from quant_compile.passes.fuse_input import CASTS, NormSite, erase_unused, find_norm, residual_terms
from quant_compile.passes.plan import PassReport, Plan

KERNEL = "by one kernel"


@dataclass(frozen=True, eq=False)
class Sum:
    """A sum over ranks in a graph.

    Attributes:
        node: the collective.
        part: what this rank adds.
        group: name of the process group.
        steps: the nodes that only carry the sum on: the wait, and a copy back into the part.
        readers: nodes that read the sum, in graph order.
        holders: the nodes that they read it from.
    """

    node: fx.Node
    part: fx.Node
    group: str
    steps: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    holders: tuple[fx.Node, ...]

    @property
    def last(self) -> fx.Node:
        """After it the sum is there."""
        return self.steps[-1]


@dataclass(frozen=True, eq=False)
class Chain:
    """What follows a sum: views of it, the residual add, and the norm, whose result is ``y``."""

    views: tuple[fx.Node, ...]
    add: fx.Node
    residual: fx.Node
    norm: NormSite
    y: fx.Node


def fuse_all_reduce(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Rewrite every sum that the plan allows."""
    report = PassReport("fuse_all_reduce")
    if plan.sums is None and plan.coded is None:
        return gm, report
    graph = gm.graph
    nodes = [node for node in graph.nodes if op_of(node) in (f"{COLLECTIVES}all_reduce", f"{COLLECTIVES}all_reduce_")]
    if not nodes:
        return gm, report
    context = _Context(graph)
    for node in nodes:
        label, found = _label(node), context.sum_of(node)
        done = found if isinstance(found, Reject) else _rewrite(graph, found, context, plan)
        if isinstance(done, Reject):
            report.refused.append(f"{label}: {done.reason}")
        else:
            report.rewrote.append(f"{label}: {done}")
    return verify(gm, "quantized"), report


def sums_in_words(report: PassReport) -> list[str]:
    """What became of the sums of a graph, as the ledger says it: how many of each kind, and why."""
    ours = Counter(line.partition(": ")[2] for line in report.rewrote)
    others = Counter(line.partition(": ")[2] for line in report.refused)
    found = [f"sums over ranks: {count} {what}" for what, count in ours.items()]
    return found + [f"sums over ranks: {count} by torch's collective: {why}" for why, count in others.items()]


def _rewrite(graph: fx.Graph, found: Sum, context: _Context, plan: Plan) -> str | Reject:
    """One kernel for a sum and what follows it, or codes; says what was done, or why nothing."""
    value = found.part.meta["example_value"]
    refusal = (
        Reject("the policy's `fuse` does not ask for one kernel")
        if plan.sums is None
        else plan.sums(value, found.group)
    )
    if refusal is not None and plan.coded is not None:
        refusal = _not_coded(found, value)
        if refusal is None:
            given = (plan.coded, found.group, group_of(found.group).size())
            _instead(graph, found, lambda: graph.call_function(ops.all_reduce, (found.part, *given)))
            return f"by {plan.coded} codes with a scale for each {GROUP} values"
    if refusal is not None:
        return refusal
    chain = context.chain_of(found)
    if isinstance(chain, Reject):
        _alone(graph, found)
        return f"{KERNEL}, alone, since {chain.reason}"
    return f"{KERNEL}, {_joined(graph, found, chain, context.writes)}"


def _not_coded(found: Sum, value: Tensor) -> Reject | None:
    """Why codes of a part are not sent: embeddings and what else is no quantized product keep their precision."""
    if not value.is_floating_point():
        return Reject(f"it adds {str(value.dtype).removeprefix('torch.')}, of which there are no codes")
    return None if _names(found.part) else Reject("it adds no quantized products, and is not sent in codes")


def _names(part: Any) -> tuple[str, ...]:
    """The weights whose product a part is."""
    while isinstance(part, fx.Node) and (is_view(part) or op_of(part) in CASTS) and "names" not in part.meta:
        part = part.args[0]
    return tuple(part.meta.get("names", ())) if isinstance(part, fx.Node) else ()


def _label(node: fx.Node) -> str:
    """The weights whose products are added, else the node's name."""
    return " + ".join(_names(node.args[0])) or node.name


class _Context:
    """A graph as it was before the pass changes it: positions, writes, norms by what they are of."""

    def __init__(self, graph: fx.Graph) -> None:
        self.writes = Writes(graph)
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._by_storage: dict[int, list[fx.Node]] = {}
        self._norms: dict[fx.Node, tuple[fx.Node, NormSite]] = {}
        for node in graph.nodes:
            storage = storage_of(node)
            if storage is not None:
                self._by_storage.setdefault(storage, []).append(node)
            if (norm := find_norm(node)) is not None:
                self._norms.setdefault(norm.x, (node, norm))

    def sum_of(self, node: fx.Node) -> Sum | Reject:
        """A collective with its wait, and where its sum is read."""
        part, how, group, *_ = (*node.args, None, None)
        group = getattr(group, "group_name", group)
        waits = [user for user in node.users if op_of(user) == f"{COLLECTIVES}wait_tensor"]
        if not isinstance(part, fx.Node) or how != "sum" or not isinstance(group, str):
            return Reject(f"it is no sum over a named group ({how})")
        if len(waits) != 1 or len(node.users) != 1:
            return Reject("its result is not waited for by one node")
        copies = [user for user in waits[0].users if op_of(user) == "copy_" and user.args[:2] == (part, waits[0])]
        in_place = bool(copies) or op_of(node).endswith("_")
        steps = (waits[0], *copies)
        holders = (*steps, part) if in_place else steps
        if in_place and (reason := self._shared(part, node, steps)):
            return Reject(reason)
        readers = {
            user: None
            for holder in holders
            for user in holder.users
            if user is not node and user not in steps and (holder is not part or self._at(user) > self._at(steps[-1]))
        }
        return Sum(node, part, group, steps, tuple(sorted(readers, key=self._at)), holders)

    def _at(self, node: fx.Node) -> int:
        return self._position.get(node, len(self._position))

    def _shared(self, part: fx.Node, node: fx.Node, steps: tuple[fx.Node, ...]) -> str | None:
        """Who else would see that the sum is written over the part."""
        for other in self._by_storage.get(storage_of(part) or 0, ()):
            if self._at(other) >= self._at(node):  # a view that was made later is one of the sum
                continue
            if other.op == "placeholder":
                return f"it is written over {other}, an input of the graph"
            late = [user for user in other.users if self._at(user) > self._at(node) and user not in steps]
            if other is not part and late:
                return f"it is written over {other}, which {late[0]} reads"
            if any(self._at(user) < self._at(steps[-1]) for user in late):
                return f"{late[0]} reads its result before it is complete"
        return None

    def chain_of(self, found: Sum) -> Chain | Reject:
        """What can be joined with a sum."""
        views: list[fx.Node] = []
        k = found.part.meta["example_value"].shape[-1]
        holders, readers = found.holders, found.readers
        while len(readers) == 1 and is_view(readers[0]) and _keeps_rows(readers[0], k):
            views.append(readers[0])
            holders, readers = (readers[0],), tuple(readers[0].users)
        if len(readers) != 1:
            return Reject(f"{len(readers)} nodes read it")
        add = readers[0]
        residual = [term for term in residual_terms(add) if term not in holders]
        if len(residual) != 1:
            return Reject(f"{add} is no addition to a tensor of its shape")
        y, norm = self._norms.get(add, (None, None))
        if y is None or norm is None:
            return Reject("no RMSNorm that the kernel knows follows the addition")
        reason = self._obstacle(found, add, norm, y)
        return Reject(reason) if reason else Chain(tuple(views), add, residual[0], norm, y)

    def _obstacle(self, found: Sum, add: fx.Node, norm: NormSite, y: fx.Node) -> str | None:
        if isinstance(norm.eps, fx.Node):
            return "the norm's eps is an input of the graph"
        for tensor, first, last in ((found.part, found.last, add), (add, add, y), (norm.weight, add, y)):
            writer = self.writes.between(tensor, first, last)
            if writer is not None:
                return f"{tensor} is written by {writer}"
        quantized = [node for node in _quantizations(y)]
        if quantized and _codes_of(y) is None:
            return f"{quantized[0].args[1]} quantizes otherwise than per token to 8 bits"
        return None


def _keeps_rows(view: fx.Node, k: Any) -> bool:
    """Whether a view by numbers alone leaves the last dimension as it is."""
    value = view.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == k and len(view.all_input_nodes) == 1


def _quantizations(y: fx.Node) -> Iterator[fx.Node]:
    """What quantizes y, or a view of it that has the same rows."""
    k = y.meta["example_value"].shape[-1]
    for user in list(y.users):
        if user.target is ops.quantize:
            yield user
        elif is_view(user) and _keeps_rows(user, k):
            yield from _quantizations(user)


def _codes_of(y: fx.Node) -> str | None:
    """The first scheme under which y is quantized that the kernel quantizes to."""
    specs = (str(node.args[1]) for node in _quantizations(y))
    return next((spec for spec in specs if collectives.makes_codes(parse(spec))), None)


def _alone(graph: fx.Graph, found: Sum) -> None:
    arguments = (found.part, None, None, 0.0, "", "", False, found.group)

    def made() -> fx.Node:
        return graph.call_function(operator.getitem, (graph.call_function(collectives.all_reduce, arguments), 0))

    _instead(graph, found, made)


def _instead(graph: fx.Graph, found: Sum, make: Callable[[], fx.Node]) -> None:
    """Another node in place of a sum and its wait."""
    with graph.inserting_before(found.node):
        total = make()
    total.meta = dict(found.steps[0].meta)
    for reader in found.readers:
        for holder in found.holders:
            reader.replace_input_with(holder, total)
    _erase(graph, found)


def _erase(graph: fx.Graph, found: Sum) -> None:
    for node in (*reversed(found.steps), found.node):
        graph.erase_node(node)


def _joined(graph: fx.Graph, found: Sum, chain: Chain, writes: Writes) -> str:
    """One node for the sum and its chain; says what it is."""
    spec = _codes_of(chain.y) or ""
    served = [node for node in _quantizations(chain.y) if node.args[1] == spec]
    norm, part = chain.norm, found.part
    with graph.inserting_before(chain.add):
        for view in chain.views:
            moved = graph.node_copy(view, lambda _, part=part: part)
            part = moved
        arguments = (part, chain.residual, norm.weight, norm.eps, norm.weighting, spec, True, found.group)
        results = graph.call_function(collectives.all_reduce, arguments)
        total, rows = (graph.call_function(operator.getitem, (results, i)) for i in range(2))
        planes = [graph.call_function(operator.getitem, (results, 2 + i)) for i in range(2 if spec else 0)]
    _put(total, chain.add)
    writes.replaced(chain.add, total)
    for node in served:
        _read_planes(graph, node, planes, chain.y)
    _put(rows, chain.y)
    erase_unused(graph, chain.y)
    for node in (chain.add, *reversed(chain.views)):
        graph.erase_node(node)
    _erase(graph, found)
    if not rows.users:  # all that read the normed rows read their codes
        graph.erase_node(rows)
        results.update_arg(6, False)
        for i, plane in enumerate(planes):
            plane.update_arg(1, 1 + i)
    return f"with the residual add, the RMSNorm{f' and the codes of {spec}' if spec else ''}"


def _put(new: fx.Node, old: fx.Node) -> None:
    new.meta = dict(old.meta)
    stand_for(new, old)
    old.replace_all_uses_with(new)


def _read_planes(graph: fx.Graph, node: fx.Node, planes: list[fx.Node], y: fx.Node) -> None:
    """Let the readers of a quantization read planes, in the form of what it quantized."""
    source: Any = node.args[0]
    value: Tensor = source.meta["example_value"]
    lead = tuple(int(size) for size in value.shape[:-1])
    sizes = (int(value.shape[-1]), 1)
    shaped: list[Any] = list(planes)
    if source is not y:
        with graph.inserting_before(node):
            shaped = [
                graph.call_method("view", (plane, *lead, last)) for plane, last in zip(planes, sizes, strict=True)
            ]
    for plane, last, dtype in zip(shaped, sizes, collectives.plane_dtypes(str(node.args[1])), strict=True):
        plane.meta["example_value"] = value.new_empty((*lead, last), dtype=dtype)
    for user in list(node.users):
        user.args = tuple(shaped if argument is node else argument for argument in user.args)
    graph.erase_node(node)
    while source is not y and not source.users:
        source, unused = source.args[0], source
        graph.erase_node(unused)
