"""Triton source of FP4 expert blocks on block-scaled tensor cores (sm100 and newer), from row form with a leading expert.

Pairs are sorted and cut into blocks, and results summed, by the kernels of ``_triton_frame``. In between ``fp4_grouped_kernel``
multiplies twice, and ``fp4_quantize_kernel`` turns the hidden layer into FP4. NVFP4's global scale of the hidden layer is
that of an expert's rows: the first product takes their largest magnitude by atomic maxima of f32 bits, which order like the
numbers, NaN last, so that the result does not depend on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import ALL_NAN, _amax, _tile_of
from quant_compile.lowering.kernels.experts._triton_frame import _activate, _block_at
from quant_compile.lowering.kernels.fp4._triton_fp4_codes import _mx_scale, _nv_scale, _round_e2m1


@triton.jit
def _global_scale(amax_ptr, scale2_ptr, expert):
    """Of the hidden rows of an expert: calibrated, or from their largest magnitude (f32 bits)."""
    if amax_ptr is not None:
        amax = tl.load(amax_ptr + expert).to(tl.float32, bitcast=True)
        whole = tl.math.div_rn(tl.maximum(amax, 2.0**-100, propagate_nan=ALL_NAN), 2688.0)
    else:
        whole = tl.load(scale2_ptr)
    return whole


@triton.jit
def _codes_at(at, width, left, EVEN_K: tl.constexpr):
    """Bytes of one step; zeros past the end of a row. ``left``: bytes that remain in it; ``width``: places in the step."""
    if EVEN_K:
        codes = tl.load(at)
    else:
        codes = tl.load(at, mask=width < left, other=0)
    return codes


@triton.jit(do_not_specialize=["most_blocks"])
def fp4_grouped_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    gx_ptr,
    gw_ptr,
    scale2_ptr,
    bias_ptr,
    y_ptr,
    amax_ptr,
    sorted_ptr,
    blocks_ptr,
    most_blocks,
    n,
    k,
    top_k,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    OUT: tl.constexpr,
):
    """One block of pairs times BLOCK_N rows (GATED: half of them gate and half up rows) of its expert's weight.

    Both sides are two e2m1 codes a byte with a scale for each GROUP codes, k a multiple of GROUP. GATED: x are tokens,
    gathered, under the global scale gx [1]; y is the hidden layer [pairs, n] in the order of ``sorted``, and the largest
    magnitudes of experts go to amax [E] i32. Otherwise x is the hidden layer in that order, its global scale comes from amax
    or scale2, and y [pairs, n] is in the order of the pairs. gw [E, rows, 1]: global scales of the weight's rows, None in
    MXFP4. The weight is the tall operand, so that few tokens fill an instruction.
    """
    block, tile = _tile_of(tl.program_id(0), most_blocks, tl.cdiv(n, BLOCK_N // 2 if GATED else BLOCK_N), BAND)
    count = tl.load(blocks_ptr + 2 * most_blocks + block)
    if count == 0:
        return
    expert, lanes, first, place, x_row = _block_at(
        sorted_ptr, blocks_ptr, most_blocks, block, count, top_k, BLOCK_M, GATED
    )
    x_row = x_row.to(tl.int64)
    # Gated: a tile's gate rows, then its up rows, in one product: Triton cannot share a product's operands with another's.
    TILE: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    all_rows = 2 * n if GATED else n
    row = tl.arange(0, BLOCK_N)
    w_row = expert * all_rows + tl.minimum(tile * TILE + row % TILE, n - 1) + (row // TILE) * tl.cast(n, tl.int64)
    spots = tl.arange(0, BLOCK_K // 2)
    groups = tl.arange(0, BLOCK_K // GROUP)
    width, groups_k = k // 2, k // GROUP
    w_at = w_ptr + w_row[:, None] * width + spots[None, :]
    x_at = x_ptr + x_row[None, :] * width + spots[:, None]
    sw_at = sw_ptr + w_row[:, None] * groups_k
    sx_at = sx_ptr + x_row[:, None] * groups_k
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, width, BLOCK_K // 2):
        at = start * 2 // GROUP + groups[None, :]
        if not EVEN_K:
            at = tl.minimum(at, groups_k - 1)
        x = _codes_at(x_at + start, spots[:, None], width - start, EVEN_K)
        w = _codes_at(w_at + start, spots[None, :], width - start, EVEN_K)
        total = tl.dot_scaled(w, tl.load(sw_at + at), "e2m1", x, tl.load(sx_at + at), "e2m1", total)
    if gw_ptr is not None:
        if GATED:
            whole = tl.load(gx_ptr)
        else:
            whole = _global_scale(amax_ptr, scale2_ptr, expert)
        total = total * (tl.load(gw_ptr + w_row) * whole)[:, None]
    if bias_ptr is not None:
        total = total + tl.load(bias_ptr + w_row).to(tl.float32)[:, None]
    rows = tile * TILE + tl.arange(0, TILE)
    inside = (rows < n)[:, None] & (lanes < count)[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, TILE, BLOCK_M)), (1, 2, 0)))
        y = _activate(gate, up, KIND, ALPHA, LIMIT, SHIFT, OUT)
        y_row = first + lanes
        if amax_ptr is not None:
            largest = _amax(_amax(tl.where(inside, y, 0.0), 1), 0)
            tl.atomic_max(amax_ptr + expert, largest.to(tl.int32, bitcast=True), sem="relaxed")
    else:
        y = total
        y_row = tl.load(sorted_ptr + place)
    y_at = y_ptr + y_row.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["most_blocks"])
def fp4_quantize_kernel(
    h_ptr,
    q_ptr,
    s_ptr,
    amax_ptr,
    scale2_ptr,
    blocks_ptr,
    most_blocks,
    n,
    groups_n,
    GROUP: tl.constexpr,
    NV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of hidden rows h [pairs, n], BLOCK_N columns of it -> codes q [pairs, kp / 2] and scales s [pairs, kp / GROUP].

    As the family's ``quantize_input`` for the rows of one expert; columns past n are zeros.
    """
    block = tl.program_id(0)
    count = tl.load(blocks_ptr + 2 * most_blocks + block)
    if count == 0:
        return
    expert = tl.load(blocks_ptr + block)
    lanes = tl.arange(0, BLOCK_M)
    live = (lanes < count)[:, None]
    row = (tl.load(blocks_ptr + most_blocks + block) + lanes).to(tl.int64)[:, None]
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    groups = tl.program_id(1) * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)[None, :]
    h = tl.load(h_ptr + row * n + cols, mask=live & (cols < n), other=0.0).to(tl.float32)
    h = tl.reshape(h, (BLOCK_M, BLOCK_N // GROUP, GROUP))
    amax = _amax(h, 2)
    if NV:
        scale, local = _nv_scale(amax, _global_scale(amax_ptr, scale2_ptr, expert))
        h = tl.math.div_rn(h, tl.broadcast_to(local[:, :, None], h.shape))
    else:
        scale, inverse = _mx_scale(amax)
        h = h * inverse[:, :, None]
    low, high = tl.split(tl.reshape(_round_e2m1(h), (BLOCK_M, BLOCK_N // 2, 2)))
    pairs = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
    half = groups_n * (GROUP // 2)
    tl.store(q_ptr + row * half + pairs, (low | (high << 4)).to(tl.uint8), mask=live & (pairs < half))
    tl.store(s_ptr + row * groups_n + groups, scale, mask=live & (groups < groups_n))
