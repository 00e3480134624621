"""Triton source of the kernels for GGUF weights; ``triton_gguf`` chooses among them and launches them.

All read the layout ``gguf_planes`` (see there). Of 32 columns, a *group*, a row has 16 bytes of nibbles: eight 16-bit words, where
nibble j of word i is column 8 j + i. What a thread reads at once, 16 bytes, is under one scale; one place of all words is a matrix
whose columns are runs of eight of x; and two words in one register decode together. A weight is scale * code - minimum:

* ``half`` (q8_0, q4_0): one f16 a group.
* ``affine`` (q4_k, q5_k): d * integer and dmin * integer of each group; d and dmin are f16, for eight groups.
* ``signed`` (q6_k): d * integer of each half of a group.

Codes become floats by bits, never by integer conversion: a nibble in bits 16-19 of 128.0 (*near*), or in bits 12-15 of 2048.0
(*far*), is added to it exactly, with higher bits of the code above it; the constant leaves through the sum of the inputs, or
through the minimum. ``near`` and ``far`` are arguments: ptxas makes one instruction of and-or only when at most one is a literal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _words
from quant_compile.lowering.kernels.weight_only._triton_w4a16 import _halves

NEAR_MASK = tl.constexpr(0x000F0000)
FAR_MASK = tl.constexpr(0x0000F000)
BYTE_MASK = tl.constexpr(0x007F8000)
# 256.0 with the byte's sign flipped: bits 15-22 of it hold code + 128.
BYTE_MAGIC = tl.constexpr(0x43C00000)
BYTE_OFFSET = tl.constexpr(384.0)

# Two words ($4) of four nibbles each, scale ($5, $6: the same) and minimum ($7, $8) in f32 -> four pairs of 16 bits, rounded once.
# Constants of near and far nibbles are taken off with the minimum. 0xEA is (a & b) | c.
# No line breaks: Inductor, which copies a recorded kernel's constants into its code, cannot write them.
_PAIR = (
    "lop3.b32 u, {first}, {mask}, {magic}, 0xEA; lop3.b32 v, {second}, {mask}, {magic}, 0xEA; "
    "mov.b32 a, u; mov.b32 b, v; fma.rn.f32 a, a, $5, {offset}; fma.rn.f32 b, b, $5, {offset}; "
    "cvt.rn.{out}.f32 {to}, b, a; "
)
_NEAR = {"mask": "nm", "magic": "nb", "offset": "nc"}
_FAR = {"mask": "fm", "magic": "fb", "offset": "fc"}


def _pairs_asm(out: str) -> str:
    near = _NEAR | {"out": out}
    far = _FAR | {"out": out}
    return (
        "{ .reg .b32 u, v, up, dn, tu, nm, nb, fm, fb; .reg .f32 a, b, nc, fc, mi;"
        "mov.b32 nm, 0x000F0000; mov.b32 nb, 0x43000000; mov.b32 fm, 0x0000F000; mov.b32 fb, 0x45000000;"
        "neg.f32 mi, $7; fma.rn.f32 nc, $5, 0fC3000000, mi; fma.rn.f32 fc, $5, 0fC5000000, mi;"
        "shl.b32 up, $4, 8; shr.u32 dn, $4, 8; prmt.b32 tu, $4, $4, 0x1032;"
        + _PAIR.format(first="tu", second="$4", to="$0", **near)
        + _PAIR.format(first="up", second="dn", to="$1", **far)
        + _PAIR.format(first="up", second="dn", to="$2", **near)
        + _PAIR.format(first="$4", second="tu", to="$3", **far)
        + "}"
    )


BF16_ASM = tl.constexpr(_pairs_asm("bf16x2"))
F16_ASM = tl.constexpr(_pairs_asm("f16x2"))
FOUR = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")

# --- scales ---


@triton.jit
def _raw_scales(s_ptr, d_ptr, row, group, groups, live, KIND: tl.constexpr, EVEN: tl.constexpr):
    """What scales ``group`` of ``row``, as it lies in memory: (its own 16 bits, those of eight groups; 0 of ``half``)."""
    s_at = s_ptr + row * groups + group
    d_at = d_ptr
    if KIND != "half":
        d_at = d_ptr + row * (groups // 8) + group // 8
    if EVEN:
        own = tl.load(s_at)
        whole = own
        if KIND != "half":
            whole = tl.load(d_at)
    else:
        own = tl.load(s_at, mask=live, other=0)
        whole = own
        if KIND != "half":
            whole = tl.load(d_at, mask=live, other=0)
    return own, whole


@triton.jit
def _f16(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scales(own, whole, KIND: tl.constexpr, ZERO: tl.constexpr):
    """(scale, minimum) of columns 0-15 of a group and of 16-31, f32, from ``_raw_scales``. ZERO: what codes are too large by."""
    if KIND == "half":
        scale = _f16(own)
        out = (scale, scale * ZERO, scale, scale * ZERO)
    elif KIND == "affine":
        word = whole.to(tl.int32)
        codes = own.to(tl.int32)
        scale = _f16(word) * (codes & 255).to(tl.float32)
        minimum = _f16(word >> 16) * ((codes >> 8) & 255).to(tl.float32)
        out = (scale, minimum, scale, minimum)
    else:
        d = _f16(whole)
        codes = own.to(tl.int32)
        low, high = d * ((codes << 24) >> 24).to(tl.float32), d * (codes >> 8).to(tl.float32)
        out = (low, low * ZERO, high, high * ZERO)
    return out


# --- one or two rows: multiply-add on plain cores ---


@triton.jit
def _near(word, high, magic, PLACE: tl.constexpr, BITS: tl.constexpr):
    """128 + code of the nibble at bits 16-19 of ``word`` and the bits of ``high`` from PLACE on."""
    bits = (word & NEAR_MASK) | magic
    if BITS == 5:
        bits = bits | ((high << (20 - PLACE)) & 0x100000)
    if BITS == 6:
        bits = bits | ((high << (20 - PLACE)) & 0x300000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _far(word, high, magic, PLACE: tl.constexpr, BITS: tl.constexpr):
    """2048 + code of the nibble at bits 12-15 of ``word`` and the bits of ``high`` from PLACE on."""
    bits = (word & FAR_MASK) | magic
    if BITS == 5:
        bits = bits | ((high << (16 - PLACE)) & 0x10000)
    if BITS == 6:
        bits = bits | ((high << (16 - PLACE)) & 0x30000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nibble_floats(w, h, near, far, BITS: tl.constexpr):
    """32-bit words of two words of nibbles, their high bits -> codes of places 0 (first and second word), 1, 2 and 3.

    Places 0 and 2 are 128 too large, 1 and 3 are 2048. High bits of the second word begin at half of h's bits.
    """
    STEP: tl.constexpr = 1 if BITS == 5 else 2
    w = w.to(tl.uint32, bitcast=True)
    up, down, turned = w << 8, w >> 8, (w << 16) | (w >> 16)
    return (
        _near(turned, h, near, 0, BITS), _near(w, h, near, 4 * STEP, BITS),
        _far(up, h, far, STEP, BITS), _far(down, h, far, 5 * STEP, BITS),
        _near(up, h, near, 2 * STEP, BITS), _near(down, h, near, 6 * STEP, BITS),
        _far(w, h, far, 3 * STEP, BITS), _far(turned, h, far, 7 * STEP, BITS),
    )  # fmt: skip


@triton.jit
def _byte_floats(w, magic):
    """Words of four int8 -> each as BYTE_OFFSET + code."""
    w = w.to(tl.uint32, bitcast=True)
    return (
        (((w << 15) & BYTE_MASK) ^ magic).to(tl.float32, bitcast=True),
        (((w << 7) & BYTE_MASK) ^ magic).to(tl.float32, bitcast=True),
        (((w >> 1) & BYTE_MASK) ^ magic).to(tl.float32, bitcast=True),
        (((w >> 9) & BYTE_MASK) ^ magic).to(tl.float32, bitcast=True),
    )


@triton.jit
def _load4(ptr, live, EVEN: tl.constexpr):
    """Loads [G, 4] of weights, which are read once."""
    if EVEN:
        out = tl.load(ptr, eviction_policy="evict_first")
    else:
        out = tl.load(ptr, mask=live[:, None], other=0)
    return out


@triton.jit
def _inputs(x_row, group, live, BITS: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr):
    """The 32 inputs of each group as eight f32 [G, 4], in the order of the codes of one or (8 bits) two words.

    x_row points to int32 pairs; of 8 bits to int64 words of four.
    """
    spot = tl.arange(0, 4)[None, :]
    if BITS == 8:
        at = x_row + group[:, None] * 8 + spot
        near, far = _load_x(at, live, EVEN), _load_x(at + 4, live, EVEN)
        a, b = _halves(near.to(tl.int32), BF16)
        c, d = _halves((near >> 32).to(tl.int32), BF16)
        e, f = _halves(far.to(tl.int32), BF16)
        g, h = _halves((far >> 32).to(tl.int32), BF16)
    else:
        at = x_row + group[:, None] * 16 + spot
        a, b = _halves(_load_x(at, live, EVEN), BF16)
        c, d = _halves(_load_x(at + 4, live, EVEN), BF16)
        e, f = _halves(_load_x(at + 8, live, EVEN), BF16)
        g, h = _halves(_load_x(at + 12, live, EVEN), BF16)
    return a, b, c, d, e, f, g, h


@triton.jit
def _load_x(at, live, EVEN: tl.constexpr):
    if EVEN:
        out = tl.load(at, eviction_policy="evict_last")
    else:
        out = tl.load(at, mask=live[:, None], other=0)
    return out


@triton.jit
def _input_sums(x, BITS: tl.constexpr, KIND: tl.constexpr):
    """Sums [G] of a group's inputs, of columns 0-15 and of 16-31, and what the constants of their codes add to products.

    Of other kinds than ``signed`` the first of each is that of all columns.
    """
    if KIND == "signed":
        a, b = tl.sum(x[0] + x[1], 1), tl.sum(x[2] + x[3], 1)
        c, d = tl.sum(x[4] + x[5], 1), tl.sum(x[6] + x[7], 1)
        out = (a + b, c + d, a * 128.0 + b * 2048.0, c * 128.0 + d * 2048.0)
    else:
        a, b = tl.sum(x[0] + x[1] + (x[4] + x[5]), 1), tl.sum(x[2] + x[3] + (x[6] + x[7]), 1)
        whole = a + b
        constants = whole * BYTE_OFFSET if BITS == 8 else a * 128.0 + b * 2048.0
        out = (whole, whole, constants, constants)
    return out


@triton.jit
def _group_dot(codes, x, sums, scales, KIND: tl.constexpr):
    """Products of eight codes and inputs [G, 4] each, summed by group, scaled, less the minimum: f32 [G]."""
    low = codes[0] * x[0]
    low += codes[1] * x[1]
    low += codes[2] * x[2]
    low += codes[3] * x[3]
    high = codes[4] * x[4] if KIND == "signed" else low + codes[4] * x[4]
    high += codes[5] * x[5]
    high += codes[6] * x[6]
    high += codes[7] * x[7]
    if KIND == "signed":
        low_sum, high_sum = tl.sum(low, 1) - sums[2], tl.sum(high, 1) - sums[3]
        out = scales[0] * low_sum - scales[1] * sums[0] + scales[2] * high_sum - scales[3] * sums[1]
    else:
        out = scales[0] * (tl.sum(high, 1) - sums[2]) - scales[1] * sums[0]
    return out


@triton.jit
def _load_row(w_ptr, h_ptr, row, group, groups, live, BITS: tl.constexpr, EVEN: tl.constexpr):
    """A row's codes of groups [G]: 32-bit words [G, 4] and, of 8 bits, four more, or the words' high bits."""
    spot = tl.arange(0, 4)[None, :]
    place = (row * groups + group)[:, None]
    if BITS == 8:
        first = _load4(w_ptr + place * 8 + spot, live, EVEN)
        second = _load4(w_ptr + place * 8 + 4 + spot, live, EVEN)
    else:
        first = _load4(w_ptr + place * 4 + spot, live, EVEN)
        second = first
        if BITS > 4:
            second = _load4(h_ptr + place * 4 + spot, live, EVEN)
    return first, second


@triton.jit
def _row_floats(first, second, near, far, byte, BITS: tl.constexpr):
    """Codes of ``_load_row`` as eight f32 [G, 4] with their constants."""
    if BITS == 8:
        out = _byte_floats(first, byte) + _byte_floats(second, byte)
    else:
        out = _nibble_floats(first, second.to(tl.uint32), near, far, BITS)
    return out


@triton.jit
def _high_words(h_ptr, BITS: tl.constexpr):
    """High bits as words that belong to two words of nibbles: 8 bits of q5_k, 16 of q6_k."""
    out = h_ptr
    if BITS == 5:
        out = _words(h_ptr, tl.uint8)
    if BITS == 6:
        out = _words(h_ptr, tl.uint16)
    return out


@triton.jit
def _scale_words(s_ptr, d_ptr, KIND: tl.constexpr):
    s_out = _words(s_ptr, tl.int16)
    d_out = d_ptr
    if KIND == "affine":
        d_out = _words(d_ptr, tl.int32)
    if KIND == "signed":
        d_out = _words(d_ptr, tl.int16)
    return s_out, d_out


@triton.jit
def _dots(
    x_rows, rows, w_ptr, h_ptr, s_ptr, d_ptr, groups, near, far, byte, zero,
    M: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    EVEN: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Products of the BN ``rows`` of w with the M rows of x that ``x_rows`` point to: f32 [G] each, row after row, to be summed.

    Rows are separate tensors of one shape, so that all loads get the same threads and inputs are converted once for BN rows.
    """
    totals = ()
    for _ in tl.static_range(M * BN):
        totals = totals + (tl.zeros((G,), tl.float32),)
    for start in range(0, groups, G):
        group = start + tl.arange(0, G)
        live = group < groups
        words = ()
        raws = ()
        for r in tl.static_range(BN):
            words = words + (_load_row(w_ptr, h_ptr, rows[r], group, groups, live, BITS, EVEN),)
            raws = raws + (_raw_scales(s_ptr, d_ptr, rows[r], group, groups, live, KIND, EVEN),)
        inputs = ()
        sums = ()
        for t in tl.static_range(M):
            x = _inputs(x_rows[t], group, live, BITS, EVEN, BF16)
            inputs = inputs + (x,)
            sums = sums + (_input_sums(x, BITS, KIND),)
        # All loads of a step are to be in flight together. ptxas would put them off to save registers, so all decoding
        # depends on all of them (``zero`` is 0, but only the caller knows).
        seen = words[0][0]
        for r in tl.static_range(1, BN):
            seen = seen | words[r][0]
        seen = seen & zero
        new = ()
        for r in tl.static_range(BN):
            codes = _row_floats(words[r][0], words[r][1], near | seen, far | seen, byte | seen, BITS)
            scales = _scales(raws[r][0], raws[r][1], KIND, ZERO)
            for t in tl.static_range(M):
                new = new + (totals[r * M + t] + _group_dot(codes, inputs[t], sums[t], scales, KIND),)
        totals = new
    return totals


@triton.jit(do_not_specialize=["m"])
def gemv_kernel(
    x_ptr, w_ptr, h_ptr, s_ptr, d_ptr, bias_ptr, y_ptr, m, n, groups, near, far, byte, zero,
    M: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    EVEN: tl.constexpr, BF16: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Rows [pid * BN, +BN) of w times the m <= M rows of x -> y [m, n]; a thread walks over k with whole groups."""
    h_ptr = _high_words(h_ptr, BITS)
    s_ptr, d_ptr = _scale_words(s_ptr, d_ptr, KIND)
    x_ptr = _words(x_ptr, tl.int64 if BITS == 8 else tl.int32)
    WIDTH: tl.constexpr = 8 if BITS == 8 else 16
    first_row = tl.program_id(0) * BN
    rows = ()
    for r in tl.static_range(BN):
        rows = rows + (tl.minimum(first_row + r, n - 1).to(tl.int64),)
    x_rows = ()
    for t in tl.static_range(M):
        x_rows = x_rows + (x_ptr + tl.minimum(t, m - 1).to(tl.int64) * (groups * WIDTH),)
    totals = _dots(
        x_rows, rows, _words(w_ptr, tl.int32), h_ptr, s_ptr, d_ptr, groups, near, far, byte, zero,
        M, BN, G, BITS, KIND, ZERO, EVEN, BF16,
    )  # fmt: skip
    for r in tl.static_range(BN):
        row = first_row + r
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
        for t in tl.static_range(M):
            y = tl.sum(totals[r * M + t], 0) + bias
            tl.store(y_ptr + tl.cast(t, tl.int64) * n + row, y.to(OUT), mask=(row < n) & (t < m))


# --- more rows: decoded weights as matrices ---


@triton.jit
def _spread(scale, RUN: tl.constexpr):
    """[rows, G] -> [rows, G * RUN], each for RUN columns."""
    wide = tl.broadcast_to(scale[:, :, None], (scale.shape[0], scale.shape[1], RUN))
    return tl.reshape(wide, (scale.shape[0], scale.shape[1] * RUN))


@triton.jit
def _place(w, h, J: tl.constexpr, BITS: tl.constexpr):
    """Codes of place J of 16-bit words, with their high bits (one byte for each word; of 5 bits, its low half), as f32."""
    code = (w.to(tl.int32) >> (4 * J)) & 15
    if BITS == 5:
        code = code | (((h.to(tl.int32) >> J) & 1) << 4)
    if BITS == 6:
        code = code | (((h.to(tl.int32) >> (2 * J)) & 3) << 4)
    return code.to(tl.float32)


@triton.jit
def _matrices(w, h, scales, OUT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """16-bit words w [rows, 8 G], high bits h of the same shape, scales [rows, G] -> four matrices of weights, one a place."""
    s0, m0 = _spread(scales[0], 8), _spread(scales[1], 8)
    if ASM and BITS == 4:
        a, b, c, d = tl.inline_asm_elementwise(
            BF16_ASM if tl.bfloat16 == OUT else F16_ASM, FOUR, [w, s0, m0],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
        out = (
            a.to(OUT, bitcast=True), b.to(OUT, bitcast=True), c.to(OUT, bitcast=True), d.to(OUT, bitcast=True)
        )  # fmt: skip
    else:
        s1, m1 = s0, m0
        if KIND == "signed":
            s1, m1 = _spread(scales[2], 8), _spread(scales[3], 8)
        out = (
            (_place(w, h, 0, BITS) * s0 - m0).to(OUT), (_place(w, h, 1, BITS) * s0 - m0).to(OUT),
            (_place(w, h, 2, BITS) * s1 - m1).to(OUT), (_place(w, h, 3, BITS) * s1 - m1).to(OUT),
        )  # fmt: skip
    return out


@triton.jit
def _load_high(h_ptr, rows, column, groups, live, BITS: tl.constexpr, EVEN: tl.constexpr):
    """High bits of each word [rows, 8 G], whose group-wise places are ``column`` [8 G]; of 5 bits two words share a byte."""
    if BITS == 5:
        at = h_ptr + rows[:, None] * (groups * 4) + (column // 2)[None, :]
    else:
        at = h_ptr + rows[:, None] * (groups * 8) + column[None, :]
    if EVEN:
        h = tl.load(at)
    else:
        h = tl.load(at, mask=live[None, :], other=0)
    h = h.to(tl.int32)
    if BITS == 5:
        h = h >> (4 * (column % 2))[None, :]
    return h


@triton.jit(do_not_specialize=["m", "groups_per_split"])
def matmul_kernel(
    x_ptr, w_ptr, h_ptr, s_ptr, d_ptr, bias_ptr, y_ptr, m, n, groups, groups_per_split,
    BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x @ w.T on tensor cores; with SPLIT, f32 parts [splits, m, n] without bias instead.

    Each place of the words is a product of its own, so that codes never change places; x is taken in runs of eight instead.
    Weights are the tall operand, which goes from registers into the tensor core.
    """
    WORDS: tl.constexpr = 32 if BITS == 8 else 8
    w_ptr = _words(w_ptr, tl.int8 if BITS == 8 else tl.int16)
    s_ptr, d_ptr = _scale_words(s_ptr, d_ptr, KIND)
    if BITS == 5 or BITS == 6:
        h_ptr = _words(h_ptr, tl.uint8)
    first_row, first_token = tl.program_id(0) * BN, tl.program_id(1) * BM
    first = tl.program_id(2) * groups_per_split
    rows = tl.minimum(first_row + tl.arange(0, BN), n - 1).to(tl.int64)
    tokens = tl.minimum(first_token + tl.arange(0, BM), m - 1).to(tl.int64)
    column = tl.arange(0, WORDS * G)
    spot = tl.arange(0, G)[None, :]
    w_at = w_ptr + rows[:, None] * (groups * WORDS) + column[None, :]
    x_at = x_ptr + tokens[:, None] * (groups * 32) + (column // WORDS * 32 + column % WORDS)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    # Scales are asked for a step ahead: they are too few bytes a row for the pipeline of loads.
    near = tl.minimum(first + spot, groups - 1)
    own, whole = _raw_scales(s_ptr, d_ptr, rows[:, None], near, groups, None, KIND, True)
    for start in range(first, tl.minimum(first + groups_per_split, groups), G):
        live = column // WORDS < groups - start
        if EVEN:
            w = tl.load(w_at + start * WORDS)
        else:
            w = tl.load(w_at + start * WORDS, mask=live[None, :], other=0)
        scales = _scales(own, whole, KIND, ZERO)
        if BITS == 8:
            if EVEN:
                x = tl.load(x_at + start * 32)
            else:
                x = tl.load(x_at + start * 32, mask=live[None, :], other=0.0)
            acc = tl.dot((w.to(tl.float32) * _spread(scales[0], 32)).to(OUT), tl.trans(x), acc)
        else:
            h = w
            if BITS > 4:
                h = _load_high(h_ptr, rows, start * 8 + column, groups, live, BITS, EVEN)
            matrices = _matrices(w, h, scales, OUT, BITS, KIND, ASM)
            for j in tl.static_range(4):
                if EVEN:
                    x = tl.load(x_at + start * 32 + 8 * j)
                else:
                    x = tl.load(x_at + start * 32 + 8 * j, mask=live[None, :], other=0.0)
                acc = tl.dot(matrices[j], tl.trans(x), acc)
        near = tl.minimum(start + G + spot, groups - 1)
        own, whole = _raw_scales(s_ptr, d_ptr, rows[:, None], near, groups, None, KIND, True)
    out_rows = (first_row + tl.arange(0, BN))[:, None]
    out_tokens = (first_token + tl.arange(0, BM))[None, :]
    inside = (out_rows < n) & (out_tokens < m)
    if SPLIT:
        place = (tl.program_id(2).to(tl.int64) * m + out_tokens) * n + out_rows
        tl.store(y_ptr + place, acc, mask=inside)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + out_rows, mask=out_rows < n, other=0.0).to(tl.float32)
        tl.store(y_ptr + out_tokens.to(tl.int64) * n + out_rows, acc.to(OUT), mask=inside)


@triton.jit
def dequantize_kernel(
    w_ptr, h_ptr, s_ptr, d_ptr, out_ptr, n, groups,
    BN: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Weights as a plain matrix [n, 32 groups] in ``OUT``, each rounded once."""
    WORDS: tl.constexpr = 32 if BITS == 8 else 8
    w_ptr = _words(w_ptr, tl.int8 if BITS == 8 else tl.int16)
    s_ptr, d_ptr = _scale_words(s_ptr, d_ptr, KIND)
    if BITS == 5 or BITS == 6:
        h_ptr = _words(h_ptr, tl.uint8)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(row, n - 1).to(tl.int64)
    start = tl.program_id(1) * G
    column = tl.arange(0, WORDS * G)
    live = column // WORDS < groups - start
    w = tl.load(
        w_ptr + rows[:, None] * (groups * WORDS) + (start * WORDS + column)[None, :], mask=live[None, :], other=0
    )
    group = (start + tl.arange(0, G))[None, :]
    own, whole = _raw_scales(s_ptr, d_ptr, rows[:, None], tl.minimum(group, groups - 1), groups, None, KIND, True)
    scales = _scales(own, whole, KIND, ZERO)
    out_at = out_ptr + rows[:, None] * (groups * 32) + (start * 32 + column // WORDS * 32 + column % WORDS)[None, :]
    inside = (row < n)[:, None] & live[None, :]
    if BITS == 8:
        tl.store(out_at, (w.to(tl.float32) * _spread(scales[0], 32)).to(OUT), mask=inside)
    else:
        h = w
        if BITS > 4:
            h = _load_high(h_ptr, rows, start * 8 + column, groups, live, BITS, False)
        matrices = _matrices(w, h, scales, OUT, BITS, KIND, False)
        for j in tl.static_range(4):
            tl.store(out_at + 8 * j, matrices[j], mask=inside)
