"""Weights in GGUF blocks on CPU: a few rows at a time turned into f32, then multiplied. Reads row-form planes of the family gguf."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.ir.ggml.decode import decode
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target

# Weight elements turned into f32 at a time: 1 MB, which leaves room in cache for what decoding keeps besides.
CHUNK_ELEMENTS = 1 << 18
# Microseconds of one thread for each weight that is decoded.
DECODE_US = 2.5e-3


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any size, on CPU."""
    if target.device != "cpu":
        return Reject("runs on CPU only")
    if family_of(problem.scheme).name != "gguf":
        return Reject("serves weights in GGUF blocks")
    conversion = DECODE_US * problem.n * problem.k / max(1, target.sm_count)
    bits = bits_per_weight(problem.scheme)
    return Rank(estimate(problem, m, target, 1.9, bits, math_bits=16, input_bits=32) + conversion)


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] times [n, k] plus bias -> [m, n], f32 sums. Source: the family's ``linear``."""
    left, (blocks,), name = x[0].float(), w, block_of(problem.scheme).name
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    step = max(1, CHUNK_ELEMENTS // max(1, problem.k))
    for start in range(0, problem.n, step):
        y[:, start : start + step] = torch.mm(left, decode(name, blocks[start : start + step]).t())
    return (y if bias is None else y.add_(bias.float())).to(problem.dtype)


KERNELS = (Kernel("torch_cpu_gguf", "rows", fit, run),)
