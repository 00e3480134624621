"""What the GPU tests of Triton's expert blocks share: truths of single steps, limits, and checks of a kernel file by its steps.

``kernel`` is ``triton_moe`` or ``triton_moe4``: their plans, steps, runs and launches have the same names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import moe_reference
from quant_compile.lowering.kernels.experts import _frame
from quant_compile.lowering.target import Target
from tests.lowering.test_triton_moe import Case, relative
from tests.moe_support import nudged

# bf16 rounding alone is 1.7e-3; the rest is room for the order of f32 sums and sm90's short fp8 sums.
TOLERANCE = 5e-3
# Between the products the hidden layer is rounded to 16 bits and then to codes. Where f32 sums differ in their last bits (or
# sm90's fp8 sums in the 14th), a value at a tie falls to the neighbouring 16-bit float, and that may fall to the neighbouring
# code. So the steps are compared one by one, each on the very input that the kernel before it gave, under TOLERANCE; codes
# and whole blocks are held to what the truth itself makes of a hidden layer that is one 16-bit step off everywhere.
CheckGrouped = Callable[[Case, _frame.Plan], None]
CHOICES = ("out of range", "one expert", "none legal", "int32")


def supported(kernel: Any, case: Case) -> None:
    """Skip where this GPU cannot run the case."""
    answer = kernel.fit(case.problem, 1, Target.of("cuda"))
    if isinstance(answer, Reject):
        pytest.skip(answer.reason)


def limit(case: Case) -> float:
    """How far a whole block may be from its truth."""
    if case.problem.scheme.input_activations is None:
        return TOLERANCE
    p = case.problem
    off = moe_reference(
        case.x, case.ids, case.weights, case.w13, case.b13, case.w2, case.b2, p.scheme, nudged(p.activation), p.dtype,
        case.scale2,
    )  # fmt: skip
    return TOLERANCE + relative(off, case.expected())


def make(spec: str, tokens: int, sizes: tuple[int, int, int, int], **options: Any) -> Case:
    """A case on the GPU, in bf16 where nothing else is asked for; sizes are (experts, top k, hidden, intermediate)."""
    experts, top_k, hidden, inner = sizes
    options.setdefault("dtype", torch.bfloat16)
    return Case(spec, tokens, experts, top_k, hidden, inner, device="cuda", **options)


# --- truths of single steps ---


def hidden_truth(case: Case) -> Tensor:
    """Hidden layer of each pair, [T k, I], by the family's linear and the activation; zeros for illegal ids."""
    p = case.problem
    family = family_of(p.scheme)
    flat = case.ids.flatten()
    out = torch.zeros(flat.numel(), p.intermediate, dtype=p.dtype, device=flat.device)
    for expert in range(p.experts):
        pairs = (flat == expert).nonzero().flatten()
        x = tuple(plane if plane.dim() == 1 else plane[pairs // p.top_k] for plane in case.x)
        b13 = None if case.b13 is None else case.b13[expert]
        out[pairs] = p.activation(family.linear(x, tuple(w[expert] for w in case.w13), b13, p.scheme, p.dtype))
    return out


def second_truth(case: Case, hidden: Planes) -> Tensor:
    """[T, H] from quantized hidden rows in the order of the pairs; the second product, weights and sum alone."""
    p = case.problem
    family = family_of(p.scheme)
    flat = case.ids.flatten()
    parts = torch.zeros(flat.numel(), p.hidden, device=flat.device)
    for expert in range(p.experts):
        pairs = (flat == expert).nonzero().flatten()
        x = tuple(plane if plane.dim() == 1 else plane[pairs] for plane in hidden)
        b2 = None if case.b2 is None else case.b2[expert]
        parts[pairs] = family.linear(x, tuple(w[expert] for w in case.w2), b2, p.scheme, p.dtype).float()
    if case.weights is not None:
        parts *= case.weights.flatten().float()[:, None]
    return parts.unflatten(0, (-1, p.top_k)).sum(1).to(p.dtype)


def aligned(case: Case, plan: _frame.Plan) -> tuple[_frame.Pairs, Tensor]:
    """(pairs by expert, the legal ones in their order)."""
    p, flat = case.problem, case.ids.flatten()
    legal = int(((flat >= 0) & (flat < p.experts)).sum())
    pairs = _frame.align(case.ids, p.experts, plan.first.block_m)
    return pairs, pairs.order[:legal].long()


def scatter(plane: Tensor, order: Tensor, size: int) -> Tensor:
    """Rows in the order of the blocks -> rows in the order of the pairs; a scale of the whole tensor stays."""
    if plane.dim() == 1:
        return plane
    out = torch.zeros((size, *plane.shape[1:]), dtype=torch.float32, device=plane.device)
    out[order] = plane[: order.numel()].float()
    return out.to(plane.dtype)


# --- checks ---


def check_decode(kernel: Any, case: Case, plan: _frame.DecodePlan) -> None:
    """Hidden rows alone, then the second kernel on those very rows."""
    p = case.problem
    flat = case.ids.flatten()
    legal = (flat >= 0) & (flat < p.experts)
    hidden = kernel.gated_rows(case.x, case.ids, case.w13, case.b13, p, plan.first)
    rows = torch.where(legal[:, None], hidden[0], 0)
    assert relative(rows, hidden_truth(case)) <= TOLERANCE
    if len(hidden) > 1:
        amax = rows.float().abs().unflatten(1, (-1, plan.first.block_n)).amax(-1)
        assert torch.equal(torch.where(legal[:, None], hidden[1], 0), amax)
    y = kernel.down_rows(hidden, case.ids, case.weights, case.w2, case.b2, case.scale2, p, plan.second)
    planes: Planes = (rows,)
    if p.scheme.input_activations is not None:
        planes = family_of(p.scheme).quantize_input(rows, p.scheme, case.scale2)
    assert relative(y, second_truth(case, planes)) <= TOLERANCE
    assert torch.equal(y, kernel.launch_decode(*case.arguments, chosen=plan))


def check_every_step(
    kernel: Any, spec: str, tokens: Sequence[int], sizes: tuple[int, int, int, int], check_grouped: CheckGrouped
) -> None:
    """Both forms, as they are chosen, over numbers of tokens."""
    target = Target.of("cuda")
    for count in tokens:
        case = make(spec, count, sizes)
        supported(kernel, case)
        check_grouped(case, kernel.plan(case.problem, count, target))
        if count * case.problem.top_k <= _frame.DECODE_PAIRS:
            check_decode(kernel, case, kernel.decode_plan(case.problem, target))


def check_blocks_of_every_size(kernel: Any, case: Case, check_grouped: CheckGrouped) -> None:
    """The block sizes and load paths that the choice might take for other numbers of tokens."""
    target = Target.of("cuda")
    supported(kernel, case)
    for tokens in (1, 100, 200, 400, 8192):
        plan = kernel.plan(case.problem, tokens, target)
        check_grouped(case, plan)
        if target.arch >= 90:
            check_grouped(case, _frame.Plan(replace(plan.first, tma=True), replace(plan.second, tma=True)))


def check_whole(kernel: Any, case: Case) -> None:
    """Against the truth from tokens to result: flipped codes of the hidden layer are part of it and stay below the limit."""
    supported(kernel, case)
    expected = case.expected()
    assert relative(kernel.run(*case.arguments), expected) <= limit(case)
    if case.ids.numel() <= _frame.DECODE_PAIRS:
        assert relative(kernel.run_decode(*case.arguments), expected) <= limit(case)


def check_unusual_choices(kernel: Any, spec: str, ids: str) -> None:
    """``ids`` is one of CHOICES."""
    for tokens in (3, 200):
        case = make(spec, tokens, (6, 2, 256, 256))
        supported(kernel, case)
        if ids == "out of range":
            case.ids[::2, 0], case.ids[1, 1] = 6, -(2**40)
            case.ids[0, 1] = 2**40
        elif ids == "one expert":
            case.ids[:] = 4
        elif ids == "none legal":
            case.ids[:] = 6
        else:
            case.ids = case.ids.int()
        for run in (kernel.run, kernel.run_decode):
            if run is kernel.run or tokens == 3:
                actual = run(*case.arguments)
                assert relative(actual, case.expected()) <= limit(case)
                assert ids != "none legal" or actual.eq(0).all()


def check_replays(kernel: Any, spec: str) -> None:
    """Captured once, replayed with other ids and other crowding: no shape and no host value depends on them."""
    for tokens, run in ((1, kernel.run_decode), (4, kernel.run_decode), (4, kernel.run), (500, kernel.run)):
        case = make(spec, tokens, (32, 4, 256, 384))
        supported(kernel, case)
        run(*case.arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(*case.arguments)
        for shift in (0, 5, 11):
            case.ids.copy_((case.ids + shift) % 32 if shift < 11 else torch.full_like(case.ids, 3))
            graph.replay()
            replayed = y.clone()
            assert torch.equal(replayed, run(*case.arguments))
            assert relative(replayed, case.expected()) <= limit(case)


def check_equal_bits(kernel: Any, run: Callable[..., Tensor], spec: str, tokens: int) -> None:
    """Equal inputs give equal bits."""
    case = make(spec, tokens, (16, 4, 512, 512))
    supported(kernel, case)
    first = run(*case.arguments)
    assert all(torch.equal(first, run(*case.arguments)) for _ in range(5))


def check_one_wrong_expert(kernel: Any, spec: str, plane: int, factor: float) -> None:
    """Negative control: a plane of one expert's second weight scaled is seen."""
    case = make(spec, 64, (4, 2, 256, 256))
    supported(kernel, case)
    expected, bound = case.expected(), limit(case)
    case.w2[plane][2] *= factor
    actual = kernel.run(*case.arguments)
    assert relative(actual, expected) > bound
    assert relative(actual, case.expected()) <= limit(case)
