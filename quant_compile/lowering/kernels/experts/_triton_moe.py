"""Triton source of fused mixture-of-experts blocks; ``triton_moe`` chooses among the kernels and launches them.

Grouped form, any number of tokens: ``count_kernel`` and ``align_kernel`` sort (token, expert) pairs by expert and cut them
into blocks, ``grouped_kernel`` multiplies blocks by their expert's weight (twice), ``quantize_kernel`` quantizes hidden
rows where that isn't fused, ``sum_kernel`` adds a token's experts. Decode form, few pairs: ``gated_rows_kernel`` and
``down_rows_kernel`` stream the chosen experts' rows through plain cores.

Weights are in row form with a leading expert. Sums have a fixed order and there are no atomics: equal inputs give equal
bits. An id outside of 0..E-1 is never used as an address. Arguments that change with the tokens aren't specialized.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)

# --- pieces ---


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=ALL_NAN)


@triton.jit
def _amax(x, axis: tl.constexpr):
    """Largest magnitude along ``axis``; NaN stays NaN."""
    return tl.reduce(tl.abs(x), axis, _larger)


@triton.jit
def _scale_of(amax, LIMIT: tl.constexpr):
    """(scale, 1 / scale) of rows whose largest code is LIMIT, as ``ir.numerics`` defines them."""
    scale = tl.maximum(amax, 2.0**-100, propagate_nan=ALL_NAN) * (1.0 / LIMIT)
    return scale, tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _codes(x, inverse, LIMIT: tl.constexpr, CODE: tl.constexpr):
    """f32 x times ``inverse``, rounded half to even onto codes, saturating."""
    x = tl.minimum(x * inverse, LIMIT, propagate_nan=ALL_NAN)
    x = tl.maximum(x, -LIMIT, propagate_nan=ALL_NAN)
    if CODE.is_int():
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: whole numbers are the next floats
    return x.to(CODE)


@triton.jit
def _activate(
    gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, OUT: tl.constexpr
):
    """The expert's activation in f32 on values rounded to OUT, result rounded to OUT, as f32."""
    gate = gate.to(OUT).to(tl.float32)
    up = up.to(OUT).to(tl.float32)
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=ALL_NAN)
        up = tl.minimum(up, LIMIT, propagate_nan=ALL_NAN)
        up = tl.maximum(up, -LIMIT, propagate_nan=ALL_NAN)
    if KIND == "silu":
        gate = gate * tl.sigmoid(gate * ALPHA)
    elif KIND == "gelu":
        gate = gate * 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u)
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = tl.maximum(gate, 0.0, propagate_nan=ALL_NAN)
    return (gate * (up + SHIFT)).to(OUT).to(tl.float32)


# --- pairs by expert ---


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(ids_ptr, counts_ptr, pairs, CHUNK: tl.constexpr):
    """counts[e] of expert e = program_id(0)."""
    expert = tl.program_id(0)
    total = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1)
        total += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(total, 0))


@triton.jit(do_not_specialize=["pairs", "most_blocks"])
def align_kernel(
    ids_ptr,
    counts_ptr,
    sorted_ptr,
    blocks_ptr,
    pairs,
    most_blocks,
    experts,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Expert e = program_id(0) writes its pairs, ascending, to its place in sorted [pairs], and its blocks' entries.

    blocks [3, most_blocks]: expert, first place in ``sorted``, and number of pairs (at most BLOCK_M; 0 past the last block).
    Without counts (None) every program counts all experts itself, ROWS pairs at a time.
    """
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    if counts_ptr is None:
        seen = tl.zeros((ROWS, EXPERTS), tl.int32)
        for start in range(0, pairs, ROWS):
            at = start + tl.arange(0, ROWS)
            ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1)
            seen += (ids[:, None] == every[None, :]).to(tl.int32)
        counts = tl.where(every < experts, tl.sum(seen, 0), 0)
    else:
        counts = tl.load(counts_ptr + every, mask=every < experts, other=0)
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(every < expert, counts, 0), 0)
    first_block = tl.sum(tl.where(every < expert, needed, 0), 0)
    own = tl.sum(tl.where(every == expert, counts, 0), 0)
    own_blocks = (own + BLOCK_M - 1) // BLOCK_M
    lanes = tl.arange(0, 128)
    for start in range(0, own_blocks, 128):
        block = start + lanes
        inside = block < own_blocks
        at = blocks_ptr + first_block + block
        tl.store(at, tl.zeros((128,), tl.int32) + expert, mask=inside)
        tl.store(at + most_blocks, first + block * BLOCK_M, mask=inside)
        tl.store(at + 2 * most_blocks, tl.minimum(own - block * BLOCK_M, BLOCK_M), mask=inside)
    for start in range(tl.sum(needed, 0) + expert * 128, most_blocks, experts * 128):
        block = start + lanes
        tl.store(blocks_ptr + 2 * most_blocks + block, tl.zeros((128,), tl.int32), mask=block < most_blocks)
    if own > 0:
        place = first
        for start in range(0, pairs, CHUNK):
            at = start + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1)
            hit = (ids == expert).to(tl.int32)
            tl.store(sorted_ptr + place + tl.cumsum(hit, 0) - hit, at, mask=hit > 0)
            place += tl.sum(hit, 0)


# --- blocks of pairs times weights, on tensor cores ---


@triton.jit
def _tile_of(pid, blocks, tiles, BAND: tl.constexpr):
    """(block, tile) of program ``pid``: BAND blocks are walked tile by tile, which keeps both operands in L2."""
    band = BAND * tiles
    first = (pid // band) * BAND
    height = tl.minimum(blocks - first, BAND)
    return first + (pid % band) % height, (pid % band) // height


@triton.jit
def _weights(w_ptr, w_at, line, start, cols, width, TMA: tl.constexpr, EVEN_K: tl.constexpr, W4: tl.constexpr):
    """Codes [BLOCK_N, BLOCK_K] of one step (W4: bytes [BLOCK_N, BLOCK_K / 2]); ``cols`` are places in a row."""
    if W4:
        start = start // 2
    if TMA:
        w = w_ptr.load([line, start])
    elif EVEN_K:
        w = tl.load(w_at + start)
    else:
        w = tl.load(w_at + start, mask=(cols < width - start)[None, :], other=0.0)
    return w


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
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    lanes = tl.arange(0, BLOCK_M)
    first = tl.load(blocks_ptr + most_blocks + block)
    place = first + tl.minimum(lanes, count - 1)
    x_row = place
    if GATED:
        x_row = tl.load(sorted_ptr + place) // top_k
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(rows, n - 1)
    cols = tl.arange(0, BLOCK_K)
    spots = tl.arange(0, BLOCK_K // 2) if W4 else cols
    all_rows = 2 * n if GATED else n
    line = expert.to(tl.int32) * all_rows + tile * BLOCK_N
    w_at = w_ptr
    up_at = w_ptr
    if not TMA:
        w_at = w_ptr + expert * all_rows * width + near[:, None] * width + spots[None, :]
        up_at = w_at + n.to(tl.int64) * width
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
    inside = (rows < n)[:, None] & (lanes < count)[None, :]
    y_at = y_ptr + y_row.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


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


@triton.jit
def sum_kernel(parts_ptr, ids_ptr, weights_ptr, y_ptr, n, top_k, experts, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """y[t] = sum of weights[t, j] * parts[t * top_k + j] over j with a legal id, in f32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.arange(0, TOP_K)
    pairs = token * top_k + slots
    ids = tl.load(ids_ptr + pairs, mask=slots < top_k, other=-1)
    legal = (ids >= 0) & (ids < experts)
    mask = legal[:, None] & (cols < n)[None, :]
    parts = tl.load(parts_ptr + pairs[:, None] * n + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if weights_ptr is not None:
        parts = parts * tl.load(weights_ptr + pairs, mask=legal, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + token * n + cols, tl.sum(parts, 0).to(y_ptr.dtype.element_ty), mask=cols < n)


# --- few pairs: rows of the chosen experts, on plain cores ---


@triton.jit
def _dp4a(a, b, total):
    """total + the dot product of the four int8 in a and in b, int32."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _stream(w_at, cols, width, legal, EVEN: tl.constexpr):
    """Units [rows, experts, BLOCK] of weights; zeros for illegal experts and past the end."""
    mask = legal[None, :, None]
    if not EVEN:
        mask = mask & (cols < width)[None, None, :]
    return tl.load(w_at, mask=mask, other=0.0)


@triton.jit
def _add_codes(total, w, x, magic, SHIFT: tl.constexpr):
    """total + code x of one of the eight codes of each word.

    A code or-ed into the mantissa of 2**23 is 2**23 + code; ``magic`` is 2**23 as bits, from an argument.
    """
    codes = (((w >> SHIFT) & 15) | magic).to(tl.float32, bitcast=True) - 8388608.0
    return total + codes * x.to(tl.float32)[None, :, :]


@triton.jit
def _eight(x, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """x [EXPERTS, BLOCK * 8] -> the eight inputs of each word, in order: [EXPERTS, BLOCK] each."""
    even, odd = tl.split(tl.reshape(x, (EXPERTS, BLOCK, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _word_products(w, x, magic):
    """(products of words w [rows, experts, BLOCK] with x [experts, BLOCK * 8], sums of x), one for each word."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, w.shape[1], w.shape[2])
    total = tl.zeros(w.shape, tl.float32)
    total = _add_codes(total, w, x0, magic, 0)
    total = _add_codes(total, w, x1, magic, 4)
    total = _add_codes(total, w, x2, magic, 8)
    total = _add_codes(total, w, x3, magic, 12)
    total = _add_codes(total, w, x4, magic, 16)
    total = _add_codes(total, w, x5, magic, 20)
    total = _add_codes(total, w, x6, magic, 24)
    total = _add_codes(total, w, x7, magic, 28)
    sums = x0.to(tl.float32) + x1.to(tl.float32) + x2.to(tl.float32) + x3.to(tl.float32)
    sums += x4.to(tl.float32) + x5.to(tl.float32) + x6.to(tl.float32) + x7.to(tl.float32)
    return total, sums


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


@triton.jit
def _token_step(x_row, start, k, width, BLOCK: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr):
    """A token's units from ``start``, for _add_products: [1, BLOCK], or [1, BLOCK * 8] for UNIT 8."""
    if UNIT == 8:
        cols = start * 8 + tl.arange(0, BLOCK * 8)
        mask = cols < k
    else:
        cols = start + tl.arange(0, BLOCK)
        mask = cols < width
    if EVEN:
        x = tl.load(x_row + cols)
    else:
        x = tl.load(x_row + cols, mask=mask, other=0.0)
    if UNIT == 1:
        x = x.to(ACC)
    return x[None, :]


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
    up_at = w_at + n.to(tl.int64) * width
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
    tl.store(y_ptr + pair.to(tl.int64) * n + rows[:, None], y.to(OUT))
    if amax_ptr is not None:
        tl.store(amax_ptr + pair * tl.num_programs(0) + tl.program_id(0) + tl.arange(0, 1), _amax(y, 0))


@triton.jit
def _hidden_scale(amax_ptr, scale2_ptr, pairs, legal, parts, PARTS: tl.constexpr, LIMIT: tl.constexpr):
    """(scale, 1 / scale) [experts] of hidden rows: calibrated, or from the largest magnitudes of their parts."""
    if amax_ptr is not None:
        part = tl.arange(0, PARTS)
        mask = legal[:, None] & (part < parts)[None, :]
        amax = _amax(tl.load(amax_ptr + pairs[:, None] * parts + part[None, :], mask=mask, other=0.0), 1)
        scale, inverse = _scale_of(amax, LIMIT)
    else:
        scale = tl.zeros(pairs.shape, tl.float32) + tl.load(scale2_ptr)
        inverse = tl.math.div_rn(tl.full(pairs.shape, 1.0, tl.float32), scale)
    return scale, inverse


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
    slots = tl.arange(0, TOP_K)
    token = tl.program_id(1).to(tl.int64)
    pairs = token * top_k + slots
    ids = tl.load(ids_ptr + pairs, mask=slots < top_k, other=-1)
    legal = (ids >= 0) & (ids < experts)
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
        more = legal & (start + BLOCK < width)
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
    y = tl.where(legal[None, :], y.to(OUT).to(tl.float32), 0.0)
    if weights_ptr is not None:
        y = y * tl.load(weights_ptr + pairs, mask=legal, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + token * n + rows, tl.sum(y, 1).to(OUT))
