"""FP4 (e2m1) linears: NVFP4, with e4m3 scales per 16 below an f32 scale per tensor, and MXFP4, with e8m0 scales per 32.

Weights and inputs have planes of the same form; ``...`` is n for a weight and the leading dimensions of an input, kp is k
rounded up to the group size G. Columns past k are zero codes.

* ``data`` [..., kp/2] u8: two codes a byte, even k in the low nibble; a code is a sign (bit 3) and one of VALUES.
* ``scale`` [..., kp/G]: NVFP4 e4m3, MXFP4 the bits of e8m0 as u8: b stands for 2**(b - 127), 255 for NaN.
* ``global``, NVFP4 only, f32: [n, 1] for a weight (its tensor's scale in each row, so that merged siblings keep their own),
  [1] for an input (of the whole input at run time, or the calibrated one). It multiplies: x = e2m1 * scale * global;
  compressed-tensors stores its reciprocal.

NVFP4: global = amax of the tensor / (448 * 6); scale = amax of the group / 6 / global, rounded to nearest even, 2**-9 at
least (so that small groups keep what they can; compressed-tensors gives a scale that rounds to zero 0.125) and 448 at most.
MXFP4: scale = 2**(e - 2), e being the exponent of the group's amax, one more where its significand is 1.75 or above: such an
amax would saturate at 6, where the OCP formula (which has no such step) leaves it. This is the rule of compressed-tensors.
Codes are x / (scale * global) rounded to nearest even among VALUES, saturating at 6; a negative x keeps its sign with a code of
zero. Divisions are divisions, for equality with compressed-tensors; where a compiler approximates them (Triton's ``/``), a
value halfway between two codes may fall to the other.

NaN and inf are never lost: a group that holds one, in NVFP4 also a group whose global scale is zero, negative or not
finite, has a scale of NaN or a global scale that is not finite, and dequantizes to NaN or inf throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Family, Grid, Planes, PlaneSpec, Reject, register_family
from quant_compile.ir.numerics import by_row_chunks, safe_amax, tensor_amax
from quant_compile.ir.scheme import QuantArgs, Scheme

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 6.0
NV_GROUP, MX_GROUP = 16, 32
NV_RANGE = 448.0 * LARGEST
NV_ROOM = 256.0
SMALLEST_E4M3, LARGEST_E4M3 = 2.0**-9, 448.0
E8M0_NAN = 255


def _args(strategy: str, group: int, dynamic: bool = False) -> QuantArgs:
    return QuantArgs(4, "float", strategy, dynamic=dynamic, group_size=group, format="e2m1")


def _nv(dynamic: bool = False) -> QuantArgs:
    return _args("tensor_group", NV_GROUP, dynamic)


def _mx(dynamic: bool = False) -> QuantArgs:
    return _args("group", MX_GROUP, dynamic)


NV_PRESETS = {
    "NVFP4": Scheme(_nv(), _nv(dynamic=True)),
    "NVFP4_STATIC": Scheme(_nv(), _nv()),
    "NVFP4A16": Scheme(_nv()),
}
MX_PRESETS = {"MXFP4": Scheme(_mx(), _mx(dynamic=True)), "MXFP4A16": Scheme(_mx())}


def nvfp4_accepts(scheme: Scheme) -> Reject | None:
    """e2m1 weights in tensor groups of 16, inputs in 16 bits or the same, dynamic or static."""
    w, a = scheme.weights, scheme.input_activations
    if w != _nv():
        return Reject(f"weights must be symmetric e2m1 floats, fixed, per tensor_group of {NV_GROUP}")
    if a is not None and a not in (_nv(), _nv(dynamic=True)):
        return Reject(f"inputs must stay in 16 bits or be symmetric e2m1 floats per tensor_group of {NV_GROUP}")
    return None


def mxfp4_accepts(scheme: Scheme) -> Reject | None:
    """e2m1 weights in groups of 32, inputs in 16 bits or the same, dynamic."""
    w, a = scheme.weights, scheme.input_activations
    if w != _mx():
        return Reject(f"weights must be symmetric e2m1 floats, fixed, per group of {MX_GROUP}")
    if a is not None and a != _mx(dynamic=True):
        return Reject(f"inputs must stay in 16 bits or be dynamic symmetric e2m1 floats per group of {MX_GROUP}")
    return None


# --- codes ---


def pack_codes(codes: Tensor) -> Tensor:
    """[..., c] u8 of 0..15, c even -> [..., c/2] u8, even places in the low nibble."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _pack_groups(codes: Tensor, group: int) -> Tensor:
    """[..., g, group] u8 of 0..15, group 16 or 32 -> [..., g * group / 2] u8, as ``pack_codes``.

    Sixteen codes are a little-endian int64. It is written as a sum over the group, as the group's amax is a maximum, so
    that Inductor makes one kernel of both.
    """
    place = torch.arange(group, device=codes.device)
    shifted = codes.to(torch.int64) << (place % 16 * 4)
    if group == 16:
        words = shifted.sum(-1, keepdim=True)
    else:
        halves = [torch.where(place // 16 == half, shifted, 0).sum(-1) for half in range(group // 16)]
        words = torch.stack(halves, -1)
    return words.flatten(-2).view(torch.uint8)


def unpack_codes(packed: Tensor) -> Tensor:
    """Inverse of ``pack_codes``."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def round_e2m1(x: Tensor) -> Tensor:
    """f32 -> codes 0..15 u8 of the nearest e2m1 value, ties to the even code, saturating; of a NaN the code means nothing."""
    size = x.abs()
    # One more code for each midpoint passed. At a midpoint the even code of the two wins, hence > and >= in turn.
    code = (size > 0.25).to(torch.uint8)
    code = code + (size >= 0.75) + (size > 1.25) + (size >= 1.75) + (size > 2.5) + (size >= 3.5) + (size > 5.0)
    return code | ((x < 0).to(torch.uint8) << 3)


def decode_e2m1(packed: Tensor) -> Tensor:
    """[..., c/2] u8 -> [..., c] f32."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=packed.device)
    return table[unpack_codes(packed).int()]


def decode_e8m0(scale: Tensor) -> Tensor:
    """u8 bits of e8m0 -> f32, exactly; 255 is NaN."""
    bits = scale.to(torch.int32) << 23
    bits = torch.where(scale == 0, 1 << 22, bits)  # 2**-127 is subnormal
    return torch.where(scale == E8M0_NAN, 0x7FC00000, bits).view(torch.float32)


def _grouped(x: Tensor, group: int) -> Tensor:
    """[..., k] -> [..., kp/group, group] f32, zeros past k."""
    k = x.shape[-1]
    groups = -(-k // group)
    x = pad(x, (0, groups * group - k)) if k % group else x
    return x.float().unflatten(-1, (groups, group))


# --- quantization, of weights and inputs alike ---


def quantize_nv(x: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """[..., k] under the global scale ``whole`` [1] -> ``data`` and ``scale``."""
    grouped = _grouped(x, NV_GROUP)
    amax = grouped.abs().amax(-1, keepdim=True)
    # A tensor of sixes: torch on CUDA turns a division by a number into a multiplication.
    wanted = amax / torch.full_like(amax, LARGEST) * whole.reciprocal()
    usable = (wanted >= 0) & (wanted < float("inf"))
    clamped = torch.where(usable, wanted.clamp(SMALLEST_E4M3, LARGEST_E4M3), float("nan"))
    scale = clamped.to(torch.float8_e4m3fn)
    codes = round_e2m1(grouped / (scale.float() * whole))
    return _pack_groups(codes, NV_GROUP), scale.squeeze(-1)


def _quantize_mx(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., k] -> ``data`` and ``scale``."""
    grouped = _grouped(x, MX_GROUP)
    # Without the sign, which compiled code may give a NaN.
    bits = grouped.abs().amax(-1, keepdim=True).view(torch.int32) & 0x7FFFFFFF
    exponent = (((bits + (1 << 21)) >> 23) - 2).clamp_min(0)
    bad = bits >= 0x7F800000
    inverse = ((254 - exponent).clamp_min(1) << 23).view(torch.float32)  # exact, as are the products below
    codes = round_e2m1(grouped * inverse)
    scale = torch.where(bad, E8M0_NAN, exponent).to(torch.uint8)
    return _pack_groups(codes, MX_GROUP), scale.squeeze(-1)


def nvfp4_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[PlaneSpec, ...]:
    """``data``, ``scale`` and ``global``."""
    groups = -(-k // NV_GROUP)
    return (
        PlaneSpec("data", (n, groups * NV_GROUP // 2), torch.uint8),
        PlaneSpec("scale", (n, groups), torch.float8_e4m3fn),
        PlaneSpec("global", (n, 1), torch.float32),
    )


def mxfp4_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[PlaneSpec, ...]:
    """``data`` and ``scale``."""
    groups = -(-k // MX_GROUP)
    data = PlaneSpec("data", (n, groups * MX_GROUP // 2), torch.uint8)
    return data, PlaneSpec("scale", (n, groups), torch.uint8)


def nvfp4_weight(w: Tensor, scheme: Scheme) -> Planes:
    """[n, k] -> ``data``, ``scale``, ``global``; the global scale is of all rows, also where they are taken in chunks."""
    whole = (tensor_amax(w) / torch.full((), NV_RANGE, device=w.device)).reshape(1)

    def chunk(rows: Tensor) -> Planes:
        return *quantize_nv(rows, whole), whole.expand(rows.shape[0], 1).contiguous()

    return by_row_chunks(w, 1, chunk)


def mxfp4_weight(w: Tensor, scheme: Scheme) -> Planes:
    """[n, k] -> ``data``, ``scale``."""
    return by_row_chunks(w, 1, _quantize_mx)


def nvfp4_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """[..., k] -> ``data``, ``scale``, ``global`` [1]: of x, or the calibrated ``scale`` [1] f32."""
    if scale is None:
        amax = safe_amax(x, None)
        scale = (amax / torch.full_like(amax, NV_RANGE)).reshape(1)
    return *quantize_nv(x, scale), scale


def mxfp4_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """[..., k] -> ``data``, ``scale``."""
    assert scale is None
    return _quantize_mx(x)


# --- dequantization and product ---


def _dequantize_nv(planes: Planes) -> Tensor:
    """Planes of a weight or an input -> [..., kp] f32."""
    local = (planes[1].float() * planes[2]).unsqueeze(-1)
    return (decode_e2m1(planes[0]).unflatten(-1, (-1, NV_GROUP)) * local).flatten(-2)


def _dequantize_mx(planes: Planes) -> Tensor:
    """Planes of a weight or an input -> [..., kp] f32."""
    scale = decode_e8m0(planes[1]).unsqueeze(-1)
    return (decode_e2m1(planes[0]).unflatten(-1, (-1, MX_GROUP)) * scale).flatten(-2)


def nvfp4_dequantize(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """e2m1 * (scale * global), f32 [n, k]."""
    return _dequantize_nv(planes)[:, :k]


def mxfp4_dequantize(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """e2m1 * scale, f32 [n, k]."""
    return _dequantize_mx(planes)[:, :k]


def _product(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.matmul(x, w[:, : x.shape[-1]].t())
    return (y if bias is None else y + bias.float()).to(dtype)


def nvfp4_linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Both sides dequantized (an input of 16 bits as it is), multiplied and accumulated in f32."""
    left = x[0].float() if scheme.input_activations is None else _dequantize_nv(x)
    return _product(left, _dequantize_nv(w), bias, dtype)


def mxfp4_linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Both sides dequantized (an input of 16 bits as it is), multiplied and accumulated in f32."""
    left = x[0].float() if scheme.input_activations is None else _dequantize_mx(x)
    return _product(left, _dequantize_mx(w), bias, dtype)


# --- other scales than nearest ones ---


def nearest_e2m1(x: Tensor) -> Tensor:
    """f32 -> the value of ``round_e2m1``'s code, f32: steps of 0.5 up to 2, 1 up to 4, then 2."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(((size / step).round() * step).clamp_max(LARGEST), x)


@dataclass(frozen=True)
class NvGrid:
    """e2m1 * scale * whole. The global scale is such that a group of the largest value may also have 448 / 256 of its usual scale."""

    whole: Tensor
    k: int
    size: int = NV_GROUP

    def choices(self, w: Tensor) -> Iterator[Planes]:
        """The e4m3 number nearest to a sixth of the largest magnitude, then its neighbours: an octave has eight."""
        wanted = (w.abs().amax(-1, keepdim=True) / LARGEST / self.whole).clamp(SMALLEST_E4M3, LARGEST_E4M3)
        nearest = wanted.to(torch.float8_e4m3fn).view(torch.uint8).int()
        for away in (0, 1, 2, 3, 4, 5, 6, -1, -2, -3):
            code = (nearest + away).clamp(1, _LAST_E4M3).to(torch.uint8)
            yield (code.view(torch.float8_e4m3fn).float(),)

    def scaled(self, scales: Planes, factor: Tensor) -> Planes:
        """As e4m3 holds them."""
        return ((scales[0] * factor).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).float(),)

    def values(self, w: Tensor, scales: Planes) -> Tensor:
        """e2m1 * scale * whole of the nearest code."""
        scale = scales[0] * self.whole
        return nearest_e2m1(w / scale) * scale

    def planes(self, values: Tensor, scales: Planes) -> Planes:
        """Codes of values, scales, and the global one in each row."""
        codes = round_e2m1(_grouped(values, NV_GROUP) / (scales[0] * self.whole))
        whole = self.whole.expand(values.shape[0], 1).contiguous()
        return _pack_groups(codes, NV_GROUP), scales[0].squeeze(-1).to(torch.float8_e4m3fn), whole


_LAST_E4M3 = 0x7E  # the byte of 448


@dataclass(frozen=True)
class MxGrid:
    """e2m1 * 2**exponent."""

    k: int
    size: int = MX_GROUP

    def choices(self, w: Tensor) -> Iterator[Planes]:
        """The rule of compressed-tensors alone: half and twice its scale lower the error of weights a little, that of logits not at all."""
        yield (decode_e8m0(_quantize_mx(w.flatten(1))[1]).clamp(2.0**-126, 2.0**127).unsqueeze(-1),)

    def scaled(self, scales: Planes, factor: Tensor) -> None:
        """Powers of two alone."""
        return

    def values(self, w: Tensor, scales: Planes) -> Tensor:
        """e2m1 * scale of the nearest code."""
        return nearest_e2m1(w / scales[0]) * scales[0]

    def planes(self, values: Tensor, scales: Planes) -> Planes:
        """Codes of values, and the bits of the scales' exponents."""
        codes = round_e2m1(_grouped(values, MX_GROUP) / scales[0])
        exponents = (scales[0].contiguous().view(torch.int32) >> 23).to(torch.uint8)
        return _pack_groups(codes, MX_GROUP), exponents.squeeze(-1)


def nvfp4_grid(w: Tensor, scheme: Scheme) -> Grid:
    """Its global scale leaves the largest group's scale at 256 of 448."""
    return NvGrid((tensor_amax(w) / (NV_ROOM * LARGEST)).reshape(1), w.shape[1])


def mxfp4_grid(w: Tensor, scheme: Scheme) -> Grid:
    """Groups of 32."""
    return MxGrid(w.shape[1])


NVFP4 = register_family(
    Family(
        "nvfp4",
        NV_PRESETS,
        nvfp4_accepts,
        nvfp4_planes,
        nvfp4_weight,
        nvfp4_dequantize,
        nvfp4_input,
        nvfp4_linear,
        largest_input=lambda scheme: NV_RANGE,
        grid=nvfp4_grid,
    )
)
MXFP4 = register_family(
    Family(
        "mxfp4",
        MX_PRESETS,
        mxfp4_accepts,
        mxfp4_planes,
        mxfp4_weight,
        mxfp4_dequantize,
        mxfp4_input,
        mxfp4_linear,
        grid=mxfp4_grid,
    )
)
