"""sgl-kernel's ops for GGUF blocks as files have them: a copy in x's dtype for cuBLAS, and products with inputs of 8 bits.

``sgl_gguf_dequant`` computes what the scheme says. ``sgl_gguf_a8`` rounds the input to Q8_1, blocks of 32 int8 under one f16
scale, about half a percent of it, which no GGUF scheme asks for: it runs only where it is pinned.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.lowering.kernels._library import arch_from, output_dtype
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.gguf.triton_gguf import copy_cost
from quant_compile.lowering.registry import Kernel, Problem, Rank, anyhow
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import recordable

DECODES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s",
    "iq4_nl", "iq3_s", "iq2_s", "iq4_xs", "iq1_m",
)  # fmt: skip
MULTIPLIES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
ROUNDS = "rounds the input to Q8_1, which the scheme does not say: it runs only where it is pinned"


def _empty(w: Tensor, kind: int, m: int, n: int, dtype: torch.dtype | None) -> Tensor:
    return w.new_empty((m, n), dtype=dtype or torch.float16)


@lru_cache(maxsize=None)
def _op(name: str) -> Any:
    importlib.import_module("sgl_kernel")
    op = getattr(torch.ops.sgl_kernel, name).default
    return recordable(op, _empty) if name == "ggml_dequantize" else op


def refuse(problem: Problem, target: Target, types: tuple[str, ...], *names: str) -> Reject | None:
    """Why ops ``names``, which know ``types``, cannot run the problem; None when they can."""
    if family_of(problem.scheme).name != "gguf":
        return Reject("serves weights in GGUF blocks")
    if block_of(problem.scheme).name not in types:
        return Reject(f"sgl-kernel's {names[0]} does not know {problem.scheme.spec}")
    refusal = arch_from(target, 80) or output_dtype(problem, torch.bfloat16, torch.float16)
    if refusal is not None:
        return refusal
    missing = [name for name in names if not target.has(f"sgl_kernel::{name}")]
    return Reject(f"sgl-kernel has no {missing[0]} here") if missing else None


def fit_dequant(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m, bf16 or f16."""
    refusal = refuse(problem, target, DECODES, "ggml_dequantize")
    if refusal is not None:
        return refusal
    return Rank(copy_cost(problem, m, target, 1.5 * bits_per_weight(problem.scheme)))


def dequantize(w: Planes, problem: Problem) -> Tensor:
    """``blocks`` -> [n, k] in the problem's dtype."""
    return _op("ggml_dequantize")(w[0], block_of(problem.scheme).number, problem.n, problem.k, problem.dtype)


def run_dequant(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] times a dequantized copy of the weight, by cuBLAS -> [m, n].

    Source: sgl-kernel's ``ggml_dequantize``, which computes in f16.
    """
    dense = dequantize(w, problem).t()
    return torch.mm(x[0], dense) if bias is None else torch.addmm(bias, x[0], dense)


def fit_a8(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m, bf16 or f16."""
    refusal = refuse(problem, target, MULTIPLIES, "ggml_mul_mat_a8", "ggml_mul_mat_vec_a8")
    if refusal is not None:
        return refusal
    bits, share = bits_per_weight(problem.scheme), 0.45 if m == 1 else 0.08
    return Rank(estimate(problem, m, target, 0.05, bits, bandwidth_efficiency=share, tile_m=64, launches=2))


def run_a8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k], rounded to Q8_1, times ``blocks`` -> [m, n]; sums of a block in int32, of blocks in f32.

    Q8_1 of each 32 inputs: d = f16(max|x| / 127), codes round(x / d). Source: sgl-kernel's ``ggml_mul_mat_vec_a8`` (one row)
    and ``ggml_mul_mat_a8``.
    """
    op = _op("ggml_mul_mat_vec_a8" if x[0].shape[0] == 1 else "ggml_mul_mat_a8")
    y = op(w[0], x[0], block_of(problem.scheme).number, problem.n)
    return y if bias is None else y.add_(bias)


KERNELS = (
    Kernel("sgl_gguf_dequant", "rows", fit_dequant, run_dequant, recorded=anyhow),
    Kernel("sgl_gguf_a8", "rows", fit_a8, run_a8, only_pinned=ROUNDS),
)
