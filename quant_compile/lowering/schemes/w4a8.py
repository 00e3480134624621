"""4-bit weights under 8-bit inputs: int4 groups with int8 or FP8 inputs (W4A8, W4AFP8), and QServe's two uint4 forms.

Family w4a8. Weight planes: those of symmetric 4-bit ``weight_only`` weights, bit for bit. Input planes: those of ``int8``
or ``fp8`` inputs, per token or per tensor.

Family qserve, asymmetric weights with int8 inputs per token. g = ceil(k / group_size); a ragged last group is legal.

* per channel: ``data`` [n, ceil(k/2)] u8 (codes q = 0..15, even k in the low nibble), ``scale`` [n, 1] f16, ``zero``
  [n, 1] u8 (0..15); w = scale * (q - zero). Input planes: ``data`` [..., k] int8, ``scale`` [..., 1] f32 and ``sum``
  [..., 1] f32, the exact sum of the row's codes, so that y = scale_x * scale * (codes_x . q - zero * sum).
* per group below a channel (progressive): ``data`` likewise, ``scale`` [n, 1] f16, ``group_scale`` [n, g] int8 (1..16),
  ``zero`` [n, g] u8 (0..15); w = scale * group_scale * (q - zero), where group_scale * (q - zero) is an int8. Input
  planes: ``data`` and ``scale``.

A NaN or inf in a weight makes its scale NaN or inf, hence everything under that scale; one in an input, its row.
Source: QServe (Lin et al. 2024, arXiv 2405.04532) for the two forms and level 1's range of 119, which leaves half a step of
the coarsest group scale inside of an int8. Two things are stricter here than in its reference quantizer: scales are
rounded up, never down, so that no value is clipped, and groups always hold 0, so that zero points fit a nibble.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Family, Planes, PlaneSpec, Reject, register_family
from quant_compile.ir.numerics import by_row_chunks, safe_amax
from quant_compile.ir.scheme import QuantArgs, Scheme
from quant_compile.lowering.schemes import fp8, int8, weight_only
from quant_compile.lowering.schemes.weight_only import pack_nibbles, unpack_nibbles

_INT8 = QuantArgs(8, "int", "token", dynamic=True)
PRESETS = {
    "W4A8": Scheme(QuantArgs(4, "int", "group", group_size=128), _INT8),
    "W4AFP8": Scheme(QuantArgs(4, "int", "group", group_size=128), QuantArgs(8, "float", "token", dynamic=True)),
}
QSERVE_PRESETS = {
    "QSERVE_W4A8_CHANNEL": Scheme(QuantArgs(4, "int", "channel", symmetric=False), _INT8),
    "QSERVE_W4A8_GROUP": Scheme(QuantArgs(4, "int", "channel_group", symmetric=False, group_size=128), _INT8),
}
LEVEL1_MAX = 119.0

# --- W4A8 and W4AFP8 ---


def accepts(scheme: Scheme) -> Reject | None:
    """int4 symmetric weights per group or channel with int8 or e4m3 inputs per token (dynamic) or tensor."""
    w, a = scheme.weights, scheme.input_activations
    if a is None:
        return Reject("inputs must be quantized")
    if w.type != "int" or w.num_bits != 4 or w.strategy not in ("group", "channel") or not w.symmetric:
        return Reject("weights must be symmetric 4-bit integers per group or channel")
    refusal = weight_only.accepts(Scheme(w))
    if refusal is not None:
        return refusal
    if a.num_bits != 8 or a.strategy not in ("token", "tensor") or not a.symmetric:
        return Reject("inputs must be symmetric 8-bit codes per token or tensor")
    if a.strategy == "token" and not a.dynamic:
        return Reject("per-token input scales must be dynamic")
    return Reject(f"float inputs must be e4m3, got {a.format}") if a.format not in (None, "e4m3") else None


def quantize_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """Codes and scale per token or tensor, as ``int8`` or ``fp8`` make them."""
    a = scheme.input_activations
    assert a is not None
    return (int8 if a.type == "int" else fp8).quantize_input(x, scheme, scale)


def linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """(x codes @ dequantized w.T) * x scale + bias, in f32."""
    y = torch.matmul(x[0].float(), weight_only.dequantize_weight(w, scheme, x[0].shape[-1]).t()) * x[1]
    return (y if bias is None else y + bias.float()).to(dtype)


FAMILY = register_family(
    Family(
        "w4a8",
        PRESETS,
        accepts,
        weight_only.weight_planes,
        weight_only.quantize_weight,
        weight_only.dequantize_weight,
        quantize_input,
        linear,
        grid=weight_only.grid,
    )
)

# --- QServe ---


def accepts_qserve(scheme: Scheme) -> Reject | None:
    """uint4 weights with a zero point per channel, or per group below a channel scale, with int8 inputs per token."""
    w, a = scheme.weights, scheme.input_activations
    if w.type != "int" or w.num_bits != 4 or w.strategy not in ("channel", "channel_group") or w.symmetric:
        return Reject("weights must be asymmetric 4-bit integers per channel or channel_group")
    if w.group_size is not None and (w.group_size < 16 or w.group_size & (w.group_size - 1)):
        return Reject(f"group_size must be a power of two from 16 up, got {w.group_size}")
    if a is None or (a.type, a.num_bits, a.strategy, a.symmetric, a.dynamic) != ("int", 8, "token", True, True):
        return Reject("inputs must be dynamic symmetric 8-bit integers per token")
    return None


def _grouped(scheme: Scheme) -> bool:
    return scheme.weights.group_size is not None


def qserve_weight_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[PlaneSpec, ...]:
    """``data``, ``scale``, ``group_scale`` where there are groups, and ``zero``."""
    planes = (PlaneSpec("data", (n, -(-k // 2)), torch.uint8), PlaneSpec("scale", (n, 1), torch.float16))
    if not _grouped(scheme):
        return (*planes, PlaneSpec("zero", (n, 1), torch.uint8))
    groups = -(-k // weight_only.group_of(scheme, k))
    return (*planes, PlaneSpec("group_scale", (n, groups), torch.int8), PlaneSpec("zero", (n, groups), torch.uint8))


def qserve_quantize_weight(w: Tensor, scheme: Scheme) -> Planes:
    """[n, k] -> planes as above; codes are rounded under the scales as stored."""
    return by_row_chunks(w, 1, _quantize_progressive(scheme) if _grouped(scheme) else _quantize_channel)


def _half_from_above(scale: Tensor) -> Tensor:
    """The smallest f16 that is at least ``scale`` (f32, positive); inf beyond f16's range; NaN stays."""
    half = scale.to(torch.float16)
    return (half.view(torch.int16) + (half.float() < scale).to(torch.int16)).view(torch.float16)


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the last dimension and 0."""
    return x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)


def _codes(x: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, zero), both 0..15, of f32 x under ``scale`` (which is at least a fifteenth of x's range)."""
    zero = (-low / scale).round().clamp(0, 15)
    return ((x / scale).round() + zero).clamp(0, 15), zero


def _quantize_channel(rows: Tensor) -> Planes:
    low, high = _range(rows.float())
    scale = _half_from_above(safe_amax(high - low) / 15.0)
    codes, zero = _codes(rows.float(), scale.float(), low)
    return pack_nibbles(codes), scale, zero.to(torch.uint8)


def _quantize_progressive(scheme: Scheme) -> Callable[[Tensor], Planes]:
    group = scheme.weights.group_size
    assert group is not None

    def chunk(rows: Tensor) -> Planes:
        n, k = rows.shape
        scale = _half_from_above(safe_amax(rows) / LEVEL1_MAX)
        level1 = (rows.float() / scale.float()).round().clamp(-LEVEL1_MAX, LEVEL1_MAX)
        grouped = pad(level1, (0, -k % group)).reshape(n, -(-k // group), group)
        low, high = _range(grouped)
        group_scale = ((high - low) / 15.0).ceil().clamp_min(1)
        codes, zero = _codes(grouped, group_scale, low)
        small = (group_scale.squeeze(-1).to(torch.int8), zero.squeeze(-1).to(torch.uint8))
        return pack_nibbles(codes.flatten(1)[:, :k]), scale, *small

    return chunk


def level1_codes(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """What int8 inputs are multiplied by: group_scale * (q - zero), or q - zero per channel; integers in f32 [n, k]."""
    codes, zero = unpack_nibbles(planes[0], k).float(), planes[-1].float()
    if not _grouped(scheme):
        return codes - zero
    group = weight_only.group_of(scheme, k)
    zero, scale = (plane.repeat_interleave(group, 1)[:, :k] for plane in (zero, planes[2].float()))
    return (codes - zero) * scale


def qserve_dequantize_weight(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """scale * group_scale * (q - zero), f32 [n, k]."""
    return level1_codes(planes, scheme, k) * planes[1].float()


def qserve_quantize_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """int8 codes and scale of each token; per-channel weights also take the sum of each row's codes, exact in f32."""
    codes, scale = int8.quantize_input(x, scheme, scale)
    if _grouped(scheme):
        return codes, scale
    return codes, scale, codes.to(torch.float32).sum(-1, keepdim=True)


def qserve_linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Exact integer product (f64 holds it), less zero * sum per channel, times x scale, times w scale, plus bias."""
    k = x[0].shape[-1]
    if _grouped(scheme):
        total = torch.matmul(x[0].double(), level1_codes(w, scheme, k).double().t())
    else:
        total = torch.matmul(x[0].double(), unpack_nibbles(w[0], k).double().t()) - w[2].reshape(-1).double() * x[2]
    y = total.float() * x[1] * w[1].reshape(-1).float()
    return (y if bias is None else y + bias.float()).to(dtype)


QSERVE = register_family(
    Family(
        "qserve",
        QSERVE_PRESETS,
        accepts_qserve,
        qserve_weight_planes,
        qserve_quantize_weight,
        qserve_dequantize_weight,
        qserve_quantize_input,
        qserve_linear,
    )
)
