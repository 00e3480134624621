"""The order in which block-scaled tensor cores take scales: tiles of 128 rows x 4 groups, 512 bytes each.

Within a tile the scale of row r, group c lies at byte 16 * (r % 32) + 4 * (r // 32) + c; tiles follow each other along the
groups first. cuBLAS, CUTLASS and torch's ``SWIZZLE_32_4_4`` mean this order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, GROUPS = 128, 4


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
