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
from enum import Enum
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.nn import Parameter

from quant_compile.ir.dispatch import around_block
from quant_compile.ir.family import Reject
from quant_compile.ir.moe import UNGATED, Activation, gates_first
from quant_compile.ir.probe import Probe, ProbeError, RankOne, name_of, number_of, run_region, value_of
from quant_compile.ir.products import PRODUCTS
from quant_compile.ir.sites import Weighted, weighted
from quant_compile.ir.writes import Writes

# Rows of the result that are compared, and how closely (relative, of the largest; f64 and f32 probes).
COMPARED_ROWS, FEW_ROWS = 64, 4
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-5}
# Numbers in a region up to which they may be a limit, a factor or a shift; integers are mostly sizes.
MOST_FLOAT, MOST_INTEGER = 1e30, 64
TEXT_LINES = 60
# Products that take one matrix for each expert; and how many ops may come before one.
BATCHED = {"bmm", "matmul", "baddbmm"}
WEIGHT_STEPS = 12


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
    def up_rows(self) -> int:
        """Rows of an expert's first weight: gate and up, or up alone."""
        return self.intermediate * (2 if self.activation.gated else 1)

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
    gm: fx.GraphModule,
    parameters: Mapping[int, Parameter],
    verdicts: Verdicts | None = None,
    writes: Writes | None = None,
) -> tuple[list[MoeSite], list[MoeMiss]]:
    """Expert blocks of a copied Dynamo graph, and blocks that were seen and not understood.

    Args:
        gm: a graph from ``copy_graph``.
        parameters: argument position -> Parameter, or this rank's part of it.
        verdicts: of copies of this graph that were looked through before; layers of one graph share them anyway.
        writes: of this graph, where they are known.
    """
    verdicts = verdicts or Verdicts()
    writes = writes or Writes(gm.graph)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    readers, experts = _readers(gm.graph, parameters, writes)
    if not readers:
        return [], []
    sites: list[MoeSite] = []
    misses: list[MoeMiss] = []
    taken: set[fx.Node] = set()
    # Deepest first: what an inner module's block took is no part of an outer one.
    for stack in sorted(_modules(readers, order), key=len, reverse=True):
        own = [
            node for at, nodes in readers.items() if at[: len(stack)] == stack for node in nodes if node not in taken
        ]
        if not own:
            continue
        region = _region(
            gm.graph, stack, own, taken, {node: parameters[node.meta["argument"]].shape[0] for node in experts}
        )
        found = _understand(region, parameters, verdicts, writes)
        if isinstance(found, MoeSite):
            sites.append(found)
            taken |= set(region.nodes)
            misses = [miss for miss in misses if not taken.issuperset(miss.nodes)]
        elif stack in readers:
            slots = tuple(dict.fromkeys(n.meta["argument"] for n in region.weights))
            # Only what reads its expert weights: a linear inside the block's module can still be quantized.
            nodes = tuple(node for node in readers[stack] if node not in taken)
            misses.append(MoeMiss(nodes, slots, f"{region.module_class} {found.reason}\n{region_text(region.nodes)}"))
    return sorted(sites, key=lambda site: order[site.node]), misses


# --- regions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Region:
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    module_class: str


_Stack = tuple[str, ...]


class _Reads(Enum):
    """What a product makes of a Parameter of three dimensions."""

    NOTHING = 0  # a linear, a convolution, activations: no experts
    MAYBE = 1  # one product with all of it, which may be experts or the heads of an attention
    EXPERTS = 2  # one matrix for each row or batch


def _readers(
    graph: fx.Graph, parameters: Mapping[int, Parameter], writes: Writes
) -> tuple[dict[_Stack, dict[fx.Node, None]], set[fx.Node]]:
    """By module: every node between an expert weight and its products, these included; and the expert weights.

    The module is the one that reads the weight first. A compile root has no entry on the stack. What a weight is follows from
    its products: one that reaches none (a position embedding), or is a linear's or a convolution's, is none of experts.
    """
    paths: dict[fx.Node, list[tuple[_Reads, fx.Node, dict[fx.Node, None]]]] = {}
    for node in graph.find_nodes(op="placeholder"):
        parameter = parameters.get(node.meta.get("argument", -1))
        if parameter is not None and parameter.dim() == 3:
            for user in node.users:
                path: dict[fx.Node, None] = {}
                reads = _reached(user, node, parameters, path, writes)
                if reads is not _Reads.NOTHING:
                    paths.setdefault(node, []).append((reads, user, path))
    sure = {n for n, found in paths.items() if any(reads is _Reads.EXPERTS for reads, _, _ in found)}
    counts = {parameters[n.meta["argument"]].shape[0] for n in sure}
    # Where some weights are one matrix for each of E experts, a product with all of another's E slices belongs to them.
    experts = {n for n in paths if n in sure or parameters[n.meta["argument"]].shape[0] in counts}
    readers: dict[_Stack, dict[fx.Node, None]] = {}
    for node in paths:
        for _, user, path in paths[node] if node in experts else ():
            readers.setdefault(_stack(user), {}).update(path)
    return readers, experts


def _reached(
    node: fx.Node, weight: fx.Node, parameters: Mapping[int, Parameter], path: dict[fx.Node, None], writes: Writes
) -> _Reads:
    """What multiplies a value made of weights and indices alone, if anything does; notes the nodes on the way."""
    name = name_of(node)
    if name in PRODUCTS or "grouped_mm" in name:
        reads = _reads_of(node, name, weight, parameters, writes)
        if reads is not _Reads.NOTHING:
            path[node] = None
        return reads
    floats = [i for i in node.all_input_nodes if (v := value_of(i)) is not None and v.dtype.is_floating_point]
    if node.op == "output" or len(path) > WEIGHT_STEPS or not all(_is_of_weights(i, parameters, path) for i in floats):
        return _Reads.NOTHING
    own = {**path, node: None}
    most = _Reads.NOTHING
    for user in node.users:
        if user not in own:
            most = max(most, _reached(user, weight, parameters, own, writes), key=lambda reads: reads.value)
    if most is not _Reads.NOTHING:
        path.update(own)
    return most


def _reads_of(node: fx.Node, name: str, weight: fx.Node, parameters: Mapping[int, Parameter], writes: Writes) -> _Reads:
    """By the product's letters, where it reads the Parameter as it is; of what is computed of it, by the op."""
    found = weighted(node, parameters, writes)
    if not isinstance(found, Weighted):
        batched = "grouped_mm" in name or name in BATCHED or (found is None and name == "einsum")
        return _Reads.EXPERTS if batched else _Reads.NOTHING
    if found.stored.weight is not weight or not found.over_experts:
        return _Reads.NOTHING
    if found.stored.index is not None or found.each == found.letters[0] or name in BATCHED:
        return _Reads.EXPERTS
    return _Reads.NOTHING if found.each else _Reads.MAYBE


def _is_of_weights(node: fx.Node, parameters: Mapping[int, Parameter], path: Mapping[fx.Node, None]) -> bool:
    return node in path or (node.op == "placeholder" and node.meta.get("argument", -1) in parameters)


def _modules(readers: Mapping[_Stack, Mapping[fx.Node, None]], order: Mapping[fx.Node, int]) -> set[_Stack]:
    """Modules that may be a block: those that read an expert weight, and what neighbours of them have in common.

    (Each product may be in a module of its own.)
    """
    stacks = sorted(readers, key=lambda stack: min(order[node] for node in readers[stack]))
    common = {tuple(a for a, _ in takewhile(_equal, zip(one, two, strict=False))) for one, two in pairwise(stacks)}
    return {*stacks, *common}


def _equal(pair: tuple[str, str]) -> bool:
    return pair[0] == pair[1]


def _region(
    graph: fx.Graph, stack: _Stack, readers: Sequence[fx.Node], taken: set[fx.Node], experts: Mapping[fx.Node, int]
) -> _Region:
    """All nodes of a module and of the modules inside it, but for those of blocks that were found, and what ranks tell one another."""
    nodes = tuple(
        n
        for n in graph.nodes
        if n.op not in ("placeholder", "output") and _stack(n)[: len(stack)] == stack and n not in taken
    )
    outside = around_block(nodes, set(readers), set(experts.values()))
    nodes = tuple(n for n in nodes if n not in outside)
    shared = _shared_numbers(nodes)
    nodes = tuple(n for n in nodes if n not in shared)
    inside = set(nodes)
    inputs = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside)
    weights = tuple(i for i in inputs if i in experts)
    return _Region(nodes, tuple(inputs), weights, _class_of(readers[0], len(stack)))


def _shared_numbers(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Sizes that are computed in a region of what lies outside, and read outside too: they stay where they are.

    Dynamo computes each size of symbols once, in the module that needs it first; the same module of later layers reads it.
    """
    inside, read = set(nodes), set[fx.Node]()
    for node in reversed(nodes):
        number = isinstance(node.meta.get("example_value"), torch.SymInt)
        if number and any(user not in inside or user in read for user in node.users):
            read.add(node)
    shared = set[fx.Node]()
    for node in nodes:
        if node in read and all(i not in inside or i in shared for i in node.all_input_nodes):
            shared.add(node)
    return shared


def _stack(node: fx.Node) -> _Stack:
    return tuple(node.meta.get("nn_module_stack") or ())


def _class_of(node: fx.Node, depth: int) -> str:
    """Class of the module at a depth of a node's stack."""
    if depth == 0:
        return "the compiled module"
    entry = list(node.meta["nn_module_stack"].values())[depth - 1][1]
    return entry.__name__ if isinstance(entry, type) else str(entry).rsplit(".", 1)[-1].rstrip("'>")


# --- understanding one -----------------------------------------------------------------------------------------------


def _understand(
    region: _Region, parameters: Mapping[int, Parameter], verdicts: Verdicts, writes: Writes
) -> MoeSite | Reject:
    inside = set(region.nodes)
    results = [n for n in region.nodes if any(user not in inside for user in n.users)]
    problem = _problem_of(region, results, parameters, writes)
    if problem is not None:
        return Reject(problem)
    key = _text_key(region)
    if key not in verdicts.known:
        verdicts.known[key] = _probe(region, results[0], parameters)
    found = verdicts.known[key]
    if isinstance(found, Reject):
        return found
    for node in (*region.inputs, *region.nodes):
        # What the block was compared with holds for these numbers alone: Dynamo is to check them at each call.
        symbol = node.meta.get("example_value")
        if isinstance(symbol, torch.SymFloat):
            float(symbol)
    w13 = region.inputs[found.w13]
    site = MoeSite(
        results[0], region.nodes, region.inputs[found.x], _at(region, found.ids), _at(region, found.weights), w13, region.inputs[found.w2],
        _at(region, found.b13), _at(region, found.b2), found.transposed, found.interleaved, w13.meta["example_value"].shape[0],
        int(region.inputs[found.x].meta["example_value"].shape[-1]), found.intermediate, found.top_k, found.activation,
        region.module_class,
    )  # fmt: skip
    if leading_sizes(site) is None:
        return Reject("returns a tensor with sizes that none of its inputs has")
    return site


def leading_sizes(site: MoeSite) -> list[int | fx.Node | tuple[fx.Node, int]] | None:
    """All sizes of the result but the last: numbers, nodes of them, or (tensor or shape, dimension); one may be -1."""
    inside = set(site.nodes)
    known: dict[str, Any] = {}
    for node in (i for n in site.nodes for i in n.all_input_nodes if i not in inside):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            known[str(value)] = node
        elif isinstance(value, torch.Size):
            known |= {str(size): (node, i) for i, size in enumerate(value)}
    known |= {str(size): (site.x, i) for i, size in enumerate(site.x.meta["example_value"].shape)}
    value = site.node.meta["example_value"]
    sizes = [size if isinstance(size, int) else known.get(str(size), -1) for size in value.shape[:-1]]
    return sizes if sizes.count(-1) <= 1 else None


def _problem_of(
    region: _Region, results: Sequence[fx.Node], parameters: Mapping[int, Parameter], writes: Writes
) -> str | None:
    """Why a region is no block, as far as that shows without running it; so no probe runs half a model."""
    weights = region.weights
    experts = {parameters[n.meta["argument"]].shape[0] for n in weights}
    if len(weights) != 2 or len(experts) != 1:
        return f"reads {len(weights)} expert weights; a block has two: gate and up in one, and down"
    if len(results) != 1:
        return f"returns {len(results)} values; an expert block returns one tensor"
    if value_of(results[0]) is None:
        return "returns no tensor; an expert block returns one"
    for given in region.inputs:
        parameter = parameters.get(given.meta.get("argument", -1)) if given.op == "placeholder" else None
        if parameter is not None and (parameter.dim() not in (2, 3) or parameter.shape[0] not in experts):
            return f"reads {given.name} {tuple(parameter.shape)}, which is neither weight nor bias of {min(experts)} experts"
        if parameter is not None and not parameter.dtype.is_floating_point:
            return f"reads {given.name}, which is {str(parameter.dtype).removeprefix('torch.')}, not floating point"
        if not isinstance(given.meta.get("example_value"), Tensor | int | torch.SymInt | torch.SymFloat | torch.Size):
            return "reads something that is neither a tensor nor a number"
        writer = writes.between(given, region.nodes[0], results[0]) if value_of(given) is not None else None
        if writer is not None:
            return f"reads {given.name}, into which {writer} writes meanwhile"
    return None


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
    values = [number_of(i) or i.meta["example_value"] for i in region.inputs]
    heads = tuple((str(tuple(v.shape)), v.dtype) if isinstance(v, Tensor) else (str(v), "size") for v in values)
    return body, heads


def _probe(region: _Region, result: fx.Node, parameters: Mapping[int, Parameter]) -> _Shape | Reject:
    constants = _constants(region)
    try:
        # Twice: with hidden values around one, and beyond every constant of the block, so that clamps show.
        probes = [
            run_region(region.nodes, region.inputs, result, parameters, region.weights, size)
            for size in (1.0, _beyond(constants))
        ]
    except ProbeError as error:
        return Reject(f"is not understood: {error}")
    roles = _roles(region, probes[0], parameters)
    if isinstance(roles, Reject):
        return roles
    found = _best(probes, roles, constants)
    if found is None and roles[3:] != (None, None):
        # Where 2 I = H both biases have one shape, and the order of their use need not be theirs.
        roles = (*roles[:3], roles[4], roles[3])
        found = _best(probes, roles, constants)
    if found is None:
        return Reject(
            "is not understood: its activation, or what it does with router weights, is none that is known "
            "(silu, gelu, relu, clamped swiglu)"
        )
    interleaved, activation = found
    x, ids, weights, b13, b2 = roles
    first, second = probes[0].products
    return _Shape(
        x, ids, weights, first.slot, second.slot, b13, b2, (first.transposed, second.transposed), interleaved,
        probes[0].inputs[second.slot].rank_one(second.transposed).k, 1 if ids is None else _top_k(probes[0], ids), activation,
    )  # fmt: skip


def _best(probes: Sequence[Probe], roles: _Roles, constants: Sequence[float]) -> tuple[bool, Activation] | None:
    """Order of gate and up, and activation, that come closest, if close enough: in f32 some activations are neighbours."""
    close = CLOSE[probes[0].result.dtype]
    best, least = None, close
    up, down = (probes[0].inputs[p.slot].rank_one(p.transposed) for p in probes[0].products)
    gated = up.n == 2 * down.k
    candidates = _activations(constants) if gated else (Activation(kind, gated=False) for kind in UNGATED)
    for interleaved, activation in itertools.product((False, True) if gated else (False,), candidates):
        if _error(probes[0], roles, interleaved, activation, FEW_ROWS) > close:
            continue
        error = max(_error(probe, roles, interleaved, activation, COMPARED_ROWS) for probe in probes)
        if error < least or (best is None and error <= least):
            best, least = (interleaved, activation), error
    return best


def _constants(region: _Region) -> tuple[float, ...]:
    """Magnitudes of the numbers in a region that an activation may contain: any float, small integers."""
    found: dict[float, None] = {}

    def note(value: Any) -> Any:
        limit = MOST_FLOAT if isinstance(value, float) else MOST_INTEGER
        if isinstance(value, float | int) and not isinstance(value, bool) and 0 < abs(value) <= limit:
            found[abs(float(value))] = None
        return value

    for node in region.inputs:
        note(number_of(node))
    for node in region.nodes:
        if node.target not in ("view", "reshape", "chunk", "unsqueeze", "squeeze", "transpose", "sum"):
            map_aggregate(node.args, note)
            map_aggregate(dict(node.kwargs), note)
    return tuple(found)


def _beyond(constants: Sequence[float]) -> float:
    return 3.0 * max(constants, default=3.0)


def _activations(constants: Sequence[float]) -> Iterator[Activation]:
    """Plain ones first; then every clamped swiglu that the block's constants can spell."""
    yield from (Activation(kind) for kind in ("silu", "gelu", "gelu_tanh", "relu"))
    infinity = float("inf")
    for alpha, limit, shift in itertools.product((1.0, *constants), (infinity, *constants), (0.0, *constants)):
        if (alpha, limit, shift) != (1.0, infinity, 0.0):
            yield Activation("silu", alpha, limit, shift)


_Roles = tuple[int, int | None, int | None, int | None, int | None]


def _roles(region: _Region, probe: Probe, parameters: Mapping[int, Parameter]) -> _Roles | Reject:
    """Which input is what, by dtype and shape: (x, ids, weights, b13, b2)."""
    if len(probe.products) != 2:
        return Reject(f"has {len(probe.products)} products with expert weights; a block has two")
    first, second = (probe.inputs[p.slot].rank_one(p.transposed) for p in probe.products)
    if first.n not in (second.k, 2 * second.k):
        return Reject(
            f"has products of {first.n}x{first.k} and {second.n}x{second.k} an expert; "
            "gate and up in one weight are expected, or up alone"
        )
    if second.n != first.k:
        return Reject(f"returns {second.n} values for a token of {first.k}")
    found: dict[str, int] = {}
    for i, given in enumerate(probe.inputs):
        if not isinstance(given.value, Tensor) or number_of(region.inputs[i]) is not None:
            continue
        node = region.inputs[i]
        is_parameter = node.op == "placeholder" and node.meta.get("argument", -1) in parameters
        may_be = _may_be(given.value, is_parameter, first, second)
        role = next((role for role in may_be if role not in found), None)
        if role is None:
            return Reject(f"has an input {node.name} {tuple(given.value.shape)} whose meaning is not clear")
        found[role] = i
    if "x" not in found:
        return Reject("has no input of the tokens' size")
    return found["x"], found.get("ids"), found.get("weights"), found.get("b13"), found.get("b2")


def _may_be(value: Tensor, is_parameter: bool, first: RankOne, second: RankOne) -> list[str]:
    """Roles that an input's dtype and shape allow; the probe's result decides whether they are right."""
    if not value.dtype.is_floating_point:
        return ["ids"] if value.dim() == 2 else []
    roles: list[str] = []
    if is_parameter:
        roles += ["b13"] if value.shape == (first.experts, first.n) else []
        roles += ["b2"] if value.shape == (first.experts, second.n) else []
        return roles
    roles += ["x"] if value.shape[-1] == first.k else []
    return roles + (["weights"] if value.dim() == 2 else [])


def _top_k(probe: Probe, ids: int) -> int:
    return int(probe.inputs[ids].value.shape[-1])


def _error(probe: Probe, roles: _Roles, interleaved: bool, activation: Activation, most: int) -> float:
    """How far the formula is from what the region gave, on up to ``most`` tokens: relative, of the largest; inf: it cannot be."""
    x: Tensor = probe.inputs[roles[0]].value
    ids, weights, b13, b2 = (None if i is None else probe.inputs[i].value for i in roles[1:])
    first, second = (probe.inputs[p.slot].rank_one(p.transposed) for p in probe.products)
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if ids is None and count % first.experts == 0:
        ids = torch.arange(first.experts).repeat_interleave(count // first.experts).unsqueeze(1)
    found = probe.result
    biases = ((b13, first), (b2, second))
    if any(bias is not None and bias.shape != (weight.experts, weight.n) for bias, weight in biases):
        return float("inf")
    if ids is None or ids.shape[0] != count or found.shape[-1] != second.n or found.numel() != count * second.n:
        return float("inf")
    if count == 0 or (weights is not None and weights.shape != ids.shape):
        return float("inf")
    found = found.reshape(-1, second.n)
    most = min(most, count)
    sample = torch.arange(most) * (count - 1) // max(1, most - 1)
    scores = None if weights is None else weights[sample]
    wanted = _formula(rows[sample], ids[sample], scores, (first, b13), (second, b2), interleaved, activation)
    error = float((wanted - found[sample]).abs().max() / wanted.abs().max())
    return error if error == error else float("inf")


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
        hidden = gates_first(hidden, 1)
    out = down[0].times(activation(hidden), flat)
    out = out if down[1] is None else out + down[1][flat]
    out = out if weights is None else out * weights.reshape(-1, 1)
    return out.reshape(*ids.shape, -1).sum(1)
