"""A rewritten graph with its planes, made a program of its own: planes are buffers, what nobody reads is gone.

Kernel ops become what they run where that is operations of torch alone (``Kernel.portable``); others stay calls of
``sglq_kernels``, which a process has that imports quant_compile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import count
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from quant_compile.exporting.exported import KernelUse
from quant_compile.exporting.traced import PLAIN, Call, Traced
from quant_compile.ir.family import Reject
from quant_compile.lowering import ops
from quant_compile.lowering.moe import parse_moe_dispatch
from quant_compile.lowering.registry import kernels
from quant_compile.lowering.select import Dispatch, parse_dispatch
from quant_compile.lowering.trace import fresh, tracing

INSIDE = "its code is Python of this package"


def portable(dispatch: Dispatch) -> Reject | None:
    """Whether a program may hold all kernels of a dispatch as operations of torch; else which may not, and why."""
    for name in dict.fromkeys(name for _, name in dispatch.table):
        ask = kernels()[name].portable
        refusal = Reject(INSIDE) if ask is None else ask(dispatch.problem)
        if refusal is not None:
            return Reject(f"{name}: {refusal.reason}")
    return None


class Linear(nn.Module):
    """What ``sglq_kernels.linear`` computes, in operations of torch; for a symbolic m one branch for each kernel.

    Args:
        dispatch: the op's.
        places: kernel -> positions of its planes among those that a call gets.
        given: the input may lie in memory of the caller's, which begins anywhere; kernels read with aligned loads.
    """

    def __init__(self, dispatch: Dispatch, places: Mapping[str, tuple[int, ...]], given: bool) -> None:
        super().__init__()
        self.dispatch, self.places, self.given = dispatch, dict(places), given

    def forward(self, x: list[Tensor], w: list[Tensor], bias: Tensor | None) -> Tensor:
        """Planes of the input, and of the weight for all kernels -> [..., n]."""
        m: Any = math.prod(x[0].shape[:-1])
        with tracing(None):
            return self._range(m, self.dispatch.table, x, w, bias)

    def _range(
        self, m: Any, table: Sequence[tuple[int, str]], x: list[Tensor], w: list[Tensor], bias: Tensor | None
    ) -> Tensor:
        (bound, name), *rest = table
        if not rest or (isinstance(m, int) and m <= bound):
            return self._run(name, x, w, bias)
        if isinstance(m, int):
            return self._range(m, rest, x, w, bias)
        first, end = len(x), len(x) + len(w)

        def split(given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
            return list(given[:first]), list(given[first:end]), given[end] if len(given) > end else None

        def small(*given: Tensor) -> tuple[Tensor]:
            return (self._run(name, *split(given)),)

        def large(*given: Tensor) -> tuple[Tensor]:
            return (self._range(m, rest, *split(given)),)

        # The op below torch.cond, which would trace this package's code by Dynamo; it takes and gives flat tuples.
        (y,) = torch.ops.higher_order.cond(m <= bound, small, large, (*x, *w, *(() if bias is None else (bias,))))
        return y

    def _run(self, name: str, x: list[Tensor], w: list[Tensor], bias: Tensor | None) -> Tensor:
        own = [w[i] for i in self.places[name]]
        if self.given:
            x = [fresh(x[0]), *x[1:]]
        return ops.run_linear(kernels()[name], self.dispatch.problem, x, own, bias)


def uses_of(graph: fx.Graph) -> tuple[KernelUse, ...]:
    """What runs in a lowered graph; the weights of one dispatch together."""
    found: dict[tuple[str, str], list[str]] = {}
    for node in graph.nodes:
        if getattr(node.target, "namespace", None) == "sglq_kernels":
            found.setdefault(_use(node), []).extend(node.meta.get("names", ()))
    return tuple(KernelUse(runs, tuple(names), reason) for (runs, reason), names in found.items())


def _use(node: fx.Node) -> tuple[str, str]:
    """Kernels, and why they need this package."""
    if node.target is ops.linear:
        dispatch = parse_dispatch(str(node.args[-1]))
        refusal = portable(dispatch)
        return dispatch.ranges, "" if refusal is None else refusal.reason
    if node.target is ops.dequantize:
        layout = parse_dispatch(str(node.args[-1])).layout
        return "dequantize", "" if layout == "rows" else f"{layout} is unpacked by this package"
    if node.target is ops.moe:
        runs = parse_moe_dispatch(str(node.args[-1])).ranges
    elif node.target is ops.batched:
        runs = parse_dispatch(str(node.args[-1])).ranges
    else:
        runs = str(node.target).removeprefix("sglq_kernels.").removesuffix(".default")
    return runs, INSIDE


def exported_program(
    traced: Traced, graph: fx.GraphModule, planes: Sequence[Tensor], model: nn.Module, call: Call
) -> tuple[ExportedProgram, dict[str, tuple[str, ...]]]:
    """The program of a graph that the passes have rewritten, and each buffer that is a plane -> its weights.

    Args:
        traced: what the graph was made of.
        graph: rewritten.
        planes: of its plane placeholders, in order.
        model: holds what else the graph reads.
        call: that the model was traced with.

    Raises:
        ExportError: the rewritten graph cannot be traced under the sizes that are asked for.
    """
    builder = _Builder(traced, graph, planes, model)
    return call.trace(builder.module(), f"the quantized {type(model).__name__}"), builder.made


class _Builder:
    """Copies a lowered graph: arguments that the model holds and planes become attributes, arguments of a call stay."""

    def __init__(self, traced: Traced, source: fx.GraphModule, planes: Sequence[Tensor], model: nn.Module) -> None:
        self.traced, self.source, self.planes, self.model = traced, source, planes, model
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.made: dict[str, tuple[str, ...]] = {}

    def module(self) -> fx.GraphModule:
        """A module with the model's signature."""
        self._arguments()
        self._attributes()
        for node in self.source.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._of))
            elif node.op != "placeholder":
                self.nodes[node] = self._copied(node)
        self.graph.set_codegen(self._signature())
        return fx.GraphModule(self.root, self.graph)

    def _signature(self) -> Any:
        """The model's, with results of plain classes alone: another process may not have the model's."""
        codegen = copy(self.traced.program.module(check_guards=False).graph._codegen)
        info: Any = codegen.pytree_info  # type: ignore[attr-defined]
        codegen.pytree_info = info._replace(out_spec=_plain(info.out_spec))  # type: ignore[attr-defined]
        return codegen

    def _of(self, node: fx.Node) -> fx.Node:
        return self.nodes[node]

    def _arguments(self) -> None:
        """All arguments of a call, those that nobody reads too."""
        placeholders = self.source.graph.find_nodes(op="placeholder")
        arguments = {node.meta["argument"]: node for node in placeholders if "plane" not in node.meta}
        for i, spec in enumerate(self.traced.specs):
            if spec.kind is InputKind.USER_INPUT:
                made = self.graph.placeholder(spec.arg.name)
                if i in arguments:
                    self.nodes[arguments[i]] = made

    def _attributes(self) -> None:
        """Planes, and what the model holds, as far as something reads it."""
        planes = iter(self.planes)
        for node in self.source.graph.find_nodes(op="placeholder"):
            plane = next(planes) if "plane" in node.meta else None
            if not node.users or node in self.nodes:
                continue
            if plane is None:
                self.nodes[node] = self.graph.get_attr(self._held(self.traced.specs[node.meta["argument"]]))
            else:
                weights = tuple(node.meta["parameter"].split(" + "))
                self.nodes[node] = self._plane(weights, node.name.rpartition("__")[2].removesuffix("_joined"), plane)

    def _plane(self, weights: tuple[str, ...], label: str, plane: Tensor) -> fx.Node:
        name = _free(self.root, f"{joined(weights)}_{label}")
        _holder(self.root, name).register_buffer(name.rpartition(".")[2], plane.detach())
        self.made[name] = weights
        return self.graph.get_attr(name)

    def _held(self, spec: InputSpec) -> str:
        name = str(spec.target)
        holder, last = _holder(self.root, name), name.rpartition(".")[2]
        if spec.kind is InputKind.PARAMETER:
            value = self.model.get_parameter(name)
            holder.register_parameter(last, Parameter(value.detach(), requires_grad=False))
        elif spec.kind is InputKind.BUFFER and spec.persistent:
            holder.register_buffer(last, self.model.get_buffer(name).clone())  # which a program may write to
        else:
            constant: Any = self.traced.program.constants[name]
            holder.register_buffer(last, constant, persistent=False)
        return name

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            name = str(node.target)  # the body of a higher-order op
            setattr(_holder(self.root, name), name.rpartition(".")[2], attrgetter(name)(self.source))
        if node.target is ops.dequantize and not _use(node)[1]:
            return self.graph.call_function(ops.dequantized, *fx.map_arg((node.args, dict(node.kwargs)), self._of))
        if node.target is not ops.linear or _use(node)[1]:
            return self.graph.node_copy(node, self._of)
        return self._linear(node, parse_dispatch(str(node.args[-1])))

    def _linear(self, node: fx.Node, dispatch: Dispatch) -> fx.Node:
        given: Any = fx.map_arg(node.args[:-1], self._of)
        x, w, bias = given
        names: tuple[str, ...] = tuple(node.meta["names"])
        planes, places = list(w), dict[str, tuple[int, ...]]()
        for kernel in dict.fromkeys(kernel for _, kernel in dispatch.table):
            at = list(range(len(w)))
            keep = kernels()[kernel].kept
            if keep is not None:
                before = tuple(attrgetter(plane.target)(self.root) for plane in w)
                for i, (old, new) in enumerate(zip(before, keep(before), strict=True)):
                    if new is not old:
                        at[i] = len(planes)
                        planes.append(self._plane(names, f"{w[i].target.rpartition('_')[2]}_of_{kernel}", new))
            places[kernel] = tuple(at)
        name = _free(self.root, f"{joined(names)}_product")
        module = Linear(dispatch, places, self._is_given(node))
        _holder(self.root, name).add_module(name.rpartition(".")[2], module)
        return self.graph.call_module(name, (x, planes, bias))

    def _is_given(self, node: fx.Node) -> bool:
        """Whether a kernel's input may be an argument's memory, as far as calls with one input may return it."""
        x: Any = node.args[0]
        source: fx.Node = x[0]
        while len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        return source.op == "placeholder"


def _plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """A structure with a dict in place of each class that has names for its parts (``ModelOutput``), a tuple in place of others."""
    if spec.is_leaf():
        return spec
    children = [_plain(child) for child in spec.children()]
    if spec.type in PLAIN:
        return pytree.TreeSpec(spec.type, spec.context, children)
    names = _names(spec.context, len(children))
    return pytree.TreeSpec(tuple, None, children) if names is None else pytree.TreeSpec(dict, names, children)


def _names(context: Any, count: int) -> list[str] | None:
    """What a class calls its parts, as transformers' outputs and dataclasses tell torch; None where it has no names."""
    for found in (context, context[0] if isinstance(context, list) and context else None):
        if isinstance(found, list) and len(found) == count and all(isinstance(name, str) for name in found):
            return list(found)
    return None


def joined(weights: Sequence[str]) -> str:
    """One dotted name for the planes of several weights: ``model.layers.0.mlp.gate_proj_up_proj.weight``."""
    parts = [name.split(".") for name in weights]
    if len(parts) == 1:
        return weights[0]
    first = parts[0]
    ending = first[-1:] if all(len(p) > 1 and p[-1] == first[-1] for p in parts) else []
    middles = [p[: len(p) - len(ending)] for p in parts]
    same = 0
    while all(len(p) > same + 1 and p[same] == first[same] for p in middles):
        same += 1
    return ".".join([*first[:same], "_".join("_".join(p[same:]) for p in middles), *ending])


def _holder(root: nn.Module, name: str) -> nn.Module:
    """The module that an attribute of a dotted name belongs to, made where it is not there."""
    for part in name.split(".")[:-1]:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


def _free(root: nn.Module, name: str) -> str:
    """The name, or with a number where an attribute has it."""
    head, _, last = name.rpartition(".")
    holder = _holder(root, name)
    found = next(text for i in count() if not hasattr(holder, text := f"{last}_{i}" if i else last))
    return f"{head}.{found}" if head else found
