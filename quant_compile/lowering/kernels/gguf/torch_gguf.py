"""GGUF types without a kernel of their own on GPUs: torch turns blocks into a copy in x's dtype, a few rows at a time, for cuBLAS.

Slow, since decoding is dozens of launches over f32. Types with tables of values are left out: tables are made on the host, which a
CUDA graph cannot record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.ir.ggml.decode import decode
from quant_compile.lowering.kernels._library import arch_from
from quant_compile.lowering.kernels.gguf.triton_gguf import copy_cost
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target

TYPES = ("q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "tq1_0", "tq2_0")
CHUNK_ELEMENTS = 1 << 24  # 64 MB in f32


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m and dtype."""
    if family_of(problem.scheme).name != "gguf":
        return Reject("serves weights in GGUF blocks")
    if block_of(problem.scheme).name not in TYPES:
        return Reject(f"decodes {', '.join(name.upper() for name in TYPES)}, not {problem.scheme.spec}")
    refusal = arch_from(target, 80)
    if refusal is not None:
        return refusal
    return Rank(copy_cost(problem, m, target, bits_per_weight(problem.scheme) + 16 * 32))


def dequantize(w: Planes, problem: Problem) -> Tensor:
    """``blocks`` -> [n, k] in the problem's dtype, each weight rounded once."""
    out = torch.empty(problem.n, problem.k, dtype=problem.dtype, device=w[0].device)
    step = max(1, CHUNK_ELEMENTS // problem.k)
    for start in range(0, problem.n, step):
        out[start : start + step] = decode(block_of(problem.scheme).name, w[0][start : start + step])
    return out


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] times a dequantized copy of the weight, by cuBLAS -> [m, n]. Source: the family's ``linear``."""
    dense = dequantize(w, problem).t()
    return torch.mm(x[0], dense) if bias is None else torch.addmm(bias, x[0], dense)


KERNELS = (Kernel("torch_gguf_dequant", "rows", fit, run),)
