"""Speed limits of devices as data: what kernels' estimates, and estimates of linears in 16 bits, are made of."""

from __future__ import annotations

from dataclasses import dataclass

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
