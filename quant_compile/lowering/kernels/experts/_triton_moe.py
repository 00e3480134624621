"""Triton source of fused expert blocks in FP8, INT8 and integer weights under 16-bit inputs; ``triton_moe`` launches them.

Grouped form, any number of tokens: ``grouped_kernel`` multiplies blocks of pairs by their expert's weight (twice), and
``quantize_kernel`` quantizes hidden rows where that isn't fused. Decode form, few pairs: ``gated_rows_kernel`` and
``down_rows_kernel`` stream the chosen experts' rows through plain cores. What lies around the products, and what all of it promises,
is in ``_triton_frame``. Weights are in row form with a leading expert.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quant_compile.lowering.kernels._triton_pieces import _amax, _codes, _dp4a, _only_if, _scale_of, _tile_of
from quant_compile.lowering.kernels.experts._triton_frame import (
    _activate,
    _block_at,
    _experts_of,
    _hidden_scale,
    _store_block,
    _store_hidden,
    _store_token,
    _stream,
    _token_step,
    _units,
    _weight_rows,
    _word_products,
)

# --- blocks of pairs times weights, on tensor cores ---


@triton.jit
def _weights(w_ptr, w_at, line, start, cols, width, TMA: tl.constexpr, EVEN_K: tl.constexpr, W4: tl.constexpr):
    """Codes [BLOCK_N, BLOCK_K] of one step (W4: bytes [BLOCK_N, BLOCK_K / 2]); ``cols`` are places in a row."""
    if W4:
        start = start // 2
    return _units(w_ptr, w_at, line, start, cols, width, TMA, EVEN_K)


@triton.jit
def _zero_points(zero_ptr, zero_first, rows, group, zero_row):
    """Zero points of ``rows`` in a group, two to a byte, f32; 8 without a plane."""
    if zero_ptr is None:
        zero = tl.full(rows.shape, 8.0, tl.float32)
    else:
        pair = tl.load(zero_ptr + zero_first + rows * zero_row + group // 2).to(tl.int32)
        zero = ((pair >> (group % 2 * 4)) & 15).to(tl.float32)
    return zero


@triton.jit
def _multiply(
    total, w, x, rows, sw_ptr, zero_ptr, zero_first, sx_ptr, x_first, start, sw_row, zero_row, sx_group,
    W4: tl.constexpr, GROUP_K: tl.constexpr, GROUP_N: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_N, BLOCK_M] + w x, times group scales where there are groups; sx_ptr None: x has no scales.

    zero_first and x_first: where the expert's zero points and each pair's scales begin.
    """
    group = 0
    if GROUP_K > 0:
        group = start // GROUP_K
    if W4:
        # A code or-ed into the mantissa of 128 (bf16) or 1024 (f16) is 128 + code: no integer conversion.
        MAGIC: tl.constexpr = 0x4300 if x.dtype == tl.bfloat16 else 0x6400
        BASE: tl.constexpr = 128.0 if x.dtype == tl.bfloat16 else 1024.0
        codes = tl.join(w & 15, w >> 4).reshape((w.shape[0], w.shape[1] * 2)).to(tl.uint16) | MAGIC
        offset = (_zero_points(zero_ptr, zero_first, rows, group, zero_row) + BASE).to(x.dtype)
        w = codes.to(x.dtype, bitcast=True) - offset[:, None]
    elif w.dtype == tl.int8 and x.dtype != tl.int8:
        w = w.to(x.dtype)
    if GROUP_K > 0:
        scale_w = tl.load(sw_ptr + (rows // GROUP_N) * sw_row + group).to(tl.float32)
        if sx_ptr is None:
            total += tl.dot(w, x) * scale_w[:, None]
        else:
            scale_x = tl.load(sx_ptr + x_first + group * sx_group)
            total += tl.dot(w, x) * (scale_w[:, None] * scale_x[None, :])
    else:
        IMPRECISE: tl.constexpr = w.shape[1] if PROMOTE else None
        total = tl.dot(w, x, total, out_dtype=total.dtype, max_num_imprecise_acc=IMPRECISE)
    return total


@triton.jit
def _finish(total, rows, sx_ptr, x_first, sw_ptr, bias_ptr, bias_first, sw_row, GROUP_K: tl.constexpr):
    """Row scales, x's first (unless groups were applied already), and bias, f32."""
    y = total.to(tl.float32)
    if GROUP_K == 0:
        if sx_ptr is not None:
            y = y * tl.load(sx_ptr + x_first)[None, :]
        y = y * tl.load(sw_ptr + rows * sw_row).to(tl.float32)[:, None]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + bias_first + rows).to(tl.float32)[:, None]
    return y


@triton.jit
def _tile_scale(y, scale2_ptr, sy_ptr, rows, y_row, tile, n, live, LIMIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """1 / scale of a tile's hidden values: the calibrated one, or one per pair from this tile, which is stored."""
    if scale2_ptr is not None:
        inverse = tl.math.div_rn(tl.full((1, 1), 1.0, tl.float32), tl.load(scale2_ptr))
    else:
        scale, inverse = _scale_of(_amax(tl.where((rows < n)[:, None], y, 0.0), 0), LIMIT)
        tl.store(sy_ptr + y_row.to(tl.int64) * tl.cdiv(n, BLOCK_N) + tile, scale, mask=live)
        inverse = inverse[None, :]
    return inverse


@triton.jit(do_not_specialize=["most_blocks", "sx_group"])
def grouped_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    zero_ptr,
    bias_ptr,
    scale2_ptr,
    y_ptr,
    sy_ptr,
    sorted_ptr,
    blocks_ptr,
    most_blocks,
    n,
    k,
    width,
    top_k,
    sx_row,
    sx_group,
    sw_expert,
    sw_row,
    zero_expert,
    zero_row,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    W4: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    PROMOTE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    OUT: tl.constexpr,
):
    """One block of pairs times BLOCK_N rows (GATED: as many gate and as many up rows) of its expert's weight.

    GATED: x are tokens [T, k], gathered; y is the hidden layer [pairs, n] in the order of ``sorted``, as OUT, or as codes
    with QUANTIZE: 0 no, else the largest code, under scale2 [1] or, without one, with a scale sy [pairs, n / BLOCK_N] of its
    own for each BLOCK_N. Otherwise x is the hidden layer in that order and y [pairs, n] is in the order of the pairs.
    The weight is the tall operand, so that few tokens fill an instruction. TMA: w_ptr is a descriptor of [E * rows, width].
    width: elements of a row of w, k codes (an argument, so that its alignment is known).
    """
    block, tile = _tile_of(tl.program_id(0), most_blocks, tl.cdiv(n, BLOCK_N), BAND)
    count = tl.load(blocks_ptr + 2 * most_blocks + block)
    if count == 0:
        return
    expert, lanes, first, place, x_row = _block_at(
        sorted_ptr, blocks_ptr, most_blocks, block, count, top_k, BLOCK_M, GATED
    )
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(rows, n - 1)
    cols = tl.arange(0, BLOCK_K)
    spots = tl.arange(0, BLOCK_K // 2) if W4 else cols
    all_rows = 2 * n if GATED else n
    line = expert.to(tl.int32) * all_rows + tile * BLOCK_N
    w_at, up_at = _weight_rows(w_ptr, expert * all_rows, near, spots, n, width, TMA)
    x_at = x_ptr + x_row.to(tl.int64)[None, :] * k + cols[:, None]
    sw_at = sw_ptr + expert * sw_expert
    zero_first = expert * zero_expert
    x_first = x_row.to(tl.int64) * sx_row
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if x_ptr.dtype.element_ty.is_int() else tl.float32)
    total_up = total
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at + start)
        else:
            x = tl.load(x_at + start, mask=(cols < k - start)[:, None], other=0.0)
        w = _weights(w_ptr, w_at, line, start, spots, width, TMA, EVEN_K, W4)
        total = _multiply(
            total, w, x, near, sw_at, zero_ptr, zero_first, sx_ptr, x_first, start, sw_row, zero_row, sx_group,
            W4, GROUP_K, GROUP_N, PROMOTE,
        )  # fmt: skip
        if GATED:
            w = _weights(w_ptr, up_at, line + n, start, spots, width, TMA, EVEN_K, W4)
            total_up = _multiply(
                total_up, w, x, near + n, sw_at, zero_ptr, zero_first, sx_ptr, x_first, start, sw_row, zero_row,
                sx_group, W4, GROUP_K, GROUP_N, PROMOTE,
            )  # fmt: skip
    y = _finish(total, near, sx_ptr, x_first, sw_at, bias_ptr, expert * all_rows, sw_row, GROUP_K)
    if GATED:
        up = _finish(total_up, near + n, sx_ptr, x_first, sw_at, bias_ptr, expert * all_rows, sw_row, GROUP_K)
        y = _activate(y, up, KIND, ALPHA, LIMIT, SHIFT, OUT)
        y_row = first + lanes
        if QUANTIZE > 0:
            inverse = _tile_scale(y, scale2_ptr, sy_ptr, rows, y_row, tile, n, lanes < count, QUANTIZE, BLOCK_N)
            y = _codes(y, inverse, QUANTIZE, y_ptr.dtype.element_ty)
    else:
        y_row = tl.load(sorted_ptr + place)
    _store_block(y_ptr, y, y_row, rows, rows, lanes, count, n)


@triton.jit
def quantize_kernel(h_ptr, q_ptr, scale_ptr, n, BLOCK: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr):
    """Hidden row program_id(0) [n] -> codes and a scale per row (GROUP 0) or for each GROUP columns."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    h = tl.load(h_ptr + row * n + cols, mask=cols < n, other=0.0).to(tl.float32)
    if GROUP == 0:
        scale, inverse = _scale_of(_amax(h[None, :], 1), LIMIT)
        tl.store(scale_ptr + row + tl.arange(0, 1), scale)
        codes = _codes(h, inverse, LIMIT, q_ptr.dtype.element_ty)
    else:
        GROUPS: tl.constexpr = BLOCK // GROUP
        grouped = h.reshape((GROUPS, GROUP))
        scale, inverse = _scale_of(_amax(grouped, 1), LIMIT)
        real = tl.cdiv(n, GROUP)
        at = tl.arange(0, GROUPS)
        tl.store(scale_ptr + row * real + at, scale, mask=at < real)
        codes = _codes(grouped, inverse[:, None], LIMIT, q_ptr.dtype.element_ty).reshape((BLOCK,))
    tl.store(q_ptr + row * n + cols, codes, mask=cols < n)


# --- few pairs: rows of the chosen experts, on plain cores ---


@triton.jit
def _add_products(
    total, w, x, scale, rows, group, live, sw_at, zero_ptr, zero_first, sw_row, zero_row, magic,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, GROUP_K: tl.constexpr,
):  # fmt: skip
    """total + w [rows, experts, BLOCK] times x, summed over VECTOR units, which one thread holds.

    UNIT 1: x [experts, BLOCK] of total's dtype, ``scale`` [experts, BLOCK / VECTOR] with groups. UNIT 4: int32 words of four
    int8, x alike. UNIT 8: words of eight 4-bit codes, x [experts, BLOCK * 8]; ``group`` [1, BLOCK / VECTOR] are groups of
    scales, ``live`` where they exist.
    """
    SHAPE: tl.constexpr = (w.shape[0], w.shape[1], w.shape[2] // VECTOR, VECTOR)
    if UNIT == 4:
        total = _dp4a(w, tl.broadcast_to(x[None, :, :], w.shape), total)
    elif UNIT == 1:
        product = tl.sum(tl.reshape(w.to(total.dtype) * x[None, :, :], SHAPE), 3)
        if GROUP_K > 0:
            product = product * scale[None, :, :]
        total += product
    else:
        product, sums = _word_products(w, x, magic)
        product = tl.sum(tl.reshape(product, SHAPE), 3)
        sums = tl.sum(tl.reshape(sums, (SHAPE[1], SHAPE[2], SHAPE[3])), 2)
        at = rows[:, None, None]
        if zero_ptr is None:
            product -= 8.0 * sums[None, :, :]
        else:
            zero_at = zero_ptr + zero_first + at * zero_row + (group // 2)[None, :, :]
            pair = tl.load(zero_at, mask=live[None, :, :], other=0)
            zero = (pair.to(tl.int32) >> (group % 2 * 4)[None, :, :]) & 15
            product -= zero.to(tl.float32) * sums[None, :, :]
        if GROUP_K > 0:
            sw = tl.load(sw_at + at * sw_row + group[None, :, :], mask=live[None, :, :], other=0.0)
            product = product * sw.to(tl.float32)
        total += product
    return total


@triton.jit
def _group_of(start, k, BLOCK: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr, GROUP_K: tl.constexpr):
    """Groups of scales of the vectors of a step, and which exist; both [1, BLOCK / VECTOR]."""
    column = (start + tl.arange(0, BLOCK // VECTOR)[None, :] * VECTOR) * UNIT
    if GROUP_K > 0:
        group = column // GROUP_K
    else:
        group = column * 0
    return group, column < k


@triton.jit
def _block_scale(sw_at, row, group, live, sw_row, GROUP_N: tl.constexpr):
    """Scales of the weight blocks that ``row`` meets: sw_at [experts, 1] -> [experts, vectors]."""
    return tl.load(sw_at + row // GROUP_N * sw_row + group, mask=live, other=0.0)


@triton.jit(do_not_specialize=["sx_group", "magic"])
def gated_rows_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    zero_ptr,
    bias_ptr,
    ids_ptr,
    y_ptr,
    amax_ptr,
    n,
    k,
    width,
    top_k,
    experts,
    sx_row,
    sx_group,
    sw_expert,
    sw_row,
    zero_expert,
    zero_row,
    magic,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    OUT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Hidden values [BLOCK_N] at program_id(0) of pair program_id(1): y [pairs, n], and their largest magnitude.

    w and 8-bit x are read in units (see _add_products), ``width`` to a row; BLOCK counts units. BLOCK_N divides n and GROUP_N.
    EARLY: the next kernel may start as soon as every program of this one has.
    """
    if EARLY:
        gdc_launch_dependents()
    pair = tl.program_id(1)
    expert = tl.load(ids_ptr + pair)
    if (expert < 0) | (expert >= experts):
        return
    expert = expert.to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK)
    w_at = w_ptr + (expert * 2 * n + rows[:, None, None]) * width + cols[None, None, :]
    up_at = w_at + tl.cast(n, tl.int64) * width
    sw_at = sw_ptr + expert * sw_expert
    zero_first = expert * zero_expert
    token = (pair // top_k).to(tl.int64)
    x_row = x_ptr + token * (k if UNIT == 8 else width)
    x_first = token * sx_row + tl.arange(0, 1)
    ACC: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty.is_int() else tl.float32
    legal = tl.full((1,), 1, tl.int1)
    total = tl.zeros((BLOCK_N, 1, BLOCK if UNIT == 4 else BLOCK // VECTOR), ACC)
    total_up = total
    for start in range(0, width, BLOCK):
        at = start + cols
        w = _stream(w_at + start, at, width, legal, EVEN)
        up = _stream(up_at + start, at, width, legal, EVEN)
        x = _token_step(x_row, start, k, width, BLOCK, UNIT, EVEN, ACC)
        group, live = _group_of(start, k, BLOCK, UNIT, VECTOR, GROUP_K)
        scale = None
        scale_up = None
        if GROUP_K > 0 and UNIT == 1:
            scale_x = tl.load(sx_ptr + x_first + group * sx_group, mask=live, other=0.0)
            scale = scale_x * _block_scale(sw_at, first, group, live, sw_row, GROUP_N)
            scale_up = scale_x * _block_scale(sw_at, first + n, group, live, sw_row, GROUP_N)
        total = _add_products(
            total, w, x, scale, rows, group, live, sw_at, zero_ptr, zero_first, sw_row, zero_row, magic,
            UNIT, VECTOR, GROUP_K,
        )  # fmt: skip
        total_up = _add_products(
            total_up, up, x, scale_up, rows + n, group, live, sw_at, zero_ptr, zero_first, sw_row, zero_row, magic,
            UNIT, VECTOR, GROUP_K,
        )  # fmt: skip
    bias_first = expert * 2 * n
    gate = _finish(tl.sum(total, 2), rows, sx_ptr, x_first, sw_at, bias_ptr, bias_first, sw_row, GROUP_K)
    up = _finish(tl.sum(total_up, 2), rows + n, sx_ptr, x_first, sw_at, bias_ptr, bias_first, sw_row, GROUP_K)
    y = _activate(gate, up, KIND, ALPHA, LIMIT, SHIFT, OUT)
    _store_hidden(y_ptr, amax_ptr, y, pair, rows, n, OUT)


@triton.jit
def _hidden_step(
    h_at, start, k, legal, inverse, BLOCK: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    GROUP: tl.constexpr, QUANTIZE: tl.constexpr, CODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Hidden values of the experts' rows h_at [experts] from unit ``start``, quantized, for _add_products.

    Returns:
        [experts, BLOCK] as ACC or as words of four codes, or [experts, BLOCK * 8]; and scales [experts, BLOCK / VECTOR] of
        groups of GROUP columns (0s without groups).
    """
    cols = start * UNIT + tl.arange(0, BLOCK * UNIT)
    h = tl.load(h_at[:, None] + cols[None, :], mask=legal[:, None] & (cols < k)[None, :], other=0.0)
    scales = tl.zeros((h.shape[0], BLOCK // VECTOR), tl.float32)
    if QUANTIZE > 0:
        wide = h.to(tl.float32)
        if GROUP > 0:
            wide = tl.reshape(wide, (h.shape[0], BLOCK // GROUP, GROUP))
            scale, group_inverse = _scale_of(_amax(wide, 2), QUANTIZE)
            wide = _codes(wide, group_inverse[:, :, None], QUANTIZE, CODE).to(ACC)
            h = tl.reshape(wide, (h.shape[0], BLOCK))
            parts = tl.broadcast_to(scale[:, :, None], (h.shape[0], BLOCK // GROUP, GROUP // VECTOR))
            scales = tl.reshape(parts, (h.shape[0], BLOCK // VECTOR))
        elif UNIT == 4:
            wide = tl.reshape(wide, (h.shape[0], BLOCK, 4))
            codes = _codes(wide, inverse[:, None, None], QUANTIZE, CODE).to(tl.int32)
            h = tl.sum((codes & 255) << (tl.arange(0, 4) * 8)[None, None, :], 2)
        else:
            h = _codes(wide, inverse[:, None], QUANTIZE, CODE).to(ACC)
    elif UNIT == 1:
        h = h.to(ACC)
    return h, scales


@triton.jit(do_not_specialize=["magic"])
def down_rows_kernel(
    h_ptr,
    amax_ptr,
    scale2_ptr,
    w_ptr,
    sw_ptr,
    zero_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    y_ptr,
    n,
    k,
    width,
    top_k,
    experts,
    parts,
    sw_expert,
    sw_row,
    zero_expert,
    zero_row,
    magic,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CODE: tl.constexpr,
    OUT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y[token, BLOCK_N rows]: all experts of token program_id(1) at once, weighted and added.

    Hidden rows h [pairs, k] are quantized on the way in (QUANTIZE: the largest code, or 0). A step holds TOP_K experts,
    with rows of w in registers last, so that a thread meets few hidden values. BLOCK_N divides n and GROUP_N.
    EARLY: this may start while gated_rows_kernel runs, which itself started after ids were written; its results are waited for.
    """
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    token, pairs, ids, legal = _experts_of(ids_ptr, top_k, experts, TOP_K)
    expert = tl.where(legal, ids, 0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    w_at = w_ptr + (expert[None, :, None] * n + rows[:, None, None]) * width + cols[None, None, :]
    w = _stream(w_at, cols, width, legal, EVEN)
    if EARLY:
        gdc_wait()
    sw_at = sw_ptr + expert * sw_expert
    zero_first = (expert * zero_expert)[None, :, None]
    ACC: tl.constexpr = tl.int32 if CODE.is_int() and QUANTIZE > 0 else tl.float32
    scale = None
    inverse = None
    if QUANTIZE > 0 and GROUP_K == 0:
        scale, inverse = _hidden_scale(amax_ptr, scale2_ptr, pairs, legal, parts, PARTS, QUANTIZE)
    total = tl.zeros((BLOCK_N, TOP_K, BLOCK if UNIT == 4 else BLOCK // VECTOR), ACC)
    for start in range(0, width, BLOCK):
        at = start + cols
        more = _only_if(legal, start + BLOCK < width)
        following = _stream(w_at + start + BLOCK, at + BLOCK, width, more, EVEN)
        h, scale_h = _hidden_step(
            h_ptr + pairs * k, start, k, legal, inverse, BLOCK, UNIT, VECTOR, GROUP_K, QUANTIZE, CODE, ACC
        )
        group, live = _group_of(start, k, BLOCK, UNIT, VECTOR, GROUP_K)
        if GROUP_K > 0 and UNIT == 1:
            scale_h = scale_h * _block_scale(sw_at[:, None], first, group, live, sw_row, GROUP_N)
        total = _add_products(
            total, w, h, scale_h, rows, group, live, sw_at[None, :, None], zero_ptr, zero_first, sw_row, zero_row,
            magic, UNIT, VECTOR, GROUP_K,
        )  # fmt: skip
        w = following
    y = tl.sum(total, 2).to(tl.float32)
    if scale is not None:
        y = y * scale[None, :]
    if GROUP_K == 0:
        y = y * tl.load(sw_at[None, :] + rows[:, None] * sw_row).to(tl.float32)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + expert[None, :] * n + rows[:, None]).to(tl.float32)
    _store_token(y_ptr, y, weights_ptr, token, pairs, legal, rows, n, OUT)
