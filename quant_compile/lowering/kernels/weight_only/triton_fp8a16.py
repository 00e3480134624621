"""FP8 weights under 16-bit (or f32) inputs: the 8-bit kernels of ``triton_w4a16``, which read e4m3 as bytes.

They serve where a device multiplies no FP8 (sm80), under a policy's ``fallback: weight_only``. A scale of the whole tensor is
stored per row, so that one kernel serves both.
"""

from __future__ import annotations

from dataclasses import replace

from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.scheme import QuantArgs, Scheme
from quant_compile.lowering.kernels.weight_only import triton_w4a16 as integers
from quant_compile.lowering.registry import Kernel, Problem, Rank, anyhow
from quant_compile.lowering.target import Target

# What has the same planes but for the codes' type, and so the same costs.
ALIKE = Scheme(QuantArgs(8, "int", "channel"))


def _alike(problem: Problem) -> Problem | Reject:
    weights = problem.scheme.weights
    if (
        problem.scheme.input_activations is not None
        or family_of(problem.scheme).name != "fp8"
        or weights.format != "e4m3"
    ):
        return Reject("serves e4m3 weights with 16-bit inputs")
    return replace(problem, scheme=ALIKE)


def fit_gemv(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """One row of x."""
    alike = _alike(problem)
    return alike if isinstance(alike, Reject) else integers.fit_gemv8(alike, m, target)


def fit_matmul(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """16-bit x of a few hundred rows at most."""
    alike = _alike(problem)
    return alike if isinstance(alike, Reject) else integers.fit_matmul8(alike, m, target)


def fit_dequant(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m."""
    alike = _alike(problem)
    return alike if isinstance(alike, Reject) else integers.fit_dequant8(alike, m, target)


KERNELS = (
    Kernel("triton_fp8a16_gemv", "rows", fit_gemv, integers.run_gemv8, recorded=anyhow),
    Kernel("triton_fp8a16", "rows", fit_matmul, integers.run_matmul8, recorded=integers.recorded_matmul8),
    Kernel("triton_fp8a16_dequant", "rows", fit_dequant, integers.run_dequant8, recorded=anyhow),
)
