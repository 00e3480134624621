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

# Assembly that decodes two or four words at once, under f32 scales and minima, into 16-bit weights, each rounded once. Constants of
# near and far nibbles are taken off with the minimum. 0xEA is (a & b) | c, 0x6A is (a & b) ^ c.
# No line breaks: Inductor, which copies a recorded kernel's constants into its code, cannot write them.
_NEAR = {"mask": "nm", "magic": "nb"}
_FAR = {"mask": "fm", "magic": "fb"}
_MAGIC = "mov.b32 nm, 0x000F0000; mov.b32 nb, 0x43000000; mov.b32 fm, 0x0000F000; mov.b32 fb, 0x45000000;"
_NIBBLE = "lop3.b32 {to}, {word}, {mask}, {magic}, 0xEA;"
_ROUND = (
    "mov.b32 a, u; mov.b32 b, v; fma.rn.f32 a, a, {scale}, {offset}; fma.rn.f32 b, b, {scale}, {offset}; "
    "cvt.rn.{out}.f32 {to}, b, a;"
)


def _turns(word: str) -> str:
    """up, dn and tu: the two words in ``word`` moved so that each nibble comes to a near or a far place."""
    return f"shl.b32 up, {word}, 8; shr.u32 dn, {word}, 8; prmt.b32 tu, {word}, {word}, 0x1032;"


def _places(word: str) -> tuple[tuple[str, str, dict[str, str]], ...]:
    """By place: where the first word's nibble and the second's is found, and whether they are near or far."""
    return ("tu", word, _NEAR), ("up", "dn", _FAR), ("up", "dn", _NEAR), (word, "tu", _FAR)


def _nibbles_asm(out: str) -> str:
    """Two words $4, scale $5 (and $6, the same), minimum $7 (and $8) -> two weights of each place, $0 to $3."""
    code = "{ .reg .b32 u, v, up, dn, tu, nm, nb, fm, fb; .reg .f32 a, b, nc, fc, mi;" + _MAGIC
    code += "neg.f32 mi, $7; fma.rn.f32 nc, $5, 0fC3000000, mi; fma.rn.f32 fc, $5, 0fC5000000, mi;" + _turns("$4")
    for j, (first, second, kind) in enumerate(_places("$4")):
        code += _NIBBLE.format(to="u", word=first, **kind) + _NIBBLE.format(to="v", word=second, **kind)
        code += _ROUND.format(scale="$5", offset="nc" if kind is _NEAR else "fc", out=out, to=f"${j}")
    return code + "}"


def _moved(register: str, bits: int) -> str:
    """z: ``register`` moved up by ``bits``, which may be below 0."""
    if bits < 0:
        return f"shr.u32 z, {register}, {-bits};"
    return f"shl.b32 z, {register}, {bits};"


def _high_asm(out: str, bits: int) -> str:
    """Four words $8 and $9 with high bits in the four bytes of $10 -> weights of each place, two registers each, $0 to $7.

    Of 5 bits both words of a register have the same byte; scales are $11 and $13, minima $15 and $17. Of 6 bits these are scales of
    places 0 and 1, and of 2 and 3, whose codes are too large by 32.
    """
    names = "u, v, z, up, dn, tu, nm, nb, fm, fb, hn, hf"
    masks = ("0x100000", "0x10000") if bits == 5 else ("0x300000", "0x30000")
    code = f"{{ .reg .b32 {names}; .reg .f32 a, b, nc, fc, nd, fd, mi;{_MAGIC}"
    code += f"mov.b32 hn, {masks[0]}; mov.b32 hf, {masks[1]};"
    for half in (0, 1):
        word, scale, other = f"${8 + half}", f"${11 + 2 * half}", f"${15 + 2 * half}"
        code += _turns(word)
        if bits == 5:
            code += (
                f"neg.f32 mi, {other}; fma.rn.f32 nc, {scale}, 0fC3000000, mi; fma.rn.f32 fc, {scale}, 0fC5000000, mi;"
            )
        else:  # -160 and -2080
            code += f"mul.f32 nc, {scale}, 0fC3200000; mul.f32 fc, {scale}, 0fC5020000;"
            code += f"mul.f32 nd, {other}, 0fC3200000; mul.f32 fd, {other}, 0fC5020000;"
        for j, (first, second, kind) in enumerate(_places(word)):
            mask, to = ("hn", 20) if kind is _NEAR else ("hf", 16)
            for e, (register, found) in enumerate((("u", first), ("v", second))):
                at = 16 * half + j + 4 * e if bits == 5 else 16 * half + 8 * e + 2 * j
                code += _NIBBLE.format(to=register, word=found, **kind) + _moved("$10", to - at)
                code += f"lop3.b32 {register}, z, {mask}, {register}, 0xEA;"
            early = bits == 5 or j < 2
            offset = ("nc" if early else "nd") if kind is _NEAR else ("fc" if early else "fd")
            code += _ROUND.format(scale=scale if early else other, offset=offset, out=out, to=f"${2 * j + half}")
    return code + "}"


def _bytes_asm(out: str) -> str:
    """Four int8 in $2 under scales $3 and $5 -> four weights, $0 and $1."""
    code = "{ .reg .b32 u, v, z, bm, bb; .reg .f32 a, b, o; mov.b32 bm, 0x007F8000; mov.b32 bb, 0x43C00000;"
    for half, moves in enumerate(((15, 7), (-1, -9))):
        scale = f"${3 + 2 * half}"
        code += f"mul.f32 o, {scale}, 0fC3C00000;"  # -384
        for register, bits in zip(("u", "v"), moves, strict=True):
            code += _moved("$2", bits) + f"lop3.b32 {register}, z, bm, bb, 0x6A;"
        code += _ROUND.format(scale=scale, offset="o", out=out, to=f"${half}")
    return code + "}"


def _registers(outputs: int, inputs: int) -> str:
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


BF16_4_ASM, F16_4_ASM = tl.constexpr(_nibbles_asm("bf16x2")), tl.constexpr(_nibbles_asm("f16x2"))
BF16_5_ASM, F16_5_ASM = tl.constexpr(_high_asm("bf16x2", 5)), tl.constexpr(_high_asm("f16x2", 5))
BF16_6_ASM, F16_6_ASM = tl.constexpr(_high_asm("bf16x2", 6)), tl.constexpr(_high_asm("f16x2", 6))
BF16_8_ASM, F16_8_ASM = tl.constexpr(_bytes_asm("bf16x2")), tl.constexpr(_bytes_asm("f16x2"))
NIBBLES = tl.constexpr(_registers(4, 5))
HIGH = tl.constexpr(_registers(8, 11))
BYTES = tl.constexpr(_registers(2, 5))

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
    """Codes of place J of 16-bit words, with their high bits from ``_load_high``, as f32."""
    code = (w.to(tl.int32) >> (4 * J)) & 15
    if BITS == 5:
        odd = (tl.arange(0, w.shape[1]) % 2)[None, :]
        code = code | (((h.to(tl.int32) >> (4 * odd + J)) & 1) << 4)
    if BITS == 6:
        code = code | (((h.to(tl.int32) >> (2 * J)) & 3) << 4)
    return code.to(tl.float32)


@triton.jit
def _floats(bits, OUT: tl.constexpr):
    """Four tensors of bits as ``OUT``."""
    return (
        bits[0].to(OUT, bitcast=True), bits[1].to(OUT, bitcast=True),
        bits[2].to(OUT, bitcast=True), bits[3].to(OUT, bitcast=True),
    )  # fmt: skip


@triton.jit
def _matrices(w, h, scales, OUT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """16-bit words w [rows, 8 G], high bits h of the same shape, scales [rows, G] -> four matrices of weights, one a place."""
    BF16: tl.constexpr = tl.bfloat16 == OUT
    s0, m0 = _spread(scales[0], 8), _spread(scales[1], 8)
    s1, m1 = s0, m0
    if KIND == "signed":
        s1, m1 = _spread(scales[2], 8), _spread(scales[3], 8)
    if ASM and BITS == 4:
        out = _floats(
            tl.inline_asm_elementwise(
                BF16_4_ASM if BF16 else F16_4_ASM, NIBBLES, [w, s0, m0],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
            ), OUT,
        )  # fmt: skip
    elif ASM and BITS == 5:
        out = _floats(
            tl.inline_asm_elementwise(
                BF16_5_ASM if BF16 else F16_5_ASM, HIGH, [w, h, s0, m0],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
            ), OUT,
        )  # fmt: skip
    elif ASM:
        out = _floats(
            tl.inline_asm_elementwise(
                BF16_6_ASM if BF16 else F16_6_ASM, HIGH, [w, h, s0, s1],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
            ), OUT,
        )  # fmt: skip
    else:
        out = (
            (_place(w, h, 0, BITS) * s0 - m0).to(OUT), (_place(w, h, 1, BITS) * s0 - m0).to(OUT),
            (_place(w, h, 2, BITS) * s1 - m1).to(OUT), (_place(w, h, 3, BITS) * s1 - m1).to(OUT),
        )  # fmt: skip
    return out


@triton.jit
def _byte_weights(w, scale, OUT: tl.constexpr, ASM: tl.constexpr):
    """int8 codes w [rows, 32 G], scale [rows, G] -> weights."""
    wide = _spread(scale, 32)
    if ASM:
        bits = tl.inline_asm_elementwise(
            BF16_8_ASM if tl.bfloat16 == OUT else F16_8_ASM, BYTES, [w, wide], dtype=tl.int16, is_pure=True, pack=4
        )
        out = bits.to(OUT, bitcast=True)
    else:
        out = (w.to(tl.float32) * wide).to(OUT)
    return out


@triton.jit
def _load_high(h_ptr, rows, start, groups, G: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """High bits of G groups from ``start`` on, a byte for each word: u8 [rows, 8 G]; of 5 bits two words share one, and both get it."""
    BYTES_A_GROUP: tl.constexpr = 4 if BITS == 5 else 8
    spot = tl.arange(0, BYTES_A_GROUP * G)
    at = h_ptr + rows[:, None] * (groups * BYTES_A_GROUP) + (start * BYTES_A_GROUP + spot)[None, :]
    if EVEN:
        h = tl.load(at)
    else:
        h = tl.load(at, mask=(spot // BYTES_A_GROUP < groups - start)[None, :], other=0)
    if BITS == 5:
        h = tl.reshape(tl.join(h, h), (h.shape[0], 8 * G))
    return h


@triton.jit
def _step_scales(s_ptr, d_ptr, rows, start, groups, G: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr):
    """What scales G groups of each row from ``start`` on, as it lies in memory. With EVEN in loads that a pipeline takes."""
    spot = tl.arange(0, G)[None, :]
    if EVEN:
        own = tl.load(s_ptr + rows[:, None] * groups + (start + spot))
        whole = own
        if KIND != "half":
            whole = tl.load(d_ptr + rows[:, None] * (groups // 8) + start // 8)
    else:
        own, whole = _raw_scales(
            s_ptr, d_ptr, rows[:, None], tl.minimum(start + spot, groups - 1), groups, None, KIND, True
        )
    return own, whole


@triton.jit(do_not_specialize=["m", "groups_per_split"])
def matmul_kernel(
    x_ptr, w_ptr, h_ptr, s_ptr, d_ptr, bias_ptr, y_ptr, m, n, groups, groups_per_split,
    BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, PLACED: tl.constexpr, OUT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x @ w.T on tensor cores; with SPLIT, f32 parts [splits, m, n] without bias instead.

    Each place of the words is a product of its own, so that codes never change places; x is taken in runs of eight instead, or,
    PLACED, lies so that the columns of one place in G groups are beside each other. Weights are the tall operand, which goes from
    registers into the tensor core. EVEN: G divides all groups and those of a part; 8 does where a scale is of 8 groups.
    """
    WORDS: tl.constexpr = 32 if BITS == 8 else 8
    w_ptr = _words(w_ptr, tl.int8 if BITS == 8 else tl.int16)
    s_ptr, d_ptr = _scale_words(s_ptr, d_ptr, KIND)
    if BITS == 5 or BITS == 6:
        h_ptr = _words(h_ptr, tl.uint8)
    if EVEN:
        # Loads of a step's scales are whole words then, which the pipeline of loads needs.
        groups = tl.multiple_of(groups, G)
    groups_per_split = tl.multiple_of(groups_per_split, G)
    first_row, first_token = tl.program_id(0) * BN, tl.program_id(1) * BM
    first = tl.program_id(2) * groups_per_split
    rows = tl.minimum(first_row + tl.arange(0, BN), n - 1).to(tl.int64)
    tokens = tl.minimum(first_token + tl.arange(0, BM), m - 1).to(tl.int64)
    column = tl.arange(0, WORDS * G)
    w_at = w_ptr + rows[:, None] * (groups * WORDS) + column[None, :]
    x_column = column if PLACED else column // WORDS * 32 + column % WORDS
    x_at = x_ptr + tokens[:, None] * (groups * 32) + x_column[None, :]
    NEXT: tl.constexpr = 8 * G if PLACED else 8
    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(first, tl.minimum(first + groups_per_split, groups), G):
        live = column // WORDS < groups - start
        if EVEN:
            w = tl.load(w_at + start * WORDS)
        else:
            w = tl.load(w_at + start * WORDS, mask=live[None, :], other=0)
        own, whole = _step_scales(s_ptr, d_ptr, rows, start, groups, G, KIND, EVEN)
        scales = _scales(own, whole, KIND, ZERO)
        if BITS == 8:
            if EVEN:
                x = tl.load(x_at + start * 32)
            else:
                x = tl.load(x_at + start * 32, mask=live[None, :], other=0.0)
            acc = tl.dot(_byte_weights(w, scales[0], OUT, ASM), tl.trans(x), acc)
        else:
            h = w
            if BITS > 4:
                h = _load_high(h_ptr, rows, start, groups, G, BITS, EVEN)
            matrices = _matrices(w, h, scales, OUT, BITS, KIND, ASM)
            for j in tl.static_range(4):
                if EVEN:
                    x = tl.load(x_at + start * 32 + NEXT * j)
                else:
                    x = tl.load(x_at + start * 32 + NEXT * j, mask=live[None, :], other=0.0)
                acc = tl.dot(matrices[j], tl.trans(x), acc)
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
    ASM: tl.constexpr,
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
    word = tl.arange(0, WORDS * G)
    w = tl.load(
        w_ptr + rows[:, None] * (groups * WORDS) + (start * WORDS + word)[None, :],
        mask=(word // WORDS < groups - start)[None, :], other=0,
    )  # fmt: skip
    own, whole = _step_scales(s_ptr, d_ptr, rows, start, groups, G, KIND, False)
    scales = _scales(own, whole, KIND, ZERO)
    if BITS == 8:
        out = _byte_weights(w, scales[0], OUT, ASM)
    else:
        h = w
        if BITS > 4:
            h = _load_high(h_ptr, rows, start, groups, G, BITS, False)
        a, b, c, d = _matrices(w, h, scales, OUT, BITS, KIND, ASM)
        # By place, then word -> by column, so that what is stored together lies together.
        even = tl.join(tl.reshape(a, (BN, G, 8)), tl.reshape(c, (BN, G, 8)))
        odd = tl.join(tl.reshape(b, (BN, G, 8)), tl.reshape(d, (BN, G, 8)))
        out = tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2)), (BN, 32 * G))
    column = tl.arange(0, 32 * G)
    inside = (row < n)[:, None] & (column // 32 < groups - start)[None, :]
    tl.store(out_ptr + rows[:, None] * (groups * 32) + (start * 32 + column)[None, :], out, mask=inside)
