"""The ``sglq_kernels`` op: a linear over packed planes whose kernel is chosen by the number of rows at run time.

    sglq_kernels.linear(x planes, packed w planes, bias?, dispatch) -> [..., n]

``dispatch`` is ``Dispatch.text``: the op carries all it needs, so a graph loaded from Inductor's cache or from a package
runs in a fresh process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.lowering.select import parse_dispatch

LIBRARY = torch.library.Library("sglq_kernels", "DEF")
LIBRARY.define("linear(Tensor[] x, Tensor[] w, Tensor? bias, str dispatch) -> Tensor")


def _linear(x: list[Tensor], w: list[Tensor], bias: Tensor | None, dispatch: str) -> Tensor:
    chosen = parse_dispatch(dispatch)
    problem = chosen.problem
    data = x[0]
    lead = data.shape[:-1]
    rows = data.reshape(-1, problem.k)
    m = rows.shape[0]
    if m == 0 or problem.n == 0:
        return data.new_empty((*lead, problem.n), dtype=problem.dtype)
    if not rows.is_contiguous():
        rows = rows.contiguous()
    planes = (rows, *(_flat_scale(scale, m) for scale in x[1:]))
    y = chosen.kernel_for(m).run(planes, tuple(w), bias, problem)
    return y if len(lead) == 1 else y.view(*lead, problem.n)


def _flat_scale(scale: Tensor, m: int) -> Tensor:
    """[..., s] -> [m, s]; a scale of the whole tensor stays [1]."""
    return scale if scale.dim() <= 2 else scale.reshape(m, scale.shape[-1])


def _linear_fake(x: list[Tensor], w: list[Tensor], bias: Tensor | None, dispatch: str) -> Tensor:
    problem = parse_dispatch(dispatch).problem
    return x[0].new_empty((*x[0].shape[:-1], problem.n), dtype=problem.dtype)


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::linear", _linear_fake, lib=LIBRARY)

linear = torch.ops.sglq_kernels.linear.default
