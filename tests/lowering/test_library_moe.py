"""MoE blocks on libraries' grouped GEMMs: the Triton pieces in the interpreter and as cubins, GPU calls against doubles."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.scheme import parse
from quant_compile.lowering import schemes as _schemes  # noqa: F401  (registers the families)
from quant_compile.lowering.kernels.experts import library_moe, torch_moe_decoded
from quant_compile.lowering.kernels.experts._moe import group_pairs, weigh_and_sum
from quant_compile.lowering.kernels.fp4 import triton_fp4a16
from quant_compile.lowering.kernels.w4a8 import triton_w4a8
from quant_compile.lowering.kernels.weight_only.triton_w4a16 import unpack_tiles
from quant_compile.lowering.moe import moe_kernels, moe_layouts
from quant_compile.lowering.registry import Problem, Rank, Reject
from quant_compile.lowering.target import Target
from tests.lowering.test_torch_cpu_moe import Block, planes_of, problem_of
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = moe_kernels() | {kernel.name: kernel for kernel in library_moe.PEERS}
OPS = frozenset(
    {
        "aten::_grouped_mm",
        "aten::_scaled_grouped_mm",
        "sgl_kernel::fp8_blockwise_scaled_grouped_mm",
        "sgl_kernel::es_fp8_blockwise_scaled_grouped_mm",
        "humming",
        "triton",
    }
)
SM90 = Target.fake("sm90", OPS)
TOLERANCE = 5e-3
COPY = {"torch_grouped_decoded_moe": 2e-3}  # every weight of both products is rounded to bf16
ACTIVATIONS = ("silu", "silu(1.702,7.0,1.0)", "gelu", "gelu_tanh", "relu")


def relative_error(y: Tensor, reference: Tensor) -> float:
    reference = reference.double()
    return float((y.double() - reference).norm() / reference.norm().clamp_min(1e-30))


# ---- refusals


def sized(scheme: str, dtype: torch.dtype = BF16, **sizes: Any) -> MoeProblem:
    return problem_of(scheme, dtype, **({"hidden": 256, "intermediate": 256} | sizes))


REFUSALS = [
    ("torch_grouped_decoded_moe", sized("W4A16"), Target.fake("cpu"), "needs a CUDA GPU"),
    ("torch_grouped_decoded_moe", sized("NVFP4A16"), Target.fake("sm100", OPS), "up to sm90"),
    ("torch_grouped_decoded_moe", sized("W8A16"), SM90, "4-bit weights under 16-bit inputs"),
    ("torch_grouped_decoded_moe", sized("W4A8"), SM90, "4-bit weights under 16-bit inputs"),
    ("torch_grouped_decoded_moe", sized("W4A16", F16), SM90, "writes bfloat16, not float16"),
    ("torch_grouped_decoded_moe", sized("MXFP4A16", hidden=260), SM90, "hidden size must be a multiple of 8"),
    (
        "torch_grouped_decoded_moe",
        sized("W4A16"),
        Target.fake("sm90", frozenset({"triton"})),
        "aten::_grouped_mm is not here",
    ),
    (
        "torch_grouped_decoded_moe",
        sized("W4A16", experts=256, hidden=7168, intermediate=2048),
        SM90,
        "would copy 14.0 GiB of weights at once, more than 4",
    ),
    ("torch_grouped_fp8_moe", sized("FP8_DYNAMIC"), Target.fake("cpu"), "needs a CUDA GPU"),
    ("torch_grouped_fp8_moe", sized("FP8_DYNAMIC"), Target.fake("sm100", OPS), "up to sm90"),
    ("torch_grouped_fp8_moe", sized("FP8_DYNAMIC"), Target.fake("sm89", OPS), "needs sm90"),
    (
        "torch_grouped_fp8_moe",
        sized("FP8_DYNAMIC"),
        Target.fake("sm90", frozenset({"triton"})),
        "aten::_scaled_grouped_mm is not here",
    ),
    ("torch_grouped_fp8_moe", sized("FP8_DYNAMIC", F16), SM90, "writes bfloat16, not float16"),
    ("torch_grouped_fp8_moe", sized("FP8_DYNAMIC", hidden=264), SM90, "hidden size must be a multiple of 16"),
    ("torch_grouped_fp8_moe", sized("FP8_TENSOR_DYNAMIC"), SM90, "dynamic scale of the whole hidden layer"),
    ("torch_grouped_fp8_moe", sized("FP8_BLOCK"), SM90, "per row or tensor"),
    ("torch_grouped_fp8_moe", sized("W8A8"), SM90, "8-bit float"),
    ("torch_grouped_fp8_moe", sized("FP8_DYNAMIC", has_bias=True), SM90, "adds biases to rounded products"),
    ("sgl_grouped_fp8_moe", sized("FP8_BLOCK", has_bias=True), SM90, "adds biases to rounded products"),
    (
        "sgl_grouped_fp8_moe",
        sized("FP8_BLOCK"),
        Target.fake("sm90", frozenset({"triton"})),
        "scaled_grouped_mm is not here",
    ),
    ("sgl_grouped_fp8_moe", sized("FP8_BLOCK"), Target.fake("sm120", OPS), "up to sm100"),
    ("sgl_grouped_fp8_moe", sized("FP8_BLOCK", intermediate=192), SM90, "intermediate size must be a multiple of 128"),
    ("sgl_grouped_fp8_moe", sized("FP8_BLOCK", experts=2000), SM90, "up to 1024 experts, got 2000"),
    ("sgl_grouped_fp8_moe", sized("FP8_DYNAMIC"), SM90, "block scales"),
    ("sgl_expert_fp8_moe", sized("FP8_BLOCK"), Target.fake("sm100", OPS), "up to sm90"),
    ("sgl_expert_fp8_moe", sized("FP8_BLOCK", F32), SM90, "not float32"),
    ("humming_grouped_w4a16_moe", sized("W4A16"), Target.fake("sm90", frozenset()), "humming is not installed"),
    ("humming_grouped_w4a16_moe", sized("W4A16", intermediate=192), SM90, "[256, 192]: k must be a multiple of 128"),
    ("humming_grouped_w4a16_moe", sized("W8A16"), SM90, "4-bit integer weights"),
    ("humming_grouped_w4a16_moe", sized("int4.group16+16"), SM90, "group_size must be"),
]


@pytest.mark.parametrize(("name", "problem", "target", "reason"), REFUSALS)
def test_refusals(name: str, problem: MoeProblem, target: Target, reason: str) -> None:
    answer = KERNELS[name].fit(problem, 64, target)
    assert isinstance(answer, Reject) and reason in answer.reason, answer


def test_a_kernel_that_fails_its_trial_is_refused_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the trial raises, which must become a reason and not an error."""
    library_moe.try_small.cache_clear()
    reason = library_moe.try_small("torch_grouped_fp8_moe", "FP8_DYNAMIC", BF16, 0)
    assert reason is not None and reason != ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    here = Target("cuda", 90, 132, "a GPU that is not here", None)
    monkeypatch.setattr(Target, "has", lambda self, name: True)
    answer = KERNELS["torch_grouped_fp8_moe"].fit(sized("FP8_DYNAMIC"), 64, here)
    assert isinstance(answer, Reject) and answer.reason.startswith("fails here: ")
    library_moe.try_small.cache_clear()


def test_trial_measures_against_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial itself, on CPU with doubles of the ops: right ops pass, a wrong one is told by how much."""
    right = double_torch()
    monkeypatch.setattr(library_moe, "_torch_op", lambda: right)
    kernel, problem = KERNELS["torch_grouped_fp8_moe"], sized("FP8_DYNAMIC")
    assert library_moe._error(kernel, problem, torch.device("cpu")) <= TOLERANCE
    monkeypatch.setattr(library_moe, "_torch_op", lambda: lambda *a: right(*a) * 1.05)
    assert library_moe._error(kernel, problem, torch.device("cpu")) > library_moe.TRIAL_TOLERANCE


# ---- doubles that check what the libraries check, and compute on CPU


def ranges(ends: Tensor) -> list[tuple[int, int, int]]:
    bounds = [0, *ends.tolist()]
    return [(expert, *pair) for expert, pair in enumerate(itertools.pairwise(bounds)) if pair[0] < pair[1]]


def double_torch() -> Any:
    def op(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, bias: None, scale_result: None,
        out_dtype: torch.dtype, fast: bool,
    ) -> Tensor:  # fmt: skip
        """torch._scaled_grouped_mm, 2-D rows times 3-D weights: the checks of its meta function."""
        experts, k, n = b.shape
        assert a.dtype == b.dtype == torch.float8_e4m3fn and out_dtype is BF16
        assert a.stride(-1) == 1 and a.stride(-2) > 1 and a.stride(-2) % 16 == 0 and a.shape[1] == k
        assert b.stride(-2) == 1 and b.stride(-1) > 1 and b.stride(-1) % 16 == 0 and (n * 2) % 16 == 0
        assert scale_a.dtype == scale_b.dtype == F32
        assert scale_a.is_contiguous() and tuple(scale_a.shape) == (a.shape[0],)
        assert scale_b.stride(-1) == 1 and tuple(scale_b.shape) == (experts, n)
        assert offs.dtype == torch.int32 and tuple(offs.shape) == (experts,)
        y = torch.full((a.shape[0], n), torch.nan, dtype=out_dtype)
        for expert, start, stop in ranges(offs):
            rows = a[start:stop].float() @ b[expert].float()
            y[start:stop] = (rows * scale_a[start:stop, None] * scale_b[expert]).to(out_dtype)
        return y

    return op


def block_product(y: Tensor, a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, sizes: Tensor, starts: Tensor) -> None:
    """What both of sgl-kernel's grouped ops compute, after what both check."""
    (r, k), (experts, _, n) = a.shape, b.shape
    assert a.dtype == b.dtype == torch.float8_e4m3fn and y.dtype in (BF16, F16)
    assert sa.dtype == sb.dtype == F32 and sizes.dtype == starts.dtype == torch.int32
    assert tuple(sizes.shape) == (experts, 3) and tuple(starts.shape) == (experts,) and sizes.is_contiguous()
    assert tuple(sa.shape) == (r, k // 128) and tuple(sb.shape) == (experts, k // 128, n // 128)
    assert a.is_contiguous() and sa.is_contiguous() and y.is_contiguous()
    # Pointers are stepped by n * k and n * k / 128 / 128: both must be dense [E, n, ...] below the transposed views.
    assert b.transpose(1, 2).is_contiguous() and sb.transpose(1, 2).is_contiguous()
    scheme = parse("FP8_BLOCK")
    y.fill_(torch.nan)
    for expert in range(experts):
        m, start = int(sizes[expert, 0]), int(starts[expert])
        assert sizes[expert, 1:].tolist() == [n, k]
        if m:
            x, w = (a[start : start + m], sa[start : start + m]), (b[expert].t(), sb[expert].t())
            y[start : start + m] = family_of(scheme).linear(x, w, None, scheme, y.dtype)


def double_sgl(y: Tensor, *rest: Tensor) -> None:
    pointers, (a, b, sa, sb, stride_a, stride_b, stride_c, lfa, lfb, sizes, starts, workspace) = rest[:5], rest[5:]
    experts = b.shape[0]
    assert all(p.dtype == torch.int64 and tuple(p.shape) == (experts,) for p in pointers)
    assert all(t.dtype == torch.int32 and tuple(t.shape) == (experts, 5) for t in (lfa, lfb))
    check_strides(a, b, (stride_a, stride_b, stride_c), workspace)
    block_product(y, a, b, sa, sb, sizes, starts)


def double_sgl_expert(
    y: Tensor, a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, stride_a: Tensor, stride_b: Tensor, stride_c: Tensor,
    sizes: Tensor, starts: Tensor, workspace: Tensor,
) -> None:  # fmt: skip
    check_strides(a, b, (stride_a, stride_b, stride_c), workspace)
    block_product(y, a, b, sa, sb, sizes, starts)


def check_strides(a: Tensor, b: Tensor, strides: tuple[Tensor, ...], workspace: Tensor) -> None:
    experts, k, n = b.shape
    for stride, expected in zip(strides, (k, k, n), strict=True):
        assert stride.dtype == torch.int64 and stride.tolist() == [expected] * experts
    assert workspace.dtype == torch.uint8 and workspace.dim() == 1 and workspace.numel() >= 90_000
    assert a.shape[1] % 128 == 0


def double_humming(gemm: Any, x: Tensor, data: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """humming's launch op on a grouped contiguous GEMM; ``gemm`` is the product, as the compiled kernel knows it."""
    problem, experts = Problem(gemm.problem.scheme, gemm.n, gemm.k, gemm.problem.dtype), gemm.problem.experts
    none, (zero,), tail = rest[:3], rest[3:4], rest[4:]
    bias, out, sorted_ids, expert_ids, padded, bounds, locks, top_k, valid = tail
    assert none == (None, None, None) and [bias, out, sorted_ids, expert_ids, padded] == [None] * 5
    assert (top_k, valid) == (1, 0) and locks.dtype == torch.int32 and locks.numel() >= 2048 and not locks.any()
    assert bounds.dtype == torch.int32 and tuple(bounds.shape) == (experts + 1,) and bounds[0] == 0
    assert tuple(data.shape) == (experts, gemm.k // 16, 2 * gemm.n) and data.is_contiguous()
    assert scale.shape[0] == experts and scale.shape[2] == gemm.n and scale.is_contiguous()
    y = torch.full((x.shape[0], gemm.n), torch.nan, dtype=x.dtype)
    for expert, start, stop in ranges(bounds[1:]):
        planes = (data[expert], scale[expert], *(() if zero is None else (zero[expert],)))
        w = unpack_tiles(planes, problem)
        y[start:stop] = family_of(problem.scheme).linear((x[start:stop],), w, None, problem.scheme, x.dtype)
    return y


def double_grouped(a: Tensor, b: Tensor, offs: Tensor, bias: None, out_dtype: torch.dtype) -> Tensor:
    """torch._grouped_mm, 2-D rows times 3-D weights: the checks of its meta function."""
    experts, k, n = b.shape
    assert a.dtype == b.dtype == out_dtype == BF16 and bias is None
    assert a.stride() == (k, 1) and k * 2 % 16 == 0 and n * 2 % 16 == 0
    assert b.stride(-2) == 1 and b.stride(-1) == k
    assert offs.dtype == torch.int32 and tuple(offs.shape) == (experts,)
    y = torch.full((a.shape[0], n), torch.nan, dtype=out_dtype)
    for expert, start, stop in ranges(offs):
        y[start:stop] = (a[start:stop].float() @ b[expert].float()).to(out_dtype)
    return y


def dequantize_double(w: Planes, problem: Problem) -> Tensor:
    """The Triton kernels that decode, which need a GPU or the interpreter (and are tested there)."""
    return family_of(problem.scheme).dequantize_weight(w, problem.scheme, problem.k).to(problem.dtype)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    sgl = {
        "fp8_blockwise_scaled_grouped_mm": double_sgl,
        "es_fp8_blockwise_scaled_grouped_mm": double_sgl_expert,
    }
    monkeypatch.setattr(library_moe, "_torch_op", double_torch)
    monkeypatch.setattr(torch_moe_decoded, "_op", lambda: double_grouped)
    for module in (triton_w4a8, triton_fp4a16):
        monkeypatch.setattr(module, "dequantize", dequantize_double)
    monkeypatch.setattr(library_moe, "_sgl", sgl.__getitem__)
    monkeypatch.setattr(library_moe, "_humming_gemm", lambda product, top, device: product)
    launch = SimpleNamespace(launch_kernel=SimpleNamespace(default=double_humming))
    monkeypatch.setattr(torch.ops, "humming", launch, raising=False)


CASES = [
    ("torch_grouped_decoded_moe", ("W4A16", "W4A16_ASYM", "int4.channel+16", "NVFP4A16", "MXFP4A16"), (BF16,)),
    ("torch_grouped_fp8_moe", ("FP8_DYNAMIC", "FP8"), (BF16,)),
    ("sgl_grouped_fp8_moe", ("FP8_BLOCK",), (BF16, F16)),
    ("sgl_expert_fp8_moe", ("FP8_BLOCK",), (BF16,)),
    ("humming_grouped_w4a16_moe", ("W4A16", "W4A16_ASYM", "int4.group32+16", "int4.channel+16"), (BF16, F16)),
]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("name", "schemes", "dtypes"), CASES)
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_gpu_calls(name: str, schemes: tuple[str, ...], dtypes: tuple[torch.dtype, ...], tokens: int) -> None:
    """Each op gets operands as its wrapper checks them; unwritten rows (NaN here) stay out of the result."""
    kernel = KERNELS[name]
    for scheme in schemes:
        for dtype in dtypes:
            block = Block(sized(scheme, dtype, experts=5), tokens)
            block.ids[0, 0] = -1
            block.ids[-1] = torch.tensor([5, 3])
            assert isinstance(kernel.fit(block.problem, tokens, SM90), Rank)
            limit = TOLERANCE + COPY.get(name, 0.0)
            assert relative_error(block.got(kernel), block.expected()) <= limit, (scheme, dtype)


@pytest.mark.usefixtures("doubles")
def test_bias_and_no_weights() -> None:
    gpt = Activation("silu", 1.702, 7.0, 1.0)
    block = Block(sized("W4A16", activation=gpt, has_bias=True, has_weights=False), 9)
    assert relative_error(block.got(KERNELS["humming_grouped_w4a16_moe"]), block.expected()) <= TOLERANCE


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "int4.channel+16"])
def test_tiles_of_experts_have_an_inverse(scheme: str) -> None:
    problem, layout = sized(scheme, experts=3), moe_layouts()["experts_w4_tiles"]
    rows = tuple(p[0] for p in planes_of(problem, 512, 256))
    packed = layout.pack(rows, problem, 512, 256)
    specs = layout.planes(problem, 512, 256)
    assert [((3, *p.shape), p.dtype) for p in packed] == [(s.shape, s.dtype) for s in specs]
    assert all(torch.equal(a, b) for a, b in zip(rows, layout.unpack(packed, problem, 512, 256), strict=True))


# ---- the Triton pieces


def activation_case(scheme: str, text: str, dtype: torch.dtype, size: int, bias: bool) -> None:
    problem = MoeProblem(parse(scheme), 4, 64, size, 2, Activation.parse(text), dtype, bias)
    hidden = torch.randn(9, 2 * size).mul_(3).to(dtype)
    b13 = torch.randn(4, 2 * size).to(dtype) if bias else None
    groups = group_pairs(torch.tensor([[0, 3]] * 4 + [[1, 9]])[:, :].reshape(-1)[:9].reshape(9, 1), 4)
    scale2 = torch.tensor([0.01]) if problem.scheme.static else None
    # The interpreter rounds to e4m3 wrongly where the exponent grows, so torch rounds here.
    got = library_moe.activate(hidden, groups, b13, scale2, problem, codes=F32)
    wide = hidden.float()
    if b13 is not None:
        known = groups.experts.long()
        wide = wide + torch.cat((b13, b13[:1] * 0))[known].float()
    inner = problem.activation(wide).to(dtype)
    a = problem.scheme.input_activations
    expected = (inner,) if a is None else family_of(problem.scheme).quantize_input(inner, problem.scheme, scale2)
    assert [plane.shape for plane in got] == [truth.shape for truth in expected]
    if a is None:
        assert relative_error(got[0], expected[0]) <= 1e-3
        return
    assert torch.allclose(got[1], expected[1], rtol=1e-2)
    # The scale moves by a last bit of 16-bit rounding, codes by one step here and there.
    rounded = (got[0].to(torch.float8_e4m3fn), got[1])
    numbers = [p[0].float() * spread(p[1], size, a.group_size) for p in (rounded, expected)]
    assert relative_error(*numbers) <= 5e-3


def spread(scale: Tensor, size: int, group: int | None) -> Tensor:
    return scale if group is None or scale.dim() == 1 else scale.repeat_interleave(group, 1)[:, :size]


def activation_cases() -> None:
    """Run in the interpreter: every activation unquantized, every way to quantize, odd sizes, biases."""
    torch.manual_seed(0)
    for text in ACTIVATIONS:
        activation_case("W4A16", text, F32, 50, bias=False)
    for scheme in ("FP8_DYNAMIC", "FP8_BLOCK", "FP8"):
        for size, bias in ((300, False), (128, True)):
            activation_case(scheme, "silu", F16, size, bias)
    activation_case("W4A16", "silu(1.702,7.0,1.0)", F16, 1500, bias=True)


def nan_and_zero_rows() -> None:
    problem = MoeProblem(parse("FP8_DYNAMIC"), 2, 64, 32, 1, Activation("relu"), F16)
    hidden = torch.ones(3, 64, dtype=F16)
    hidden[0, 3], hidden[1] = torch.nan, 0
    groups = group_pairs(torch.zeros(3, 1, dtype=torch.long), 2)
    codes, scale = library_moe.activate(hidden, groups, None, None, problem, codes=F32)
    assert codes[0, 3].isnan() and not codes[1].any() and scale[1] > 0
    assert torch.allclose(codes[2], torch.full((32,), 448.0), rtol=1e-6)
    assert float(scale[2]) == pytest.approx(1 / 448, rel=1e-6)
    limited = MoeProblem(parse("W4A16"), 2, 64, 32, 1, Activation.parse("silu(1.702,7.0,1.0)"), F16)
    hidden = torch.ones(2, 64, dtype=F16)
    hidden[0, 3], hidden[1, 32 + 5] = torch.nan, torch.nan  # a gate, an up
    (inner,) = library_moe.activate(hidden, group_pairs(torch.zeros(2, 1, dtype=torch.long), 2), None, None, limited)
    assert inner.isnan().nonzero().tolist() == [[0, 3], [1, 5]]


def weigh_cases() -> None:
    torch.manual_seed(0)
    ids = torch.rand(11, 6).topk(3).indices
    ids[2, 1], ids[4] = -1, 77
    groups = group_pairs(ids, 6)
    for size, dtype in ((70, F32), (1030, F16)):
        rows, b2 = torch.randn(33, size).to(dtype), torch.randn(6, size).to(dtype)
        rows[groups.experts == 6] = torch.nan
        weights = torch.rand(11, 3).to(dtype)
        for w in (weights, None):
            got = library_moe.weigh(rows, groups, None, w, 3)
            assert relative_error(got, weigh_and_sum(rows, groups, w, (11, 3), 6)) <= 5e-4
        with_bias = rows + torch.cat((b2, b2[:1]))[groups.experts.long()]
        expected = weigh_and_sum(with_bias, groups, weights, (11, 3), 6)
        assert relative_error(library_moe.weigh(rows, groups, b2, weights, 3), expected) <= 2e-3


@needs_triton
@pytest.mark.parametrize("function", ["activation_cases", "nan_and_zero_rows", "weigh_cases"])
def test_pieces_in_the_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


@needs_triton
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activation_compiles(arch: int, kind: str) -> None:
    from quant_compile.lowering.kernels.experts._triton_moe_rows import activate_kernel

    types = {
        "hidden_ptr": "*bf16", "bias_ptr": "*bf16", "expert_ptr": "*i16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32",
        "size": "i32", "groups": "i32", "experts": "i32", "alpha": "fp32", "limit": "fp32", "shift": "fp32",
    }  # fmt: skip
    shapes = {"KIND": kind, "LIMITED": True, "HAS_BIAS": True, "MAX": 448.0, "SMALLEST": 2.0**-100}
    for quant, g, group in (("dynamic", 1, 1024), ("dynamic", 8, 128), ("static", 1, 1024)):
        extra = {"static_ptr": "*fp32"} if quant == "static" else {}
        constants = {**shapes, "QUANT": quant, "G": g, "GROUP": group, **({} if extra else {"static_ptr": None})}
        ptx = compile_cubin(activate_kernel, arch, types | extra, constants, num_warps=2).asm["ptx"]
        # Limits and relu let NaN pass: a minimum of gate and up each, a maximum of up, and relu's. Others are of scales and codes.
        assert ptx.count("max.NaN.f32") * (1 if kind == "relu" else 2) == ptx.count("min.NaN.f32") > 0


@needs_triton
def test_sum_compiles() -> None:
    from quant_compile.lowering.kernels.experts._triton_moe_rows import weigh_kernel

    types = {
        "rows_ptr": "*bf16", "place_ptr": "*i32", "weight_ptr": "*fp32", "end_ptr": "*i32", "bias_ptr": "*bf16",
        "expert_ptr": "*i16", "out_ptr": "*bf16", "size": "i32",
    }  # fmt: skip
    constants = {"TOP_K": 8, "HAS_WEIGHTS": True, "HAS_BIAS": True, "BLOCK": 1024}
    assert compile_cubin(weigh_kernel, 90, types, constants, num_warps=4).asm["cubin"]
