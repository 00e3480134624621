"""Triton source of FP4 linears on block-scaled tensor cores (sm100 and newer), from planes in row form."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["m"])
def dot_scaled_kernel(
    x_ptr,
    sx_ptr,
    gx_ptr,
    w_ptr,
    sw_ptr,
    gw_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """y [m, n] = x [m, k] w [n, k]^T, both two e2m1 codes a byte with a scale for each GROUP codes, k a multiple of GROUP.

    gx [1] and gw [n] are global scales (None without). Rows past the end repeat the last one and are not stored; codes past k
    are zeros under the last group's scale.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = BAND * tiles_n
    first = (tl.program_id(0) // band) * BAND
    height = tl.minimum(tiles_m - first, BAND)
    rows = (first + (tl.program_id(0) % band) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = ((tl.program_id(0) % band) // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    near_rows = tl.minimum(rows, m - 1).to(tl.int64)
    near_cols = tl.minimum(cols, n - 1).to(tl.int64)
    spots = tl.arange(0, BLOCK_K // 2)
    groups = tl.arange(0, BLOCK_K // GROUP)
    width, count = k // 2, k // GROUP
    x_at = x_ptr + near_rows[:, None] * width + spots[None, :]
    w_at = w_ptr + near_cols[None, :] * width + spots[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K // 2):
        at = start * 2 // GROUP + groups
        if EVEN_K:
            x = tl.load(x_at + start)
            w = tl.load(w_at + start)
        else:
            x = tl.load(x_at + start, mask=(spots < width - start)[None, :], other=0)
            w = tl.load(w_at + start, mask=(spots < width - start)[:, None], other=0)
            at = tl.minimum(at, count - 1)
        sx = tl.load(sx_ptr + near_rows[:, None] * count + at[None, :])
        sw = tl.load(sw_ptr + near_cols[:, None] * count + at[None, :])
        total = tl.dot_scaled(x, sx, "e2m1", w, sw, "e2m1", total)
    if gx_ptr is not None:
        total = total * (tl.load(gw_ptr + near_cols) * tl.load(gx_ptr))[None, :]
    if bias_ptr is not None:
        total = total + tl.load(bias_ptr + near_cols).to(tl.float32)[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(y_ptr + near_rows[:, None] * n + cols[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)
