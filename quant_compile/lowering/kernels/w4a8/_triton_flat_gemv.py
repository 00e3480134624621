"""Triton source of ``triton_flat_gemv``: products of one or two tokens with 4-bit weights in the layout ``w4_flat``, by dp4a.

A thread reads 16 bytes, 32 columns of one row, and a warp those of neighbouring rows, which lie beside each other. A nibble
c - 8 in the upper half of a byte is 16 (c - 8). Sums stay in their thread until the end and have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import _only_if, _words
from quant_compile.lowering.kernels.w4a8._triton_w4a8 import _every_other, _four


@triton.jit(do_not_specialize=["m"])
def flat_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, bias_ptr, y_ptr, m, n, spans, sx_row,
    M: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, GROUPED: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """ROWS rows of w times the M tokens from program_id(1) * M on; x is read as int64 words of eight int8.

    A span is CHUNKS * 32 columns, under one scale where GROUPED; PARTS spans run side by side.
    """
    x_ptr = _words(x_ptr, tl.int64)
    # Axes [row, part, word]: Triton deals threads to ties among axes from the first on, so a warp reads neighbouring rows.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_token = tl.program_id(1) * M
    part = tl.arange(0, PARTS)
    inner = tl.arange(0, 4)[None, None, :]
    slot = row // 64 * 64 + row % 8 * 8 + row // 8 % 8
    totals = ()
    for _ in tl.static_range(M):
        totals = totals + (tl.zeros((ROWS, PARTS), tl.float32 if GROUPED else tl.int32),)
    for start in range(0, spans, PARTS):
        span = start + part
        live = span < spans
        words = ()
        for j in tl.static_range(CHUNKS):
            w_at = w_ptr + ((span * CHUNKS + j)[None, :, None] * n + row[:, None, None]) * 4 + inner
            if EVEN:
                words = words + (tl.load(w_at, eviction_policy="evict_first"),)
            else:
                words = words + (tl.load(w_at, mask=live[None, :, None], other=0),)
        scale = 1.0
        if GROUPED:
            s_at = sw_ptr + span[None, :] * n + slot[:, None]
            scale = tl.load(s_at, mask=live[None, :], other=0.0).to(tl.float32)
        new = ()
        for t in tl.static_range(M):
            token = tl.minimum(first_token + t, m - 1)
            sums = tl.zeros((ROWS, PARTS, 4), tl.int32)
            for j in tl.static_range(CHUNKS):
                x_at = x_ptr + (token * spans + span[None, :, None]) * (CHUNKS * 4) + j * 4 + inner
                x_at = tl.broadcast_to(x_at, (ROWS, PARTS, 4))
                if EVEN:
                    x = tl.load(x_at, eviction_policy="evict_last")
                else:
                    x = tl.load(x_at, mask=live[None, :, None], other=0)
                even, odd = _every_other(x.to(tl.uint64, bitcast=True), ASM)
                w = words[j].to(tl.uint32, bitcast=True)
                low, high = (w << 4) & 0xF0F0F0F0, w & 0xF0F0F0F0
                sums = _four(high, odd, _four(low, even, sums, ASM), ASM)
            if GROUPED:
                new = new + (totals[t] + tl.sum(sums, 2).to(tl.float32) * scale,)
            else:
                new = new + (totals[t] + tl.sum(sums, 2),)
        totals = new
    for t in tl.static_range(M):
        token = first_token + t
        y = tl.sum(totals[t], 1).to(tl.float32) * 0.0625
        y = y * tl.load(sx_ptr + tl.minimum(token, m - 1) * sx_row)
        if not GROUPED:
            spot = row // 32 * 32 + (row // 2) % 4 * 8 + (row // 8) % 4 * 2 + row % 2
            y = y * tl.load(sw_ptr + spot).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + row).to(tl.float32)
        tl.store(y_ptr + token.to(tl.int64) * n + row, y.to(y_ptr.dtype.element_ty), mask=_only_if(row < n, token < m))
