"""The account of a graph: every place that reads a matrix Parameter, and what kind of reading it is.

Sites are what matchers know. This file knows no pattern: it follows each Parameter forward through whatever is computed of weights
alone, up to the nodes where it meets an activation or leaves the graph. A place that is no site is named, so that a matcher that
misses one, or is turned off, lowers the coverage instead of raising it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from quant_compile.ir.graph import copy_graph
from quant_compile.ir.inline import ATTENTION, bodies_of
from quant_compile.ir.probe import name_of, value_of
from quant_compile.ir.writes import storage_of, written_by


class Use(Enum):
    """How a node uses a weight."""

    PRODUCT = "product"  # multiplied by activations and summed
    OPAQUE = "opaque"  # given to something that may multiply by it: a recurrence, a subgraph
    RETURNED = "returned"  # leaves the graph
    TABLE = "table"  # rows are looked up in it
    CONVOLUTION = "convolution"
    OTHER = "other"  # scaled, added, compared, or given to an op that nobody here knows

    @property
    def multiplies(self) -> bool:
        """Whether the weight counts as one of a linear, whatever module holds it."""
        return self in (Use.PRODUCT, Use.OPAQUE)


@dataclass(frozen=True, eq=False)
class Read:
    """A node that reads a Parameter, or what was made of it.

    Attributes:
        node: the node.
        slot: position of the Parameter among the arguments of Dynamo's graph.
        use: how.
        reason: for the ledger.
    """

    node: fx.Node
    slot: int
    use: Use
    reason: str


PRODUCTS = {
    *(
        "linear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "addbmm",
        "mv",
        "addmv",
        "inner",
        "dot",
    ),
    *(
        "einsum",
        "tensordot",
        "chain_matmul",
        "multi_dot",
        "bilinear",
        "scaled_dot_product_attention",
        "grouped_mm",
        "_scaled_mm",
    ),
    *("vdot", "vecdot", "cdist", "kron", "outer", "ger", "addr", "_addmm_activation", "sparse_mm"),
}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
TABLES = {
    "embedding",
    "embedding_bag",
    "index_select",
    "gather",
    "take",
    "take_along_dim",
    "index",
    "getitem",
    "__getitem__",
}
CASTS = {
    "to",
    "type",
    "type_as",
    "_to_copy",
    "view_as",
    "reshape_as",
    "expand_as",
}  # a second tensor gives a dtype or a shape
MIXES = {"mul", "add", "sub", "div", "truediv", "where", "masked_fill", "__mul__", "__add__", "__sub__", "__truediv__"}


def account(
    gm: fx.GraphModule,
    parameters: Mapping[int, Any],
    sites: Iterable[tuple[fx.Node, int]],
    blocks: Collection[fx.Node],
    experts: Collection[int] = (),
) -> list[Read]:
    """Every reading of a matrix Parameter that is no site, in graph order.

    Args:
        gm: a graph from ``copy_graph``.
        parameters: argument position -> Parameter.
        sites: (node, slot) of linears and products over all experts.
        blocks: all nodes of expert blocks.
        experts: slots of their weights.
    """
    known = set(sites)
    results = {node for node, _ in known} | set(blocks)
    matrices = {slot for slot, parameter in parameters.items() if parameter.dim() > 1}
    made: _Made = {}
    by_storage: dict[int, list[fx.Node]] = {}
    reads: list[Read] = []
    for node in gm.graph.nodes:
        if node in results:
            made[node] = _beside(node, made)
            others = _weights_at(node, made) & matrices
            reads += [
                Read(node, s, Use.OTHER, f"an input of {plain_name(node)}")
                for s in sorted(others)
                if (node, s) not in known and s not in experts
            ]
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            made[node] = None
            reads += _inside(gm, node, made, parameters)
        else:
            made[node], use = _step(node, made, parameters)
            if use is not None:
                slots = _weights_at(node, made, use) & matrices
                reads += [
                    Read(node, slot, use, _made_before(node, slot, made) or _reason(node, use))
                    for slot in sorted(slots)
                ]
        _fill(node, made, by_storage)
    return reads


def _fill(node: fx.Node, made: _Made, by_storage: dict[int, list[fx.Node]]) -> None:
    """A tensor that weights are written into (``buffer.copy_(weight)``) is made of them from then on, under all its names."""
    storage = storage_of(node)
    if storage is not None:
        by_storage.setdefault(storage, []).append(node)
    targets = list(written_by(node))
    if not targets:
        return
    given = frozenset[int]().union(*(made.get(i) or () for i in node.all_input_nodes if i not in targets))
    for target in targets if given else ():
        for alias in by_storage.get(storage_of(target) or 0, ()):
            if made.get(alias) is not None:
                made[alias] = (made[alias] or frozenset()) | given


def _made_before(node: fx.Node, slot: int, made: _Made) -> str | None:
    """The reason where a product multiplies by something that was made of the weight."""
    if plain_name(node) not in PRODUCTS:
        return None
    operand = next(i for i in node.all_input_nodes if slot in (made.get(i) or ()))
    if operand.op == "placeholder":
        return None
    return f"{plain_name(node)} multiplies by what {plain_name(operand)} makes of it, not by the weight"


def _beside(node: fx.Node, made: _Made) -> frozenset[int] | None:
    """What a site's value is made of: its other operand is an input, but in a product of two weights."""
    if plain_name(node) in ("linear", "conv1d") or any(made.get(i) is None for i in node.all_input_nodes):
        return None
    return frozenset[int]().union(*(made.get(i) or () for i in node.all_input_nodes))


_Made = dict[fx.Node, frozenset[int] | None]  # Parameters that a value is made of; None: of activations too


def _inside(gm: fx.GraphModule, node: fx.Node, made: _Made, parameters: Mapping[int, Any]) -> list[Read]:
    """What the subgraphs of a higher-order op read."""
    operands = [
        leaf for leaf in pytree.tree_leaves(node.args) if not (isinstance(leaf, fx.Node) and leaf.op == "get_attr")
    ]
    reads: dict[tuple[int, Use], Read] = {}
    plain: set[int] = set()
    for body in bodies_of(gm, node).values():
        inputs = list(body.graph.find_nodes(op="placeholder"))
        given = operands[len(operands) - len(inputs) :] if inputs else []
        fits = len(given) == len(inputs)
        held = {
            i: parameters[slot]
            for i, operand in enumerate(given)
            if fits and isinstance(operand, fx.Node) and (slot := operand.meta.get("argument", -1)) in parameters
        }
        for read in account(copy_graph(body), held, (), ()):
            slot = given[read.slot].meta["argument"]
            inner = "whose subgraphs are not rewritten" if read.use.multiplies else read.reason
            reason = f"read inside of {_op(node)} ({plain_name(read.node)}), {inner}"
            reads[slot, read.use] = Read(node, slot, read.use, reason)
        plain |= {given[i].meta["argument"] for i in held}
    for source in node.all_input_nodes:
        for slot in (made.get(source) or frozenset()) - plain:
            if parameters[slot].dim() > 1:
                reads[slot, Use.OPAQUE] = Read(node, slot, Use.OPAQUE, _reason(node, Use.OPAQUE))
    return list(reads.values())


def _op(node: fx.Node) -> str:
    return node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else plain_name(node)


def _step(node: fx.Node, made: _Made, parameters: Mapping[int, Any]) -> tuple[frozenset[int] | None, Use | None]:
    """What a node's value is made of, and how it reads the weights among its inputs."""
    if node.op == "placeholder":
        slot = node.meta.get("argument", -1)
        return (frozenset((slot,)) if slot in parameters else _static(node)), None
    if node.op == "output":
        return None, Use.RETURNED
    inputs = node.all_input_nodes
    weights = frozenset[int]().union(*(made.get(i) or () for i in inputs))
    if node.op == "call_module":
        return None, Use.OPAQUE if weights else None
    if all(made.get(i) is not None for i in inputs if not _is_number(i)):
        return weights, None
    return _meets(node, made, weights) if weights else (None, None)


def _meets(node: fx.Node, made: _Made, weights: frozenset[int]) -> tuple[frozenset[int] | None, Use | None]:
    """A node of which some inputs are made of weights alone and others are not."""
    name = plain_name(node)
    first = node.all_input_nodes[0]
    if name in CASTS:
        return made.get(first), None
    if name in PRODUCTS:
        return None, Use.PRODUCT
    if name in RECURRENT or name in ATTENTION:
        return None, Use.OPAQUE
    if "conv" in name:
        return None, Use.PRODUCT if _has_one_tap(node, made) else Use.CONVOLUTION
    if name in TABLES:
        # One matrix of many is still a weight; one row of a matrix is a look-up.
        table = next(i for i in node.all_input_nodes if made.get(i))
        value = value_of(table)
        return (weights, None) if name != "embedding" and value is not None and value.dim() > 2 else (None, Use.TABLE)
    if name in MIXES and any(_keeps_shape(i, node, made) for i in node.all_input_nodes):
        return weights, None
    summed = any(plain_name(user) in ("sum", "mean") for user in node.users)
    return None, Use.PRODUCT if summed and name in ("mul", "__mul__") else Use.OTHER


def _has_one_tap(node: fx.Node, made: _Made) -> bool:
    """Whether a convolution's kernel has one position, so that it is a linear."""
    kernels = [v for i in node.all_input_nodes if made.get(i) and (v := value_of(i)) is not None and v.dim() > 2]
    return bool(kernels) and all(size == 1 for size in kernels[0].shape[2:])


def _keeps_shape(source: fx.Node, mixed: fx.Node, made: _Made) -> bool:
    """Whether a matrix is still one after something was mixed into it (a mask, a scale); activations plus a table are none."""
    before, after = value_of(source), value_of(mixed)
    others = [i for i in mixed.all_input_nodes if i is not source]
    smaller = all(
        (v := value_of(i)) is None or before is None or v.dim() < before.dim() or made.get(i) is not None
        for i in others
    )
    return (
        bool(made.get(source))
        and before is not None
        and after is not None
        and before.dim() == 2
        and (before.shape == after.shape and smaller)
    )


def _weights_at(node: fx.Node, made: _Made, use: Use | None = None) -> frozenset[int]:
    """Slots of the weights among a node's inputs."""
    if use is Use.RETURNED:
        # A Parameter as it is belongs to whoever asked for it; what was computed of one is on its way to a product.
        sources: list[Any] = [
            i for i in node.all_input_nodes if i.op != "placeholder" and (v := value_of(i)) is not None and v.dim() > 1
        ]
    elif plain_name(node) == "scaled_dot_product_attention":
        sources = [i for i in node.args[:3] if isinstance(i, fx.Node)]
    else:
        sources = list(node.all_input_nodes)
    return frozenset[int]().union(*(made.get(i) or () for i in sources))


def _static(node: fx.Node) -> frozenset[int] | None:
    """Buffers and numbers go with weights; inputs of the call do not."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return frozenset()
    return frozenset() if (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") else None


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.Size | torch.dtype | torch.device)


def plain_name(node: fx.Node) -> str:
    """Name of the op without overload and namespace: ``linear`` for ``aten.linear.default`` as for ``F.linear``."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        name = schema.name.partition("::")[2]
        return "grouped_mm" if "grouped_mm" in name else name
    return name_of(node).removeprefix("linalg_")


def _reason(node: fx.Node, use: Use) -> str:
    name = plain_name(node)
    if use is Use.RETURNED:
        return "what is computed of the weight leaves the compiled graph, and is used outside of it"
    if use is Use.OPAQUE and isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"read by {_op(node)}, whose subgraphs are not rewritten"
    if use is Use.OPAQUE:
        return f"read by {name}, which is one op for torch"
    return {
        Use.PRODUCT: f"{name} over this weight is no linear that is known",
        Use.TABLE: f"rows are looked up in it ({name})",
        Use.CONVOLUTION: f"the kernel of {name}",
        Use.OTHER: f"read by {name}",
    }[use]
