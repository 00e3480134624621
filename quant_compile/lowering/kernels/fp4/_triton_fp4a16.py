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

from quant_compile.lowering.kernels._triton_pieces import _words

FROM_E2M1 = tl.constexpr(2.0**126)
FROM_E4M3 = tl.constexpr(2.0**120)
# Bits that stay, as int32: sign and three (e2m1) or seven (e4m3) bits from the position that an arithmetic shift left them.
E2M1_BITS = tl.constexpr(0x81C00000 - (1 << 32))
E4M3_BITS = tl.constexpr(0x87F00000 - (1 << 32))
# The same for four codes as bytes of e5m2, whose bytes are the high ones of f16; and masks of bytes and halves.
FROM_F16 = tl.constexpr(2.0**14)
HIGH_SIGNS = tl.constexpr(0x80808080 - (1 << 32))
HIGH_CODES = tl.constexpr(0x0E0E0E0E)
ODD_BYTES = tl.constexpr(0xFF00FF00 - (1 << 32))
HIGH_HALF = tl.constexpr(0xFFFF0000 - (1 << 32))


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
def _pair(word, BF16: tl.constexpr):
    """int32 that holds two 16-bit floats -> both as f32."""
    if BF16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & HIGH_HALF).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _codes(word):
    """int32 of eight codes -> eight f32 in order, each the value times 2**-14.

    Four codes at a time become the high bytes of four f16 (sign, lowest two exponent bits, first of the mantissa; 0.5 is a
    subnormal there too), then pairs of them become words of two f16.
    """
    low = ((word << 4) & HIGH_SIGNS) | ((word << 1) & HIGH_CODES)
    high = (word & HIGH_SIGNS) | ((word >> 3) & HIGH_CODES)
    c0, c4 = _pair((low << 8) & ODD_BYTES, False)
    c2, c6 = _pair(low & ODD_BYTES, False)
    c1, c5 = _pair((high << 8) & ODD_BYTES, False)
    c3, c7 = _pair(high & ODD_BYTES, False)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _inputs(x_at, first, words, k, EVEN: tl.constexpr, X64: tl.constexpr, BF16: tl.constexpr):
    """The eight inputs of each word from word ``first`` on, as eight f32 [words]."""
    if X64:
        # Two loads of four inputs: the threads that hold the words of w load what they multiply.
        at = (first + words) * 2
        if EVEN:
            near = tl.load(x_at + at, eviction_policy="evict_last")
            far = tl.load(x_at + at + 1, eviction_policy="evict_last")
        else:
            near = tl.load(x_at + at, mask=at < k, other=0)
            far = tl.load(x_at + at + 1, mask=at + 1 < k, other=0)
        x0, x1 = _pair(near.to(tl.int32), BF16)
        x2, x3 = _pair((near >> 32).to(tl.int32), BF16)
        x4, x5 = _pair(far.to(tl.int32), BF16)
        x6, x7 = _pair((far >> 32).to(tl.int32), BF16)
    else:
        at = (first + words) * 8
        x0 = tl.load(x_at + at, mask=at < k, other=0.0).to(tl.float32)
        x1 = tl.load(x_at + at + 1, mask=at + 1 < k, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + at + 2, mask=at + 2 < k, other=0.0).to(tl.float32)
        x3 = tl.load(x_at + at + 3, mask=at + 3 < k, other=0.0).to(tl.float32)
        x4 = tl.load(x_at + at + 4, mask=at + 4 < k, other=0.0).to(tl.float32)
        x5 = tl.load(x_at + at + 5, mask=at + 5 < k, other=0.0).to(tl.float32)
        x6 = tl.load(x_at + at + 6, mask=at + 6 < k, other=0.0).to(tl.float32)
        x7 = tl.load(x_at + at + 7, mask=at + 7 < k, other=0.0).to(tl.float32)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _dot(codes, x, scale, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Products of the words [GROUPS * VECTOR] with their inputs, summed by group and scaled: [GROUPS]."""
    total = codes[0] * x[0]
    for j in tl.static_range(1, 8):
        total += codes[j] * x[j]
    return tl.sum(tl.reshape(total, (GROUPS, VECTOR)), 1) * scale


@triton.jit(do_not_specialize=["m"])
def gemv_fp4_kernel(
    x_ptr, w_ptr, s_ptr, global_ptr, bias_ptr, y_ptr, m, n, k, units,
    M: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    EVEN: tl.constexpr, E8M0: tl.constexpr, X64: tl.constexpr, BF16: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Rows [pid * BN, +BN) of w times the m <= M rows of x -> y [m, n]; products stay in their thread until the end.

    w is read as int32 words of eight codes, ``units * LANES`` to a row, so that a row starts at a multiple of LANES words
    (LANES 4: 16-byte loads). VECTOR words share a scale. X64: x is int64 words of four inputs, and k counts those.
    Rows of w and of x are separate tensors of one shape: Triton then gives all loads the same threads.
    """
    GROUPS: tl.constexpr = WORDS // VECTOR
    w_ptr, s_ptr = _words(w_ptr, tl.int32), _words(s_ptr, tl.uint8)
    if X64:
        x_ptr = _words(x_ptr, tl.int64)
    width = units * LANES
    first_row = tl.program_id(0) * BN
    words = tl.arange(0, WORDS)
    vectors = tl.arange(0, GROUPS)
    totals = ()
    for _ in tl.static_range(M * BN):
        totals = totals + (tl.zeros((GROUPS,), tl.float32),)
    for start in range(0, width, WORDS):
        codes = ()
        scales = ()
        for r in tl.static_range(BN):
            row = tl.minimum(first_row + r, n - 1).to(tl.int64)
            w_at = w_ptr + row * width + start + words
            s_at = s_ptr + row * (width // VECTOR) + start // VECTOR + vectors
            if EVEN:
                codes = codes + (tl.load(w_at, eviction_policy="evict_first"),)
                scales = scales + (tl.load(s_at),)
            else:
                codes = codes + (tl.load(w_at, mask=start + words < width, other=0),)
                scales = scales + (tl.load(s_at, mask=start + vectors * VECTOR < width, other=0),)
        inputs = ()
        for t in tl.static_range(M):
            x_at = x_ptr + tl.minimum(t, m - 1).to(tl.int64) * k
            inputs = inputs + (_inputs(x_at, start, words, k, EVEN, X64, BF16),)
        new = ()
        for r in tl.static_range(BN):
            decoded = _codes(codes[r])
            scale = _scale(scales[r], E8M0)
            for t in tl.static_range(M):
                new = new + (totals[r * M + t] + _dot(decoded, inputs[t], scale, GROUPS, VECTOR),)
        totals = new
    for r in tl.static_range(BN):
        row = first_row + r
        whole = FROM_F16
        bias = 0.0
        if global_ptr is not None:
            whole = FROM_F16 * tl.load(global_ptr + row, mask=row < n, other=0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
        for t in tl.static_range(M):
            y = tl.sum(totals[r * M + t], 0) * whole + bias
            tl.store(y_ptr + tl.cast(t, tl.int64) * n + row, y.to(OUT), mask=(row < n) & (t < m))


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
    s_ptr = _words(s_ptr, tl.uint8)
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
    s_ptr = _words(s_ptr, tl.uint8)
    first = tl.program_id(1) * BYTES
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(row, n - 1).to(tl.int64)
    low, high = _halves(w_ptr, s_ptr, rows, first, width, BYTES, GROUP, EVEN, E8M0)
    w = tl.reshape(tl.join(low, high), (BN, BYTES * 2))
    if global_ptr is not None:
        w = w * tl.load(global_ptr + rows)[:, None]
    column = first * 2 + tl.arange(0, BYTES * 2)
    inside = (row < n)[:, None] & (column < k)[None, :]
    tl.store(out_ptr + (rows * k)[:, None] + column[None, :], w.to(OUT), mask=inside)
