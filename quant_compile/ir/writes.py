"""Which nodes of a Dynamo graph write into a tensor in place, so that no rewrite moves a read across a write.

Views are followed through the storage of the traced values: a write to any alias of a tensor is a write to it.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from quant_compile.ir.inline import bodies_of

IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul,
    operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip


DUNDER = re.compile(r"__(i(add|sub|mul|truediv|floordiv|mod|pow|matmul|and|or|xor|lshift|rshift)|setitem)__$")
# Functions of these write what their names and schemas say; any other that Dynamo was told to leave alone may write what it is given.
KNOWN = ("torch", "_operator", "operator", "math", "builtins", "einops")


class Writes:
    """The in-place writes of a graph as it is now; nodes that are added later are unknown to it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writers: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            for written in written_by(node):
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


def written_by(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that a node writes, or may write."""
    if node.op not in ("call_function", "call_method"):
        return
    yield from _nodes(node.kwargs.get("out"))
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        if _subgraphs_write(node):
            yield from node.all_input_nodes
        return
    schemas = _schemas(node.target)
    for schema in schemas:
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _nodes(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
    if not schemas:
        yield from _written_by_function(node)


def _written_by_function(node: fx.Node) -> Iterator[fx.Node]:
    """What a Python function or a method writes."""
    given = _bound(node)
    if _writes_its_first(node) or node.kwargs.get("inplace") is True or given.get("inplace") is True:
        yield from _nodes(node.args[0] if node.args else node.kwargs.get("input"))
    elif _is_foreign(node.target):
        yield from node.all_input_nodes
    elif given.get("max_norm") is not None:  # an embedding's rows are scaled down where they are
        yield from _nodes(given.get("weight"))


def _schemas(target: Any) -> list[Any]:
    """Schemas of an op; of all overloads where torch has yet to choose one."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name)._schema for name in target.overloads()]
    schema = getattr(target, "_schema", None)
    return [] if schema is None else [schema]


def _subgraphs_write(node: fx.Node) -> bool:
    """Whether the subgraphs of a higher-order op write into anything; one without subgraphs (a Triton launch) is taken to."""
    owner = node.graph.owning_module
    bodies = bodies_of(owner, node).values() if owner is not None else ()
    return not bodies or any(next(written_by(inner), None) is not None for body in bodies for inner in body.graph.nodes)


def _is_foreign(target: Any) -> bool:
    """Whether a node calls a function that neither torch nor a library known to write nothing has made."""
    module = getattr(target, "__module__", None)
    return callable(target) and isinstance(module, str) and module.partition(".")[0] not in KNOWN


def _writes_its_first(node: fx.Node) -> bool:
    if node.target in IN_PLACE:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return DUNDER.fullmatch(name) is not None or (name.endswith("_") and not name.endswith("__"))


def _bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a Python function by name, as torch.nn's take them by position too; empty where it has no signature."""
    signature = _signature(node.target) if callable(node.target) else None
    try:
        return {} if signature is None else signature.bind(*node.args, **node.kwargs).arguments
    except TypeError:
        return {}


@lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _nodes(item)
