"""How an operand looks at a Parameter: through which views, in what order of dimensions, and at which slice of it.

Reads a Dynamo graph; what changes values on the way (a factor, a mask, another dtype) is a refusal with the op's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.nn import Parameter

from quant_compile.ir.family import Reject
from quant_compile.ir.operands import Operands, op_of, operands_of

KEEPS = {"contiguous", "detach", "requires_grad_", "clone", "data", "alias"}
CASTS = {"to", "type", "float", "bfloat16", "half", "double"}
SHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
PARTS = {"unbind", "chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split"}
_REVERSED, _LAST_TWO = {"t", "T", "H", "numpy_T", "matrix_H"}, {"mT", "mH", "adjoint"}
_SWAPPED = {"transpose": ("dim0", "dim1"), "swapdims": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1")}
_MOVED = {"moveaxis", "movedim"}
TRANSPOSES = {*_REVERSED, *_LAST_TWO, *_SWAPPED, *_MOVED, "permute"}
# What only looks at a tensor, so that it may vanish when nothing uses it.
VIEWS = {*KEEPS, *CASTS, *SHAPES, *PARTS, *TRANSPOSES, "getitem", "select", "index_select", "narrow"} - {
    "requires_grad_"
}


@dataclass(frozen=True, eq=False)
class Stored:
    """An operand that is a Parameter, or a slice of it.

    Attributes:
        weight: its placeholder.
        shape: what the Parameter is viewed as.
        dims: for each dimension of the operand that of ``shape``; None for one of size 1 that was added.
        index: which slice of dimension 0 it is, a number or a node; None for all of it.
        cast: by what its dtype was changed.
        viewed: by what its dimensions were split or joined.
    """

    weight: fx.Node
    shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    index: Any = None
    cast: str | None = None
    viewed: str | None = None

    @property
    def own(self) -> tuple[int, ...]:
        """The dimensions of ``shape`` that the operand has, in stored order."""
        return tuple(range(0 if self.index is None else 1, len(self.shape)))

    def letters(self, operand: str) -> str | None:
        """Letters of ``own``, given those of the operand's dimensions."""
        by_dim = {dim: letter for dim, letter in zip(self.dims, operand, strict=True) if dim is not None}
        return "".join(by_dim[dim] for dim in self.own) if len(by_dim) == len(self.own) else None


def permutation(name: str, given: Operands, count: int) -> tuple[int, ...] | None:
    """Order in which a transpose of ``count`` dimensions has them, or None for another op or dimensions by name."""
    order = list(range(count))
    try:
        if name in _REVERSED:
            order.reverse()
        elif name in _LAST_TWO:
            order[-2], order[-1] = order[-1], order[-2]
        elif name in _SWAPPED:
            first, second = (given[key] for key in _SWAPPED[name])
            order[first], order[second] = order[second], order[first]
        elif name == "permute":
            order = [order[dim] for dim in given["dims"]]
        elif name in _MOVED:
            order = _moved(given["source"], given["destination"], count)
        else:
            return None
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return tuple(order) if sorted(order) == list(range(count)) else None


def only_turned(node: fx.Node) -> bool:
    """Whether every user turns a value's dimensions at once.

    Any other may go on to ``view`` it, itself or what it makes of it in the same order, for which it must lie as it did.
    """
    return all(user.op != "output" and op_of(user) in TRANSPOSES for user in node.users)


def _moved(source: Any, destination: Any, count: int) -> list[int]:
    come = [dim % count for dim in (source if isinstance(source, list | tuple) else (source,))]
    go = [dim % count for dim in (destination if isinstance(destination, list | tuple) else (destination,))]
    at = dict(zip(go, come, strict=True))
    others = iter(dim for dim in range(count) if dim not in come)
    return [at[i] if i in at else next(others) for i in range(count)]


def stored(node: Any, parameters: Mapping[int, Parameter]) -> Stored | Reject:
    """The Parameter behind an operand, or why it is not read as it is."""
    if not isinstance(node, fx.Node):
        return Reject("an operand is not a tensor of the graph")
    if node.op == "placeholder":
        parameter = parameters.get(node.meta.get("argument", -1))
        if parameter is None:
            return Reject("the weight is not a Parameter")
        shape = tuple(map(int, parameter.shape))
        return Stored(node, shape, tuple(range(len(shape))))
    name, given = op_of(node), operands_of(node)
    computed = Reject(f"the weight is computed by {name} before it is used")
    source = None if given is None else given.get("self")
    if given is None or not isinstance(source, fx.Node):
        return computed
    if name == "getitem" and op_of(source) in PARTS:
        return _part(source, given["index"], parameters) or computed
    below = stored(source, parameters)
    if isinstance(below, Reject):
        return below
    return _step(node, name, given, below) or computed


def _step(node: fx.Node, name: str, given: Operands, below: Stored) -> Stored | None:
    order = permutation(name, given, len(below.dims))
    if order is not None:
        return replace(below, dims=tuple(below.dims[i] for i in order))
    step = _STEPS.get(name)
    return None if step is None else step(node, name, given, below)


def _kept(node: fx.Node, name: str, given: Operands, below: Stored) -> Stored | None:
    return below


def _cast(node: fx.Node, name: str, given: Operands, below: Stored) -> Stored | None:
    before, after = _value(given["self"]), _value(node)
    if before is None or after is None or before.device != after.device or not after.dtype.is_floating_point:
        return None
    return below if before.dtype == after.dtype else replace(below, cast=below.cast or name)


def _reshaped(node: fx.Node, name: str, given: Operands, below: Stored) -> Stored | None:
    before, after = _value(given["self"]), _value(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    old, new = tuple(before.shape), tuple(after.shape)
    if any(isinstance(size, torch.SymInt) for size in new):
        return None
    if below.dims == below.own:
        lead = below.shape[: len(below.shape) - len(below.own)]
        shape = (*lead, *map(int, new))
        same = [size for size in old if size != 1] == [size for size in new if size != 1]
        viewed = below.viewed if same else name
        return replace(below, shape=shape, dims=tuple(range(len(lead), len(shape))), viewed=viewed)
    # Turned already: only dimensions of size 1 may come and go.
    if tuple(size for size in old if size != 1) != tuple(size for size in new if size != 1):
        return None
    kept = iter(dim for dim, size in zip(below.dims, old, strict=True) if size != 1)
    return replace(below, dims=tuple(None if size == 1 else next(kept) for size in new))


def _chosen(node: fx.Node, name: str, given: Operands, below: Stored) -> Stored | None:
    """``w[i]``, ``w[i:i + 1]``, ``w[:, :, None]``, ``w[expert]``: full slices, new dimensions, one slice of dimension 0."""
    items = list(given["index"]) if isinstance(given["index"], tuple | list) else [given["index"]]
    if items.count(Ellipsis) > 1 or any(isinstance(item, torch.Tensor | bool) for item in items):
        return None
    named = sum(item is not None and item is not Ellipsis for item in items)
    rest = [slice(None)] * (len(below.dims) - named)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = rest
    source, dims = iter(below.dims), list[int | None]()
    found = below
    for item in items:
        if item is None:
            dims.append(None)
            continue
        dim = next(source)
        if item == slice(None):
            dims.append(dim)
            continue
        if dim is None and isinstance(item, int):
            continue  # the only one there is
        picked = _index(item, found) if dim == 0 and found.index is None else None
        if picked is None:
            return None
        found = replace(found, index=picked[0])
        dims += [None] * picked[1]
    return replace(found, dims=tuple(dims))


def _index(item: Any, below: Stored) -> tuple[Any, int] | None:
    """(slice of dimension 0, how many dimensions of size 1 it leaves)."""
    count = below.shape[0]
    if isinstance(item, int):
        return (item % count, 0) if -count <= item < count else None
    if isinstance(item, slice):
        first, stop, step = item.indices(count) if _is_plain(item) else (0, 0, 1)
        return (first, 1) if stop - first == 1 and step == 1 else None
    if not isinstance(item, fx.Node):
        return None
    value = item.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        return item, 0
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
        return None
    return (item, value.dim()) if value.dim() <= 1 and all(size == 1 for size in value.shape) else None


def _is_plain(item: slice) -> bool:
    return all(bound is None or isinstance(bound, int) for bound in (item.start, item.stop, item.step))


def _selected(node: fx.Node, name: str, given: Operands, below: Stored) -> Stored | None:
    dim, index = given.get("dim"), given.get("index", given.get("start"))
    if not isinstance(dim, int) or below.dims[dim] != 0 or below.index is not None:
        return None
    if name == "narrow":
        index = slice(index, index + 1) if given.get("length") == 1 and isinstance(index, int) else None
    picked = _index(index, below)
    if picked is None:
        return None
    at = dim % len(below.dims)
    added = (None,) * (picked[1] if name != "select" else 0)
    return replace(below, index=picked[0], dims=(*below.dims[:at], *added, *below.dims[at + 1 :]))


def _part(source: fx.Node, index: Any, parameters: Mapping[int, Parameter]) -> Stored | Reject | None:
    """One of the tensors that ``unbind``, ``chunk`` or ``split`` make of dimension 0, each with one slice."""
    given = operands_of(source) or {}
    whole, parts = given.get("self"), source.meta.get("example_value")
    if not isinstance(whole, fx.Node) or not isinstance(index, int) or not isinstance(parts, tuple | list):
        return None
    below, dim = stored(whole, parameters), given.get("dim", 0)
    if isinstance(below, Reject) or not isinstance(dim, int):
        return below if isinstance(below, Reject) else None
    if below.dims[dim] != 0 or below.index is not None or len(parts) != below.shape[0]:  # pyright: ignore[reportUnknownArgumentType]
        return None
    at = dim % len(below.dims)
    added = () if op_of(source) == "unbind" else (None,)
    return replace(below, index=index % len(parts), dims=(*below.dims[:at], *added, *below.dims[at + 1 :]))  # pyright: ignore[reportUnknownArgumentType]


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


_Step = Callable[[fx.Node, str, Operands, Stored], Stored | None]
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(KEEPS, _kept),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(SHAPES, _reshaped),
    **dict.fromkeys(("select", "index_select", "narrow"), _selected),
    "getitem": _chosen,
}
