"""Measure MoE kernels on this GPU, with random weights and routing, and remember the times beside those of linears.

A block's planes are filled with random codes at their full size, once per layout, and freed again: measuring holds one
quantized block. Where that does not fit, estimates decide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, family_of
from quant_compile.ir.moe import MoeProblem, random_ids
from quant_compile.lowering.moe import CostOf, MoeKernel, moe_kernels, planes_of
from quant_compile.lowering.target import Target
from quant_compile.lowering.tune import Timings, compile_together, measured_by, missing_jobs, take_times, timed

CALLS = 4


def measured_moe(target: Target, level: str) -> CostOf | None:
    """Costs that are measured on first need; None where there is nothing to measure (no GPU, ``off``, inside a capture)."""
    return measured_by(_measure_layout, target, level)


def _measure_layout(
    layout: str, problem: MoeProblem, target: Target, points: tuple[int, ...], known: Timings, worth: float
) -> dict[str, float]:
    """Times of all kernels of a layout, missing ones only; FAILED for one that does not fit, fails or is not worth it."""
    out, jobs = missing_jobs(moe_kernels(), layout, problem, target, points, known, worth)
    if not jobs:
        return out
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=["cuda"]):
        planes = random_planes(layout, problem)
        compile_together(jobs, lambda kernel, m: _calls(kernel, problem, m, planes, 1))
        take_times(out, known, problem, jobs, lambda kernel, m: timed(_calls(kernel, problem, m, planes), CALLS))
    torch.cuda.empty_cache()
    return out


def random_planes(layout: str, problem: MoeProblem) -> tuple[Planes, Planes]:
    """Random planes of w13 and w2 in a layout, on the GPU: small scales, codes of any value that is a number."""
    first, second = planes_of(layout, problem)
    return tuple(map(_random, first)), tuple(map(_random, second))


def _random(spec: PlaneSpec) -> Tensor:
    if spec.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        # Codes up to 0x77 have either sign and no NaN or inf in both formats.
        codes = torch.randint(0, 0x78, spec.shape, dtype=torch.uint8, device="cuda")
        return codes.bitwise_or_(codes.bitwise_and(1).bitwise_left_shift_(7)).view(spec.dtype)
    if spec.dtype.is_floating_point:
        return torch.rand(spec.shape, dtype=torch.float32, device="cuda").mul_(0.01).to(spec.dtype)
    info = torch.iinfo(spec.dtype)
    return torch.randint(max(info.min, -127), info.max, spec.shape, dtype=spec.dtype, device="cuda")


def _calls(
    kernel: MoeKernel, problem: MoeProblem, tokens: int, weights: tuple[Planes, Planes], count: int = CALLS
) -> Callable[[], None]:
    """What is timed: ``count`` calls of a kernel on random tokens, each with other experts."""
    x = _tokens(problem, tokens)
    routes = [random_ids(tokens, problem.experts, problem.top_k, "cuda") for _ in range(count)]
    scores = torch.full((tokens, problem.top_k), 1.0 / problem.top_k, device="cuda") if problem.has_weights else None
    b13, b2 = (torch.zeros(problem.experts, n, dtype=problem.dtype, device="cuda") if problem.has_bias else None
               for n in (problem.up_rows, problem.hidden))  # fmt: skip
    scale2 = torch.full((1,), 0.02, device="cuda") if problem.scheme.static else None

    def calls() -> None:
        for ids in routes:
            kernel.run(x, ids, scores, weights[0], b13, weights[1], b2, scale2, problem)

    return calls


def _tokens(problem: MoeProblem, tokens: int) -> Planes:
    x = torch.randn(tokens, problem.hidden, device="cuda", dtype=problem.dtype)
    if problem.scheme.input_activations is None:
        return (x,)
    scale = torch.full((1,), 0.02, device="cuda") if problem.scheme.static else None
    planes = family_of(problem.scheme).quantize_input(x, problem.scheme, scale)
    return tuple(plane.contiguous() for plane in planes)
