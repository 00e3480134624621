"""Linears on torch's own CPU kernels: int8 and int4 weights under bf16 inputs, exact int8, and dequantization.

``torch_cpu_int8pack`` and ``torch_cpu_int4pack`` serve decoding: they read the quantized weight once and never write it
out again. Only their bf16 paths are vectorized (f16 and f32 run ten times slower), so other dtypes are refused here and
served by ``torch_cpu_dequant``, which runs every scheme a few rows of the weight at a time, so that its f32 copy
stays in cache. The int8 route of oneDNN for unsigned inputs is left out: without VNNI its 16-bit sums saturate.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.numerics import by_row_chunks
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank
from quant_compile.lowering.schemes.weight_only import (
    SYMMETRIC_ZERO,
    group_of,
    pack_nibbles,
    unpack_nibbles,
)
from quant_compile.lowering.target import Target

INT4_GROUPS = (32, 64, 128, 256)
# Rows that torch packs independently of the rest: a multiple of its block on every instruction set (16, 32 or 64).
INT4_WINDOW = 64
# The vectorized loops load up to 64 bytes with aligned instructions.
ALIGNMENT = 64
# Weight elements turned into f32 at a time: 8 MB, which a last-level cache holds.
CHUNK_ELEMENTS = 1 << 21
E4M3_AS_F16 = 256.0


def _cpu_only(target: Target) -> Reject | None:
    return None if target.device == "cpu" else Reject("runs on CPU only")


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor``, copied when its first byte does not lie where aligned vector loads may read it."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y.add_(bias.to(y.dtype))).to(dtype)


# ---- int8 weights under bf16 inputs


def fit_int8pack(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int8 rows with bf16 inputs; k a multiple of 32: the vectorized loop reads past the end of other rows."""
    refusal = _cpu_only(target)
    if refusal is not None:
        return refusal
    w = problem.scheme.weights
    if problem.scheme.input_activations is not None or w.type != "int" or w.num_bits != 8:
        return Reject("serves 8-bit integer weights with 16-bit inputs")
    if problem.dtype is not torch.bfloat16:
        return Reject(f"only bfloat16 is vectorized, got {problem.dtype}")
    if problem.k % 32:
        return Reject(f"k must be a multiple of 32, got {problem.k}")
    return Rank(estimate(problem, m, target, 0.9, 8, math_bits=16))


def run_int8pack(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] bf16 times [n, k] int8 with a scale per row -> [m, n] bf16, accumulated in f32.

    The op wants the scale in bf16; that rounding (at most 2^-9 per output feature) is of the size of the rounding of y.
    Source: ``torch._weight_int8pack_mm``.
    """
    y = torch._weight_int8pack_mm(_aligned(x[0]), _aligned(w[0]), w[1].reshape(-1).to(torch.bfloat16))
    return y if bias is None else y.add_(bias)


# ---- int8 weights and inputs, exact


def fit_int_mm(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int8 weights and inputs of any shape; fast only where oneDNN has VNNI, so it ranks behind dequantization."""
    refusal = _cpu_only(target)
    if refusal is not None:
        return refusal
    a = problem.scheme.input_activations
    if a is None or a.type != "int" or problem.scheme.weights.type != "int" or problem.scheme.weights.num_bits != 8:
        return Reject("serves 8-bit integer weights with 8-bit integer inputs")
    return Rank(estimate(problem, m, target, 0.05, 8, math_bits=8))


def run_int_mm(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] int8 times [n, k] int8 as an exact int32 sum, then both scales and the bias in f32.

    Source: ``torch._int_mm``.
    """
    y = torch._int_mm(x[0], w[0].t()).to(torch.float32)
    return _finish(y.mul_(x[1]).mul_(w[1].reshape(-1)), bias, problem.dtype)


# ---- int4 weights under bf16 inputs


def fit_int4pack(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int4 weights in groups of 32, 64, 128 or 256 with bf16 inputs; n a multiple of 16, k of the group."""
    refusal = _cpu_only(target)
    if refusal is not None:
        return refusal
    w = problem.scheme.weights
    if problem.scheme.input_activations is not None or w.type != "int" or w.num_bits != 4:
        return Reject("serves 4-bit integer weights with 16-bit inputs")
    if problem.dtype is not torch.bfloat16:
        return Reject(f"only bfloat16 is vectorized, got {problem.dtype}")
    group = group_of(problem.scheme, problem.k)
    if group not in INT4_GROUPS:
        return Reject(f"groups must be one of {', '.join(map(str, INT4_GROUPS))}, got {group}")
    if problem.k % group:
        return Reject(f"k must be a multiple of the group size {group}, got {problem.k}")
    if problem.n % 16:
        return Reject(f"n must be a multiple of 16, got {problem.n}")
    # Unpacking nibbles, not memory, bounds it at m = 1: hence the low share of the bandwidth.
    return Rank(estimate(problem, m, target, 0.85, 4 + 32 / group, math_bits=16, bandwidth_efficiency=0.6))


def run_int4pack(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] bf16 times int4 [n, k] in layout ``cpu_int4`` -> [m, n] bf16, accumulated in f32.

    Source: ``aten::_weight_int4pack_mm_for_cpu``, which dequantizes as (code - 8) * scale + zero.
    """
    group = group_of(problem.scheme, problem.k)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(_aligned(x[0]), w[0], group, w[1])
    return y if bias is None else y.add_(bias)


def _pack_int4(planes: Planes, problem: Problem) -> Planes:
    """Row form -> ``data`` [n, k/2] u8 in torch's order, ``scale_zero`` [k/group, n, 2]: scale, (8 - zero) * scale."""

    def chunk(rows: Tensor) -> Planes:
        codes = unpack_nibbles(rows, problem.k).to(torch.int32)
        return (torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),)

    (data,) = by_row_chunks(planes[0], INT4_WINDOW, chunk)
    scale = planes[1]
    offset = torch.zeros_like(scale)
    if len(planes) > 2:
        zero = unpack_nibbles(planes[2], scale.shape[1])
        offset = ((SYMMETRIC_ZERO - zero.float()) * scale.float()).to(scale.dtype)
    return data, torch.stack((scale, offset), -1).transpose(0, 1).contiguous()


@lru_cache(maxsize=8)
def _int4_order(rows: int, k: int) -> Tensor:
    """Source index (row * k + column) of every nibble, low nibble first, of a packed window of ``rows`` rows.

    The order depends on the instruction set, so it is read off torch's packing of the indices' hexadecimal digits.
    """
    index = torch.arange(rows * k)
    order = torch.zeros_like(index)
    for shift in range(0, max(1, int(rows * k - 1).bit_length()), 4):
        digits = ((index >> shift) & 15).to(torch.int32).reshape(rows, k)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits, 1)
        order |= unpack_nibbles(packed, k).flatten().long() << shift
    return order


def _unpack_int4(planes: Planes, problem: Problem) -> Planes:
    """Inverse of ``_pack_int4``."""
    parts: list[Tensor] = []
    for window in planes[0].split(INT4_WINDOW):
        codes = torch.empty(window.shape[0] * problem.k, dtype=torch.uint8)
        codes[_int4_order(window.shape[0], problem.k)] = unpack_nibbles(window, problem.k).flatten()
        parts.append(pack_nibbles(codes.reshape(window.shape[0], problem.k)))
    scale, offset = (plane.t().contiguous() for plane in planes[1].unbind(-1))
    if problem.scheme.weights.symmetric:
        return torch.cat(parts), scale
    zero = (SYMMETRIC_ZERO - offset.float() / scale.float()).round().clamp(0, 15)
    return torch.cat(parts), scale, pack_nibbles(zero)


def _int4_planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    groups = -(-problem.k // group_of(problem.scheme, problem.k))
    return (
        PlaneSpec("data", (problem.n, problem.k // 2), torch.uint8),
        PlaneSpec("scale_zero", (groups, problem.n, 2), problem.dtype),
    )


# ---- every scheme, by dequantizing a few rows at a time


def fit_dequant(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Anything on CPU."""
    refusal = _cpu_only(target)
    if refusal is not None:
        return refusal
    bits = problem.scheme.bits_per_weight
    # f32 GEMM runs faster than the packed kernels' loops once its conversions (4-byte copies) are paid for.
    traffic = 16.0 * problem.n * problem.k / 8
    return Rank(estimate(problem, m, target, 1.3, bits, math_bits=16, input_bits=32, launches=4, extra_bytes=traffic))


def _float_codes(data: Tensor) -> tuple[Tensor, float]:
    """Codes as f32, and the factor they still need.

    torch converts float8 one element at a time on CPU. An e4m3 byte shifted into an f16 is its value times 2^-8 (both
    have subnormals), an e5m2 byte is the upper half of an f16; f16 to f32 is one instruction. NaN codes of e4m3 do not
    survive this: weights that hold NaN are refused when they are quantized.
    """
    if data.dtype is torch.float8_e4m3fn:
        bits = data.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
        return bits.view(torch.float16).float(), E4M3_AS_F16
    if data.dtype is torch.float8_e5m2:
        return data.view(torch.int8).to(torch.int16).bitwise_left_shift_(8).view(torch.float16).float(), 1.0
    return data.float(), 1.0


def _scaled_per_row(scheme: Scheme) -> bool:
    return scheme.weights.strategy in ("channel", "tensor") and scheme.weights.num_bits == 8


def _dequantized_rows(w: Planes, problem: Problem, start: int, stop: int) -> Tensor:
    """Rows of the weight as f32; when every row has one scale, that scale is left out (it is applied to y)."""
    scheme = problem.scheme
    if scheme.weights.num_bits == 4:
        rows = tuple(plane[start:stop] for plane in w)
        return family_of(scheme).dequantize_weight(rows, scheme, problem.k)
    codes, factor = _float_codes(w[0][start:stop])
    if _scaled_per_row(scheme):
        return codes
    block = family_of(scheme).row_block(scheme)
    scale = w[1][start // block : -(-stop // block)]
    return family_of(scheme).dequantize_weight((codes, scale * factor), scheme, problem.k)


def run_dequant(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """The family's linear, its weight dequantized to f32 a chunk of rows at a time and multiplied by f32 inputs."""
    scheme = problem.scheme
    a = scheme.input_activations
    left = x[0].float()
    if a is not None and a.strategy == "group":
        left = left * x[1].repeat_interleave(a.group_size or 1, -1)[:, : problem.k]
    block = family_of(scheme).row_block(scheme)
    step = max(block, CHUNK_ELEMENTS // max(1, problem.k) // block * block)
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    for start in range(0, problem.n, step):
        rows = _dequantized_rows(w, problem, start, min(start + step, problem.n))
        y[:, start : start + step] = torch.nn.functional.linear(left, rows)
    if a is not None and a.strategy != "group":
        y.mul_(x[1])
    if _scaled_per_row(scheme):
        factor = E4M3_AS_F16 if w[0].dtype is torch.float8_e4m3fn else 1.0
        y.mul_(w[1].reshape(-1) * factor)
    return _finish(y, bias, problem.dtype)


LAYOUTS = (Layout("cpu_int4", _pack_int4, _unpack_int4, _int4_planes, row_block=lambda problem: 0),)

KERNELS = (
    Kernel("torch_cpu_int8pack", "rows", fit_int8pack, run_int8pack),
    Kernel("torch_cpu_int_mm", "rows", fit_int_mm, run_int_mm),
    Kernel("torch_cpu_int4pack", "cpu_int4", fit_int4pack, run_int4pack),
    Kernel("torch_cpu_dequant", "rows", fit_dequant, run_dequant),
)
