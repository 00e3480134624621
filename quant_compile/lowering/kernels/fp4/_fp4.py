"""What kernels for block-scaled FP4 share: the order in which tensor cores take scales, one global scale for many, refusals.

Scales lie in tiles of 128 rows x 4 groups, 512 bytes each.

Within a tile the scale of row r, group c lies at byte 16 * (r % 32) + 4 * (r // 32) + c; tiles follow each other along the
groups first. cuBLAS, CUTLASS and torch's ``SWIZZLE_32_4_4`` mean this order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Reject
from quant_compile.ir.numerics import SMALLEST_AMAX
from quant_compile.lowering.kernels._library import arch_from
from quant_compile.lowering.schemes.fp4 import NV_RANGE
from quant_compile.lowering.target import Target

ROWS, GROUPS = 128, 4
ZEROS_SCALE = SMALLEST_AMAX / NV_RANGE * 2  # twice what NVFP4 gives a weight of zeros


def block_scaled(target: Target) -> Reject | None:
    """Refusal of a device for which Triton makes no block-scaled products: all but sm100, sm103 and sm120.

    For sm110 and sm121 Triton 3.6 fails to compile NVFP4, and emulates MXFP4.
    """
    if target.device == "cuda" and target.arch > 100 and target.arch not in (103, 120):
        return Reject(f"Triton makes block-scaled products for sm100, sm103 and sm120, this is {target.label}")
    return arch_from(target, 100)


def padded(rows: int, groups: int) -> tuple[int, int]:
    """Rows and groups as stored."""
    return -(-rows // ROWS) * ROWS, -(-groups // GROUPS) * GROUPS


def swizzle(scale: Tensor) -> Tensor:
    """[rows, groups] of one byte each -> flat, padded with zero bytes, same dtype."""
    rows, groups = padded(*scale.shape)
    bytes_ = pad(scale.view(torch.uint8), (0, groups - scale.shape[1], 0, rows - scale.shape[0]))
    tiles = bytes_.reshape(rows // ROWS, 4, 32, groups // GROUPS, GROUPS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scale.dtype)


def unswizzle(flat: Tensor, rows: int, groups: int) -> Tensor:
    """Inverse of ``swizzle``: [rows, groups], contiguous."""
    padded_rows, padded_groups = padded(rows, groups)
    tiles = flat.view(torch.uint8).reshape(padded_rows // ROWS, padded_groups // GROUPS, 32, 4, GROUPS)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_groups)
    return plain[:rows, :groups].contiguous().view(flat.dtype)


def common_scale(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Global scales [n, 1] f32 -> the least usable one [1] (1.0 where there is none), and ratios to it [n].

    The least, so that results grow by the ratios after they were rounded to 16 bits. Usable is a positive finite one of a
    weight that is not all zeros: zeros have the smallest scale there is, under which f16 would lose all others.
    """
    usable = (whole > ZEROS_SCALE) & (whole < math.inf)
    least = torch.where(usable, whole, math.inf).amin().reshape(1)
    least = torch.where(least < math.inf, least, 1.0)
    return least, (whole / least).reshape(-1)
