"""Find expert blocks in a Dynamo graph: the nodes of one module that multiply by expert weights become one MoE site.

How a block is computed (sorted and grouped, gathered and batched, dense over all experts) differs between models, versions
and devices, so no pattern of ops is matched. The region of the block is run once, in wide floats on the CPU, over
weights of rank one that cost no memory (``ir/probe.py``), and what comes out is compared with the formula of ``ir/moe.py``
for every activation that its constants allow. A block that agrees to the last digits is a site; any other is kept, with
the region's text as part of the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.nn import Parameter

from quant_compile.ir.family import Reject
from quant_compile.ir.moe import Activation
from quant_compile.ir.probe import PRODUCTS, WEIGHT_OPS, Probe, ProbeError, RankOne, name_of, run_region, value_of
from quant_compile.ir.writes import Writes

# Rows of the result that are compared, and how closely (relative, of the largest; f64 and f32 probes).
COMPARED_ROWS = 64
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4}
TEXT_LINES = 60


@dataclass(frozen=True, eq=False)
class MoeSite:
    """An expert block.

    Attributes:
        node: the node that holds its result.
        nodes: all its nodes, in graph order.
        x: tokens [.., H]; flattened to [T, H].
        ids: experts of each token [T, k], None for a dense block (rows in E equal parts, one expert each).
        weights: router weights [T, k] or None.
        w13, w2: placeholders of the weights; b13, b2: of the biases, or None.
        transposed: per weight, whether an expert is stored [k, n].
        interleaved: gate and up rows alternate, instead of all gates first.
        experts, hidden, intermediate, top_k: sizes.
        activation: between the products.
        module_class: class of the block's module.
    """

    node: fx.Node
    nodes: tuple[fx.Node, ...]
    x: fx.Node
    ids: fx.Node | None
    weights: fx.Node | None
    w13: fx.Node
    w2: fx.Node
    b13: fx.Node | None
    b2: fx.Node | None
    transposed: tuple[bool, bool]
    interleaved: bool
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    activation: Activation
    module_class: str

    @property
    def slots(self) -> tuple[int, int]:
        """Positions of both weights among the arguments of Dynamo's graph."""
        return self.w13.meta["argument"], self.w2.meta["argument"]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the result."""
        return self.node.meta["example_value"].dtype


@dataclass(frozen=True, eq=False)
class MoeMiss:
    """A block that is no site: its nodes, the Parameters it reads, and why."""

    nodes: tuple[fx.Node, ...]
    slots: tuple[int, ...]
    reason: str


@dataclass
class Verdicts:
    """What was found out about regions, by their text: the layers of a model are alike, so one probe serves them all."""

    known: dict[Any, _Shape | Reject] = field(default_factory=dict)


@dataclass(frozen=True)
class _Shape:
    """What a probe finds out: positions among the region's inputs, and the formula."""

    x: int
    ids: int | None
    weights: int | None
    w13: int
    w2: int
    b13: int | None
    b2: int | None
    transposed: tuple[bool, bool]
    interleaved: bool
    intermediate: int
    top_k: int
    activation: Activation


def find_experts(
    gm: fx.GraphModule, parameters: Mapping[int, Parameter], verdicts: Verdicts | None = None
) -> tuple[list[MoeSite], list[MoeMiss]]:
    """Expert blocks of a copied Dynamo graph, and blocks that were seen and not understood.

    Args:
        gm: a graph from ``copy_graph``.
        parameters: argument position -> Parameter (or anything with its shape and dtype).
        verdicts: shared between graphs of one model, to probe each kind of block once.
    """
    verdicts = verdicts or Verdicts()
    sites: list[MoeSite] = []
    misses: list[MoeMiss] = []
    for region in _regions(gm.graph, parameters):
        slots = tuple(dict.fromkeys(n.meta["argument"] for n in region.inputs if _is_expert_weight(n, parameters)))
        found = _understand(region, parameters, verdicts)
        if isinstance(found, Reject):
            misses.append(MoeMiss(region.nodes, slots, found.reason))
        else:
            sites.append(found)
    return sites, misses


# --- regions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Region:
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    module_class: str


def _regions(graph: fx.Graph, parameters: Mapping[int, Parameter]) -> Iterator[_Region]:
    """Nodes by the innermost module around all products with a group of expert weights.

    A module that is the compile root has no entry on the stack: then all nodes without a deeper entry are its own.
    """
    users: dict[tuple[str, ...], list[fx.Node]] = {}
    for node in graph.find_nodes(op="placeholder"):
        if _is_expert_weight(node, parameters):
            for user in node.users:
                users.setdefault(_stack(user), []).append(user)
    for stack in users:
        nodes = tuple(
            n for n in graph.nodes if n.op not in ("placeholder", "output") and _stack(n)[: len(stack)] == stack
        )
        inside = set(nodes)
        inputs = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside)
        yield _Region(nodes, tuple(inputs), _class_of(users[stack][0]))


def _stack(node: fx.Node) -> tuple[str, ...]:
    return tuple(node.meta.get("nn_module_stack") or ())


def _class_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "the compiled module"
    entry = list(stack.values())[-1][1]
    return entry.__name__ if isinstance(entry, type) else str(entry).rsplit(".", 1)[-1].rstrip("'>")


def _is_expert_weight(node: fx.Node, parameters: Mapping[int, Parameter]) -> bool:
    """Whether a Parameter [E, n, k] is multiplied by; convolutions and position tables have three dimensions as well."""
    slot = node.meta.get("argument", -1) if node.op == "placeholder" else -1
    found = parameters.get(slot)
    return found is not None and found.dim() == 3 and _reaches_product(node, depth=6)


def _reaches_product(node: fx.Node, depth: int) -> bool:
    for user in node.users:
        name = name_of(user)
        if name in PRODUCTS or "grouped_mm" in name:
            return True
        if depth and name in WEIGHT_OPS and user.args[0] is node and _reaches_product(user, depth - 1):
            return True
    return False


# --- understanding one -----------------------------------------------------------------------------------------------


def _understand(region: _Region, parameters: Mapping[int, Parameter], verdicts: Verdicts) -> MoeSite | Reject:
    inside = set(region.nodes)
    results = [n for n in region.nodes if any(user not in inside for user in n.users)]
    if len(results) != 1 or value_of(results[0]) is None:
        return Reject(f"{region.module_class} returns {len(results)} values; an expert block returns one tensor")
    if not all(isinstance(i.meta.get("example_value"), Tensor | int | torch.SymInt) for i in region.inputs):
        return Reject(f"{region.module_class} reads something that is neither a tensor nor a size")
    writes = Writes(region.nodes[0].graph)
    for given in region.inputs:
        writer = writes.between(given, region.nodes[0], results[0]) if value_of(given) is not None else None
        if writer is not None and given.op != "placeholder":
            return Reject(f"{region.module_class}: its input {given.name} is written by {writer} meanwhile")
    key = _text_key(region)
    if key not in verdicts.known:
        verdicts.known[key] = _probe(region, results[0], parameters)
    found = verdicts.known[key]
    if isinstance(found, Reject):
        return Reject(f"{region.module_class}: {found.reason}\n{region_text(region.nodes)}")
    w13 = region.inputs[found.w13]
    return MoeSite(
        results[0], region.nodes, region.inputs[found.x], _at(region, found.ids), _at(region, found.weights), w13, region.inputs[found.w2],
        _at(region, found.b13), _at(region, found.b2), found.transposed, found.interleaved, w13.meta["example_value"].shape[0],
        int(region.inputs[found.x].meta["example_value"].shape[-1]), found.intermediate, found.top_k, found.activation,
        region.module_class,
    )  # fmt: skip


def _at(region: _Region, i: int | None) -> fx.Node | None:
    return None if i is None else region.inputs[i]


def region_text(nodes: Sequence[fx.Node]) -> str:
    """A block's nodes, one a line, for people."""
    lines = [
        f"  {n.name} = {n.target if isinstance(n.target, str) else getattr(n.target, '__name__', n.target)}{n.args}"
        for n in nodes
    ]
    more = [] if len(lines) <= TEXT_LINES else [f"  ... {len(lines) - TEXT_LINES} more"]
    return "\n".join(lines[:TEXT_LINES] + more)


def _text_key(region: _Region) -> Any:
    """The region's ops, sizes and wiring, without names: equal for equal layers."""
    number = {node: i for i, node in enumerate((*region.inputs, *region.nodes))}

    def plain(argument: Any) -> Any:
        return f"%{number[argument]}" if isinstance(argument, fx.Node) else argument

    body = tuple(
        (str(n.target), str(map_aggregate(n.args, plain)), str(map_aggregate(dict(n.kwargs), plain)))
        for n in region.nodes
    )
    values = [i.meta["example_value"] for i in region.inputs]
    heads = tuple((str(tuple(v.shape)), v.dtype) if isinstance(v, Tensor) else (str(v), "size") for v in values)
    return body, heads


def _probe(region: _Region, result: fx.Node, parameters: Mapping[int, Parameter]) -> _Shape | Reject:
    constants = _constants(region.nodes)
    try:
        # Twice: with hidden values around one, and beyond every constant of the block, so that clamps show.
        probes = [
            run_region(region.nodes, region.inputs, result, parameters, size) for size in (1.0, _beyond(constants))
        ]
    except ProbeError as error:
        return Reject(f"not understood: {error}")
    roles = _roles(region, probes[0])
    if isinstance(roles, Reject):
        return roles
    for interleaved, activation in itertools.product((False, True), _activations(constants)):
        if all(_agrees(probe, roles, interleaved, activation) for probe in probes):
            x, ids, weights, b13, b2 = roles
            first, second = probes[0].products
            return _Shape(
                x, ids, weights, first.slot, second.slot, b13, b2, (first.transposed, second.transposed), interleaved,
                probes[0].inputs[first.slot].rank_one(first.transposed).n // 2, 1 if ids is None else _top_k(probes[0], ids), activation,
            )  # fmt: skip
    return Reject(
        "its activation, or what it does with router weights, is none that is known (silu, gelu, relu, clamped swiglu)"
    )


def _constants(nodes: Sequence[fx.Node]) -> tuple[float, ...]:
    found: dict[float, None] = {}

    def note(value: Any) -> Any:
        if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            found[abs(float(value))] = None
        return value

    for node in nodes:
        if node.target not in ("view", "reshape", "chunk", "unsqueeze", "squeeze", "transpose", "sum"):
            map_aggregate(node.args, note)
            map_aggregate(dict(node.kwargs), note)
    return tuple(value for value in found if 0 < value < 1e4)


def _beyond(constants: Sequence[float]) -> float:
    return 3.0 * max((value for value in constants if not value.is_integer() or value <= 64), default=3.0)


def _activations(constants: Sequence[float]) -> Iterator[Activation]:
    """Plain ones first; then every clamped swiglu that the block's constants can spell."""
    yield from (Activation(kind) for kind in ("silu", "gelu", "gelu_tanh", "relu"))
    infinity = float("inf")
    for alpha, limit, shift in itertools.product((1.0, *constants), (infinity, *constants), (0.0, *constants)):
        if (alpha, limit, shift) != (1.0, infinity, 0.0):
            yield Activation("silu", alpha, limit, shift)


_Roles = tuple[int, int | None, int | None, int | None, int | None]


def _roles(region: _Region, probe: Probe) -> _Roles | Reject:
    """Which input is what, by dtype and shape: (x, ids, weights, b13, b2)."""
    if len(probe.products) != 2:
        return Reject(f"{len(probe.products)} products with expert weights; a block has two")
    first, second = (probe.inputs[p.slot].rank_one(p.transposed) for p in probe.products)
    if first.n % 2 or second.k != first.n // 2:
        return Reject(
            f"the products are {first.n}x{first.k} and {second.n}x{second.k} an expert; "
            "gate and up in one weight are expected"
        )
    found: dict[str, int] = {}
    for i, given in enumerate(probe.inputs):
        if not isinstance(given.value, Tensor):
            continue
        may_be = _may_be(given.value, region.inputs[i].op == "placeholder", first, second)
        role = next((role for role in may_be if role not in found), None)
        if role is None:
            return Reject(f"what input {region.inputs[i].name} {tuple(given.value.shape)} is for is not clear")
        found[role] = i
    if "x" not in found:
        return Reject("no input has the tokens' size")
    return found["x"], found.get("ids"), found.get("weights"), found.get("b13"), found.get("b2")


def _may_be(value: Tensor, is_placeholder: bool, first: RankOne, second: RankOne) -> list[str]:
    """Roles that an input's dtype and shape allow; the probe's result decides whether they are right."""
    if not value.dtype.is_floating_point:
        return ["ids"] if value.dim() == 2 else []
    roles: list[str] = []
    if is_placeholder and value.dim() == 2:
        roles += ["b13"] if value.shape == (first.experts, first.n) else []
        roles += ["b2"] if value.shape == (first.experts, second.n) else []
    roles += ["x"] if value.shape[-1] == first.k else []
    return roles + (["weights"] if value.dim() == 2 else [])


def _top_k(probe: Probe, ids: int) -> int:
    return int(probe.inputs[ids].value.shape[-1])


def _agrees(probe: Probe, roles: _Roles, interleaved: bool, activation: Activation) -> bool:
    """Whether the formula gives what the region gave, on a sample of tokens."""
    x: Tensor = probe.inputs[roles[0]].value
    ids, weights, b13, b2 = (None if i is None else probe.inputs[i].value for i in roles[1:])
    first, second = (probe.inputs[p.slot].rank_one(p.transposed) for p in probe.products)
    rows = x.reshape(-1, x.shape[-1])
    if ids is None:
        if rows.shape[0] % first.experts:
            return False
        ids = torch.arange(first.experts).repeat_interleave(rows.shape[0] // first.experts).unsqueeze(1)
    found = probe.result.reshape(-1, second.n)
    if (
        ids.shape[0] != rows.shape[0]
        or found.shape[0] != rows.shape[0]
        or (weights is not None and weights.shape != ids.shape)
    ):
        return False
    sample = torch.linspace(0, rows.shape[0] - 1, min(COMPARED_ROWS, rows.shape[0])).long()
    scores = None if weights is None else weights[sample]
    wanted = _formula(rows[sample], ids[sample], scores, (first, b13), (second, b2), interleaved, activation)
    error = (wanted - found[sample]).abs().max()
    return bool(error <= CLOSE[found.dtype] * wanted.abs().max())


def _formula(
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    up: tuple[RankOne, Tensor | None],
    down: tuple[RankOne, Tensor | None],
    interleaved: bool,
    activation: Activation,
) -> Tensor:
    flat = ids.reshape(-1)
    hidden = up[0].times(x.repeat_interleave(ids.shape[1], 0), flat)
    hidden = hidden if up[1] is None else hidden + up[1][flat]
    if interleaved:
        hidden = torch.cat((hidden[:, 0::2], hidden[:, 1::2]), -1)
    out = down[0].times(activation(hidden), flat)
    out = out if down[1] is None else out + down[1][flat]
    out = out if weights is None else out * weights.reshape(-1, 1)
    return out.reshape(*ids.shape, -1).sum(1)
