"""Linears on torch's own CUDA kernels: ``_scaled_mm`` for FP8 (rowwise and block scales) and ``_int_mm`` for INT8.

They need no library beyond torch, so they serve wherever sgl-kernel, DeepGEMM and Triton are missing. All read row-form
planes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject
from quant_compile.lowering.kernels._library import (
    arch_from,
    fp8_blocks,
    fp8_rows,
    int8_rows,
    multiple,
    output_dtype,
    pad_rows,
    row_scale,
)
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank, anyhow
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import rows_of

# _int_mm refuses up to 16 rows.
INT_MM_ROWS = 32
# cuBLASLt reads block scales in rows of four f32 (16 bytes) along k, and wants input scales aligned alike along m.
SCALE_ALIGNMENT = 4


def fit_scaled_mm(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """FP8 per row and token, sm89 and newer; n and k multiples of 16. Only sm90's cuBLAS writes f16 and f32."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if target.arch == 90 else (torch.bfloat16,)
    refusal = (
        fp8_rows(problem.scheme)
        or arch_from(target, 89)
        or output_dtype(problem, *dtypes)
        or multiple("k", problem.k, 16)
        or multiple("n", problem.n, 16)
    )
    return refusal or Rank(estimate(problem, m, target, 0.62, 8, bandwidth_efficiency=0.45, tile_m=64))


def run_scaled_mm(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] e4m3 with scale [m, 1] or [1] times [n, k] e4m3 with scale [n, 1] -> [m, n].

    Weights always take the rowwise form: a per-tensor scale is stored once per row, and merged siblings differ in it.
    Source: ``torch._scaled_mm`` (cuBLASLt or CUTLASS).
    """
    y = torch._scaled_mm(
        x[0],
        w[0].t(),
        scale_a=row_scale(x[1], x[0].shape[0]),
        scale_b=w[1].t(),
        out_dtype=problem.dtype,
        use_fast_accum=True,
    )
    # Not inside: cuBLASLt has no rowwise kernel with a bias for some shapes (seen at n=4096 k=14336, m<=16).
    return y if bias is None else y.add_(bias)


def fit_scaled_mm_block(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """FP8 in 128x128 blocks on sm90 (cuBLASLt 12.9); n a multiple of 128, k of 512."""
    version = torch.version.cuda
    if version is not None and tuple(map(int, version.split(".")[:2])) < (12, 9):
        return Reject(f"block scales need CUDA 12.9 or newer, torch was built with {version}")
    refusal = (
        fp8_blocks(problem.scheme)
        or arch_from(target, 90, 90)
        or output_dtype(problem, torch.bfloat16, torch.float32)
        or multiple("n", problem.n, 128)
        or multiple("k", problem.k, 128 * SCALE_ALIGNMENT)
    )
    return refusal or Rank(estimate(problem, m, target, 0.55, 8, bandwidth_efficiency=0.45, tile_m=64, launches=2))


def run_scaled_mm_block(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] e4m3 with scales [m, k/128] times [n, k] e4m3 with scales [n/128, k/128] -> [m, n].

    Source: ``torch._scaled_mm``, modes 1x128 and 128x128.
    """
    m = x[0].shape[0]
    data, scale = pad_rows(x, SCALE_ALIGNMENT)
    y = torch._scaled_mm(data, w[0].t(), scale_a=scale, scale_b=w[1].t(), out_dtype=problem.dtype)[:m]
    return y if bias is None else y.add_(bias)


def fit_int_mm(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """INT8 on sm80 and newer; k a multiple of 16, n of 8. Scales are separate kernels, hence the cost."""
    refusal = (
        int8_rows(problem.scheme)
        or arch_from(target, 80)
        or multiple("k", problem.k, 16)
        or multiple("n", problem.n, 8)
    )
    if refusal is not None:
        return refusal
    epilogue = m * problem.n * 16.0
    launches = 3 if m > 16 else 5
    return Rank(estimate(problem, max(m, INT_MM_ROWS), target, 0.6, 8, launches=launches, extra_bytes=epilogue))


def _int_mm_padded(problem: Problem, m: int, target: Target) -> bool:
    return m <= 16


def run_int_mm(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] int8 times [n, k] int8 as an exact int32 sum, then x scale, w scale and bias in f32.

    Source: ``torch._int_mm`` (cuBLASLt).
    """
    data, m = x[0], x[0].shape[0]
    if rows_of(data) <= 16:
        data = data.new_zeros((INT_MM_ROWS, problem.k))
        data[:m] = x[0]
    y = torch._int_mm(data, w[0].t())[:m] * x[1]
    scale = w[1].reshape(-1)
    if bias is not None:
        return torch.addcmul(bias.float(), y, scale).to(problem.dtype)
    return torch.mul(y, scale, out=torch.empty(y.shape, dtype=problem.dtype, device=y.device))


KERNELS = (
    Kernel("torch_scaled_mm", "rows", fit_scaled_mm, run_scaled_mm, recorded=anyhow),
    Kernel("torch_scaled_mm_block", "rows", fit_scaled_mm_block, run_scaled_mm_block, column_scales=True),
    Kernel("torch_int_mm", "rows", fit_int_mm, run_int_mm, recorded=_int_mm_padded),
)
