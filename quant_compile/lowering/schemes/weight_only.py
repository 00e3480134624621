"""Integer weights under 16-bit inputs: W8A16 per row, W4A16 per group or row, symmetric or with a zero point.

Weight planes, 8 bits: ``data`` [n, k] int8, ``scale`` [n, 1] f32.
Weight planes, 4 bits: ``data`` [n, ceil(k/2)] u8, two codes a byte, even k in the low nibble, a code being q + 8 (symmetric)
or q (0..15); ``scale`` [n, g] in the weight's dtype; with a zero point also ``zero`` [n, ceil(g/2)] u8, packed like data.
g = ceil(k / group_size), 1 for a scale per row; a ragged last group is legal. w = scale * (code - zero), zero = 8 if symmetric.
Formulas of compressed-tensors: symmetric scale = amax / 7.5, asymmetric scale = (max - min) / 15 over a range that holds 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Family, Grid, Planes, PlaneSpec, Reject, register_family
from quant_compile.ir.numerics import SMALLEST_AMAX, by_row_chunks, safe_amax, to_int8
from quant_compile.ir.scheme import QuantArgs, Scheme

PRESETS = {
    "W8A16": Scheme(QuantArgs(8, "int", "channel")),
    "W4A16": Scheme(QuantArgs(4, "int", "group", group_size=128)),
    "W4A16_ASYM": Scheme(QuantArgs(4, "int", "group", group_size=128, symmetric=False)),
}
SYMMETRIC_ZERO = 8
# Shares of a group's range that a search tries; those of both ends where there is a zero point.
SHARES = (1.0, 0.92, 0.84, 0.76, 0.68)
ENDS = (1.0, 0.9, 0.8, 0.7)
SHARES_INT8 = (1.0, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8)


def accepts(scheme: Scheme) -> Reject | None:
    """int8 symmetric per channel, or int4 per group or channel, with 16-bit inputs."""
    w = scheme.weights
    if scheme.input_activations is not None:
        return Reject("inputs must stay in 16 bits")
    if w.type != "int" or w.num_bits not in (4, 8):
        return Reject("weights must be 4- or 8-bit integers")
    if w.num_bits == 8 and (w.strategy != "channel" or not w.symmetric):
        return Reject("8-bit weights must be symmetric per channel")
    if w.num_bits == 4 and w.strategy not in ("group", "channel"):
        return Reject("4-bit weights must be scaled per group or channel")
    if w.num_bits == 4 and w.group_size is not None and (w.group_size < 16 or w.group_size & (w.group_size - 1)):
        return Reject(f"group_size must be a power of two from 16 up, got {w.group_size}")
    return None


def group_of(scheme: Scheme, k: int) -> int:
    """Inputs that share one scale: the group size, or all k."""
    return scheme.weights.group_size or max(k, 1)


def weight_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[PlaneSpec, ...]:
    """``data``, ``scale`` and, with a zero point, ``zero``."""
    if scheme.weights.num_bits == 8:
        return PlaneSpec("data", (n, k), torch.int8), PlaneSpec("scale", (n, 1), torch.float32)
    groups = -(-k // group_of(scheme, k))
    planes = (PlaneSpec("data", (n, -(-k // 2)), torch.uint8), PlaneSpec("scale", (n, groups), dtype))
    return planes if scheme.weights.symmetric else (*planes, PlaneSpec("zero", (n, -(-groups // 2)), torch.uint8))


def pack_nibbles(codes: Tensor) -> Tensor:
    """[n, c] of 0..15 -> [n, ceil(c/2)] u8, even column in the low nibble; a missing last column is 0."""
    codes = pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Inverse of ``pack_nibbles``: [n, columns] u8."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :columns]


def quantize_weight(w: Tensor, scheme: Scheme) -> Planes:
    """[n, k] -> planes as above; codes are rounded under the scale as stored, so storage adds no error."""

    def chunk(rows: Tensor) -> Planes:
        return _quantize_int8(rows) if scheme.weights.num_bits == 8 else _quantize_int4(rows, scheme)

    return by_row_chunks(w, 1, chunk)


def _quantize_int8(rows: Tensor) -> Planes:
    scale = safe_amax(rows) * (1.0 / 127.0)
    return to_int8(rows.float(), scale.reciprocal()), scale


def _quantize_int4(rows: Tensor, scheme: Scheme) -> Planes:
    n, k = rows.shape
    group = group_of(scheme, k)
    grouped = pad(rows, (0, -k % group)).float().reshape(n, -(-k // group), group)
    if scheme.weights.symmetric:
        scale = _storable(safe_amax(grouped) * (1.0 / 7.5), rows.dtype)
        zero = torch.full_like(scale, SYMMETRIC_ZERO)
    else:
        low, high = grouped.amin(-1, keepdim=True).clamp_max(0), grouped.amax(-1, keepdim=True).clamp_min(0)
        scale = _storable(safe_amax(high - low) * (1.0 / 15.0), rows.dtype)
        zero = (-low / scale).round().clamp(0, 15)
    codes = ((grouped / scale).round() + zero).clamp(0, 15).flatten(1)[:, :k]
    planes = (pack_nibbles(codes), scale.squeeze(-1).to(rows.dtype))
    return planes if scheme.weights.symmetric else (*planes, pack_nibbles(zero.squeeze(-1)))


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale rounded to the dtype it is stored in and back, kept a normal number of that dtype."""
    return scale.clamp_min(torch.finfo(dtype).tiny).to(dtype).float()


@dataclass(frozen=True)
class Int4Grid:
    """scale * (code - zero). A symmetric scale may be negative: 16 codes reach from -8 to 7, and a group has its own long side."""

    size: int
    k: int
    symmetric: bool
    dtype: torch.dtype

    def choices(self, w: Tensor) -> Iterator[Planes]:
        """Shares of the range, which symmetric codes have with the value of largest magnitude on -8."""
        if not self.symmetric:
            low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
            for below in ENDS:
                for above in ENDS:
                    yield self._range(low * below, high * above)
            return
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        amax = torch.maximum(-low, high).clamp_min(SMALLEST_AMAX)
        toward = torch.where(high > -low, -1.0, 1.0)
        zero = torch.full_like(amax, SYMMETRIC_ZERO)
        yield _storable(amax * (1.0 / 7.5), self.dtype), zero
        for share in SHARES:
            yield toward * _storable(amax * (share / 8.0), self.dtype), zero

    def _range(self, low: Tensor, high: Tensor) -> Planes:
        scale = _storable((high - low).clamp_min(SMALLEST_AMAX) * (1.0 / 15.0), self.dtype)
        return scale, (-low / scale).round().clamp(0, 15)

    def scaled(self, scales: Planes, factor: Tensor) -> Planes:
        """As the dtype holds them."""
        return scales[0].sign() * _storable(scales[0].abs() * factor, self.dtype), scales[1]

    def values(self, w: Tensor, scales: Planes) -> Tensor:
        """scale * (code - zero) of the nearest code."""
        scale, zero = scales
        return (w / scale).round_().add_(zero).clamp_(0, 15).sub_(zero).mul_(scale)

    def planes(self, values: Tensor, scales: Planes) -> Planes:
        """Codes of values, and the scales."""
        scale, zero = (plane.flatten(1) for plane in scales)
        wide = [plane.repeat_interleave(self.size, 1)[:, : self.k] for plane in (scale, zero)]
        codes = ((values / wide[0]).round() + wide[1]).clamp(0, 15)
        planes = (pack_nibbles(codes), scale.to(self.dtype))
        return planes if self.symmetric else (*planes, pack_nibbles(zero))


@dataclass(frozen=True)
class Int8Grid:
    """scale * code by row, codes -127 to 127."""

    size: int

    def choices(self, w: Tensor) -> Iterator[Planes]:
        """Shares of the largest magnitude."""
        for share in SHARES_INT8:
            yield (safe_amax(w) * (share / 127.0),)

    def scaled(self, scales: Planes, factor: Tensor) -> Planes:
        """The product."""
        return (scales[0] * factor,)

    def values(self, w: Tensor, scales: Planes) -> Tensor:
        """scale * code of the nearest code."""
        return (w / scales[0]).round_().clamp_(-127, 127).mul_(scales[0])

    def planes(self, values: Tensor, scales: Planes) -> Planes:
        """Codes of values, and the scales."""
        scale = scales[0].flatten(1)
        return (values / scale).round().clamp(-127, 127).to(torch.int8), scale


def grid(w: Tensor, scheme: Scheme) -> Grid:
    """Of 4-bit weights by group or row, of 8-bit ones by row."""
    k = w.shape[1]
    if scheme.weights.num_bits == 8:
        return Int8Grid(max(k, 1))
    return Int4Grid(group_of(scheme, k), k, scheme.weights.symmetric, w.dtype)


def dequantize_weight(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """scale * (code - zero), f32 [n, k]."""
    if scheme.weights.num_bits == 8:
        return planes[0].float() * planes[1]
    group = group_of(scheme, k)
    codes = unpack_nibbles(planes[0], k).float()
    scale = planes[1].float().repeat_interleave(group, 1)[:, :k]
    if scheme.weights.symmetric:
        return (codes - SYMMETRIC_ZERO) * scale
    zero = unpack_nibbles(planes[2], planes[1].shape[1]).float().repeat_interleave(group, 1)[:, :k]
    return (codes - zero) * scale


def quantize_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """Never called: a 16-bit input has no quantize node."""
    raise AssertionError("weight-only schemes leave the input alone")


def linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """x @ dequantized(w).T + bias, in f32."""
    y = torch.matmul(x[0].float(), dequantize_weight(w, scheme, x[0].shape[-1]).t())
    return (y if bias is None else y + bias.float()).to(dtype)


FAMILY = register_family(
    Family(
        "weight_only",
        PRESETS,
        accepts,
        weight_planes,
        quantize_weight,
        dequantize_weight,
        quantize_input,
        linear,
        grid=grid,
    )
)
