"""4-bit weights under bf16 inputs by torch's own CUDA kernel ("tinygemm"), in the layout that it converts weights to.

Layout ``tinygemm``: ``data`` as ``torch._convert_weight_to_int4pack`` returns it, ``scale_zero`` [g, n, 2] bf16 with
w = (code - 8) * scale + zero. Fast at one row, slow beyond a few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, bits_per_weight
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.weight_only._weight_only import refuse
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank
from quant_compile.lowering.schemes.weight_only import (
    SYMMETRIC_ZERO,
    group_of,
    pack_nibbles,
    unpack_nibbles,
)
from quant_compile.lowering.target import Target

GROUPS = (32, 64, 128, 256)
INNER_K_TILES = 8
K_MULTIPLE = 16 * INNER_K_TILES
TILE_ROWS = 8
UNPACK_COLUMNS = 512


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int4 in groups of 32 to 256, bf16, n a multiple of 8, k of 128."""
    answer = refuse(problem, target, 4, (torch.bfloat16,))
    if answer is not None:
        return answer
    if problem.scheme.weights.group_size not in GROUPS:
        groups = ", ".join(map(str, GROUPS))
        return Reject(f"group_size must be one of {groups}, got {problem.scheme.weights.group_size}")
    if problem.n % TILE_ROWS:
        return Reject(f"n must be a multiple of {TILE_ROWS}, got {problem.n}")
    if problem.k % K_MULTIPLE:
        return Reject(f"k must be a multiple of {K_MULTIPLE}, got {problem.k}")
    # The kernel reads the whole weight again for every 16 rows of x.
    passes = -(-m // 16)
    bits = (bits_per_weight(problem.scheme) + 16 / group_of(problem.scheme, problem.k)) * passes
    bandwidth = 0.45 if m == 1 else 0.12
    return Rank(estimate(problem, m, target, 0.1, bits, math_bits=16, bandwidth_efficiency=bandwidth, tile_m=16))


def planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """Specs of ``data``, ``scale_zero`` and, with a zero point, ``zero``: the codes that ``scale_zero`` rounds."""
    groups = -(-problem.k // group_of(problem.scheme, problem.k))
    data = (problem.n // TILE_ROWS, problem.k // K_MULTIPLE, 32, INNER_K_TILES // 2)
    zero = () if problem.scheme.weights.symmetric else (PlaneSpec("zero", (problem.n, -(-groups // 2)), torch.uint8),)
    return (
        PlaneSpec("data", data, torch.int32),
        PlaneSpec("scale_zero", (groups, problem.n, 2), torch.bfloat16),
        *zero,
    )


def pack(row_form: Planes, problem: Problem) -> Planes:
    """Row form -> ``tinygemm``; torch wants even columns in the high nibble. Needs a GPU."""
    codes = row_form[0]
    data = torch.ops.aten._convert_weight_to_int4pack((codes << 4) | (codes >> 4), INNER_K_TILES)
    scale = row_form[1].t()
    if problem.scheme.weights.symmetric:
        return data, torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
    zero = unpack_nibbles(row_form[2], scale.shape[0]).t().float()
    offset = ((SYMMETRIC_ZERO - zero) * scale.float()).to(scale.dtype)
    return data, torch.stack((scale, offset), -1).contiguous(), row_form[2]


def unpack(packed: Planes, problem: Problem) -> Planes:
    """``tinygemm`` -> row form, exactly: the kernel itself multiplies slices of the identity. Needs a GPU."""
    data, scale_zero = packed[:2]
    n, k = problem.n, problem.k
    plain = torch.empty(k // 32, n, 2, dtype=torch.bfloat16, device=data.device)
    plain[..., 0], plain[..., 1] = 1.0, float(SYMMETRIC_ZERO)
    codes = torch.empty(n, k, dtype=torch.uint8, device=data.device)
    for first in range(0, k, UNPACK_COLUMNS):
        last = min(first + UNPACK_COLUMNS, k)
        unit = torch.zeros(last - first, k, dtype=torch.bfloat16, device=data.device)
        unit[:, first:last].fill_diagonal_(1.0)
        codes[:, first:last] = torch.ops.aten._weight_int4pack_mm(unit, data, 32, plain).t().to(torch.uint8)
    scale = scale_zero[..., 0].t().contiguous()
    return (pack_nibbles(codes), scale, *packed[2:])


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] bf16 times 4-bit weights in ``tinygemm`` -> [m, n]; zero points enter as a bf16 offset per group.

    Source: ``torch._weight_int4pack_mm``.
    """
    y = torch.ops.aten._weight_int4pack_mm(x[0], w[0], group_of(problem.scheme, problem.k), w[1])
    return y if bias is None else y.add_(bias)


TINYGEMM = Layout("tinygemm", pack, unpack, planes, row_block=lambda problem: 0)
LAYOUTS = (TINYGEMM,)
KERNELS = (Kernel("torch_int4", "tinygemm", fit, run),)
