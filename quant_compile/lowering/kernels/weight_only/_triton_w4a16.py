"""Triton source of the weight-only kernels; ``triton_w4a16`` chooses among them and launches them.

4-bit kernels read the layout ``w4_tiles`` (see ``triton_w4a16``): a 32-bit word holds the eight codes of rows (i4) and
columns (i5, i6) that one lane of a tensor-core fragment owns, in nibble ``i6 * 4 + i4 * 2 + i5``. 8-bit kernels read
plain rows. Codes become floats by bit tricks, never by integer conversion: or-ing a nibble into the mantissa of 128.0
(bits 16-19) or of 2048.0 (bits 12-15) gives 128 + q or 2048 + q exactly, and the constant leaves through the sum of the
inputs. The two bit patterns (``near``, ``far``) are arguments: ptxas makes one instruction of and-or only when at most
one operand is a literal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _words

# --- pieces ---


@triton.jit
def _halves(pair, BF16: tl.constexpr):
    """32 bits that hold two 16-bit floats -> both as f32."""
    pair = pair.to(tl.uint32, bitcast=True)
    if BF16:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _near(word, magic):
    """Nibble at bits 16-19 as 128 + q; ``magic`` is 128.0 as bits, from an argument."""
    return ((word & 0x000F0000) | magic).to(tl.float32, bitcast=True)


@triton.jit
def _far(word, magic):
    """Nibble at bits 12-15 as 2048 + q; ``magic`` is 2048.0 as bits, from an argument."""
    return ((word & 0x0000F000) | magic).to(tl.float32, bitcast=True)


@triton.jit
def _load_inputs(x_ptr, r, tq, columns, EVEN: tl.constexpr, X32: tl.constexpr, BF16: tl.constexpr):
    """Inputs of 16-block ``r`` that lane ``tq`` multiplies: columns 2tq, 2tq+1 and the same + 8, as f32."""
    k = r * 16 + tq * 2
    if X32:
        a0 = tl.load(x_ptr + k, mask=k < columns, other=0.0)
        a1 = tl.load(x_ptr + k + 1, mask=k + 1 < columns, other=0.0)
        b0 = tl.load(x_ptr + k + 8, mask=k + 8 < columns, other=0.0)
        b1 = tl.load(x_ptr + k + 9, mask=k + 9 < columns, other=0.0)
    else:
        # x_ptr points to 32-bit words, pairs of inputs; columns is even.
        p = r * 8 + tq
        if EVEN:
            a = tl.load(x_ptr + p)
            b = tl.load(x_ptr + p + 4)
        else:
            a = tl.load(x_ptr + p, mask=k < columns, other=0)
            b = tl.load(x_ptr + p + 4, mask=k + 8 < columns, other=0)
        a0, a1 = _halves(a, BF16)
        b0, b1 = _halves(b, BF16)
    return a0, a1, b0, b1


@triton.jit
def _scale_pair(s_ptr, row, slot, stride, mask, S32: tl.constexpr, BF16: tl.constexpr):
    """Scales of rows i4 = 0 and 1 of word ``slot`` (= quad * 4 + i3) in group ``row``, as f32."""
    if S32:
        s0 = tl.load(s_ptr + row * stride + slot * 2, mask=mask, other=0.0)
        s1 = tl.load(s_ptr + row * stride + slot * 2 + 1, mask=mask, other=0.0)
    else:
        # s_ptr points to 32-bit words: the two scales lie beside each other.
        s0, s1 = _halves(tl.load(s_ptr + row * (stride // 2) + slot, mask=mask, other=0), BF16)
    return s0, s1


# --- one row: multiply-add on plain cores ---


@triton.jit
def _load_words(w_ptr, r, blocks, padded_n, word, EVEN: tl.constexpr):
    """Words ``word`` of 16-column block ``r``."""
    place = w_ptr + r.to(tl.int64) * (padded_n * 2) + word
    if EVEN:
        return tl.load(place)
    return tl.load(place, mask=r < blocks, other=0)


@triton.jit
def _load_raw(s_ptr, z_ptr, group, slot, padded_n, live, PAIRS: tl.constexpr):
    """Scale pairs (0 unless PAIRS) and zero-point pairs (0 without a zero point), as they lie in memory."""
    scales, zeros = tl.zeros_like(slot), tl.zeros_like(slot)
    if PAIRS:
        scales = tl.load(s_ptr + group * (padded_n // 2) + slot, mask=live, other=0)
    if z_ptr is not None:
        zeros = tl.load(z_ptr + group * (padded_n // 2) + slot, mask=live, other=0).to(tl.int32)
    return scales, zeros


@triton.jit
def _multiply(p0, p1, w, inputs, near_bits, far_bits):
    """Add one word's eight products to the sums of rows i4 = 0 and 1; codes still carry 128 or 2048."""
    a0, a1, b0, b1 = inputs
    w = w.to(tl.uint32, bitcast=True)
    up, down, turned = w << 8, w >> 8, (w << 16) | (w >> 16)
    p0 += a0 * _near(turned, near_bits)
    p0 += b0 * _far(up, far_bits)
    p0 += a1 * _near(w, near_bits)
    p0 += b1 * _far(down, far_bits)
    p1 += a0 * _near(up, near_bits)
    p1 += b0 * _far(w, far_bits)
    p1 += a1 * _near(down, near_bits)
    p1 += b1 * _far(turned, far_bits)
    return p0, p1


@triton.jit
def _scaled(p0, p1, near_sum, far_sum, zeros, s_ptr, scales, group, slot, padded_n, live,
            HAS_ZERO: tl.constexpr, CHANNEL: tl.constexpr, S32: tl.constexpr, BF16: tl.constexpr):  # fmt: skip
    """Take constants and zero points off a chunk's sums and apply the group's scale."""
    offset = near_sum * 128.0 + far_sum * 2048.0
    total = near_sum + far_sum
    if HAS_ZERO:
        p0 -= offset + total * (zeros & 15).to(tl.float32)
        p1 -= offset + total * (zeros >> 4).to(tl.float32)
    else:
        p0 -= offset + total * 8.0
        p1 -= offset + total * 8.0
    if not CHANNEL:
        if S32:
            s0, s1 = _scale_pair(s_ptr, group, slot, padded_n, live, True, BF16)
        else:
            s0, s1 = _halves(scales, BF16)
        p0 *= s0
        p1 *= s1
    return p0, p1


@triton.jit
def gemv_w4_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr, n, columns, blocks, padded_n, groups, chunks, near, far, zero,
    J: tl.constexpr, CHUNKS_PER_GROUP: tl.constexpr, CHANNEL: tl.constexpr, EVEN: tl.constexpr, X32: tl.constexpr,
    BF16: tl.constexpr, S32: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """y[n] = x[columns] @ w.T; a program owns 8Q rows, a thread walks over k with words of its own.

    A chunk is 16J columns under one scale. G chunks run at a time, in different warps; only last sums leave a thread.
    """
    if not X32:
        x_ptr = _words(x_ptr, tl.int32)
    if not S32:
        s_ptr = _words(s_ptr, tl.int32)
    if z_ptr is not None:
        z_ptr = _words(z_ptr, tl.uint8)
    # Axes [tq, quad, g, i3]: Triton deals threads to ties among axes from the first on, so a warp reads the words of
    # neighbouring lanes, chunks go to different warps, and inputs and weights agree on who holds what.
    tq = tl.arange(0, 4)[:, None, None, None]
    quad = tl.program_id(0) * Q + tl.arange(0, Q)[None, :, None, None]
    g = tl.arange(0, G)[None, None, :, None]
    i3 = tl.arange(0, 4)[None, None, None, :]
    lane_quad = tl.broadcast_to(quad, [4, Q, G, 1]) * 0
    word = tl.broadcast_to(quad * 16 + tq * 4 + i3, [4, Q, G, 4])
    slot = tl.broadcast_to(quad * 4 + i3, [4, Q, G, 4])
    acc0 = tl.zeros([4, Q, G, 4], tl.float32)
    acc1 = tl.zeros([4, Q, G, 4], tl.float32)
    for first in tl.range(0, chunks, G, loop_unroll_factor=UNROLL, num_stages=STAGES):
        chunk = first + g
        words = ()
        inputs = ()
        for j in tl.static_range(J):
            words = words + (_load_words(w_ptr, chunk * J + j, blocks, padded_n, word, EVEN),)
        for j in tl.static_range(J):
            inputs = inputs + (_load_inputs(x_ptr, chunk * J + j + lane_quad, tq, columns, EVEN, X32, BF16),)
        group = chunk // CHUNKS_PER_GROUP
        live = group < groups
        scales, zeros = _load_raw(s_ptr, z_ptr, group, slot, padded_n, live, not CHANNEL and not S32)
        near_bits, far_bits = near, far
        if STAGES == 1:
            # All loads of a step are to be in flight together, 16J bytes a thread. ptxas would put them off to save
            # registers, so all decoding depends on all of them (``zero`` is 0, but only the caller knows). With more
            # stages the loads go through shared memory a step ahead, and need no such guard.
            seen = scales | zeros
            for j in tl.static_range(J):
                seen = seen | words[j]
            near_bits, far_bits = near | (seen & zero), far | (seen & zero)
        p0 = tl.zeros([4, Q, G, 4], tl.float32)
        p1 = tl.zeros([4, Q, G, 4], tl.float32)
        near_sum = tl.zeros([4, Q, G, 1], tl.float32)
        far_sum = tl.zeros([4, Q, G, 1], tl.float32)
        for j in tl.static_range(J):
            p0, p1 = _multiply(p0, p1, words[j], inputs[j], near_bits, far_bits)
            near_sum += inputs[j][0] + inputs[j][1]
            far_sum += inputs[j][2] + inputs[j][3]
        p0, p1 = _scaled(
            p0, p1, near_sum, far_sum, zeros, s_ptr, scales, group, slot, padded_n, live,
            z_ptr is not None, CHANNEL, S32, BF16,
        )  # fmt: skip
        acc0 += p0
        acc1 += p1
    y0 = tl.sum(tl.sum(acc0, 2), 0)
    y1 = tl.sum(tl.sum(acc1, 2), 0)
    row_quad = tl.program_id(0) * Q + tl.arange(0, Q)[:, None]
    row = row_quad // 8 * 64 + row_quad % 8 + tl.arange(0, 4)[None, :] * 16
    _store_row(y0, row, n, s_ptr, bias_ptr, y_ptr, CHANNEL, S32, BF16, OUT)
    _store_row(y1, row + 8, n, s_ptr, bias_ptr, y_ptr, CHANNEL, S32, BF16, OUT)


@triton.jit
def _store_row(
    y, row, n, s_ptr, bias_ptr, y_ptr, CHANNEL: tl.constexpr, S32: tl.constexpr, BF16: tl.constexpr, OUT: tl.constexpr
):
    """Apply the channel scale and the bias, round once, store."""
    if CHANNEL:
        # A channel's scale sits where an accumulator fragment wants it: 32-blocks, [n/2 % 4][n/8 % 4][n % 2].
        spot = row // 32 * 32 + (row // 2) % 4 * 8 + (row // 8) % 4 * 2 + row % 2
        if S32:
            y = y * tl.load(s_ptr + spot)
        else:
            low, high = _halves(tl.load(s_ptr + spot // 2), BF16)
            y = y * tl.where(spot % 2 == 0, low, high)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, y.to(OUT), mask=row < n)


# --- tiles: decoded weights as matrices ---


@triton.jit
def _decode_tile(
    w_ptr, s_ptr, z_ptr, first_block, first_tile, blocks, padded_n, groups, near, far,
    BLOCKS_PER_GROUP: tl.constexpr, CHANNEL: tl.constexpr, EVEN: tl.constexpr, S32: tl.constexpr, BF16: tl.constexpr,
    NB: tl.constexpr, RB: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Codes of NB 64-row tiles x RB 16-column blocks -> scaled weights [64NB, 16RB] in ``OUT``."""
    r = first_block + tl.arange(0, RB)[:, None, None, None, None]
    tile = first_tile + tl.arange(0, NB)[None, :, None, None, None]
    t4 = tl.arange(0, 8)[None, None, :, None, None]
    tq = tl.arange(0, 4)[None, None, None, :, None]
    i3 = tl.arange(0, 4)[None, None, None, None, :]
    quad = tile * 8 + t4
    word = r.to(tl.int64) * (padded_n * 2) + quad * 16 + tq * 4 + i3
    live = tile * 64 < padded_n
    if EVEN:
        w = tl.load(w_ptr + word, mask=live, other=0).to(tl.uint32, bitcast=True)
    else:
        w = tl.load(w_ptr + word, mask=live & (r < blocks), other=0).to(tl.uint32, bitcast=True)
    slot = tl.broadcast_to(quad * 4 + i3, [RB, NB, 8, 4, 4])
    group = r // BLOCKS_PER_GROUP
    inside = live & (group < groups)
    if z_ptr is not None:
        zeros = tl.load(z_ptr + group * (padded_n // 2) + slot, mask=inside, other=0)
        z0, z1 = (zeros & 15).to(tl.float32), (zeros >> 4).to(tl.float32)
    else:
        z0, z1 = 8.0, 8.0
    if CHANNEL:
        row = tile * 64 + i3 * 16 + t4
        spot = row // 32 * 32 + (row // 2) % 4 * 8 + (row // 8) % 4 * 2 + row % 2
        s0, s1 = _channel_pair(s_ptr, spot, live, S32, BF16)
    else:
        s0, s1 = _scale_pair(s_ptr, group, slot, padded_n, inside, S32, BF16)
    up, down, turned = w << 8, w >> 8, (w << 16) | (w >> 16)
    n0, n1, f0, f1 = z0 + 128.0, z1 + 128.0, z0 + 2048.0, z1 + 2048.0
    # Columns (i5, i6) of row i4: last joined is the last axis.
    top = tl.join(
        tl.join(((_near(turned, near) - n0) * s0).to(OUT), ((_near(w, near) - n0) * s0).to(OUT)),
        tl.join(((_far(up, far) - f0) * s0).to(OUT), ((_far(down, far) - f0) * s0).to(OUT)),
    )
    low = tl.join(
        tl.join(((_near(up, near) - n1) * s1).to(OUT), ((_near(down, near) - n1) * s1).to(OUT)),
        tl.join(((_far(w, far) - f1) * s1).to(OUT), ((_far(turned, far) - f1) * s1).to(OUT)),
    )
    # [r, tile, t4, tq, i3, i6, i5, i4] -> rows (tile, i3, i4, t4), columns (r, i5, tq, i6)
    return tl.permute(tl.join(top, low), (1, 4, 7, 2, 0, 6, 3, 5)).reshape([64 * NB, 16 * RB])


@triton.jit
def _channel_pair(s_ptr, spot, mask, S32: tl.constexpr, BF16: tl.constexpr):
    """Channel scales of rows i4 = 0 (at ``spot``) and i4 = 1 (two places further)."""
    if S32:
        s0 = tl.load(s_ptr + spot, mask=mask, other=0.0)
        s1 = tl.load(s_ptr + spot + 2, mask=mask, other=0.0)
    else:
        a, b = _halves(tl.load(s_ptr + spot // 2, mask=mask, other=0), BF16)
        c, d = _halves(tl.load(s_ptr + spot // 2 + 1, mask=mask, other=0), BF16)
        s0 = tl.where(spot % 2 == 0, a, b)
        s1 = tl.where(spot % 2 == 0, c, d)
    return s0, s1


@triton.jit
def dequantize_w4_kernel(
    w_ptr, s_ptr, z_ptr, out_ptr, n, columns, blocks, padded_n, groups, near, far,
    BLOCKS_PER_GROUP: tl.constexpr, CHANNEL: tl.constexpr, EVEN: tl.constexpr, S32: tl.constexpr, BF16: tl.constexpr,
    NB: tl.constexpr, RB: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Weights as a plain matrix [n, columns] in ``OUT``."""
    first_block, first_tile = tl.program_id(0) * RB, tl.program_id(1) * NB
    if not S32:
        s_ptr = _words(s_ptr, tl.int32)
    if z_ptr is not None:
        z_ptr = _words(z_ptr, tl.uint8)
    w = _decode_tile(
        w_ptr, s_ptr, z_ptr, first_block, first_tile, blocks, padded_n, groups, near, far,
        BLOCKS_PER_GROUP, CHANNEL, EVEN, S32, BF16, NB, RB, OUT,
    )  # fmt: skip
    row = first_tile * 64 + tl.arange(0, 64 * NB)[:, None]
    column = first_block * 16 + tl.arange(0, 16 * RB)[None, :]
    tl.store(out_ptr + row.to(tl.int64) * columns + column, w, mask=(row < n) & (column < columns))


@triton.jit
def matmul_w4_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr, m, n, columns, blocks, padded_n, groups, near, far, blocks_per_split,
    BLOCKS_PER_GROUP: tl.constexpr, CHANNEL: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
    BM: tl.constexpr, NB: tl.constexpr, RB: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """y[m, n] = x @ w.T on tensor cores, weights decoded in registers; with SPLIT, f32 parts [splits, m, n] instead."""
    s_ptr = _words(s_ptr, tl.int32)
    if z_ptr is not None:
        z_ptr = _words(z_ptr, tl.uint8)
    first_tile = tl.program_id(0) * NB
    first_row = tl.program_id(1) * BM
    first = tl.program_id(2) * blocks_per_split
    rows = first_row + tl.arange(0, BM)[:, None]
    columns_of = tl.arange(0, 16 * RB)[None, :]
    acc = tl.zeros([BM, 64 * NB], tl.float32)
    for block in range(first, tl.minimum(first + blocks_per_split, blocks), RB):
        k = block * 16 + columns_of
        x = tl.load(x_ptr + rows.to(tl.int64) * columns + k, mask=(rows < m) & (k < columns), other=0.0)
        w = _decode_tile(
            w_ptr, s_ptr, z_ptr, block, first_tile, blocks, padded_n, groups, near, far,
            BLOCKS_PER_GROUP, CHANNEL, EVEN, False, BF16, NB, RB, OUT,
        )  # fmt: skip
        acc = tl.dot(x, tl.trans(w), acc)
    column = first_tile * 64 + tl.arange(0, 64 * NB)[None, :]
    inside = (rows < m) & (column < n)
    if SPLIT:
        place = (tl.program_id(2) * m + rows).to(tl.int64) * n + column
        tl.store(y_ptr + place, acc, mask=inside)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)
        tl.store(y_ptr + rows.to(tl.int64) * n + column, acc.to(OUT), mask=inside)


@triton.jit
def sum_parts_kernel(
    parts_ptr, scale_ptr, bias_ptr, y_ptr, size, n, splits, BLOCK: tl.constexpr, OUT: tl.constexpr
):  # fmt: skip
    """y = sum of f32 parts [splits, m, n], in order (deterministic), times a scale per column, plus bias."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    acc = tl.zeros([BLOCK], tl.float32)
    part = parts_ptr + place
    for _ in range(splits):
        acc += tl.load(part, mask=inside, other=0.0)
        part += size
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + place % n, mask=inside, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + place % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, acc.to(OUT), mask=inside)


# --- 8-bit rows ---


@triton.jit
def _values(w, FP8: tl.constexpr, OUT: tl.constexpr):
    """int8 codes, or e4m3 in bytes, as numbers of a type that holds them exactly."""
    if FP8:
        wide = w.to(tl.int16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)  # its exponent is 8 too low
        return (half.to(tl.float32) * 256.0).to(OUT)
    return w.to(OUT)


@triton.jit
def gemv_w8_kernel(
    x_ptr, w_ptr, s_ptr, bias_ptr, y_ptr, n, k,
    EVEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr, FP8: tl.constexpr = False,
):  # fmt: skip
    """y[n] = x[k] @ w[n, k].T * scale[n]; products stay in the thread that read them until the end."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    column = tl.arange(0, BK)[None, :]
    acc = tl.zeros([BN, BK], tl.float32)
    for first in range(0, k, BK):
        at = first + column
        if EVEN:
            w = tl.load(w_ptr + row.to(tl.int64) * k + at)
            x = tl.load(x_ptr + at)
        else:
            w = tl.load(w_ptr + row.to(tl.int64) * k + at, mask=(row < n) & (at < k), other=0)
            x = tl.load(x_ptr + at, mask=at < k, other=0.0)
        acc += _values(w, FP8, tl.float32) * x.to(tl.float32)
    out_row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = out_row < n
    y = tl.sum(acc, 1) * tl.load(s_ptr + out_row, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + out_row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + out_row, y.to(OUT), mask=inside)


@triton.jit
def matmul_w8_kernel(
    x_ptr, w_ptr, s_ptr, bias_ptr, y_ptr, m, n, k, k_per_split,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, OUT: tl.constexpr,
    FP8: tl.constexpr = False,
):  # fmt: skip
    """y[m, n] = x @ w.T * scale on tensor cores; codes of 8 bits are exact in 16-bit floats, so the scale comes last."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    start = tl.program_id(2) * k_per_split
    column = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(start, tl.minimum(start + k_per_split, k), BK):
        at = first + column
        x_mask, w_mask = rows[:, None] < m, row[:, None] < n
        if not EVEN:
            x_mask, w_mask = x_mask & (at[None, :] < k), w_mask & (at[None, :] < k)
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * k + at[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptr + row[:, None].to(tl.int64) * k + at[None, :], mask=w_mask, other=0)
        acc = tl.dot(x, tl.trans(_values(w, FP8, OUT)), acc)
    inside = (rows[:, None] < m) & (row[None, :] < n)
    if SPLIT:
        place = (tl.program_id(2) * m + rows[:, None]).to(tl.int64) * n + row[None, :]
        tl.store(y_ptr + place, acc, mask=inside)
    else:
        acc *= tl.load(s_ptr + row, mask=row < n, other=0.0)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + rows[:, None].to(tl.int64) * n + row[None, :], acc.to(OUT), mask=inside)


@triton.jit
def dequantize_w8_kernel(
    w_ptr, s_ptr, out_ptr, n, k, BN: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr, FP8: tl.constexpr = False
):  # fmt: skip
    """Rows of 8 bits times their scale, as a matrix [n, k] in ``OUT``."""
    row = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    column = tl.program_id(0) * BK + tl.arange(0, BK)[None, :]
    inside = (row < n) & (column < k)
    place = row.to(tl.int64) * k + column
    w = _values(tl.load(w_ptr + place, mask=inside, other=0), FP8, tl.float32)
    scale = tl.load(s_ptr + row, mask=row < n, other=0.0)
    tl.store(out_ptr + place, (w * scale).to(OUT), mask=inside)
