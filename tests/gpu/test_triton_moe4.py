"""triton_moe4 on a real GPU: both forms against the torch truth over tokens, sizes and schemes, step by step, and in CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.experts import _frame
from quant_compile.lowering.kernels.experts import triton_moe4 as kernel
from quant_compile.lowering.schemes import fp4
from quant_compile.lowering.target import Target
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
    make,
    scatter,
    second_truth,
    supported,
)
from tests.lowering.test_triton_moe import Case, relative
from tests.lowering.test_triton_moe4 import PRESETS, QSERVE, SCHEMES, plain

pytestmark = pytest.mark.gpu

# TOLERANCE and ``limit`` are those of ``moe_checks`` and for its reasons: bf16 rounding alone is 1.7e-3, the rest is room for
# the order of f32 sums and, of e4m3, sm90's short sums within a group. Weights of FP4 are exact in bf16; int4 is exact.
TOKENS = (1, 5, 16, 64, 300, 2048)
# (experts, top k, hidden, intermediate): few large experts, many small ones, and sizes that no tile or group divides
SIZES = ((8, 2, 512, 1024), (128, 8, 512, 256), (7, 3, 224, 160), (5, 1, 1056, 288))
FORMATS = (*PRESETS, *QSERVE)


def check_grouped(case: Case, plan: _frame.Plan) -> None:
    """First product, quantization and second product, each on the very input that the kernel before it gave."""
    p = case.problem
    parts = kernel.parts_of(p.scheme, plan.first)
    pairs, order = aligned(case, plan)
    legal = order.numel()
    hidden = kernel.product(case.x, pairs, case.w13, case.b13, p, plan.first)
    truth = hidden_truth(case)[order]
    planes: Planes = (hidden,)
    if p.scheme.input_activations is None:
        assert relative(plain(hidden[:legal], parts), truth) <= TOLERANCE
    else:
        assert relative(hidden[:legal], truth) <= TOLERANCE
        planes = kernel.quantize(hidden, p, case.scale2)
        expected = family_of(p.scheme).quantize_input(hidden[:legal], p.scheme, case.scale2)
        assert torch.equal(plain(planes[0][:legal].float(), parts), expected[0].float())
        assert torch.equal(planes[1] if p.scheme.static else planes[1][:legal], expected[1])
    in_order = (plain(planes[0].float(), parts).to(planes[0].dtype), *planes[1:])
    by_pair = tuple(scatter(plane, order, case.ids.numel()) for plane in in_order)
    if len(case.x) == 3:  # of QServe's channels the truth also takes the sums of rows, which kernels make themselves
        by_pair = (*by_pair, by_pair[0].float().sum(-1, keepdim=True))
    y = _frame.add(kernel.second(planes, pairs, case.w2, case.b2, p, plan.second), case.ids, case.weights, p)
    assert relative(y, second_truth(case, by_pair)) <= TOLERANCE
    assert torch.equal(y, kernel.launch(*case.arguments, chosen=plan))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", SCHEMES)
def test_every_step_matches_the_truth(spec: str, sizes: tuple[int, int, int, int]) -> None:
    check_every_step(kernel, spec, TOKENS, sizes, check_grouped)


@pytest.mark.parametrize("spec", FORMATS)
def test_blocks_of_every_size(spec: str) -> None:
    """The orders of columns that other GPUs take, too."""
    target = Target.of("cuda")
    case = make(spec, 77, (8, 2, 512, 384))
    check_blocks_of_every_size(kernel, case, check_grouped)
    if case.problem.scheme.input_activations is None and target.arch < 100:
        joined = replace(kernel.plan(case.problem, 77, target).second, block_n=64, block_k=128, joined=True)
        check_grouped(case, _frame.Plan(joined, joined))


@pytest.mark.parametrize("spec", SCHEMES)
def test_whole_block(spec: str) -> None:
    for tokens in (1, 4, 64, 700):
        for dtype in (torch.bfloat16, torch.float16):
            activation = "gelu_tanh" if tokens == 4 else "silu"
            check_whole(kernel, make(spec, tokens, (16, 4, 1024, 768), dtype=dtype, activation=activation))


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("ids", CHOICES)
def test_unusual_choices(spec: str, ids: str) -> None:
    check_unusual_choices(kernel, spec, ids)


@pytest.mark.parametrize("spec", SCHEMES)
def test_graph_replays_follow_new_choices(spec: str) -> None:
    check_replays(kernel, spec)


@pytest.mark.parametrize("spec", FORMATS)
def test_equal_inputs_give_equal_bits(spec: str) -> None:
    for tokens, run in ((2, kernel.run_decode), (300, kernel.run)):
        check_equal_bits(kernel, run, spec, tokens)


def all_codes(spec: str, columns: int) -> Planes:
    """w2 of one expert: a row for each scale byte, all codes along the columns; global scale 1."""
    codes = torch.arange(16, dtype=torch.uint8, device="cuda").repeat(256, columns // 16)
    scale = torch.arange(256, device="cuda").to(torch.uint8)[:, None]
    if spec == "MXFP4A16":
        return fp4.pack_codes(codes)[None], scale.repeat(1, columns // 32).contiguous()[None]
    scale = scale.repeat(1, columns // 16).view(torch.float8_e4m3fn)
    return fp4.pack_codes(codes)[None], scale.contiguous()[None], torch.ones(1, 256, 1, device="cuda")


@pytest.mark.parametrize("joined", (False, True))
@pytest.mark.parametrize("spec", ("NVFP4A16", "MXFP4A16"))
def test_every_code_under_every_scale(spec: str, joined: bool) -> None:
    """Inputs that are 1 in one column give that column's weights, to the bit: six significant bits fit bf16. NaN stays NaN.

    MXFP4's bytes below 2 or above 252 leave bf16's normal numbers (with them, infinite ones make NaN of their rows).
    """
    size = 256
    planes = all_codes(spec, size)
    problem = MoeProblem(parse(spec), 1, 256, size, 1, Activation("silu"), torch.bfloat16)
    wanted = family_of(problem.scheme).dequantize_weight(tuple(w[0] for w in planes), problem.scheme, size).t()
    ids = torch.zeros(size, 1, dtype=torch.int64, device="cuda")
    plan = kernel.plan(problem, size, Target.of("cuda"))
    tiles = replace(plan.second, joined=joined, block_k=128 if joined else plan.second.block_k)
    pairs = _frame.align(ids, 1, tiles.block_m)
    eye = torch.eye(size, device="cuda", dtype=torch.bfloat16)
    got = kernel.second(
        (kernel.split(eye, kernel.parts_of(problem.scheme, tiles)),), pairs, planes, None, problem, tiles
    )
    normal = torch.arange(256, device="cuda")
    normal = normal[(normal >= 2) & (normal <= 252)] if spec == "MXFP4A16" else normal
    bad = wanted.isnan().any(0)
    assert bad.any()
    assert got[:, bad].isnan().all()
    sound = normal[~bad[normal]]
    assert torch.equal(got[:, sound].float(), wanted[:, sound])


def test_every_code_of_int4() -> None:
    """The same for int4 under both kinds of inputs."""
    for spec, dtype in (("W4A8", torch.int8), ("W4AFP8", torch.float8_e4m3fn)):
        problem = MoeProblem(parse(spec), 1, 256, 128, 1, Activation("silu"), torch.bfloat16)
        case_like = kernel.fit(problem, 1, Target.of("cuda"))
        if isinstance(case_like, Reject):
            continue
        data = torch.arange(256, device="cuda").to(torch.uint8)[:, None].expand(256, 64).contiguous()[None]
        planes = (data, torch.ones(1, 256, 1, device="cuda", dtype=torch.bfloat16))
        ids = torch.zeros(128, 1, dtype=torch.int64, device="cuda")
        plan = kernel.plan(problem, 128, Target.of("cuda"))
        pairs = _frame.align(ids, 1, plan.second.block_m)
        eye = kernel.split(torch.eye(128, device="cuda").to(dtype), 2)
        got = kernel.second((eye, torch.ones(128, 1, device="cuda")), pairs, planes, None, problem, plan.second)
        wanted = torch.stack((data[0, :, 0] & 15, data[0, :, 0] >> 4), 1).float().repeat(1, 64).t() - 8
        assert torch.equal(got.float(), wanted), spec


@pytest.mark.parametrize("spec", FORMATS)
def test_not_a_number_survives(spec: str) -> None:
    """NaN of a token spoils this token, that of a weight's scale its output, in both forms; nothing else."""
    for run in (kernel.run, kernel.run_decode):
        case = make(spec, 3, (4, 1, 256, 256))
        supported(kernel, case)
        case.ids[:, 0] = torch.tensor([0, 1, 2], device="cuda")
        if case.w2[1].dtype.itemsize == 1:
            case.w2[1].view(torch.uint8)[1, 5, 0] = 0xFF
        else:
            case.w2[1][1, 5, 0] = float("nan")
        assert run(*case.arguments).isnan().nonzero().tolist() == [[1, 5]]
        case = make(spec, 3, (4, 1, 256, 256))
        case.x[min(1, len(case.x) - 1)][1] = float("nan")  # the scale, or the token
        y = run(*case.arguments)
        assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()


@pytest.mark.parametrize(
    ("spec", "factor"), [("NVFP4A16", 1.05), ("W4A8", 1.05), ("W4AFP8", 1.2), *((spec, 1.05) for spec in QSERVE)]
)
def test_the_tolerance_notices_one_wrong_expert(spec: str, factor: float) -> None:
    """Negative control. (5 % under FP8 inputs are seen step by step.)"""
    check_one_wrong_expert(kernel, spec, 2 if spec == "NVFP4A16" else 1, factor)
