"""triton_moe: every step against the torch truth in Triton's interpreter, and compiled for every arch it claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import Activation, MoeProblem, moe_reference, stack_planes
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels import triton_moe as kernel
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

SCHEMES = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK", "W8A8", "W8A8_STATIC", "W8A16", "W4A16", "W4A16_ASYM", "int4.group32.asym+16")
SM90 = Target.fake("sm90")
# f16 rounds by 2**-11 of a value, 2.8e-4 of a norm; a hidden value near a tie may fall on the other side.
TOLERANCE = 1e-3


def mend_float8() -> None:
    """Let Triton 3.6's interpreter round to float8 as the hardware does: its own rounding loses carries (125 -> 64)."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    dtypes = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.name in dtypes and source.name == "fp32":
            codes = torch.from_numpy(data.copy()).to(dtypes[target.name])
            return codes.view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    interpreter._convert_float = converted


class Case:
    """One block of seeded random data: planes, ids, weights, biases and its problem."""

    def __init__(
        self, spec: str, tokens: int, experts: int, top_k: int, hidden: int, inner: int, *,
        activation: str = "silu", bias: bool = True, weights: bool = True, dtype: torch.dtype = torch.float16,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        g = torch.Generator(device).manual_seed(tokens + 10 * experts + hidden + inner)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

        scheme = parse(spec)
        family = family_of(scheme)
        quantized = scheme.input_activations is not None
        self.problem = MoeProblem(
            scheme, experts, hidden, inner, top_k, Activation.parse(activation), dtype, bias, weights
        )
        self.scale2 = torch.tensor([0.01], device=device) if scheme.static else None
        x = draw(tokens, hidden)
        scale = torch.tensor([0.02], device=device) if scheme.static else None
        self.x: Planes = family.quantize_input(x, scheme, scale) if quantized else (x,)
        self.w13 = stack_planes(
            [family.quantize_weight(draw(2 * inner, hidden, scale=hidden**-0.5), scheme) for _ in range(experts)]
        )
        self.w2 = stack_planes(
            [family.quantize_weight(draw(hidden, inner, scale=inner**-0.5), scheme) for _ in range(experts)]
        )
        self.b13 = draw(experts, 2 * inner, scale=0.1) if bias else None
        self.b2 = draw(experts, hidden, scale=0.1) if bias else None
        scores = torch.rand(tokens, experts, generator=g, device=device)
        values, self.ids = scores.topk(top_k, -1)
        self.weights = values.to(dtype) if weights else None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What ``run`` takes."""
        return self.x, self.ids, self.weights, self.w13, self.b13, self.w2, self.b2, self.scale2, self.problem

    def expected(self) -> Tensor:
        """The truth, [T, H]."""
        p = self.problem
        return moe_reference(
            self.x, self.ids, self.weights, self.w13, self.b13, self.w2, self.b2, p.scheme, p.activation, p.dtype,
            self.scale2,
        )  # fmt: skip


def relative(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


# --- pairs by expert ---


def check_align(tokens: int, top_k: int, experts: int, block_m: int) -> None:
    """Order, blocks and unused blocks against a plain loop; illegal ids of either sign are left out."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)
    pairs = kernel.align(ids, experts, block_m)
    flat = ids.flatten().tolist()
    order: list[int] = []
    blocks: list[list[int]] = []
    for expert in range(experts):
        own = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        blocks += [[expert, len(order) + i, min(block_m, len(own) - i)] for i in range(0, len(own), block_m)]
        order += own
    assert pairs.order[: len(order)].tolist() == order
    assert pairs.blocks.t()[: len(blocks)].tolist() == blocks
    assert pairs.blocks[2, len(blocks) :].eq(0).all()


def check_aligns() -> None:
    """Both ways of counting; one expert, experts that are no power of two, blocks that are cut short."""
    for tokens, top_k, experts, block_m in ((1, 1, 1, 16), (5, 2, 7, 16), (40, 8, 128, 16), (60, 4, 3, 32)):
        check_align(tokens, top_k, experts, block_m)
    check_align(1500, 1, 5, 64)
    check_align(700, 2, 200, 16)


# --- the grouped form ---


def check_steps(case: Case, plan: kernel.Plan) -> None:
    """Each step alone, fed with the truth of the step before, then the whole."""
    p = case.problem
    family = family_of(p.scheme)
    quantized = p.scheme.input_activations is not None
    pairs = kernel.align(case.ids, p.experts, plan.first.block_m)
    hidden = kernel.first(case.x, pairs, case.w13, case.b13, case.scale2, p, plan.first)
    legal = [pair for pair, e in enumerate(case.ids.flatten().tolist()) if 0 <= e < p.experts]
    order = pairs.order[: len(legal)].long()
    truth, parts = torch.empty(len(legal), p.intermediate, dtype=p.dtype), torch.empty(len(legal), p.hidden)
    inner: list[Planes] = []
    for i, pair in enumerate(order.tolist()):
        expert, token = int(case.ids.flatten()[pair]), pair // p.top_k
        x = tuple(plane if plane.dim() == 1 else plane[token : token + 1] for plane in case.x)
        b13 = None if case.b13 is None else case.b13[expert]
        b2 = None if case.b2 is None else case.b2[expert]
        wide = family.linear(x, tuple(w[expert] for w in case.w13), b13, p.scheme, p.dtype)
        truth[i] = p.activation(wide)[0]
        planes: Planes = (truth[i : i + 1],)
        inner.append(family.quantize_input(planes[0], p.scheme, case.scale2) if quantized else planes)
        parts[i] = family.linear(inner[-1], tuple(w[expert] for w in case.w2), b2, p.scheme, p.dtype)[0].float()
    stacked = tuple(plane if plane.shape[0] == 1 and p.scheme.static and i else torch.cat([q[i] for q in inner])
                    for i, plane in enumerate(inner[0]))  # fmt: skip
    if len(hidden) == 1:
        assert relative(hidden[0][: len(legal)], truth) <= TOLERANCE
        if quantized:
            codes, scale = kernel.quantize(truth, p)
            assert torch.allclose(scale, stacked[1], rtol=1e-6)
            check_codes(codes, stacked[0])
    else:
        check_codes(hidden[0][: len(legal)], stacked[0])
        if hidden[1].numel() > 1:
            assert relative(hidden[1][: len(legal)], stacked[1]) <= TOLERANCE
    rows = [torch.zeros(pairs.order.numel(), *plane.shape[1:]).to(plane.dtype) for plane in stacked]
    for full, plane in zip(rows, stacked):
        full[: plane.shape[0]] = plane
    if p.scheme.static:
        rows[1] = stacked[1]
    actual = kernel.second(tuple(rows), pairs, case.w2, case.b2, p, plan.second)
    assert relative(actual[order], parts) <= TOLERANCE
    assert relative(kernel.launch(*case.arguments, plan), case.expected()) <= 3 * TOLERANCE


def check_codes(actual: Tensor, expected: Tensor) -> None:
    """Codes differ at ties only: few, and by one step."""
    wrong = (actual.float() != expected.float()).float().mean()
    assert wrong <= 0.02, f"{wrong:.3f} of the codes differ"
    assert relative(actual, expected) <= 0.01


def check_grouped(spec: str) -> None:
    """Plans of several block sizes over sizes that no tile divides, with illegal ids, empty and crowded experts."""
    mend_float8()
    case = Case(spec, 3, 3, 2, 80, 48)
    case.ids[0, 0], case.ids[-1, 1] = -1, 3
    check_steps(case, kernel.plan(case.problem, 3, SM90))
    case = Case(spec, 40, 3, 2, 144, 272, weights=False)
    check_steps(case, kernel.plan(case.problem, 40, SM90))
    case = Case(spec, 70, 3, 1, 128, 128, bias=False)
    case.ids[:] = 1
    check_steps(case, kernel.plan(case.problem, 4096, SM90))


# --- the decode form ---


def check_decode(spec: str) -> None:
    """Whole blocks of few tokens, with illegal ids, odd sizes, one expert per token, other activations."""
    mend_float8()
    cases = (
        Case(spec, 1, 3, 2, 144, 48),
        Case(spec, 2, 3, 3, 80, 272, weights=False, bias=False),
        Case(spec, 2, 2, 1, 48, 80, activation="silu(1.702,7.0,1.0)"),
    )
    cases[0].ids[0, 0], cases[1].ids[1] = -1, 3
    for case in cases:
        plan = kernel.decode_plan(case.problem, SM90)
        wide = kernel.DecodePlan(replace(plan.first, block_n=16), replace(plan.second, block_n=16))
        actual = kernel.launch_decode(*case.arguments, wide)
        expected = case.expected()
        assert expected.abs().max() > 0.1
        assert relative(actual, expected) <= 3 * TOLERANCE, f"{case.problem} {plan}"


@needs_triton
@pytest.mark.parametrize("function", ["check_aligns"])
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


@needs_triton
@pytest.mark.parametrize("spec", SCHEMES)
def test_grouped_in_interpreter(spec: str) -> None:
    run_interpreted(__name__, "check_grouped", spec)


@needs_triton
@pytest.mark.parametrize("spec", SCHEMES)
def test_decode_in_interpreter(spec: str) -> None:
    run_interpreted(__name__, "check_decode", spec)
