"""Triton source of fused mixture-of-experts blocks with 4-bit weights; ``triton_moe4`` chooses tiles and launches.

For int4 under int8 or e4m3 inputs and for FP4 under 16-bit inputs, where ``_triton_moe`` has all other formats. The block,
its two forms and its promises are those of ``_triton_frame``.

Codes are never reordered: what a step decodes from one place of all bytes or words is an operand of its own, and inputs are
taken apart in the same way. The grouped form therefore takes inputs in *split order*: of int4, whose bytes hold an even
column in the low nibble and the next in the high one, a row's even columns, then its odd ones (PARTS 2); of FP4, read as
32-bit words of eight codes, its columns 0, 8, 16.., then 1, 9, 17.. and so on (PARTS 8). ``split_kernel`` brings tokens into
that order, and hidden rows are written in it. The decode form reads rows as they are.

FORMAT: ``int8`` and ``float8`` (int4 weights under such inputs; a scale per group or row, and one per input row) or ``fp4``
(a scale byte per group and, NVFP4, a global scale per row). Scales of groups are applied in f32 to the sums of int4 codes,
to which 8-bit operands give no other place, and in 16 bits to FP4 codes, where the product of both is exact. Codes of int4
stand for themselves less 8, or less the zero point of their group (QServe; ``int8`` inputs).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quant_compile.lowering.kernels._triton_pieces import _amax, _codes, _only_if, _scale_of, _tile_of
from quant_compile.lowering.kernels.experts._triton_frame import (
    _activate,
    _block_at,
    _eight,
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
from quant_compile.lowering.kernels.fp4._triton_fp4a16 import FROM_F16, _scale
from quant_compile.lowering.kernels.fp4._triton_fp4a16 import _codes as _fp4_codes
from quant_compile.lowering.kernels.w4a8._triton_w4a8 import _decode, _every_other, _four, _less_zeros

# Words of eight e2m1 codes ($8, $9) of one group under its scale, twice ($10) -> eight pairs of bf16 ($0..$7), a code of each.
# Halves of both words are put together; then sign and three bits of a nibble go to the sign bit and to the lowest exponent
# bits and first mantissa bit of 16, which is the value times 2**-126, exactly (0.5 is a subnormal).
_HALF_ASM = """prmt.b32 t, $8, $9, {halves};
    shl.b32 s, t, 12; and.b32 s, s, sign; shl.b32 {o0}, t, 6; and.b32 {o0}, {o0}, rest; or.b32 {o0}, {o0}, s;
    shl.b32 s, t, 8; and.b32 s, s, sign; shl.b32 {o1}, t, 2; and.b32 {o1}, {o1}, rest; or.b32 {o1}, {o1}, s;
    shl.b32 s, t, 4; and.b32 s, s, sign; shr.u32 {o2}, t, 2; and.b32 {o2}, {o2}, rest; or.b32 {o2}, {o2}, s;
    and.b32 s, t, sign; shr.u32 {o3}, t, 6; and.b32 {o3}, {o3}, rest; or.b32 {o3}, {o3}, s;"""
_CODES_ASM = (
    "{ .reg .b32 t, s, sign, rest, up; mov.b32 sign, 0x80008000; mov.b32 rest, 0x01C001C0; mov.b32 up, 0x7E807E80;"
    + _HALF_ASM.format(halves="0x5410", o0="$0", o1="$1", o2="$2", o3="$3")
    + _HALF_ASM.format(halves="0x7632", o0="$4", o1="$5", o2="$6", o3="$7")
)
# Multiplications by adding -0 after them, as sm80 has it. NVFP4's scales come times 2**118 (448 still fits); those of MXFP4,
# 2**-127 to 2**127, as they are, so that codes are brought to 0..6 first.
NVFP4_ASM = tl.constexpr(_CODES_ASM + "".join(f"fma.rn.bf16x2 ${i}, ${i}, $10, sign;" for i in range(8)) + "}")
MXFP4_ASM = tl.constexpr(
    _CODES_ASM
    + "".join(f"fma.rn.bf16x2 ${i}, ${i}, up, sign; fma.rn.bf16x2 ${i}, ${i}, $10, sign;" for i in range(8))
    + "}"
)
EIGHT = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r")
TO_NVFP4_ASM = tl.constexpr(2.0**118)
FROM_NVFP4_ASM = tl.constexpr(2.0**8)
TO_F16 = tl.constexpr(2.0**14)

# --- rows in split order ---


@triton.jit
def split_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Rows x of PARTS * ``size`` columns -> rows y in split order; program (row, i) moves BLOCK columns of each part."""
    row = tl.program_id(0).to(tl.int64) * size * PARTS
    first = tl.program_id(1) * BLOCK
    cols = first * PARTS + tl.arange(0, BLOCK * PARTS)
    x = tl.load(x_ptr + row + cols, mask=cols < size * PARTS, other=0)
    at = first + tl.arange(0, BLOCK)
    y_at = y_ptr + row + at
    parts = tl.split(tl.reshape(x, (BLOCK, 2))) if PARTS == 2 else _eight(x, 1, BLOCK)
    for j in tl.static_range(PARTS):
        tl.store(y_at + j * size, tl.reshape(parts[j], (BLOCK,)), mask=at < size)


@triton.jit
def quantize_split_kernel(h_ptr, scale2_ptr, q_ptr, scale_ptr, half, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    """Hidden row program_id(0) [2 half] -> codes in split order, under scale2 [1] or, without one, a scale of its own."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK * 2)
    h = tl.load(h_ptr + row * 2 * half + cols, mask=cols < 2 * half, other=0.0).to(tl.float32)
    if scale2_ptr is None:
        scale, inverse = _scale_of(_amax(h[None, :], 1), LIMIT)
        tl.store(scale_ptr + row + tl.arange(0, 1), scale)
    else:
        inverse = tl.math.div_rn(tl.full((1,), 1.0, tl.float32), tl.load(scale2_ptr))
    even, odd = tl.split(tl.reshape(h, (BLOCK, 2)))
    at = tl.arange(0, BLOCK)
    q_at = q_ptr + row * 2 * half + at
    tl.store(q_at, _codes(even, inverse, LIMIT, q_ptr.dtype.element_ty), mask=at < half)
    tl.store(q_at + half, _codes(odd, inverse, LIMIT, q_ptr.dtype.element_ty), mask=at < half)


# --- blocks of pairs times weights, on tensor cores ---


@triton.jit
def _step_zeros(zero_at, rows, start, groups, GROUP: tl.constexpr):
    """Zero points u8 [BLOCK_N] of one step; without any (None) zeros, which nothing reads."""
    if zero_at is None:
        zero = tl.zeros(rows.shape, tl.uint8)
    else:
        zero = tl.load(zero_at + rows * groups + tl.minimum(start // GROUP, groups - 1))
    return zero


@triton.jit
def _step_scales(sw_at, rows, start, groups, STEP: tl.constexpr, GROUP: tl.constexpr, FP4: tl.constexpr):
    """Scales of one step: bytes [BLOCK_N, STEP / GROUP] of FP4; f32 [BLOCK_N] of int4, all 1 where scales are per row."""
    if FP4:
        group = start // GROUP + tl.arange(0, STEP // GROUP)
        scale = tl.load(sw_at + rows[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0)
    elif GROUP > 0:
        near = tl.minimum(start // GROUP, groups - 1)
        scale = tl.load(sw_at + rows * groups + near).to(tl.float32)
    else:
        scale = tl.full(rows.shape, 1.0, tl.float32)
    return scale


@triton.jit
def _fp4_weights(w, scale, OUT: tl.constexpr, GROUP: tl.constexpr, E8M0: tl.constexpr, ASM: tl.constexpr):
    """Words w [rows, STEP] under scale bytes [rows, STEP / GROUP] -> eight matrices of weights, one for each place, as OUT.

    ASM (bf16 only): NVFP4's are FROM_NVFP4_ASM times too small. Otherwise weights are rounded to OUT.
    """
    factor = _scale(scale, E8M0)
    if ASM:
        factor = (factor if E8M0 else factor * TO_NVFP4_ASM).to(tl.bfloat16)
    else:
        factor = factor * TO_F16
    factor = tl.broadcast_to(factor[:, :, None], (w.shape[0], w.shape[1] // GROUP, GROUP))
    factor = tl.reshape(factor, w.shape)
    if ASM:
        weights = tl.inline_asm_elementwise(
            MXFP4_ASM if E8M0 else NVFP4_ASM, EIGHT, [w, factor],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        c = _fp4_codes(w)
        weights = (
            (c[0] * factor).to(OUT), (c[1] * factor).to(OUT), (c[2] * factor).to(OUT), (c[3] * factor).to(OUT),
            (c[4] * factor).to(OUT), (c[5] * factor).to(OUT), (c[6] * factor).to(OUT), (c[7] * factor).to(OUT),
        )  # fmt: skip
    return weights


@triton.jit
def _joined(w):
    """Eight matrices [rows, STEP], the columns of each word -> one of all columns in order [rows, STEP * 8]."""
    even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
    odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7]))
    return tl.reshape(tl.join(even, odd), (w[0].shape[0], w[0].shape[1] * 8))


@triton.jit
def _add_step(
    total, w, scale, zero, x,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, E8M0: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_N, BLOCK_M] + units w [BLOCK_N, STEP] times the PARTS of the inputs x."""
    if FORMAT == "fp4":
        weights = _fp4_weights(w, scale, x[0].dtype, GROUP, E8M0, ASM and x[0].dtype == tl.bfloat16)
        if PARTS == 1:
            total = tl.dot(_joined(weights), x[0], total)
        else:
            for j in tl.static_range(PARTS):
                total = tl.dot(weights[j], x[j], total)
    else:
        FLOAT8: tl.constexpr = FORMAT == "float8"
        SUMS: tl.constexpr = tl.float32 if FLOAT8 else tl.int32
        low, high = _less_zeros(w, zero, ASM) if ZEROS else _decode(w, FLOAT8, ASM)
        sums = tl.dot(low, x[0], out_dtype=SUMS)
        sums = tl.dot(high, x[1], sums, out_dtype=SUMS).to(tl.float32)
        if GROUP > 0:
            sums = sums * scale[:, None]
        total += sums
    return total


@triton.jit
def _whole_rows(total, rows, x_scale, sw_at, whole_at, bias_ptr, bias_first, sw_row, unit, CHANNEL: tl.constexpr):
    """f32 sums [rows, columns] in units of ``unit``, times what scales whole rows and columns, plus bias."""
    y = total * unit
    if x_scale is not None:
        y = y * x_scale
    if CHANNEL:
        y = y * tl.load(sw_at + rows[:, None] * sw_row).to(tl.float32)
    if whole_at is not None:
        y = y * tl.load(whole_at + rows[:, None]).to(tl.float32)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + bias_first + rows[:, None]).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["most_blocks"])
def grouped4_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    whole_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    sorted_ptr,
    blocks_ptr,
    most_blocks,
    n,
    width,
    groups,
    top_k,
    sx_row,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    OUT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One block of pairs times BLOCK_N rows (GATED: as many gate and as many up rows) of its expert's weight.

    GATED: x are tokens [T, k] in split order (PARTS 1: in plain order), gathered; y is the hidden layer [pairs, n] in the
    order of ``sorted``, its columns of FP4 in x's order. Otherwise x is the hidden layer in that order; y [pairs, n] is in the
    order of the pairs. w [E, rows, width] units (bytes, or of FP4 words), a step is STEP of them; scales sw [E, rows, groups],
    GROUP units share one (0: a whole row does). whole_ptr: a scale above them [E, rows], NVFP4's global one or QServe's of rows.
    zero_ptr: zero points [E, rows, groups]. TMA: w_ptr is a descriptor of [E * rows, width].
    """
    ZEROS: tl.constexpr = zero_ptr is not None
    FP4: tl.constexpr = FORMAT == "fp4"
    E8M0: tl.constexpr = whole_ptr is None
    block, tile = _tile_of(tl.program_id(0), most_blocks, tl.cdiv(n, BLOCK_N), BAND)
    count = tl.load(blocks_ptr + 2 * most_blocks + block)
    if count == 0:
        return
    expert, lanes, first, place, x_row = _block_at(
        sorted_ptr, blocks_ptr, most_blocks, block, count, top_k, BLOCK_M, GATED
    )
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(rows, n - 1)
    spots = tl.arange(0, STEP)
    all_rows = 2 * n if GATED else n
    line = expert.to(tl.int32) * all_rows + tile * BLOCK_N
    own = expert * all_rows
    w_at, up_at = _weight_rows(w_ptr, own, near, spots, n, width, TMA)
    CODES: tl.constexpr = 8 if FP4 else 2
    STRIDE: tl.constexpr = CODES // PARTS
    columns = tl.arange(0, STEP * STRIDE)
    x_at = x_ptr + x_row.to(tl.int64)[None, :] * (CODES * width) + columns[:, None]
    sw_at = sw_ptr + own * groups
    zero_at = zero_ptr
    if ZEROS:
        zero_at = zero_ptr + own * groups
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total_up = total
    # Scales are asked for a step ahead: they are too few bytes a row for the pipeline of loads.
    scale = _step_scales(sw_at, near, 0, groups, STEP, GROUP, FP4)
    scale_up = _step_scales(sw_at, near + n, 0, groups, STEP, GROUP, FP4) if GATED else scale
    zero = _step_zeros(zero_at, near, 0, groups, GROUP)
    zero_up = _step_zeros(zero_at, near + n, 0, groups, GROUP) if GATED else zero
    for start in range(0, width, STEP):
        x = ()
        for j in tl.static_range(PARTS):
            here = x_at + j * width + start * STRIDE
            if EVEN:
                x = x + (tl.load(here),)
            else:
                x = x + (tl.load(here, mask=(columns < (width - start) * STRIDE)[:, None], other=0.0),)
        w = _units(w_ptr, w_at, line, start, spots, width, TMA, EVEN)
        total = _add_step(total, w, scale, zero, x, FORMAT, PARTS, GROUP, E8M0, ZEROS, ASM)
        scale = _step_scales(sw_at, near, start + STEP, groups, STEP, GROUP, FP4)
        zero = _step_zeros(zero_at, near, start + STEP, groups, GROUP)
        if GATED:
            w = _units(w_ptr, up_at, line + n, start, spots, width, TMA, EVEN)
            total_up = _add_step(total_up, w, scale_up, zero_up, x, FORMAT, PARTS, GROUP, E8M0, ZEROS, ASM)
            scale_up = _step_scales(sw_at, near + n, start + STEP, groups, STEP, GROUP, FP4)
            zero_up = _step_zeros(zero_at, near + n, start + STEP, groups, GROUP)
    PACKED: tl.constexpr = FP4 and ASM and x_ptr.dtype.element_ty == tl.bfloat16 and not E8M0
    UNIT: tl.constexpr = FROM_NVFP4_ASM if PACKED else 1.0 if FP4 or ZEROS else 512.0 if FORMAT == "float8" else 0.0625
    CHANNEL: tl.constexpr = GROUP == 0
    x_scale = None
    if sx_ptr is not None:
        x_scale = tl.load(sx_ptr + x_row.to(tl.int64) * sx_row)[None, :]
    whole_at = whole_ptr
    if whole_ptr is not None:
        whole_at = whole_ptr + own
    y = _whole_rows(total, near, x_scale, sw_at, whole_at, bias_ptr, own, groups, UNIT, CHANNEL)
    column = rows
    if GATED:
        up = _whole_rows(total_up, near + n, x_scale, sw_at, whole_at, bias_ptr, own, groups, UNIT, CHANNEL)
        y = _activate(y, up, KIND, ALPHA, LIMIT, SHIFT, OUT)
        y_row = first + lanes
        if FP4:
            column = rows % PARTS * (n // PARTS) + rows // PARTS
    else:
        y_row = tl.load(sorted_ptr + place)
    _store_block(y_ptr, y, y_row, rows, column, lanes, count, n)


# --- few pairs: rows of the chosen experts, on plain cores ---


@triton.jit
def _word_sums(w, x, magic, FORMAT: tl.constexpr, VECTOR: tl.constexpr, ASM: tl.constexpr):
    """Words w [rows, experts, BLOCK] of eight codes times their inputs x, sums of VECTOR words: f32 [.., BLOCK / VECTOR].

    x: of ``int8`` codes 0, 2, 4, 6 of each word and codes 1, 3, 5, 7, uint32 [experts, BLOCK]; else [experts, BLOCK * 8].
    Units are UNIT of ``_unit_of``.
    """
    if FORMAT == "int8":
        u = w.to(tl.uint32, bitcast=True)
        low, high = ((u << 4) & 0xF0F0F0F0) ^ 0x80808080, (u & 0xF0F0F0F0) ^ 0x80808080
        even, odd = tl.broadcast_to(x[0][None, :, :], w.shape), tl.broadcast_to(x[1][None, :, :], w.shape)
        sums = _four(high, odd, _four(low, even, tl.zeros(w.shape, tl.int32), ASM), ASM)
    elif FORMAT == "float8":
        product, of_x = _word_products(w, x, magic)
        sums = product - 8.0 * of_x[None, :, :]
    else:
        codes, inputs = _fp4_codes(w), _eight(x, w.shape[1], w.shape[2])
        sums = codes[0] * inputs[0].to(tl.float32)[None, :, :]
        for j in tl.static_range(1, 8):
            sums += codes[j] * inputs[j].to(tl.float32)[None, :, :]
    parts = tl.reshape(sums, (w.shape[0], w.shape[1], w.shape[2] // VECTOR, VECTOR))
    return tl.sum(parts, 3).to(tl.float32)


@triton.jit
def _sums_of(x, VECTOR: tl.constexpr, ASM: tl.constexpr):
    """Sums over VECTOR words of the ``int8`` codes x, f32 [1, experts, BLOCK / VECTOR]."""
    one = tl.full(x[0].shape, 0x01010101, tl.uint32)
    sums = _four(one, x[1], _four(one, x[0], tl.zeros(x[0].shape, tl.int32), ASM), ASM)
    parts = tl.reshape(sums, (sums.shape[0], sums.shape[1] // VECTOR, VECTOR))
    return tl.sum(parts, 2).to(tl.float32)[None, :, :]


@triton.jit
def _add_words(
    total, w, x, magic, sw_at, zero_at, rows, start, width, groups,
    FORMAT: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr, E8M0: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """total [rows, experts, vectors] + products of the words from ``start`` on, each vector times the scale of its group.

    sw_at, zero_at [1, experts, 1]: where the experts' scales and zero points (or None) begin. GROUP counts words that share
    them; 0: none do here.
    """
    sums = _word_sums(w, x, magic, FORMAT, VECTOR, ASM)
    if GROUP > 0:
        vectors = start + tl.arange(0, total.shape[2]) * VECTOR
        at = rows[:, None, None] * groups + (vectors // GROUP)[None, None, :]
        inside = (vectors < width)[None, None, :]
        if zero_at is not None:  # in units of 1 / 16
            off = tl.load(zero_at + at, mask=inside, other=0).to(tl.int32) * 16 - 128
            sums = sums - off.to(tl.float32) * _sums_of(x, VECTOR, ASM)
        scale = tl.load(sw_at + at, mask=inside, other=0)
        sums = sums * (_scale(scale, E8M0) if FORMAT == "fp4" else scale.to(tl.float32))
    return total + sums


@triton.jit
def _token_words(
    x_row, start, width, FORMAT: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """A token's inputs of BLOCK words from ``start``, for ``_word_sums``; x_row points to int64 words for ``int8``."""
    if FORMAT == "int8":
        at = start + tl.arange(0, BLOCK)
        if EVEN:
            words = tl.load(x_row + at)
        else:
            words = tl.load(x_row + at, mask=at < width, other=0)
        even, odd = _every_other(words.to(tl.uint64, bitcast=True), ASM)
        x = (even[None, :], odd[None, :])
    else:
        x = _token_step(x_row, start, width * 8, width, BLOCK, 8, EVEN, tl.float32)
    return x


@triton.jit
def _unit_of(FORMAT: tl.constexpr):
    """What sums of ``_word_sums`` count."""
    return 0.0625 if FORMAT == "int8" else 1.0 if FORMAT == "float8" else FROM_F16


@triton.jit(do_not_specialize=["magic"])
def gated_rows4_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    whole_ptr,
    zero_ptr,
    bias_ptr,
    ids_ptr,
    y_ptr,
    amax_ptr,
    n,
    width,
    groups,
    top_k,
    experts,
    sx_row,
    magic,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    OUT: tl.constexpr,
    EARLY: tl.constexpr,
    ASM: tl.constexpr,
):
    """Hidden values [BLOCK_N] at program_id(0) of pair program_id(1): y [pairs, n], and their largest magnitude.

    w is read in int32 words of eight codes, ``width`` to a row. BLOCK_N divides n. x [T, k]; ``int8``: [T, width] int64.
    EARLY: the next kernel may start as soon as every program of this one has.
    """
    if EARLY:
        gdc_launch_dependents()
    E8M0: tl.constexpr = whole_ptr is None
    pair = tl.program_id(1)
    expert = tl.load(ids_ptr + pair)
    if (expert < 0) | (expert >= experts):
        return
    own = expert.to(tl.int64) * 2 * n
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK)
    w_at = w_ptr + (own + rows[:, None, None]) * width + cols[None, None, :]
    up_at = w_at + tl.cast(n, tl.int64) * width
    sw_at = sw_ptr + own * groups
    zero_at = zero_ptr
    if zero_ptr is not None:
        zero_at = zero_ptr + own * groups
    token = (pair // top_k).to(tl.int64)
    x_row = x_ptr + token * width * (1 if FORMAT == "int8" else 8)
    legal = tl.full((1,), 1, tl.int1)
    total = tl.zeros((BLOCK_N, 1, BLOCK // VECTOR), tl.float32)
    total_up = total
    for start in range(0, width, BLOCK):
        at = start + cols
        w = _stream(w_at + start, at, width, legal, EVEN)
        up = _stream(up_at + start, at, width, legal, EVEN)
        x = _token_words(x_row, start, width, FORMAT, BLOCK, EVEN, ASM)
        total = _add_words(
            total, w, x, magic, sw_at, zero_at, rows, start, width, groups, FORMAT, VECTOR, GROUP, E8M0, ASM
        )  # fmt: skip
        total_up = _add_words(
            total_up, up, x, magic, sw_at, zero_at, rows + n, start, width, groups, FORMAT, VECTOR, GROUP, E8M0, ASM
        )  # fmt: skip
    CHANNEL: tl.constexpr = GROUP == 0
    x_scale = None
    if sx_ptr is not None:
        x_scale = tl.load(sx_ptr + token * sx_row)
    whole_at = whole_ptr
    if whole_ptr is not None:
        whole_at = whole_ptr + own
    unit = _unit_of(FORMAT)
    gate = _whole_rows(tl.sum(total, 2), rows, x_scale, sw_at, whole_at, bias_ptr, own, groups, unit, CHANNEL)
    up = _whole_rows(tl.sum(total_up, 2), rows + n, x_scale, sw_at, whole_at, bias_ptr, own, groups, unit, CHANNEL)
    y = _activate(gate, up, KIND, ALPHA, LIMIT, SHIFT, OUT)
    _store_hidden(y_ptr, amax_ptr, y, pair, rows, n, OUT)


@triton.jit
def _hidden_words(
    h_at, start, width, legal, inverse,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Hidden values of the experts' rows h_at [experts] of BLOCK words from ``start``, quantized, for ``_word_sums``."""
    cols = start * 8 + tl.arange(0, BLOCK * 8)
    h = tl.load(h_at[:, None] + cols[None, :], mask=legal[:, None] & (cols < width * 8)[None, :], other=0.0)
    if FORMAT == "int8":
        wide = tl.reshape(h.to(tl.float32), (h.shape[0], BLOCK, 4, 2))
        codes = _codes(wide, inverse[:, None, None, None], QUANTIZE, CODE).to(tl.int32)
        words = tl.sum((codes & 255) << (tl.arange(0, 4) * 8)[None, None, :, None], 2)
        x = tl.split(words.to(tl.uint32, bitcast=True))
    elif FORMAT == "float8":
        x = _codes(h.to(tl.float32), inverse[:, None], QUANTIZE, CODE)
    else:
        x = h
    return x


@triton.jit(do_not_specialize=["magic"])
def down_rows4_kernel(
    h_ptr,
    amax_ptr,
    scale2_ptr,
    w_ptr,
    sw_ptr,
    whole_ptr,
    zero_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    y_ptr,
    n,
    width,
    groups,
    top_k,
    experts,
    parts,
    magic,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CODE: tl.constexpr,
    OUT: tl.constexpr,
    EARLY: tl.constexpr,
    ASM: tl.constexpr,
):
    """y[token, BLOCK_N rows]: all experts of token program_id(1) at once, weighted and added.

    Hidden rows h [pairs, 8 width] are quantized on the way in (QUANTIZE: the largest code, or 0). BLOCK_N divides n.
    EARLY: this may start while gated_rows4_kernel runs, which itself started after ids were written; its results are waited
    for.
    """
    E8M0: tl.constexpr = whole_ptr is None
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token, pairs, ids, legal = _experts_of(ids_ptr, top_k, experts, TOP_K)
    own = tl.where(legal, ids, 0).to(tl.int64) * n
    cols = tl.arange(0, BLOCK)
    w_at = w_ptr + (own[None, :, None] + rows[:, None, None]) * width + cols[None, None, :]
    w = _stream(w_at, cols, width, legal, EVEN)
    if EARLY:
        gdc_wait()
    sw_at = sw_ptr + (own * groups)[None, :, None]
    zero_at = zero_ptr
    if zero_ptr is not None:
        zero_at = zero_ptr + (own * groups)[None, :, None]
    scale = None
    inverse = None
    if QUANTIZE > 0:
        scale, inverse = _hidden_scale(amax_ptr, scale2_ptr, pairs, legal, parts, PARTS, QUANTIZE)
        scale = scale[None, :]
    total = tl.zeros((BLOCK_N, TOP_K, BLOCK // VECTOR), tl.float32)
    for start in range(0, width, BLOCK):
        more = _only_if(legal, start + BLOCK < width)
        following = _stream(w_at + start + BLOCK, start + BLOCK + cols, width, more, EVEN)
        h = _hidden_words(h_ptr + pairs * (width * 8), start, width, legal, inverse, FORMAT, BLOCK, QUANTIZE, CODE)
        total = _add_words(
            total, w, h, magic, sw_at, zero_at, rows, start, width, groups, FORMAT, VECTOR, GROUP, E8M0, ASM
        )  # fmt: skip
        w = following
    whole_at = whole_ptr
    if whole_ptr is not None:
        whole_at = whole_ptr + own[None, :]
    y = _whole_rows(
        tl.sum(total, 2), rows, scale, (sw_ptr + own * groups)[None, :], whole_at, bias_ptr, own[None, :], groups,
        _unit_of(FORMAT), GROUP == 0,
    )  # fmt: skip
    _store_token(y_ptr, y, weights_ptr, token, pairs, legal, rows, n, OUT)
