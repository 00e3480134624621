"""triton_moe on a real GPU: both forms against the torch truth over tokens, sizes and schemes, step by step, and in CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_compile.ir.family import family_of
from quant_compile.lowering.kernels.experts import _frame
from quant_compile.lowering.kernels.experts import triton_moe as kernel
from tests.gpu.moe_checks import (
    CHOICES,
    TOLERANCE,
    aligned,
    check_blocks_of_every_size,
    check_equal_bits,
    check_every_step,
    check_one_wrong_expert,
    check_replays,
    check_unusual_choices,
    check_whole,
    hidden_truth,
    limit,
    make,
    scatter,
    second_truth,
    supported,
)
from tests.lowering.test_triton_moe import SCHEMES, Case, relative
from tests.moe_support import nudge

pytestmark = pytest.mark.gpu

TOKENS = (1, 2, 16, 64, 300, 2048)
# (experts, top k, hidden, intermediate)
SIZES = ((8, 2, 256, 512), (128, 8, 512, 256), (7, 3, 208, 144), (5, 1, 1040, 272), (60, 6, 128, 2064))


def check_grouped(case: Case, plan: _frame.Plan) -> None:
    """First product, quantization and second product, each on the very input that the kernel before it gave."""
    p = case.problem
    family = family_of(p.scheme)
    a = p.scheme.input_activations
    pairs, order = aligned(case, plan)
    legal = order.numel()
    hidden = kernel.first(case.x, pairs, case.w13, case.b13, case.scale2, p, plan.first)
    truth = hidden_truth(case)[order]
    if len(hidden) == 1:
        assert relative(hidden[0][:legal], truth) <= TOLERANCE
        if a is not None:
            codes, scale = kernel.quantize(hidden[0][:legal], p)
            expected = family.quantize_input(hidden[0][:legal], p.scheme, case.scale2)
            assert torch.equal(scale, expected[1]) and torch.equal(codes.float(), expected[0].float())
            hidden = kernel.quantize(hidden[0], p)
    else:
        expected = family.quantize_input(truth, p.scheme, case.scale2)
        assert relative(hidden[1][:legal], expected[1]) <= TOLERANCE
        off = family.quantize_input(nudge(truth), p.scheme, case.scale2)[0].float()
        flipped = (hidden[0][:legal].float() != expected[0].float()).float().mean()
        assert flipped <= (off != expected[0].float()).float().mean()
    by_pair = tuple(scatter(plane, order, case.ids.numel()) for plane in hidden)
    y = _frame.add(kernel.second(hidden, pairs, case.w2, case.b2, p, plan.second), case.ids, case.weights, p)
    assert relative(y, second_truth(case, by_pair)) <= TOLERANCE
    assert torch.equal(y, kernel.launch(*case.arguments, chosen=plan))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", SCHEMES)
def test_every_step_matches_the_truth(spec: str, sizes: tuple[int, int, int, int]) -> None:
    check_every_step(kernel, spec, TOKENS, sizes, check_grouped)


@pytest.mark.parametrize("spec", SCHEMES)
def test_blocks_of_every_size(spec: str) -> None:
    check_blocks_of_every_size(kernel, make(spec, 77, (8, 2, 512, 384)), check_grouped)


@pytest.mark.parametrize("spec", SCHEMES)
def test_whole_block(spec: str) -> None:
    for tokens in (1, 4, 64, 700):
        check_whole(kernel, make(spec, tokens, (16, 4, 1024, 768)))


@pytest.mark.parametrize("spec", ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16"))
@pytest.mark.parametrize("ids", CHOICES)
def test_unusual_choices(spec: str, ids: str) -> None:
    check_unusual_choices(kernel, spec, ids)


@pytest.mark.parametrize("text", ("silu", "silu(1.702,7.0,1.0)", "gelu", "gelu_tanh", "relu"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_activations_and_dtypes(text: str, dtype: torch.dtype) -> None:
    for spec, bias, weights in (("W8A8", True, False), ("W4A16", False, True)):
        for tokens in (2, 90):
            case = make(spec, tokens, (6, 2, 256, 256), activation=text, dtype=dtype, bias=bias, weights=weights)
            supported(kernel, case)
            actual = (kernel.run_decode if tokens == 2 else kernel.run)(*case.arguments)
            assert actual.dtype == dtype
            assert relative(actual, case.expected()) <= limit(case)


@pytest.mark.parametrize("spec", SCHEMES)
def test_graph_replays_follow_new_choices(spec: str) -> None:
    check_replays(kernel, spec)


def test_deterministic() -> None:
    for spec in ("FP8_DYNAMIC", "W4A16"):
        check_equal_bits(kernel, kernel.run, spec, 300)


def test_not_a_number_survives() -> None:
    """NaN of one token spoils this token and no other, in both forms."""
    case = make("FP8_DYNAMIC", 3, (4, 2, 256, 256))
    supported(kernel, case)
    case.x[1][1] = float("nan")
    for run in (kernel.run, kernel.run_decode):
        y = run(*case.arguments)
        assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()


@pytest.mark.parametrize(("spec", "factor"), [("W8A8", 1.05), ("W4A16", 1.05), ("FP8_DYNAMIC", 1.2)])
def test_the_tolerance_notices_one_wrong_expert(spec: str, factor: float) -> None:
    """Negative control. (5 % in FP8 are seen step by step, not in a whole block.)"""
    check_one_wrong_expert(kernel, spec, 1, factor)


def test_experts_past_two_to_the_31_elements_are_addressed() -> None:
    """Weights of more than 2**31 elements: the last experts must give what they give alone."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    small = make("W8A8", 6, (2, 2, 2048, 4096), bias=False)
    experts = 160
    w13, w2 = (
        tuple(torch.zeros((experts, *plane.shape[1:]), dtype=plane.dtype, device="cuda") for plane in planes)
        for planes in (small.w13, small.w2)
    )
    for large, planes in ((w13, small.w13), (w2, small.w2)):
        for to, plane in zip(large, planes):
            to[-2:] = plane
    problem = replace(small.problem, experts=experts)
    expected = small.expected()
    for run in (kernel.run, kernel.run_decode):
        actual = run(small.x, small.ids + experts - 2, small.weights, w13, None, w2, None, None, problem)
        assert relative(actual, expected) <= limit(small)
