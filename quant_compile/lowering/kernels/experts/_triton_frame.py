"""Triton source of what all fused expert blocks share, whatever their scheme; ``_frame`` launches what is a kernel of its own.

Grouped form: ``count_kernel`` and ``align_kernel`` sort (token, expert) pairs by expert and cut them into blocks; ``_block_at``,
``_weight_rows``, ``_units`` and ``_store_block`` are what a product of blocks by their experts' weights begins and ends with;
``sum_kernel`` adds a token's experts. Decode form: ``_stream`` to ``_store_token``, around products of single rows. ``_activate``
stands between the two products of either.

Sums have a fixed order and there are no atomics: equal inputs give equal bits. An id outside of 0..E-1 is never used as an address.
Arguments that change with the tokens aren't specialized.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import ALL_NAN, _amax, _scale_of


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


@triton.jit
def sum_kernel(parts_ptr, ids_ptr, weights_ptr, y_ptr, n, top_k, experts, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """y[t] = sum of weights[t, j] * parts[t * top_k + j] over j with a legal id, in f32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.arange(0, TOP_K)
    pairs = token * top_k + slots
    ids = tl.load(ids_ptr + pairs, mask=slots < top_k, other=-1)
    legal = (ids >= 0) & (ids < experts)
    mask = legal[:, None] & (cols < n)[None, :]
    parts = tl.load(parts_ptr + pairs[:, None] * n + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if weights_ptr is not None:
        parts = parts * tl.load(weights_ptr + pairs, mask=legal, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + token * n + cols, tl.sum(parts, 0).to(y_ptr.dtype.element_ty), mask=cols < n)


# --- blocks of pairs times weights, on tensor cores ---


@triton.jit
def _block_at(
    sorted_ptr, blocks_ptr, most_blocks, block, count, top_k, BLOCK_M: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """(expert, lanes [BLOCK_M], first place, places, rows of x) of a block of ``count`` pairs, the last one again past the end.

    Places are those in ``sorted``. GATED: rows of x are tokens, otherwise places.
    """
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    lanes = tl.arange(0, BLOCK_M)
    first = tl.load(blocks_ptr + most_blocks + block)
    place = first + tl.minimum(lanes, count - 1)
    x_row = place
    if GATED:
        x_row = tl.load(sorted_ptr + place) // top_k
    return expert, lanes, first, place, x_row


@triton.jit
def _weight_rows(w_ptr, own, near, spots, n, width, TMA: tl.constexpr):
    """Addresses [BLOCK_N, spots] of rows ``near`` of the weight that begins at row ``own``, and of those n rows further on.

    TMA: w_ptr, a descriptor, twice.
    """
    w_at = w_ptr
    up_at = w_ptr
    if not TMA:
        w_at = w_ptr + own * width + near[:, None] * width + spots[None, :]
        up_at = w_at + tl.cast(n, tl.int64) * width
    return w_at, up_at


@triton.jit
def _units(w_ptr, w_at, line, start, spots, width, TMA: tl.constexpr, EVEN: tl.constexpr):
    """Codes, bytes or words [BLOCK_N, spots] of one step of a row of ``width``; zeros past its end."""
    if TMA:
        w = w_ptr.load([line, start])
    elif EVEN:
        w = tl.load(w_at + start)
    else:
        w = tl.load(w_at + start, mask=(spots < width - start)[None, :], other=0.0)
    return w


@triton.jit
def _store_block(y_ptr, y, y_row, rows, columns, lanes, count, n):
    """y [BLOCK_N, BLOCK_M], n ``rows`` of the weight and ``count`` pairs of it -> places ``columns`` of rows y_row [BLOCK_M]."""
    inside = (rows < n)[:, None] & (lanes < count)[None, :]
    y_at = y_ptr + y_row.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


# --- few pairs: rows of the chosen experts, on plain cores ---


@triton.jit
def _stream(w_at, cols, width, legal, EVEN: tl.constexpr):
    """Units [rows, experts, BLOCK] of weights; zeros for illegal experts and past the end."""
    mask = legal[None, :, None]
    if not EVEN:
        mask = mask & (cols < width)[None, None, :]
    return tl.load(w_at, mask=mask, other=0.0)


@triton.jit
def _add_codes(total, w, x, magic, SHIFT: tl.constexpr):
    """total + code x of one of the eight codes of each word.

    A code or-ed into the mantissa of 2**23 is 2**23 + code; ``magic`` is 2**23 as bits, from an argument.
    """
    codes = (((w >> SHIFT) & 15) | magic).to(tl.float32, bitcast=True) - 8388608.0
    return total + codes * x.to(tl.float32)[None, :, :]


@triton.jit
def _eight(x, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """x [EXPERTS, BLOCK * 8] -> the eight inputs of each word, in order: [EXPERTS, BLOCK] each."""
    even, odd = tl.split(tl.reshape(x, (EXPERTS, BLOCK, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _word_products(w, x, magic):
    """(products of words w [rows, experts, BLOCK] with x [experts, BLOCK * 8], sums of x), one for each word."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, w.shape[1], w.shape[2])
    total = tl.zeros(w.shape, tl.float32)
    total = _add_codes(total, w, x0, magic, 0)
    total = _add_codes(total, w, x1, magic, 4)
    total = _add_codes(total, w, x2, magic, 8)
    total = _add_codes(total, w, x3, magic, 12)
    total = _add_codes(total, w, x4, magic, 16)
    total = _add_codes(total, w, x5, magic, 20)
    total = _add_codes(total, w, x6, magic, 24)
    total = _add_codes(total, w, x7, magic, 28)
    sums = x0.to(tl.float32) + x1.to(tl.float32) + x2.to(tl.float32) + x3.to(tl.float32)
    sums += x4.to(tl.float32) + x5.to(tl.float32) + x6.to(tl.float32) + x7.to(tl.float32)
    return total, sums


@triton.jit
def _token_step(x_row, start, k, width, BLOCK: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr):
    """A token's units from ``start``, for _add_products: [1, BLOCK], or [1, BLOCK * 8] for UNIT 8."""
    if UNIT == 8:
        cols = start * 8 + tl.arange(0, BLOCK * 8)
        mask = cols < k
    else:
        cols = start + tl.arange(0, BLOCK)
        mask = cols < width
    if EVEN:
        x = tl.load(x_row + cols)
    else:
        x = tl.load(x_row + cols, mask=mask, other=0.0)
    if UNIT == 1:
        x = x.to(ACC)
    return x[None, :]


@triton.jit
def _store_hidden(y_ptr, amax_ptr, y, pair, rows, n, OUT: tl.constexpr):
    """Hidden values y [BLOCK_N, 1] of a pair -> its row [n], and their largest magnitude to this program's place."""
    tl.store(y_ptr + pair.to(tl.int64) * n + rows[:, None], y.to(OUT))
    if amax_ptr is not None:
        tl.store(amax_ptr + pair * tl.num_programs(0) + tl.program_id(0) + tl.arange(0, 1), _amax(y, 0))


@triton.jit
def _experts_of(ids_ptr, top_k, experts, TOP_K: tl.constexpr):
    """(token, pairs, ids, which are legal), the last three [TOP_K], of program (.., token)."""
    slots = tl.arange(0, TOP_K)
    token = tl.program_id(1).to(tl.int64)
    pairs = token * top_k + slots
    ids = tl.load(ids_ptr + pairs, mask=slots < top_k, other=-1)
    legal = (ids >= 0) & (ids < experts)
    return token, pairs, ids, legal


@triton.jit
def _hidden_scale(amax_ptr, scale2_ptr, pairs, legal, parts, PARTS: tl.constexpr, LIMIT: tl.constexpr):
    """(scale, 1 / scale) [experts] of hidden rows: calibrated, or from the largest magnitudes of their parts."""
    if amax_ptr is not None:
        part = tl.arange(0, PARTS)
        mask = legal[:, None] & (part < parts)[None, :]
        amax = _amax(tl.load(amax_ptr + pairs[:, None] * parts + part[None, :], mask=mask, other=0.0), 1)
        scale, inverse = _scale_of(amax, LIMIT)
    else:
        scale = tl.zeros(pairs.shape, tl.float32) + tl.load(scale2_ptr)
        inverse = tl.math.div_rn(tl.full(pairs.shape, 1.0, tl.float32), scale)
    return scale, inverse


@triton.jit
def _store_token(y_ptr, y, weights_ptr, token, pairs, legal, rows, n, OUT: tl.constexpr):
    """y [BLOCK_N, TOP_K] of a token's experts, rounded to OUT each, times their weights, added in order -> its row [n]."""
    y = tl.where(legal[None, :], y.to(OUT).to(tl.float32), 0.0)
    if weights_ptr is not None:
        y = y * tl.load(weights_ptr + pairs, mask=legal, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + token * n + rows, tl.sum(y, 1).to(OUT))
