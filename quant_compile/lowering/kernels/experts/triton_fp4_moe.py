"""Expert blocks in NVFP4 and MXFP4 with FP4 inputs, in Triton on the block-scaled tensor cores of sm100 and newer.

Never run on such a GPU by this project: every step is checked in Triton's interpreter, which is given the instruction's
arithmetic, and compiled for sm100 and sm120, with the block-scaled instruction in the result.

The frame is ``_frame``: ``align``, a gated product, quantization, a second product, and the weighted sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.kernels._launch import ceil, pow2, triton_type
from quant_compile.lowering.kernels.experts._frame import DTYPES, Pairs, activation_constants, grouped, source
from quant_compile.lowering.kernels.experts._moe import estimate_moe
from quant_compile.lowering.kernels.fp4._fp4 import block_scaled
from quant_compile.lowering.kernels.fp4.triton_fp4 import GROUPS
from quant_compile.lowering.moe import MoeKernel
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target


@dataclass(frozen=True)
class Tiles:
    """How both products are cut up.

    Attributes:
        block_m: pairs per program, a power of two from 16 up.
        block_n: rows of the weight per program (gated: half gate and half up rows); sm100 takes 128 at a time.
        block_k: inputs per step.
        band: blocks of pairs that are walked together, tile by tile.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    band: int = 8


def tiles(problem: MoeProblem, tokens: int, target: Target) -> Tiles:
    """Without measurement: blocks a little above the mean number of pairs of an expert."""
    mean = 1.25 * tokens * problem.top_k / problem.experts
    if target.arch >= 120:
        return Tiles(min(64, max(16, pow2(int(mean)))), 64, 128, 4, 3)
    return Tiles(min(128, max(16, pow2(int(mean)))), 128, 256, 4, 3)


def group_of(problem: MoeProblem) -> int:
    """Codes that share a scale."""
    return GROUPS[family_of(problem.scheme).name]


def products(
    x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None, scale2: Tensor | None,
    problem: MoeProblem, chosen: Tiles,
) -> Tensor:  # fmt: skip
    """All steps between ``align`` and ``add``."""
    hidden = first(x, pairs, w13, b13, problem, chosen)
    inner = quantize(hidden, pairs, scale2, problem, chosen)
    amax = hidden[1] if len(hidden) > 1 else None
    return second(inner, amax, pairs, w2, b2, scale2, problem, chosen)


def first(x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, problem: MoeProblem, chosen: Tiles) -> Planes:
    """Hidden layer [T k, I] in the order of ``pairs``, then, where its global scales are not known before, experts' largest
    magnitudes [E] as the bits of f32."""
    p, device, size = problem, x[0].device, pairs.order.numel()
    y = torch.empty((size, p.intermediate), dtype=p.dtype, device=device)
    needs = len(x) > 2 and not p.scheme.static
    amax = torch.zeros(p.experts, dtype=torch.int32, device=device) if needs else None
    _launch(x, pairs, w13, b13, None, y, amax, p, chosen, gated=True)
    return (y,) if amax is None else (y, amax)


def quantize(hidden: Planes, pairs: Pairs, scale2: Tensor | None, problem: MoeProblem, chosen: Tiles) -> Planes:
    """Result of ``first`` -> codes [T k, kp/2] and scales [T k, kp/G], as ``quantize_input`` of each expert's rows."""
    group, (rows, n) = group_of(problem), hidden[0].shape
    nv, groups = group == GROUPS["nvfp4"], ceil(n, group)
    device = hidden[0].device
    codes = torch.empty((rows, groups * group // 2), dtype=torch.uint8, device=device)
    scale = torch.empty((rows, groups), dtype=torch.float8_e4m3fn if nv else torch.uint8, device=device)
    most = pairs.blocks.shape[1]
    block_n = max(group, 2048 // chosen.block_m)
    source("_triton_fp4_moe").fp4_quantize_kernel[(most, ceil(n, block_n))](
        hidden[0], codes, scale, hidden[1] if len(hidden) > 1 else None, scale2 if nv else None, pairs.blocks, most, n,
        groups, GROUP=group, NV=nv, BLOCK_M=chosen.block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return codes, scale


def second(
    inner: Planes, amax: Tensor | None, pairs: Pairs, w2: Planes, b2: Tensor | None, scale2: Tensor | None,
    problem: MoeProblem, chosen: Tiles,
) -> Tensor:  # fmt: skip
    """The quantized hidden layer @ w2[e].T + b2[e] as [T k, H], in the order of the pairs; illegal pairs stay unset."""
    y = torch.empty((pairs.order.numel(), problem.hidden), dtype=problem.dtype, device=inner[0].device)
    _launch(inner, pairs, w2, b2, scale2, y, amax, problem, chosen, gated=False)
    return y


def _launch(
    x: Planes, pairs: Pairs, w: Planes, bias: Tensor | None, scale2: Tensor | None, y: Tensor, amax: Tensor | None,
    problem: MoeProblem, chosen: Tiles, gated: bool,
) -> None:  # fmt: skip
    n, k, most = y.shape[1], 2 * x[0].shape[1], pairs.blocks.shape[1]
    source("_triton_fp4_moe").fp4_grouped_kernel[(most * ceil(n, chosen.block_n // 2 if gated else chosen.block_n),)](
        x[0], w[0], x[1].contiguous(), w[1], x[2] if len(x) > 2 else None, w[2] if len(w) > 2 else None, scale2, bias, y,
        amax, pairs.order, pairs.blocks, most, n, k, problem.top_k,
        GATED=gated, GROUP=group_of(problem), BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k,
        BAND=chosen.band, EVEN_K=k % chosen.block_k == 0, **activation_constants(problem.activation),
        OUT=triton_type(problem.dtype), num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """NVFP4 or MXFP4 weights and inputs, on what ``block_scaled`` lets through, bf16 or f16, any sizes."""
    if problem.scheme.input_activations is None or family_of(problem.scheme).name not in GROUPS:
        return Reject("multiplies FP4 weights by FP4 inputs")
    refusal = block_scaled(target)
    if refusal is not None:
        return refusal
    if problem.dtype not in DTYPES:
        return Reject(f"dtype must be bfloat16 or float16, got {problem.dtype}")
    if not target.has("triton"):
        return Reject("triton is not installed")
    # The hidden layer in 16 bits, written and read, beside what every kernel moves.
    extra = 2.0 * tokens * problem.top_k * problem.intermediate * problem.dtype.itemsize
    cost = estimate_moe(
        problem, tokens, target, 0.4, tile_m=tiles(problem, tokens, target).block_m, launches=7, extra_bytes=extra
    )
    return Rank(cost)


run, launch = grouped(tiles, products)
MOE_KERNELS = (MoeKernel("triton_fp4_moe", "experts", fit, run),)
