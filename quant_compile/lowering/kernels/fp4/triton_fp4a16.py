"""Triton kernels for FP4 weights (NVFP4, MXFP4) under 16-bit or f32 inputs, from row-form planes, sm80 and newer.

``triton_fp4a16_gemv`` streams rows of w through plain cores for one or two rows of x, ``triton_fp4a16`` decodes in registers
and multiplies on tensor cores, ``triton_fp4a16_dequant`` makes a copy in x's dtype for cuBLAS. Only x's dtype limits what a
weight may be: one that does not fit float16 becomes inf there (or, in the copy, a subnormal).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight
from quant_compile.lowering.kernels._launch import sm_count_of, triton_type
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank, anyhow
from quant_compile.lowering.schemes.fp4 import MXFP4, NVFP4
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import aligned, enqueue, rows_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GEMV_ROWS = 2
MATMUL_ROWS = 128  # beyond this many rows a dequantized copy and cuBLAS are faster by far (measured on an H200)


# --- fit; shares of the roofs as measured on an H200 ---


def refuse(problem: Problem, target: Target) -> Reject | None:
    """Why none of these kernels can run the problem; None when one may."""
    scheme = problem.scheme
    if scheme.weights.format != "e2m1" or scheme.input_activations is not None:
        return Reject(f"serves FP4 weights with 16-bit inputs, not {scheme.spec}")
    answers = [family.accepts(scheme) for family in (NVFP4, MXFP4)]
    if None not in answers:
        return answers[0]
    if target.device != "cuda":
        return Reject("needs a CUDA GPU")
    if target.arch < 80:
        return Reject(f"needs sm80 or newer, this is {target.label}")
    if not target.has("triton"):
        return Reject("triton is not installed")
    if problem.dtype not in DTYPES:
        return Reject(f"x must be bfloat16, float16 or float32, got {str(problem.dtype).removeprefix('torch.')}")
    return None


def fit_gemv(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """One or two rows of x."""
    reject = refuse(problem, target)
    if reject is not None:
        return reject
    if m > GEMV_ROWS:
        return Reject(f"runs at most {GEMV_ROWS} rows of x, got {m}")
    bits = bits_per_weight(problem.scheme)
    return Rank(estimate(problem, m, target, 0.05, bits, math_bits=16, bandwidth_efficiency=0.45))


def fit_matmul(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """16-bit x of at most MATMUL_ROWS rows."""
    reject = refuse(problem, target)
    if reject is not None:
        return reject
    if problem.dtype == torch.float32:
        return Reject("tensor cores would round f32 inputs to TF32")
    if m > MATMUL_ROWS:
        return Reject(f"runs at most {MATMUL_ROWS} rows of x, got {m}")
    plan = matmul_plan(problem, m, target.sm_count)
    cost = estimate(
        problem, m, target, 0.1, bits_per_weight(problem.scheme), math_bits=16, bandwidth_efficiency=0.17,
        tile_m=plan.block_m, launches=2 if plan.splits > 1 else 1,
        extra_bytes=8.0 * plan.splits * m * problem.n if plan.splits > 1 else 0.0,
    )  # fmt: skip
    return Rank(cost)


def fit_dequant(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m: a copy of the weight in x's dtype, then cuBLAS."""
    reject = refuse(problem, target)
    if reject is not None:
        return reject
    copy = problem.n * problem.k * problem.dtype.itemsize
    # 0.64: cuBLAS reaches 0.7 of the peak, and the copy is made before it starts.
    efficiency = 0.05 if problem.dtype == torch.float32 else 0.64
    bits = bits_per_weight(problem.scheme)
    cost = estimate(
        problem, m, target, efficiency, bits, math_bits=16, tile_m=64, launches=2, extra_bytes=2.0 * copy
    )  # fmt: skip
    return Rank(cost)


# --- run ---


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.fp4._triton_fp4a16")


def _planes(w: Planes) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and scales, which kernels read as bytes, and the global scale of each row (NVFP4)."""
    return w[0], w[1], w[2] if len(w) == 3 else None


def _group_bytes(problem: Problem) -> int:
    """Bytes of codes that share a scale."""
    return (problem.scheme.weights.group_size or 2) // 2


@dataclass(frozen=True)
class GemvPlan:
    """Rows of w per program, int32 words of each row per step, warps."""

    rows: int
    words: int
    warps: int


def gemv_plan(problem: Problem, m: int, sm_count: int) -> GemvPlan:
    """As measured on an H200: 16 bytes of each row per thread and step; two rows of x leave registers for one warp."""
    width = -(-problem.k // (2 * _group_bytes(problem))) * _group_bytes(problem) // 4
    words = 256 if m == 1 and (width % 256 == 0 or width > 1024) else 128
    return GemvPlan(4 if problem.n >= 8 * sm_count else 2, words, words // 128)


def recorded_gemv(problem: Problem, m: int, target: Target) -> object:
    """How a launch for m rows is cut up."""
    return m, gemv_plan(problem, m, target.sm_count)


def run_gemv(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: GemvPlan | None = None) -> Tensor:
    """x [m, k], m at most two, times FP4 rows -> [m, n], f32 sums rounded once. Source: the family's ``linear``."""
    rows, (data, scale, whole) = x[0], _planes(w)
    m = rows.shape[0]
    plan = plan or gemv_plan(problem, rows_of(rows), sm_count_of(rows.device))
    width = data.shape[1] // 4
    lanes = 4 if width % 4 == 0 else 2
    wide = problem.dtype != torch.float32 and problem.k % 4 == 0 and aligned(rows, 8)
    y = rows.new_empty(m, problem.n)
    enqueue(
        _source().gemv_fp4_kernel, (-(-problem.n // plan.rows),),
        rows, data, scale, whole, bias, y,
        m, problem.n, problem.k // 4 if wide else problem.k, width // lanes,
        M=1 << (rows_of(rows) - 1).bit_length(), BN=plan.rows, WORDS=plan.words, LANES=lanes, VECTOR=_group_bytes(problem) // 4,
        EVEN=width % plan.words == 0 and problem.k == width * 8, E8M0=whole is None, X64=wide,
        BF16=problem.dtype == torch.bfloat16, OUT=triton_type(problem.dtype), num_warps=plan.warps,
    )  # fmt: skip
    return y


@dataclass(frozen=True)
class MatmulPlan:
    """Tile of ``triton_fp4a16``: rows of x, rows of w, bytes of codes a step, warps, pipeline stages, parts of k."""

    block_m: int
    block_n: int
    block_bytes: int
    warps: int
    stages: int
    splits: int


def matmul_plan(problem: Problem, m: int, sm_count: int) -> MatmulPlan:
    """Parts of k so that SMs have programs enough (measured on an H200), each part of at least 512 columns."""
    if m <= 64:
        tile = (16, 64, 32, 4, 4) if m <= 16 else (32, 64, 32, 4, 4) if m <= 32 else (64, 128, 32, 4, 3)
    else:
        tile = (128, 128, 32, 8, 3)
    programs = -(-problem.n // tile[1]) * -(-m // tile[0])
    per_sm = 12 if m <= 32 else 3 if m <= 64 else 2
    splits = min(max(1, per_sm * sm_count // programs), max(1, problem.k // 512), 8)
    return MatmulPlan(*tile, splits)


def recorded_matmul(problem: Problem, m: int, target: Target) -> object:
    """How a launch for m rows is cut up."""
    return matmul_plan(problem, m, target.sm_count)


def run_matmul(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: MatmulPlan | None = None) -> Tensor:
    """x [m, k] bf16 or f16 times FP4 rows decoded in registers, on tensor cores -> [m, n].

    Parts of k are summed in a fixed order, so equal inputs give equal bits. Source: the family's ``linear``.
    """
    rows, (data, scale, whole) = x[0], _planes(w)
    m, n, width = rows.shape[0], problem.n, data.shape[1]
    plan = plan or matmul_plan(problem, rows_of(rows), sm_count_of(rows.device))
    per_split = math.ceil(width / plan.block_bytes / plan.splits) * plan.block_bytes
    splits = -(-width // per_split)
    y = rows.new_empty(m, n)
    parts = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=rows.device)
    enqueue(
        _source().matmul_fp4_kernel, (-(-n // plan.block_n), -(-m // plan.block_m), splits),
        rows, data, scale, whole, bias if splits == 1 else None, parts, m, n, problem.k, width, per_split,
        BM=plan.block_m, BN=plan.block_n, BYTES=plan.block_bytes, GROUP=_group_bytes(problem),
        EVEN=width % plan.block_bytes == 0 and problem.k == width * 2, E8M0=whole is None, SPLIT=splits > 1,
        OUT=triton_type(problem.dtype), num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if splits > 1:
        block = 1024
        sum_parts = import_module("quant_compile.lowering.kernels.weight_only._triton_w4a16").sum_parts_kernel
        enqueue(
            sum_parts,
            (-(-m * n // block),),
            parts,
            whole,
            bias,
            y,
            m * n,
            n,
            splits,
            BLOCK=block,
            OUT=triton_type(problem.dtype),
            num_warps=4,
        )
    return y


def dequantize(w: Planes, problem: Problem) -> Tensor:
    """FP4 rows -> [n, k] in the problem's dtype, each weight rounded once."""
    data, scale, whole = _planes(w)
    n, k, width = problem.n, problem.k, data.shape[1]
    out = torch.empty(n, k, dtype=problem.dtype, device=data.device)
    rows, bytes_ = 8, 256
    enqueue(
        _source().dequantize_fp4_kernel, (-(-n // rows), -(-width // bytes_)),
        data, scale, whole, out, n, k, width, BN=rows, BYTES=bytes_, GROUP=_group_bytes(problem),
        EVEN=width % bytes_ == 0, E8M0=whole is None, OUT=triton_type(problem.dtype), num_warps=4,
    )  # fmt: skip
    return out


def run_dequant(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] times a dequantized copy of the weight, by cuBLAS -> [m, n]. Source: the family's ``linear``."""
    dense = dequantize(w, problem).t()
    return torch.mm(x[0], dense) if bias is None else torch.addmm(bias, x[0], dense)


KERNELS = (
    Kernel("triton_fp4a16_gemv", "rows", fit_gemv, run_gemv, recorded=recorded_gemv),
    Kernel("triton_fp4a16", "rows", fit_matmul, run_matmul, recorded=recorded_matmul),
    Kernel("triton_fp4a16_dequant", "rows", fit_dequant, run_dequant, recorded=anyhow),
)
