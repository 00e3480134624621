"""4-bit weights under quantized inputs, and FP4 weights, on CPU: a few rows at a time turned into f32, then multiplied.

Reads row-form planes of the families w4a8, qserve, nvfp4 and mxfp4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target

# Families whose inputs are plain codes under scales of rows, and those whose inputs have the planes of a weight.
CODES, FP4 = ("w4a8", "qserve"), ("nvfp4", "mxfp4")
# Weight elements turned into f32 at a time: 4 MB, which a last-level cache holds.
CHUNK_ELEMENTS = 1 << 20


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any size, on CPU."""
    if target.device != "cpu":
        return Reject("runs on CPU only")
    if family_of(problem.scheme).name not in (*CODES, *FP4):
        return Reject("serves 4-bit weights with 8-bit inputs, and FP4 weights")
    conversion = 2e-3 * problem.n * problem.k / max(1, target.sm_count)
    bits = bits_per_weight(problem.scheme)
    return Rank(estimate(problem, m, target, 1.9, bits, math_bits=16, input_bits=32) + conversion)


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] times [n, k] plus bias -> [m, n], f32 sums. Source: the family's ``linear``."""
    scheme, family = problem.scheme, family_of(problem.scheme)
    codes = family.name in CODES
    plain = codes or scheme.input_activations is None
    left = x[0].float() if plain else family.dequantize_weight(x, scheme, problem.k)
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    step = max(1, CHUNK_ELEMENTS // max(1, problem.k))
    for start in range(0, problem.n, step):
        rows = family.dequantize_weight(tuple(plane[start : start + step] for plane in w), scheme, problem.k)
        y[:, start : start + step] = torch.mm(left, rows.t())
    if codes:
        y.mul_(x[1])
    return (y if bias is None else y.add_(bias.float())).to(problem.dtype)


KERNELS = (Kernel("torch_cpu_4bit", "rows", fit, run),)
