"""MoE blocks on CPU, expert by expert, each product on the CPU kernel for linears that is cheapest for its rows.

``torch_cpu_moe`` runs every scheme over row-form planes (int8 weights on ``_weight_int8pack_mm`` or ``_int_mm``, the rest
dequantized a few rows at a time). ``torch_cpu_moe_int4`` reads its own layout, torch's packed int4, expert after expert.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.kernels.cpu import torch_cpu
from quant_compile.lowering.kernels.experts._moe import chosen_experts, group_pairs
from quant_compile.lowering.moe import MoeKernel, MoeLayout
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target

# What an expert costs besides its products: slicing planes, gathering rows, activation, the sum; in microseconds.
EXPERT_US = 60.0
LINEARS = {"experts": "rows", "experts_cpu_int4": "cpu_int4"}


def _products(problem: MoeProblem) -> tuple[Problem, Problem]:
    """The two linears of an expert."""
    p, (first, second) = problem, problem.schemes
    return (
        Problem(first, p.up_rows, p.hidden, p.dtype, p.has_bias),
        Problem(second, p.hidden, p.intermediate, p.dtype, p.has_bias),
    )


@lru_cache(maxsize=None)
def _choose(problem: Problem, m: int, layout: str, target: Target) -> tuple[Kernel | None, float, str]:
    """The cheapest CPU kernel of a layout for m rows and its cost, or None and the reason of the last refusal."""
    best: tuple[Kernel | None, float, str] = (None, float("inf"), f"no kernel reads {layout}")
    for kernel in torch_cpu.KERNELS:
        if kernel.layout != layout:
            continue
        answer = kernel.fit(problem, m, target)
        if isinstance(answer, Reject):
            best = best if best[0] else (None, best[1], answer.reason)
        elif answer.cost < best[1]:
            best = (kernel, answer.cost, "")
    return best


def _fit(problem: MoeProblem, tokens: int, target: Target, layout: str) -> Rank | Reject:
    if target.device != "cpu":
        return Reject("runs on CPU only")
    chosen = chosen_experts(problem, tokens)
    rows = max(1, round(tokens * problem.top_k / chosen))
    cost = 0.0
    for product in _products(problem):
        kernel, us, reason = _choose(product, rows, LINEARS[layout], target)
        if kernel is None:
            return Reject(f"[{product.n}, {product.k}]: {reason}")
        cost += us
    return Rank(chosen * (cost + EXPERT_US))


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Every scheme of the CPU's kernels for linears, on CPU."""
    return _fit(problem, tokens, target, "experts")


def fit_int4(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """int4 in groups that divide both H and I, bf16; 2 I and H multiples of 16."""
    return _fit(problem, tokens, target, "experts_cpu_int4")


def _run(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem, layout: str,
) -> Tensor:  # fmt: skip
    target = Target.of("cpu")
    groups = group_pairs(ids, problem.experts)
    factors = None if weights is None else weights.reshape(-1)[groups.pairs].float().unsqueeze(-1)
    total = torch.zeros((ids.shape[0], problem.hidden), dtype=torch.float32)
    first, second = _products(problem)
    start = 0
    for expert, stop in enumerate(groups.ends.tolist()):
        if stop == start:
            continue
        tokens = groups.pairs[start:stop] // ids.shape[1]
        picked = tuple(plane if plane.dim() == 1 else plane[tokens] for plane in x)
        inner = problem.activation(_linear(picked, w13, b13, expert, first, LINEARS[layout], target))
        planes = (inner,)
        if second.scheme.input_activations is not None:
            planes = family_of(second.scheme).quantize_input(inner, second.scheme, scale2)
        out = _linear(planes, w2, b2, expert, second, LINEARS[layout], target).float()
        total.index_add_(0, tokens, out if factors is None else out.mul_(factors[start:stop]))
        start = stop
    return total.to(problem.dtype)


def _linear(
    x: Planes, w: Planes, bias: Tensor | None, expert: int, problem: Problem, layout: str, target: Target
) -> Tensor:
    rows = x[0].shape[0]
    # A power of two stands for the numbers of rows below it, so that few choices are made.
    kernel, _, reason = _choose(problem, 1 << (rows - 1).bit_length(), layout, target)
    if kernel is None:
        raise RuntimeError(f"no CPU kernel runs [{problem.n}, {problem.k}] {problem.scheme.spec}: {reason}")
    own = tuple(plane[expert] for plane in w)
    return kernel.run(x, own, None if bias is None else bias[expert], problem)


def run(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem,
) -> Tensor:  # fmt: skip
    """The block over row-form planes. Source: torch's CPU kernels, see ``torch_cpu``."""
    return _run(x, ids, weights, w13, b13, w2, b2, scale2, problem, "experts")


def run_int4(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem,
) -> Tensor:  # fmt: skip
    """The block over ``experts_cpu_int4``. Source: ``aten::_weight_int4pack_mm_for_cpu``."""
    return _run(x, ids, weights, w13, b13, w2, b2, scale2, problem, "experts_cpu_int4")


def _linear_layout(problem: MoeProblem, n: int, k: int) -> Problem:
    return Problem(problem.scheme, n, k, problem.dtype)


(_INT4,) = (layout for layout in torch_cpu.LAYOUTS if layout.name == "cpu_int4")

MOE_LAYOUTS = (
    MoeLayout(
        "experts_cpu_int4",
        lambda p, n, k: tuple(
            PlaneSpec(s.name, (p.experts, *s.shape), s.dtype) for s in _INT4.planes(_linear_layout(p, n, k))
        ),
        lambda planes, p, n, k: _INT4.pack(planes, _linear_layout(p, n, k)),
        lambda planes, p, n, k: _INT4.unpack(planes, _linear_layout(p, n, k)),
    ),
)
MOE_KERNELS = (
    MoeKernel("torch_cpu_moe", "experts", fit, run, ungated=True, mixed=True),
    MoeKernel("torch_cpu_moe_int4", "experts_cpu_int4", fit_int4, run_int4, ungated=True),
)
