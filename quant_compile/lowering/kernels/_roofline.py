"""The cost model that kernels' ``fit`` share: a roofline in microseconds, for choosing where nothing was measured.

It reads a Problem and a Target and knows nothing of kernels: each kernel passes how much of the roofs it reaches.
Figures are for comparing kernels on one device, never for reporting.
"""

from __future__ import annotations

from quant_compile.lowering.registry import Problem
from quant_compile.lowering.roofs import ROOFS, Roof, roof
from quant_compile.lowering.target import Target

__all__ = ["ROOFS", "Roof", "estimate", "roof", "shared_memory"]


def shared_memory(target: Target) -> int:
    """Bytes of shared memory that tiles may fill: below what one program may have, 163, 227 or 99 KiB."""
    if target.arch in (80, 87):
        return 160 * 1024
    return (208 if 90 <= target.arch < 120 else 96) * 1024


def estimate(
    problem: Problem,
    m: int,
    target: Target,
    efficiency: float,
    weight_bits: float,
    *,
    math_bits: int = 8,
    input_bits: int | None = None,
    bandwidth_efficiency: float = 0.85,
    tile_m: int = 1,
    launches: int = 1,
    extra_bytes: float = 0.0,
) -> float:
    """Estimated microseconds of ``y[m, n] = x[m, k] @ w[n, k].T``.

    Args:
        efficiency: share of the device's peak math rate that the kernel reaches on large problems.
        weight_bits: bits read per weight, scales included.
        math_bits: width of the multiplied operands: 4 (twice the 8-bit rate), 8 or 16.
        input_bits: bits read per element of x; ``math_bits`` when None.
        bandwidth_efficiency: share of the copy bandwidth that the kernel reaches when it is bound by memory.
        tile_m: rows that the kernel computes at a time; m is rounded up to it for the math.
        launches: kernels launched (split-K reductions, separate conversions).
        extra_bytes: further memory traffic: workspaces, dequantized copies.
    """
    limits = roof(target)
    out_bits = problem.dtype.itemsize * 8
    bits = problem.n * problem.k * weight_bits + m * problem.k * (input_bits or math_bits) + m * problem.n * out_bits
    memory = (bits / 8 + extra_bytes) / (limits.bandwidth * bandwidth_efficiency)
    rows = -(-m // tile_m) * tile_m
    peak = limits.math16 if math_bits > 8 else limits.math8 * (2 if math_bits <= 4 else 1)
    math = 2.0 * rows * problem.n * problem.k / (peak * efficiency)
    return limits.launch * launches + max(memory, math)
