"""NVFP4 linears on the block-scaled tensor cores of sm100 and newer: torch (cuBLASLt) and sgl-kernel (CUTLASS).

Never run on such a GPU by this project: calls are checked against the libraries' signatures, numbers against an emulation
on CPU that undoes the layout.

Both read the layout ``nvfp4_swizzled``: ``data`` [n, kp/2] u8 as in row form; ``scale`` flat e4m3 in tiles of 128 rows x 4
groups (``_fp4.py``); ``alpha`` [1] f32, the largest of the rows' global scales; ``rest`` [n] f32, each row's global scale over
alpha. The libraries take one global scale; ``rest`` is 1 but for siblings merged into one weight, whose results are
multiplied by it after they were rounded once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.lowering.kernels._library import arch_from, multiple, output_dtype
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.fp4._fp4 import common_scale, padded, swizzle, unswizzle
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank
from quant_compile.lowering.target import Target

GROUP = 16


def _groups(problem: Problem) -> int:
    return -(-problem.k // GROUP)


def layout_planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """``data``, ``scale``, ``alpha``, ``rest``."""
    rows, groups = padded(problem.n, _groups(problem))
    return (
        PlaneSpec("data", (problem.n, _groups(problem) * GROUP // 2), torch.uint8),
        PlaneSpec("scale", (rows * groups,), torch.float8_e4m3fn),
        PlaneSpec("alpha", (1,), torch.float32),
        PlaneSpec("rest", (problem.n,), torch.float32),
    )


def pack(planes: Planes, problem: Problem) -> Planes:
    """Row form -> the layout."""
    data, scale, whole = planes
    return data, swizzle(scale), *common_scale(whole)


def unpack(planes: Planes, problem: Problem) -> Planes:
    """Inverse of ``pack``; global scales of merged siblings up to their last bit."""
    data, scale, alpha, rest = planes
    return data, unswizzle(scale, problem.n, _groups(problem)), (rest * alpha).unsqueeze(1)


def _refuse(problem: Problem, target: Target, *dtypes: torch.dtype) -> Reject | None:
    a = problem.scheme.input_activations
    if a is None or family_of(problem.scheme).name != "nvfp4":
        return Reject("multiplies NVFP4 weights by NVFP4 inputs")
    return arch_from(target, 100) or output_dtype(problem, *dtypes) or multiple("k", problem.k, 32)


def fit_torch(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """NVFP4 by NVFP4 on sm100 and newer, bf16; k a multiple of 32, n of 16."""
    refusal = _refuse(problem, target, torch.bfloat16) or multiple("n", problem.n, 16)
    if refusal is not None:
        return refusal
    if not target.has("aten::_scaled_mm_v2"):
        return Reject("this torch has no scaled_mm with scales of blocks and of the tensor")
    return Rank(estimate(problem, m, target, 0.6, 4.5, math_bits=4, tile_m=128, launches=3))


def run_torch(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] NVFP4 times [n, k] NVFP4 -> [m, n]. Source: ``torch.nn.functional.scaled_mm`` (cuBLASLt)."""
    data, scale, alpha, rest = w
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    y = F.scaled_mm(
        x[0].view(torch.float4_e2m1fn_x2),
        data.view(torch.float4_e2m1fn_x2).t(),
        [swizzle(x[1]), x[2]],
        recipe,
        [scale, alpha],
        recipe,
        order,
        order,
        output_dtype=problem.dtype,
    )
    return _finish(y, rest, bias)


@lru_cache(maxsize=None)
def _sgl() -> Callable[..., None]:
    importlib.import_module("sgl_kernel")
    return torch.ops.sgl_kernel.cutlass_scaled_fp4_mm.default


def fit_sgl(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """NVFP4 by NVFP4 on sm100 and newer, bf16 or f16; k and n multiples of 32."""
    refusal = _refuse(problem, target, torch.bfloat16, torch.float16) or multiple("n", problem.n, 32)
    if refusal is not None:
        return refusal
    if not target.has("sgl_kernel::cutlass_scaled_fp4_mm"):
        return Reject("sgl-kernel has no cutlass_scaled_fp4_mm here (its 0.3 series has)")
    return Rank(estimate(problem, m, target, 0.65, 4.5, math_bits=4, tile_m=128, launches=3))


def run_sgl(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] NVFP4 times [n, k] NVFP4 -> [m, n]. Source: CUTLASS block-scaled GEMM, as sgl-kernel exposes it.

    It wants swizzled scales in the shape that they had before, padded.
    """
    data, scale, alpha, rest = w
    m, groups = x[0].shape[0], _groups(problem)
    y = torch.empty((m, problem.n), dtype=problem.dtype, device=x[0].device)
    scale_x, scale_w = swizzle(x[1]).view(padded(m, groups)), scale.view(padded(problem.n, groups))
    _sgl()(y, x[0], data, scale_x, scale_w, x[2] * alpha)
    return _finish(y, rest, bias)


def _finish(y: Tensor, rest: Tensor, bias: Tensor | None) -> Tensor:
    y = y.mul_(rest)
    return y if bias is None else y.add_(bias)


def _exact(planes: Planes) -> bool:
    """A quotient times its divisor may be off by a bit; one global scale for all rows comes back as it was."""
    return bool((planes[3] == 1).all())


LAYOUTS = (Layout("nvfp4_swizzled", pack, unpack, layout_planes, row_block=lambda problem: 0, exact=_exact),)
KERNELS = (
    Kernel("torch_nvfp4", "nvfp4_swizzled", fit_torch, run_torch),
    Kernel("sgl_nvfp4", "nvfp4_swizzled", fit_sgl, run_sgl),
)
