"""INT8 linears (W8A8): int8 weight rows with int8 inputs, per token at run time or per tensor from calibration.

Weight planes: ``data`` [n, k] int8, ``scale`` [n, 1] f32. Input planes: ``data`` [..., k] int8, ``scale`` [..., 1] f32, or
[1] f32 for one scale per tensor. The product is an exact int32 sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Family, Grid, Planes, PlaneSpec, Reject, register_family
from quant_compile.ir.numerics import by_row_chunks, safe_amax, tensor_amax, to_int8
from quant_compile.ir.scheme import QuantArgs, Scheme
from quant_compile.lowering.schemes.weight_only import Int8Grid

PRESETS = {
    "W8A8": Scheme(QuantArgs(8, "int", "channel"), QuantArgs(8, "int", "token", dynamic=True)),
    "W8A8_STATIC": Scheme(QuantArgs(8, "int", "channel"), QuantArgs(8, "int", "tensor")),
}


def accepts(scheme: Scheme) -> Reject | None:
    """Symmetric int8 weights per channel or tensor with symmetric int8 inputs per token (dynamic) or tensor."""
    w, a = scheme.weights, scheme.input_activations
    if w.type != "int" or w.num_bits != 8 or w.strategy not in ("channel", "tensor") or not w.symmetric:
        return Reject("weights must be symmetric 8-bit integers per channel or tensor")
    if a is None:
        return Reject("inputs must be quantized")
    if a.type != "int" or a.num_bits != 8 or a.strategy not in ("token", "tensor") or not a.symmetric:
        return Reject("inputs must be symmetric 8-bit integers per token or tensor")
    if a.strategy == "token" and not a.dynamic:
        return Reject("per-token input scales must be dynamic")
    return None


def weight_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[PlaneSpec, ...]:
    """``data`` and ``scale``."""
    return PlaneSpec("data", (n, k), torch.int8), PlaneSpec("scale", (n, 1), torch.float32)


def quantize_weight(w: Tensor, scheme: Scheme) -> Planes:
    """[n, k] -> int8 codes and scale = amax / 127, per row or for the tensor."""
    whole = tensor_amax(w) if scheme.weights.strategy == "tensor" else None

    def chunk(rows: Tensor) -> Planes:
        amax = safe_amax(rows) if whole is None else whole.expand(rows.shape[0], 1)
        scale = amax * (1.0 / 127.0)
        return to_int8(rows.float(), scale.reciprocal()), scale.contiguous()

    return by_row_chunks(w, 1, chunk)


def dequantize_weight(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """Codes times scale, f32 [n, k]."""
    return planes[0].float() * planes[1]


def quantize_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """Codes and scale = amax / 127 per token or tensor, or codes under the calibrated ``scale`` [1] f32."""
    a = scheme.input_activations
    assert a is not None
    if scale is None:
        scale = safe_amax(x, -1 if a.strategy == "token" else None) * (1.0 / 127.0)
        if a.strategy == "tensor":
            scale = scale.reshape(1)
    return to_int8(x.float(), scale.reciprocal()), scale


def linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Exact integer product (f64 holds it), times x scale, times w scale, plus bias, in f32."""
    y = torch.matmul(x[0].double(), w[0].double().t()).float()
    y = y * x[1] * w[1].reshape(-1)
    return (y if bias is None else y + bias.float()).to(dtype)


def grid(w: Tensor, scheme: Scheme) -> Grid | None:
    """Of weights by row; one scale for a tensor stays that of its largest magnitude."""
    return Int8Grid(max(w.shape[1], 1)) if scheme.weights.strategy == "channel" else None


FAMILY = register_family(
    Family("int8", PRESETS, accepts, weight_planes, quantize_weight, dequantize_weight, quantize_input, linear, grid=grid)
)
