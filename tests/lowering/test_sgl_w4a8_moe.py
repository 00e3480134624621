"""W4AFP8 experts on sgl-kernel's grouped GEMM: packing, exact calls with a double, numbers by emulation, selection."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Planes
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.lowering.kernels.experts import library_moe, sgl_w4a8_moe
from quant_compile.lowering.moe import moe_kernels, moe_layouts
from quant_compile.lowering.registry import Rank, Reject
from quant_compile.lowering.schemes.weight_only import unpack_nibbles
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.library_schemas import through_schema
from tests.lowering.test_torch_cpu_moe import Block, planes_of, problem_of
from tests.moe_support import nudged

BF16, F16 = torch.bfloat16, torch.float16
SM90 = Target.fake("sm90")
STATIC = "int4.group128+fp8e4m3.tensor"
# Each of two products is rounded to bf16 before the token's scale and after it, 1.7e-3 each time.
TOLERANCE = 7e-3


def sized(spec: str = "W4AFP8", dtype: torch.dtype = BF16, **sizes: Any) -> MoeProblem:
    return problem_of(spec, dtype, **({"hidden": 512, "intermediate": 128, "experts": 5} | sizes))


def signed(data: Tensor) -> Tensor:
    """int8 bytes of two int4 in two's complement, even place in the low nibble -> f32."""
    codes = unpack_nibbles(data.view(torch.uint8), 2 * data.shape[-1]).int()
    return ((codes ^ 8) - 8).float()


def double(
    d: Tensor, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, expert_offsets: Tensor, problem_sizes: Tensor,
    a_strides: Tensor, b_strides: Tensor, d_strides: Tensor, s_strides: Tensor, chunk_size: int, topk: int,
) -> None:  # fmt: skip
    """sgl-kernel 0.4's cutlass_w4a8_moe_mm: its checks, and pointers stepped from the bases of the operands."""
    (rows, k), (experts, n, half) = a.shape, b.shape
    unit = 4 if k % 512 == 0 else 1  # scales that one step of the kernel's main loop takes
    assert (
        a.dtype == torch.float8_e4m3fn and b.dtype == torch.int8 and 2 * half == k and chunk_size == 128 and topk >= 1
    )
    assert all(t.is_contiguous() for t in (d, a, b, b_scales)) and tuple(d.shape) == (rows, n) and d.dtype is BF16
    assert a_scales.dtype == torch.float32 and tuple(a_scales.shape) == (1,)
    assert b_scales.dtype is BF16 and tuple(b_scales.shape) == (experts, k // 128 // unit, n * unit)
    assert expert_offsets.dtype == problem_sizes.dtype == torch.int32 and tuple(expert_offsets.shape) == (experts,)
    assert tuple(problem_sizes.shape) == (experts, 3) and problem_sizes.is_contiguous()
    for strides, size in ((a_strides, k), (b_strides, k), (d_strides, n), (s_strides, n)):
        assert (
            strides.dtype == torch.int64
            and tuple(strides.shape) == (experts, 3)
            and strides.unique().tolist() == [size]
        )
    d.fill_(torch.nan)
    for expert, start in enumerate(expert_offsets.tolist()):
        wide, m, deep = problem_sizes[expert].tolist()
        assert (wide, deep) == (n, k) and m >= 0
        total = torch.zeros(m, n)
        for group in range(k // 128):
            at = slice(group * 128, (group + 1) * 128)
            scale = b_scales[expert].view(-1, n, unit)[group // unit, :, group % unit]
            total += (a[start : start + m, at].float() @ signed(b[expert])[:, at].t()) * scale.float()
        d[start : start + m] = (total * a_scales).to(d.dtype)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgl_w4a8_moe, "_op", lambda: through_schema("cutlass_w4a8_moe_mm", double))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("spec", ["W4AFP8", STATIC])
@pytest.mark.parametrize(("hidden", "inner"), [(512, 128), (128, 512), (384, 256)])
def test_calls_and_numbers(spec: str, hidden: int, inner: int) -> None:
    """Both orders of scales; tokens of very unlike size; dropped pairs and unwritten rows (NaN here) stay out."""
    kernel = moe_kernels()["sgl_w4a8_moe"]
    for tokens in (1, 40):
        torch.manual_seed(tokens)
        block = Block(sized(spec, hidden=hidden, intermediate=inner), tokens)
        if spec == "W4AFP8":
            block.x = block.x[0], block.x[1] * torch.logspace(-2, 2, tokens).unsqueeze(1)
        block.ids[0, 0] = -1
        block.ids[-1] = torch.tensor([5, 3])
        assert isinstance(kernel.fit(block.problem, tokens, SM90), Rank)
        # Besides rounding, codes of the hidden layer flip, as they do where that is one step of bf16 off everywhere.
        wanted = block.expected()
        block.problem = replace(block.problem, activation=cast(Any, nudged(block.problem.activation)))
        limit = TOLERANCE + relative(block.expected(), wanted)
        block.problem = replace(block.problem, activation=Activation("silu"))
        assert relative(block.got(kernel), wanted) <= limit <= 0.05


@pytest.mark.usefixtures("doubles")
def test_one_product_is_exact_but_for_its_rounding() -> None:
    block = Block(sized(), 20)
    problem, groups = block.problem, library_moe.group_pairs(block.ids, 5)
    rows = library_moe._gather(block.x, groups.pairs // 2)
    parts = [sgl_w4a8_moe.pack(tuple(q[e] for q in block.w13), problem, 256, 512) for e in range(5)]
    packed = tuple(torch.stack(q) for q in zip(*parts, strict=True))
    product = library_moe.Product(problem, 256, 512)
    found = sgl_w4a8_moe.w4a8_grouped(rows, packed, groups, product)
    exact = torch.empty(40, 256, dtype=torch.float64)
    for row, expert in enumerate(groups.experts.tolist()):
        dense = signed(parts[expert][0]).double() * block.w13[1][expert].double().repeat_interleave(128, 1)
        exact[row] = rows[0][row].double() @ dense.t() * rows[1][row].double()
    # Two roundings to bf16, half a unit of 2**-8 each.
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-7).float().mean() >= 0.999


@pytest.mark.usefixtures("doubles")
def test_a_wrong_order_of_scales_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the emulation: groups of a row one after the other."""
    block = Block(sized(hidden=1024, intermediate=1024), 20)
    kernel = moe_kernels()["sgl_w4a8_moe"]

    def plain(planes: Planes, problem: MoeProblem, n: int, k: int) -> Planes:
        data, scale = sgl_w4a8_moe.pack(planes, problem, n, k)
        return data, planes[1].reshape(scale.shape)

    right = moe_layouts()[kernel.layout]
    monkeypatch.setitem(moe_layouts(), kernel.layout, replace(right, pack=plain))
    assert relative(block.got(kernel), block.expected()) > 0.05


@pytest.mark.parametrize("size", [(256, 512), (48, 128), (130, 1536), (1, 384)])
def test_packing_is_undone(size: tuple[int, int]) -> None:
    problem, layout = sized(), moe_layouts()["experts_w4a8_cutlass"]
    planes = planes_of(problem, *size)
    parts = [layout.pack(tuple(q[e] for q in planes), problem, *size) for e in range(problem.experts)]
    packed = tuple(torch.stack(q) for q in zip(*parts, strict=True))
    assert [(tuple(q.shape), q.dtype) for q in packed] == [(s.shape, s.dtype) for s in layout.planes(problem, *size)]
    for expert, part in enumerate(parts):
        for found, wanted in zip(layout.unpack(part, problem, *size), (q[expert] for q in planes), strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_the_trial_measures_this_kernel(monkeypatch: pytest.MonkeyPatch, doubles: None) -> None:
    kernel = moe_kernels()["sgl_w4a8_moe"]
    problem = sized(experts=4, intermediate=256)
    assert library_moe._error(kernel, problem, torch.device("cpu")) <= library_moe.TRIAL_TOLERANCE

    def wrong(d: Tensor, *rest: Any) -> None:
        double(d, *rest)
        d.mul_(1.1)

    monkeypatch.setattr(sgl_w4a8_moe, "_op", lambda: wrong)
    assert library_moe._error(kernel, problem, torch.device("cpu")) > library_moe.TRIAL_TOLERANCE


REFUSALS = [
    (sized(), Target.fake("cpu"), "needs a CUDA GPU"),
    (sized(), Target.fake("sm89"), "needs sm90"),
    (sized(), Target.fake("sm100"), "up to sm90"),
    (sized(), Target.fake("sm90", FAKE_OPS - {"sgl_kernel::cutlass_w4a8_moe_mm"}), "cutlass_w4a8_moe_mm is not here"),
    (sized(dtype=F16), SM90, "writes bfloat16, not float16"),
    (sized(hidden=576), SM90, "hidden size must be a multiple of 128"),
    (sized(intermediate=192), SM90, "intermediate size must be a multiple of 128"),
    (sized(experts=2000), SM90, "up to 1024 experts, got 2000"),
    (sized(has_bias=True), SM90, "adds biases to rounded products"),
    (sized("W4A8"), SM90, "e4m3 inputs"),
    (sized("W4A16"), SM90, "e4m3 inputs"),
    (sized("FP8_DYNAMIC"), SM90, "4-bit integer weights"),
    (sized("int4.channel+fp8e4m3.token.dynamic"), SM90, "per group"),
    (sized("int4.group64+fp8e4m3.token.dynamic"), SM90, "groups must have 128 inputs, got 64"),
    (sized("int4.group128+fp8e4m3.tensor.dynamic"), SM90, "dynamic scale of the whole hidden layer"),
]


@pytest.mark.parametrize(("problem", "target", "reason"), REFUSALS)
def test_refusals(problem: MoeProblem, target: Target, reason: str) -> None:
    answer = moe_kernels()["sgl_w4a8_moe"].fit(problem, 64, target)
    assert isinstance(answer, Reject) and reason in answer.reason, answer


def test_it_serves_every_number_of_tokens() -> None:
    problem = problem_of("W4AFP8", experts=128, hidden=2048, intermediate=768, top_k=8)
    answers = [moe_kernels()["sgl_w4a8_moe"].fit(problem, tokens, SM90) for tokens in (1, 16, 4096)]
    costs = [answer.cost for answer in answers if isinstance(answer, Rank)]
    assert len(costs) == 3 and all(a < b for a, b in itertools.pairwise(costs))
