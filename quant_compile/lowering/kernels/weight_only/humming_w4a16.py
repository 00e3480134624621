"""4-bit weights under 16-bit inputs by humming's just-in-time GEMMs, which read the layout ``w4_tiles``.

Reads humming_kernels (optional), as ``_humming`` describes: a GEMM is compiled at the first call of a shape and range of m.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight
from quant_compile.lowering.ahead import Prepared
from quant_compile.lowering.kernels import _humming
from quant_compile.lowering.kernels._humming import DTYPES, range_of
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.weight_only._weight_only import refuse
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target

GROUPS = (None, 32, 64, 128)


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """int4 weights, groups of 32, 64, 128 or a scale per row, n and k multiples of 128, bf16 or f16."""
    answer = refuse(problem, target, 4, DTYPES, "humming")
    if answer is not None:
        return answer
    if problem.scheme.weights.group_size not in GROUPS:
        return Reject(f"group_size must be 32, 64, 128 or none, got {problem.scheme.weights.group_size}")
    for name, size in (("n", problem.n), ("k", problem.k)):
        if size % 128:
            return Reject(f"{name} must be a multiple of 128, got {size}")
    bits = bits_per_weight(problem.scheme)
    return Rank(estimate(problem, m, target, 0.67, bits, math_bits=16, bandwidth_efficiency=0.6, tile_m=8))


def layer_config(problem: Problem) -> dict[str, Any]:
    """humming's LayerConfig fields of a problem."""
    dtype = DTYPES[problem.dtype]
    return {
        "shape_n": problem.n,
        "shape_k": problem.k,
        "a_dtype": dtype,
        "b_dtype": "uint4",
        "c_dtype": dtype,
        "bs_dtype": dtype,
        "weight_scale_group_size": problem.scheme.weights.group_size or 0,
        "has_zero_point": not problem.scheme.weights.symmetric,
    }


def compile_gemm(problem: Problem, device: torch.device, tuning: Mapping[str, Any]) -> Tensor:
    """Compile one GEMM with these tiles; the answer [4] int64 on CPU is what the launch op takes."""
    return _humming.compile_gemm(layer_config(problem), device, tuning)


def heuristic_tuning(problem: Problem, m: int, device: torch.device) -> dict[str, Any]:
    """humming's own choice of tiles for m rows."""
    return _humming.heuristic_tuning(layer_config(problem), m, device)


def _gemm(problem: Problem, top: int, device: torch.device) -> Tensor:
    return compile_gemm(problem, device, heuristic_tuning(problem, top, device))


prepare = Prepared(_gemm, range_of)


def launch(gemm: Tensor, x: Tensor, w: Planes) -> Tensor:
    """Run a compiled GEMM: x [m, k], planes of ``w4_tiles`` -> [m, n]."""
    return _humming.launch(gemm, x, w[0], w[1], w[-1], zero=w[2] if len(w) == 4 else None)


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] bf16 or f16 times 4-bit weights in ``w4_tiles`` -> [m, n]; weights are rounded to x's dtype once.

    Split-K programs meet at the plane ``locks``, so one weight must not run on two streams at once.
    Source: humming_kernels' dense GEMM.
    """
    y = launch(prepare(problem, x[0].shape[0], x[0].device), x[0], w)
    return y if bias is None else y.add_(bias)


KERNELS = (Kernel("humming_w4a16", "w4_tiles", fit, run, prepare=prepare),)
