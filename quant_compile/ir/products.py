"""Products of two tensors by letters, as in einsum, whatever op computes them: ``F.linear`` is ``...k,nk->...n``.

Works on the operands of a call, nodes or tensors alike; knows no Parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quant_compile.ir.family import Reject
from quant_compile.ir.operands import Operands, op_of, operands_of

# Dimensions that an ellipsis stands for; letters that no equation has.
HIDDEN = "".join(chr(code) for code in range(0x3B1, 0x3B1 + 16))
# Dimensions besides those of the product itself; upper case is for sums and for the results of either side.
_FREE = "abcdefghijlopqrstuvwxyz"


@dataclass(frozen=True, eq=False)
class Product:
    """``left`` times ``right``, plus ``bias`` where there is one.

    Attributes:
        op: name of the op.
        left, right: operands.
        letters: of left, right and the result. A letter of one operand alone is summed, or of size 1.
        bias: what is added.
        bias_letters: its dimensions, those of the result from the last on, or the channels of a convolution.
    """

    op: str
    left: Any
    right: Any
    letters: tuple[str, str, str]
    bias: Any = None
    bias_letters: str = ""


# Products that no letters are found for: of more than two operands, or with another meaning.
OTHERS = {"bilinear", "chain_matmul", "linalg_multi_dot", "_grouped_mm", "grouped_mm", "scaled_grouped_mm", "addbmm"}


def product_of(node: fx.Node) -> Product | Reject | None:
    """The product that a node computes; None for another op, a refusal for a product of a form that is not known."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = op_of(node)
    if name in OTHERS or "grouped_mm" in name:
        return Reject(f"{name.partition('::')[2] or name} over a Parameter is not a linear")
    return product(name, operands_of(node)) if name in _FORMS else None


def product(name: str, given: Operands | None) -> Product | Reject | None:
    """``product_of`` for the operands of a call of ``name``."""
    form = _FORMS.get(name)
    if form is None:
        return None
    if given is None:
        return Reject(f"{name} with arguments that none of its forms has")
    try:
        return form(name, given)
    except _Unknown as unknown:
        return Reject(str(unknown))


class _Unknown(Exception):
    """Why a call is not understood."""


def value_of(operand: Any) -> torch.Tensor:
    """The traced value of an operand.

    Raises:
        _Unknown: it has none.
    """
    value = operand.meta.get("example_value") if isinstance(operand, fx.Node) else operand
    if not isinstance(value, torch.Tensor):
        raise _Unknown("the graph does not know the shape of the input")
    return value


def _dim(operand: Any) -> int:
    return value_of(operand).dim()


def _only(name: str, given: Operands, *known: str) -> list[Any]:
    """Operands in this order; others must have their defaults."""
    for key, value in given.items():
        if key not in known and value is not None and value is not False:
            raise _Unknown(f"{name} with an {key} argument" if key == "out" else f"{name} with {key}")
    return [given.get(key) for key in known]


def _linear(name: str, given: Operands) -> Product:
    x, weight, bias = _only(name, given, "input", "weight", "bias")
    if _dim(weight) != 2:
        raise _Unknown("the weight of this linear is not a matrix")
    rows = _FREE[: _dim(x) - 1]
    return Product(name, x, weight, (f"{rows}K", "NK", f"{rows}N"), bias, "N")


def _matmul(name: str, given: Operands) -> Product:
    left, right = _only(name, given, "self", {"matmul": "other", "mv": "vec"}.get(name, "mat2"))
    return Product(name, left, right, _matmul_letters(_dim(left), _dim(right)))


def _matmul_letters(left: int, right: int) -> tuple[str, str, str]:
    """Batch dimensions are matched from the last."""
    batch = _FREE[: max(left, right, 2) - 2]
    own, other = batch[len(batch) - max(left - 2, 0) :], batch[len(batch) - max(right - 2, 0) :]
    rows, columns = "M" * (left > 1), "N" * (right > 1)
    return f"{own}{rows}K", f"{other}K{columns}", f"{batch}{rows}{columns}"


def _added(name: str, given: Operands) -> Product:
    """``addmm`` and its like: the first operand is added to the product of the other two."""
    left, right = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec")}.get(name, ("batch1", "batch2"))
    bias, x, weight = _only(name, {k: v for k, v in given.items() if k not in ("beta", "alpha")}, "self", left, right)
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        raise _Unknown(f"{name} with beta or alpha other than 1")
    letters = _matmul_letters(_dim(x), _dim(weight))
    return Product(name, x, weight, letters, bias, letters[2][len(letters[2]) - _dim(bias) :])


def _inner(name: str, given: Operands) -> Product:
    left, right = _only(name, given, "self", "other")
    own, other = _FREE[: max(0, _dim(left) - 1)], _FREE[::-1][: max(0, _dim(right) - 1)]
    return Product(name, left, right, (f"{own}K", f"{other}K", own + other))


def _tensordot(name: str, given: Operands) -> Product:
    left, right = given["self"], given.get("b", given.get("other"))
    count, more = _dim(left), _dim(right)
    dims = given.get("dims", 2)
    if "dims_self" in given:
        dims = (given["dims_self"], given["dims_other"])
    if isinstance(dims, int):
        dims = (range(count - dims, count), range(dims))
    if not isinstance(dims, Sequence):
        raise _Unknown("tensordot over dimensions that are a tensor")
    sides: list[list[int]] = [[side] if isinstance(side, int) else list(side) for side in dims]
    own, other = list(_FREE[:count]), list(_FREE[::-1][:more])
    sums = "ABCDEFGHIJ"
    for letter, one, two in zip(sums, *sides, strict=False):
        own[one] = other[two] = letter
    out = "".join(letter for letter in own + other if letter not in sums)
    return Product(name, left, right, ("".join(own), "".join(other), out))


def _einsum(name: str, given: Operands) -> Product | None:
    tensors = given.get("tensors", ())
    if len(tensors) == 1:
        return None
    equation = given.get("equation")
    if len(tensors) != 2 or not isinstance(equation, str):
        raise _Unknown(f"einsum of {len(tensors)} operands is not a linear")
    left, right = tensors
    found = _equation(equation, (_dim(left), _dim(right)))
    if found is None:
        raise _Unknown(f"einsum {equation!r} over a Parameter is not a linear")
    return Product(name, left, right, found)


def _equation(equation: str, counts: tuple[int, int]) -> tuple[str, str, str] | None:
    """Letters of both operands and the result, an ellipsis written out; dimensions that it leaves out are lined up from the last."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2:
        return None
    hidden = [
        count - len(part.replace("...", "")) if "..." in part else 0 for part, count in zip(parts, counts, strict=True)
    ]
    free = HIDDEN[: max(hidden)]
    sides = [part.replace("...", free[len(free) - own :]) for part, own in zip(parts, hidden, strict=True)]
    if not arrow:
        both = "".join(parts).replace(".", "")
        out = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(both) if both.count(c) == 1))
    result = out.replace("...", free)
    fits = all(len(side) == count for side, count in zip(sides, counts, strict=True)) and "." not in "".join(sides)
    return (sides[0], sides[1], result) if fits else None


def _convolution(name: str, given: Operands) -> Product | None:
    """A kernel of size 1 that moves by 1 multiplies each position by a matrix; any other kernel is no product of two matrices."""
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    kernel = value_of(weight).shape[2:]
    plain = all(_all(given.get(key, default), default) for key, default in (("stride", 1), ("padding", 0)))
    if any(size != 1 for size in kernel) or not plain or given.get("groups", 1) != 1:
        return None
    places = _FREE[1 : 1 + len(kernel)]
    batch = _FREE[0] * (_dim(x) - len(kernel) - 1)
    unit = _FREE[::-1][: len(kernel)]
    return Product(name, x, weight, (f"{batch}K{places}", f"NK{unit}", f"{batch}N{places}"), bias, "N")


def _all(value: Any, wanted: int) -> bool:
    if value in ("valid", "same"):  # the same for a kernel of size 1
        return True
    return all(item == wanted for item in (value if isinstance(value, tuple | list) else (value,)))


_FORMS: dict[str, Callable[[str, Operands], Product | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _added),
    "inner": _inner,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "conv1d": _convolution,
}
PRODUCTS = frozenset(_FORMS)
