"""Find products with all experts of a Parameter [E, n, k], or with one of them: ``y[e] = x[e] @ w[e].T``.

Models that write their experts by hand compute all of them densely, or go over them one by one. Each product is described
by letters, as in einsum: ``tk,ekn->etn``. Blocks that ``ir/experts.py`` understands as a whole are not looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import Parameter

from quant_compile.ir.family import Reject
from quant_compile.ir.sites import DTYPES, Weighted, module_class, weighted
from quant_compile.ir.writes import Writes


@dataclass(frozen=True, eq=False)
class BatchedSite:
    """A product with every expert of a Parameter, or with one.

    Attributes:
        node: the node that computes it.
        x: its other operand.
        weight: placeholder of the Parameter.
        x_letters, out_letters: dimensions of operand and result; ``e``, ``n``, ``k`` are the Parameter's.
        transposed: an expert is stored [k, n].
        experts, n, k: sizes.
        module_class: class of the innermost module around the node.
        index: the one expert, a number or a node; None: every one. No operand has an ``e`` then.
        bias: what is added to the result.
        view: the shape [E, ., .] that the Parameter is viewed as; empty where it has it.
        squeezed: dimensions of size 1 of x that no letter stands for.
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
    index: Any = None
    bias: fx.Node | None = None
    view: tuple[int, ...] = ()
    squeezed: tuple[int, ...] = ()

    @property
    def slot(self) -> int:
        """Position of the weight among the arguments of Dynamo's graph."""
        return self.weight.meta["argument"]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the result."""
        return self.node.meta["example_value"].dtype


def find_batched(
    gm: fx.GraphModule, parameters: Mapping[int, Parameter], taken: Collection[fx.Node], writes: Writes | None = None
) -> list[BatchedSite]:
    """Products with all experts outside of ``taken``; what does not fit is left for the misses of others."""
    writes = writes or Writes(gm.graph)
    found = (
        _match(product)
        for node in gm.graph.nodes
        if node not in taken and isinstance(product := weighted(node, parameters, writes), Weighted)
    )
    return [site for site in found if isinstance(site, BatchedSite)]


def _match(found: Weighted) -> BatchedSite | Reject:
    index, each, order = found.stored.index, found.each, found.letters
    if not found.over_experts:
        return Reject("a linear")
    if (
        found.from_another and found.product.op != "linear"
    ):  # a linear says by its second operand which of them is the weight
        return Reject("both operands are Parameters")
    if index is None and not each:
        each = order[0]
    keeps = found.keeps.replace(each, "") if each else found.keeps
    plain = (each + keeps + found.sums, each + found.sums + keeps)
    if order not in plain or len(each) > 1 or (index is not None and each) or not (len(keeps) == len(found.sums) == 1):
        return Reject("not a product over one dimension of each expert")
    result, bias = found.node.meta["example_value"], found.product.bias
    if result.dtype not in DTYPES:
        return Reject("only bf16, fp16 and fp32 are quantized")
    if bias is not None and (found.product.op.startswith("conv") or not isinstance(bias, fx.Node)):
        return Reject("a bias that is not added to the last dimension")
    plain_letters = str.maketrans({each: "e", found.sums: "k", keeps: "n"} if each else {found.sums: "k", keeps: "n"})
    rows = str.maketrans({letter: str(i) for i, letter in enumerate(found.rows)})
    own, out = (side.translate(plain_letters | rows) for side in (found.own, found.out))
    experts = found.stored.shape[0]
    n, k, transposed = found.size(keeps), found.size(found.sums), order.index(found.sums) < order.index(keeps)
    weight = found.stored.weight
    shape = (experts, k, n) if transposed else (experts, n, k)
    view = () if tuple(weight.meta["example_value"].shape) == shape else shape
    module = module_class(found.node)
    return BatchedSite(
        found.node, found.x, weight, own, out, transposed, experts, n, k, module, index, bias, view, found.squeezed
    )
