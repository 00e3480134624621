"""Triton source of fused expert blocks with GGUF weights; ``triton_gguf_moe`` chooses tiles and launches.

The block, its grouped form and its promises are those of ``_triton_frame``; codes become numbers as in ``_triton_gguf``. The decode
form multiplies row by row, each pair of a token and an expert for itself, and leaves the sum over experts to ``sum_kernel``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _tile_of, _words
from quant_compile.lowering.kernels.experts._triton_frame import _activate, _block_at, _store_block
from quant_compile.lowering.kernels.gguf._triton_gguf import (
    _byte_weights,
    _dots,
    _high_words,
    _load_high,
    _matrices,
    _scale_words,
    _scales,
    _step_scales,
)

# --- few pairs: rows of the chosen experts, on plain cores ---


@triton.jit
def _with_bias(total, bias_ptr, row):
    """A row's sum, plus its bias."""
    y = tl.sum(total, 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    return y


@triton.jit
def rows_kernel(
    x_ptr, w_ptr, h_ptr, s_ptr, d_ptr, bias_ptr, ids_ptr, y_ptr, n, groups, top_k, experts, near, far, byte, zero,
    GATED: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    EVEN: tl.constexpr, BF16: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    SHIFT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """BN values at program_id(0) of pair program_id(1) -> y [pairs, n]; BN divides n.

    GATED: hidden values, from as many gate and up rows and the pair's token in x. Otherwise rows of w times the pair's row of x.
    """
    pair = tl.program_id(1)
    expert = tl.load(ids_ptr + pair)
    if (expert < 0) | (expert >= experts):
        return
    h_ptr = _high_words(h_ptr, BITS)
    s_ptr, d_ptr = _scale_words(s_ptr, d_ptr, KIND)
    x_ptr = _words(x_ptr, tl.int64 if BITS == 8 else tl.int32)
    WIDTH: tl.constexpr = 8 if BITS == 8 else 16
    ALL: tl.constexpr = 2 * BN if GATED else BN
    first = tl.program_id(0) * BN
    own = expert.to(tl.int64) * n * (2 if GATED else 1) + first
    rows = ()
    for r in tl.static_range(BN):
        rows = rows + (own + r,)
    if GATED:
        for r in tl.static_range(BN):
            rows = rows + (own + n + r,)
    token = (pair // top_k if GATED else pair).to(tl.int64)
    totals = _dots(
        (x_ptr + token * (groups * WIDTH),), rows, _words(w_ptr, tl.int32), h_ptr, s_ptr, d_ptr, groups, near, far, byte, zero,
        1, ALL, G, BITS, KIND, ZERO, EVEN, BF16,
    )  # fmt: skip
    for r in tl.static_range(BN):
        y = _with_bias(totals[r], bias_ptr, own + r)
        if GATED:
            up = _with_bias(totals[BN + r], bias_ptr, own + n + r)
            y = _activate(y, up, ACT, ALPHA, LIMIT, SHIFT, OUT)
        tl.store(y_ptr + pair.to(tl.int64) * n + first + r, y.to(OUT))


# --- blocks of pairs times weights, on tensor cores ---


@triton.jit
def _codes_at(w_at, h_ptr, rows, start, column, groups, G: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Words (8 bits: codes) of one step, and their high bits."""
    WORDS: tl.constexpr = 32 if BITS == 8 else 8
    live = column // WORDS < groups - start
    if EVEN:
        w = tl.load(w_at + start * WORDS)
    else:
        w = tl.load(w_at + start * WORDS, mask=live[None, :], other=0)
    h = w
    if BITS == 5 or BITS == 6:
        h = _load_high(h_ptr, rows, start, groups, G, BITS, EVEN)
    return w, h


@triton.jit
def _add_step(
    total, w, h, own, whole, x,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, OUT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_N, BLOCK_M] + codes of one step, under their scales, times the inputs x (a tuple: one for each place)."""
    scales = _scales(own, whole, KIND, ZERO)
    if BITS == 8:
        total = tl.dot(_byte_weights(w, scales[0], OUT, ASM), x[0], total)
    else:
        matrices = _matrices(w, h, scales, OUT, BITS, KIND, ASM)
        for j in tl.static_range(4):
            total = tl.dot(matrices[j], x[j], total)
    return total


@triton.jit(do_not_specialize=["most_blocks"])
def grouped_kernel(
    x_ptr, w_ptr, h_ptr, s_ptr, d_ptr, bias_ptr, y_ptr, sorted_ptr, blocks_ptr, most_blocks, n, groups, top_k,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, G: tl.constexpr, BAND: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr, ACT: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, OUT: tl.constexpr, ASM: tl.constexpr,
    PLACED: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """One block of pairs times BLOCK_N rows (GATED: as many gate and as many up rows) of its expert's weight.

    GATED: x are tokens [T, k], gathered; y is the hidden layer [pairs, n] in the order of ``sorted``. Otherwise x is the hidden
    layer in that order; y [pairs, n] is in the order of the pairs. A step is G groups. PLACED: columns of x are ordered by place, as in
    ``matmul_kernel``; NEXT: y's are for steps of that many groups (0: they are not).
    """
    WORDS: tl.constexpr = 32 if BITS == 8 else 8
    PLACES: tl.constexpr = 1 if BITS == 8 else 4
    if EVEN:
        groups = tl.multiple_of(groups, G)
    w_ptr = _words(w_ptr, tl.int8 if BITS == 8 else tl.int16)
    s_ptr, d_ptr = _scale_words(s_ptr, d_ptr, KIND)
    if BITS == 5 or BITS == 6:
        h_ptr = _words(h_ptr, tl.uint8)
    block, tile = _tile_of(tl.program_id(0), most_blocks, tl.cdiv(n, BLOCK_N), BAND)
    count = tl.load(blocks_ptr + 2 * most_blocks + block)
    if count == 0:
        return
    expert, lanes, first, place, x_row = _block_at(
        sorted_ptr, blocks_ptr, most_blocks, block, count, top_k, BLOCK_M, GATED
    )
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    line = expert * n * (2 if GATED else 1) + tl.minimum(rows, n - 1)
    column = tl.arange(0, WORDS * G)
    w_at = w_ptr + line[:, None] * (groups * WORDS) + column[None, :]
    up_at = w_at + tl.cast(n, tl.int64) * groups * WORDS
    spread = column if PLACED else column // WORDS * 32 + column % WORDS
    x_at = x_ptr + x_row.to(tl.int64)[None, :] * (groups * 32) + spread[:, None]
    PLACE: tl.constexpr = 8 * G if PLACED else 8
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total_up = total
    for start in range(0, groups, G):
        x = ()
        for j in tl.static_range(PLACES):
            here = x_at + start * 32 + PLACE * j
            if EVEN:
                x = x + (tl.load(here),)
            else:
                x = x + (tl.load(here, mask=(column // WORDS < groups - start)[:, None], other=0.0),)
        own, whole = _step_scales(s_ptr, d_ptr, line, start, groups, G, KIND, EVEN)
        w, h = _codes_at(w_at, h_ptr, line, start, column, groups, G, BITS, EVEN)
        total = _add_step(total, w, h, own, whole, x, BITS, KIND, ZERO, OUT, ASM)
        if GATED:
            own, whole = _step_scales(s_ptr, d_ptr, line + n, start, groups, G, KIND, EVEN)
            w, h = _codes_at(up_at, h_ptr, line + n, start, column, groups, G, BITS, EVEN)
            total_up = _add_step(total_up, w, h, own, whole, x, BITS, KIND, ZERO, OUT, ASM)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + line).to(tl.float32)[:, None]
    if GATED:
        if bias_ptr is not None:
            total_up += tl.load(bias_ptr + line + n).to(tl.float32)[:, None]
        total = _activate(total, total_up, ACT, ALPHA, LIMIT, SHIFT, OUT)
        y_row = first + lanes
    else:
        y_row = tl.load(sorted_ptr + place)
    columns = rows
    if NEXT > 0:  # group, place and word of a column -> place, group and word
        columns = rows // (32 * NEXT) * (32 * NEXT) + rows // 8 % 4 * (8 * NEXT) + rows // 32 % NEXT * 8 + rows % 8
    _store_block(y_ptr, total, y_row, rows, columns, lanes, count, n)
