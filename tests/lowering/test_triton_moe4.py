"""triton_moe4: both forms against the torch truth in Triton's interpreter, and compiled for every arch they claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.kernels.experts import _frame, triton_moe
from quant_compile.lowering.kernels.experts import triton_moe4 as kernel
from quant_compile.lowering.moe import choose_moe
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.test_triton_moe import (
    SHARED_LIMIT,
    SM90,
    TOLERANCE,
    Case,
    build,
    launches,
    mend_float8,
    problem_of,
    relative,
)
from tests.lowering.triton_support import needs_triton, run_interpreted, stack_bytes

PRESETS = ("NVFP4A16", "MXFP4A16", "W4A8", "W4AFP8")
STATIC = ("int4.group64+int8.tensor", "int4.group256+fp8e4m3.tensor")
QSERVE = ("QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP")
SCHEMES = (*PRESETS, *QSERVE, *STATIC, "int4.channel+int8.token.dynamic", "int4.channel+fp8e4m3.token.dynamic")


# --- steps ---


def check_split() -> None:
    """Columns of each part in a row of their own; both sizes of codes, more than one program to a row."""
    for dtype, parts, columns in (
        (torch.int8, 2, 48),
        (torch.bfloat16, 8, 96),
        (torch.int8, 2, 2064),
        (torch.bfloat16, 8, 2064),
    ):
        x = torch.randint(-100, 100, (3, columns)).to(dtype)
        assert torch.equal(kernel.split(x, parts), x.unflatten(1, (-1, parts)).transpose(1, 2).flatten(1))


def plain(y: Tensor, parts: int) -> Tensor:
    """Inverse of split order."""
    return y.unflatten(-1, (parts, -1)).transpose(-1, -2).flatten(-2)


def check_steps(case: Case, plan: _frame.Plan) -> None:
    """First product and quantization against the truth of each pair; then the whole."""
    p = case.problem
    family, flat = family_of(p.scheme), case.ids.flatten().tolist()
    pairs = _frame.align(case.ids, p.experts, plan.first.block_m)
    order = pairs.order.tolist()[: sum(0 <= expert < p.experts for expert in flat)]
    truth = torch.empty(len(order), p.intermediate, dtype=p.dtype)
    for i, pair in enumerate(order):
        x = tuple(plane if plane.dim() == 1 else plane[pair // p.top_k][None] for plane in case.x)
        b13 = None if case.b13 is None else case.b13[flat[pair]]
        truth[i] = p.activation(family.linear(x, tuple(w[flat[pair]] for w in case.w13), b13, p.scheme, p.dtype))[0]
    hidden = kernel.product(case.x, pairs, case.w13, case.b13, p, plan.first)[: len(order)]
    parts = kernel.parts_of(p.scheme, plan.first)
    if p.scheme.input_activations is None:
        assert relative(plain(hidden, parts), truth) <= TOLERANCE
    else:
        assert relative(hidden, truth) <= TOLERANCE
        codes, scale = kernel.quantize(hidden, p, case.scale2)
        expected = family.quantize_input(hidden, p.scheme, case.scale2)
        assert torch.equal(plain(codes.float(), parts), expected[0].float()) and torch.equal(scale, expected[1])
    expected = case.expected()
    assert expected.abs().max() > 0.1
    assert relative(kernel.launch(*case.arguments, chosen=plan), expected) <= 3 * TOLERANCE


def check_grouped(spec: str) -> None:
    """Sizes that no tile divides (and a ragged last group of 128), illegal ids, empty and crowded experts."""
    mend_float8()
    case = Case(spec, 3, 3, 2, 160, 96)
    case.ids[0, 0], case.ids[-1, 1] = -1, 3
    check_steps(case, kernel.plan(case.problem, 3, SM90))
    case = Case(spec, 18, 2, 1, 96, 288, weights=False, bias=False)
    case.ids[:] = 1
    check_steps(case, kernel.plan(case.problem, 18, SM90))


def check_other_tiles() -> None:
    """Weights through descriptors; one product for all places of a word, as on sm100."""
    mend_float8()
    for spec in ("NVFP4A16", "W4A8", "QSERVE_W4A8_GROUP"):
        case = Case(spec, 5, 3, 2, 256, 160)
        plan = kernel.plan(case.problem, 5, SM90)
        check_steps(case, _frame.Plan(replace(plan.first, tma=True), replace(plan.second, tma=True)))
    case = Case("MXFP4A16", 5, 3, 2, 256, 160)
    plan = kernel.plan(case.problem, 5, Target.fake("sm100"))
    assert plan.first.joined and plan.second.joined
    check_steps(case, plan)


def check_decode(spec: str) -> None:
    """Whole blocks of few tokens, with illegal ids, odd sizes, one expert per token, another activation."""
    mend_float8()
    cases = (
        Case(spec, 1, 3, 2, 160, 96),
        Case(spec, 2, 3, 3, 96, 288, weights=False, bias=False),
        Case(spec, 2, 2, 1, 64, 96, activation="silu(1.702,7.0,1.0)"),
    )
    cases[0].ids[0, 0], cases[1].ids[1] = -1, 3
    for case in cases:
        actual, expected = run_decode(case), case.expected()
        assert expected.abs().max() > 0.1
        assert relative(actual, expected) <= 3 * TOLERANCE, case.problem


def check_not_a_number() -> None:
    """NaN of a weight's scale, of a global scale and of a token shows in what they reach, and nowhere else."""
    for decode in (False, True):
        for spec, plane in (("NVFP4A16", 1), ("NVFP4A16", 2), ("MXFP4A16", 1), ("W4A8", 1), ("QSERVE_W4A8_GROUP", 1)):
            case = Case(spec, 3, 4, 1, 64, 64)
            case.ids[:, 0] = torch.tensor([0, 1, 2])
            nan = 255 if case.w2[plane].dtype == torch.uint8 else float("nan")
            case.w2[plane][1, 5, 0] = nan
            case.x[min(1, len(case.x) - 1)][2] = float("nan")
            y = run_decode(case) if decode else kernel.run(*case.arguments)
            assert y[:2].isnan().nonzero().tolist() == [[1, 5]] and y[2].isnan().all(), (spec, plane)


def run_decode(case: Case) -> Tensor:
    """In few wide programs, which the interpreter runs one after the other."""
    plan = kernel.decode_plan(case.problem, SM90)
    wide = _frame.DecodePlan(replace(plan.first, block_n=16), replace(plan.second, block_n=16))
    return kernel.launch_decode(*case.arguments, chosen=wide)


@needs_triton
@pytest.mark.parametrize("function", ["check_split", "check_other_tiles", "check_not_a_number"])
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


@needs_triton
@pytest.mark.parametrize("spec", SCHEMES)
@pytest.mark.parametrize("form", ["grouped", "decode"])
def test_form_in_interpreter(form: str, spec: str) -> None:
    run_interpreted(__name__, f"check_{form}", spec)


# --- cubins ---

ARCHES = [
    *[(80, spec) for spec in ("NVFP4A16", "W4A8", "QSERVE_W4A8_CHANNEL")],
    *[(89, spec) for spec in ("MXFP4A16", "W4AFP8")],
    *[(90, spec) for spec in (*PRESETS, *QSERVE, STATIC[0], "int4.channel+int8.token.dynamic")],
    *[(100, spec) for spec in ("NVFP4A16", "W4AFP8", "QSERVE_W4A8_GROUP")],
    *[(120, spec) for spec in ("MXFP4A16", "W4A8", "W4AFP8", "QSERVE_W4A8_GROUP")],
]


def compiled(problem: MoeProblem, arch: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every kernel of the plans for one, 16 and 2048 tokens."""
    target = Target.fake(f"sm{arch}")
    out: dict[str, Any] = {}
    plans: dict[Any, int] = {kernel.decode_plan(problem, target): 1}
    plans |= {kernel.plan(problem, tokens, target): tokens for tokens in (2048, 16)}
    for plan, tokens in plans.items():
        for function, arguments in launches(problem, tokens, plan, monkeypatch, kernel):
            constants = [v for n, v in arguments.items() if n.isupper() or n.startswith("num")]
            key = f"{function.__name__} {constants}"
            if key not in out and function.__name__ not in ("count_kernel", "align_kernel", "sum_kernel"):
                out[key] = build(function, arguments, arch)
    return out


@needs_triton
@pytest.mark.parametrize("arch, spec", ARCHES)
def test_cubin(arch: int, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan of a shape compiles for the arch, within its shared memory, and to more than a trap.

    (A trap is what Triton makes of a kernel that needs more tensor memory than sm100 has.)
    """
    problem, target = problem_of(spec), Target.fake(f"sm{arch}")
    assert isinstance(kernel.fit(problem, 16, target), Rank) and isinstance(kernel.fit_decode(problem, 1, target), Rank)
    for key, built in compiled(problem, arch, monkeypatch).items():
        assert built.asm["cubin"] and "trap;" not in built.asm["ptx"], key
        assert built.metadata.shared <= SHARED_LIMIT[arch] * 1024, key
        if arch == 100 and key.startswith("grouped4") and kernel.format_of(problem.scheme) != "int8":
            assert "tcgen05.mma" in built.asm["ptx"], key  # Triton 3.6 has none for int8


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", [80, 120])
def test_wide_blocks_of_fp4_stay_in_registers(
    arch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Eight decoded matrices beside a wide product: with steps of 256 columns they had kilobytes of stack here."""
    problem = replace(problem_of("NVFP4A16", 8, 4096, 14336, 2), dtype=dtype)
    plan = kernel.plan(problem, 4096, Target.fake(f"sm{arch}"))
    assert plan.first.block_m == 64
    for function, arguments in launches(problem, 4096, plan, monkeypatch, kernel):
        if function.__name__ == "grouped4_kernel":
            assert stack_bytes(build(function, arguments, arch), tmp_path) <= 64


@needs_triton
@pytest.mark.parametrize("spec", (*PRESETS, *QSERVE))
def test_cubin_of_odd_sizes(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks instead of whole steps, on every operand; weights through descriptors where rows allow it; f16."""
    problem = replace(problem_of(spec, 7, 224, 160, 3), dtype=torch.float16)
    plan = kernel.plan(problem, 100, SM90)
    tma = _frame.Plan(replace(plan.first, tma=True), replace(plan.second, tma=True))
    for chosen in (plan, tma, kernel.decode_plan(problem, SM90)):
        for function, arguments in launches(problem, 5, chosen, monkeypatch, kernel):
            assert build(function, arguments, 90).asm["cubin"]


@needs_triton
def test_what_the_plans_are_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """wgmma of the right types with weights in registers, packed decoding; 16-byte loads and dp4a in the decode form."""
    types = {"NVFP4A16": "bf16.bf16", "W4A8": "s8.s8", "W4AFP8": "e4m3.e4m3", **dict.fromkeys(QSERVE, "s8.s8")}
    for spec, operands in types.items():
        for key, built in compiled(problem_of(spec), 90, monkeypatch).items():
            ptx = built.asm["ptx"]
            if key.startswith("grouped4"):
                assert "wgmma.mma_async" in ptx and operands in ptx, key
                assert "cp.async.cg.shared.global" in ptx or "cp.async.bulk.tensor" in ptx, key
                assert spec != "NVFP4A16" or "fma.rn.bf16x2" in ptx
            if "rows4" in key:
                assert "v4.b32" in ptx and ("dp4a.s32.s32" in ptx) == (operands == "s8.s8"), key


# --- fit ---


@pytest.mark.parametrize(
    "problem, target, reason",
    [
        (problem_of("W4A8"), Target.fake("cpu"), "needs a CUDA GPU"),
        (problem_of("NVFP4A16"), Target.fake("sm90", FAKE_OPS - {"triton"}), "triton is not installed"),
        (problem_of("W4AFP8"), Target.fake("sm80"), "w4a8 needs sm89 or newer, this is sm80"),
        (problem_of("NVFP4"), SM90, "FP4 weights under 16-bit inputs"),
        (problem_of("W8A8"), SM90, "multiplies int4 weights under 8-bit inputs"),
        (problem_of("int4.channel_group32.asym+int8.token.dynamic"), SM90, "groups must have at least 64 columns, got 32"),
        (problem_of("int4.group32+int8.token.dynamic"), SM90, "groups must have at least 64 columns, got 32"),
        (problem_of("int4.group128+int8.tensor.dynamic"), SM90, "one dynamic scale for all tokens"),
        (problem_of("NVFP4A16", hidden=2040), SM90, "hidden size must be a multiple of 16, got 2040"),
        (problem_of("MXFP4A16", inner=144), SM90, "sizes must be multiples of 32, got hidden 2048, intermediate 144"),
        (replace(problem_of("W4A8"), dtype=torch.float32), SM90, "dtype must be bfloat16 or float16, got torch.float32"),
    ],
)  # fmt: skip
def test_refusals(problem: MoeProblem, target: Target, reason: str) -> None:
    for fit in (kernel.fit, kernel.fit_decode):
        answer = fit(problem, 1, target)
        assert isinstance(answer, Reject) and reason in answer.reason


def test_the_two_files_share_no_scheme() -> None:
    for spec in (*SCHEMES, "W4A16", "FP8_DYNAMIC", "W8A8", "FP8_BLOCK"):
        fits = [isinstance(module.fit(problem_of(spec), 1, SM90), Rank) for module in (triton_moe, kernel)]
        assert sum(fits) == 1, spec
        assert triton_moe.serves(problem_of(spec).scheme) == fits[0]


def test_choice_by_tokens() -> None:
    """One token goes to the decode form, many to the grouped one; both read one layout."""
    for spec in (*PRESETS, *QSERVE):
        dispatch = choose_moe(problem_of(spec), SM90)
        assert dispatch.layout == "experts"
        assert dispatch.kernel_for(1).name == "triton_moe4_decode" and dispatch.kernel_for(2048).name == "triton_moe4"
        answer = kernel.fit_decode(problem_of(spec), 9, SM90)
        assert isinstance(answer, Reject) and "at most 64 pairs of a token and an expert, got 72" in answer.reason


def test_plans_cover_every_size() -> None:
    """Rows divide their sizes, groups end with steps, and blocks and orders of both products agree."""
    for spec in SCHEMES:
        for hidden, inner in ((32, 32), (2048, 768), (4096, 14336), (7168, 2048), (2880, 2880), (96, 1056)):
            for top_k in (1, 2, 6, 8, 10):
                problem = problem_of(spec, 16, hidden, inner, top_k)
                group = problem.scheme.weights.group_size or 1
                decode = kernel.decode_plan(problem, SM90)
                for rows, n in ((decode.first, inner), (decode.second, hidden)):
                    assert n % rows.block_n == 0 and rows.block_k % group == 0
                for tokens, arch in ((1, 80), (64, 90), (1024, 100), (8192, 120)):
                    plan = kernel.plan(problem, tokens, Target.fake(f"sm{arch}"))
                    assert plan.first.block_m == plan.second.block_m and plan.first.joined == plan.second.joined
                    for tiles in (plan.first, plan.second):
                        assert tiles.block_k % group == 0 or group % tiles.block_k == 0
                        # a product's operands have at least 16 (16 bits) or 32 (8 bits) columns
                        columns = tiles.block_k // kernel.parts_of(problem.scheme, tiles)
                        assert columns >= (16 if problem.scheme.input_activations is None else 32)
