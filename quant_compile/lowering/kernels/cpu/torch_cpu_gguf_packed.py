"""GGUF weights for decoding on CPU: Q4_0 and Q4_K by torch's int4 kernel under bf16 inputs, Q8_0 from codes beside their scales.

Layout ``gguf_cpu_int4``: ``data`` in torch's order and ``scale_zero`` [k/32, n, 2] bf16, as ``cpu_int4`` has them; then the scales of
``gguf_planes``, from which the blocks can be had back. torch's kernel takes scales in bf16: they are rounded once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.numerics import by_row_chunks
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.cpu.torch_cpu import INT4_WINDOW, _aligned, _int4_order
from quant_compile.lowering.kernels.gguf import triton_gguf as parts
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.schemes.weight_only import unpack_nibbles
from quant_compile.lowering.target import Target

GROUP = 32
ZERO = 8  # torch's kernel takes it off each code
# Weights of Q8_0 turned into f32 at a time: 2 MB, and microseconds of one thread for each.
CHUNK_ELEMENTS = 1 << 19
DECODE_US = 4e-4


def _reject(problem: Problem, target: Target, *names: str) -> Reject | None:
    if target.device != "cpu":
        return Reject("runs on CPU only")
    if family_of(problem.scheme).name != "gguf":
        return Reject("serves weights in GGUF blocks")
    if block_of(problem.scheme).name not in names:
        return Reject(f"serves {' and '.join(name.upper() for name in names)}, not {problem.scheme.spec}")
    return None


# --- Q4_0, Q4_K ---


def planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """``data``, ``scale_zero``, then ``scale`` and ``super`` of ``gguf_planes``."""
    data, *scales = parts.planes(problem)
    return data, PlaneSpec("scale_zero", (data.shape[1] // 16, problem.n, 2), torch.bfloat16), *scales


def pack(row_form: Planes, problem: Problem) -> Planes:
    """``blocks`` -> ``gguf_cpu_int4``."""
    data, *scales = parts.pack(row_form, problem)

    def chunk(rows: Tensor) -> Planes:
        return (
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                parts._low_inv(rows.unflatten(-1, (-1, 16))).flatten(1), 1
            ),
        )

    (packed,) = by_row_chunks(data, INT4_WINDOW, chunk)
    if block_of(problem.scheme).name == "q4_0":
        scale = scales[0].float()
        offset = torch.zeros_like(scale)
    else:
        codes, (d, dmin) = (
            scales[0].unflatten(-1, (-1, 8, 2)).float(),
            scales[1].unflatten(-1, (-1, 2)).float().unbind(-1),
        )
        scale, minimum = (d.unsqueeze(-1) * codes[..., 0]).flatten(1), (dmin.unsqueeze(-1) * codes[..., 1]).flatten(1)
        offset = ZERO * scale - minimum
    scale_zero = torch.stack((scale, offset), -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return packed, scale_zero, *scales


def unpack(packed: Planes, problem: Problem) -> Planes:
    """Its inverse, exactly."""
    rows: list[Tensor] = []
    for window in packed[0].split(INT4_WINDOW):
        codes = torch.empty(window.shape[0] * problem.k, dtype=torch.uint8)
        codes[_int4_order(window.shape[0], problem.k)] = unpack_nibbles(window, problem.k).flatten()
        rows.append(parts._low(codes.reshape(window.shape[0], problem.k)).flatten(1))
    return parts.unpack((torch.cat(rows), *packed[2:]), problem)


def fit_int4pack(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Q4_0 and Q4_K under bf16 inputs, n a multiple of 16."""
    refusal = _reject(problem, target, "q4_0", "q4_k")
    if refusal is not None:
        return refusal
    if problem.dtype is not torch.bfloat16:
        return Reject(f"only bfloat16 is vectorized, got {problem.dtype}")
    if problem.n % 16:
        return Reject(f"n must be a multiple of 16, got {problem.n}")
    # Unpacking nibbles, not memory, bounds it at m = 1: hence the low share of the bandwidth.
    return Rank(estimate(problem, m, target, 0.85, 4 + 32 / GROUP, math_bits=16, bandwidth_efficiency=0.6))


def run_int4pack(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] bf16 times weights in ``gguf_cpu_int4`` -> [m, n] bf16, accumulated in f32.

    Source: ``aten::_weight_int4pack_mm_for_cpu``, which dequantizes as (code - 8) * scale + zero.
    """
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(_aligned(x[0]), w[0], GROUP, w[1])
    return y if bias is None else y.add_(bias)


# --- Q8_0 ---


def fit_q8(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Q8_0, any size and dtype."""
    refusal = _reject(problem, target, "q8_0")
    if refusal is not None:
        return refusal
    conversion = DECODE_US * problem.n * problem.k / max(1, target.sm_count)
    return Rank(estimate(problem, m, target, 1.9, 8.5, math_bits=16, input_bits=32) + conversion)


def run_q8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] times Q8_0 in ``gguf_planes``, a few rows scaled in one pass and multiplied while in cache -> [m, n], f32 sums."""
    left, (data, scale) = x[0].float(), w
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    step = max(1, CHUNK_ELEMENTS // max(1, problem.k))
    for start in range(0, problem.n, step):
        codes = data[start : start + step].unflatten(-1, (-1, GROUP))
        rows = torch.mul(codes, scale[start : start + step].float().unsqueeze(-1)).flatten(1)
        y[:, start : start + step] = torch.mm(left, rows.t())
    return (y if bias is None else y.add_(bias.float())).to(problem.dtype)


LAYOUTS = (Layout("gguf_cpu_int4", pack, unpack, planes, row_block=lambda problem: 0),)
KERNELS = (
    Kernel("torch_cpu_gguf_int4pack", "gguf_cpu_int4", fit_int4pack, run_int4pack),
    Kernel("torch_cpu_gguf_q8", parts.PACKED, fit_q8, run_q8),
)
