"""Which op a call is, and its operands by the names of the op's schema, however they were given: by position, keyword or method.

Reads targets of FX nodes and functions as ``__torch_function__`` sees them; knows nothing of what the ops compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx

Operands = dict[str, Any]
"""Operand by the schema's name; the first tensor is ``self`` in every op. What was left out is not there."""

SAME = {
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",  # its operands are turned round below
    "linalg_matmul": "matmul",
    "imatmul": "matmul",
    "__getitem__": "getitem",
}
# Names that torch's argument parser takes for one of the schema; it has ``input`` for ``self`` in every function.
_OTHER_NAMES = {"input": "self", "x": "self", "a": "self", "x1": "self", "x2": "other", "axis": "dim"}
# Operators take their operands by position alone.
_OPERATORS = {"getitem": ("self", "index"), "matmul": ("self", "other")}


def called(target: Any) -> str:
    """Name of the op that a target calls: ``matmul`` for every way to write it, ``ns::op`` outside of torch's own.

    A function that is not torch's has its qualified name in brackets, so that it is taken for no op of that name.
    """
    if isinstance(target, str):
        name = target
    elif isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        space, _, name = packet._qualified_op_name.partition("::")
        name = name if space == "aten" else f"{space}::{name}"
    else:
        name = getattr(target, "__name__", "") or type(target).__name__
        if name == "__get__":  # a property such as ``Tensor.T``, as __torch_function__ sees it
            name = getattr(getattr(target, "__self__", None), "__name__", name)
        elif not _is_torch(target):
            return f"<{getattr(target, '__module__', '')}.{name}>"
    return SAME.get(name, name)


def _is_torch(target: Any) -> bool:
    if inspect.isfunction(target):
        return (target.__module__ or "").partition(".")[0] == "torch"
    owner = getattr(target, "__objclass__", None) or getattr(target, "__self__", None)
    module = getattr(target, "__module__", None) or getattr(owner, "__module__", None) or ""
    return (
        module.partition(".")[0] in ("torch", "_operator", "operator", "builtins")
        or getattr(owner, "__name__", "") == "torch._C._nn"
    )


def op_of(node: fx.Node) -> str:
    """``called`` of a node; an attribute that is read (``getattr(x, "T")``) is an op of its name."""
    if node.op not in ("call_function", "call_method"):
        return node.op
    if node.target is getattr:
        return str(node.args[1])
    return called(node.target)


def operands_of(node: fx.Node) -> Operands | None:
    """The operands of a node; None where its arguments fit no schema of its op."""
    if node.target is getattr:
        return {"self": node.args[0]}
    return operands(node.target, node.args, node.kwargs)


def operands(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands | None:
    """Operands by name.

    Args:
        target: a function, an overload or a packet of them, or a method's name.
        args, kwargs: as they were given; for a method the first is the tensor itself.
    """
    name = called(target)
    if getattr(target, "__name__", "") == "__get__":
        return {"self": args[0]}
    if name in _OPERATORS and not kwargs and len(args) == 2:
        first, second = args[::-1] if "__rmatmul__" in (target, getattr(target, "__name__", "")) else args
        return dict(zip(_OPERATORS[name], (first, second), strict=True))
    if inspect.isfunction(target):
        return _by_signature(target, args, kwargs)
    for schema in _schemas(name) if not isinstance(target, torch._ops.OpOverload) else (target._schema,):
        bound = _by_schema(schema, args, kwargs)
        if bound is not None:
            return bound
    return None


@lru_cache(maxsize=None)
def _schemas(name: str) -> tuple[Any, ...]:
    """Schemas of all overloads of an op of torch."""
    return tuple(torch._C._jit_get_schemas_for_operator(f"aten::{name}"))


def _by_signature(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands | None:
    try:
        bound = inspect.signature(target).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return None
    if len(bound.get("args", ())) > 1 and isinstance(bound["args"][0], str):  # einsum(*args)
        equation, *tensors = bound.pop("args")
        given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
        bound |= {"equation": equation, "tensors": list(given)}
    return {_OTHER_NAMES.get(key, key): value for key, value in bound.items()}


def _by_schema(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands | None:
    parameters = {argument.name: argument for argument in schema.arguments}
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    given = list(args)
    if len(given) >= len(positional) and positional and _is_sizes(positional[-1]):
        # x.permute(1, 0): what is left over is one list.
        at = len(positional) - 1
        rest = given[at:]
        if all(not isinstance(value, list | tuple) for value in rest) and rest:
            given[at:] = [tuple(rest)]
    if len(given) > len(positional):
        return None
    bound = {argument.name: value for argument, value in zip(positional, given, strict=False)}
    for key, value in kwargs.items():
        key = key if key in parameters else _OTHER_NAMES.get(key, key)
        if key not in parameters or key in bound:
            return None
        bound[key] = value
    required = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    fits = required <= bound.keys() and all(_fits(parameters[key], value) for key, value in bound.items())
    return bound if fits else None


def _is_sizes(argument: Any) -> bool:
    return str(argument.type) in ("List[int]", "List[SymInt]")


def _fits(argument: Any, value: Any) -> bool:
    """Whether a value can be this argument, as far as overloads of one op differ."""
    kind = str(argument.type)
    if value is None:
        return kind.startswith("Optional") or kind == "NoneType"
    kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional") else kind
    if kind == "Tensor":
        return isinstance(value, torch.Tensor | fx.Node)
    if kind == "List[Tensor]":
        return isinstance(value, list | tuple)
    if kind.startswith("List["):
        inner = "str" in kind or "Dimname" in kind
        items = value if isinstance(value, list | tuple) else [value]
        return all(isinstance(item, str) == inner and not isinstance(item, torch.dtype) for item in items)
    if isinstance(value, str):
        return kind == "str" or "Dimname" in kind
    return not isinstance(value, list | tuple) and kind != "str" and not isinstance(value, torch.Tensor)
