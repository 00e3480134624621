"""Triton source of decode attention over latents: all heads read one head of R + P values as key, the first R of which are its value.

One program reads every SPLITS-th block of keys of one sequence, once, for a block of rows (query head, query). Products, codes, masks
and parts of a split are those of ``_triton_decode``, whose ``combine_kernel`` puts the parts together: codes are multiplied as f16
in two halves, q is divided by a power of two, and the running maximum is that of the logarithm of p times the latent's scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _only_if, _words
from quant_compile.lowering.kernels.attention._triton_decode import (
    ADDITIVE,
    BOOL,
    HEAD,
    LOG2E,
    NO_MASK,
    TOKEN,
    _finite,
    _from_words,
    _load,
    _logarithm,
    _powers_of_two,
    _reach,
    _sees,
)


@triton.jit
def latent_kernel(
    q_ptr, t_ptr, k_ptr, r_ptr, mask_ptr, ks_ptr, rs_ptr, out_ptr, parts_ptr, stats_ptr, scale, length,
    q_b, q_h, q_t, t_b, t_h, t_t, k_b, k_n, r_b, r_n, m_b, m_t, m_n, ks_b, ks_n, rs_b, rs_n,
    T: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, SCAN: tl.constexpr, SCAN_ROWS: tl.constexpr, MASK: tl.constexpr, KS: tl.constexpr,
    CODES: tl.constexpr, OPERAND: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """q [b, HEADS, T, R] and t [b, HEADS, T, P] over k [b, length, R] and r [b, length, P] -> out [b, T, HEADS, R], or parts of it.

    grid: (b * blocks of BM rows, SPLITS). With SPLITS > 1: sums [b, HEADS * T, SPLITS, R] to parts, maxima and totals
    [2, b, HEADS * T, SPLITS] to stats, f32. ks, rs: scales of k's and r's codes, of each token or one number. ``_n``: strides along keys.
    """
    BLOCKS: tl.constexpr = (HEADS * T + BM - 1) // BM
    b, split = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) % BLOCKS * BM + tl.arange(0, BM)
    head, t, real = rows // T, rows % T, rows < HEADS * T
    cols, d, p = tl.arange(0, BN), tl.arange(0, R), tl.arange(0, P)
    low, high = 0, tl.cdiv(tl.cdiv(length, BN) - split, SPLITS)
    first, end, changes = 0, length, False
    if MASK != NO_MASK:
        mask_ptr += b * m_b
        queries = tl.arange(0, SCAN_ROWS)
        low, high, first, end, changes = _reach(
            mask_ptr, queries * m_t, queries < T, m_n, split, high, length, MASK, SPLITS, BN, SCAN,
        )  # fmt: skip

    q = tl.load(q_ptr + b * q_b + (head * q_h + t * q_t)[:, None] + d[None, :], mask=real[:, None], other=0.0)
    turned = tl.load(t_ptr + b * t_b + (head * t_h + t * t_t)[:, None] + p[None, :], mask=real[:, None], other=0.0)
    factor = tl.full((BM,), scale, tl.float32) * LOG2E  # Inductor passes numbers as f64
    turned_factor = factor
    PACK: tl.constexpr = 2 if CODES else 1
    if CODES:
        wide, turned_wide = q.to(tl.float32), turned.to(tl.float32)
        power, inverse = _powers_of_two(wide)
        turned_power, turned_inverse = _powers_of_two(turned_wide)
        q, factor = (wide * inverse[:, None]).to(OPERAND), factor * power
        turned, turned_factor = (turned_wide * turned_inverse[:, None]).to(OPERAND), turned_factor * turned_power
        q, q_odd = tl.split(tl.reshape(q, (BM, R // 2, 2)))
        turned, turned_odd = tl.split(tl.reshape(turned, (BM, P // 2, 2)))
    KIND: tl.constexpr = k_ptr.dtype.element_ty
    BYTES: tl.constexpr = 256.0 if KIND.is_int_unsigned() and not ASM else 1.0  # what ``_from_byte`` leaves out
    factor, turned_factor = factor * BYTES, turned_factor * BYTES
    if KS == HEAD:
        factor, turned_factor = factor * tl.load(ks_ptr), turned_factor * tl.load(rs_ptr)
    k_ptr += b * k_b
    r_ptr += b * r_b
    if CODES:  # two codes a word; strides are multiples of 16 bytes
        k_ptr, k_n = _words(k_ptr, tl.uint16), k_n // 16 * 8
        r_ptr, r_n = _words(r_ptr, tl.uint16), r_n // 16 * 8
    dk, dp = tl.arange(0, R // PACK), tl.arange(0, P // PACK)
    k_places = cols[:, None] * k_n + dk[None, :]
    r_places = cols[:, None] * r_n + dp[None, :]

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM, BN), tl.float32)
    acc = tl.zeros((BM, R // PACK), tl.float32)
    odd = acc
    for block in range(low, high):
        start = (split + block * SPLITS) * BN
        keys = start + cols
        inside = (keys >= first) & (keys < end)
        at = start.to(tl.int64)
        k = _load(k_ptr + at * k_n + k_places, inside[:, None], EVEN and MASK == NO_MASK, 0)
        r = _load(r_ptr + at * r_n + r_places, inside[:, None], EVEN and MASK == NO_MASK, 0)
        if CODES:
            k, k_odd = _from_words(k, KIND, OPERAND, ASM)
            r, r_odd = _from_words(r, KIND, OPERAND, ASM)
            s = tl.dot(q_odd, tl.trans(k_odd), tl.dot(q, tl.trans(k))) * factor[:, None]
            s_turned = tl.dot(turned_odd, tl.trans(r_odd), tl.dot(turned, tl.trans(r))) * turned_factor[:, None]
            if KS == TOKEN:
                # None outside is NaN, which 0 of p would not hide.
                weight = tl.where(inside, _load(ks_ptr + b * ks_b + keys * ks_n, keys < length, EVEN, 1.0), 1.0)
                s = s * weight[None, :]
                s_turned = s_turned * _load(rs_ptr + b * rs_b + keys * rs_n, keys < length, EVEN, 0.0)[None, :]
            s += s_turned
        else:
            s = tl.dot(turned, tl.trans(r), tl.dot(q, tl.trans(k))) * factor[:, None]
        if MASK == NO_MASK:
            s = tl.where(inside[None, :], s, float("-inf"))
        else:
            within = real[:, None] & inside[None, :]
            PLAIN: tl.constexpr = 1 if MASK == BOOL else 0  # what changes nothing
            value = tl.load(
                mask_ptr + (t * m_t)[:, None] + keys[None, :] * m_n, mask=_only_if(within, changes), other=PLAIN
            )
            if MASK == ADDITIVE:
                s += value.to(tl.float32) * LOG2E
            s = tl.where(_sees(value, within, MASK), s, float("-inf"))
        logarithms = s
        if KS == TOKEN:
            logarithms += _logarithm(weight)[None, :]
        higher = tl.maximum(top, tl.max(logarithms, 1))
        shift = _finite(higher)
        weights = tl.math.exp2(s - shift[:, None])
        fade = tl.math.exp2(top - shift)
        total = total * fade[:, None] + weights
        if KS == TOKEN:
            weights = weights * weight[None, :]
        weights = weights.to(OPERAND)
        if CODES:
            odd = tl.dot(weights, k_odd, odd * fade[:, None])
        acc = tl.dot(weights, k, acc * fade[:, None])
        top = higher

    total = tl.sum(total, 1)
    last = BYTES
    if KS == HEAD:
        last = last * tl.load(ks_ptr)
    if CODES:
        acc = tl.interleave(acc, odd)
    acc = acc * last
    if SPLITS == 1:
        y = tl.where((total == 0.0)[:, None], 0.0, acc / total[:, None])
        place = ((b * T + t) * HEADS + head) * R
        tl.store(out_ptr + place[:, None] + d[None, :], y.to(out_ptr.dtype.element_ty), mask=real[:, None])
    else:
        place = (b * (HEADS * T) + rows) * SPLITS + split
        tl.store(stats_ptr + place, top, mask=real)
        sequences = tl.num_programs(0) // BLOCKS
        tl.store(stats_ptr + sequences.to(tl.int64) * (HEADS * T * SPLITS) + place, total, mask=real)
        if high > low:
            tl.store(parts_ptr + place[:, None] * R + d[None, :], acc, mask=real[:, None])
