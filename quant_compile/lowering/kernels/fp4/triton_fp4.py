"""FP4 linears with FP4 inputs in Triton on the block-scaled tensor cores of sm100 and newer, from planes in row form.

Never run on such a GPU by this project: compiled for sm100 and sm120, and checked to contain the block-scaled instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.lowering.kernels._library import output_dtype
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.fp4._fp4 import block_scaled
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target

GROUPS = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True)
class Tiles:
    """How the product is cut up; ``band``: blocks of rows that are walked together, tile by tile."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    band: int = 8


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.fp4._triton_fp4")


def tiles(m: int, target: Target) -> Tiles:
    """Without measurement: one instruction of sm100 takes 128 rows; sm120 has smaller ones and less shared memory."""
    if target.arch >= 120:
        return Tiles(64 if m <= 64 else 128, 128, 128, 4, 3)
    return Tiles(128, 128, 256, 4, 4)


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """NVFP4 or MXFP4 on both sides, on what ``block_scaled`` lets through, bf16, f16 or f32."""
    if problem.scheme.input_activations is None or family_of(problem.scheme).name not in GROUPS:
        return Reject("multiplies FP4 weights by FP4 inputs")
    refusal = block_scaled(target) or output_dtype(problem, torch.bfloat16, torch.float16, torch.float32)
    if refusal is not None:
        return refusal
    if not target.has("triton"):
        return Reject("triton is not installed")
    bits = bits_per_weight(problem.scheme)
    return Rank(estimate(problem, m, target, 0.4, bits, math_bits=4, tile_m=tiles(m, target).block_m))


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] times [n, k], both in FP4, -> [m, n]; global scales and bias in f32, rounded once. Source: ``_triton_fp4``."""
    chosen = tiles(x[0].shape[0], Target.of(x[0].device))
    return launch(x, w, bias, problem, chosen)


def launch(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, chosen: Tiles) -> Tensor:
    """``run`` with one choice of tiles."""
    m, n, k = x[0].shape[0], problem.n, 2 * x[0].shape[1]
    y = torch.empty((m, n), dtype=problem.dtype, device=x[0].device)
    grid = (-(-m // chosen.block_m) * -(-n // chosen.block_n),)
    _source().dot_scaled_kernel[grid](
        x[0], x[1].contiguous(), x[2] if len(x) > 2 else None, w[0], w[1], w[2] if len(w) > 2 else None, bias, y, m, n, k,
        GROUP=GROUPS[family_of(problem.scheme).name], BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k, BAND=chosen.band, EVEN_K=k % chosen.block_k == 0,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return y


KERNELS = (Kernel("triton_fp4", "rows", fit, run),)
