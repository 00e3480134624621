"""Find products with all experts at once (bmm, matmul, einsum over a Parameter [E, n, k]): ``y[e] = x[e] @ w[e].T``.

Models that write their experts by hand compute all of them densely. Each product is described by letters, as in einsum:
``tk,ekn->etn``. Blocks that ``ir/experts.py`` understands as a whole are not looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import Parameter

from quant_compile.ir.family import Reject
from quant_compile.ir.probe import CAST_METHODS, KEEPS, SWAPS, name_of, swaps_last, value_of
from quant_compile.ir.sites import module_class

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class BatchedSite:
    """A product with every expert of a Parameter.

    Attributes:
        node: the node that computes it.
        x: its other operand.
        weight: placeholder of the Parameter.
        x_letters, out_letters: dimensions of operand and result; ``e``, ``n``, ``k`` are the Parameter's.
        transposed: an expert is stored [k, n].
        experts, n, k: sizes.
        module_class: class of the innermost module around the node.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    x_letters: str
    out_letters: str
    transposed: bool
    experts: int
    n: int
    k: int
    module_class: str | None

    @property
    def slot(self) -> int:
        """Position of the weight among the arguments of Dynamo's graph."""
        return self.weight.meta["argument"]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the result."""
        return self.node.meta["example_value"].dtype


def find_batched(
    gm: fx.GraphModule, parameters: Mapping[int, Parameter], taken: Collection[fx.Node]
) -> list[BatchedSite]:
    """Products with all experts outside of ``taken``; what does not fit is left for the misses of others."""
    sites: list[BatchedSite] = []
    for node in gm.graph.nodes:
        if node not in taken and name_of(node) in ("bmm", "matmul", "__matmul__", "einsum"):
            found = _match(node, parameters)
            if isinstance(found, BatchedSite):
                sites.append(found)
    return sites


def _match(node: fx.Node, parameters: Mapping[int, Parameter]) -> BatchedSite | Reject:
    operands = list(node.args)
    equation = str(operands.pop(0)) if name_of(node) == "einsum" else None
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if len(operands) != 2 or node.kwargs or not all(isinstance(o, fx.Node) for o in operands):
        return Reject("two tensors are expected")
    roots = [_expert_weight(o, parameters) for o in operands]
    if (roots[0] is None) == (roots[1] is None):
        return Reject("one operand is an expert weight")
    left = roots[0] is not None
    weight, flipped = roots[0] if left else roots[1]  # type: ignore[misc]
    x: Any = operands[1 if left else 0]
    letters = _letters(equation, left, x)
    return _site(node, x, weight, flipped, letters) if letters is not None else Reject("an equation of another form")


def _expert_weight(node: Any, parameters: Mapping[int, Parameter]) -> tuple[fx.Node, bool] | None:
    """(placeholder, last dimensions swapped) behind views of an expert Parameter."""
    swapped = False
    while node.op != "placeholder":
        name = name_of(node)
        if (name in SWAPS and swaps_last(node.args[1:])) or (name == "getattr" and node.args[1] == "mT"):
            swapped = not swapped
        elif not (name in KEEPS or name in CAST_METHODS or name in ("to", "type")):
            return None
        node = node.args[0]
        if not isinstance(node, fx.Node):
            return None
    found = parameters.get(node.meta.get("argument", -1))
    fits = found is not None and found.dim() == 3 and found.dtype.is_floating_point
    return (node, swapped) if fits else None


def _letters(equation: str | None, left: bool, x: fx.Node) -> tuple[str, str, str] | None:
    """(weight, x, result) as letters; matmul's batch dimensions are those of its bigger operand."""
    value = value_of(x)
    if value is None:
        return None
    if equation is not None:
        inputs, arrow, out = equation.replace(" ", "").partition("->")
        parts = inputs.split(",")
        if not arrow or "." in equation or len(parts) != 2:
            return None
        return (parts[0], parts[1], out) if left else (parts[1], parts[0], out)
    rest = "abcdfgh"[: max(0, value.dim() - 3)]
    batch = f"{rest}E" if value.dim() >= 3 else ""
    if value.dim() < 2 or value.dim() > 6:
        return None
    w, own, out = ("ENK", f"{batch}KM", f"{rest}ENM") if left else ("EKN", f"{batch}MK", f"{rest}EMN")
    return w, own, out


def _site(
    node: fx.Node, x: fx.Node, weight: fx.Node, flipped: bool, letters: tuple[str, str, str]
) -> BatchedSite | Reject:
    w, own, out = letters
    stored = w[0] + (w[2] + w[1] if flipped else w[1:])  # the letters of the Parameter itself
    value, result, shape = value_of(x), value_of(node), weight.meta["example_value"].shape
    if value is None or result is None or len(set(own)) != len(own) or len(set(w)) != 3 or len(own) != value.dim():
        return Reject("the sizes are not known")
    expert, sums = w[0], [letter for letter in w[1:] if letter in own and letter not in out]
    keeps = [letter for letter in w[1:] if letter in out and letter not in own]
    rows = [letter for letter in own if letter not in w]
    if expert not in out or len(sums) != 1 or len(keeps) != 1 or sorted(out) != sorted([expert, keeps[0], *rows]):
        return Reject("not a product over one dimension of each expert")
    if expert in own and int(value.shape[own.index(expert)]) != int(shape[0]):
        return Reject("experts are broadcast")
    if result.dtype not in DTYPES or value.dtype != result.dtype:
        return Reject("only bf16, fp16 and fp32 are quantized")
    plain = str.maketrans({expert: "e", sums[0]: "k", keeps[0]: "n"} | {r: str(i) for i, r in enumerate(rows)})
    transposed = stored[1] == sums[0]
    n, k = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    return BatchedSite(
        node, x, weight, own.translate(plain), out.translate(plain), transposed, int(shape[0]), int(n), int(k),
        module_class(node),
    )  # fmt: skip
