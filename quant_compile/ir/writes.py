"""Which nodes of a Dynamo graph write into a tensor in place, so that no rewrite moves a read across a write.

Views are followed through the storage of the traced values: a write to any alias of a tensor is a write to it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul,
    operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip


class Writes:
    """The in-place writes of a graph as it is now; nodes that are added later are unknown to it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writers: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            for written in _written(node):
                storage = storage_of(written)
                if storage is not None:
                    self._writers.setdefault(storage, []).append(node)

    def replaced(self, old: fx.Node, new: fx.Node) -> None:
        """A node that stands in another's place, and may be asked for."""
        self._position[new] = self._position[old]

    def between(self, x: fx.Node, first: fx.Node, last: fx.Node) -> str | None:
        """Name of a node after ``first`` and before ``last`` that writes into x or an alias of it, or None."""
        start, stop = self._position[first], self._position[last]
        writers = self._writers.get(storage_of(x) or 0, ())
        return next((node.name for node in writers if start < self._position[node] < stop), None)

    def anywhere(self, x: fx.Node) -> str | None:
        """Name of a node that writes into x or an alias of it, or None."""
        return next((node.name for node in self._writers.get(storage_of(x) or 0, ())), None)


def storage_of(node: fx.Node) -> int | None:
    """Identity of the storage behind a node's traced value; None where it has no tensor value."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(value):  # as values are inside of torch.func's transforms
        value = functorch.get_unwrapped(value)
    return value.untyped_storage()._cdata


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that a node writes."""
    if node.op not in ("call_function", "call_method"):
        return
    out = node.kwargs.get("out")
    yield from _nodes(out)
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _nodes(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
    elif _writes_its_first(node):
        yield from _nodes(node.args[0] if node.args else node.kwargs.get("input"))


def _writes_its_first(node: fx.Node) -> bool:
    if node.target in IN_PLACE or _is_inplace(node):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _is_inplace(node: fx.Node) -> bool:
    """Whether ``inplace=True`` is given, by name or by position as torch.nn's activations do."""
    if node.kwargs.get("inplace") is True or not callable(node.target):
        return node.kwargs.get("inplace") is True
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace") is True
    except (TypeError, ValueError):
        return False


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _nodes(item)
