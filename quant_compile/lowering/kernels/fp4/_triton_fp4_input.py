"""Triton source of FP4 inputs: RMSNorm and quantization in one kernel, and quantization under the maxima of all rows.

Formulas and divisions are those of ``schemes/fp4.py``; a program holds [groups, GROUP] values of one row in f32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import ALL_NAN, _amax
from quant_compile.lowering.kernels.fp4._triton_fp4_codes import _mx_scale, _nv_scale, _round_e2m1


@triton.jit
def _places(start, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [BLOCK / GROUP, GROUP] of a block."""
    return start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _row(x_ptr, residual_ptr, row, cols, k):
    """x, or x + residual as its dtype rounds it, f32; zeros past k."""
    x = tl.load(x_ptr + row * k + cols, mask=cols < k, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * k + cols, mask=cols < k, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _weighted(x, inverse, w_ptr, cols, k, WEIGHTING: tl.constexpr, OUT: tl.constexpr):
    """The normed row in OUT, as f32; zeros past k."""
    w = tl.load(w_ptr + cols, mask=cols < k, other=0.0).to(tl.float32)
    y = x * inverse
    if WEIGHTING == "after_cast":
        y = y.to(OUT).to(tl.float32)
    if WEIGHTING == "one_plus":
        w = 1.0 + w
    return tl.where(cols < k, (y * w).to(OUT).to(tl.float32), 0.0)


@triton.jit
def _store_fp4(y, whole, q_ptr, s_ptr, row, start, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Codes and scales of a block y of a row; ``whole`` is NVFP4's global scale, None for MXFP4."""
    amax = _amax(y, 1)
    if whole is not None:
        scale, local = _nv_scale(amax, whole)
        y = tl.math.div_rn(y, tl.broadcast_to(local[:, None], y.shape))
    else:
        scale, inverse = _mx_scale(amax)
        y = y * inverse[:, None]
    low, high = tl.split(tl.reshape(_round_e2m1(y), (BLOCK // 2, 2)))
    pairs = start // 2 + tl.arange(0, BLOCK // 2)
    half = groups * (GROUP // 2)
    tl.store(q_ptr + row * half + pairs, (low | (high << 4)).to(tl.uint8), mask=pairs < half)
    at = start // GROUP + tl.arange(0, BLOCK // GROUP)
    tl.store(s_ptr + row * groups + at, scale, mask=at < groups)


@triton.jit
def norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    w_ptr,
    whole_ptr,
    h_ptr,
    q_ptr,
    s_ptr,
    k,
    groups,
    eps,
    WEIGHTING: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    """A row of x [m, k] (+ residual -> h), RMSNorm by w [k], -> codes q [m, kp / 2] and scales s [m, kp / GROUP].

    whole [1] is NVFP4's global scale (None: MXFP4). A row longer than BLOCK (LOOP) is read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    OUT: tl.constexpr = x_ptr.dtype.element_ty
    whole = None
    if whole_ptr is not None:
        whole = tl.load(whole_ptr)
    cols = _places(0, GROUP, BLOCK)
    x = _row(x_ptr, residual_ptr, row, cols, k)
    if residual_ptr is not None:
        tl.store(h_ptr + row * k + cols, x.to(OUT), mask=cols < k)
    squares = x * x
    if LOOP:
        for start in range(BLOCK, k, BLOCK):
            cols = _places(start, GROUP, BLOCK)
            more = _row(x_ptr, residual_ptr, row, cols, k)
            if residual_ptr is not None:
                tl.store(h_ptr + row * k + cols, more.to(OUT), mask=cols < k)
            squares += more * more
    mean = tl.math.div_rn(tl.sum(tl.sum(squares, 1), 0), tl.full((), 0.0, tl.float32) + k)
    inverse = tl.math.rsqrt(mean + eps)
    y = _weighted(x, inverse, w_ptr, _places(0, GROUP, BLOCK), k, WEIGHTING, OUT)
    _store_fp4(y, whole, q_ptr, s_ptr, row, 0, groups, GROUP, BLOCK)
    if LOOP:
        for start in range(BLOCK, k, BLOCK):
            cols = _places(start, GROUP, BLOCK)
            y = _weighted(_row(x_ptr, residual_ptr, row, cols, k), inverse, w_ptr, cols, k, WEIGHTING, OUT)
            _store_fp4(y, whole, q_ptr, s_ptr, row, start, groups, GROUP, BLOCK)


@triton.jit(do_not_specialize=["count"])
def quantize_rows_kernel(
    x_ptr, maxima_ptr, whole_ptr, q_ptr, s_ptr, count, k, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row of x [m, k] -> NVFP4 codes and scales; the global scale, from maxima [count], also to whole [1]."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    places = tl.arange(0, STEP)
    largest = tl.zeros((STEP,), tl.float32)
    for first in range(0, count, STEP):
        some = tl.load(maxima_ptr + first + places, mask=first + places < count, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, some, propagate_nan=ALL_NAN)
    amax = tl.maximum(_amax(largest, 0), 2.0**-100, propagate_nan=ALL_NAN)
    whole = tl.math.div_rn(amax, 2688.0)
    if (row == 0) & (start == 0):
        tl.store(whole_ptr, whole)
    x = _row(x_ptr, None, row, _places(start, GROUP, BLOCK), k)
    _store_fp4(x, whole, q_ptr, s_ptr, row, start, groups, GROUP, BLOCK)
