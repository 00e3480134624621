"""Triton source of fused mixture-of-experts blocks; ``triton_moe`` chooses among the kernels and launches them.

Grouped form, any number of tokens: ``count_kernel`` and ``align_kernel`` sort (token, expert) pairs by expert and cut them
into blocks, ``grouped_kernel`` multiplies blocks by their expert's weight (twice), ``quantize_kernel`` quantizes hidden
rows where that isn't fused, ``sum_kernel`` adds a token's experts. Decode form, few pairs: ``gated_rows_kernel`` and
``down_rows_kernel`` stream the chosen experts' rows through plain cores.

Weights are in row form with a leading expert. Sums have a fixed order and there are no atomics: equal inputs give equal
bits. An id outside of 0..E-1 is never used as an address. Arguments that change with the tokens aren't specialized.
"""

from __future__ import annotations

import triton
import triton.language as tl

ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)

# --- pieces ---


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
    if tl.int8 == CODE:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: whole numbers are the next floats
    return x.to(CODE)


@triton.jit
def _activate(
    gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, OUT: tl.constexpr
):
    """The expert's activation in f32 on values rounded to OUT, result rounded to OUT, as f32."""
    gate = gate.to(OUT).to(tl.float32)
    up = up.to(OUT).to(tl.float32)
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=ALL_NAN)
        up = tl.minimum(up, LIMIT, propagate_nan=ALL_NAN)
        up = tl.maximum(up, -LIMIT, propagate_nan=ALL_NAN)
    if KIND == "silu":
        gate = gate * tl.sigmoid(gate * ALPHA)
    elif KIND == "gelu":
        gate = gate * 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u)
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = tl.maximum(gate, 0.0, propagate_nan=ALL_NAN)
    return (gate * (up + SHIFT)).to(OUT).to(tl.float32)


# --- pairs by expert ---


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(ids_ptr, counts_ptr, pairs, CHUNK: tl.constexpr):
    """counts[e] of expert e = program_id(0)."""
    expert = tl.program_id(0)
    total = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1)
        total += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(total, 0))


@triton.jit(do_not_specialize=["pairs", "most_blocks"])
def align_kernel(
    ids_ptr,
    counts_ptr,
    sorted_ptr,
    blocks_ptr,
    pairs,
    most_blocks,
    experts,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Expert e = program_id(0) writes its pairs, ascending, to its place in sorted [pairs], and its blocks' entries.

    blocks [3, most_blocks]: expert, first place in ``sorted``, and number of pairs (at most BLOCK_M; 0 past the last block).
    Without counts (None) every program counts all experts itself, ROWS pairs at a time.
    """
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    if counts_ptr is None:
        seen = tl.zeros((ROWS, EXPERTS), tl.int32)
        for start in range(0, pairs, ROWS):
            at = start + tl.arange(0, ROWS)
            ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1)
            seen += (ids[:, None] == every[None, :]).to(tl.int32)
        counts = tl.where(every < experts, tl.sum(seen, 0), 0)
    else:
        counts = tl.load(counts_ptr + every, mask=every < experts, other=0)
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(every < expert, counts, 0), 0)
    first_block = tl.sum(tl.where(every < expert, needed, 0), 0)
    own = tl.sum(tl.where(every == expert, counts, 0), 0)
    own_blocks = (own + BLOCK_M - 1) // BLOCK_M
    lanes = tl.arange(0, 128)
    for start in range(0, own_blocks, 128):
        block = start + lanes
        inside = block < own_blocks
        at = blocks_ptr + first_block + block
        tl.store(at, tl.zeros((128,), tl.int32) + expert, mask=inside)
        tl.store(at + most_blocks, first + block * BLOCK_M, mask=inside)
        tl.store(at + 2 * most_blocks, tl.minimum(own - block * BLOCK_M, BLOCK_M), mask=inside)
    for start in range(tl.sum(needed, 0) + expert * 128, most_blocks, experts * 128):
        block = start + lanes
        tl.store(blocks_ptr + 2 * most_blocks + block, tl.zeros((128,), tl.int32), mask=block < most_blocks)
    if own > 0:
        place = first
        for start in range(0, pairs, CHUNK):
            at = start + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + at, mask=at < pairs, other=-1)
            hit = (ids == expert).to(tl.int32)
            tl.store(sorted_ptr + place + tl.cumsum(hit, 0) - hit, at, mask=hit > 0)
            place += tl.sum(hit, 0)


# --- blocks of pairs times weights, on tensor cores ---


@triton.jit
def _tile_of(pid, blocks, tiles, BAND: tl.constexpr):
    """(block, tile) of program ``pid``: BAND blocks are walked tile by tile, which keeps both operands in L2."""
    band = BAND * tiles
    first = (pid // band) * BAND
    height = tl.minimum(blocks - first, BAND)
    return first + (pid % band) % height, (pid % band) // height


@triton.jit
def _weights(
    w_ptr, w_at, line, start, cols, k, TMA: tl.constexpr, EVEN_K: tl.constexpr, W4: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Codes [BLOCK_N, BLOCK_K] of one step (W4: bytes [BLOCK_N, BLOCK_K / 2]); ``cols`` are places in a row."""
    if W4:
        start = start // 2
        k = k // 2
    if TMA:
        w = w_ptr.load([line, start])
    elif EVEN_K:
        w = tl.load(w_at + start)
    else:
        w = tl.load(w_at + start, mask=(cols < k - start)[None, :], other=0.0)
    return w


@triton.jit
def _zero_points(zero_ptr, rows, group, zero_row):
    """Zero points of ``rows`` in a group, two to a byte, f32; 8 without a plane."""
    if zero_ptr is None:
        zero = tl.full(rows.shape, 8.0, tl.float32)
    else:
        pair = tl.load(zero_ptr + rows * zero_row + group // 2).to(tl.int32)
        zero = ((pair >> (group % 2 * 4)) & 15).to(tl.float32)
    return zero


@triton.jit
def _multiply(
    total,
    w,
    x,
    rows,
    sw_ptr,
    zero_ptr,
    scale_x,
    start,
    sw_row,
    zero_row,
    W4: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    """total [BLOCK_N, BLOCK_M] + w x, times group scales where there are groups; ``scale_x`` None: x has none."""
    group = 0
    if GROUP_K > 0:
        group = start // GROUP_K
    if W4:
        # A code or-ed into the mantissa of 128 (bf16) or 1024 (f16) is 128 + code: no integer conversion.
        MAGIC: tl.constexpr = 0x4300 if x.dtype == tl.bfloat16 else 0x6400
        BASE: tl.constexpr = 128.0 if x.dtype == tl.bfloat16 else 1024.0
        codes = tl.join(w & 15, w >> 4).reshape((w.shape[0], w.shape[1] * 2)).to(tl.uint16) | MAGIC
        offset = (_zero_points(zero_ptr, rows, group, zero_row) + BASE).to(x.dtype)
        w = codes.to(x.dtype, bitcast=True) - offset[:, None]
    elif w.dtype == tl.int8 and x.dtype != tl.int8:
        w = w.to(x.dtype)
    if GROUP_K > 0:
        scale_w = tl.load(sw_ptr + (rows // GROUP_N) * sw_row + group).to(tl.float32)
        if scale_x is None:
            total += tl.dot(w, x) * scale_w[:, None]
        else:
            total += tl.dot(w, x) * (scale_w[:, None] * scale_x[None, :])
    else:
        IMPRECISE: tl.constexpr = w.shape[1] if PROMOTE else None
        total = tl.dot(w, x, total, out_dtype=total.dtype, max_num_imprecise_acc=IMPRECISE)
    return total


@triton.jit
def _finish(total, rows, scale_x, sw_ptr, bias_ptr, sw_row, SCALED: tl.constexpr):
    """Row scales (unless groups were applied already) and bias, f32."""
    y = total.to(tl.float32)
    if SCALED:
        if scale_x is not None:
            y = y * scale_x[None, :]
        y = y * tl.load(sw_ptr + rows * sw_row).to(tl.float32)[:, None]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    return y


@triton.jit(do_not_specialize=["most_blocks", "sx_group"])
def grouped_kernel(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    zero_ptr,
    bias_ptr,
    scale2_ptr,
    y_ptr,
    sy_ptr,
    sorted_ptr,
    blocks_ptr,
    most_blocks,
    n,
    k,
    top_k,
    sx_row,
    sx_group,
    sw_expert,
    sw_row,
    zero_expert,
    zero_row,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    W4: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    PROMOTE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    OUT: tl.constexpr,
):
    """One block of pairs times BLOCK_N rows (GATED: as many gate and as many up rows) of its expert's weight.

    GATED: x are tokens [T, k], gathered; y is the hidden layer [pairs, n] in the order of ``sorted``, as OUT, or as codes
    with QUANTIZE: 0 no, else the largest code, under scale2 [1] or, without one, with a scale sy [pairs, n / BLOCK_N] of its
    own for each BLOCK_N. Otherwise x is the hidden layer in that order and y [pairs, n] is in the order of the pairs.
    The weight is the tall operand, so that few tokens fill an instruction. TMA: w_ptr is a descriptor of [E * rows, k].
    """
    block, tile = _tile_of(tl.program_id(0), most_blocks, tl.cdiv(n, BLOCK_N), BAND)
    count = tl.load(blocks_ptr + 2 * most_blocks + block)
    if count == 0:
        return
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    first = tl.load(blocks_ptr + most_blocks + block)
    lanes = tl.arange(0, BLOCK_M)
    place = first + tl.minimum(lanes, count - 1)
    if GATED:
        x_row = tl.load(sorted_ptr + place) // top_k
    else:
        x_row = place
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(rows, n - 1)
    cols = tl.arange(0, BLOCK_K)
    spots = tl.arange(0, BLOCK_K // 2) if W4 else cols
    all_rows = 2 * n if GATED else n
    line = expert.to(tl.int32) * all_rows + tile * BLOCK_N
    w_at = w_ptr
    if not TMA:
        width = k // 2 if W4 else k
        w_at = w_ptr + expert * all_rows * width + near[:, None] * width + spots[None, :]
    up_at = w_at
    if GATED and not TMA:
        up_at = w_at + n.to(tl.int64) * width
    x_at = x_ptr + x_row.to(tl.int64)[None, :] * k + cols[:, None]
    sw_at = sw_ptr + expert * sw_expert
    zero_at = zero_ptr
    if zero_ptr is not None:
        zero_at = zero_ptr + expert * zero_expert
    bias_at = bias_ptr
    if bias_ptr is not None:
        bias_at = bias_ptr + expert * all_rows
    sx_at = sx_ptr
    if sx_ptr is not None:
        sx_at = sx_ptr + x_row.to(tl.int64) * sx_row
    scale_x = None
    ACC: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    total_up = total
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at + start)
        else:
            x = tl.load(x_at + start, mask=(cols < k - start)[:, None], other=0.0)
        group_x = None
        if GROUP_K > 0 and sx_ptr is not None:
            group_x = tl.load(sx_at + start // GROUP_K * sx_group)
        w = _weights(w_ptr, w_at, line, start, spots, k, TMA, EVEN_K, W4, BLOCK_K)
        total = _multiply(
            total, w, x, near, sw_at, zero_at, group_x, start, sw_row, zero_row, W4, GROUP_K, GROUP_N, PROMOTE
        )
        if GATED:
            w = _weights(w_ptr, up_at, line + n, start, spots, k, TMA, EVEN_K, W4, BLOCK_K)
            total_up = _multiply(
                total_up, w, x, near + n, sw_at, zero_at, group_x, start, sw_row, zero_row, W4, GROUP_K, GROUP_N,
                PROMOTE,
            )  # fmt: skip
    if GROUP_K == 0 and sx_ptr is not None:
        scale_x = tl.load(sx_at)
    y = _finish(total, near, scale_x, sw_at, bias_at, sw_row, GROUP_K == 0)
    inside = (rows < n)[:, None] & (lanes < count)[None, :]
    if GATED:
        up = _finish(total_up, near + n, scale_x, sw_at, bias_at, sw_row, GROUP_K == 0)
        y = _activate(y, up, KIND, ALPHA, LIMIT, SHIFT, OUT)
        y_row = first + lanes
        if QUANTIZE > 0:
            if scale2_ptr is not None:
                inverse = tl.math.div_rn(tl.full((1, 1), 1.0, tl.float32), tl.load(scale2_ptr))
            else:
                scale, inverse = _scale_of(_amax(tl.where((rows < n)[:, None], y, 0.0), 0), QUANTIZE)
                sy_at = sy_ptr + y_row.to(tl.int64) * tl.cdiv(n, BLOCK_N) + tile
                tl.store(sy_at, scale, mask=lanes < count)
                inverse = inverse[None, :]
            y = _codes(y, inverse, QUANTIZE, y_ptr.dtype.element_ty)
    else:
        y_row = tl.load(sorted_ptr + place)
    y_at = y_ptr + y_row.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantize_kernel(h_ptr, q_ptr, scale_ptr, n, BLOCK: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr):
    """Hidden row program_id(0) [n] -> codes and a scale per row (GROUP 0) or for each GROUP columns."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    h = tl.load(h_ptr + row * n + cols, mask=cols < n, other=0.0).to(tl.float32)
    if GROUP == 0:
        scale, inverse = _scale_of(_amax(h[None, :], 1), LIMIT)
        tl.store(scale_ptr + row + tl.arange(0, 1), scale)
        codes = _codes(h, inverse, LIMIT, q_ptr.dtype.element_ty)
    else:
        GROUPS: tl.constexpr = BLOCK // GROUP
        grouped = h.reshape((GROUPS, GROUP))
        scale, inverse = _scale_of(_amax(grouped, 1), LIMIT)
        real = tl.cdiv(n, GROUP)
        at = tl.arange(0, GROUPS)
        tl.store(scale_ptr + row * real + at, scale, mask=at < real)
        codes = _codes(grouped, inverse[:, None], LIMIT, q_ptr.dtype.element_ty).reshape((BLOCK,))
    tl.store(q_ptr + row * n + cols, codes, mask=cols < n)


@triton.jit
def sum_kernel(parts_ptr, ids_ptr, weights_ptr, y_ptr, n, top_k, experts, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """y[t] = sum of weights[t, j] * parts[t * top_k + j] over j with a legal id, in f32, rounded once."""
    token = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.arange(0, TOP_K)
    pairs = token * top_k + slots
    ids = tl.load(ids_ptr + pairs, mask=slots < top_k, other=-1)
    legal = (ids >= 0) & (ids < experts)
    mask = legal[:, None] & (cols < n)[None, :]
    parts = tl.load(parts_ptr + pairs[:, None] * n + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if weights_ptr is not None:
        parts = parts * tl.load(weights_ptr + pairs, mask=legal, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + token * n + cols, tl.sum(parts, 0).to(y_ptr.dtype.element_ty), mask=cols < n)
