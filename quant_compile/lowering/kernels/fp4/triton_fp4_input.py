"""FP4 inputs quantized in one launch: together with the RMSNorm before them, or under the maxima of their rows.

Inductor does not join a reduction over a row with one per group of it, and a dynamic global scale needs all rows first.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._library import arch_from
from quant_compile.lowering.registry import InputKernel, Norm
from quant_compile.lowering.schemes.fp4 import MX_GROUP, NV_GROUP
from quant_compile.lowering.target import Target

GROUPS = {"nvfp4": NV_GROUP, "mxfp4": MX_GROUP}
LONGEST_BLOCK = 8192  # columns that a program holds in registers; longer rows are read twice
ROWS_BLOCK = 2048
MOST_MAXIMA = 2048  # more of them are reduced by a launch of their own, instead of in every program
STEP = 1024


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.fp4._triton_fp4_input")


def _refusal(scheme: Scheme, dtype: torch.dtype, target: Target) -> Reject | None:
    if scheme.input_activations is None or family_of(scheme).name not in GROUPS:
        return Reject("quantizes inputs to FP4")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Reject(f"reads bfloat16, float16 or float32, not {str(dtype).removeprefix('torch.')}")
    if not target.has("triton"):
        return Reject("triton is not installed")
    return arch_from(target, 89)  # which convert to e4m3


def _whole_at_run_time(scheme: Scheme) -> bool:
    return family_of(scheme).name == "nvfp4" and not scheme.static


def fit_norm(scheme: Scheme, dtype: torch.dtype, target: Target) -> Reject | None:
    """NVFP4_STATIC and MXFP4, from sm89: what is known of a row is enough for its codes."""
    if _whole_at_run_time(scheme):
        return Reject("the global scale needs all rows before the first code")
    return _refusal(scheme, dtype, target)


def fit_rows(scheme: Scheme, dtype: torch.dtype, target: Target) -> Reject | None:
    """NVFP4 with a dynamic global scale, from sm89."""
    return _refusal(scheme, dtype, target) or (
        None if _whole_at_run_time(scheme) else Reject("needs no maxima of rows")
    )


def _planes(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, int]:
    """Empty codes and scales of x [m, k], and groups in a row."""
    data, scale, *_ = family_of(scheme).weight_planes(scheme, x.shape[0], x.shape[1], x.dtype)
    codes, scales = (torch.empty(s.shape, dtype=s.dtype, device=x.device) for s in (data, scale))
    return codes, scales, scale.shape[1]


def block_and_warps(k: int, group: int, longest: int) -> tuple[int, int]:
    """Columns of a program, a power of two, and its warps: up to 16 values a thread."""
    block = min(max(1 << (k - 1).bit_length(), 2 * group), longest)
    return block, max(1, block // 512)


def run_norm(x: Tensor, residual: Tensor | None, norm: Norm, scheme: Scheme, scale: Tensor | None) -> Planes:
    """x [m, k], its residual, a calibrated global scale [1] -> the sum if there is a residual, codes and scales."""
    m, k = x.shape
    group = GROUPS[family_of(scheme).name]
    codes, scales, groups = _planes(x, scheme)
    h = None if residual is None else torch.empty_like(x)
    block, warps = block_and_warps(k, group, LONGEST_BLOCK)
    if m:
        _source().norm_quantize_kernel[(m,)](
            x, residual, norm.weight, scale, h, codes, scales, k, groups, norm.eps,
            WEIGHTING=norm.weighting, GROUP=group, BLOCK=block, LOOP=k > block, num_warps=warps,
        )  # fmt: skip
    return (codes, scales) if h is None else (h, codes, scales)


def run_rows(x: Tensor, maxima: Tensor, scheme: Scheme) -> Planes:
    """x [m, k] and the largest magnitudes of its rows [m] -> codes, scales and the global scale [1]."""
    m, k = x.shape
    group = GROUPS[family_of(scheme).name]
    codes, scales, groups = _planes(x, scheme)
    whole = torch.empty((1,), dtype=torch.float32, device=x.device)
    if m > MOST_MAXIMA:
        maxima = maxima.amax().reshape(1)
    block, warps = block_and_warps(k, group, ROWS_BLOCK)
    if m == 0:
        k = groups = 0  # nothing to read, and still a global scale to write
    _source().quantize_rows_kernel[(max(m, 1), max(1, -(-k // block)))](
        x, maxima, whole, codes, scales, maxima.numel(), k, groups, GROUP=group, BLOCK=block, STEP=STEP, num_warps=warps,
    )  # fmt: skip
    return codes, scales, whole


INPUTS = (
    InputKernel("triton_fp4_norm", "norm", fit_norm, run_norm),
    InputKernel("triton_fp4_rows", "maxima", fit_rows, run_rows),
)
