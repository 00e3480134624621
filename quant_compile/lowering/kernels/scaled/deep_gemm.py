"""Block FP8 linears on DeepGEMM, which compiles a kernel for each shape class when it first meets it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject
from quant_compile.lowering.kernels._library import arch_from, fp8_blocks, multiple, output_dtype
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target

# The library's TMA loads want each column of input scales to start on 16 bytes.
SCALE_ALIGNMENT = 4


@lru_cache(maxsize=None)
def _gemm() -> Callable[..., None]:
    """The GEMM, after the library's own start.

    It starts with a lasting allocation of 32 MiB for cuBLAS, which would break the memory pool of a CUDA graph if that is
    being recorded; it has a switch to allocate at each call of cuBLAS instead, which is never called here.
    """
    os.environ.setdefault("DG_USE_TEMP_CUBLASLT_WORKSPACE", "1")
    library = importlib.import_module("deep_gemm")
    library.get_num_sms()
    return library.fp8_gemm_nt


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """e4m3 in 128x128 blocks with f32 scales: sm90, bf16, k a multiple of 128, n of 64."""
    refusal = (
        fp8_blocks(problem.scheme)
        or arch_from(target, 90, 90)
        or output_dtype(problem, torch.bfloat16)
        or multiple("k", problem.k, 128)
        or multiple("n", problem.n, 64)
    )
    if refusal is not None:
        return refusal
    if not target.has("deep_gemm"):
        return Reject("deep_gemm cannot be imported here")
    if target.ops is None:
        try:
            _gemm()  # now, while no CUDA graph is being recorded
        except Exception as error:  # whatever a library does when it starts, another kernel serves
            return Reject(f"deep_gemm does not start here: {type(error).__name__}: {error}")
    transposes = 0 if m % SCALE_ALIGNMENT == 0 else 1
    return Rank(estimate(problem, m, target, 0.62, 8, bandwidth_efficiency=0.8, tile_m=64, launches=1 + transposes))


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] e4m3 with scales [m, k/128] times [n, k] e4m3 with scales [n/128, k/128] -> [m, n] bf16, plus bias.

    Input scales along m pass through when m is a multiple of 4; else the library transposes row-major ones itself.
    Source: DeepGEMM ``fp8_gemm_nt`` (1D x 2D scales).
    """
    data, scale = x
    m = data.shape[0]
    if m % SCALE_ALIGNMENT:
        scale = scale.contiguous()
    y = torch.empty((m, problem.n), dtype=problem.dtype, device=data.device)
    _gemm()((data, scale), (w[0], w[1]), y)
    return y if bias is None else y.add_(bias)


KERNELS = (Kernel("deep_gemm", "rows", fit, run, column_scales=True),)
