"""triton_scaled_mm on a real GPU: every plan against the families' references, integers exactly, inside CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.scaled import triton_scaled_mm as kernel
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.target import Target

pytestmark = pytest.mark.gpu

SCHEMES = ("FP8_DYNAMIC", "FP8", "FP8_E5M2_DYNAMIC", "W8A8", "W8A8_STATIC", "FP8_BLOCK")
# bf16 rounding alone is 1.7e-3; the rest is room for the order of f32 sums and sm90's short fp8 sums.
TOLERANCE = 5e-3
SHAPES = ((1024, 2048), (384, 14336), (70, 200), (129, 1000), (33, 37), (1, 1))


def make(
    spec: str, m: int, n: int, k: int, dtype: torch.dtype, has_bias: bool
) -> tuple[Planes, Planes, torch.Tensor | None, Problem]:
    scheme = parse(spec)
    family = family_of(scheme)
    torch.manual_seed(1000 * m + n + k)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    w = torch.randn(n, k, device="cuda", dtype=dtype) / 8
    bias = torch.randn(n, device="cuda", dtype=dtype) if has_bias else None
    scale = torch.tensor([0.02], device="cuda") if scheme.static else None
    problem = Problem(scheme, n, k, dtype, has_bias)
    return family.quantize_input(x, scheme, scale), family.quantize_weight(w, scheme), bias, problem


def reference(x: Planes, w: Planes, bias: torch.Tensor | None, problem: Problem) -> torch.Tensor:
    return family_of(problem.scheme).linear(x, w, bias, problem.scheme, problem.dtype)


def supported(spec: str) -> Target:
    target = Target.of("cuda")
    answer = kernel.fit(Problem(parse(spec), 16, 16, torch.bfloat16), 1, target)
    if isinstance(answer, Reject):
        pytest.skip(answer.reason)
    return target


def plans(problem: Problem, m: int, target: Target) -> list[kernel.Config]:
    """The plan for this m and every other kind that may run it."""
    found = [kernel.config(problem, m, target), kernel._wide_config(problem, m, target)]
    if m <= kernel.GEMV_ROWS:
        gemv = kernel.gemv_config(problem, m, target)
        found += [gemv, replace(gemv, stages=3)]
    if m <= kernel.SLICES_ROWS:
        found.append(kernel._slices_config(problem, m, target))
    if m <= kernel.TALL_ROWS:
        tall = kernel._tall_config(problem, m, target)
        found += [replace(tall, split=1), replace(tall, split=2)]
        if target.arch >= 90 and problem.k % 16 == 0:
            found.append(replace(tall, tma=True))
    if target.arch >= 90:
        found += [replace(plan, pdl=True) for plan in found if plan.kind != "wide" and not plan.tma]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("spec", SCHEMES)
def test_every_plan_matches_the_reference(spec: str, n: int, k: int) -> None:
    target = supported(spec)
    for m in (1, 3, 16, 50, 200):
        x, w, bias, problem = make(spec, m, n, k, torch.bfloat16, has_bias=True)
        expected = reference(x, w, bias, problem).float()
        for plan in plans(problem, m, target):
            actual = kernel.launch(x, w, bias, problem, plan).float()
            error = float((actual - expected).norm() / expected.norm())
            assert error <= TOLERANCE, f"{m=} {plan}: {error:.1e}"


@pytest.mark.parametrize("n, k", SHAPES)
def test_int8_is_exact(n: int, k: int) -> None:
    target = supported("W8A8")
    for m in (1, 4, 16, 50, 200):
        x, w, _, problem = make("W8A8", m, n, k, torch.float32, has_bias=False)
        expected = reference(x, w, None, problem)
        for plan in plans(problem, m, target):
            assert torch.equal(kernel.launch(x, w, None, problem, plan), expected), plan


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
@pytest.mark.parametrize("spec", ("FP8_DYNAMIC", "FP8_BLOCK"))
def test_other_output_dtypes(spec: str, dtype: torch.dtype) -> None:
    supported(spec)
    for m in (2, 9, 33, 150):
        x, w, bias, problem = make(spec, m, 256, 512, dtype, has_bias=True)
        actual = kernel.run(x, w, bias, problem)
        expected = reference(x, w, bias, problem).float()
        assert actual.dtype == dtype
        assert float((actual.float() - expected).norm() / expected.norm()) <= TOLERANCE


def test_block_scales_of_any_strides() -> None:
    target = supported("FP8_BLOCK")
    x, w, bias, problem = make("FP8_BLOCK", 4, 300, 1024, torch.bfloat16, has_bias=True)
    columns = (x[0], x[1].t().contiguous().t())
    for plan in plans(problem, 4, target):
        assert torch.equal(kernel.launch(x, w, bias, problem, plan), kernel.launch(columns, w, bias, problem, plan)), (
            plan
        )


@pytest.mark.parametrize("spec", ("FP8_DYNAMIC", "W8A8", "FP8_BLOCK"))
def test_deterministic_and_replayed_in_a_cuda_graph(spec: str) -> None:
    target = supported(spec)
    for m in (1, 16, 64, 256):
        x, w, bias, problem = make(spec, m, 512, 8192, torch.bfloat16, has_bias=True)
        for plan in plans(problem, m, target):
            first = kernel.launch(x, w, bias, problem, plan)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = kernel.launch(x, w, bias, problem, plan)
            for _ in range(3):
                y.zero_()
                graph.replay()
                assert torch.equal(y, first), plan


def test_long_k_stays_within_tolerance() -> None:
    """sm90 sums fp8 products with about 14 bits; plans for long k must promote."""
    target = supported("FP8_DYNAMIC")
    for m in (1, 16, 64, 512):
        x, w, _, problem = make("FP8_DYNAMIC", m, 512, 28672, torch.bfloat16, has_bias=False)
        expected = reference(x, w, None, problem).float()
        actual = kernel.launch(x, w, None, problem, kernel.config(problem, m, target)).float()
        error = float((actual - expected).norm() / expected.norm())
        assert error <= TOLERANCE, f"{m=}: {error:.1e}"


def test_outputs_past_two_to_the_31_elements_are_addressed() -> None:
    """m * n beyond int32: the last rows must hold what a small product gives."""
    supported("W8A8")
    m, n, k = 70000, 32768, 32
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    x, w, _, problem = make("W8A8", m, n, k, torch.bfloat16, has_bias=False)
    y = kernel.run(x, w, None, problem)
    tail = tuple(plane[-64:] for plane in x)
    assert torch.equal(y[-64:], reference(tail, w, None, problem))
