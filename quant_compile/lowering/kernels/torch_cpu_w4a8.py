"""4-bit weights under 8-bit inputs on CPU: the weight's integers turned into f32 a few rows at a time, then multiplied.

Reads row-form planes of the families w4a8 and qserve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target

# Weight elements turned into f32 at a time: 4 MB, which a last-level cache holds.
CHUNK_ELEMENTS = 1 << 20


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any size, on CPU."""
    if target.device != "cpu":
        return Reject("runs on CPU only")
    if family_of(problem.scheme).name not in ("w4a8", "qserve"):
        return Reject("serves 4-bit weights with 8-bit inputs")
    conversion = 2e-3 * problem.n * problem.k / max(1, target.sm_count)
    bits = problem.scheme.bits_per_weight
    return Rank(estimate(problem, m, target, 1.9, bits, math_bits=16, input_bits=32) + conversion)


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """(x codes @ dequantized w.T) * x scale + bias, f32 sums -> [m, n]. Source: the family's ``linear``."""
    family, left = family_of(problem.scheme), x[0].float()
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    step = max(1, CHUNK_ELEMENTS // max(1, problem.k))
    for start in range(0, problem.n, step):
        planes = tuple(plane[start : start + step] for plane in w)
        rows = family.dequantize_weight(planes, problem.scheme, problem.k)
        y[:, start : start + step] = torch.mm(left, rows.t())
    y.mul_(x[1])
    return (y if bias is None else y.add_(bias.float())).to(problem.dtype)


KERNELS = (Kernel("torch_cpu_w4a8", "rows", fit, run),)
