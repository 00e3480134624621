"""The scheme's own torch reference as a kernel: runs anything anywhere, slowly; the last resort on CPU."""

from __future__ import annotations

from torch import Tensor

from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import MoeProblem, moe_reference
from quant_compile.lowering.moe import MoeKernel
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target


def fit(problem: Problem, m: int, target: Target) -> Rank:
    """Always, at the highest cost."""
    return Rank(1e9)


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """The family's ``linear`` over row-form planes. Source: the scheme file."""
    return family_of(problem.scheme).linear(x, w, bias, problem.scheme, problem.dtype)


def fit_moe(problem: MoeProblem, tokens: int, target: Target) -> Rank:
    """Always, at the highest cost."""
    return Rank(1e9)


def run_moe(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem,
) -> Tensor:  # fmt: skip
    """``ir.moe.moe_reference`` over planes in row form. Source: the scheme file."""
    p = problem
    return moe_reference(x, ids, weights, w13, b13, w2, b2, p.scheme, p.activation, p.dtype, scale2, p.scheme2)


MOE_KERNELS = (MoeKernel("reference_moe", "experts", fit_moe, run_moe, reference=True, ungated=True, mixed=True),)
KERNELS = (Kernel("reference", "rows", fit, run, reference=True),)
