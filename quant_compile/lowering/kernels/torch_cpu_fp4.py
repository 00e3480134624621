"""FP4 weights under FP4 or 16-bit inputs on CPU: a few rows of the weight at a time turned into f32 and multiplied.

Reads row-form planes of the families nvfp4 and mxfp4.
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
    if family_of(problem.scheme).name not in ("nvfp4", "mxfp4"):
        return Reject("serves FP4 weights")
    conversion = 4e-3 * problem.n * problem.k / max(1, target.sm_count)
    bits = problem.scheme.bits_per_weight
    return Rank(estimate(problem, m, target, 1.9, bits, math_bits=16, input_bits=32) + conversion)


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] times [n, k] -> [m, n]; both sides dequantized by the family, products in f32. Source: the scheme file."""
    scheme, k, n = problem.scheme, problem.k, problem.n
    dequantize = family_of(scheme).dequantize_weight
    # The planes of an input are those of a weight.
    left = x[0].float() if scheme.input_activations is None else dequantize(x, scheme, k)
    y = torch.empty((left.shape[0], n), dtype=torch.float32)
    step = max(1, CHUNK_ELEMENTS // max(1, k))
    for start in range(0, n, step):
        rows = dequantize(tuple(plane[start : start + step] for plane in w), scheme, k)
        y[:, start : start + step] = torch.mm(left, rows.t())
    return (y if bias is None else y + bias.float()).to(problem.dtype)


KERNELS = (Kernel("torch_cpu_fp4", "rows", fit, run),)
