"""INT8 linears on sgl-kernel's CUTLASS kernel, scales and bias in its epilogue."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject
from quant_compile.lowering.kernels._library import (
    arch_from,
    int8_rows,
    multiple,
    output_dtype,
    row_scale,
    scaled_mm_result,
)
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank, anyhow
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import recordable


@lru_cache(maxsize=None)
def _op() -> Callable[..., Tensor]:
    importlib.import_module("sgl_kernel")
    return recordable(torch.ops.sgl_kernel.int8_scaled_mm.default, scaled_mm_result)


def refuse(problem: Problem, target: Target) -> Reject | None:
    """Why the GEMM cannot run here or with these sizes, whatever the scheme; None when it can."""
    refusal = (
        arch_from(target, 80, 90)
        or output_dtype(problem, torch.bfloat16, torch.float16)
        or multiple("k", problem.k, 16)
        or multiple("n", problem.n, 8)
    )
    if refusal is None and not target.has("sgl_kernel::int8_scaled_mm"):
        return Reject("sgl-kernel has no int8_scaled_mm here")
    return refusal


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int8 per row and token on sm80 to sm90, bf16 or f16; k a multiple of 16, n of 8."""
    refusal = int8_rows(problem.scheme) or refuse(problem, target)
    if refusal is not None:
        return refusal
    return Rank(estimate(problem, m, target, 0.68, 8, tile_m=64))


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] int8 with scale [m, 1] or [1] times [n, k] int8 with scale [n, 1], plus bias -> [m, n].

    Source: CUTLASS scaled matmul with int32 sums, as sgl-kernel exposes it.
    """
    scale = row_scale(x[1], x[0].shape[0])
    return _op()(x[0], w[0].t(), scale, w[1], problem.dtype, bias)


KERNELS = (Kernel("sgl_int8", "rows", fit, run, recorded=anyhow),)
