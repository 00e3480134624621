"""FP8 linears with one scale per weight block (128x128) and one per group of 128 inputs, as DeepSeek-V3 stores them.

Weight planes: ``data`` [n, k] float8, ``scale`` [ceil(n/bn), ceil(k/bk)] f32.
Input planes: ``data`` [..., k] float8, ``scale`` [..., ceil(k/bk)] f32. A ragged last block or group is legal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Family, Planes, PlaneSpec, Reject, register_family
from quant_compile.ir.numerics import FLOAT_DTYPES, FLOAT_MAX, by_row_chunks, safe_amax, to_float8
from quant_compile.ir.scheme import QuantArgs, Scheme

PRESETS = {
    "FP8_BLOCK": Scheme(
        QuantArgs(8, "float", "block", block_structure=(128, 128)),
        QuantArgs(8, "float", "group", dynamic=True, group_size=128),
    )
}


def _block(scheme: Scheme) -> tuple[int, int]:
    assert scheme.weights.block_structure is not None
    return scheme.weights.block_structure


def accepts(scheme: Scheme) -> Reject | None:
    """FP8 weights in blocks of n x g with FP8 inputs in dynamic groups of g."""
    w, a = scheme.weights, scheme.input_activations
    if w.type != "float" or w.num_bits != 8 or w.block_structure is None or not w.symmetric:
        return Reject("weights must be symmetric 8-bit floats per block")
    if a is None or a.type != "float" or a.num_bits != 8 or a.strategy != "group" or not a.dynamic:
        return Reject("inputs must be dynamic 8-bit floats per group")
    if a.group_size != w.block_structure[1]:
        return Reject(f"input groups of {a.group_size} do not match weight blocks of {w.block_structure[1]} columns")
    return None


def weight_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[PlaneSpec, ...]:
    """``data`` and ``scale``."""
    bn, bk = _block(scheme)
    data = FLOAT_DTYPES[scheme.weights.format or "e4m3"]
    return PlaneSpec("data", (n, k), data), PlaneSpec("scale", (-(-n // bn), -(-k // bk)), torch.float32)


def _expand(scale: Tensor, bn: int, bk: int, n: int, k: int) -> Tensor:
    return scale.repeat_interleave(bn, 0)[:n].repeat_interleave(bk, 1)[:, :k]


def quantize_weight(w: Tensor, scheme: Scheme) -> Planes:
    """[n, k] -> float8 codes and scale = amax / max(format) of each block."""
    bn, bk = _block(scheme)
    format = scheme.weights.format or "e4m3"

    def chunk(rows: Tensor) -> Planes:
        n, k = rows.shape
        padded = pad(rows, (0, -k % bk, 0, -n % bn))
        blocks = padded.reshape(padded.shape[0] // bn, bn, padded.shape[1] // bk, bk)
        scale = _block_scale(blocks, format)
        return to_float8(rows.float(), _expand(scale.reciprocal(), bn, bk, n, k), format), scale

    return by_row_chunks(w, bn, chunk)


def _block_scale(blocks: Tensor, format: str) -> Tensor:
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    return safe_amax(torch.stack((low, high), -1)).squeeze(-1) * (1.0 / FLOAT_MAX[format])


def dequantize_weight(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """Codes times the scale of their block, f32 [n, k]."""
    data, scale = planes
    return data.float() * _expand(scale, *_block(scheme), data.shape[0], k)


def quantize_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """Codes and scale = amax / max(format) of each group of the last dimension."""
    a = scheme.input_activations
    assert a is not None and a.format is not None and a.group_size is not None and scale is None
    # A ragged last group is quantized apart: padded, flattened and sliced again, Inductor's loop splitting on CPU loses it.
    k, size = x.shape[-1], a.group_size
    whole = k - k % size
    parts: list[Planes] = []
    if whole:
        codes, scales = _quantize_group((x[..., :whole] if whole != k else x).unflatten(-1, (-1, size)), a.format)
        parts.append((codes.flatten(-2), scales.squeeze(-1)))
    if whole != k:
        parts.append(_quantize_group(x[..., whole:], a.format))
    if len(parts) == 1:
        return parts[0]
    return torch.cat((parts[0][0], parts[1][0]), -1), torch.cat((parts[0][1], parts[1][1]), -1)


def _quantize_group(x: Tensor, format: str) -> Planes:
    """Codes of x and scale of each row of its last dimension."""
    scales = safe_amax(x) * (1.0 / FLOAT_MAX[format])
    return to_float8(x.float(), scales.reciprocal(), format), scales


def linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Both sides dequantized, multiplied and accumulated in f32."""
    k = x[0].shape[-1]
    left = x[0].float() * x[1].repeat_interleave(_block(scheme)[1], -1)[..., :k]
    y = torch.matmul(left, dequantize_weight(w, scheme, k).t())
    return (y if bias is None else y + bias.float()).to(dtype)


FAMILY = register_family(
    Family(
        "fp8_block",
        PRESETS,
        accepts,
        weight_planes,
        quantize_weight,
        dequantize_weight,
        quantize_input,
        linear,
        row_block=lambda scheme: _block(scheme)[0],
    )
)
