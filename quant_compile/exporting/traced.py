"""What ``torch.export`` makes of a model, in the form that the backend's passes read: Dynamo's.

Reads the model and example arguments; changes neither. Node values are called ``example_value``, stacks of modules hold the
modules' identities, and a Parameter that has two names is one argument.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._prims
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from quant_compile.ir.errors import ExportError
from quant_compile.ir.graph import STATIC_INPUT, copy_graph

# Checks of what a call returned while it was traced; they read weights without using them.
CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


# Containers that every process has.
PLAIN = (tuple, list, dict)
# What a module holds besides Parameters.
HELD = (InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Call:
    """Example arguments of a model, and which of their sizes may change.

    Attributes:
        args: by position.
        kwargs: by name.
        dynamic_shapes: as in ``torch.export.export``.
        strict: as in ``torch.export.export``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any = None
    strict: bool = False

    def trace(self, module: nn.Module, name: str, strict: bool = False) -> ExportedProgram:
        """``torch.export.export`` of a module under this call, without gradients.

        Raises:
            ExportError: it cannot be traced, or sizes cannot change as asked; has torch's own words.
        """
        try:
            with torch.no_grad(), _plain_strides():
                return torch.export.export(
                    module, self.args, self.kwargs, dynamic_shapes=self.dynamic_shapes, strict=strict
                )
        except Exception as error:  # torch raises its own, and whatever the model's code raises
            raise ExportError(
                f"torch.export cannot trace {name}: {type(error).__name__}: {error}\n"
                "Fix: change the arguments or dynamic_shapes as it says; strict=True traces by Dynamo, as torch.compile does."
            ) from error

    def check(self, model: nn.Module) -> None:
        """Hold the arguments against the model's signature.

        Raises:
            ExportError: they do not fit.
        """
        try:
            inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise ExportError(
                f"the arguments do not fit {type(model).__name__}.forward: {error}.\n"
                "Fix: args is a tuple of what a call has by position, kwargs a dict of what it has by name."
            ) from None
        for leaf in pytree.tree_leaves((self.args, self.kwargs), is_leaf=_is_foreign):
            if _is_foreign(leaf):
                raise ExportError(
                    f"an argument holds a {type(leaf).__name__}, whose class another process may not have.\n"
                    "Fix: pass tensors, numbers, and tuples, lists and dicts of them; of transformers, use_cache=False."
                )


@contextmanager
def _plain_strides() -> Generator[None]:
    """Let strides of views be products of sizes.

    While torch.export traces, ``min`` of sizes is an expression, in torch's own code too. With torch 2.11 a view of repeated heads then has
    the stride min(64 * length, 128 * length), and a guard on it that is always true is refused as a constraint on ``length``.
    """
    module: Any = torch._prims
    before = vars(module).get("min")
    module.min = _least
    try:
        yield
    finally:
        if before is None:
            del module.min
        else:
            module.min = before


def _least(*values: Any, **more: Any) -> Any:
    """``min``; of two sizes the one that is known to be the smaller, else an expression."""
    if len(values) == 2 and any(isinstance(value, torch.SymInt) for value in values):
        first, second = values
        if statically_known_true(first <= second):
            return first
        return second if statically_known_true(second <= first) else torch.sym_min(first, second)
    return builtins.min(*values, **more)


def _is_foreign(value: Any) -> bool:
    """Whether a part of the arguments is a container of a class of its own, such as a cache."""
    return not isinstance(value, Tensor) and type(value) in pytree.SUPPORTED_NODES and type(value) not in PLAIN


@dataclass(frozen=True, eq=False)
class Traced:
    """A traced model.

    Attributes:
        program: as torch.export made it.
        graph: a copy of its graph as Dynamo would have made it; ``meta["argument"]`` of a placeholder is its position in ``specs``.
        inputs: for each argument the Parameter, else its fake value.
    """

    program: ExportedProgram
    graph: fx.GraphModule
    inputs: tuple[Any, ...]

    @property
    def specs(self) -> list[InputSpec]:
        """What each argument is."""
        return self.program.graph_signature.input_specs

    @staticmethod
    def of(model: nn.Module, call: Call) -> Traced:
        """Trace a model.

        Raises:
            ExportError: it cannot be traced, or takes arguments that no package takes.
        """
        program = call.trace(model, type(model).__name__, call.strict)
        graph = copy_graph(program.graph_module)
        _as_dynamo(graph, model)
        parameters = _parameters(program, model)
        arguments = list(graph.graph.find_nodes(op="placeholder"))
        _join_aliases(arguments, parameters)
        for node, spec in zip(arguments, program.graph_signature.input_specs, strict=True):
            if spec.kind in HELD:
                node.meta["tensor_dict"] = dict(STATIC_INPUT)
        graph.recompile()
        # What nobody reads is no reading of a weight.
        read = {i: value for i, value in parameters.items() if arguments[i].users}
        return Traced(program, graph, tuple(read.get(i, node.meta.get("val")) for i, node in enumerate(arguments)))


def _parameters(program: ExportedProgram, model: nn.Module) -> dict[int, Parameter]:
    """Position of each argument that is a Parameter of the model -> the Parameter itself."""
    known = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, Parameter] = {}
    for i, spec in enumerate(program.graph_signature.input_specs):
        if spec.kind not in (InputKind.USER_INPUT, InputKind.PARAMETER, *HELD):
            raise ExportError(
                f"the program of {type(model).__name__} takes {spec.arg.name}, a {spec.kind.name.lower().replace('_', ' ')}, "
                "which is no tensor.\nFix: export the part of the model that does without it."
            )
        if spec.kind is InputKind.PARAMETER:
            found[i] = known[str(spec.target)]
    return found


def _as_dynamo(gm: fx.GraphModule, model: nn.Module) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in list(gm.graph.nodes):
        if node.target in CHECKS:
            gm.graph.erase_node(node)
            continue
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
        node.meta["nn_module_stack"] = _stack(node, modules)


def _stack(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, Any]]:
    """Identity of each module around a node, below the model itself -> its name and class."""
    stack: dict[str, tuple[str, Any]] = {}
    for name, _ in (node.meta.get("nn_module_stack") or {}).values():
        module = modules.get(name.partition("@")[0])  # a number follows where a module is called again
        if name and module is not None:
            stack[f"{id(module)}{name.partition('@')[2]}"] = (name, type(module))
    return stack


def _join_aliases(arguments: Sequence[fx.Node], parameters: Mapping[int, Parameter]) -> None:
    """All readers of a Parameter read its first argument, as in Dynamo's graphs."""
    first: dict[int, fx.Node] = {}
    for i, parameter in parameters.items():
        node = arguments[i]
        found = first.setdefault(id(parameter), node)
        if found is not node:
            node.replace_all_uses_with(found)
