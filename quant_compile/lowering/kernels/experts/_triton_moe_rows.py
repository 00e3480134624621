"""Triton source of what lies around grouped GEMMs of a MoE block whose rows are sorted by expert.

* ``activate_kernel``: hidden rows [gate | up] -> activation, rounded to 16 bits as the reference does, and quantized again.
* ``weigh_kernel``: rows of a token's experts times their weights, summed in f32 in order of k.

Rows of dropped pairs (past the last expert's end) hold anything; they are computed and never read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_pieces import ALL_NAN, _only_if


@triton.jit
def _activation(gate, alpha, KIND: tl.constexpr):
    """KIND: silu, gelu, gelu_tanh or relu, in f32."""
    if KIND == "silu":
        out = gate * tl.sigmoid(alpha * gate)
    elif KIND == "gelu":
        out = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        out = gate * tl.sigmoid(2.0 * z)
    else:
        out = tl.maximum(gate, 0.0, propagate_nan=ALL_NAN)
    return out


@triton.jit
def activate_kernel(
    hidden_ptr, bias_ptr, expert_ptr, static_ptr, out_ptr, scale_ptr, size, groups, experts, alpha, limit, shift,
    KIND: tl.constexpr, LIMITED: tl.constexpr, HAS_BIAS: tl.constexpr, QUANT: tl.constexpr, MAX: tl.constexpr,
    SMALLEST: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program per row and G * GROUP columns; a scale is shared by GROUP columns.

    QUANT: ``none``, ``dynamic`` (scale = amax / MAX of each group) or ``static`` (scale [1] is given).
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * G + tl.arange(0, G)
    cols = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = cols < size
    gate = tl.load(hidden_ptr + row * 2 * size + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + row * 2 * size + size + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        expert = tl.load(expert_ptr + row).to(tl.int64)
        known = _only_if(mask, expert < experts)
        gate += tl.load(bias_ptr + expert * 2 * size + cols, mask=known, other=0.0).to(tl.float32)
        up += tl.load(bias_ptr + expert * 2 * size + size + cols, mask=known, other=0.0).to(tl.float32)
    if LIMITED:
        gate = tl.minimum(gate, limit, propagate_nan=ALL_NAN)
        up = tl.maximum(up, -limit, propagate_nan=ALL_NAN)
        up = tl.minimum(up, limit, propagate_nan=ALL_NAN)
    value = (_activation(gate, alpha, KIND) * (up + shift)).to(hidden_ptr.dtype.element_ty)
    if QUANT != "none":
        wide = tl.where(mask, value.to(tl.float32), 0.0)
        one = tl.full((G,), 1.0, tl.float32)
        if QUANT == "static":
            inverse = tl.math.div_rn(one, one * tl.load(static_ptr))
        else:
            scale = tl.maximum(tl.max(tl.abs(wide), 1), SMALLEST) * (1.0 / MAX)
            tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)
            inverse = tl.math.div_rn(one, scale)
        scaled = wide * inverse[:, None]
        clamped = tl.minimum(tl.maximum(scaled, -MAX), MAX)
        # Minimum and maximum drop NaN, which must show in the result.
        value = tl.where(scaled == scaled, clamped, scaled)
    tl.store(out_ptr + row * size + cols, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weigh_kernel(
    rows_ptr, place_ptr, weight_ptr, end_ptr, bias_ptr, expert_ptr, out_ptr, size,
    TOP_K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token and BLOCK columns. ``place`` [T * k]: the row of each pair; ``end`` [1]: rows that count."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    end = tl.load(end_ptr)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + j).to(tl.int64)
        counts = _only_if(mask, row < end)
        value = tl.load(rows_ptr + row * size + cols, mask=counts, other=0.0).to(tl.float32)
        if HAS_BIAS:
            expert = tl.load(expert_ptr + row).to(tl.int64)
            value += tl.load(bias_ptr + expert * size + cols, mask=counts, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value = value * tl.load(weight_ptr + token * TOP_K + j).to(tl.float32)
        # A weight that is NaN or infinite must not reach the sum through a dropped pair.
        total += tl.where(counts, value, 0.0)
    tl.store(out_ptr + token * size + cols, total.to(out_ptr.dtype.element_ty), mask=mask)
