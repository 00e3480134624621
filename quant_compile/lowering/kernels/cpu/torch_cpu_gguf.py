"""Weights in GGUF blocks on CPU: a few rows at a time turned into f32, then multiplied; 4-bit codes on torch's int4 kernel.

``torch_cpu_gguf`` reads blocks as they are. ``torch_cpu_gguf_int4pack`` serves bf16 models: codes of q4_0, q4_1 and q4_k lie in torch's
order, with a scale and an offset in bf16 for each 32, and what else a block holds lies beside them, so that the blocks can be had back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, bits_per_weight, family_of
from quant_compile.ir.ggml.decode import decode, fields, scales_of
from quant_compile.ir.ggml.encode import fields as packed
from quant_compile.ir.numerics import by_row_chunks
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.cpu.torch_cpu import INT4_WINDOW, _aligned, _int4_order
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank, always
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.schemes.weight_only import unpack_nibbles
from quant_compile.lowering.target import Target

# Weight elements turned into f32 at a time: 1 MB, which leaves room in cache for what decoding keeps besides.
CHUNK_ELEMENTS = 1 << 18
# Microseconds of one thread for each weight that is decoded.
DECODE_US = 2.5e-3


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any size, on CPU."""
    if target.device != "cpu":
        return Reject("runs on CPU only")
    if family_of(problem.scheme).name != "gguf":
        return Reject("serves weights in GGUF blocks")
    conversion = DECODE_US * problem.n * problem.k / max(1, target.sm_count)
    bits = bits_per_weight(problem.scheme)
    return Rank(estimate(problem, m, target, 1.9, bits, math_bits=16, input_bits=32) + conversion)


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] times [n, k] plus bias -> [m, n], f32 sums. Source: the family's ``linear``."""
    (blocks,), name = w, block_of(problem.scheme).name
    return by_rows(x[0], bias, problem, CHUNK_ELEMENTS, lambda rows: decode(name, blocks[rows]))


def by_rows(
    x: Tensor, bias: Tensor | None, problem: Problem, elements: int, values: Callable[[slice], Tensor]
) -> Tensor:
    """x [m, k] times a weight of which ``values`` makes a few rows in f32 at a time, ``elements`` of it -> [m, n], f32 sums."""
    left = x.float()
    y = torch.empty((left.shape[0], problem.n), dtype=torch.float32)
    step = max(1, elements // max(1, problem.k))
    for start in range(0, problem.n, step):
        rows = slice(start, start + step)
        y[:, rows] = torch.mm(left, values(rows).t())
    return (y if bias is None else y.add_(bias.float())).to(problem.dtype)


# ---- 4-bit codes under bf16 inputs

GROUP = 32
# Bytes of a block before its codes, and bytes whose low nibbles come before their high ones.
HEADS = {"q4_0": (2, 16), "q4_1": (4, 16), "q4_k": (16, 32)}


def fit_int4pack(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """q4_0, q4_1 and q4_k with bf16 inputs; n a multiple of 16."""
    if target.device != "cpu":
        return Reject("runs on CPU only")
    if family_of(problem.scheme).name != "gguf" or block_of(problem.scheme).name not in HEADS:
        return Reject(f"serves GGUF blocks of {', '.join(HEADS)}")
    if problem.dtype is not torch.bfloat16:
        return Reject(f"only bfloat16 is vectorized, got {problem.dtype}")
    if problem.n % 16 or problem.k % block_of(problem.scheme).size:
        return Reject(f"n must be a multiple of 16 and k of whole blocks, got {problem.n} and {problem.k}")
    return Rank(estimate(problem, m, target, 0.85, 4 + 32 / GROUP, math_bits=16, bandwidth_efficiency=0.6))


def run_int4pack(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] bf16 times [n, k] in layout ``cpu_gguf_int4`` -> [m, n] bf16, accumulated in f32.

    Codes are exact. Scale and offset (of code 8) are rounded to bf16, by at most 2^-9 of themselves: of a group around zero a sixtieth of
    a step, of one that lies far from it, as some of q4_1 and q4_k may, up to three quarters.
    Source: ``aten::_weight_int4pack_mm_for_cpu``, which dequantizes as (code - 8) * scale + offset.
    """
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(_aligned(x[0]), w[0], GROUP, w[1])
    return y if bias is None else y.add_(bias)


def _pack(planes: Planes, problem: Problem) -> Planes:
    """Blocks -> ``data`` [n, k/2] u8 in torch's order, ``scale_offset`` [k/32, n, 2] bf16, ``heads`` [n, bytes] u8."""
    block = block_of(problem.scheme)
    head, width = HEADS[block.name]

    def chunk(rows: Tensor) -> Planes:
        blocks = rows.unflatten(-1, (-1, block.nbytes))
        codes = fields(blocks[..., head:], width, 4).flatten(1).to(torch.int32)
        scale, offset = (part.flatten(1) for part in scales_of(block.name, blocks))
        pair = torch.stack((scale, offset + 8 * scale), -1).to(torch.bfloat16)
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return data, pair, blocks[..., :head].flatten(1)

    data, pairs, heads = by_row_chunks(planes[0], INT4_WINDOW, chunk)
    return data, pairs.transpose(0, 1).contiguous(), heads.contiguous()


def _unpack(planes: Planes, problem: Problem) -> Planes:
    """Inverse of ``_pack``."""
    block = block_of(problem.scheme)
    head, width = HEADS[block.name]
    parts: list[Tensor] = []
    for window, heads in zip(planes[0].split(INT4_WINDOW), planes[2].split(INT4_WINDOW), strict=True):
        codes = torch.empty(window.shape[0] * problem.k, dtype=torch.uint8)
        codes[_int4_order(window.shape[0], problem.k)] = unpack_nibbles(window, problem.k).flatten()
        own = packed(codes.view(window.shape[0], -1, block.size), width, 4)
        parts.append(torch.cat((heads.unflatten(-1, (-1, head)), own), -1).flatten(1))
    return (torch.cat(parts),)


def _planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    block = block_of(problem.scheme)
    heads = problem.k // block.size * HEADS[block.name][0]
    return (
        PlaneSpec("data", (problem.n, problem.k // 2), torch.uint8),
        PlaneSpec("scale_offset", (problem.k // GROUP, problem.n, 2), torch.bfloat16),
        PlaneSpec("heads", (problem.n, heads), torch.uint8),
    )


LAYOUTS = (Layout("cpu_gguf_int4", _pack, _unpack, _planes, row_block=lambda problem: 0),)
KERNELS = (
    Kernel("torch_cpu_gguf", "rows", fit, run),
    Kernel("torch_cpu_gguf_int4pack", "cpu_gguf_int4", fit_int4pack, run_int4pack, portable=always),
)
