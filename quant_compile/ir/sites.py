"""Find the places of a Dynamo graph that can be quantized, and say of every other linear-like node why it cannot.

Reads a copied Dynamo graph and the Parameter objects behind its placeholders; changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from quant_compile.ir.family import Reject

LINEAR: set[Any] = {torch._C._nn.linear, F.linear, torch.ops.aten.linear.default}  # type: ignore[attr-defined]
ADDMM = {torch.addmm, torch.ops.aten.addmm.default}
MATMUL = {torch.matmul, torch.mm, operator.matmul, torch.ops.aten.mm.default, torch.ops.aten.matmul.default}
OTHER_PRODUCTS: set[Any] = {
    *(torch.bmm, torch.baddbmm, torch.addbmm, torch.mv, torch.addmv, torch.inner, torch.chain_matmul, F.bilinear),
    *(torch.einsum, torch.functional.einsum, torch.tensordot, torch.functional.tensordot),
}
METHODS = {"matmul": "matmul", "__matmul__": "matmul", "mm": "matmul", "addmm": "addmm"}
OTHER_METHODS = {"bmm", "baddbmm", "mv", "addmv", "inner", "addbmm"}
GROUPED = {"_grouped_mm", "grouped_mm", "scaled_grouped_mm"}
MIXES: set[Any] = {
    operator.mul,
    operator.add,
    operator.sub,
    operator.truediv,
    torch.mul,
    torch.add,
    torch.sub,
    torch.div,
    torch.where,
}
MIX_METHODS = {"mul", "add", "sub", "div", "masked_fill"}
KEEPS_VALUES = {"contiguous", "detach", "requires_grad_"}


@dataclass(frozen=True, eq=False)
class LinearSite:
    """A linear over a Parameter.

    Attributes:
        node: the node that computes it.
        x: its input [..., k].
        weight: placeholder of the Parameter.
        bias: bias node [n] or None.
        n: output features.
        k: input features.
        transposed: the Parameter is stored [k, n].
        flipped: the node computes weight @ x, so input and output are transposed.
        module_class: class of the innermost module around the node.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    n: int
    k: int
    transposed: bool
    flipped: bool
    module_class: str | None

    @property
    def slot(self) -> int:
        """Position of the weight among the arguments of Dynamo's graph."""
        return self.weight.meta["argument"]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the result (autocast included)."""
        return self.node.meta["example_value"].dtype


@dataclass(frozen=True, eq=False)
class Miss:
    """A linear-like node that reads a Parameter and is no site, with the reason."""

    node: fx.Node
    slots: tuple[int, ...]
    reason: str


def find_sites(
    gm: fx.GraphModule, parameters: Mapping[int, torch.nn.Parameter], taken: Collection[fx.Node] = ()
) -> tuple[list[LinearSite], list[Miss]]:
    """Sites and misses of a copied Dynamo graph.

    Args:
        gm: a graph from ``copy_graph``.
        parameters: argument position -> Parameter.
        taken: nodes that belong to expert blocks.
    """
    sites: list[LinearSite] = []
    misses: list[Miss] = []
    for node in gm.graph.nodes:
        matcher = _matcher(node)
        if matcher is None or node in taken:
            continue
        slots = _parameter_slots(node, parameters)
        if not slots:
            continue
        found = matcher(node, parameters)
        if isinstance(found, Reject):
            misses.append(Miss(node, slots, found.reason))
        else:
            sites.append(found)
    return sites, misses


def _matcher(node: fx.Node) -> Callable[[fx.Node, Mapping[int, Any]], LinearSite | Reject] | None:
    if node.op == "call_function":
        for targets, matcher in ((LINEAR, _match_linear), (ADDMM, _match_addmm), (MATMUL, _match_matmul)):
            if node.target in targets:
                return matcher
        if node.target in OTHER_PRODUCTS or getattr(node.target, "__name__", "") in GROUPED:
            return _no_match
    if node.op == "call_method":
        if node.target in METHODS:
            return _match_addmm if METHODS[str(node.target)] == "addmm" else _match_matmul
        if node.target in OTHER_METHODS:
            return _no_match
    return None


def _parameter_slots(node: fx.Node, parameters: Mapping[int, Any]) -> tuple[int, ...]:
    """Matrix Parameters that reach ``node`` through operations on that Parameter alone."""
    slots: list[int] = []
    for argument in node.all_input_nodes:
        source = _only_parameter(argument, parameters, depth=6)
        if source is not None and parameters[source].dim() > 1:
            slots.append(source)
    return tuple(slots)


def _only_parameter(node: fx.Node, parameters: Mapping[int, Any], depth: int) -> int | None:
    """Position of the Parameter that a value is made from, through one-input operations, a mask or a scale."""
    if node.op == "placeholder":
        slot = node.meta.get("argument", -1)
        return slot if slot in parameters else None
    inputs = node.all_input_nodes
    if depth == 0:
        return None
    if len(inputs) == 1:
        return _only_parameter(inputs[0], parameters, depth - 1)
    if node.target in (MIX_METHODS if node.op == "call_method" else MIXES):
        return next(
            (slot for source in inputs if (slot := _mixed_weight(source, node, parameters, depth - 1)) is not None),
            None,
        )
    return None


def _mixed_weight(source: fx.Node, mixed: fx.Node, parameters: Mapping[int, Any], depth: int) -> int | None:
    """Position of the matrix behind ``source`` if ``mixed`` still has its shape; activations plus a table have not."""
    slot = _only_parameter(source, parameters, depth)
    before, after = _value(source), _value(mixed)
    if slot is None or parameters[slot].dim() != 2 or before is None or after is None:
        return None
    return slot if before.shape == after.shape else None


def _weight_of(node: fx.Node, parameters: Mapping[int, Any]) -> tuple[fx.Node, bool] | Reject:
    """(placeholder, transposed) behind a chain of transposes, or why the weight is not a plain Parameter."""
    transposed = False
    while node.op != "placeholder":
        if _is_transpose(node):
            transposed = not transposed
        elif not (node.op == "call_method" and node.target in KEEPS_VALUES) and not _is_same_dtype_cast(node):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            return Reject(f"the weight is computed by {name} before it is used")
        node = node.all_input_nodes[0]
    parameter = parameters.get(node.meta.get("argument", -1))
    if parameter is None:
        return Reject("the weight is not a Parameter")
    if parameter.dim() != 2:
        return Reject(f"the weight has {parameter.dim()} dimensions, a linear has 2")
    if not parameter.dtype.is_floating_point:
        return Reject(f"the weight is {str(parameter.dtype).removeprefix('torch.')}, not floating point")
    return node, transposed


def _is_transpose(node: fx.Node) -> bool:
    arguments = tuple(node.args[1:])
    if node.op == "call_method":
        swapped = arguments in ((0, 1), (1, 0), (-1, -2), (-2, -1), ((1, 0),), ([1, 0],))
        return node.target == "t" or (node.target in ("transpose", "permute", "swapaxes") and swapped)
    if node.op == "call_function":
        if node.target in (torch.transpose, torch.permute, torch.swapaxes):
            return arguments in ((0, 1), (1, 0), (-1, -2), (-2, -1), ((1, 0),))
        return node.target is torch.t or (node.target is getattr and arguments[0] in ("T", "mT"))
    return False


def _is_same_dtype_cast(node: fx.Node) -> bool:
    if node.op != "call_method" or node.target not in ("to", "type", "float", "bfloat16", "half"):
        return False
    before, after = node.all_input_nodes[0].meta.get("example_value"), node.meta.get("example_value")
    return before is not None and after is not None and before.dtype == after.dtype and before.device == after.device


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _site(
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    stored_transposed: bool,
    parameters: Mapping[int, Any],
    flipped: bool = False,
) -> LinearSite | Reject:
    if not isinstance(weight, fx.Node) or not isinstance(x, fx.Node):
        return Reject("an operand is not a tensor of the graph")
    found = _weight_of(weight, parameters)
    if isinstance(found, Reject):
        return found
    placeholder, through = found
    transposed = stored_transposed != through
    rows, columns = parameters[placeholder.meta["argument"]].shape
    n, k = (columns, rows) if transposed else (rows, columns)
    result, value = _value(node), _value(x)
    if result is None or value is None:
        return Reject("the graph does not know the shape of the input")
    if not value.dtype.is_floating_point or result.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Reject(f"{value.dtype} input and {result.dtype} output: only bf16, fp16 and fp32 are quantized")
    if bias is not None and (_value(bias) is None or tuple(bias.meta["example_value"].shape) != (n,)):
        return Reject("the bias is not a vector of n values")
    if flipped and value.dim() != 2:
        return Reject("weight @ x with an x of more than two dimensions")
    return LinearSite(node, x, placeholder, bias, int(n), int(k), transposed, flipped, module_class(node))


def _dim(operand: Any) -> int:
    value = _value(operand)
    return 2 if value is None else value.dim()


def _match_linear(node: fx.Node, parameters: Mapping[int, Any]) -> LinearSite | Reject:
    arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    weight = _value(arguments["weight"])
    if weight is not None and weight.dim() != 2:
        return Reject("the weight of this linear is not a matrix")
    return _site(node, arguments["input"], arguments["weight"], arguments.get("bias"), False, parameters)


def _match_addmm(node: fx.Node, parameters: Mapping[int, Any]) -> LinearSite | Reject:
    arguments = dict(zip(("input", "mat1", "mat2"), node.args, strict=False)) | dict(node.kwargs)
    if arguments.get("beta", 1) != 1 or arguments.get("alpha", 1) != 1:
        return Reject("addmm with beta or alpha other than 1")
    return _site(node, arguments["mat1"], arguments["mat2"], arguments["input"], True, parameters)


def _match_matmul(node: fx.Node, parameters: Mapping[int, Any]) -> LinearSite | Reject:
    operands = [*node.args, *node.kwargs.values()]
    if len(operands) != 2:
        return Reject("matmul with an out argument")
    left, right = operands
    if isinstance(right, fx.Node) and _only_parameter(right, parameters, 6) is not None:
        return _site(node, left, right, None, True, parameters) if _dim(left) > 1 else Reject("vector @ weight")
    if _dim(right) < 2:
        return Reject("weight @ vector")
    return _site(node, right, left, None, False, parameters, flipped=True)


def _no_match(node: fx.Node, parameters: Mapping[int, Any]) -> Reject:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return Reject(f"{name} over a Parameter is not a linear")


def module_class(node: fx.Node) -> str | None:
    """Class of the innermost module around a node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    entry = list(stack.values())[-1][1]
    return entry.__name__ if isinstance(entry, type) else str(entry).rsplit(".", 1)[-1]
