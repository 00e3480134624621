"""Triton source that kernels of several folders share: magnitudes and codes, the walk over tiles, and dp4a."""

from __future__ import annotations

import triton
import triton.language as tl

ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _words(ptr, WORD: tl.constexpr):
    """A pointer whose elements are read as ``WORD``; whoever launches passes the tensor as it is."""
    return ptr.to(tl.pointer_type(WORD), bitcast=True)


@triton.jit
def _only_if(mask, flag):
    """``mask`` [..] where the scalar condition ``flag`` holds; it compiles to ``mask & flag``.

    Triton 3.9's interpreter spreads a condition as int32, and loads and stores there take no mask of int32.
    """
    return (mask & flag) != 0


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=ALL_NAN)


@triton.jit
def _amax(x, axis: tl.constexpr):
    """Largest magnitude along ``axis``; NaN stays NaN."""
    return tl.reduce(tl.abs(x), axis, _larger)


@triton.jit
def _scale_of(amax, LIMIT: tl.constexpr):
    """(scale, 1 / scale) of rows whose largest code is LIMIT, as ``ir.numerics`` defines them."""
    scale = tl.maximum(amax, 2.0**-100, propagate_nan=ALL_NAN) * (1.0 / LIMIT)
    return scale, tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _codes(x, inverse, LIMIT: tl.constexpr, CODE: tl.constexpr):
    """f32 x times ``inverse``, rounded half to even onto codes, saturating."""
    x = tl.minimum(x * inverse, LIMIT, propagate_nan=ALL_NAN)
    x = tl.maximum(x, -LIMIT, propagate_nan=ALL_NAN)
    if CODE.is_int():
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: whole numbers are the next floats
    return x.to(CODE)


@triton.jit
def _tile_of(pid, rows, columns, BAND: tl.constexpr):
    """(row, column) of program ``pid`` in a grid of tiles: BAND rows are walked column by column, which keeps both operands in L2."""
    band = BAND * columns
    first = (pid // band) * BAND
    height = tl.minimum(rows - first, BAND)
    return first + (pid % band) % height, (pid % band) // height


@triton.jit
def _dp4a(a, b, total):
    """total + the dot product of the four int8 in a and in b, int32."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
    )
