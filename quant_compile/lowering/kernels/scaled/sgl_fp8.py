"""FP8 linears on sgl-kernel's CUTLASS kernels: per row and token, and in 128x128 blocks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject
from quant_compile.lowering.kernels._library import (
    arch_from,
    fp8_blocks,
    fp8_rows,
    multiple,
    output_dtype,
    pad_rows,
    row_scale,
    scaled_mm_result,
)
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank, anyhow
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import recordable

BLOCK_ROWS = 4


@lru_cache(maxsize=None)
def _op(name: str) -> Callable[..., Tensor]:
    importlib.import_module("sgl_kernel")
    return recordable(getattr(torch.ops.sgl_kernel, name).default, scaled_mm_result)


def fit_rows(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """e4m3 per row and token on sm89 and newer, bf16 or f16; k a multiple of 16, n of 8."""
    refusal = (
        fp8_rows(problem.scheme)
        or arch_from(target, 89)
        or output_dtype(problem, torch.bfloat16, torch.float16)
        or multiple("k", problem.k, 16)
        or multiple("n", problem.n, 8)
    )
    if refusal is not None:
        return refusal
    if not target.has("sgl_kernel::fp8_scaled_mm"):
        return Reject("sgl-kernel has no fp8_scaled_mm here")
    return Rank(estimate(problem, m, target, 0.65, 8, tile_m=64))


def run_rows(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] e4m3 with scale [m, 1] or [1] times [n, k] e4m3 with scale [n, 1], plus bias -> [m, n].

    Source: CUTLASS scaled matmul, as sgl-kernel exposes it.
    """
    scale = row_scale(x[1], x[0].shape[0])
    return _op("fp8_scaled_mm")(x[0], w[0].t(), scale, w[1], problem.dtype, bias)


def fit_block(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """e4m3 in 128x128 blocks on sm90 and sm100, bf16 or f16; n and k multiples of 128."""
    refusal = (
        fp8_blocks(problem.scheme)
        or arch_from(target, 90, 100)
        or output_dtype(problem, torch.bfloat16, torch.float16)
        or multiple("k", problem.k, 128)
        or multiple("n", problem.n, 128)
    )
    if refusal is not None:
        return refusal
    if not target.has("sgl_kernel::fp8_blockwise_scaled_mm"):
        return Reject("sgl-kernel has no fp8_blockwise_scaled_mm here")
    padding = 0 if m % BLOCK_ROWS == 0 else 2
    return Rank(estimate(problem, m, target, 0.58, 8, bandwidth_efficiency=0.65, tile_m=128, launches=2 + padding))


def run_block(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] e4m3 with scales [m, k/128] times [n, k] e4m3 with scales [n/128, k/128] -> [m, n], plus bias.

    The op takes input scales along m and weight scales along k; m is padded here to the multiple of 4 that it needs.
    Source: CUTLASS blockwise scaled matmul, as sgl-kernel exposes it.
    """
    m = x[0].shape[0]
    data, scale = pad_rows(x, BLOCK_ROWS)
    y = _op("fp8_blockwise_scaled_mm")(data, w[0].t(), scale, w[1].t(), problem.dtype)[:m]
    return y if bias is None else y.add_(bias)


KERNELS = (
    Kernel("sgl_fp8", "rows", fit_rows, run_rows, recorded=anyhow),
    Kernel("sgl_fp8_block", "rows", fit_block, run_block, column_scales=True),
)
