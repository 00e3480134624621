"""Triton source of the kernels for FP4 weights under 16-bit inputs; ``triton_fp4a16`` chooses among them and launches them.

All read weights in row form: two e2m1 codes a byte, scales as bytes (e4m3 or e8m0, decoded here since sm80 has no such
types), and NVFP4's global scale [n]. A code becomes a float by two shifts and a mask: its sign goes to the sign bit and its
three bits to the lowest exponent bits and the first of the mantissa of an f32, which then is the value times 2**-126, 0.5
(a subnormal of both formats) included. Values times their e4m3 scale have at most six significant bits, so nothing is lost
in 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

FROM_E2M1 = tl.constexpr(2.0**126)
FROM_E4M3 = tl.constexpr(2.0**120)
# Bits that stay, as int32: sign and three (e2m1) or seven (e4m3) bits from the position that an arithmetic shift left them.
E2M1_BITS = tl.constexpr(0x81C00000 - (1 << 32))
E4M3_BITS = tl.constexpr(0x87F00000 - (1 << 32))


@triton.jit
def _e2m1(top):
    """int32 with a code in its four highest bits (any bits below) -> f32."""
    return ((top >> 6) & E2M1_BITS).to(tl.float32, bitcast=True) * FROM_E2M1


@triton.jit
def _scale(byte, E8M0: tl.constexpr):
    """Bytes of e4m3 or e8m0 -> f32; NaN stays NaN."""
    code = byte.to(tl.int32)
    if E8M0:
        bits = tl.where(code == 0, 1 << 22, code << 23)  # 2**-127 is subnormal
        bits = tl.where(code == 255, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)
    value = (((code << 24) >> 4) & E4M3_BITS).to(tl.float32, bitcast=True) * FROM_E4M3
    return tl.where((code & 127) == 127, float("nan"), value)


# --- few rows: multiply-add on plain cores ---


@triton.jit
def _eighths(x):
    """x [M, 8 words] -> eight [M, words], of which the j-th belongs to the j-th code of each word."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit(do_not_specialize=["m"])
def gemv_fp4_kernel(
    x_ptr, w_ptr, s_ptr, global_ptr, bias_ptr, y_ptr, m, n, k, units,
    M: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    EVEN: tl.constexpr, E8M0: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Rows [pid * BN, +BN) of w times the m <= M rows of x -> y [m, n]; products stay in their thread until the end.

    w is read as int32 words of eight codes, ``units * LANES`` to a row, so that a row starts at a multiple of LANES words
    (LANES 4: 16-byte loads). VECTOR words share a scale.
    """
    width = units * LANES
    first = tl.program_id(0) * BN
    rows = tl.minimum(first + tl.arange(0, BN), n - 1).to(tl.int64)
    tokens = tl.minimum(tl.arange(0, M), m - 1).to(tl.int64)
    words = tl.arange(0, WORDS)
    vectors = tl.arange(0, WORDS // VECTOR)
    inputs = tl.arange(0, WORDS * 8)
    w_at = w_ptr + (rows * width)[None, :, None] + words[None, None, :]
    s_at = s_ptr + (rows * (width // VECTOR))[None, :, None] + vectors[None, None, :]
    x_at = x_ptr + (tokens * k)[:, None] + inputs[None, :]
    total = tl.zeros((M, BN, WORDS // VECTOR), tl.float32)
    for start in range(0, width, WORDS):
        if EVEN:
            w = tl.load(w_at + start, eviction_policy="evict_first")
            s = tl.load(s_at + start // VECTOR)
            x = tl.load(x_at + start * 8, eviction_policy="evict_last")
        else:
            w = tl.load(w_at + start, mask=(start + words < width)[None, None, :], other=0)
            inside = start + vectors * VECTOR < width
            s = tl.load(s_at + start // VECTOR, mask=inside[None, None, :], other=0)
            x = tl.load(x_at + start * 8, mask=(start * 8 + inputs < k)[None, :], other=0.0)
        parts = _eighths(x)
        product = tl.zeros((M, BN, WORDS), tl.float32)
        for j in tl.static_range(8):
            product += _e2m1(w << (28 - 4 * j)) * parts[j].to(tl.float32)[:, None, :]
        grouped = tl.sum(tl.reshape(product, (M, BN, WORDS // VECTOR, VECTOR)), 3)
        total += grouped * _scale(s, E8M0)
    y = tl.sum(total, 2)
    out_rows = first + tl.arange(0, BN)
    live = out_rows < n
    if global_ptr is not None:
        y = y * tl.load(global_ptr + out_rows, mask=live, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + out_rows, mask=live, other=0.0).to(tl.float32)[None, :]
    out_tokens = tl.arange(0, M)
    place = out_tokens[:, None].to(tl.int64) * n + out_rows[None, :]
    tl.store(y_ptr + place, y.to(OUT), mask=(out_tokens < m)[:, None] & live[None, :])


# --- more rows: decoded weights as matrices ---


@triton.jit
def _halves(w_ptr, s_ptr, rows, first, width, BYTES: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
            E8M0: tl.constexpr):  # fmt: skip
    """Weights of even and of odd columns, times their group's scale, f32 [rows, BYTES], from byte ``first`` on.

    GROUP counts bytes. Columns past the end are zeros.
    """
    GROUPS: tl.constexpr = BYTES // GROUP
    group = tl.arange(0, GROUPS)
    column = first + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    w_at = w_ptr + (rows * width)[:, None, None] + column[None, :, :]
    s_at = s_ptr + (rows * (width // GROUP))[:, None] + (first // GROUP + group)[None, :]
    if EVEN:
        w = tl.load(w_at)
        s = tl.load(s_at)
    else:
        w = tl.load(w_at, mask=(column < width)[None, :, :], other=0)
        s = tl.load(s_at, mask=(first + group * GROUP < width)[None, :], other=0)
    scale = _scale(s, E8M0)[:, :, None]
    codes = w.to(tl.int32)
    low = tl.reshape(_e2m1(codes << 28) * scale, (rows.shape[0], BYTES))
    high = tl.reshape(_e2m1(codes << 24) * scale, (rows.shape[0], BYTES))
    return low, high


@triton.jit(do_not_specialize=["m", "bytes_per_split"])
def matmul_fp4_kernel(
    x_ptr, w_ptr, s_ptr, global_ptr, bias_ptr, y_ptr, m, n, k, width, bytes_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    E8M0: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x @ w.T on tensor cores; with SPLIT, f32 parts [splits, m, n] without the global scale instead.

    Even and odd columns are two products, so that nibbles never change places; x is taken apart instead. Weights are the
    tall operand, which goes from registers into the tensor core.
    """
    first_row = tl.program_id(0) * BN
    first_token = tl.program_id(1) * BM
    start = tl.program_id(2) * bytes_per_split
    rows = tl.minimum(first_row + tl.arange(0, BN), n - 1).to(tl.int64)
    tokens = tl.minimum(first_token + tl.arange(0, BM), m - 1).to(tl.int64)
    columns = tl.arange(0, BYTES * 2)
    x_at = x_ptr + (tokens * k)[:, None] + columns[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for first in range(start, tl.minimum(start + bytes_per_split, width), BYTES):
        if EVEN:
            x = tl.load(x_at + first * 2)
        else:
            x = tl.load(x_at + first * 2, mask=(first * 2 + columns < k)[None, :], other=0.0)
        even, odd = tl.split(tl.reshape(x, (BM, BYTES, 2)))
        low, high = _halves(w_ptr, s_ptr, rows, first, width, BYTES, GROUP, EVEN, E8M0)
        acc = tl.dot(low.to(OUT), tl.trans(even), acc)
        acc = tl.dot(high.to(OUT), tl.trans(odd), acc)
    out_rows = (first_row + tl.arange(0, BN))[:, None]
    out_tokens = (first_token + tl.arange(0, BM))[None, :]
    live = out_rows < n
    inside = live & (out_tokens < m)
    if SPLIT:
        place = (tl.program_id(2).to(tl.int64) * m + out_tokens) * n + out_rows
        tl.store(y_ptr + place, acc, mask=inside)
    else:
        if global_ptr is not None:
            acc *= tl.load(global_ptr + out_rows, mask=live, other=0.0)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + out_rows, mask=live, other=0.0).to(tl.float32)
        tl.store(y_ptr + out_tokens.to(tl.int64) * n + out_rows, acc.to(OUT), mask=inside)


@triton.jit
def dequantize_fp4_kernel(
    w_ptr, s_ptr, global_ptr, out_ptr, n, k, width,
    BN: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, E8M0: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Weights as a plain matrix [n, k] in ``OUT``, each rounded once."""
    first = tl.program_id(0) * BYTES
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.minimum(row, n - 1).to(tl.int64)
    low, high = _halves(w_ptr, s_ptr, rows, first, width, BYTES, GROUP, EVEN, E8M0)
    w = tl.reshape(tl.join(low, high), (BN, BYTES * 2))
    if global_ptr is not None:
        w = w * tl.load(global_ptr + rows)[:, None]
    column = first * 2 + tl.arange(0, BYTES * 2)
    inside = (row < n)[:, None] & (column < k)[None, :]
    tl.store(out_ptr + (rows * k)[:, None] + column[None, :], w.to(OUT), mask=inside)
