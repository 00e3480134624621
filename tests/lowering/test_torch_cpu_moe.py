"""The CPU's MoE kernels against the plain truth of a block: every scheme, odd sizes, odd routing, exact integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import Activation, MoeProblem, moe_reference, stack_planes
from quant_compile.ir.scheme import parse
from quant_compile.lowering import schemes as _schemes  # noqa: F401  (registers the families)
from quant_compile.lowering.kernels.cpu import torch_cpu
from quant_compile.lowering.kernels.experts._moe import chosen_experts, group_pairs, weigh_and_sum
from quant_compile.lowering.moe import MoeKernel, choose_moe, moe_kernels, moe_layouts
from quant_compile.lowering.registry import Rank, Reject
from quant_compile.lowering.target import Target

CPU = Target.fake("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("torch_cpu_moe", "torch_cpu_moe_int4")
SCHEMES = (
    "FP8_DYNAMIC",
    "FP8",
    "FP8_BLOCK",
    "W8A8",
    "W8A8_STATIC",
    "W8A16",
    "W4A16",
    "W4A16_ASYM",
    "int4.group32+16",
)
# The order of f32 sums flips last bits of 16-bit results, also of the hidden layer, where one can become a code.
TOLERANCE = 5e-3
# The int8 kernel rounds scales to bf16 (1.1e-3 of error) besides its result (1.7e-3), in both of a block's products, and
# gate times up doubles what the first left.
INT8_TOLERANCE = 1e-2


def problem_of(scheme: str, dtype: torch.dtype = BF16, **sizes: object) -> MoeProblem:
    base = MoeProblem(parse(scheme), 4, 128, 128, 2, Activation("silu"), dtype)
    return replace(base, **sizes)


def planes_of(problem: MoeProblem, n: int, k: int) -> Planes:
    family = family_of(problem.scheme)
    weights = (torch.randn(problem.experts, n, k) * k**-0.5).to(problem.dtype)
    return stack_planes([family.quantize_weight(w, problem.scheme) for w in weights])


class Block:
    """Random operands of a problem; ``scale2`` and the input's scale are what static schemes need."""

    def __init__(self, problem: MoeProblem, tokens: int) -> None:
        p = self.problem = problem
        self.w13, self.w2 = planes_of(p, 2 * p.intermediate, p.hidden), planes_of(p, p.hidden, p.intermediate)
        self.b13 = torch.randn(p.experts, 2 * p.intermediate).to(p.dtype) if p.has_bias else None
        self.b2 = torch.randn(p.experts, p.hidden).to(p.dtype) if p.has_bias else None
        self.scale2 = torch.tensor([0.02]) if p.scheme.static else None
        x = torch.randn(tokens, p.hidden).to(p.dtype)
        quantize = family_of(p.scheme).quantize_input
        static = torch.tensor([0.03]) if p.scheme.static else None
        self.x: Planes = (x,) if p.scheme.input_activations is None else quantize(x, p.scheme, static)
        self.ids = torch.rand(tokens, p.experts).topk(min(p.top_k, p.experts)).indices
        self.weights = torch.rand(tokens, p.top_k) if p.has_weights else None

    def expected(self) -> Tensor:
        p = self.problem
        inputs = (self.x, self.ids, self.weights, self.w13, self.b13, self.w2, self.b2)
        return moe_reference(*inputs, p.scheme, p.activation, p.dtype, self.scale2)

    def got(self, kernel: MoeKernel) -> Tensor:
        layout, p = moe_layouts()[kernel.layout], self.problem

        def pack(planes: Planes, n: int, k: int) -> Planes:
            parts = [layout.pack(tuple(q[e] for q in planes), p, n, k) for e in range(p.experts)]
            packed = stack_planes(parts)
            assert [(tuple(q.shape), q.dtype) for q in packed] == [(s.shape, s.dtype) for s in layout.planes(p, n, k)]
            return packed

        w13, w2 = pack(self.w13, 2 * p.intermediate, p.hidden), pack(self.w2, p.hidden, p.intermediate)
        return kernel.run(self.x, self.ids, self.weights, w13, self.b13, w2, self.b2, self.scale2, p)


def tolerance_of(problem: MoeProblem) -> float:
    packed = problem.scheme == parse("W8A16") and problem.dtype is BF16
    return INT8_TOLERANCE if packed else TOLERANCE


def check(block: Block, names: tuple[str, ...] = NAMES) -> list[str]:
    """Compare every kernel that accepts the block; gives the names of those that did."""
    expected, ran = block.expected(), list[str]()
    for name in names:
        kernel = moe_kernels()[name]
        if isinstance(kernel.fit(block.problem, block.ids.shape[0], CPU), Reject):
            continue
        got = block.got(kernel)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        assert error <= tolerance_of(block.problem), f"{name}: {error:.2e}"
        ran.append(name)
    return ran


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_matches_the_reference(scheme: str, tokens: int) -> None:
    ran = check(Block(problem_of(scheme), tokens))
    assert ran == list(NAMES if parse(scheme).weights.num_bits == 4 else NAMES[:1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sizes_that_are_multiples_of_nothing(scheme: str) -> None:
    problem = problem_of(scheme, experts=3, hidden=70, intermediate=37, top_k=3)
    assert check(Block(problem, 7)) == ["torch_cpu_moe"]


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8", "W8A16", "W4A16"])
def test_bias_and_activation(scheme: str, dtype: torch.dtype) -> None:
    gpt = Activation("silu", 1.702, 7.0, 1.0)
    problem = problem_of(scheme, dtype, has_bias=True, has_weights=False, activation=gpt)
    assert "torch_cpu_moe" in check(Block(problem, 9))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64, torch.int8])
def test_unknown_ids_add_nothing(integers: torch.dtype) -> None:
    block = Block(problem_of("W8A8"), 6)
    block.ids[0, 0], block.ids[1] = 4, torch.tensor([-1, 100])
    block.ids = block.ids.to(integers)
    assert check(block) == ["torch_cpu_moe"]
    y = block.got(moe_kernels()["torch_cpu_moe"])
    assert y[0].any() and not y[1].any(), "a token whose experts are all elsewhere gets zeros"


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_all_tokens_on_one_expert_and_none(scheme: str) -> None:
    block = Block(problem_of(scheme, top_k=1), 12)
    block.ids = torch.full((12, 1), 2)
    assert check(block)
    block.ids.fill_(-1)
    for name in check(block):
        assert not block.got(moe_kernels()[name]).any()


def test_one_expert_in_error_is_seen() -> None:
    """The comparison above can fail: one expert's output scaled by 1.05 is outside of its tolerance."""
    block = Block(problem_of("W8A16"), 40)
    expected = block.expected()
    block.w2[1][1] *= 1.05
    got = block.got(moe_kernels()["torch_cpu_moe"])
    assert (got.double() - expected.double()).norm() / expected.double().norm() > tolerance_of(block.problem)


@pytest.mark.parametrize("linear", ["torch_cpu_int_mm", "torch_cpu_dequant"])
def test_integer_sums_are_exact(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes whose sums f32 holds, unit scales, relu and a static scale of one: all of W8A8 is exact in f32."""
    kernel = next(k for k in torch_cpu.KERNELS if k.name == linear)
    monkeypatch.setattr(torch_cpu, "KERNELS", (kernel,))
    moe_module()._choose.cache_clear()
    block = Block(problem_of("W8A8_STATIC", F32, activation=Activation("relu"), has_weights=False), 20)
    block.x = (torch.randint(-3, 4, block.x[0].shape, dtype=torch.int8), torch.ones(1))
    for planes in (block.w13, block.w2):
        planes[0].copy_(torch.randint(-2, 3, planes[0].shape))
        planes[1].fill_(1.0)
    block.scale2 = torch.ones(1)
    expected = block.expected()
    assert expected.abs().max() > 127, "the sums are no mere codes"
    assert torch.equal(block.got(moe_kernels()["torch_cpu_moe"]), expected)
    moe_module()._choose.cache_clear()


def moe_module() -> object:
    from quant_compile.lowering.kernels.experts import torch_cpu_moe

    return torch_cpu_moe


def test_packed_layout_has_an_inverse() -> None:
    problem = problem_of("W4A16_ASYM")
    layout = moe_layouts()["experts_cpu_int4"]
    rows = tuple(p[0] for p in planes_of(problem, 256, 128))
    back = layout.unpack(layout.pack(rows, problem, 256, 128), problem, 256, 128)
    assert all(torch.equal(a, b) for a, b in zip(rows, back, strict=True))


REFUSALS = [
    ("torch_cpu_moe", problem_of("W8A16"), Target.fake("sm90"), "CPU only"),
    ("torch_cpu_moe_int4", problem_of("W4A16"), Target.fake("sm90"), "CPU only"),
    ("torch_cpu_moe_int4", problem_of("W8A16"), CPU, "no kernel|4-bit integer weights"),
    ("torch_cpu_moe_int4", problem_of("W4A16", F32), CPU, "only bfloat16"),
    ("torch_cpu_moe_int4", problem_of("W4A16", intermediate=96), CPU, "[128, 96]: k must be a multiple"),
]


@pytest.mark.parametrize(("name", "problem", "target", "reason"), REFUSALS)
def test_refusals(name: str, problem: MoeProblem, target: Target, reason: str) -> None:
    answer = moe_kernels()[name].fit(problem, 4, target)
    assert isinstance(answer, Reject)
    assert any(part in answer.reason for part in reason.split("|")), answer.reason


def test_one_layout_serves_every_number_of_tokens() -> None:
    for scheme in SCHEMES:
        dispatch = choose_moe(problem_of(scheme), CPU)
        names = {name for _, name in dispatch.table}
        assert names <= set(NAMES), f"{scheme}: {dispatch.ranges}"


def test_pairs_are_grouped_without_looking_at_ids() -> None:
    ids = torch.tensor([[2, 0], [5, 2], [-1, 0]])
    groups = group_pairs(ids, 4)
    assert groups.pairs.tolist() == [1, 5, 0, 3, 2, 4] and groups.ends.tolist() == [2, 2, 4, 4]
    assert groups.ends.dtype == torch.int32 and groups.experts.tolist() == [0, 0, 2, 2, 4, 4]
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [torch.nan], [torch.inf]])
    weights = torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.0, 0.5]])
    assert weigh_and_sum(rows, groups, weights, (3, 2), 4).tolist() == [[4.0 + 2.0], [8.0], [1.0]]
    assert weigh_and_sum(rows, groups, None, (3, 2), 4).tolist() == [[5.0], [8.0], [2.0]]


def test_chosen_experts_grow_to_all() -> None:
    problem = problem_of("W8A8", experts=128, top_k=8)
    counts = [chosen_experts(problem, tokens) for tokens in (1, 2, 16, 4096)]
    assert counts[0] == pytest.approx(8.0) and 15.0 < counts[1] < 16.0 and 80 < counts[2] < 90
    assert counts[3] == pytest.approx(128.0)
    assert isinstance(moe_kernels()["torch_cpu_moe"].fit(problem, 1, CPU), Rank)
