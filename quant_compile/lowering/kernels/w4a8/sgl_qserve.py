"""QServe's W4A8 linears on sgl-kernel's GEMMs, and the two layouts that they read.

Both multiply int8 inputs by 4-bit weights on int8 tensor cores (mma m16n8k32) and write f16. A thread takes 16 bytes: a
row of four k for each of four rows, two codes a byte. With row = 32 R + 16 a + 8 b + c and k = 32 K + 16 d + 4 e + f, the
codes of a = 0 (low nibble) and a = 1 (high nibble) share byte [R][K][c 8][e 4][d 2][b 2][f 4].

* ``qserve_channel``: ``data`` [n, k/2] int8 as above, ``scale`` [n] f16, ``scaled_zero`` [n] f16 = scale * zero, and
  ``zero`` [n] u8, which the kernel does not read but without which the rounded product could not be undone.
* ``qserve_group``: ``data`` likewise, ``scale`` [n] f16, ``group_scale`` [k/128, n] int8 and ``scaled_zero`` [k/128, n]
  int8 = -group_scale * zero modulo 256; both with the 32 rows of a tile in the order [c 8][a 2][b 2]. The kernel multiplies
  four codes at once by the group's scale and adds the zero points modulo 256, which is right because code * scale is
  at most 240 and the sum is an int8 (the family's quantizer keeps it there).

The kernels take input scales as f16, which holds few small ones, and the channel kernel a row's sum of scaled inputs, which
may be beyond f16. So both get one power of two for all rows, small enough for any sum of codes, and the input's own scale
multiplies the result. The channel kernel subtracts f16(scale * zero) * f16(sum): rounded twice, a part of a number much
larger than the result when inputs are off centre; what rounding added is taken off again in f32.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, bits_per_weight, family_of
from quant_compile.lowering.kernels._library import arch_from, multiple, output_dtype
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank
from quant_compile.lowering.schemes.weight_only import pack_nibbles, unpack_nibbles
from quant_compile.lowering.target import Target

GROUP = 128
# Rows of a program's tile; the kernels drop rows beyond the last whole one. The channel kernel's widest tile has 128.
CHANNEL_ROWS, GROUP_ROWS = 128, 64
F16_MAX = 65504.0
LARGEST_K = 131072  # 127 * 127 * k must stay within int32

# --- layouts ---


def interleave(data: Tensor, k: int) -> Tensor:
    """Row-form codes [n, k/2] u8 -> [n, k/2] int8 in the order of the module's docstring; n and k multiples of 32."""
    n = data.shape[0]
    tiles = unpack_nibbles(data, k).reshape(n // 32, 2, 2, 8, k // 32, 2, 4, 4)
    low, high = tiles.permute(1, 0, 4, 3, 6, 5, 2, 7)
    return (low | (high << 4)).reshape(n, k // 2).view(torch.int8)


def deinterleave(data: Tensor, k: int) -> Tensor:
    """Inverse of ``interleave``."""
    n = data.shape[0]
    pairs = data.view(torch.uint8).reshape(n // 32, k // 32, 8, 4, 2, 2, 4)
    # dims: a, R, K, c, e, d, b, f -> R, a, b, c, K, d, e, f
    codes = torch.stack((pairs & 15, pairs >> 4)).permute(1, 0, 6, 3, 2, 5, 4, 7)
    return pack_nibbles(codes.reshape(n, k))


def _tile_order(rows: Tensor) -> Tensor:
    """[n, g] -> [g, n] with each 32 rows [a, b, c] as [c, a, b]."""
    n, groups = rows.shape
    return rows.t().reshape(groups, n // 32, 4, 8).transpose(2, 3).reshape(groups, n)


def _tile_order_inv(columns: Tensor) -> Tensor:
    """Inverse of ``_tile_order``."""
    groups, n = columns.shape
    return columns.reshape(groups, n // 32, 8, 4).transpose(2, 3).reshape(groups, n).t().contiguous()


def channel_planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """Specs of ``data``, ``scale``, ``scaled_zero`` and ``zero``."""
    n, k = problem.n, problem.k
    return (
        PlaneSpec("data", (n, k // 2), torch.int8),
        PlaneSpec("scale", (n,), torch.float16),
        PlaneSpec("scaled_zero", (n,), torch.float16),
        PlaneSpec("zero", (n,), torch.uint8),
    )


def pack_channel(planes: Planes, problem: Problem) -> Planes:
    """Row form -> ``qserve_channel``."""
    data, scale, zero = planes[0], planes[1].reshape(-1), planes[2].reshape(-1)
    scaled_zero = (scale.float() * zero.float()).to(torch.float16)
    return interleave(data, problem.k), scale.contiguous(), scaled_zero, zero.contiguous()


def unpack_channel(planes: Planes, problem: Problem) -> Planes:
    """``qserve_channel`` -> row form, exactly."""
    return deinterleave(planes[0], problem.k), planes[1].reshape(-1, 1), planes[3].reshape(-1, 1)


def group_planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """Specs of ``data``, ``scale``, ``group_scale`` and ``scaled_zero``."""
    n, k = problem.n, problem.k
    return (
        PlaneSpec("data", (n, k // 2), torch.int8),
        PlaneSpec("scale", (n,), torch.float16),
        PlaneSpec("group_scale", (k // GROUP, n), torch.int8),
        PlaneSpec("scaled_zero", (k // GROUP, n), torch.int8),
    )


def pack_group(planes: Planes, problem: Problem) -> Planes:
    """Row form -> ``qserve_group``."""
    data, scale, group_scale, zero = planes
    negated = ((256 - group_scale.to(torch.int16) * zero.to(torch.int16)) & 255).to(torch.uint8).view(torch.int8)
    return (
        interleave(data, problem.k),
        scale.reshape(-1).contiguous(),
        _tile_order(group_scale).contiguous(),
        _tile_order(negated).contiguous(),
    )


def unpack_group(planes: Planes, problem: Problem) -> Planes:
    """``qserve_group`` -> row form, exactly."""
    group_scale = _tile_order_inv(planes[2])
    scaled = (256 - _tile_order_inv(planes[3]).view(torch.uint8).to(torch.int16)) & 255
    zero = (scaled // group_scale.to(torch.int16).clamp_min(1)).to(torch.uint8)
    return deinterleave(planes[0], problem.k), planes[1].reshape(-1, 1), group_scale, zero


def _no_cut(problem: Problem) -> int:
    return 0  # groups lie along dimension 0


LAYOUTS = (
    Layout("qserve_channel", pack_channel, unpack_channel, channel_planes, row_block=lambda problem: CHANNEL_ROWS),
    Layout("qserve_group", pack_group, unpack_group, group_planes, row_block=_no_cut),
)

# --- fit ---


def _refuse(problem: Problem, target: Target, strategy: str, op: str, rows: int) -> Reject | None:
    weights = problem.scheme.weights
    if family_of(problem.scheme).name != "qserve" or weights.strategy != strategy:
        return Reject(f"serves QServe's uint4 weights per {strategy} with int8 inputs")
    if weights.group_size not in (None, GROUP):
        return Reject(f"group_size must be {GROUP}, got {weights.group_size}")
    if problem.k > LARGEST_K:
        return Reject(f"k must be at most {LARGEST_K} for sums in int32, got {problem.k}")
    refusal = (
        arch_from(target, 80)
        or output_dtype(problem, torch.bfloat16, torch.float16)
        or multiple("k", problem.k, GROUP)
        or multiple("n", problem.n, rows)
    )
    if refusal is not None:
        return refusal
    return None if target.has(f"sgl_kernel::{op}") else Reject(f"sgl-kernel has no {op} here")


def _rank(problem: Problem, m: int, target: Target, launches: int) -> Rank:
    # The f16 result is read again, f32 in between; shares of the roofs as measured on an H200.
    extra = m * problem.n * (2.0 + 8.0 * (launches - 1))
    bits = bits_per_weight(problem.scheme)
    return Rank(
        estimate(
            problem, m, target, 0.28, bits, bandwidth_efficiency=0.33, tile_m=32, launches=launches, extra_bytes=extra
        )
    )


def fit_channel(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """QServe per channel on sm80 and newer, bf16 or f16; k and n multiples of 128."""
    refusal = _refuse(problem, target, "channel", "qserve_w4a8_per_chn_gemm", CHANNEL_ROWS)
    return refusal or _rank(problem, m, target, launches=6)


def fit_group(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """QServe per group of 128 on sm80 and newer, bf16 or f16; k a multiple of 128, n of 64."""
    refusal = _refuse(problem, target, "channel_group", "qserve_w4a8_per_group_gemm", GROUP_ROWS)
    return refusal or _rank(problem, m, target, launches=4)


# --- run ---


@lru_cache(maxsize=None)
def _op(name: str) -> Callable[..., None]:
    importlib.import_module("sgl_kernel")
    return getattr(torch.ops.sgl_kernel, name).default


def _power_of_two(k: int) -> float:
    """The input scale that the kernels are given: the largest power of two that keeps any sum of k codes within f16."""
    return 2.0 ** math.floor(math.log2(F16_MAX / (127.0 * max(k, 1))))


def _finish(y: Tensor, factor: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y.mul_(factor)
    return (y if bias is None else y.add_(bias)).to(dtype)


def run_channel(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] int8 with scale and sum of codes [m, 1] f32 times ``qserve_channel`` weights, plus bias -> [m, n].

    Source: QServe's per-channel GEMM as sgl-kernel exposes it: f16(acc * scale_w * scale_x - scaled_zero * scaled_sum).
    """
    codes, scale, total = x
    data, scale_w, scaled_zero, zero = w
    power, m = _power_of_two(problem.k), codes.shape[0]
    exact_sum = (total * power).reshape(-1)
    scaled_sum = exact_sum.to(torch.float16)
    out = torch.empty((m, problem.n), dtype=torch.float16, device=codes.device)
    powers = torch.full((m,), power, dtype=torch.float16, device=codes.device)
    _op("qserve_w4a8_per_chn_gemm")(codes, data, scale_w, powers, scaled_zero, scaled_sum, out)
    y = out.float().addr_(scaled_sum.float(), scaled_zero.float())
    y.addr_(exact_sum, scale_w.float() * zero.float(), alpha=-1)
    return _finish(y, scale * (1.0 / power), bias, problem.dtype)


def run_group(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] int8 with scale [m, 1] f32 times ``qserve_group`` weights, plus bias -> [m, n].

    Source: QServe's per-group GEMM as sgl-kernel exposes it: f16(acc * scale_w * scale_x).
    """
    codes, scale = x
    data, scale_w, group_scale, scaled_zero = w
    power, m = _power_of_two(problem.k), codes.shape[0]
    out = torch.empty((m, problem.n), dtype=torch.float16, device=codes.device)
    powers = torch.full((m,), power, dtype=torch.float16, device=codes.device)
    _op("qserve_w4a8_per_group_gemm")(codes, data, scaled_zero, group_scale, scale_w, powers, out)
    return _finish(out.float(), scale * (1.0 / power), bias, problem.dtype)


KERNELS = (
    Kernel("sgl_qserve_channel", "qserve_channel", fit_channel, run_channel),
    Kernel("sgl_qserve_group", "qserve_group", fit_group, run_group),
)
