"""Quantize an input by one kernel where Inductor would make several; a step of ``lower``.

Reads ``sglq.quantize`` nodes whose scheme has an ``InputKernel`` on the target. Writes ``sglq_kernels.norm_quantize`` in place of a
residual add, an RMSNorm and the quantization of its result, or ``quantize_rows`` behind the maxima of rows, which Inductor
fuses into what made them. Leaves all else to the family's own torch code.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quant_compile.ir.graph import names_reading, stand_for
from quant_compile.ir.scheme import parse
from quant_compile.ir.sites import module_class
from quant_compile.ir.writes import Writes
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.registry import InputKernel, input_kernel
from quant_compile.lowering.target import Target
from quant_compile.passes.plan import PassReport

CASTS = ("to", "type", "type_as", "float", "bfloat16", "half")


@dataclass(frozen=True)
class NormSite:
    """An RMSNorm in a graph; ``weighting`` is that of ``registry.Norm``. eps is a node where Dynamo made the float an input."""

    x: fx.Node
    weight: fx.Node
    eps: float | fx.Node
    weighting: str


def one_launch(
    graph: fx.Graph, node: fx.Node, target: Target, writes: Writes, report: PassReport
) -> list[fx.Node] | None:
    """The planes of a quantize node by one kernel on ``target``, or None: nothing was changed."""
    x: Any = node.args[0]
    spec, value = str(node.args[1]), x.meta["example_value"]
    label = node.meta.get("site", node.name)
    kernel = input_kernel("maxima", parse(spec), value.dtype, target)
    if kernel is not None:
        report.rewrote.append(f"{label}: {kernel.name}, after the maxima of rows")
        return _after_maxima(graph, node, x, spec, kernel)
    kernel = input_kernel("norm", parse(spec), value.dtype, target)
    norm = find_norm(x) if kernel is not None else None
    if kernel is not None and norm is None and "Norm" in (module_class(x) or ""):
        reason = (
            f"{module_class(x)} is no RMSNorm that it knows: over the last dimension, with a weight, computed in f32"
        )
        report.miss(label, names_reading(node), f"{kernel.name} does not take what comes before it: {reason}")
    if kernel is None or norm is None:
        return None
    terms = residual_terms(norm.x)
    reason = _obstacle(x, norm, node, writes, bool(terms))
    if reason is not None:
        report.miss(label, names_reading(node), f"{kernel.name} does not take the RMSNorm before it: {reason}")
        return None
    report.rewrote.append(f"{label}: {kernel.name}, with the {'residual add and ' if terms else ''}RMSNorm before it")
    return _with_norm(graph, node, norm, terms, kernel, writes)


def _obstacle(y: fx.Node, norm: NormSite, node: fx.Node, writes: Writes, moves: bool) -> str | None:
    """Why a norm cannot become part of its quantization; ``moves``: it would run where the residual is added."""
    if len(y.users) > 1:
        return "others read its result too"
    for read in (norm.x, norm.weight):
        writer = writes.between(read, read, node)
        if writer is not None:
            return f"{read} is written by {writer}"
    if moves and isinstance(norm.eps, fx.Node) and any(n.op != "placeholder" for n in norm.eps.all_input_nodes):
        return "its eps is computed in the graph"
    return None


def _after_maxima(graph: fx.Graph, node: fx.Node, x: fx.Node, spec: str, kernel: InputKernel) -> list[fx.Node]:
    with graph.inserting_before(node):
        # In x's dtype: rounding keeps the order, so that these are the maxima of what is stored.
        maxima = graph.call_method("amax", (graph.call_method("abs", (x,)), -1))
        planes = graph.call_function(kernel_ops.quantize_rows, (x, maxima, spec, kernel.name))
        return [graph.call_function(operator.getitem, (planes, i)) for i in range(3)]


def _with_norm(
    graph: fx.Graph, node: fx.Node, norm: NormSite, terms: tuple[fx.Node, ...], kernel: InputKernel, writes: Writes
) -> list[fx.Node]:
    spec, scale = str(node.args[1]), node.args[2] if len(node.args) > 2 else None
    x, residual = terms or (norm.x, None)
    place = norm.x if terms else node
    if terms and isinstance(norm.eps, fx.Node):
        place.prepend(norm.eps)
    arguments = (x, residual, norm.weight, norm.eps, norm.weighting, spec, scale, kernel.name)
    with graph.inserting_before(place):
        result = graph.call_function(kernel_ops.norm_quantize, arguments)
        first = 1 if terms else 0
        planes = [graph.call_function(operator.getitem, (result, first + i)) for i in range(2)]
        if terms:
            total = graph.call_function(operator.getitem, (result, 0))
            total.meta = dict(norm.x.meta)
            stand_for(total, norm.x)
            norm.x.replace_all_uses_with(total)
            writes.replaced(norm.x, total)
            graph.erase_node(norm.x)
    return planes if scale is None else [*planes, scale]  # pyright: ignore[reportReturnType]  (a placeholder)


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase what a kernel has taken over: a norm's result and what only it read."""
    waiting, erased = [node], set[fx.Node]()
    while waiting:
        last = waiting.pop()
        if not last.users and last.op != "placeholder" and last not in erased:
            waiting += last.all_input_nodes
            graph.erase_node(last)
            erased.add(last)


# --- recognition ---


def find_norm(y: fx.Node) -> NormSite | None:
    """The RMSNorm over the last dimension whose result, in the dtype of its input, is y."""
    norm = _torch_norm(y) if _called(y, "rms_norm") else _written_out(y)
    if norm is None:
        return None
    x, out, w = _value(norm.x), _value(y), _value(norm.weight)
    if x is None or out is None or w is None or norm.weight.op != "placeholder" or _value(norm.eps) is not None:
        return None
    fits = x.dtype == out.dtype and x.device == out.device and w.dim() == 1 and w.shape[0] == x.shape[-1]
    return norm if fits and (norm.weighting != "after_cast" or w.dtype == x.dtype) else None


def _torch_norm(y: fx.Node) -> NormSite | None:
    """torch.rms_norm; it has checked that its shape is that of the weight."""
    given: dict[str, Any] = dict(zip(("input", "normalized_shape", "weight", "eps"), y.args, strict=False)) | y.kwargs
    weight, eps = given.get("weight"), given.get("eps")
    if not isinstance(weight, fx.Node):
        return None
    return NormSite(given["input"], weight, torch.finfo(torch.float32).eps if eps is None else eps, "before_cast")


def _written_out(y: fx.Node) -> NormSite | None:
    """As models spell it; the product with the weight is the last step but a cast."""
    product = _uncast(y)
    for weight, normalized in _sides(product, "mul"):
        if found := _normalized(normalized):
            for one, rest in _sides(weight, "add"):
                if one == 1 and _is_f32(weight):
                    return NormSite(found[0], _uncast(rest), found[1], "one_plus")
            return NormSite(found[0], _uncast(weight), found[1], "before_cast") if _is_f32(product) else None
        value, out = _value(normalized), _value(y)
        if (found := _normalized(_uncast(normalized))) and value is not None and out is not None:
            same = value.dtype == out.dtype and weight.op == "placeholder"
            return NormSite(found[0], weight, found[1], "after_cast") if same else None
    return None


def _normalized(node: Any) -> tuple[fx.Node, Any] | None:
    """(x, eps) of x * rsqrt(mean(x^2) + eps) in f32."""
    for wide, root in _sides(node, "mul"):
        if _called(root, "rsqrt") and _is_f32(node):
            for mean, eps in _sides(root.args[0], "add"):
                if _mean_square_of(mean) is _uncast(wide) and isinstance(eps, float | fx.Node):
                    return _uncast(wide), eps
    return None


def _mean_square_of(node: Any) -> fx.Node | None:
    """What a mean of squares over the last dimension, in f32, is of."""
    if not _called(node, "mean"):
        return None
    given: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    square, dim = given["input"], given.get("dim")
    if dim not in (-1, [-1], (-1,)) or given.get("keepdim") is not True or "dtype" in given or not _is_f32(square):
        return None
    if (_called(square, "pow") and square.args[1:] == (2,)) or _called(square, "square"):
        return _uncast(square.args[0]) if _is_f32(square.args[0]) else None
    a, b = next(_sides(square, "mul"), (None, square))
    return _uncast(a) if a is b else None


def residual_terms(x: fx.Node) -> tuple[fx.Node, ...]:
    """The two tensors of x's shape and dtype whose sum x is; else nothing."""
    total = _value(x)
    for a, b in _sides(x, "add"):
        values = [_value(a), _value(b)]
        alike = (
            v is not None and total is not None and v.dtype == total.dtype and _same_shape(v, total) for v in values
        )
        return (a, b) if all(alike) else ()
    return ()


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and all(statically_known_true(p == q) for p, q in zip(a.shape, b.shape, strict=True))


def _called(node: Any, *names: str) -> bool:
    """Whether a node calls a function or method of one of these names, its first argument by position."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or not node.args:
        return False
    return (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")) in names


def _sides(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The operands of a commutative call, both ways round."""
    if _called(node, name) and len(node.args) == 2 and not node.kwargs:
        yield node.args
        yield node.args[1], node.args[0]


def _uncast(node: Any) -> Any:
    """What a cast is of; else the node."""
    return node.args[0] if _called(node, *CASTS) else node


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _is_f32(node: Any) -> bool:
    value = _value(node)
    return value is not None and value.dtype == torch.float32
