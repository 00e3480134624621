"""Triton source of 8-bit scaled matrix products: y[m, n] = (x[m, k] @ w[n, k].T) * x scale * w scale + bias.

Three kernels for three ranges of m, and the sum of split-K parts. All read weights in row form ("rows") and never use
float atomics, so equal inputs give equal bits. ``triton_scaled_mm`` chooses among them and launches them.

* ``gemv_kernel``: m <= 4, no tensor cores; each program streams whole rows of w.
* ``slices_kernel``: m <= 16; each warp multiplies its own slice of k and the slices are summed inside the program.
* ``tile_kernel``: any m, symmetric in its operands; a decode step passes w as the tall operand a.

Accumulation is int32 (exact) for int8 and f32 for fp8. Scales are applied in f32, x's first, as the references do.
Arguments that change with m are not specialized, so that a new m never compiles again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quant_compile.lowering.kernels._triton_pieces import _dp4a, _only_if, _tile_of, _words


@triton.jit
def _start_early(w_rows, line, k, LINES: tl.constexpr, PDL: tl.constexpr):
    """Under programmatic dependent launch: fetch LINES cache lines of each row of w into L2, then wait for the inputs.

    The grid may start while the kernel before it still runs. Until ``gdc_wait`` returns nothing may be read or written,
    so weights are only prefetched, which is right even if that kernel writes them. ``line``: elements per 128 bytes.
    """
    if PDL:
        at = w_rows + tl.minimum(tl.arange(0, LINES) * line, k - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _gemv_input(
    x_ptr, sx_ptr, row, cols, k, sx_group, block_scale, EVEN_K: tl.constexpr, GROUP_K: tl.constexpr, ACC: tl.constexpr
):
    """One row of x at ``cols`` as ACC, times its group scales and the weight's block scales when there are any."""
    x_row = x_ptr + row * k
    if EVEN_K:
        x = tl.load(x_row + cols, eviction_policy="evict_last")
    else:
        x = tl.load(x_row + cols, mask=cols < k, other=0.0)
    if GROUP_K > 0:
        group_scale = tl.load(sx_ptr + (cols // GROUP_K) * sx_group, mask=cols < k, other=0.0)
        return x.to(ACC) * (group_scale * block_scale)
    return x.to(ACC)


@triton.jit
def _gemv_step(w, x, total, DP4A: tl.constexpr, VECTOR: tl.constexpr):
    """total [rows, c] + w [rows, c * VECTOR] * x, summed over VECTOR neighbours, which one thread holds."""
    if DP4A:
        return _dp4a(w, tl.broadcast_to(x[None, :], w.shape), total)
    return total + tl.sum(tl.reshape(w * x[None, :], (w.shape[0], w.shape[1] // VECTOR, VECTOR)), 2)


@triton.jit
def _gemv_store(
    total, y_ptr, sx_ptr, scale_w, bias, row, rows, m, n, sx_row, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr
):
    y = tl.sum(total, 1).to(tl.float32)
    if not GROUPED:
        y = y * tl.load(sx_ptr + tl.minimum(row, m - 1) * sx_row) * scale_w
    if HAS_BIAS:
        y = y + bias
    tl.store(y_ptr + row * n + rows, y.to(y_ptr.dtype.element_ty), mask=_only_if(rows < n, row < m))


@triton.jit(do_not_specialize=["m", "sx_group"])
def gemv_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    sx_row,
    sx_group,
    sw_row,
    sw_group,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    INTEGER: tl.constexpr,
    DP4A: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PIPELINE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows [pid * BLOCK_N, +BLOCK_N) of w times the M (1, 2 or 4) >= m rows of x.

    Under DP4A x and w are read as int32 words of int8, and k and BLOCK_K count words. GROUP_K > 0: scales per group of
    GROUP_K inputs and block of GROUP_N rows; BLOCK_N divides GROUP_N, so a program meets one row of weight scales.
    """
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    VECTOR: tl.constexpr = 1 if DP4A else 16
    if DP4A:
        x_ptr, w_ptr = _words(x_ptr, tl.int32), _words(w_ptr, tl.int32)
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    w_rows = w_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * k
    _start_early(w_rows, 32 if DP4A else 128, k, 32, PDL)
    total0 = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), ACC)
    total1 = total0
    total2 = total0
    total3 = total0
    for start in tl.range(0, k, BLOCK_K, num_stages=PIPELINE):
        cols = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            w = tl.load(w_rows + cols[None, :], eviction_policy="evict_first").to(ACC)
        else:
            w = tl.load(w_rows + cols[None, :], mask=(cols < k)[None, :], other=0.0).to(ACC)
        block_scale = 1.0
        if GROUP_K > 0:
            sw_at = sw_ptr + (first // GROUP_N) * sw_row + (cols // GROUP_K) * sw_group
            block_scale = tl.load(sw_at, mask=cols < k, other=0.0)
        x = _gemv_input(x_ptr, sx_ptr, 0, cols, k, sx_group, block_scale, EVEN_K, GROUP_K, ACC)
        total0 = _gemv_step(w, x, total0, DP4A, VECTOR)
        if M > 1:
            row = tl.minimum(1, m - 1)
            x = _gemv_input(x_ptr, sx_ptr + row * sx_row, row, cols, k, sx_group, block_scale, EVEN_K, GROUP_K, ACC)
            total1 = _gemv_step(w, x, total1, DP4A, VECTOR)
        if M > 2:
            row = tl.minimum(2, m - 1)
            x = _gemv_input(x_ptr, sx_ptr + row * sx_row, row, cols, k, sx_group, block_scale, EVEN_K, GROUP_K, ACC)
            total2 = _gemv_step(w, x, total2, DP4A, VECTOR)
            row = tl.minimum(3, m - 1)
            x = _gemv_input(x_ptr, sx_ptr + row * sx_row, row, cols, k, sx_group, block_scale, EVEN_K, GROUP_K, ACC)
            total3 = _gemv_step(w, x, total3, DP4A, VECTOR)
    GROUPED: tl.constexpr = GROUP_K > 0
    scale_w = 1.0
    bias = 0.0
    if not GROUPED:
        scale_w = tl.load(sw_ptr + rows * sw_row, mask=rows < n, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
    _gemv_store(total0, y_ptr, sx_ptr, scale_w, bias, 0, rows, m, n, sx_row, GROUPED, HAS_BIAS)
    if M > 1:
        _gemv_store(total1, y_ptr, sx_ptr, scale_w, bias, 1, rows, m, n, sx_row, GROUPED, HAS_BIAS)
    if M > 2:
        _gemv_store(total2, y_ptr, sx_ptr, scale_w, bias, 2, rows, m, n, sx_row, GROUPED, HAS_BIAS)
        _gemv_store(total3, y_ptr, sx_ptr, scale_w, bias, 3, rows, m, n, sx_row, GROUPED, HAS_BIAS)


@triton.jit(do_not_specialize=["m", "sx_group"])
def slices_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    sx_row,
    sx_group,
    sw_row,
    sw_group,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows [pid * BLOCK_N, +BLOCK_N) of w times all m <= BLOCK_M rows of x.

    A step takes SLICES * BLOCK_K of k as a batched product [SLICES, BLOCK_N, BLOCK_K] x [SLICES, BLOCK_K, BLOCK_M];
    Triton gives each warp one batch, so small outputs still keep all warps busy and w goes to registers once.
    """
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    STEP: tl.constexpr = SLICES * BLOCK_K
    slices = tl.arange(0, SLICES) * BLOCK_K
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    w_cols = slices[:, None, None] + inner[None, None, :]
    x_cols = slices[:, None, None] + inner[None, :, None]
    w_rows = w_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * k
    _start_early(w_rows, 128, k, 8, PDL)
    w_at = w_rows[None, :, :] + w_cols
    x_at = x_ptr + tl.minimum(tokens, m - 1)[None, None, :] * k + x_cols
    total = tl.zeros((SLICES, BLOCK_N, BLOCK_M), ACC)
    for start in range(0, k, STEP):
        if EVEN_K:
            w = tl.load(w_at + start)
            x = tl.load(x_at + start)
        else:
            w = tl.load(w_at + start, mask=w_cols < k - start, other=0.0)
            x = tl.load(x_at + start, mask=x_cols < k - start, other=0.0)
        if GROUP_K > 0:
            groups = (start + slices) // GROUP_K
            inside = start + slices < k
            sw_at = sw_ptr + (tl.minimum(rows, n - 1) // GROUP_N)[None, :] * sw_row + groups[:, None] * sw_group
            sx_at = sx_ptr + tl.minimum(tokens, m - 1)[None, :] * sx_row + groups[:, None] * sx_group
            scale_w = tl.load(sw_at, mask=inside[:, None], other=0.0)
            scale_x = tl.load(sx_at, mask=inside[:, None], other=0.0)
            total += tl.dot(w, x) * scale_w[:, :, None] * scale_x[:, None, :]
        else:
            total = tl.dot(w, x, total, out_dtype=ACC)
    y = tl.sum(total, 0).to(tl.float32)
    if GROUP_K == 0:
        scale_x = tl.load(sx_ptr + tl.minimum(tokens, m - 1) * sx_row)
        scale_w = tl.load(sw_ptr + rows * sw_row, mask=rows < n, other=0.0)
        y = y * scale_x[None, :] * scale_w[:, None]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    inside = (rows < n)[:, None] & (tokens < m)[None, :]
    tl.store(y_ptr + tokens[None, :] * n + rows[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows_a", "rows_b", "sa_group", "sb_group", "steps"])
def tile_kernel(
    a_ptr,
    b_ptr,
    sa_ptr,
    sb_ptr,
    bias_ptr,
    y_ptr,
    rows_a,
    rows_b,
    k,
    y_a,
    y_b,
    sa_row,
    sa_group,
    sb_row,
    sb_group,
    steps,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    SPLIT: tl.constexpr,
    W_IS_A: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROMOTE: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile [BLOCK_A, BLOCK_B] of a [rows_a, k] @ b [rows_b, k].T, written at y + i * y_a + j * y_b.

    One operand is x, the other w (W_IS_A says which). SPLIT > 1: program_id(1) sums ``steps`` steps of k and writes
    its raw accumulator to part program_id(1) of y, which is then a workspace; scales and bias are left to
    ``reduce_kernel``, group scales excepted. PROMOTE: sm90's fp8 tensor cores keep about 14 bits of their sum; add it
    to an f32 register every BLOCK_K. TMA: a_ptr and b_ptr are tensor descriptors of blocks [BLOCK, BLOCK_K].
    """
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    IMPRECISE: tl.constexpr = BLOCK_K if PROMOTE else None
    tile_a, tile_b = _tile_of(tl.program_id(0), tl.cdiv(rows_a, BLOCK_A), tl.cdiv(rows_b, BLOCK_B), BAND)
    part = tl.program_id(1)
    at_a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    at_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    clip_a = tl.minimum(at_a, rows_a - 1)
    clip_b = tl.minimum(at_b, rows_b - 1)
    cols = tl.arange(0, BLOCK_K)
    if not TMA:
        a_rows = a_ptr + clip_a.to(tl.int64)[:, None] * k
        _start_early(a_rows, 128, k, 8, PDL and W_IS_A)
        a_at = a_rows + cols[None, :]
        b_at = b_ptr + clip_b.to(tl.int64)[None, :] * k + cols[:, None]
    GROUP_A: tl.constexpr = GROUP_N if W_IS_A else 1
    GROUP_B: tl.constexpr = 1 if W_IS_A else GROUP_N
    total = tl.zeros((BLOCK_A, BLOCK_B), ACC)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(k, BLOCK_K))):
        start = step * BLOCK_K
        if TMA:
            a = a_ptr.load([tile_a * BLOCK_A, start])
            b = b_ptr.load([tile_b * BLOCK_B, start]).T
        elif EVEN_K:
            a = tl.load(a_at + start)
            b = tl.load(b_at + start)
        else:
            a = tl.load(a_at + start, mask=(cols < k - start)[None, :], other=0.0)
            b = tl.load(b_at + start, mask=(cols < k - start)[:, None], other=0.0)
        if GROUP_K > 0:
            group = start // GROUP_K
            scale_a = tl.load(sa_ptr + (clip_a // GROUP_A) * sa_row + group * sa_group)
            scale_b = tl.load(sb_ptr + (clip_b // GROUP_B) * sb_row + group * sb_group)
            total += tl.dot(a, b) * (scale_a[:, None] * scale_b[None, :])
        else:
            total = tl.dot(a, b, total, out_dtype=ACC, max_num_imprecise_acc=IMPRECISE)
    inside = (at_a < rows_a)[:, None] & (at_b < rows_b)[None, :]
    y_at = y_ptr + at_a.to(tl.int64)[:, None] * y_a + at_b.to(tl.int64)[None, :] * y_b
    if SPLIT > 1:
        size = rows_a.to(tl.int64) * rows_b
        tl.store(y_at + part * size, total, mask=inside)
    else:
        y = total.to(tl.float32)
        if GROUP_K == 0:
            scale_a = tl.load(sa_ptr + clip_a * sa_row)[:, None]
            scale_b = tl.load(sb_ptr + clip_b * sb_row)[None, :]
            y = (y * scale_b * scale_a) if W_IS_A else (y * scale_a * scale_b)
        if HAS_BIAS:
            if W_IS_A:
                y = y + tl.load(bias_ptr + clip_a).to(tl.float32)[:, None]
            else:
                y = y + tl.load(bias_ptr + clip_b).to(tl.float32)[None, :]
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m"])
def reduce_kernel(
    parts_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    sx_row,
    sw_row,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y[m, n] = sum of SPLIT parts [SPLIT, m, n] in order (times both scales when SCALED) + bias."""
    row = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * n + cols
    size = tl.cast(m, tl.int64) * n
    total = tl.load(parts_ptr + at, mask=cols < n, other=0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + at + part * size, mask=cols < n, other=0)
    y = total.to(tl.float32)
    if SCALED:
        y = y * tl.load(sx_ptr + row * sx_row) * tl.load(sw_ptr + cols * sw_row, mask=cols < n, other=0.0)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=cols < n)
