"""Triton source of the cache's write side: a token of one head is quantized and written, K and V in one launch.

Codes are those of ``reference.quantize``, bit for bit. Floats are rounded by integer arithmetic, so that sm80, which has no e4m3,
and the interpreter, which rounds it wrongly, do the same as the rest. ``_amax`` and ``_codes`` of ``_triton_pieces`` are not used:
Inductor writes the constants of a kernel that it launches into its code, and the option of theirs has no text that is Python.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _words


@triton.jit
def _float8(x, MANTISSA: tl.constexpr, LARGEST: tl.constexpr):
    """f32 -> bytes of e4m3 (MANTISSA 3) or e5m2 (2), rounded half to even, saturating; NaN becomes a NaN."""
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Below the least normal number codes count steps of 2^(1 - BIAS - MANTISSA): added to a float whose last bit is worth that.
    MAGIC: tl.constexpr = 1.5 * 2.0 ** (24 - BIAS - MANTISSA)
    small = (size + MAGIC).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size < 2.0 ** (1 - BIAS), small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _scale_of(x, LARGEST: tl.constexpr):
    """(scale, 1 / scale) of one row, as ``ir.numerics`` defines them; bits of magnitudes are ordered, NaN above all numbers."""
    amax = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    scale = tl.where(amax < 2.0**-100, 2.0**-100, amax) * (1.0 / LARGEST)
    return scale, tl.math.div_rn(1.0, scale)


@triton.jit
def _int8(x):
    """f32 -> int8 as bytes, rounded half to even, -127 to 127; NaN becomes 0."""
    x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -127.0), 127.0)
    return (
        ((x + 12582912.0) - 12582912.0).to(tl.int8).to(tl.uint8, bitcast=True)
    )  # 1.5 * 2**23: whole numbers are the next floats


@triton.jit
def _store_token(
    x_ptr, cache_ptr, scale_ptr, h, scale_h, cache_at, scale_at, SIZE: tl.constexpr, WIDE: tl.constexpr,
    MANTISSA: tl.constexpr, LARGEST: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """One token of one head. FIXED: the head's scale is read; else it is that of the token, and written."""
    d = tl.arange(0, WIDE)
    x = tl.load(x_ptr + d, mask=d < SIZE, other=0.0).to(tl.float32)
    if FIXED:
        inverse = tl.math.div_rn(1.0, tl.load(scale_ptr + h * scale_h))
    else:
        scale, inverse = _scale_of(x, LARGEST)
        tl.store(scale_ptr + scale_at, scale)
    codes = _int8(x * inverse) if MANTISSA == 0 else _float8(x * inverse, MANTISSA, LARGEST)
    tl.store(_words(cache_ptr, tl.uint8) + cache_at + d, codes, mask=d < SIZE)


@triton.jit
def store_kernel(
    k_ptr, v_ptr, positions_ptr, kc_ptr, vc_ptr, ks_ptr, vs_ptr, kv_heads, length,
    k_b, k_h, k_t, v_b, v_h, v_t, kc_b, kc_h, kc_n, vc_b, vc_h, vc_n, ks_b, ks_h, ks_n, vs_b, vs_h, vs_n,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr, K_MANTISSA: tl.constexpr,
    V_MANTISSA: tl.constexpr, K_LARGEST: tl.constexpr, V_LARGEST: tl.constexpr, K_FIXED: tl.constexpr,
    V_FIXED: tl.constexpr,
):  # fmt: skip
    """k [b, hkv, t, D], v [.., DV] -> codes in caches [b, hkv, length, ..] at positions [t]. grid: (b * hkv, t).

    MANTISSA: bits of the codes' mantissa, 0 for int8. A position outside of the cache is left out.
    """
    pair, t = tl.program_id(0), tl.program_id(1)
    b, h = (pair // kv_heads).to(tl.int64), pair % kv_heads
    position = tl.load(positions_ptr + t)
    if (position >= 0) & (position < length):
        _store_token(
            k_ptr + b * k_b + h * k_h + t * k_t, kc_ptr, ks_ptr, h, ks_h, b * kc_b + h * kc_h + position * kc_n,
            b * ks_b + h * ks_h + position * ks_n, D, PD, K_MANTISSA, K_LARGEST, K_FIXED,
        )  # fmt: skip
        _store_token(
            v_ptr + b * v_b + h * v_h + t * v_t, vc_ptr, vs_ptr, h, vs_h, b * vc_b + h * vc_h + position * vc_n,
            b * vs_b + h * vs_h + position * vs_n, DV, PDV, V_MANTISSA, V_LARGEST, V_FIXED,
        )  # fmt: skip
