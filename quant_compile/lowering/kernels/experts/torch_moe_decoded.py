"""Experts with 4-bit weights as bf16 for many tokens: a Triton kernel decodes them, then torch's grouped GEMM multiplies.

The copy [E, n, k] of all experts of one product lives for one call. It costs as much for one token as for thousands, so it
pays where every expert has hundreds of rows: prompts of models with few, large experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.kernels._library import arch_from
from quant_compile.lowering.kernels._roofline import roof
from quant_compile.lowering.kernels.experts._moe import Groups, estimate_moe
from quant_compile.lowering.kernels.experts.library_moe import LAUNCHES, Product, copies, present, runner, sizes, trial
from quant_compile.lowering.kernels.fp4 import triton_fp4a16
from quant_compile.lowering.kernels.w4a8 import triton_w4a8
from quant_compile.lowering.moe import MoeKernel
from quant_compile.lowering.registry import Problem, Rank
from quant_compile.lowering.target import Target

NAME = "torch_grouped_decoded_moe"
MOST_BYTES = 4 << 30  # of the copy for the first product, the larger one


@lru_cache(maxsize=None)
def _op() -> Callable[..., Tensor]:
    return torch.ops.aten._grouped_mm.default


def decoded(w: Planes, product: Product) -> Tensor:
    """Row-form planes of all experts [E, n, ..] -> [E, n, k] in the problem's dtype, each weight rounded once."""
    p = product.problem
    rows = tuple(plane.flatten(0, 1) for plane in w)
    problem = Problem(p.scheme, p.experts * product.n, product.k, p.dtype)
    dequantize = triton_fp4a16.dequantize if p.scheme.weights.type == "float" else triton_w4a8.dequantize
    return dequantize(rows, problem).view(p.experts, product.n, product.k)


def grouped(x: Planes, w: Planes, groups: Groups, product: Product) -> Tensor:
    """bf16 rows times a bf16 copy of 4-bit weights. Source: ``torch._grouped_mm`` (CUTLASS, sm90)."""
    return _op()(x[0], decoded(w, product).transpose(1, 2), groups.ends, None, product.problem.dtype)


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """int4 and FP4 weights under bf16 inputs, sm90; H and I multiples of 8, a copy of at most MOST_BYTES."""
    scheme, large = problem.scheme, 4 * problem.experts * problem.intermediate * problem.hidden
    family = family_of(scheme).name
    if family not in ("weight_only", "nvfp4", "mxfp4") or scheme.weights.num_bits != 4 or scheme.input_activations:
        return Reject("decodes 4-bit weights under 16-bit inputs")
    refusal = (
        arch_from(target, 90, 90)
        or sizes(problem, 8, torch.bfloat16)
        or present(target, "aten::_grouped_mm", "triton")
        or trial(NAME, problem, target)
    )
    if refusal is not None:
        return refusal
    if large > MOST_BYTES:
        return Reject(f"would copy {large / 2**30:.1f} GiB of weights at once, more than {MOST_BYTES / 2**30:.0f}")
    weights = 3.0 * problem.experts * problem.hidden * problem.intermediate
    copy = weights * (2.0 + bits_per_weight(scheme) / 8) / (0.85 * roof(target).bandwidth)
    return Rank(
        copy
        + estimate_moe(
            problem, tokens, target, 0.62, math_bits=16, bandwidth_efficiency=0.6, tile_m=64, launches=LAUNCHES + 6,
            extra_bytes=copies(problem, tokens) + 2.0 * weights,
        )
    )  # fmt: skip


MOE_KERNELS = (MoeKernel(NAME, "experts", fit, runner(grouped)),)
