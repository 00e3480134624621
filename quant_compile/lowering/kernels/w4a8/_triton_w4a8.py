"""Triton source of y[m, n] = x[m, k] @ w[n, k].T for 8-bit x and 4-bit w in row form, on 8-bit tensor cores or dp4a.

A byte of w holds an even k in its low nibble and the next k in its high one, so everything counts *pairs*: x is read as
16-bit words of two codes, and the product is low nibbles times first codes plus high nibbles times second ones. Nothing is
reordered. Nibbles u = 0..15 become operands that stand for u - 8 in these units:

* int8: the nibble in the upper half of a byte with its top bit flipped is 16 (u - 8) in two's complement.
* e4m3: bits 0..8 of a byte, read as e4m3, are 0..8 times 2^-9 (the subnormals and the first normal), all exact.
* progressive (QServe per group): u - zero; sums of a group are multiplied by its integer scale, all in int32.

The conversions work element by element, four to a register where ``ASM`` says that inline assembly may be used.
Sums are int32 or f32 within a group, f32 across groups, in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _dp4a, _only_if, _tile_of, _words

# Two words of 8-bit operands out of four bytes of nibbles; ptxas turns each pair of logic steps into one instruction.
INT8_ASM = tl.constexpr(
    "{ .reg .b32 t; "
    "shl.b32 t, $2, 4; and.b32 t, t, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; "
    "and.b32 t, $2, 0xF0F0F0F0; xor.b32 $1, t, 0x80808080; }"
)
# Negative where bit 3 is clear (n = 1): magnitude (u ^ 7) + 1 and the sign bit, together n * 129; else the low three bits.
E4M3_ASM = tl.constexpr(
    "{ .reg .b32 u, n, t; "
    "and.b32 u, $2, 0x0F0F0F0F; not.b32 n, u; shr.u32 n, n, 3; and.b32 n, n, 0x01010101; "
    "mul.lo.u32 t, n, 7; xor.b32 t, u, t; and.b32 t, t, 0x07070707; mad.lo.u32 $0, n, 129, t; "
    "shr.u32 u, $2, 4; and.b32 u, u, 0x0F0F0F0F; not.b32 n, u; shr.u32 n, n, 3; and.b32 n, n, 0x01010101; "
    "mul.lo.u32 t, n, 7; xor.b32 t, u, t; and.b32 t, t, 0x07070707; mad.lo.u32 $1, n, 129, t; }"
)
# Four bytes of nibbles ($2) less four zero points ($3): bit 7 is set before, which no byte can borrow past, and flipped after.
ZEROS_ASM = tl.constexpr(
    "{ .reg .b32 t; "
    "and.b32 t, $2, 0x0F0F0F0F; or.b32 t, t, 0x80808080; sub.u32 t, t, $3; xor.b32 $0, t, 0x80808080; "
    "shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F; or.b32 t, t, 0x80808080; sub.u32 t, t, $3; xor.b32 $1, t, 0x80808080; }"
)
PAIR_ASM = tl.constexpr("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")
WORDS_ASM = tl.constexpr(
    "{ .reg .b32 a, b; mov.b64 {a, b}, $2; prmt.b32 $0, a, b, 0x6420; prmt.b32 $1, a, b, 0x7531; }"
)


# --- decoding ---


@triton.jit
def _nibble_as_e4m3(u):
    negative = u < 8
    return tl.where(negative, (8 - u) | 128, u - 8).to(tl.uint8)


@triton.jit
def _decode(w, FLOAT8: tl.constexpr, ASM: tl.constexpr):
    """Bytes of nibbles -> (operands of the low nibbles, of the high ones)."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            E4M3_ASM if FLOAT8 else INT8_ASM, "=r,=r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    elif FLOAT8:
        wide = w.to(tl.int32)
        low, high = _nibble_as_e4m3(wide & 15), _nibble_as_e4m3(wide >> 4)
    else:
        low, high = ((w << 4) ^ 128).to(tl.int8, bitcast=True), ((w & 240) ^ 128).to(tl.int8, bitcast=True)
    if FLOAT8:
        low, high = low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
    return low, high


@triton.jit
def _less_zeros(w, zero, ASM: tl.constexpr):
    """Bytes of nibbles [rows, STEP], zero points u8 [rows] -> int8 operands nibble - zero of the low ones, of the high ones."""
    zero = tl.broadcast_to(zero[:, None], w.shape)
    if ASM:
        low, high = tl.inline_asm_elementwise(
            ZEROS_ASM, "=r,=r,r,r", [w, zero], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low, high = ((w & 15) - zero).to(tl.int8, bitcast=True), ((w >> 4) - zero).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def _pairs(x, FLOAT8: tl.constexpr, ASM: tl.constexpr):
    """int16 words -> (first codes, second codes)."""
    if ASM:
        first, second = tl.inline_asm_elementwise(
            PAIR_ASM, "=r,=r,r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        first, second = x.to(tl.int8), (x >> 8).to(tl.int8)
    if FLOAT8:
        first, second = first.to(tl.float8e4nv, bitcast=True), second.to(tl.float8e4nv, bitcast=True)
    return first, second


# --- tensor cores ---


@triton.jit(do_not_specialize=["m", "steps"])
def tile_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, group_scale_ptr, zero_ptr, sum_ptr, bias_ptr, y_ptr,
    m, n, pairs, groups, sx_row, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, PAIRS_PER_GROUP: tl.constexpr,
    FLOAT8: tl.constexpr, PROGRESSIVE: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows of w (first operand) by tokens, one tile; program_id(1) is a part of k when SPLIT > 1.

    x [m, pairs], read as int16, w u8 [n, pairs]; sw [n] and group_scale [n, groups], or either one. A step is STEP pairs, inside one
    group. sum_ptr and zero_ptr [n]: QServe per channel; zero_ptr [n, groups]: PROGRESSIVE. SPLIT 2: f32 parts [parts, m, n]
    without bias.
    """
    SUMS: tl.constexpr = tl.float32 if FLOAT8 else tl.int32
    x_ptr = _words(x_ptr, tl.int16)
    # A sum of its own for each group: float, or integer under QServe's integer scales (PROGRESSIVE).
    GROUPED: tl.constexpr = PAIRS_PER_GROUP > 0
    WIDE: tl.constexpr = tl.int32 if PROGRESSIVE or not (GROUPED or FLOAT8) else tl.float32
    UNIT: tl.constexpr = 512.0 if FLOAT8 else 0.0625
    tile_n, tile_m = _tile_of(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M), 8)
    part = tl.program_id(1)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row, token = tl.minimum(rows, n - 1), tl.minimum(tokens, m - 1)
    inner = tl.arange(0, STEP)
    w_at = w_ptr + row.to(tl.int64)[:, None] * pairs + inner[None, :]
    x_at = x_ptr + token.to(tl.int64)[:, None] * pairs + inner[None, :]
    first, last = part * steps, tl.minimum((part + 1) * steps, tl.cdiv(pairs, STEP))
    total = tl.zeros((BLOCK_N, BLOCK_M), WIDE)
    per_row = row.to(tl.int64) * groups
    scale, zero = tl.zeros((BLOCK_N,), WIDE), tl.zeros((BLOCK_N,), tl.uint8)
    if GROUPED:  # asked for a step ahead: two bytes a row are too few for the pipeline of loads, which takes four
        near = tl.minimum(first * STEP // PAIRS_PER_GROUP, groups - 1)
        scale = tl.load(group_scale_ptr + per_row + near).to(WIDE)
        if PROGRESSIVE:
            zero = tl.load(zero_ptr + per_row + near)
    for step in range(first, last):
        start = step * STEP
        if EVEN:
            w = tl.load(w_at + start)
            x = tl.load(x_at + start)
        else:
            inside = (inner < pairs - start)[None, :]
            w = tl.load(w_at + start, mask=inside, other=0)
            x = tl.load(x_at + start, mask=inside, other=0)
        low, high = _less_zeros(w, zero, ASM) if PROGRESSIVE else _decode(w, FLOAT8, ASM)
        x0, x1 = _pairs(x, FLOAT8, ASM)
        if GROUPED or FLOAT8:
            sums = tl.dot(low, tl.trans(x0), out_dtype=SUMS)
            sums = tl.dot(high, tl.trans(x1), sums, out_dtype=SUMS).to(WIDE)
            if GROUPED:
                total += sums * scale[:, None]
                ahead = tl.minimum((start + STEP) // PAIRS_PER_GROUP, groups - 1)
                scale = tl.load(group_scale_ptr + per_row + ahead).to(WIDE)
                if PROGRESSIVE:
                    zero = tl.load(zero_ptr + per_row + ahead)
            else:
                total += sums
        else:
            total = tl.dot(low, tl.trans(x0), total, out_dtype=SUMS)
            total = tl.dot(high, tl.trans(x1), total, out_dtype=SUMS)
    # (total / 16 - (zero - 8) * sum) is exact in int32; once for all parts.
    if zero_ptr is not None and not PROGRESSIVE:
        offset = tl.load(zero_ptr + row).to(tl.int32) - 8
        sums = tl.load(sum_ptr + token).to(tl.int32)
        total = (total >> 4) - tl.where(part == 0, offset[:, None] * sums[None, :], 0)
    y = total.to(tl.float32)
    if not PROGRESSIVE and zero_ptr is None:
        y = y * UNIT
    y = y * tl.load(sx_ptr + token * sx_row)[None, :]
    if sw_ptr is not None:
        y = y * tl.load(sw_ptr + row).to(tl.float32)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    place = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    if SPLIT > 1:
        place += part * (tl.cast(m, tl.int64) * n)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (tokens < m)[None, :])


# --- few tokens, int8 inputs ---


@triton.jit
def _four(a, b, total, ASM: tl.constexpr):
    """total + the dot product of the four int8 in a and in b (uint32), int32."""
    if ASM:
        total = _dp4a(a, b, total)
    else:
        left, right = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
        for i in tl.static_range(4):
            total += ((left << (24 - 8 * i)) >> 24) * ((right << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _every_other(x, ASM: tl.constexpr):
    """uint64 of eight codes -> (uint32 of codes 0, 2, 4, 6, uint32 of codes 1, 3, 5, 7)."""
    if ASM:
        even, odd = tl.inline_asm_elementwise(
            WORDS_ASM, "=r,=r,l", [x], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        even = (x & 255) | ((x >> 8) & 0xFF00) | ((x >> 16) & 0xFF0000) | ((x >> 24) & 0xFF000000)
        x = x >> 8
        odd = (x & 255) | ((x >> 8) & 0xFF00) | ((x >> 16) & 0xFF0000) | ((x >> 24) & 0xFF000000)
        even, odd = even.to(tl.uint32), odd.to(tl.uint32)
    return even, odd


@triton.jit
def _gemv_row(
    low, high, x_row, at, words, scale, total,
    VECTOR: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """total [rows, words] plus one token's products; GROUPED: [rows, words / VECTOR], sums of one group times its scale.

    VECTOR neighbours lie in one thread and in one group.
    """
    if EVEN:
        x = tl.load(x_row + at, eviction_policy="evict_last")
    else:
        x = tl.load(x_row + at, mask=at < words, other=0)
    even, odd = _every_other(x.to(tl.uint64, bitcast=True), ASM)
    even, odd = tl.broadcast_to(even[None, :], low.shape), tl.broadcast_to(odd[None, :], low.shape)
    if GROUPED:
        sums = _four(high, odd, _four(low, even, tl.zeros(low.shape, tl.int32), ASM), ASM)
        sums = tl.sum(tl.reshape(sums, (sums.shape[0], sums.shape[1] // VECTOR, VECTOR)), 2)
        total += sums.to(total.dtype) * scale
    else:
        total = _four(high, odd, _four(low, even, total, ASM), ASM)
    return total


@triton.jit
def _gemv_store(
    total, token, rows, row, m, n, sx_ptr, sx_row, sw_ptr, zero_ptr, sum_ptr, bias_ptr, y_ptr, UNIT: tl.constexpr
):  # fmt: skip
    """One token's sums [rows, .] in UNIT -> y; sum_ptr and zero_ptr [n]: QServe per channel."""
    total = tl.sum(total, 1)
    at = tl.minimum(token, m - 1)
    if sum_ptr is not None:
        total = (total >> 4) - (tl.load(zero_ptr + row).to(tl.int32) - 8) * tl.load(sum_ptr + at).to(tl.int32)
    y = total.to(tl.float32)
    if sum_ptr is None:
        y = y * UNIT
    y = y * tl.load(sx_ptr + at * sx_row)
    if sw_ptr is not None:
        y = y * tl.load(sw_ptr + row).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64) * n + rows, y.to(y_ptr.dtype.element_ty), mask=_only_if(rows < n, token < m))


@triton.jit(do_not_specialize=["m"])
def gemv_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, group_scale_ptr, zero_ptr, sum_ptr, bias_ptr, y_ptr, m, n, words, groups, sx_row,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WORDS_PER_GROUP: tl.constexpr,
    PROGRESSIVE: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of w times the M (1, 2 or 4) tokens from program_id(1) * M on.

    x [m, words] is read as int64, w [n, words] as int32: a word is eight weights. Scales, zero points and sums as in ``tile_kernel``.
    """
    GROUPED: tl.constexpr = WORDS_PER_GROUP > 0
    UNIT: tl.constexpr = 1.0 if PROGRESSIVE else 0.0625
    x_ptr, w_ptr = _words(x_ptr, tl.int64), _words(w_ptr, tl.int32)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * M
    row = tl.minimum(rows, n - 1)
    w_at = w_ptr + row.to(tl.int64)[:, None] * words
    per_row = row.to(tl.int64)[:, None] * groups
    VECTOR: tl.constexpr = min(4, WORDS_PER_GROUP) if GROUPED else 1
    total0 = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32 if GROUPED and not PROGRESSIVE else tl.int32)
    total1 = total0
    total2 = total0
    total3 = total0
    for start in range(0, words, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        if EVEN:
            w = tl.load(w_at + at[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(w_at + at[None, :], mask=(at < words)[None, :], other=0)
        w = w.to(tl.uint32, bitcast=True)
        scale = 1.0
        if GROUPED:
            group = (start + tl.arange(0, BLOCK_K // VECTOR) * VECTOR) // WORDS_PER_GROUP
            group = per_row + tl.minimum(group, groups - 1)[None, :]
            scale = tl.load(group_scale_ptr + group).to(total0.dtype)
        if PROGRESSIVE:
            zero = tl.load(zero_ptr + group).to(tl.uint32) * 0x01010101
            zero = tl.broadcast_to(zero[:, :, None], (BLOCK_N, BLOCK_K // VECTOR, VECTOR))
            zero = tl.reshape(zero, (BLOCK_N, BLOCK_K))
            low = (((w & 0x0F0F0F0F) | 0x80808080) - zero) ^ 0x80808080
            high = ((((w >> 4) & 0x0F0F0F0F) | 0x80808080) - zero) ^ 0x80808080
        else:
            low, high = ((w << 4) & 0xF0F0F0F0) ^ 0x80808080, (w & 0xF0F0F0F0) ^ 0x80808080
        x_at = x_ptr + first.to(tl.int64) * words
        total0 = _gemv_row(low, high, x_at, at, words, scale, total0, VECTOR, EVEN, GROUPED, ASM)
        if M > 1:
            x_row = x_ptr + tl.minimum(first + 1, m - 1).to(tl.int64) * words
            total1 = _gemv_row(low, high, x_row, at, words, scale, total1, VECTOR, EVEN, GROUPED, ASM)
        if M > 2:
            x_row = x_ptr + tl.minimum(first + 2, m - 1).to(tl.int64) * words
            total2 = _gemv_row(low, high, x_row, at, words, scale, total2, VECTOR, EVEN, GROUPED, ASM)
            x_row = x_ptr + tl.minimum(first + 3, m - 1).to(tl.int64) * words
            total3 = _gemv_row(low, high, x_row, at, words, scale, total3, VECTOR, EVEN, GROUPED, ASM)
    _gemv_store(total0, first, rows, row, m, n, sx_ptr, sx_row, sw_ptr, zero_ptr, sum_ptr, bias_ptr, y_ptr, UNIT)
    if M > 1:
        _gemv_store(
            total1, first + 1, rows, row, m, n, sx_ptr, sx_row, sw_ptr, zero_ptr, sum_ptr, bias_ptr, y_ptr, UNIT
        )  # fmt: skip
    if M > 2:
        _gemv_store(
            total2, first + 2, rows, row, m, n, sx_ptr, sx_row, sw_ptr, zero_ptr, sum_ptr, bias_ptr, y_ptr, UNIT
        )  # fmt: skip
        _gemv_store(
            total3, first + 3, rows, row, m, n, sx_ptr, sx_row, sw_ptr, zero_ptr, sum_ptr, bias_ptr, y_ptr, UNIT
        )  # fmt: skip


# --- copies in 8 or 16 bits ---


@triton.jit
def decode_kernel(
    w_ptr, sw_ptr, group_scale_ptr, zero_ptr, out_ptr, scale_ptr, n, k, width, groups,
    BLOCK_N: tl.constexpr, BYTES: tl.constexpr, BYTES_PER_GROUP: tl.constexpr, NIBBLES: tl.constexpr,
):  # fmt: skip
    """w u8 [n, width] -> out [n, k], (nibble - zero) * group_scale, rounded once; row scales sw [n] as f32.

    zero and group_scale [n, groups], a group per row when BYTES_PER_GROUP is 0; without them 8 and 1. NIBBLES: two zero points
    a byte. int8 out takes integer scales.
    """
    WIDE: tl.constexpr = tl.int32 if out_ptr.dtype.element_ty == tl.int8 else tl.float32
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(row, n - 1).to(tl.int64)
    first = tl.program_id(1) * BYTES
    at = first + tl.arange(0, BYTES)
    w = tl.load(w_ptr + rows[:, None] * width + at[None, :], mask=(at < width)[None, :], other=0).to(tl.int32)
    NEAR: tl.constexpr = BYTES // BYTES_PER_GROUP if BYTES_PER_GROUP > 0 else 1
    group = tl.arange(0, NEAR) + (first // BYTES_PER_GROUP if BYTES_PER_GROUP > 0 else 0)
    group = tl.minimum(group, groups - 1)[None, :]
    w = tl.reshape(w, (BLOCK_N, NEAR, BYTES // NEAR))
    if zero_ptr is None:
        zero = 8
    elif NIBBLES:
        zero = tl.load(zero_ptr + rows[:, None] * tl.cdiv(groups, 2) + group // 2).to(tl.int32)
        zero = ((zero >> (4 * (group & 1))) & 15)[:, :, None]
    else:
        zero = tl.load(zero_ptr + rows[:, None] * groups + group).to(tl.int32)[:, :, None]
    low, high = ((w & 15) - zero).to(WIDE), ((w >> 4) - zero).to(WIDE)
    if group_scale_ptr is not None:
        scale = tl.load(group_scale_ptr + rows[:, None] * groups + group).to(WIDE)[:, :, None]
        low, high = low * scale, high * scale
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    codes = tl.reshape(tl.join(low.to(OUT), high.to(OUT)), (BLOCK_N, BYTES * 2))
    column = first * 2 + tl.arange(0, BYTES * 2)
    inside = (row < n)[:, None] & (column < k)[None, :]
    tl.store(out_ptr + (rows * k)[:, None] + column[None, :], codes, mask=inside)
    if scale_ptr is not None:
        tl.store(scale_ptr + row, tl.load(sw_ptr + rows).to(tl.float32), mask=_only_if(row < n, first == 0))
