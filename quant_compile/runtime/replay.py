"""Run a rewritten graph beside the graph as it was, on the arguments of a call, and compare wherever one stands for the other.

What stands for what is read off the graphs: where a node that both have reads ``b`` in the one and ``a`` in the other, ``a`` stands
for ``b``, whatever a pass meant; results that no such node reads are named by passes (``ir.graph.stand_for``). After each comparison the
rewritten graph goes on with the truth, so that an error shows where it is made and nowhere else. What was not rewritten runs once.
Reads both graphs, writes to copies of what the graph writes to. Runs operations and kernels as they are, without Inductor.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quant_compile.ir.draw import source_of
from quant_compile.ir.errors import VerifyError
from quant_compile.ir.graph import stands_for, target_name
from quant_compile.ir.writes import Writes
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.moe import parse_moe_dispatch
from quant_compile.lowering.select import parse_dispatch
from quant_compile.runtime.truth import ABSORBED_TOLERANCE, TOLERANCE, Truth, error_of, tells

ATTENTION = (kernel_ops.attention, kernel_ops.latent_attention)
KERNELS = (kernel_ops.linear, kernel_ops.moe, kernel_ops.batched, kernel_ops.dequantize)


@dataclass(frozen=True)
class Comparison:
    """One rewrite, replayed.

    Attributes:
        original: name of the node that it stands for.
        names: weights whose products it holds; none: it holds no product.
        what: what ran.
        error: relative, to the truth.
        limit: what it may be.
        source: the model's line.
        attention: it is attention, which holds no weight of its own.
        readers: names of weights whose products read what it is made with.
        telling: the truth is not all zeros, nor all NaN or inf, which other numbers might have been too.
    """

    original: str
    names: tuple[str, ...]
    what: str
    error: float
    limit: float
    source: str
    attention: bool = False
    readers: tuple[str, ...] = ()
    telling: bool = True

    @property
    def holds(self) -> bool:
        """Whether it is as near to the truth as it must be."""
        return self.error <= self.limit

    @property
    def text(self) -> str:
        """What ran, both numbers, and where."""
        at = f", at {self.source}" if self.source else ""
        return f"{self.what} is {self.error:.2e} from the unfused reference on this call's inputs, and may be {self.limit:.1e}{at}"


def replay(
    original: fx.GraphModule,
    rewritten: fx.GraphModule,
    truths: Mapping[fx.Node, Truth],
    inside: frozenset[fx.Node],
    arguments: Sequence[Any],
    planes: Sequence[Tensor],
) -> Iterator[Comparison]:
    """Every comparison, in the order of the rewritten graph.

    Args:
        original: the graph as it was.
        rewritten: the graph after all passes.
        truths: what sites must give, by node of the original.
        inside: nodes that only a site's result needs, which are not run.
        arguments: of the original graph's placeholders.
        planes: of the rewritten graph's, in their order.

    Raises:
        VerifyError: the graph as it was cannot be run node by node.
    """
    links = _links(original.graph, rewritten.graph)
    wanted = Counter(source for sources in links.values() for source in sources)
    truth = _Original(original, truths, inside, arguments, wanted)
    mine = _Rewritten(rewritten, planes, truth, links)
    devices = {value.get_device() for value in arguments if isinstance(value, Tensor) and value.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(sorted(devices)))
        for device in ("cpu", "cuda") if devices else ("cpu",):  # whatever the graph's own autocast leaves behind
            stack.enter_context(torch.autocast(device, enabled=torch.is_autocast_enabled(device)))
        yield from mine.run()
        truth.finish()


def _links(original: fx.Graph, rewritten: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node of the rewritten graph -> the nodes of the original that it stands for; a node that both have stands for itself."""
    named = {node.name: node for node in original.nodes}
    out: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in rewritten.nodes:
        old = named.get(node.name)
        if old is not None and (node.op == "placeholder") == (old.op == "placeholder") and "plane" not in node.meta:
            out.setdefault(node, {})[old] = None
            for mine, theirs in zip(_leaves(node), _leaves(old), strict=False) if _same(node, old) else ():
                if mine.name != theirs.name:
                    out.setdefault(mine, {})[theirs] = None
        label = named.get(stands_for(node) or "")
        if label is not None:
            out.setdefault(node, {})[label] = None
    return {node: list(sources) for node, sources in out.items()}


def _leaves(node: fx.Node) -> list[fx.Node]:
    """All nodes among a node's arguments, in order, as often as they are there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return found


def _same(node: fx.Node, old: fx.Node) -> bool:
    """Whether a node does what its namesake does, perhaps of other values."""
    return (node.op, node.target) == (old.op, old.target) and len(_leaves(node)) == len(_leaves(old))


class _Original:
    """The graph as it was, run as far as it is asked for; sites give their truth."""

    def __init__(
        self,
        gm: fx.GraphModule,
        truths: Mapping[fx.Node, Truth],
        inside: frozenset[fx.Node],
        arguments: Sequence[Any],
        wanted: Mapping[fx.Node, int],
    ) -> None:
        self._run = fx.Interpreter(gm, garbage_collect_values=False)
        self._truths, self._inside = truths, inside
        self._waiting = iter(list(gm.graph.nodes))
        self._left = Counter({node: len(node.users) + wanted.get(node, 0) for node in gm.graph.nodes})
        for truth in truths.values():
            self._left.update(truth.reads)
        writes = Writes(gm.graph)
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), arguments, strict=True):
            written = isinstance(value, Tensor) and writes.anywhere(node) is not None
            self._run.env[node] = value.clone() if written else value
        self.done = set[fx.Node]()
        self.misread: dict[fx.Node, float] = {}
        self.margins: dict[fx.Node, float] = {}

    def value(self, node: fx.Node) -> Any:
        """What a node computes; each comparison asks once."""
        self._until(node)
        found = self._run.env[node]
        self._release((node,))
        return found

    def finish(self) -> None:
        """Run what is left, since contexts that the graph opened end there."""
        self._until(None)

    def _until(self, node: fx.Node | None) -> None:
        while node not in self.done:
            current = next(self._waiting, None)
            if current is None:
                return
            if current.op != "placeholder" and current not in self._inside:
                self._run.env[current] = self._computed(current)
            self.done.add(current)
            if current.op != "placeholder":
                self._release(current.all_input_nodes)

    def _release(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            self._left[node] -= 1
            if self._left[node] <= 0 and node.op != "placeholder":
                self._run.env.pop(node, None)

    def _computed(self, node: fx.Node) -> Any:
        truth = self._truths.get(node)
        try:
            if truth is None:
                return self._run.run_node(node)
            read = self._run.env.__getitem__
            if truth.plain is not None:
                was = self._run.run_node(node)
                with _without_autocast():
                    self.misread[node] = error_of(truth.plain(read), was)
            with _without_autocast():
                found = truth.value(read)
                self.margins[node] = truth.margin(read)
        except Exception as error:
            raise VerifyError(
                f"verify: the graph cannot be replayed at {node.format_node()}: {type(error).__name__}: {error}\n"
                "Fix: verify: false for this model; the rewrites are then not proven."
            ) from error
        self._release(truth.reads)
        return found


def _without_autocast() -> ExitStack:
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


class _Rewritten:
    """The rewritten graph; what both graphs have comes from the other one."""

    def __init__(
        self, gm: fx.GraphModule, planes: Sequence[Tensor], truth: _Original, links: Mapping[fx.Node, list[fx.Node]]
    ) -> None:
        self._run, self._truth, self._links = fx.Interpreter(gm), truth, links
        self._planes = iter(planes)
        self._kernels: dict[fx.Node, list[tuple[str, float]]] = {}

    def run(self) -> Iterator[Comparison]:
        env = self._run.env
        for node in self._run.module.graph.nodes:  # type: ignore[union-attr]
            originals = self._links.get(node, [])
            twin = next((old for old in originals if old.name == node.name and _same(node, old)), None)
            if twin is not None:
                others = [old for old in originals if old is not twin]
                env[node] = self._truth.value(twin)
            elif "plane" in node.meta:
                others, env[node] = [], next(self._planes)
            elif node.op == "output":
                return
            else:
                others, env[node] = originals, self._computed(node)
            for old in others:
                yield from self._compared(node, old)
            for used in self._run.user_to_last_uses.get(node, []):
                env.pop(used, None)

    def _computed(self, node: fx.Node) -> Any:
        failed = [v for n in node.all_input_nodes if isinstance(v := self._run.env.get(n), _Failed)]
        if failed:
            return failed[0]
        try:
            with _without_autocast():
                found = self._run.run_node(node)
                if node.target in KERNELS:
                    self._kernels[node] = list(other_kernels(node, *self._run.fetch_args_kwargs_from_env(node), found))
        except Exception as error:  # what reads it is compared, and refused with this
            return _Failed(f"{type(error).__name__}: {error}")
        return found

    def _compared(self, node: fx.Node, old: fx.Node) -> Iterator[Comparison]:
        wanted = self._truth.value(old)
        got = self._run.env[node]
        made = maker(node)
        names: tuple[str, ...] = tuple(made.meta.get("names", ()))
        attention = made.target in ATTENTION or target_name(made.target) == "scaled_dot_product_attention"
        absorbed = made.target is kernel_ops.latent_attention or "latent" in target_name(made.target)
        limit = (ABSORBED_TOLERANCE if absorbed else TOLERANCE) + self._truth.margins.get(old, 0.0)
        source, telling = next(iter(reversed(source_of(old))), ""), tells(wanted)

        def compared(what: str, error: float, most: float) -> Comparison:
            return Comparison(old.name, names, what, error, most, source, attention, _readers(made), telling)

        what = f"{_label(made)}: {got.reason}," if isinstance(got, _Failed) else _label(made)
        yield compared(what, error_of(got, wanted), limit)
        for kernel, error in self._kernels.pop(made, []):  # from what is itself as far as ``limit`` from the truth
            yield compared(f"{kernel}, which serves other numbers of rows,", error, 2 * limit)
        if (misread := self._truth.misread.pop(old, None)) is not None:
            yield compared("the product as it was matched, in 16 bits,", misread, TOLERANCE)
        self._run.env[node] = wanted


@dataclass(frozen=True)
class _Failed:
    """Stands for what could not be computed."""

    reason: str


def maker(node: fx.Node) -> fx.Node:
    """The node that makes a value: behind slices, views, casts, and parts of several results."""
    while not node.meta.get("names") and node.target not in ATTENTION and node.all_input_nodes:
        if not (node.op == "call_method" or target_name(node.target) in ("getitem", "add")):
            break
        node = node.all_input_nodes[0]
    return node


def _label(node: fx.Node) -> str:
    names = " + ".join(node.meta.get("names", ()))
    ran = target_name(node.target) if node.op == "call_function" else str(node.target)
    if node.target in (kernel_ops.linear, kernel_ops.moe, kernel_ops.batched):
        text = str(next(arg for arg in reversed(node.args) if isinstance(arg, str)))
        ran = (parse_moe_dispatch if node.target is kernel_ops.moe else parse_dispatch)(text).ranges
    planes: Any = node.args[0] if node.args else None
    source = planes[0] if isinstance(planes, list | tuple) and planes else None
    joined = f" behind {target_name(maker_of_input(source).target)}" if isinstance(source, fx.Node) else ""
    return f"{names} by {ran}{joined}" if names else ran


def maker_of_input(node: fx.Node) -> fx.Node:
    """What made a plane of an input, behind parts of several results."""
    while target_name(node.target) == "getitem" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _readers(node: fx.Node) -> tuple[str, ...]:
    """Names of the weights whose kernels read what a node makes, parts of it or codes of it."""
    found: dict[str, None] = {}
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        current = waiting.pop()
        for user in current.users:
            names = user.meta.get("names", ())
            found |= dict.fromkeys(names)
            if not names and user not in seen and (user.op == "call_method" or user.op == "call_function"):
                seen.add(user)
                if target_name(user.target) == "getitem" or "inlined_for" in user.meta:
                    waiting.append(user)
    return tuple(found)


def other_kernels(node: fx.Node, args: Any, kwargs: Any, found: Tensor) -> Iterator[tuple[str, float]]:
    """Each kernel of a node's dispatch that other numbers of rows get: its name, and how far it is from what has run here.

    It gets this call's rows, cut to as many as it serves, or repeated.
    """
    if node.target not in (kernel_ops.linear, kernel_ops.moe) or kwargs:
        return
    is_moe = node.target is kernel_ops.moe
    if is_moe and args[1] is None:  # rows in equal parts, one expert each
        return
    table = (parse_moe_dispatch if is_moe else parse_dispatch)(args[-1]).table
    first: Tensor = args[0][0]
    rows = math.prod(first.shape[:-1])
    if rows == 0 or first.dim() < 2:
        return
    bounds = [bound for bound, _ in table[:-1]]
    ran = {table[bisect_left(bounds, rows)][1]}
    for i, (_, name) in enumerate(table):
        if name in ran:
            continue
        ran.add(name)
        least, most = (bounds[i - 1] + 1 if i else 1), (bounds[i] if i < len(bounds) else rows)
        count = max(least, min(rows, most))
        own = found.reshape(rows, -1)
        y = node.target(*_with_rows(args, rows, count, is_moe))  # type: ignore[operator]
        at = torch.arange(count, device=own.device) % rows
        yield name, error_of(y.reshape(count, -1), own[at])


def _with_rows(args: Sequence[Any], rows: int, count: int, is_moe: bool) -> list[Any]:
    """The arguments of a kernel op for ``count`` rows: those of the call, again and again."""
    at = torch.arange(count, device=args[0][0].device) % rows

    def taken(value: Tensor) -> Tensor:
        if value.dim() < 2:
            return value
        cut = value.reshape(rows, -1)[at]
        columns = value.dim() == 2 and value.shape[1] > 1 and value.stride(0) == 1
        return cut.t().contiguous().t() if columns else cut

    planes = [taken(plane) for plane in args[0]]
    if not is_moe:
        return [planes, *args[1:]]
    router = None if args[2] is None else taken(args[2])
    return [planes, taken(args[1]), router, *args[3:]]
