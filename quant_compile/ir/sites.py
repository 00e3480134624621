"""Find the places of a Dynamo graph that can be quantized, and say of every other linear-like node why it cannot.

Reads a copied Dynamo graph and the Parameter objects behind its placeholders; changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from quant_compile.ir.family import Reject
from quant_compile.ir.products import HIDDEN, Product, product_of
from quant_compile.ir.stored import Stored, stored
from quant_compile.ir.writes import Writes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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
MOST_STEPS = 6
Step = tuple[str, tuple[Any, ...]]
"""A method of a tensor and its arguments."""


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
        module_class: class of the innermost module around the node.
        view: the matrix that the Parameter is viewed as; empty where it is one.
        before: what makes rows [..., k] of the input.
        after: what makes the node's value of rows [..., n].
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    n: int
    k: int
    transposed: bool
    module_class: str | None
    view: tuple[int, ...] = ()
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()

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
    gm: fx.GraphModule,
    parameters: Mapping[int, torch.nn.Parameter],
    taken: Collection[fx.Node] = (),
    writes: Writes | None = None,
) -> tuple[list[LinearSite], list[Miss]]:
    """Sites and misses of a copied Dynamo graph.

    Args:
        gm: a graph from ``copy_graph``.
        parameters: argument position -> Parameter.
        taken: nodes that belong to expert blocks.
        writes: of this graph, where they are known.
    """
    sites: list[LinearSite] = []
    misses: list[Miss] = []
    writes = writes or Writes(gm.graph)
    for node in gm.graph.nodes:
        if node in taken:
            continue
        found = weighted(node, parameters, writes)
        if found is None:
            continue
        made = _site(found) if isinstance(found, Weighted) else found
        if isinstance(made, Reject):
            misses.append(Miss(node, _parameter_slots(node, parameters), made.reason))
        else:
            sites.append(made)
    return sites, misses


# --- products over a Parameter ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weighted:
    """A product of a Parameter, or of one slice of it, with something else.

    Attributes:
        node: the node that computes it.
        product: its operands and letters.
        x: the operand that is not the Parameter.
        stored: how the other operand looks at the Parameter.
        own, out: letters of x and of the result.
        sums, keeps, each: letters of the Parameter in stored order: multiplied and summed, found in the result instead of x's,
            found in both.
        rows: letters of x that the Parameter does not have.
        letters: of all the dimensions of the Parameter (or the slice), in stored order.
        from_another: x is a Parameter too.
        squeezed: dimensions of x, of size 1, that are widened to one of the Parameter's; ``own`` does not have them.
    """

    node: fx.Node
    product: Product
    x: fx.Node
    stored: Stored
    own: str
    out: str
    sums: str
    keeps: str
    each: str
    rows: str
    letters: str
    from_another: bool
    squeezed: tuple[int, ...] = ()

    def size(self, letters: str) -> int:
        """How many values these dimensions of the Parameter have."""
        sizes = dict(zip(self.letters, (self.stored.shape[dim] for dim in self.stored.own), strict=True))
        return prod(sizes[letter] for letter in letters)

    def sizes(self, letters: str) -> tuple[int, ...]:
        """The size of each."""
        return tuple(self.size(letter) for letter in letters)

    @property
    def transposed(self) -> bool | None:
        """Whether ``sums`` come before ``keeps`` in memory; None where they are mixed."""
        order = "".join(letter for letter in self.letters if letter in self.sums + self.keeps)
        return None if order not in (self.keeps + self.sums, self.sums + self.keeps) else order[0] in self.sums

    @property
    def over_experts(self) -> bool:
        """Whether it is no linear but one product for each expert, or for a slice that is chosen."""
        if self.stored.index is not None or self.each:
            return True
        # An ellipsis takes rows of any shape, as a linear does; an equation that spells all dimensions may be one of experts.
        spelled = self.transposed is None or self.rows[:1] not in HIDDEN or not self.rows
        return spelled and len(self.letters) == 3 and self.letters[0] in self.keeps and len(self.keeps) == 2


def weighted(node: fx.Node, parameters: Mapping[int, Any], writes: Writes) -> Weighted | Reject | None:
    """The product over a Parameter that a node computes, why it is not understood, or None where there is none."""
    found = product_of(node)
    if found is None or not _parameter_slots(node, parameters):
        return None
    if isinstance(found, Reject):
        return found
    left = found.op != "linear" and _slot_of(found.right, parameters) is None
    x, operand = (found.right, found.left) if left else (found.left, found.right)
    read = stored(operand, parameters)
    if isinstance(read, Reject):
        return read
    problem = _problem_of(node, x, operand, read, parameters, writes)
    if problem is not None:
        return Reject(problem)
    first, second, out = found.letters
    own, operand_letters = (second, first) if left else (first, second)
    letters = read.letters(operand_letters)
    if letters is None:
        return Reject(f"{found.op} widens the weight")
    another = _slot_of(x, parameters) is not None
    return _sorted(Weighted(node, found, x, read, own, out, "", "", "", "", letters, another))


def _problem_of(
    node: fx.Node, x: Any, operand: Any, read: Stored, parameters: Mapping[int, Any], writes: Writes
) -> str | None:
    parameter, value, result = parameters[read.weight.meta["argument"]], _value(x), _value(node)
    if not parameter.dtype.is_floating_point:
        return f"the weight is {str(parameter.dtype).removeprefix('torch.')}, not floating point"
    if value is None or result is None:
        return "the graph does not know the shape of the input"
    if read.cast is not None and result.dtype not in DTYPES:
        return f"the weight is computed by {read.cast} before it is used"
    if not value.dtype.is_floating_point or result.dtype not in DTYPES:
        return f"{value.dtype} input and {result.dtype} output: only bf16, fp16 and fp32 are quantized"
    writer = next((name for step in _way(operand, read.weight) if (name := writes.anywhere(step)) is not None), None)
    return None if writer is None else f"{writer} writes into the weight"


def _way(operand: fx.Node, weight: fx.Node) -> Iterator[fx.Node]:
    """A Parameter and everything between it and an operand that is made of it: copies on the way may be written too."""
    ahead, seen = [operand, weight], set[fx.Node]()
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += node.all_input_nodes
            yield node


def _sorted(found: Weighted) -> Weighted | Reject:
    """With the dimensions sorted by where they occur, or why these are not those of a product with a matrix."""
    letters, out, shape = found.letters, found.out, found.x.meta["example_value"].shape
    wide = {c for c in letters if c in found.own and c in out and found.size(c) != 1}
    squeezed = tuple(i for i, c in enumerate(found.own) if c in wide and isinstance(shape[i], int) and shape[i] == 1)
    own = "".join(c for i, c in enumerate(found.own) if i not in squeezed)
    shape = [size for i, size in enumerate(shape) if i not in squeezed]
    op = found.product.op
    sums = "".join(c for c in letters if c in own and c not in out)
    keeps = "".join(c for c in letters if c in out and c not in own)
    each = "".join(c for c in letters if c in own and c in out)
    rows = "".join(c for c in own if c not in letters and c in out)
    alone = "".join(c for c in letters if c not in own + out)
    if any(len(set(side)) < len(side) for side in (letters, own, out)) or found.size(alone) != 1:
        return Reject(f"{op} over a Parameter is not a linear: it takes a diagonal or sums the weight alone")
    if not sums or not keeps:
        return Reject(
            f"{op} over a Parameter is not a linear: it has no {'sum' if not sums else 'output'} over its matrix"
        )
    if sorted(own) != sorted(rows + sums + each) or sorted(out) != sorted(rows + keeps + each):
        return Reject(f"{op} over a Parameter is not a linear: it sums or widens its input alone")
    if any(_differs(size, found.size(c)) for c, size in zip(own, shape, strict=True) if c in letters):
        return Reject(f"{op} over a Parameter is not a linear: its input is broadcast over the weight")
    return replace(found, own=own, sums=sums, keeps=keeps, each=each, rows=rows, squeezed=squeezed)


def _differs(size: Any, own: int) -> bool:
    """Whether a dimension of the input is not the weight's; a symbol stands for a size that is, but never for 1."""
    return size != own if isinstance(size, int) else own == 1


def _site(found: Weighted) -> LinearSite | Reject:
    """The linear that a product is."""
    if found.over_experts:
        what = "one slice of it" if found.stored.index is not None else "each of its slices"
        return Reject(
            f"{found.product.op} over a Parameter of {len(found.stored.shape)} dimensions is not a linear, "
            f"and not a product with {what} that is known"
        )
    changed = found.stored.cast or found.stored.viewed
    if changed is not None:
        return Reject(f"the weight is computed by {changed} before it is used")
    transposed = found.transposed
    if transposed is None:
        return Reject("the dimensions that are summed lie between the others, so that the weight is no matrix")
    n, k, bias = found.size(found.keeps), found.size(found.sums), found.product.bias
    added = _value(bias)
    vector = found.product.bias_letters == found.keeps and added is not None and tuple(added.shape) == (n,)
    if bias is not None and not vector:
        return Reject("the bias is not a vector of n values")
    before, after = _turns(found)
    weight, module = found.stored.weight, module_class(found.node)
    shape = (k, n) if transposed else (n, k)
    view = () if tuple(weight.meta["example_value"].shape) == shape else shape
    return LinearSite(found.node, found.x, weight, bias, n, k, transposed, module, view, before, after)


def _turns(found: Weighted) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """What makes rows [..., k] of x, and what makes the result of rows [..., n]."""
    before: list[Step] = [("squeeze", (found.squeezed,))] if found.squeezed else []
    before += _ordered(found.own, found.rows + found.sums)
    after: list[Step] = []
    if len(found.sums) > 1:
        before.append(("flatten", (-len(found.sums),)))
    if not found.rows:
        before.append(("unsqueeze", (0,)))
        after.append(("squeeze", (0,)))
    if len(found.keeps) > 1:
        after.append(("unflatten", (-1, found.sizes(found.keeps))))
    return tuple(before), (*after, *_ordered(found.rows + found.keeps, found.out))


def _ordered(have: str, want: str) -> list[Step]:
    order = tuple(have.index(letter) for letter in want)
    plain = tuple(range(len(order)))
    if order == plain:
        return []
    if order == (*plain[:-2], plain[-1], plain[-2]):
        return [("t", ())] if len(order) == 2 else [("transpose", (-2, -1))]
    return [("permute", order)]


# --- which Parameter -------------------------------------------------------------------------------------------------


def _parameter_slots(node: fx.Node, parameters: Mapping[int, Any]) -> tuple[int, ...]:
    """Matrix Parameters that a product multiplies by: they reach it through operations on that Parameter alone."""
    found = product_of(node)
    operands: Sequence[Any] = (found.left, found.right) if isinstance(found, Product) else node.all_input_nodes
    slots = dict.fromkeys(_slot_of(operand, parameters) for operand in operands)
    return tuple(slot for slot in slots if slot is not None and parameters[slot].dim() > 1)


def _slot_of(operand: Any, parameters: Mapping[int, Any]) -> int | None:
    if not isinstance(operand, fx.Node):
        return None
    read = stored(operand, parameters)
    return (
        read.weight.meta["argument"] if isinstance(read, Stored) else _only_parameter(operand, parameters, MOST_STEPS)
    )


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


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def module_class(node: fx.Node) -> str | None:
    """Class of the innermost module around a node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    entry = list(stack.values())[-1][1]
    return entry.__name__ if isinstance(entry, type) else str(entry).rsplit(".", 1)[-1]
