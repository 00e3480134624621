"""Read attention that a model writes as two products: from the softmax back to the scores, and on to the product with V.

    matmul(q, k^T) [* scale] [softcap] [+ mask] [cat sinks [- max]] -> softmax -> [drop sinks] [cast] [dropout] -> matmul with v

Steps are followed by what they compute of what, in this order; any other step is a refusal that names it. What does not go
from one product through a softmax to another is no attention. Reads a copied Dynamo graph; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quant_compile.ir.family import Reject
from quant_compile.ir.operands import op_of, operands_of
from quant_compile.ir.stored import CASTS, permutation

PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm"}
IN_PLACE = {"iadd", "add_", "isub", "sub_", "imul", "mul_", "itruediv", "div_"}
ADDS, SUBS = {"add", "iadd", "add_"}, {"sub", "isub", "sub_"}
FACTORS, DIVISORS = {"mul", "imul", "mul_", "multiply"}, {"truediv", "itruediv", "div", "div_", "true_divide", "divide"}
KEEPS = {"contiguous", "clone", "detach"}
# What weights may go through on their way to V, if only to be refused.
ONWARD = {*CASTS, *KEEPS, "getitem", "dropout", "mul", "where", "masked_fill", "view", "reshape"}
# How far a product may be from the softmax that belongs to it.
STEPS = 16


@dataclass(frozen=True, eq=False)
class Scores:
    """What two products around a softmax attend to.

    Attributes:
        node: the second product.
        chain: the nodes from the first product to before the second; nothing else may read them.
        q, k: operands of the first product, k not transposed: [B, H, L, D].
        v: second operand of the second.
        mask: what is added to the scores.
        sinks: what is joined to them, [.., H, .., 1].
        softmax: dtype that it computes in.
    """

    node: fx.Node
    chain: tuple[fx.Node, ...]
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    sinks: fx.Node | None
    scale: float
    softcap: float
    softmax: torch.dtype


def tensor_of(node: Any) -> torch.Tensor | None:
    """The traced value of a node, if it is a tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def source_of(node: fx.Node) -> fx.Node | None:
    """First operand of a node, if that is a node."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    return first if isinstance(first, fx.Node) else None


def passed(node: fx.Node) -> fx.Node:
    """What a node's value is, behind copies and casts to the dtype that it has."""
    while (source := source_of(node)) is not None:
        before, after = tensor_of(source), tensor_of(node)
        kept = op_of(node) in KEEPS or (op_of(node) in CASTS and before is not None and after is not None)
        if not kept or before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
            break
        node = source
    return node


def product_after(softmax: fx.Node) -> fx.Node | None:
    """The product that the weights of a softmax go to as first operand; None: the softmax is none of attention's."""
    waiting, seen = [softmax], set[fx.Node]()
    for _ in range(STEPS):
        if not waiting:
            return None
        node = waiting.pop(0)
        for user in node.users:
            name = op_of(user)
            if name in PRODUCTS:
                tensors: Any = user.args[0]
                first = tensors if isinstance(tensors, fx.Node) else source_of(user)
                if node in (first, user.kwargs.get("input"), *user.args[1:2]):
                    return user
            elif name in ONWARD and user not in seen:
                seen.add(user)
                waiting.append(user)
    return None


def product_before(node: fx.Node | None) -> fx.Node | None:
    """The product that scores come from, through operations with one tensor that goes on; None: there is none."""
    for _ in range(STEPS):
        if node is None or node.op == "placeholder":
            return None
        if op_of(node) in PRODUCTS:
            return node
        if op_of(node) in ADDS:
            return next((p for p in map(product_before, _tensors(node)) if p is not None), None)
        node = _first_of_cat(node) if op_of(node) == "cat" else source_of(node)
    return None


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    return (argument for argument in node.args if isinstance(argument, fx.Node))


def _first_of_cat(node: fx.Node) -> fx.Node | None:
    tensors: Any = (operands_of(node) or {}).get("tensors")
    first = tensors[0] if isinstance(tensors, list | tuple) and tensors else None
    return first if isinstance(first, fx.Node) else None


def read_scores(softmax: fx.Node) -> Scores | Reject | None:
    """What one softmax is for; a refusal for what looks like attention and cannot be read, None for anything else."""
    given = operands_of(softmax) or {}
    first = given.get("self")
    if product_after(softmax) is None or not isinstance(first, fx.Node) or product_before(first) is None:
        return None
    if tensor_of(softmax) is None or tensor_of(first) is None:
        return None
    return _Reader(softmax).read(first, given)


class _Refused(Exception):
    """A step is not what it should be."""


class _Reader:
    """Follows one softmax both ways and keeps the nodes on the way."""

    def __init__(self, softmax: fx.Node) -> None:
        self.softmax = softmax
        self.chain: list[fx.Node] = [softmax]

    def read(self, first: fx.Node, given: dict[str, Any]) -> Scores | Reject:
        """All of it, or why not."""
        try:
            return self._read(first, given)
        except _Refused as refused:
            return Reject(str(refused))

    def _read(self, first: fx.Node, given: dict[str, Any]) -> Scores:
        value = tensor_of(first)
        assert value is not None
        if given.get("dim") not in (-1, value.dim() - 1):
            raise _Refused(f"its softmax is over dimension {given.get('dim')}")
        node, dropped = self._forward()
        at, sinks = self._sinks(first) if dropped else (self._plain(first), None)
        at, mask = self._mask(at)
        at, softcap = self._softcap(at)
        at, scale = self._scaled(at)
        q, k = self._product(at)
        v = (operands_of(node) or {}).get("other")
        if not isinstance(v, fx.Node):
            raise _Refused("its second product has no tensor for V")
        self._alone(node)
        dtype = self.softmax.meta["example_value"].dtype  # under autocast not that of its input
        return Scores(node, tuple(self.chain), q, k, v, mask, sinks, scale, softcap, dtype)

    def _plain(self, node: fx.Node) -> fx.Node:
        """Behind casts to the same dtype and copies, which become part of the chain."""
        while node is not (end := passed(node)):
            while node is not end:
                self.chain.append(node)
                node = source_of(node)  # type: ignore[assignment]
        return node

    def _forward(self) -> tuple[fx.Node, bool]:
        """(the product with V, whether a last column is dropped before it)."""
        node, dropped = self.softmax, False
        for _ in range(STEPS):
            if len(node.users) != 1:
                readers = ", ".join(sorted(user.name for user in node.users))
                raise _Refused(f"its weights are read by {readers}")
            (user,) = node.users
            name, given = op_of(user), operands_of(user) or {}
            if name == "matmul" and given.get("self") is node:
                _same_values(self.chain, node)
                return user, dropped
            if name == "dropout":
                _no_dropout(given)
            elif name == "getitem" and not dropped and _drops_last(given.get("index"), node):
                dropped = True
            elif name not in CASTS and name not in KEEPS:
                raise _Refused(f"its weights go through {name} before they are multiplied with V")
            self.chain.append(user)
            node = user
        raise _Refused("its weights go through too many steps before they are multiplied with V")

    def _sinks(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Behind ``cat([scores, sinks]) [- max]``."""
        node = self._plain(node)
        if op_of(node) in SUBS:
            node = self._plain(self._less_its_maximum(node))
        given = operands_of(node) or {}
        tensors: Any = given.get("tensors")
        if op_of(node) != "cat" or not isinstance(tensors, list | tuple) or len(tensors) != 2:
            raise _Refused("a column of its weights is dropped that is no sink")
        scores, sinks = tensors
        value = tensor_of(sinks)
        if value is None or value.shape[-1] != 1 or given.get("dim") not in (-1, value.dim() - 1):
            raise _Refused("what is joined to its scores is not one column of sinks")
        self.chain.append(node)
        return self._plain(scores), sinks

    def _less_its_maximum(self, node: fx.Node) -> fx.Node:
        """Behind ``x - x.max(-1, keepdim=True)``, which changes no weight."""
        scores, largest = node.args[:2]
        found = [node]
        if isinstance(largest, fx.Node) and op_of(largest) == "getitem" and largest.args[1] == 0:
            found.append(largest)
            largest = largest.args[0]
        if not isinstance(largest, fx.Node) or op_of(largest) not in ("max", "amax") or not isinstance(scores, fx.Node):
            raise _Refused("something is subtracted from its scores that is not their maximum")
        given = operands_of(largest) or {}
        dims = given.get("dim") if isinstance(given.get("dim"), list | tuple) else (given.get("dim"),)
        if given.get("self") is not scores or tuple(dims or ()) != (-1,) or given.get("keepdim") is not True:
            raise _Refused("something is subtracted from its scores that is not their maximum")
        self.chain += [*found, largest]
        return scores

    def _mask(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        if op_of(node) not in ADDS:
            return node, None
        if len(node.args) != 2 or node.kwargs:
            raise _Refused("its mask is added with a factor")
        parts = [part for part in node.args if isinstance(part, fx.Node) and tensor_of(part) is not None]
        from_product = [product_before(part) is not None and _same_shape(part, node) for part in parts]
        if len(parts) != 2 or sum(from_product) == 0:
            raise _Refused("a number is added to its scores")
        # Of two operands that both come from a product the first is the scores': a bias that is computed has another shape or place.
        scores, mask = parts if from_product[0] else parts[::-1]
        if op_of(node) in IN_PLACE and scores is not node.args[0]:
            raise _Refused("its scores are added to a tensor in place")
        value = tensor_of(mask)
        if value is None or value.dtype == torch.bool:
            raise _Refused("truth values are added to its scores, as numbers")
        self.chain.append(node)
        scores = self._plain(scores)
        if op_of(scores) in ADDS:
            raise _Refused("two tensors are added to its scores")
        return scores, mask

    def _softcap(self, node: fx.Node) -> tuple[fx.Node, float]:
        inner = self._plain(node) if op_of(node) in FACTORS else None
        tanh, cap = _with_number(inner) if inner is not None else (None, None)
        if tanh is None or op_of(tanh) != "tanh":
            return node, 0.0
        divided = source_of(tanh)
        scores, divisor = _with_number(divided) if divided is not None else (None, None)
        if scores is None or divisor is None or cap is None or divided is None:
            raise _Refused("its softcap is none that is known")
        inverse = 1.0 / divisor if op_of(divided) in FACTORS else divisor
        if op_of(divided) not in {*FACTORS, *DIVISORS} or abs(inverse - cap) > 1e-6 * abs(cap) or cap <= 0:
            raise _Refused("its softcap is none that is known")
        self.chain += [node, tanh, divided]
        return self._plain(scores), float(cap)

    def _scaled(self, node: fx.Node) -> tuple[fx.Node, float]:
        if op_of(node) not in {*FACTORS, *DIVISORS}:
            return node, 1.0
        scores, factor = _with_number(node)
        if scores is None or factor is None:
            raise _Refused("its scores are multiplied by what is no number")
        if op_of(node) in DIVISORS and node.args[0] is not scores:
            raise _Refused("a number is divided by its scores")
        self.chain.append(node)
        return self._plain(scores), (1.0 / factor if op_of(node) in DIVISORS else factor)

    def _product(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        given = operands_of(node) or {}
        q, turned = given.get("self"), given.get("other")
        if op_of(node) != "matmul" or not isinstance(q, fx.Node) or not isinstance(turned, fx.Node):
            raise _Refused(f"its scores go through {op_of(node)} before the softmax")
        value, source = tensor_of(turned), source_of(passed(turned))
        turned = passed(turned)
        count = 0 if value is None else value.dim()
        order = permutation(op_of(turned), operands_of(turned) or {}, count)
        if source is None or order is None or order != (*range(count - 2), count - 1, count - 2):
            raise _Refused("its keys are stored transposed, or are not transposed where they are multiplied")
        before, after = tensor_of(q), tensor_of(node)
        if before is None or after is None or before.dtype != after.dtype:
            raise _Refused("its scores have another dtype than q (autocast)")
        self.chain.append(node)
        return q, source

    def _alone(self, node: fx.Node) -> None:
        """Nothing but the chain reads it."""
        inside = {*self.chain, node}
        if any("out" in link.kwargs for link in inside):
            raise _Refused("a step of it writes into a tensor that is given (out=)")
        for link in self.chain:
            other = next((user for user in link.users if user not in inside), None)
            if other is not None:
                raise _Refused(f"{link.name}, a part of it, is read by {other.name} as well")


def _same_values(weights: list[fx.Node], last: fx.Node) -> None:
    """Casts on the way to V lose no more than the last one does."""
    final = last.meta["example_value"].dtype
    dtypes = [node.meta["example_value"].dtype for node in weights if op_of(node) in CASTS]
    if any(d != final and not (d.is_floating_point and d.itemsize > final.itemsize) for d in dtypes):
        raise _Refused("its weights go through a dtype that rounds them more than the one they are multiplied in")


def _no_dropout(given: dict[str, Any]) -> None:
    if given.get("training") is False or given.get("p") in (0, 0.0):
        return
    raise _Refused(f"it drops out weights at random (p={given.get('p')}, training={given.get('training')})")


def _drops_last(index: Any, node: fx.Node) -> bool:
    """Whether an index is ``[..., :-1]``."""
    value = tensor_of(node)
    items = list(index) if isinstance(index, tuple | list) else [index]
    lead = items[:-1]
    full = lead == [Ellipsis] or (value is not None and lead == [slice(None)] * (value.dim() - 1))
    return full and items[-1] == slice(None, -1, None)


def _with_number(node: fx.Node) -> tuple[fx.Node | None, float | None]:
    """(tensor, number) of an op of the two."""
    if len(node.args) != 2 or node.kwargs:
        return None, None
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    numbers = [float(a) for a in node.args if isinstance(a, int | float) and not isinstance(a, bool)]
    if len(tensors) != 1 or len(numbers) != 1 or not numbers[0]:
        return None, None
    return tensors[0], numbers[0]


def _same_shape(part: fx.Node, whole: fx.Node) -> bool:
    first, second = tensor_of(part), tensor_of(whole)
    return first is not None and second is not None and same_sizes(first.shape, second.shape)


def same_sizes(first: Any, second: Any) -> bool:
    """Whether sizes are surely equal; symbols are compared as expressions, so that no condition on them arises."""
    return len(first) == len(second) and all(same_size(a, b) for a, b in zip(first, second, strict=True))


def same_size(first: Any, second: Any) -> bool:
    """Whether two sizes are surely equal, by the same rule."""
    if isinstance(first, torch.SymInt) and isinstance(second, torch.SymInt):
        return bool(first.node.expr == second.node.expr)
    return isinstance(first, int) and isinstance(second, int) and first == second


def agrees(first: Any, second: Any) -> bool:
    """Whether two sizes are equal wherever a product over both is possible without a broadcast.

    Dynamo gives equal sizes of two inputs a symbol each where nothing has compared them, and none to a size of one.
    """
    if isinstance(first, torch.SymInt) or isinstance(second, torch.SymInt):
        return 1 not in (known(first), known(second))
    return first == second


def known(size: Any) -> int | None:
    """A size that is a number when a graph is compiled."""
    return size if isinstance(size, int) else None
