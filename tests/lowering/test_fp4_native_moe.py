"""Expert blocks on grouped FP4 GEMMs of sm100 and newer, which no test can run: exact calls, numbers by emulation, selection."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quant_compile.ir.errors import NoKernelError
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.experts import fp4_native_moe
from quant_compile.lowering.kernels.experts._moe import Groups, group_pairs
from quant_compile.lowering.kernels.fp4._fp4 import unswizzle
from quant_compile.lowering.moe import choose_moe, moe_kernels, moe_layouts
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.schemes.fp4 import decode_e2m1, decode_e8m0, pack_codes, round_e2m1
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.library_schemas import through_schema
from tests.lowering.test_torch_cpu_moe import Block, planes_of, problem_of

BF16, F16 = torch.bfloat16, torch.float16
E4M3 = torch.float8_e4m3fn
SPECS = ("NVFP4", "NVFP4_STATIC", "MXFP4")
SGL = {"sgl_kernel::cutlass_fp4_group_mm", "sgl_kernel::scaled_fp4_experts_quant"}
SM100 = Target.fake("sm100", FAKE_OPS | SGL)
# Rounding to bf16 is 1.7e-3 of a norm, and comes twice in one product. Codes of the hidden layer are compared exactly,
# because what is expected is computed from the hidden layer that the kernel itself had.
TOLERANCE = 5e-3


def sized(spec: str, dtype: torch.dtype = BF16, **sizes: Any) -> MoeProblem:
    return problem_of(spec, dtype, **({"hidden": 256, "intermediate": 128, "experts": 5} | sizes))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def values(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [r, k/2] and scales [r, g] -> f32 [r, k], without global scales."""
    factors = scale.float() if scale.dtype == E4M3 else decode_e8m0(scale.view(torch.uint8))
    return decode_e2m1(codes) * factors.repeat_interleave(codes.shape[1] * 2 // factors.shape[1], 1)


def ranges(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    for expert, (start, stop) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        if start < stop:
            yield expert, start, stop


def rounded(value: int, to: int) -> int:
    return -(-value // to) * to


# ---- doubles that check what the libraries check, and compute on CPU


def double_torch(
    mat_a: Tensor, mat_b: Tensor, scale_a: list[Tensor], scale_recipe_a: Any, scale_b: list[Tensor], scale_recipe_b: Any,
    swizzle_a: Any = None, swizzle_b: Any = None, bias: Tensor | None = None, offs: Tensor | None = None,
    output_dtype: torch.dtype = BF16,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.scaled_grouped_mm, 2-D rows times 3-D weights: the checks of _scaled_grouped_mm_cuda_v2."""
    a, b = mat_a, mat_b
    experts, half, n = b.shape
    k, nv = 2 * half, scale_a[0].dtype == E4M3
    group = 16 if nv else 32
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2 and a.shape[1] == half and half % 16 == 0
    assert a.stride(1) == 1 and b.stride(1) == 1 and output_dtype is BF16 and bias is None and n % 8 == 0
    assert offs is not None and offs.dtype == torch.int32 and tuple(offs.shape) == (experts,)
    kinds, orders = F.ScalingType, F.SwizzleType
    recipe = [kinds.BlockWise1x16, kinds.TensorWise] if nv else [kinds.BlockWise1x32]
    order = [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE] if nv else [orders.SWIZZLE_32_4_4]
    assert scale_recipe_a == scale_recipe_b == recipe and swizzle_a == swizzle_b == order
    assert scale_a[0].dtype == scale_b[0].dtype == (E4M3 if nv else torch.float8_e8m0fnu)
    columns = rounded(k // group, 4)
    assert scale_a[0].dim() == 2 and scale_a[0].shape[0] >= a.shape[0] and scale_a[0].shape[1] == columns
    assert tuple(scale_b[0].shape) == (experts, columns * rounded(n, 128))
    factor = torch.ones(experts)
    if nv:
        assert scale_a[1].dtype == scale_b[1].dtype == torch.float32
        factor = scale_a[1] * scale_b[1]
        assert factor.numel() == experts and factor.is_contiguous()
    y = torch.full((a.shape[0], n), torch.nan, dtype=output_dtype)
    first = 0
    for expert, start, stop in ranges(offs):
        sa = unswizzle(scale_a[0][first : first + rounded(stop - start, 128)].flatten(), stop - start, k // group)
        sb = unswizzle(scale_b[0][expert], n, k // group)
        left = values(a[start:stop].view(torch.uint8), sa)
        right = values(b[expert].t().view(torch.uint8), sb)
        y[start:stop] = ((left @ right.t()) * factor[expert]).to(output_dtype)
        first += rounded(stop - start, 128)
    return y


def double_group_mm(
    y: Tensor, a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, alphas: Tensor, along_k: Tensor, along_n: Tensor,
    shapes: Tensor, starts: Tensor, scale_starts: Tensor,
) -> None:  # fmt: skip
    """sgl-kernel 0.3's cutlass_fp4_group_mm: its checks, and its pointers from the bases of the operands."""
    experts, n, half = b.shape
    k, group_k = 2 * half, half // 8
    assert all(t.is_contiguous() for t in (y, a, b, sa, sb, alphas, shapes))
    assert a.dtype == b.dtype == torch.uint8 and sa.dtype == sb.dtype == E4M3 and alphas.dtype == torch.float32
    assert sa.dim() == 2 and tuple(sb.shape) == (experts, n, group_k) and alphas.numel() == experts
    assert tuple(shapes.shape) == (experts, 3) and starts.numel() == scale_starts.numel() == experts
    assert shapes.dtype == starts.dtype == scale_starts.dtype == torch.int32
    assert along_k.tolist() == [k] * experts and along_n.tolist() == [n] * experts
    assert along_k.dtype == along_n.dtype == torch.int64 and y.shape[1] == n
    y.fill_(torch.nan)
    flat_a, flat_b = sa.flatten(), sb.flatten()
    for expert in range(experts):
        m, start, first = int(shapes[expert, 0]), int(starts[expert]), int(scale_starts[expert]) * group_k
        assert shapes[expert, 1:].tolist() == [n, k] and first % 128 == 0
        tile = rounded(m, 128) * group_k
        left = values(a[start : start + m], unswizzle(flat_a[first : first + tile], m, group_k))
        right = values(b[expert], unswizzle(flat_b[expert * n * group_k : (expert + 1) * n * group_k], n, group_k))
        y[start : start + m] = ((left @ right.t()) * alphas[expert]).to(y.dtype)


def library_codes(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """How sgl-kernel quantizes the rows of an expert, but for its approximate reciprocals; ``factor``: 1 / global scale."""
    grouped = x.float().unflatten(1, (-1, 16))
    scale = (factor * (grouped.abs().amax(-1) * (1 / 6))).to(E4M3)
    inverse = torch.where(scale.float() != 0, 1 / (scale.float() / factor), 0.0)
    return pack_codes(round_e2m1(grouped * inverse.unsqueeze(-1)).flatten(1)), scale


def double_quantize(
    codes: Tensor, tiles: Tensor, x: Tensor, factors: Tensor, starts: Tensor, scale_starts: Tensor
) -> None:
    """sgl-kernel 0.3's scaled_fp4_experts_quant, with exact reciprocals; rows of no expert spoil the first expert's scales."""
    (rows, k), experts = x.shape, factors.numel()
    assert x.dtype in (BF16, F16) and x.is_contiguous() and codes.dtype == torch.uint8 and tiles.dtype == torch.int32
    assert factors.dtype == torch.float32 and starts.dtype == scale_starts.dtype == torch.int32
    assert starts.numel() == scale_starts.numel() == experts + 1 and experts % 16 == 0
    assert tuple(codes.shape) == (rows, k // 2) and tiles.shape[1] * 4 == rounded(k // 16, 4)
    assert int(starts[0]) == 0 and int(starts[-1]) == rows
    out = tiles.view(torch.uint8)
    for expert, start, stop in ranges(starts[1:]):
        codes[start:stop], scale = library_codes(x[start:stop], factors[expert])
        first = int(scale_starts[expert])
        block = fp4_native_moe.swizzle(scale).view(torch.uint8).view(-1, out.shape[1])
        assert first + block.shape[0] <= out.shape[0] and not out[first : first + block.shape[0]].any()
        out[first : first + block.shape[0]] = block


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = {"cutlass_fp4_group_mm": double_group_mm, "scaled_fp4_experts_quant": double_quantize}
    monkeypatch.setattr(fp4_native_moe, "_sgl", lambda name: through_schema(name, ops[name]))
    monkeypatch.setattr(F, "scaled_grouped_mm", double_torch)


CASES = [
    ("torch_grouped_fp4_moe", SPECS, (BF16,)),
    ("sgl_grouped_fp4_moe", ("NVFP4", "NVFP4_STATIC"), (BF16, F16)),
]


@dataclass
class Seen:
    """A kernel's hidden layer, before and after its activation, in the order of ``groups``."""

    hidden: Tensor
    inner: Tensor
    groups: Groups


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What kernels activate."""
    activate, out = fp4_native_moe._activate, list[Seen]()

    def recorded(hidden: Tensor, groups: Groups, *rest: Any) -> Planes:
        inner = activate(hidden, groups, *rest)
        out.append(Seen(hidden, inner[0], groups))
        return inner

    monkeypatch.setattr(fp4_native_moe, "_activate", recorded)
    return out


def expected_hidden(block: Block, groups: Groups) -> Tensor:
    """The truth of the first product in sorted order, zeros for dropped pairs."""
    p, family, k = block.problem, family_of(block.problem.scheme), block.ids.shape[1]
    out = torch.zeros(groups.pairs.numel(), 2 * p.intermediate, dtype=p.dtype)
    for expert, start, stop in ranges(groups.ends):
        x = tuple(q if q.dim() == 1 else q[groups.pairs[start:stop] // k] for q in block.x)
        out[start:stop] = family.linear(x, tuple(q[expert] for q in block.w13), None, p.scheme, p.dtype)
    return out


def expected_result(block: Block, was: Seen, library: bool) -> Tensor:
    """The truth of a block from a hidden layer; ``library``: under sgl-kernel's rounding."""
    p, family, k = block.problem, family_of(block.problem.scheme), block.ids.shape[1]
    assert block.weights is not None
    out = torch.zeros(block.ids.shape[0], p.hidden)
    for expert, start, stop in ranges(was.groups.ends):
        inner, pairs = was.inner[start:stop], was.groups.pairs[start:stop]
        planes = family.quantize_input(inner, p.scheme, block.scale2)
        if library:
            planes = (*library_codes(inner, planes[2].reciprocal()), planes[2])
        rows = family.linear(planes, tuple(q[expert] for q in block.w2), None, p.scheme, p.dtype).float()
        out.index_add_(0, pairs // k, rows * block.weights.flatten()[pairs, None])
    return out


def check(block: Block, name: str, seen: list[Seen]) -> None:
    """Both products of a kernel."""
    found = block.got(moe_kernels()[name])
    was = seen.pop()
    live = int(was.groups.ends[-1])
    assert relative(was.hidden[:live], expected_hidden(block, was.groups)[:live]) <= TOLERANCE
    assert relative(found, expected_result(block, was, name.startswith("sgl"))) <= TOLERANCE


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("name", "specs", "dtypes"), CASES)
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_calls_and_numbers(
    name: str, specs: tuple[str, ...], dtypes: tuple[torch.dtype, ...], tokens: int, seen: list[Seen]
) -> None:
    """Each op gets operands as it checks them; dropped pairs and unwritten rows (NaN here) stay out of the result."""
    for spec, dtype in itertools.product(specs, dtypes):
        torch.manual_seed(tokens)
        block = Block(sized(spec, dtype), tokens)
        block.ids[0, 0] = -1
        block.ids[-1] = torch.tensor([5, 3])
        assert isinstance(moe_kernels()[name].fit(block.problem, tokens, SM100), Rank)
        check(block, name, seen)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", [name for name, _, _ in CASES])
def test_each_expert_has_its_own_global_scale(name: str, seen: list[Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of very unlike size; one scale for all of them is seen."""
    torch.manual_seed(0)
    block = Block(sized("NVFP4"), 40)
    factors = torch.tensor([1.0, 1e2, 1e-2, 1.0, 30.0])
    block.w13 = (*block.w13[:2], block.w13[2] * factors.view(-1, 1, 1))
    assert block.weights is not None
    block.weights = block.weights / factors[block.ids] ** 2
    check(block, name, seen)
    right = fp4_native_moe.global_scales

    def one_for_all(inner: Tensor, groups: Groups, scale2: Tensor | None, experts: int) -> Tensor:
        return right(inner, groups, scale2, experts).amax().expand(experts + 1)

    monkeypatch.setattr(fp4_native_moe, "global_scales", one_for_all)
    with pytest.raises(AssertionError):
        check(block, name, seen)


def test_the_library_rounds_as_the_scheme_but_for_ties() -> None:
    """Where sgl-kernel's arithmetic and the family's differ: few codes, by one step."""
    x, family = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(BF16), family_of(parse("NVFP4"))
    codes, scale, whole = family.quantize_input(x, parse("NVFP4"), None)
    found, found_scale = library_codes(x, whole.reciprocal())
    assert (found_scale.view(torch.uint8) != scale.view(torch.uint8)).float().mean() <= 0.01
    assert (found != codes).float().mean() <= 0.02


def test_a_wrong_place_of_scales_is_seen(monkeypatch: pytest.MonkeyPatch, doubles: None) -> None:
    """Negative control of the emulation: scales of all experts one after the other, without a tile of their own."""
    block = Block(sized("NVFP4"), 150)
    kernel = moe_kernels()["torch_grouped_fp4_moe"]
    assert relative(block.got(kernel), block.expected()) <= 0.03  # flipped codes of the hidden layer included
    right = fp4_native_moe.places

    def wrong(groups: Any, experts: int) -> fp4_native_moe.Places:
        at = right(groups, experts)
        return fp4_native_moe.Places(at.starts, at.scales, torch.arange(at.rows.numel()), at.total)

    monkeypatch.setattr(fp4_native_moe, "places", wrong)
    assert relative(block.got(kernel), block.expected()) > 0.05


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (3, 2, 5), (300, 4, 3), (64, 8, 128)])
def test_places_never_overlap(tokens: int, top_k: int, experts: int) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(experts))
    groups = group_pairs(ids, experts)
    at = fp4_native_moe.places(groups, experts)
    assert at.total % 128 == 0 and int(at.rows.max()) < at.total and at.rows.unique().numel() == tokens * top_k
    assert (at.scales % 128 == 0).all()
    for expert, start, stop in ranges(groups.ends):
        assert int(at.starts[expert]) == start
        assert at.rows[start:stop].tolist() == list(
            range(int(at.scales[expert]), int(at.scales[expert]) + stop - start)
        )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [(256, 128), (48, 64), (130, 100), (1, 16)])
def test_packing_is_undone(spec: str, size: tuple[int, int]) -> None:
    problem, layout = sized(spec), moe_layouts()["experts_fp4_swizzled"]
    planes = planes_of(problem, *size)
    parts = [layout.pack(tuple(q[e] for q in planes), problem, *size) for e in range(problem.experts)]
    packed = tuple(torch.stack(q) for q in zip(*parts, strict=True))
    assert [(tuple(q.shape), q.dtype) for q in packed] == [(s.shape, s.dtype) for s in layout.planes(problem, *size)]
    for expert, part in enumerate(parts):
        for found, wanted in zip(layout.unpack(part, problem, *size), (q[expert] for q in planes), strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


# ---- selection


def qwen(spec: str) -> MoeProblem:
    """The shape of Qwen3-30B-A3B."""
    return problem_of(spec, experts=128, hidden=2048, intermediate=768, top_k=8)


REFUSALS = [
    ("torch_grouped_fp4_moe", sized("NVFP4"), Target.fake("sm90"), "needs sm100 or newer"),
    ("torch_grouped_fp4_moe", sized("NVFP4"), Target.fake("sm120"), "up to sm103"),
    ("torch_grouped_fp4_moe", sized("NVFP4"), Target.fake("cpu"), "needs a CUDA GPU"),
    ("torch_grouped_fp4_moe", sized("NVFP4", F16), SM100, "writes bfloat16, not float16"),
    ("torch_grouped_fp4_moe", sized("NVFP4", hidden=288), SM100, "hidden size must be a multiple of 64"),
    ("torch_grouped_fp4_moe", sized("MXFP4", intermediate=192), SM100, "intermediate size must be a multiple of 128"),
    ("torch_grouped_fp4_moe", sized("NVFP4", has_bias=True), SM100, "adds biases to rounded products"),
    ("torch_grouped_fp4_moe", sized("NVFP4A16"), SM100, "multiplies NVFP4 or MXFP4 weights by NVFP4 or MXFP4 inputs"),
    ("torch_grouped_fp4_moe", sized("NVFP4"), Target.fake("sm100", frozenset({"triton"})), "_v2 is not here"),
    ("sgl_grouped_fp4_moe", sized("MXFP4"), SM100, "multiplies NVFP4 weights"),
    ("sgl_grouped_fp4_moe", sized("NVFP4"), Target.fake("sm100"), "its 0.3 series has"),
    ("sgl_grouped_fp4_moe", sized("NVFP4", F16), Target.fake("sm120", FAKE_OPS | SGL), "writes bfloat16"),
    ("sgl_grouped_fp4_moe", sized("NVFP4", hidden=192), SM100, "hidden size must be a multiple of 128"),
    ("sgl_grouped_fp4_moe", sized("NVFP4", experts=2048), SM100, "up to 1024 experts, got 2048"),
]


@pytest.mark.parametrize(("name", "problem", "target", "reason"), REFUSALS)
def test_refusals(name: str, problem: MoeProblem, target: Target, reason: str) -> None:
    answer = moe_kernels()[name].fit(problem, 64, target)
    assert isinstance(answer, Reject) and reason in answer.reason, answer


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("target", ["sm100", "sm120"])
def test_native_kernels_serve_experts_from_sm100(spec: str, target: str) -> None:
    dispatch = choose_moe(qwen(spec), Target.fake(target))
    assert {name for _, name in dispatch.table} <= {"triton_fp4_moe", "torch_grouped_fp4_moe"}


def test_libraries_serve_where_they_are() -> None:
    problem = qwen("NVFP4")
    for pin in ("torch_grouped_fp4_moe", "sgl_grouped_fp4_moe"):
        ops = frozenset({"triton", "aten::_scaled_grouped_mm_v2"} if pin.startswith("torch") else {"triton", *SGL})
        answers = {t: moe_kernels()[pin].fit(problem, t, Target.fake("sm100", ops)) for t in (1, 64, 4096)}
        assert all(isinstance(answer, Rank) for answer in answers.values()), answers


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_below_sm100_it_is_an_error_that_names_the_reasons(target: str) -> None:
    with pytest.raises(NoKernelError, match="needs sm100 or newer"):
        choose_moe(qwen("NVFP4"), Target.fake(target))


def test_calls_match_the_signature_of_this_torch() -> None:
    import inspect

    wanted = list(inspect.signature(getattr(F, "scaled_grouped_mm")).parameters)  # noqa: B009
    assert list(inspect.signature(double_torch).parameters) == wanted[: wanted.index("contraction_dim")]
