"""Triton source of decode attention: one program reads every SPLITS-th block of keys of one sequence and KV head, for all its queries.

Rows of a program are (query head of the group, query); scores are kept in powers of two. Products have 16-bit operands and f32
sums. Codes are multiplied as f16, which holds e4m3, e5m2 and int8 exactly and costs sm89 and newer one instruction for two e4m3.
So that f16's range is enough, q is divided by the power of two of its row's largest value, and the weights of the second product,
p times the value's scale, stay at or below 1: the running maximum is that of the logarithm of the weights, not of the scores.
Codes are loaded as words of two, which the instruction that hands out 16-bit operands (ldmatrix) takes, and multiplied in two halves:
single bytes of V would be turned by single loads, and those of K would hand out q in an order that takes moves to mend.

The mask is read first, for the range of keys that any row sees; no key and no value outside of it is read (scales of its blocks are).
It is read again for each block only where it hides or changes something inside of that range. What a program did not see costs nothing
in ``combine_kernel``, either.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _only_if, _words

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-3e4)  # reference.HIDDEN
NO_MASK, BOOL, ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_SCALE, HEAD, TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Two words of two codes -> f16 of the first codes, f16 of the second ones. A byte u under 0x64 is the f16 1024 + u.
E4M3_WORDS = tl.constexpr(
    "{ .reg .b32 t; .reg .b16 a, b; "
    "prmt.b32 t, $2, 0, 0x4420; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a; "
    "prmt.b32 t, $2, 0, 0x4431; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $1, a; }"
)
E5M2_WORDS = tl.constexpr("prmt.b32 $0, $2, 0, 0x2404; and.b32 $1, $2, 0xFF00FF00;")
INT8_WORDS = tl.constexpr(
    "{ .reg .b32 c, t, u; mov.b32 c, 0x64806480; xor.b32 u, $2, 0x80808080; "
    "prmt.b32 t, u, 0x64646464, 0x4240; sub.f16x2 $0, t, c; "
    "prmt.b32 t, u, 0x64646464, 0x4341; sub.f16x2 $1, t, c; }"
)


# --- pieces ---


@triton.jit
def _load(ptr, inside, EVEN: tl.constexpr, other: tl.constexpr):
    """A load under a mask, or without where nothing lies outside."""
    if EVEN:
        return tl.load(ptr)
    return tl.load(ptr, mask=inside, other=other)


@triton.jit
def _from_byte(byte, KIND: tl.constexpr, OPERAND: tl.constexpr):
    """uint16 below 256, codes of KIND, as OPERAND; uint8 is e4m3, which sm80 has no instruction for, times 2^-8."""
    if KIND.is_fp8e5():
        return (byte << 8).to(tl.float16, bitcast=True)
    if KIND.is_int_unsigned():
        half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((byte & 0x7F) == 0x7F, float("nan"), half).to(OPERAND)
    return byte.to(tl.uint8).to(KIND, bitcast=True).to(OPERAND)


@triton.jit
def _from_words(words, KIND: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr):
    """uint16, two codes of KIND each -> (first codes, second codes) as OPERAND."""
    if ASM:
        TEXT: tl.constexpr = E5M2_WORDS if KIND.is_fp8e5() else (INT8_WORDS if KIND.is_int_signed() else E4M3_WORDS)
        even, odd = tl.inline_asm_elementwise(
            TEXT, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        even, odd = _from_byte(words & 0xFF, KIND, OPERAND), _from_byte(words >> 8, KIND, OPERAND)
    return even, odd


@triton.jit
def _sees(value, inside, MASK: tl.constexpr):
    """Where a loaded mask lets a key through; NaN does."""
    if MASK == BOOL:
        return inside & (value != 0)
    return inside & (value.to(tl.float32) > HIDDEN) | (inside & (value != value))


@triton.jit
def _reach(
    mask_ptr, rows, real, m_n, split, blocks, length, MASK: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """What any of the mask's ``rows`` (offsets, where ``real``) sees: first and end of the program's own blocks, and of keys, and
    whether the mask changes anything for some row and own key between those.
    """
    first, end, plain = length, 0, 0
    places = tl.arange(0, SCAN)
    for start in range(0, blocks, SCAN // BN):
        keys = (split + (start + places // BN) * SPLITS) * BN + places % BN
        inside = real[:, None] & (keys < length)[None, :]
        value = tl.load(mask_ptr + rows[:, None] + keys[None, :] * m_n, mask=inside, other=0)
        seen = tl.max(_sees(value, inside, MASK).to(tl.int32), 0) > 0
        changes = real[:, None] & ((value == 0) if MASK == BOOL else (value != 0))
        plain += tl.sum((seen & (tl.max(changes.to(tl.int32), 0) == 0)).to(tl.int32), 0)
        first = tl.minimum(first, tl.min(tl.where(seen, keys, length), 0))
        end = tl.maximum(end, tl.max(tl.where(seen, keys + 1, 0), 0))
    some = end > 0
    low = tl.where(some, (first // BN - split) // SPLITS, 0)
    high = tl.where(some, ((end - 1) // BN - split) // SPLITS + 1, 0)
    own = (high - low) * BN - first % BN - (BN - end % BN) % BN
    return low, high, first, end, plain < own


@triton.jit
def _powers_of_two(q):
    """q [rows, d] f32 -> the power of two below each row's largest magnitude, and its reciprocal; both exact."""
    largest = tl.max(tl.abs(q), 1)
    exponent = tl.minimum(tl.maximum(largest, 2.0**-100), 2.0**126).to(tl.int32, bitcast=True) & 0x7F800000
    inverse = 0x7F000000 - exponent
    return exponent.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _capped(s, softcap):
    """softcap * tanh(s / softcap)."""
    return softcap * (1.0 - 2.0 / (tl.exp(s * (2.0 / softcap)) + 1.0))


@triton.jit
def _finite(x):
    """A running maximum to subtract: 0 where nothing was seen."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _logarithm(weight):
    """log2 of magnitudes within 0.09, from the float's own bits; no less than -100, so that exp2 of a score less this stays finite."""
    bits = weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(bits.to(tl.float32) * 2.0**-23 - 127.0, -100.0)


@triton.jit
def _with_sink(top, total, sink):
    """(maximum, sum, factor of what was summed under the old maximum) with one more logit, in powers of two."""
    higher = tl.maximum(top, sink)
    factor = tl.math.exp2(top - _finite(higher))
    return higher, total * factor + tl.math.exp2(sink - _finite(higher)), factor


# --- kernels ---


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, ks_ptr, vs_ptr, sinks_ptr, out_ptr, parts_ptr, stats_ptr,
    scale, softcap, length, kv_heads,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_t, m_n, ks_b, ks_h, ks_n, vs_b, vs_h, vs_n,
    T: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, SCAN: tl.constexpr, SCAN_ROWS: tl.constexpr,
    MASK: tl.constexpr, SHARED_MASK: tl.constexpr, CAP: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr,
    CODES: tl.constexpr, OPERAND: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """q [b, hkv * GROUP, T, D] over k [b, hkv, length, D], v [.., DV] -> out [b, T, hkv * GROUP, DV], or parts of it.

    grid: (b * hkv * blocks of BM rows, SPLITS); neighbours read the same keys. With SPLITS > 1: sums [b * hkv, GROUP * T, SPLITS, DV]
    to parts, and maxima and totals [2, b * hkv, GROUP * T, SPLITS] to stats, f32. SHARED_MASK: one mask for all heads. ``_n``: strides
    along keys.
    """
    ROW_BLOCKS: tl.constexpr = (GROUP * T + BM - 1) // BM
    pair, split = tl.program_id(0) // ROW_BLOCKS, tl.program_id(1)
    PLAIN: tl.constexpr = 1 if MASK == BOOL else 0  # what changes nothing
    WHOLE: tl.constexpr = EVEN and MASK == NO_MASK  # every key of every block is read
    b, h = (pair // kv_heads).to(tl.int64), pair % kv_heads
    rows = tl.program_id(0) % ROW_BLOCKS * BM + tl.arange(0, BM)
    head, t, real = h * GROUP + rows // T, rows % T, rows < GROUP * T
    cols, d, dv = tl.arange(0, BN), tl.arange(0, PD), tl.arange(0, PDV)
    total_blocks = tl.cdiv(length, BN)
    low, high = 0, tl.cdiv(total_blocks - split, SPLITS)
    first, end = 0, length  # keys
    if MASK != NO_MASK:
        mask_ptr += b * m_b
        if SHARED_MASK:
            queries = tl.arange(0, SCAN_ROWS)
            low, high, first, end, changes = _reach(
                mask_ptr, queries * m_t, queries < T, m_n, split, high, length, MASK, SPLITS, BN, SCAN,
            )  # fmt: skip
        else:
            low, high, first, end, changes = _reach(
                mask_ptr, head * m_h + t * m_t, real, m_n, split, high, length, MASK, SPLITS, BN, SCAN,
            )  # fmt: skip

    q = tl.load(
        q_ptr + b * q_b + (head * q_h + t * q_t)[:, None] + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    factor = tl.full((BM,), scale, tl.float32)  # Inductor passes numbers as f64
    if CODES:
        wide = q.to(tl.float32)
        power, inverse = _powers_of_two(wide)
        q, factor = (wide * inverse[:, None]).to(OPERAND), factor * power
        q, q_odd = tl.split(tl.reshape(q, (BM, PD // 2, 2)))
    KIND_K: tl.constexpr = k_ptr.dtype.element_ty
    KIND_V: tl.constexpr = v_ptr.dtype.element_ty
    BYTES_K: tl.constexpr = 256.0 if KIND_K.is_int_unsigned() and not ASM else 1.0  # what ``_from_byte`` leaves out
    BYTES_V: tl.constexpr = 256.0 if KIND_V.is_int_unsigned() and not ASM else 1.0
    factor = factor * BYTES_K
    if KS == HEAD:
        factor = factor * tl.load(ks_ptr + h * ks_h)
    if not CAP:
        factor = factor * LOG2E
    k_ptr += b * k_b + h.to(tl.int64) * k_h
    v_ptr += b * v_b + h.to(tl.int64) * v_h
    PACK: tl.constexpr = 2 if CODES else 1
    if CODES:  # two codes a word; strides are multiples of 16 bytes
        k_ptr, k_n = _words(k_ptr, tl.uint16), k_n // 16 * 8
        v_ptr, v_n = _words(v_ptr, tl.uint16), v_n // 16 * 8
    dk, dw = tl.arange(0, PD // PACK), tl.arange(0, PDV // PACK)
    k_places = cols[:, None] * k_n + dk[None, :]
    v_places = cols[:, None] * v_n + dw[None, :]

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM, BN), tl.float32)
    acc = tl.zeros((BM, PDV // PACK), tl.float32)
    odd = acc
    for block in range(low, high):
        start = (split + block * SPLITS) * BN
        keys = start + cols
        inside = (keys >= first) & (keys < end)
        at = start.to(tl.int64)
        k = _load(k_ptr + at * k_n + k_places, inside[:, None] & (dk < D // PACK)[None, :], WHOLE and D == PD, 0)
        v = _load(v_ptr + at * v_n + v_places, inside[:, None] & (dw < DV // PACK)[None, :], WHOLE and DV == PDV, 0)
        if CODES:
            k, k_odd = _from_words(k, KIND_K, OPERAND, ASM)
            s = tl.dot(q_odd, tl.trans(k_odd), tl.dot(q, tl.trans(k)))
        else:
            s = tl.dot(q, tl.trans(k))
        s = s * factor[:, None]
        if KS == TOKEN:
            s = s * _load(ks_ptr + b * ks_b + h * ks_h + keys * ks_n, keys < length, EVEN, 0.0)[None, :]
        if VS == TOKEN:
            weight = _load(vs_ptr + b * vs_b + h * vs_h + keys * vs_n, keys < length, EVEN, 1.0)
            weight = tl.where(inside, weight, 1.0)  # none outside is NaN, which 0 of p would not hide
        if CAP:
            s = _capped(s, tl.full((), softcap, tl.float32)) * LOG2E
        if MASK == NO_MASK:
            if not WHOLE:
                s = tl.where(inside[None, :], s, float("-inf"))
        else:
            if SHARED_MASK and T == 1:
                within = inside[None, :]
                mask_rows = tl.zeros((1, 1), tl.int32)
            else:
                within = real[:, None] & inside[None, :]
                mask_rows = (head * m_h + t * m_t)[:, None]
            value = tl.load(mask_ptr + mask_rows + keys[None, :] * m_n, mask=_only_if(within, changes), other=PLAIN)
            if SHARED_MASK and T == 1 and MASK == BOOL:
                # Of what p is computed from by elements alone, Triton takes the narrowest load for the width of the second product's
                # operands; 8 bits would cost moves. A reduction, here of one row, ends that search.
                value = tl.max(value.to(tl.int32), 0)[None, :]
            shown = _sees(value, within, MASK)
            if MASK == ADDITIVE:
                s += value.to(tl.float32) * LOG2E
            s = tl.where(shown, s, float("-inf"))
        logarithms = s
        if VS == TOKEN:
            logarithms += _logarithm(weight)[None, :]
        higher = tl.maximum(top, tl.max(logarithms, 1))
        shift = _finite(higher)
        p = tl.math.exp2(s - shift[:, None])
        fade = tl.math.exp2(top - shift)
        total = total * fade[:, None] + p
        if VS == TOKEN:
            p = p * weight[None, :]
        p = p.to(OPERAND)
        if CODES:
            v, v_odd = _from_words(v, KIND_V, OPERAND, ASM)
            odd = tl.dot(p, v_odd, odd * fade[:, None])
        acc = tl.dot(p, v, acc * fade[:, None])
        top = higher

    total = tl.sum(total, 1)
    last = BYTES_V
    if VS == HEAD:
        last = last * tl.load(vs_ptr + h * vs_h)
    if CODES:
        acc = tl.interleave(acc, odd)
    acc = acc * last
    width = real[:, None] & (dv < DV)[None, :]
    if SPLITS == 1:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            top, total, fade = _with_sink(top, total, sink)
            acc = acc * fade[:, None]
        y = tl.where((total == 0.0)[:, None], 0.0, acc / total[:, None])
        place = ((b * T + t) * (kv_heads * GROUP) + head) * DV
        tl.store(out_ptr + place[:, None] + dv[None, :], y.to(out_ptr.dtype.element_ty), mask=width)
    else:
        place = (pair.to(tl.int64) * (GROUP * T) + rows) * SPLITS + split
        tl.store(stats_ptr + place, top, mask=real)
        pairs = tl.num_programs(0) // ROW_BLOCKS
        tl.store(stats_ptr + pairs.to(tl.int64) * (GROUP * T * SPLITS) + place, total, mask=real)
        if high > low:
            tl.store(parts_ptr + place[:, None] * DV + dv[None, :], acc, mask=width)


@triton.jit
def combine_kernel(
    parts_ptr, stats_ptr, sinks_ptr, out_ptr, kv_heads, T: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr,
    PDV: tl.constexpr, SPLITS: tl.constexpr, PS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Parts of one row, in a fixed order, with its sink -> out. grid: (b * hkv * GROUP * T,); PS: power of two from SPLITS up."""
    pid = tl.program_id(0)
    pair, row = (pid // (GROUP * T)).to(tl.int64), pid % (GROUP * T)
    b, head, t = pair // kv_heads, (pair % kv_heads) * GROUP + row // T, row % T
    splits, dv = tl.arange(0, PS), tl.arange(0, PDV)
    base = pid.to(tl.int64) * SPLITS
    stats_n = tl.num_programs(0).to(tl.int64) * SPLITS
    tops = tl.load(stats_ptr + base + splits, mask=splits < SPLITS, other=float("-inf"))
    totals = tl.load(stats_ptr + stats_n + base + splits, mask=splits < SPLITS, other=0.0)
    top = tl.max(tops, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    shift = _finite(top)
    total = tl.sum(totals * tl.math.exp2(tops - shift), 0)
    if sinks_ptr is not None:
        total += tl.math.exp2(sink - shift)
    acc = tl.zeros((PDV,), tl.float32)
    for start in tl.static_range(0, SPLITS, STEP):
        part = start + tl.arange(0, STEP)
        some = tl.load(stats_ptr + base + part, mask=part < SPLITS, other=float("-inf"))
        sums = tl.load(stats_ptr + stats_n + base + part, mask=part < SPLITS, other=0.0)
        live = (some > float("-inf")) | (sums != 0.0)  # a NaN is; a program that saw nothing has written no part
        inside = live[:, None] & (dv < DV)[None, :]
        values = tl.load(parts_ptr + (base + part)[:, None] * DV + dv[None, :], mask=inside, other=0.0)
        acc += tl.sum(values * tl.where(live, tl.math.exp2(some - shift), 0.0)[:, None], 0)
    y = tl.where(total == 0.0, 0.0, acc / total)
    place = ((b * T + t) * (kv_heads * GROUP) + head) * DV
    tl.store(out_ptr + place + dv, y.to(out_ptr.dtype.element_ty), mask=dv < DV)
