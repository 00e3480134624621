"""Linears on torch's own CPU kernels: int8 and int4 weights under bf16 inputs, exact int8, and dequantization.

``torch_cpu_int8pack`` and ``torch_cpu_int4pack`` serve decoding: they read the quantized weight once and never write it
out again. Only their bf16 paths are vectorized (f16 and f32 run ten times slower), so other dtypes are refused here and
served by ``torch_cpu_dequant``, which runs every scheme a few rows of the weight at a time, so that its f32 copy
stays in cache. The int8 route of oneDNN for unsigned inputs is left out: without VNNI its 16-bit sums saturate.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, bits_per_weight, family_of
from quant_compile.ir.numerics import by_row_chunks
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank, always
from quant_compile.lowering.schemes.weight_only import (
    SYMMETRIC_ZERO,
    group_of,
    pack_nibbles,
    unpack_nibbles,
)
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import aligned, fresh, is_tracing

INT4_GROUPS = (32, 64, 128, 256)
# Rows that torch packs independently of the rest: a multiple of its block on every instruction set (16, 32 or 64).
INT4_WINDOW = 64
# The vectorized loops load up to 64 bytes with aligned instructions.
ALIGNMENT = 64
# Weight elements turned into f32 at a time: 4 MB, which a last-level cache holds.
CHUNK_ELEMENTS = 1 << 20
# What is left to multiply when an e4m3 byte is read as an f16: 2 to the difference of the exponents' biases, 15 - 7.
E4M3_AS_F16 = 256.0


DEQUANTIZED = ("fp8", "fp8_block", "int8", "weight_only")


def _cpu_only(target: Target) -> Reject | None:
    return None if target.device == "cpu" else Reject("runs on CPU only")


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor``, copied when its first byte does not lie where aligned vector loads may read it."""
    if aligned(tensor, ALIGNMENT):
        return tensor
    return fresh(tensor) if is_tracing() else tensor.clone()


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y.add_(bias.to(y.dtype))).to(dtype)


# ---- int8 weights under bf16 inputs


def fit_int8pack(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int8 rows with bf16 inputs; k a multiple of 32: the vectorized loop reads past the end of other rows."""
    refusal = _cpu_only(target)
    if refusal is not None:
        return refusal
    if family_of(problem.scheme).name != "weight_only" or problem.scheme.weights.num_bits != 8:
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
    data, scale = with_bf16_scale(w)
    y = torch._weight_int8pack_mm(_aligned(x[0]), _aligned(data), scale)
    return y if bias is None else y.add_(bias)


def with_bf16_scale(w: Planes) -> Planes:
    """The scale as ``_weight_int8pack_mm`` takes it, [n] bf16. Inductor does not lower the op over a scale that it computes."""
    return w[0], w[1].reshape(-1).to(torch.bfloat16)


# ---- int8 weights under bf16 inputs, many tokens


@lru_cache(maxsize=1)
def _bf16_units() -> bool:
    """Whether this CPU multiplies bf16 itself; else torch converts to f32."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in asked)


def fit_int8_bf16(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int8 rows with bf16 inputs: a bf16 copy of the codes, which is exact, and torch's bf16 product. Pays for prompts."""
    refusal = _cpu_only(target)
    if refusal is not None:
        return refusal
    if family_of(problem.scheme).name != "weight_only" or problem.scheme.weights.num_bits != 8:
        return Reject("serves 8-bit integer weights with 16-bit inputs")
    if problem.dtype is not torch.bfloat16:
        return Reject(f"multiplies bfloat16, got {problem.dtype}")
    conversion = 4e-4 * problem.n * problem.k
    # In torch 2.13 the product is about twice as fast as that of torch_cpu_int8pack where bf16 is multiplied in hardware.
    return Rank(estimate(problem, m, target, 2.0 if _bf16_units() else 0.2, 16, math_bits=16) + conversion)


def run_int8_bf16(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] bf16 times [n, k] int8 with a scale per row -> [m, n] bf16; sums are rounded to bf16 before the scale.

    Source: ``torch.mm`` on codes, which bf16 holds exactly.
    """
    y = torch.mm(x[0], w[0].to(torch.bfloat16).t()).float().mul_(w[1].reshape(-1))
    return _finish(y, bias, problem.dtype)


# ---- int8 weights and inputs, exact


def fit_int_mm(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int8 weights and inputs of any shape; fast only where oneDNN has VNNI, so it ranks behind dequantization."""
    refusal = _cpu_only(target)
    if refusal is not None:
        return refusal
    a = problem.scheme.input_activations
    if a is None or a.type != "int" or problem.scheme.weights.type != "int" or problem.scheme.weights.num_bits != 8:
        return Reject("serves 8-bit integer weights with 8-bit integer inputs")
    return Rank(estimate(problem, m, target, 0.03, 8, math_bits=8))


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
    """Anything on CPU. f32 GEMM is faster than the packed kernels' loops once its conversion is paid for."""
    refusal = _cpu_only(target)
    if refusal is not None:
        return refusal
    if family_of(problem.scheme).name not in DEQUANTIZED:
        return Reject(f"does not know the planes of {family_of(problem.scheme).name} schemes")
    bits = bits_per_weight(problem.scheme)
    conversion = 1e-3 * problem.n * problem.k / max(1, target.sm_count)
    return Rank(estimate(problem, m, target, 1.9, bits, math_bits=16, input_bits=32) + conversion)


def in_one_chunk(problem: Problem) -> Reject | None:
    """Under 16-bit inputs, a weight of one chunk: a graph would hold the loop over more turn by turn, with a copy of each in f32.

    Codes of inputs must be rounded to where they are multiplied, and Inductor keeps in f32 what it casts to 8 bits and back.
    """
    if problem.scheme.input_activations is not None:
        return Reject("it multiplies codes of inputs as f32, and a compiler would leave out their rounding")
    if problem.n * problem.k <= CHUNK_ELEMENTS:
        return None
    return Reject(f"its loop over more than {CHUNK_ELEMENTS} elements of a weight is Python of this package")


def run_dequant(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """The family's linear, its weight turned into f32 a chunk of rows at a time and multiplied by f32 inputs."""
    scheme = problem.scheme
    a = scheme.input_activations
    left = x[0].float()
    if a is not None and a.strategy == "group":
        left = left * x[1].repeat_interleave(a.group_size or 1, -1)[:, : problem.k]
    if _ragged(problem):
        y = _multiply_ragged(left, w, problem)
    elif scheme.weights.num_bits == 4:
        y = _multiply_int4(left, w, problem)
    else:
        y = _multiply_8bit(left, w, problem)
    if a is not None and a.strategy != "group":
        y.mul_(x[1])
    return _finish(y, bias, problem.dtype)


def _group(problem: Problem) -> int:
    """Columns of the weight that share a scale."""
    weights = problem.scheme.weights
    return weights.block_structure[1] if weights.block_structure else group_of(problem.scheme, problem.k)


def _ragged(problem: Problem) -> bool:
    """Whether the last group is short, or a byte's two nibbles belong to different groups."""
    group = _group(problem)
    return bool(problem.k % group or (problem.scheme.weights.num_bits == 4 and group % 2))


def _row_chunks(problem: Problem) -> Iterator[tuple[int, int]]:
    block = family_of(problem.scheme).row_block(problem.scheme)
    step = max(block, CHUNK_ELEMENTS // max(1, problem.k) // block * block)
    for start in range(0, problem.n, step):
        yield start, min(start + step, problem.n)


def _scratch(problem: Problem, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for one chunk, allocated once per call: fresh pages for every chunk would cost more than the sums."""
    _, rows = next(_row_chunks(problem))
    return torch.empty((rows, columns), dtype=dtype)


def _multiply_8bit(left: Tensor, w: Planes, problem: Problem) -> Tensor:
    """left @ weight.T for 8-bit codes scaled per row (applied to the product) or per block (applied to the weight)."""
    data, scale = w[0], w[1]
    per_block = problem.scheme.weights.block_structure is not None
    is_float = data.dtype.is_floating_point
    bits = _scratch(problem, problem.k, torch.int16) if is_float else None
    values = _scratch(problem, problem.k, torch.float32)
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    for start, stop in _row_chunks(problem):
        rows = values[: stop - start]
        rows.copy_(data[start:stop] if bits is None else _as_f16(data[start:stop], bits[: stop - start]))
        if per_block:
            _scale_blocks(rows, scale, start, problem)
        y[:, start:stop] = torch.mm(left, rows.t())
    factor = E4M3_AS_F16 if data.dtype is torch.float8_e4m3fn else 1.0
    return y.mul_(factor) if per_block else y.mul_(scale.reshape(-1) * factor)


def _as_f16(data: Tensor, bits: Tensor) -> Tensor:
    """float8 codes as f16 in the memory of ``bits`` (int16): e5m2 as they are, e4m3 as 2^-8 of their value.

    torch converts float8 one element at a time on CPU, but f16 to f32 is one instruction for a vector. An e5m2 byte is
    the upper half of an f16. An e4m3 byte shifted into an f16 is its value times 2^-8, subnormals included; only NaN
    codes become numbers, and weights that hold NaN are refused when they are quantized.
    """
    bits.copy_(data.view(torch.int8))
    if data.dtype is torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16)
    return bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)


def _scale_blocks(rows: Tensor, scale: Tensor, start: int, problem: Problem) -> None:
    """Multiply f32 rows from row ``start`` on by the scales of their blocks, in place."""
    block_rows = family_of(problem.scheme).row_block(problem.scheme)
    first = start // block_rows
    count = -(-rows.shape[0] // block_rows)
    per_row = scale[first : first + count].repeat_interleave(block_rows, 0)[: rows.shape[0]]
    rows.view(rows.shape[0], -1, _group(problem)).mul_(per_row.unsqueeze(-1))


def _multiply_int4(left: Tensor, w: Planes, problem: Problem) -> Tensor:
    """left @ weight.T for int4 groups, even and odd columns apart, so that nibbles need not be interleaved.

    With codes q, y = sum over groups of scale * (left . q) - scale * zero * sum(left).
    """
    group, half = _group(problem), problem.k // 2
    even, odd = left[:, 0::2].contiguous(), left[:, 1::2].contiguous()
    sums = left.view(left.shape[0], -1, group).sum(-1)
    nibbles, values = _scratch(problem, half, torch.uint8), _scratch(problem, half, torch.float32)
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    for start, stop in _row_chunks(problem):
        data, scale = w[0][start:stop], w[1][start:stop].float()
        low, rows = nibbles[: stop - start], values[: stop - start]
        grouped = rows.view(stop - start, -1, group // 2)
        rows.copy_(torch.bitwise_and(data, 15, out=low))
        grouped.mul_(scale.unsqueeze(-1))
        part = torch.mm(even, rows.t())
        rows.copy_(torch.bitwise_right_shift(data, 4, out=low))
        grouped.mul_(scale.unsqueeze(-1))
        part.addmm_(odd, rows.t())
        zero = unpack_nibbles(w[2][start:stop], scale.shape[1]) if len(w) > 2 else SYMMETRIC_ZERO
        y[:, start:stop] = part.addmm_(sums, (scale * zero).t(), alpha=-1)
    return y


def _multiply_ragged(left: Tensor, w: Planes, problem: Problem) -> Tensor:
    """left @ weight.T for shapes whose last group is short: the family's own dequantization, chunk by chunk."""
    family = family_of(problem.scheme)
    block = family.row_block(problem.scheme)
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    for start, stop in _row_chunks(problem):
        tail = tuple(plane[start // block : -(-stop // block)] for plane in w[1:])
        rows = family.dequantize_weight((w[0][start:stop], *tail), problem.scheme, problem.k)
        y[:, start:stop] = torch.mm(left, rows.t())
    return y


LAYOUTS = (Layout("cpu_int4", _pack_int4, _unpack_int4, _int4_planes, row_block=lambda problem: 0),)

KERNELS = (
    Kernel("torch_cpu_int8pack", "rows", fit_int8pack, run_int8pack, portable=always, kept=with_bf16_scale),
    Kernel("torch_cpu_int8_bf16", "rows", fit_int8_bf16, run_int8_bf16, portable=always),
    Kernel("torch_cpu_int_mm", "rows", fit_int_mm, run_int_mm, portable=always),
    Kernel("torch_cpu_int4pack", "cpu_int4", fit_int4pack, run_int4pack, portable=always),
    Kernel("torch_cpu_dequant", "rows", fit_dequant, run_dequant, portable=in_one_chunk),
)
