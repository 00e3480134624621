"""The scheme's own torch reference as a kernel: runs anything anywhere, slowly; the last resort on CPU."""

from __future__ import annotations

from torch import Tensor

from quant_compile.ir.family import Planes, family_of
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target


def fit(problem: Problem, m: int, target: Target) -> Rank:
    """Always, at the highest cost."""
    return Rank(1e9)


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """The family's ``linear`` over row-form planes. Source: the scheme file."""
    return family_of(problem.scheme).linear(x, w, bias, problem.scheme, problem.dtype)


KERNELS = (Kernel("reference", "rows", fit, run, reference=True),)
