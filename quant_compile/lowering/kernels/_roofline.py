"""The cost model that kernels' ``fit`` share: a roofline in microseconds, for choosing where nothing was measured.

It reads a Problem and a Target and knows nothing of kernels: each kernel passes how much of the roofs it reaches.
Figures are for comparing kernels on one device, never for reporting.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant_compile.lowering.registry import Problem
from quant_compile.lowering.target import Target


@dataclass(frozen=True)
class Roof:
    """Speed limits of one device.

    Attributes:
        bandwidth: bytes a microsecond that a plain copy reaches.
        math16: dense multiply-adds on 16-bit operands, in operations (2 per multiply-add) a microsecond.
        math8: the same on 8-bit operands (fp8 or int8).
        launch: microseconds from one kernel to the next inside a CUDA graph.
    """

    bandwidth: float
    math16: float
    math8: float
    launch: float = 2.0


# Vendors' dense peaks; bandwidth is what a copy reaches (about 0.9 of the vendor's figure). One product stands for each
# arch: A100 80GB, L40S, H200, B200, RTX PRO 6000.
ROOFS = {
    80: Roof(1.8e6, 312e6, 624e6),
    89: Roof(0.78e6, 362e6, 733e6),
    90: Roof(4.3e6, 989e6, 1979e6),
    100: Roof(7.0e6, 2250e6, 4500e6),
    120: Roof(1.6e6, 500e6, 1000e6),
}
CPU_CORE = Roof(5e3, 0.05e6, 0.05e6, launch=5.0)


def roof(target: Target) -> Roof:
    """The roof of ``target``; an arch that is not listed takes the nearest older one (or the oldest)."""
    if target.device != "cuda":
        cores = max(1, target.sm_count)
        return Roof(CPU_CORE.bandwidth * cores, CPU_CORE.math16 * cores, CPU_CORE.math8 * cores, CPU_CORE.launch)
    older = [arch for arch in ROOFS if arch <= target.arch]
    return ROOFS[max(older) if older else min(ROOFS)]


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
