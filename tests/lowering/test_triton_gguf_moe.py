"""triton_gguf_moe: layouts, both forms against the torch truth in Triton's interpreter, and cubins of every arch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject
from quant_compile.ir.ggml.decode import decode
from quant_compile.ir.ggml.types import BY_NUMBER
from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.kernels.experts import _frame, sgl_gguf_moe
from quant_compile.lowering.kernels.experts import triton_gguf_moe as kernel
from quant_compile.lowering.kernels.gguf.triton_gguf import FORMS
from quant_compile.lowering.moe import (
    choose_moe,
    moe_fits,
    moe_kernels,
    moe_layouts,
    moe_problem_text,
    parse_moe_problem,
    planes_of,
)
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.select import Request
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.library_schemas import through_schema
from tests.lowering.test_gguf_kernels import rounded_q8_1
from tests.lowering.test_triton_moe import SHARED_LIMIT, SM90, TOLERANCE, Case, build, launches, problem_of, relative
from tests.lowering.triton_support import needs_triton, run_interpreted, stack_bytes

SPECS = tuple(f"GGUF_{name.upper()}" for name in FORMS)
# What files mix: gate and up in the first, down in the second; forms of scales and of high bits change between the products.
MIXES = ("GGUF_Q4_K/GGUF_Q6_K", "GGUF_Q5_K/GGUF_Q6_K", "GGUF_Q4_0/GGUF_Q8_0", "GGUF_Q6_K/GGUF_Q4_0")


def packed(case: Case, layout: str = kernel.STACKED_PLANES) -> tuple[Any, ...]:
    """What ``run`` takes, weights in the kernels' layout."""
    x, ids, weights, w13, b13, w2, b2, scale2, p = case.arguments
    first, second = p.halves
    w13 = pack(w13, first, layout, 2 * p.intermediate, p.hidden)
    return x, ids, weights, w13, b13, pack(w2, second, layout, p.hidden, p.intermediate), b2, scale2, p


def pack(stacked: Planes, problem: MoeProblem, layout: str, n: int, k: int) -> Planes:
    """Planes of all experts, expert by expert."""
    lay = moe_layouts()[layout]
    each = [lay.pack(tuple(plane[e] for plane in stacked), problem, n, k) for e in range(problem.experts)]
    planes = tuple(torch.stack(same) for same in zip(*each, strict=True))
    assert [(tuple(p.shape), p.dtype) for p in planes] == [(s.shape, s.dtype) for s in lay.planes(problem, n, k)]
    for e, own in enumerate(each):
        assert torch.equal(lay.unpack(own, problem, n, k)[0], stacked[0][e])
    return planes


def sizes(spec: str) -> tuple[int, int]:
    """Hidden and intermediate size: of blocks of 32, such as no step divides."""
    return (160, 96) if "K" not in spec else (512, 256)


def check_grouped(spec: str) -> None:
    """Illegal ids, empty and crowded experts, no bias."""
    case = Case(spec, 3, 3, 2, *sizes(spec))
    case.ids[0, 0], case.ids[-1, 1] = -1, 3
    agrees(case, kernel.run(*packed(case)))
    case = Case(spec, 18, 2, 1, *sizes(spec), weights=False, bias=False)
    case.ids[:] = 1
    agrees(case, kernel.run(*packed(case)))


def check_decode(spec: str) -> None:
    """Whole blocks of few tokens, with illegal ids, one expert per token, another activation."""
    cases = [Case(spec, 1, 3, 2, *sizes(spec))]
    cases[0].ids[0, 0] = -1
    if spec == "GGUF_Q8_0":
        cases.append(Case(spec, 2, 2, 1, 96, 64, activation="silu(1.702,7.0,1.0)", weights=False, bias=False))
    for case in cases:
        agrees(case, kernel.run_decode(*packed(case)))


def agrees(case: Case, actual: Tensor) -> None:
    expected = case.expected()
    assert expected.abs().max() > 0.1
    assert relative(actual, expected) <= 3 * TOLERANCE, case.problem


def check_mxfp4() -> None:
    """The kernels of MXFP4A16 over the same numbers."""
    case = Case("GGUF_MXFP4", 2, 3, 2, 64, 96)
    for name in ("triton_gguf_mxfp4_moe_decode", "triton_gguf_mxfp4_moe"):
        agrees(case, moe_kernels()[name].run(*packed(case, "experts_gguf_mxfp4")))


@needs_triton
@pytest.mark.parametrize("form", ["grouped", "decode"])
@pytest.mark.parametrize("spec", [*SPECS, MIXES[0], *(pytest.param(mix, marks=pytest.mark.slow) for mix in MIXES[1:])])
def test_form_in_interpreter(form: str, spec: str) -> None:
    run_interpreted(__name__, f"check_{form}", spec)


@needs_triton
def test_mxfp4_in_interpreter() -> None:
    run_interpreted(__name__, "check_mxfp4")


# --- cubins ---


@needs_triton
@pytest.mark.parametrize(
    ("arch", "spec"),
    [*((90, spec) for spec in (*SPECS, MIXES[0])), *((arch, "GGUF_Q4_K") for arch in (80, 89, 100, 120))],
)
def test_cubins(arch: int, spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Plans of one, 16 and 2048 tokens compile to more than a trap, within shared memory and registers."""
    problem, target, layout = problem_of(spec), Target.fake(f"sm{arch}"), kernel.STACKED_PLANES
    plans: dict[Any, int] = {kernel.decode_plan(problem, target): 1}
    plans |= {kernel.plan(problem, tokens, target): tokens for tokens in (2048, 16)}
    seen = set()
    for plan, tokens in plans.items():
        for function, arguments in launches(problem, tokens, plan, monkeypatch, kernel, layout):
            if function.__name__ not in ("rows_kernel", "grouped_kernel"):
                continue
            built = build(function, arguments, arch)
            seen.add(function.__name__)
            assert built.asm["cubin"] and "trap;" not in built.asm["ptx"]
            assert built.metadata.shared <= SHARED_LIMIT[arch] * 1024
            assert stack_bytes(built, tmp_path) <= 64, (function.__name__, plan)
            if function.__name__ == "grouped_kernel" and arch == 90:
                product = "wgmma.mma_async" if plan.first.warps == 4 else "mma.sync"
                assert product in built.asm["ptx"] and "cp.async.cg.shared.global" in built.asm["ptx"]
            if function.__name__ == "rows_kernel":
                assert "v4.b32" in built.asm["ptx"]
    assert seen == {"rows_kernel", "grouped_kernel"}


# --- fit ---


@pytest.mark.parametrize(
    ("problem", "target", "reason"),
    [
        (problem_of("GGUF_Q4_K"), Target.fake("cpu"), "needs a CUDA GPU"),
        (problem_of("GGUF_Q4_K"), Target.fake("sm90", FAKE_OPS - {"triton"}), "triton is not installed"),
        (problem_of("GGUF_Q2_K"), SM90, "not GGUF_Q2_K"),
        (problem_of("W4A16"), SM90, "GGUF blocks"),
        (problem_of("GGUF_Q4_K/GGUF_Q3_K"), SM90, "not GGUF_Q3_K"),
        (problem_of("GGUF_Q2_K/GGUF_Q4_K"), SM90, "not GGUF_Q2_K"),
        (replace(problem_of("GGUF_Q4_K"), dtype=torch.float32), SM90, "bfloat16 or float16"),
    ],
)
def test_refusals(problem: MoeProblem, target: Target, reason: str) -> None:
    for fit in (kernel.fit, kernel.fit_decode):
        answer = fit(problem, 1, target)
        assert isinstance(answer, Reject) and reason in answer.reason, answer
    assert "64 pairs" in kernel.fit_decode(problem_of("GGUF_Q4_K"), 16, SM90).reason


@pytest.mark.parametrize("spec", ["GGUF_Q4_K", MIXES[0]])
def test_library_op_takes_blocks_as_they_are(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both products through the library's own schema; an illegal id adds nothing. Only pinned, since inputs are rounded."""
    case, kinds = Case(spec, 3, 4, 2, 256, 256), []
    case.ids[0, 0], case.ids[2, 1] = -1, 4
    p = case.problem

    def double(x: Tensor, w: Tensor, ids: Tensor, top_k: int, kind: int, row: int, tokens: int) -> Tensor:
        assert ids.dtype == torch.int32 and w.shape[:2] == (4, row)
        kinds.append(kind)
        tokens_of = torch.arange(tokens).repeat_interleave(top_k)
        assert tokens_of.numel() == ids.numel()
        rows = zip(rounded_q8_1(x)[tokens_of], ids.flatten().tolist(), strict=True)
        return torch.stack([decode(BY_NUMBER[kind].name, w[e]) @ token for token, e in rows]).to(x.dtype)

    monkeypatch.setattr(sgl_gguf_moe, "_op", lambda: through_schema("ggml_moe_a8_vec", double))
    assert relative(sgl_gguf_moe.run(*case.arguments), case.expected()) <= 2e-2
    assert kinds == [block_of(scheme).number for scheme in p.schemes]
    answers = moe_fits(problem_of("GGUF_Q4_K"), SM90, Request(), 1)
    assert "Q8_1" in str(answers["sgl_gguf_a8_moe"])
    pinned = choose_moe(p, SM90, Request(kernels=(("GGUF_Q4_K", "sgl_gguf_a8_moe"),)))
    assert pinned.layout == "experts" and pinned.kernel_for(4096).name == "sgl_gguf_a8_moe"
    assert "no ggml_moe_a8_vec" in sgl_gguf_moe.fit(p, 1, Target.fake("sm90", frozenset())).reason


@pytest.mark.parametrize("spec", [*SPECS, *MIXES, "GGUF_MXFP4"])
def test_choice(spec: str) -> None:
    dispatch = choose_moe(problem_of(spec), Target.fake("sm90"))
    name = "triton_gguf_mxfp4_moe" if spec == "GGUF_MXFP4" else "triton_gguf_moe"
    assert dispatch.kernel_for(1).name == f"{name}_decode" and dispatch.kernel_for(4096).name == name
    assert dispatch.layout in ("experts_gguf_planes", "experts_gguf_mxfp4")
    assert isinstance(kernel.decode_plan(problem_of("GGUF_Q4_K"), SM90), _frame.DecodePlan)


def test_blocks_of_two_schemes() -> None:
    """Text and back, the halves, bits, and kernels that multiply one scheme only."""
    problem = problem_of("GGUF_Q4_K/GGUF_Q6_K")
    assert parse_moe_problem(moe_problem_text(problem)) == problem and problem.spec == "GGUF_Q4_K/GGUF_Q6_K"
    assert replace(problem, scheme2=problem.scheme) == problem_of("GGUF_Q4_K")
    assert problem.halves == (problem_of("GGUF_Q4_K"), problem_of("GGUF_Q6_K"))
    assert problem.bits_per_weight == pytest.approx((2 * 4.5 + 6.5625) / 3)
    answers = moe_fits(problem, SM90, Request(), 1)
    assert answers["triton_moe"] == answers["triton_gguf_mxfp4_moe"] == "multiplies weights of one scheme only"
    pinned = Request(kernels=(("GGUF_Q6_K", "sgl_gguf_a8_moe"),))
    assert choose_moe(problem, SM90, pinned).kernel_for(1).name == "sgl_gguf_a8_moe"
    p, (first, second) = problem, planes_of(kernel.STACKED_PLANES, problem)
    assert [s.shape[:2] for s in (first[0], second[0])] == [(p.experts, 2 * p.intermediate), (p.experts, p.hidden)]
