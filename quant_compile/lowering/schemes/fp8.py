"""FP8 linears with one scale per weight row or tensor and one per token or tensor of the input.

Weight planes: ``data`` [n, k] float8, ``scale`` [n, 1] f32 (a per-tensor scale is repeated per row, so that merged
siblings keep their own), and ``input_scale`` [1] f32 for static schemes, which the weight store adds.
Input planes: ``data`` [..., k] float8, ``scale`` [..., 1] f32 (or [1] f32 for one scale per tensor).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Family, Planes, PlaneSpec, Reject, register_family
from quant_compile.ir.numerics import FLOAT_DTYPES, FLOAT_MAX, by_row_chunks, safe_amax, tensor_amax, to_float8
from quant_compile.ir.scheme import QuantArgs, Scheme


def _preset(weights: str, inputs: str, dynamic: bool, format: str = "e4m3") -> Scheme:
    return Scheme(
        QuantArgs(8, "float", weights, format=format),
        QuantArgs(8, "float", inputs, dynamic=dynamic, format="e4m3"),
    )


PRESETS = {
    "FP8_DYNAMIC": _preset("channel", "token", dynamic=True),
    "FP8": _preset("tensor", "tensor", dynamic=False),
    "FP8_TENSOR_DYNAMIC": _preset("tensor", "tensor", dynamic=True),
    "FP8_E5M2_DYNAMIC": _preset("channel", "token", dynamic=True, format="e5m2"),
}


def accepts(scheme: Scheme) -> Reject | None:
    """FP8 symmetric weights per channel or tensor with FP8 inputs per token (dynamic) or tensor."""
    w, a = scheme.weights, scheme.input_activations
    if w.type != "float" or w.num_bits != 8 or w.strategy not in ("channel", "tensor") or not w.symmetric:
        return Reject("weights must be symmetric 8-bit floats per channel or tensor")
    if a is None:
        return None
    if a.type != "float" or a.num_bits != 8 or a.strategy not in ("token", "tensor") or not a.symmetric:
        return Reject("inputs must be symmetric 8-bit floats per token or tensor")
    if a.strategy == "token" and not a.dynamic:
        return Reject("per-token input scales must be dynamic")
    return None


def weight_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[PlaneSpec, ...]:
    """``data`` and ``scale``."""
    data = FLOAT_DTYPES[scheme.weights.format or "e4m3"]
    return PlaneSpec("data", (n, k), data), PlaneSpec("scale", (n, 1), torch.float32)


def quantize_weight(w: Tensor, scheme: Scheme) -> Planes:
    """[n, k] -> float8 codes and scale = amax / max(format), per row or for the tensor."""
    format = scheme.weights.format or "e4m3"
    whole = tensor_amax(w) if scheme.weights.strategy == "tensor" else None

    def chunk(rows: Tensor) -> Planes:
        amax = safe_amax(rows) if whole is None else whole.expand(rows.shape[0], 1)
        scale = amax * (1.0 / FLOAT_MAX[format])
        return to_float8(rows.float(), scale.reciprocal(), format), scale.contiguous()

    return by_row_chunks(w, 1, chunk)


def dequantize_weight(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """Codes times scale, f32 [n, k]."""
    return planes[0].float() * planes[1]


def quantize_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """Codes and scale = amax / max(format) per token or tensor, or codes under the calibrated ``scale`` [1] f32."""
    a = scheme.input_activations
    assert a is not None and a.format is not None
    if scale is None:
        scale = safe_amax(x, -1 if a.strategy == "token" else None) * (1.0 / FLOAT_MAX[a.format])
        if a.strategy == "tensor":
            scale = scale.reshape(1)
    return to_float8(x.float(), scale.reciprocal(), a.format), scale


def linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """(x codes @ w codes.T) * x scale * w scale + bias, accumulated in f32."""
    y = torch.matmul(x[0].float(), w[0].float().t())
    if scheme.input_activations is not None:
        y = y * x[1]
    y = y * w[1].reshape(-1)
    return (y if bias is None else y + bias.float()).to(dtype)


FAMILY = register_family(
    Family("fp8", PRESETS, accepts, weight_planes, quantize_weight, dequantize_weight, quantize_input, linear)
)
