"""Triton source of prefill attention: one program computes BM queries of one head over the keys that they see (FlashAttention-2).

``reach_kernel`` reads the mask once and writes a word for each block of queries and block of keys: which keys anyone sees there, and
whether all see all, so that ``prefill_kernel`` walks over whole blocks without their mask, then over the rest with it, and reads no key
that is hidden from all its queries at either end of a block. Scores are kept in powers of two, sums in f32.

Codes go one of two ways. ``values_kernel`` computes 16-bit values of those blocks that anyone sees, once for all queries and heads, and
``prefill_kernel`` reads these. Or ``codes_kernel`` converts in registers, as decode does (``_triton_decode``, which has the reasons for
words, halves and logarithms): without scratch, but once for each program.

Heads that are no power of two are read in two parts that are, 80 as 64 and 16: nothing is padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _words
from quant_compile.lowering.kernels.attention._triton_decode import (
    _capped,
    _finite,
    _from_byte,
    _from_words,
    _logarithm,
    _powers_of_two,
    _sees,
    _with_sink,
)

LOG2E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOL, ADDITIVE, CAUSAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NO_SCALE, HEAD, TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# A word of a block: its first key that anyone sees, the end of those in 9 bits from END up, and FULL where the mask changes nothing.
# NOBODY: of a block that no one sees.
END, BITS, FULL, NOBODY = tl.constexpr(9), tl.constexpr(511), tl.constexpr(1 << 18), tl.constexpr(0)
# Words that are read at a time.
SCAN = tl.constexpr(128)


# --- pieces ---


@triton.jit
def _bounds(reach_ptr, tile, tokens, length, MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Blocks of keys of a block of queries: first and end of those that it sees, and of a run among them that all see whole."""
    blocks = tl.cdiv(length, BN)
    if MASK == NO_MASK:
        low, high, full_low, full_high = 0, blocks, 0, length // BN
    elif MASK == CAUSAL:
        low, high = 0, tl.cdiv(tl.minimum(length, tl.minimum(tile * BM + BM, tokens)), BN)
        full_low, full_high = 0, tl.minimum(length, tile * BM + 1) // BN
    else:
        places = tl.arange(0, SCAN)
        low, high, full_low, full_high = blocks, 0, blocks, blocks
        for start in range(0, blocks, SCAN):
            at = start + places
            word = tl.load(reach_ptr + at, mask=at < blocks, other=NOBODY)
            low = tl.minimum(low, tl.min(tl.where(word != NOBODY, at, blocks), 0))
            high = tl.maximum(high, tl.max(tl.where(word != NOBODY, at + 1, 0), 0))
            full_low = tl.minimum(full_low, tl.min(tl.where(word >= FULL, at, blocks), 0))
        for start in range(full_low // SCAN * SCAN, blocks, SCAN):
            at = start + places
            word = tl.load(reach_ptr + at, mask=at < blocks, other=NOBODY)
            full_high = tl.minimum(full_high, tl.min(tl.where((word < FULL) & (at >= full_low), at, blocks), 0))
        low = tl.minimum(low, high)
        full_low, full_high = tl.minimum(full_low, high), tl.minimum(full_high, high)
    return low, high, full_low, full_high


@triton.jit
def _inside(reach_ptr, block, keys, length, MASK: tl.constexpr, BN: tl.constexpr):
    """Which keys of a block are read: those between the first and the last that anyone of the program sees."""
    inside = keys < length
    if MASK != NO_MASK and MASK != CAUSAL:
        word = tl.load(reach_ptr + block)
        first, end = word & BITS, (word >> END) & BITS
        inside = (keys >= block * BN + first) & (keys < block * BN + end)
    return inside


@triton.jit
def _hidden(s, mask_ptr, rows, real, keys, inside, m_t, m_n, MASK: tl.constexpr, BM: tl.constexpr):
    """Scores [rows, keys] in powers of two under the mask, whose pointer is at the first row; -inf where a key is hidden."""
    if MASK == NO_MASK:
        shown = inside[None, :]
    elif MASK == CAUSAL:
        shown = inside[None, :] & (keys[None, :] <= rows[:, None])
    else:
        within = real[:, None] & inside[None, :]
        value = tl.load(mask_ptr + (rows % BM * m_t)[:, None] + keys[None, :] * m_n, mask=within, other=0)
        shown = _sees(value, within, MASK)
        if MASK == ADDITIVE:
            s += value.to(tl.float32) * LOG2E
    return tl.where(shown, s, float("-inf"))


@triton.jit
def _place(tokens, heads, BM: tl.constexpr):
    """(block of queries, sequence, head) of a program: the last queries, which see most keys, first; heads of a group side by side."""
    tiles = tl.cdiv(tokens, BM)
    pairs = tl.num_programs(0) // tiles
    pair = tl.program_id(0) % pairs
    return tiles - 1 - tl.program_id(0) // pairs, (pair // heads).to(tl.int64), pair % heads


@triton.jit
def _of_mask(mask_ptr, reach_ptr, b, h, tile, length, m_b, m_h, m_t, r_b, r_h, BM: tl.constexpr, BN: tl.constexpr):
    """Mask and words of a block of queries; r_b, r_h: strides of the words in blocks of queries."""
    row = b * r_b + h * r_h + tile
    mask_ptr += b * m_b + h.to(tl.int64) * m_h + (tile * BM).to(tl.int64) * m_t
    return mask_ptr, reach_ptr + row * tl.cdiv(length, BN)


@triton.jit
def _finish(top, total, sinks_ptr, h):
    """(factor of the sums, the sums' divisor) at the end; rows that saw nothing become 0 by a factor of 0."""
    fade = tl.full(total.shape, 1.0, tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        top, total, fade = _with_sink(top, total, tl.full(total.shape, 0.0, tl.float32) + sink)
    empty = total == 0.0
    return tl.where(empty, 0.0, fade / tl.where(empty, 1.0, total))


# --- kernels ---


@triton.jit(do_not_specialize=["tokens", "length", "m_b", "m_h"])
def reach_kernel(
    mask_ptr, reach_ptr, tokens, length, heads, m_b, m_h, m_t, m_n,
    MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """mask [b, heads, tokens, length] -> words [b, heads, blocks of BM queries, blocks of BN keys], int32.

    grid: (blocks of queries * blocks of keys, b * heads).
    """
    blocks = tl.cdiv(length, BN)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows, cols = tile * BM + tl.arange(0, BM), tl.arange(0, BN)
    keys = block * BN + cols
    inside = (rows < tokens)[:, None] & (keys < length)[None, :]
    places = b * m_b + h * m_h + rows.to(tl.int64)[:, None] * m_t + keys[None, :] * m_n
    value = tl.load(mask_ptr + places, mask=inside, other=0)
    seen = tl.max(_sees(value, inside, MASK).to(tl.int32), 0) > 0
    changes = inside & ((value == 0) if MASK == BOOL else (value != 0))
    first = tl.min(tl.where(seen, cols, BN), 0)
    end = tl.max(tl.where(seen, cols + 1, 0), 0)
    full = (tl.sum(tl.sum(changes.to(tl.int32), 1), 0) == 0) & (block * BN + BN <= length)
    word = tl.where(end == 0, NOBODY, first | (end << END)) + tl.where(full, FULL, 0)
    pair = tl.program_id(1).to(tl.int64)
    tl.store(reach_ptr + pair * tl.num_programs(0) + tl.program_id(0), word)


@triton.jit(do_not_specialize=["tokens", "length"])
def values_kernel(
    k_ptr, v_ptr, ks_ptr, vs_ptr, reach_ptr, k_out_ptr, v_out_ptr, tokens, length, kv_heads, mask_heads,
    k_b, k_h, k_n, v_b, v_h, v_n, ks_b, ks_h, ks_n, vs_b, vs_h, vs_n, r_b,
    MASK: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr,
    PDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Codes and scales -> values [b, kv_heads, length, D] and [.., DV] of those blocks of keys that any query of a sequence sees.

    grid: (blocks of keys, b * kv_heads). r_b: words of a sequence, 0 where all have one mask.
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    seen = True
    if MASK == CAUSAL:
        seen = block * BN < tokens
    elif MASK != NO_MASK:
        blocks, rows, some = tl.cdiv(length, BN), mask_heads * tl.cdiv(tokens, BM), 0
        for start in range(0, rows, SCAN):
            at = start + tl.arange(0, SCAN)
            word = tl.load(reach_ptr + (b * r_b + at) * blocks + block, mask=at < rows, other=NOBODY)
            some = tl.maximum(some, tl.max(word, 0))
        seen = some != NOBODY
    if seen:
        keys = (block * BN + tl.arange(0, BN)).to(tl.int64)
        inside = keys < length
        _values(
            k_ptr + b * k_b + h * k_h, ks_ptr, b * ks_b + h * ks_h, k_out_ptr + pair.to(tl.int64) * length * D,
            keys, inside, k_n, ks_n, KS, D, PD,
        )  # fmt: skip
        _values(
            v_ptr + b * v_b + h * v_h, vs_ptr, b * vs_b + h * vs_h, v_out_ptr + pair.to(tl.int64) * length * DV,
            keys, inside, v_n, vs_n, VS, DV, PDV,
        )  # fmt: skip


@triton.jit
def _values(
    ptr,
    scale_ptr,
    scale_at,
    out_ptr,
    keys,
    inside,
    stride,
    scale_n,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    PD: tl.constexpr,
):
    """One block of K or V."""
    KIND: tl.constexpr = ptr.dtype.element_ty
    d = tl.arange(0, PD)
    within = inside[:, None] & (d < D)[None, :]
    codes = tl.load(_words(ptr, tl.uint8) + keys[:, None] * stride + d[None, :], mask=within, other=0)
    x = _from_byte(codes.to(tl.uint16), KIND, tl.float16).to(tl.float32)  # exact in f16
    if KIND.is_int_unsigned():  # bytes of e4m3, of which ``_from_byte`` makes 2^-8 times the value
        x = x * 256.0
    if SCALE == TOKEN:
        x = x * tl.load(scale_ptr + scale_at + keys * scale_n, mask=inside, other=0.0)[:, None]
    if SCALE == HEAD:
        x = x * tl.load(scale_ptr + scale_at)
    tl.store(out_ptr + keys[:, None] * D + d[None, :], x.to(out_ptr.dtype.element_ty), mask=within)


@triton.jit
def _walk(
    low, high, gap_low, gap, q, q2, k_ptr, v_ptr, mask_ptr, reach_ptr, rows, real, length, k_n, v_n, m_t, m_n,
    factor, softcap, top, total, acc, acc2,
    MASKED: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    V1: tl.constexpr, V2: tl.constexpr,
):  # fmt: skip
    """Blocks ``low`` to ``high`` of 16-bit K and V, without the ``gap`` of them that begins at ``gap_low``, added to a program's sums."""
    cols = tl.arange(0, BN)
    k_places, v_places = (
        cols[:, None] * k_n + tl.arange(0, K1)[None, :],
        cols[:, None] * v_n + tl.arange(0, V1)[None, :],
    )
    k2_places, v2_places = k_places, v_places
    if K2:
        k2_places = cols[:, None] * k_n + K1 + tl.arange(0, K2)[None, :]
    if V2:
        v2_places = cols[:, None] * v_n + V1 + tl.arange(0, V2)[None, :]
    for i in range(low, high - gap):
        block = i + tl.where(i >= gap_low, gap, 0)
        at = (block * BN).to(tl.int64)
        k_at, v_at, keys = k_ptr + at * k_n, v_ptr + at * v_n, block * BN + cols
        inside = keys < length
        if MASKED:
            inside = _inside(reach_ptr, block, keys, length, MASK, BN)
            k = tl.load(k_at + k_places, mask=inside[:, None], other=0.0)
        else:
            k = tl.load(k_at + k_places)
        s = tl.dot(q, tl.trans(k))
        if K2:
            k2 = tl.load(k_at + k2_places, mask=inside[:, None], other=0.0) if MASKED else tl.load(k_at + k2_places)
            s = tl.dot(q2, tl.trans(k2), s)
        if CAP:
            s = _capped(s * factor, softcap) * LOG2E
        if MASKED:
            s = s if CAP else s * factor
            s = _hidden(s, mask_ptr, rows, real, keys, inside, m_t, m_n, MASK, BM)
            higher = tl.maximum(top, tl.max(s, 1))
            shift = _finite(higher)
            p = tl.math.exp2(s - shift[:, None])
        else:
            scale = 1.0 if CAP else factor  # not below 0: the largest score is the largest product's
            higher = tl.maximum(top, tl.max(s, 1) * scale)
            shift = _finite(higher)
            p = tl.math.exp2(s * scale - shift[:, None])
        fade = tl.math.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        p = p.to(q.dtype)
        v = tl.load(v_at + v_places, mask=inside[:, None], other=0.0) if MASKED else tl.load(v_at + v_places)
        acc = tl.dot(p, v, acc * fade[:, None])
        if V2:
            v2 = tl.load(v_at + v2_places, mask=inside[:, None], other=0.0) if MASKED else tl.load(v_at + v2_places)
            acc2 = tl.dot(p, v2, acc2 * fade[:, None])
        top = higher
    return top, total, acc, acc2


@triton.jit(do_not_specialize=["tokens", "length", "m_b", "m_h"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, reach_ptr, sinks_ptr, out_ptr, scale, softcap, tokens, length, heads,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_t, m_n, r_b, r_h,
    GROUP: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    K1: tl.constexpr, K2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
):  # fmt: skip
    """q [b, heads, tokens, K1 + K2] over k [b, heads / GROUP, length, ..], v [.., V1 + V2] -> out [b, tokens, heads, V1 + V2].

    grid: (blocks of BM queries * b * heads,). ``_n``: strides along keys; r_b, r_h: strides of the words in blocks of queries.
    """
    tile, b, h = _place(tokens, heads, BM)
    rows = tile * BM + tl.arange(0, BM)
    real, wide = rows < tokens, rows.to(tl.int64)
    if MASK != NO_MASK and MASK != CAUSAL:
        mask_ptr, reach_ptr = _of_mask(mask_ptr, reach_ptr, b, h, tile, length, m_b, m_h, m_t, r_b, r_h, BM, BN)
    low, high, full_low, full_high = _bounds(reach_ptr, tile, tokens, length, MASK, BM, BN)
    q_ptr += b * q_b + h.to(tl.int64) * q_h
    q = tl.load(q_ptr + wide[:, None] * q_t + tl.arange(0, K1)[None, :], mask=real[:, None], other=0.0)
    q2 = q
    if K2:
        q2 = tl.load(q_ptr + wide[:, None] * q_t + K1 + tl.arange(0, K2)[None, :], mask=real[:, None], other=0.0)
    group = (h // GROUP).to(tl.int64)
    k_ptr += b * k_b + group * k_h
    v_ptr += b * v_b + group * v_h
    factor = tl.full((), scale, tl.float32)  # Inductor passes numbers as f64
    cap = tl.full((), softcap, tl.float32)
    if not CAP:
        factor = factor * LOG2E

    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, V1), tl.float32)
    acc2 = tl.zeros((BM, V2 if V2 else 16), tl.float32)
    top, total, acc, acc2 = _walk(
        full_low, full_high, full_high, 0, q, q2, k_ptr, v_ptr, mask_ptr, reach_ptr, rows, real, length, k_n, v_n, m_t, m_n,
        factor, cap, top, total, acc, acc2, False, MASK, CAP, BM, BN, K1, K2, V1, V2,
    )  # fmt: skip
    top, total, acc, acc2 = _walk(
        low, high, full_low, full_high - full_low, q, q2, k_ptr, v_ptr, mask_ptr, reach_ptr, rows, real, length, k_n, v_n,
        m_t, m_n, factor, cap, top, total, acc, acc2, True, MASK, CAP, BM, BN, K1, K2, V1, V2,
    )  # fmt: skip

    last = _finish(top, total, sinks_ptr, h)
    out_ptr += ((b * tokens + wide) * heads + h)[:, None] * (V1 + V2)
    y = tl.where(last[:, None] == 0.0, 0.0, acc * last[:, None])
    tl.store(out_ptr + tl.arange(0, V1)[None, :], y.to(out_ptr.dtype.element_ty), mask=real[:, None])
    if V2:
        y = tl.where(last[:, None] == 0.0, 0.0, acc2 * last[:, None])
        tl.store(out_ptr + V1 + tl.arange(0, V2)[None, :], y.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _walk_codes(
    low, high, gap_low, gap, q, q_odd, k_ptr, v_ptr, mask_ptr, reach_ptr, ks_ptr, vs_ptr, rows, real, length, k_n, v_n,
    ks_n, vs_n, m_t, m_n, factor, softcap, top, total, acc, odd,
    MASKED: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr, KIND_K: tl.constexpr,
    KIND_V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``_walk`` over words of two codes."""
    cols = tl.arange(0, BN)
    k_places, v_places = (
        cols[:, None] * k_n + tl.arange(0, WK)[None, :],
        cols[:, None] * v_n + tl.arange(0, WV)[None, :],
    )
    for i in range(low, high - gap):
        block = i + tl.where(i >= gap_low, gap, 0)
        at = (block * BN).to(tl.int64)
        keys = block * BN + cols
        inside = keys < length
        if MASKED:
            inside = _inside(reach_ptr, block, keys, length, MASK, BN)
            k = tl.load(k_ptr + at * k_n + k_places, mask=inside[:, None], other=0)
            v = tl.load(v_ptr + at * v_n + v_places, mask=inside[:, None], other=0)
        else:
            k, v = tl.load(k_ptr + at * k_n + k_places), tl.load(v_ptr + at * v_n + v_places)
        k, k_odd = _from_words(k, KIND_K, tl.float16, ASM)
        s = tl.dot(q_odd, tl.trans(k_odd), tl.dot(q, tl.trans(k))) * factor[:, None]
        if KS == TOKEN:
            s = s * tl.load(ks_ptr + keys * ks_n, mask=inside, other=0.0)[None, :]
        if CAP:
            s = _capped(s, softcap) * LOG2E
        if MASKED:
            s = _hidden(s, mask_ptr, rows, real, keys, inside, m_t, m_n, MASK, BM)
        logarithms = s
        if VS == TOKEN:
            weight = tl.load(vs_ptr + keys * vs_n, mask=inside, other=1.0)
            logarithms = s + _logarithm(weight)[None, :]
        higher = tl.maximum(top, tl.max(logarithms, 1))
        shift = _finite(higher)
        p = tl.math.exp2(s - shift[:, None])
        fade = tl.math.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        if VS == TOKEN:
            p = p * weight[None, :]
        p = p.to(tl.float16)
        v, v_odd = _from_words(v, KIND_V, tl.float16, ASM)
        odd = tl.dot(p, v_odd, odd * fade[:, None])
        acc = tl.dot(p, v, acc * fade[:, None])
        top = higher
    return top, total, acc, odd


@triton.jit(do_not_specialize=["tokens", "length", "m_b", "m_h"])
def codes_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, reach_ptr, ks_ptr, vs_ptr, sinks_ptr, out_ptr, scale, softcap, tokens, length, heads,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_t, m_n, r_b, r_h, ks_b, ks_h, ks_n, vs_b, vs_h, vs_n,
    GROUP: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``prefill_kernel`` over codes; D and DV are powers of two, strides of codes multiples of 16."""
    tile, b, h = _place(tokens, heads, BM)
    rows = tile * BM + tl.arange(0, BM)
    real, wide = rows < tokens, rows.to(tl.int64)
    if MASK != NO_MASK and MASK != CAUSAL:
        mask_ptr, reach_ptr = _of_mask(mask_ptr, reach_ptr, b, h, tile, length, m_b, m_h, m_t, r_b, r_h, BM, BN)
    low, high, full_low, full_high = _bounds(reach_ptr, tile, tokens, length, MASK, BM, BN)
    KIND_K: tl.constexpr = k_ptr.dtype.element_ty
    KIND_V: tl.constexpr = v_ptr.dtype.element_ty
    BYTES_K: tl.constexpr = 256.0 if KIND_K.is_int_unsigned() and not ASM else 1.0  # what ``_from_byte`` leaves out
    BYTES_V: tl.constexpr = 256.0 if KIND_V.is_int_unsigned() and not ASM else 1.0
    q_ptr += b * q_b + h.to(tl.int64) * q_h
    q = tl.load(q_ptr + wide[:, None] * q_t + tl.arange(0, D)[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    power, inverse = _powers_of_two(q)
    q, q_odd = tl.split(tl.reshape((q * inverse[:, None]).to(tl.float16), (BM, D // 2, 2)))
    group = (h // GROUP).to(tl.int64)
    factor = tl.full((), scale, tl.float32) * power * BYTES_K  # Inductor passes numbers as f64
    if KS != NO_SCALE:
        ks_ptr += b * ks_b + group * ks_h
    if KS == HEAD:
        factor = factor * tl.load(ks_ptr)
    if not CAP:
        factor = factor * LOG2E
    if VS != NO_SCALE:
        vs_ptr += b * vs_b + group * vs_h
    k_words, v_words = (
        _words(k_ptr + b * k_b + group * k_h, tl.uint16),
        _words(v_ptr + b * v_b + group * v_h, tl.uint16),
    )
    k_n, v_n = k_n // 16 * 8, v_n // 16 * 8
    cap = tl.full((), softcap, tl.float32)

    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DV // 2), tl.float32)
    odd = acc
    top, total, acc, odd = _walk_codes(
        full_low, full_high, full_high, 0, q, q_odd, k_words, v_words, mask_ptr, reach_ptr, ks_ptr, vs_ptr, rows, real,
        length, k_n, v_n, ks_n, vs_n, m_t, m_n, factor, cap, top, total, acc, odd,
        False, MASK, CAP, KS, VS, KIND_K, KIND_V, BM, BN, D // 2, DV // 2, ASM,
    )  # fmt: skip
    top, total, acc, odd = _walk_codes(
        low, high, full_low, full_high - full_low, q, q_odd, k_words, v_words, mask_ptr, reach_ptr, ks_ptr, vs_ptr, rows,
        real, length, k_n, v_n, ks_n, vs_n, m_t, m_n, factor, cap, top, total, acc, odd,
        True, MASK, CAP, KS, VS, KIND_K, KIND_V, BM, BN, D // 2, DV // 2, ASM,
    )  # fmt: skip

    last = _finish(top, total, sinks_ptr, h)
    if VS == HEAD:
        last = last * tl.load(vs_ptr)
    y = tl.where(last[:, None] == 0.0, 0.0, tl.interleave(acc, odd) * (last * BYTES_V)[:, None])
    place = ((b * tokens + wide) * heads + h)[:, None] * DV + tl.arange(0, DV)[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=real[:, None])
