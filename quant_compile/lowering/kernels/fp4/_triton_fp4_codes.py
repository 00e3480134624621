"""Triton source of FP4 numbers: scales of groups and codes of e2m1, as ``schemes/fp4`` defines them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _round_e2m1(x):
    """f32 -> codes 0..15 i32 of the nearest e2m1 value, ties to the even code, saturating."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | ((x < 0).to(tl.int32) << 3)


@triton.jit
def _nv_scale(amax, whole):
    """(e4m3 scale, what it stands for) of groups under a global scale; NaN where that is no use."""
    wanted = tl.math.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32))
    wanted = wanted * tl.math.div_rn(tl.full(amax.shape, 1.0, tl.float32), tl.zeros(amax.shape, tl.float32) + whole)
    usable = (wanted >= 0) & (wanted < float("inf"))
    clamped = tl.minimum(tl.maximum(wanted, 0.001953125), 448.0)
    scale = tl.where(usable, clamped, float("nan")).to(tl.float8e4nv)
    return scale, scale.to(tl.float32) * whole


@triton.jit
def _mx_scale(amax):
    """(e8m0 bits, 1 / what they stand for) of groups."""
    bits = amax.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits + (1 << 21)) >> 23) - 2, 0)
    inverse = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    return tl.where(bits >= 0x7F800000, 255, exponent).to(tl.uint8), inverse
