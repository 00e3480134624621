"""triton_fp4_input: one kernel of norm and quantization, and one under maxima of rows, equal to eager torch and the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering import ops
from quant_compile.lowering.kernels.fp4 import triton_fp4_input as kernel
from quant_compile.lowering.registry import Norm, input_kernel
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.test_triton_moe import mend_float8
from tests.lowering.triton_support import compile_cubin, mend_bfloat16, needs_triton, run_interpreted, stack_bytes

WEIGHTINGS = ("after_cast", "before_cast", "one_plus")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCALE = torch.tensor([0.002])
# Sums in another order move a normed value by an ulp of f32, and that few of them across a tie of 16 bits, then of a code.
FLIPPED = 0.002


def exact_rows(m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Rows of equal, exactly summable squares, and the eps that makes mean + eps 4, of which 1 / sqrt is exact everywhere."""
    g = torch.Generator().manual_seed(k)
    base = torch.randint(-24, 25, (k,), generator=g) / 8
    rows = torch.stack([base[torch.randperm(k, generator=g)] for _ in range(m)])
    rows *= torch.randint(0, 2, (m, k), generator=g) * 2 - 1
    mean = float(rows[0].pow(2).mean())
    assert 2 <= mean < 4
    return rows.to(dtype), 4 - mean


def weight_of(k: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes over four decades, so that groups have unlike scales."""
    g = torch.Generator().manual_seed(k + 1)
    return (torch.randn(k, generator=g) * torch.logspace(-2, 2, k)).to(dtype)


def eager(x: Tensor, norm: Norm) -> Tensor:
    """The norm by the module that models use."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    if norm.weighting == "after_cast":
        module: nn.Module = LlamaRMSNorm(x.shape[-1], norm.eps)
    elif norm.weighting == "one_plus":
        module = Gemma3RMSNorm(x.shape[-1], norm.eps)
    else:
        module = nn.RMSNorm(x.shape[-1], norm.eps)
    module.weight = nn.Parameter(norm.weight, requires_grad=False)
    return module(x)


def bits(plane: Tensor) -> Tensor:
    return plane.view(torch.uint8) if plane.dtype.itemsize == 1 else plane


def fine(planes: Planes) -> Tensor:
    """Groups whose scale is a number: codes under a NaN mean nothing."""
    scale = planes[1]
    return ~scale.float().isnan() if scale.dtype == torch.float8_e4m3fn else scale != 255


def assert_equal(found: Planes, wanted: Planes) -> None:
    """Scales bit for bit, NaN being NaN; codes where their scale is a number."""
    good = fine(wanted)
    assert torch.equal(fine(found), good)
    assert torch.equal(bits(found[1])[good], bits(wanted[1])[good])
    size = wanted[0].shape[-1] // wanted[1].shape[-1]
    assert torch.equal(found[0].unflatten(-1, (-1, size))[good], wanted[0].unflatten(-1, (-1, size))[good])
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def flipped(found: Planes, wanted: Planes) -> float:
    """The largest share of bytes of a plane that differ."""
    return max(float((bits(a) != bits(b)).float().mean()) for a, b in zip(found, wanted, strict=True))


def quantized(y: Tensor, spec: str) -> Planes:
    """Codes and scales by the family."""
    scheme = parse(spec)
    return family_of(scheme).quantize_input(y, scheme, SCALE if scheme.static else None)[:2]


def norm_case(spec: str, m: int, k: int, dtype: torch.dtype, weighting: str, residual: bool) -> None:
    scheme, scale = parse(spec), SCALE if parse(spec).static else None
    x, eps = exact_rows(m, k, dtype)
    norm = Norm(weight_of(k, dtype), eps, weighting)
    half = torch.randint(-8, 9, (m, k)).to(dtype) / 8 if residual else None
    terms = x if half is None else x - half  # sums of eighths are exact
    found = kernel.run_norm(terms, half, norm, scheme, scale)
    if residual:
        assert torch.equal(found[0], x)
    assert_equal(found[-2:], quantized(eager(x, norm), spec))
    # Any numbers: the sum is what eager torch rounds it to, and few codes differ.
    x, half = torch.randn(m, k).to(dtype) * 3, torch.randn(m, k).to(dtype) if residual else None
    norm = Norm(norm.weight, 1e-6, weighting)
    total = x if half is None else x + half
    found = kernel.run_norm(x, half, norm, scheme, scale)
    if residual:
        assert torch.equal(found[0], total)
    assert flipped(found[-2:], quantized(eager(total, norm), spec)) <= FLIPPED, (spec, m, k, dtype, weighting)


def check_norm(spec: str) -> None:
    """Odd sizes, a row in several blocks, dtypes, weights, with and without residual."""
    mend_float8()
    mend_bfloat16()
    for weighting in WEIGHTINGS:
        for residual in (False, True):
            norm_case(spec, 3, 256, BF16, weighting, residual)
    norm_case(spec, 2, 200, F16, "after_cast", True)
    norm_case(spec, 2, 333, BF16, "one_plus", False)
    norm_case(spec, 2, 72, F32, "before_cast", True)
    norm_case(spec, 1, 8192, BF16, "after_cast", True)
    norm_case(spec, 2, 8200, BF16, "after_cast", True)
    norm_case(spec, 1, 28672, BF16, "before_cast", False)


def check_awkward(spec: str) -> None:
    """Rows of zeros, of NaN and of inf, without an eps to save the zeros too; no rows at all."""
    mend_float8()
    mend_bfloat16()
    scheme, scale = parse(spec), SCALE if parse(spec).static else None
    for eps in (1e-6, 0.0):
        x = torch.randn(6, 96).to(BF16)
        x[1], x[2, 40], x[3, 7], x[4] = 0, float("nan"), float("inf"), x[4] * 1e-30
        norm = Norm(weight_of(96, BF16), eps, "after_cast")
        norm.weight[50:64] = 0
        wanted = quantized(eager(x, norm), spec)
        found = kernel.run_norm(x, None, norm, scheme, scale)
        assert torch.equal(fine(found), fine(wanted))
        assert flipped(tuple(p[:2] for p in found), tuple(p[:2] for p in wanted)) <= (1 if eps == 0 else 0.02)
        assert not fine(wanted)[2].any() and not fine(found)[2].any()
    found = kernel.run_norm(x[:0], x[:0], norm, scheme, scale)
    assert [tuple(p.shape) for p in found] == [(0, 96), (0, 48), (0, wanted[1].shape[1])]


def check_rows() -> None:
    """Under the maxima of rows; ties, tiny groups, zeros, NaN, inf, more rows than are reduced in a program, and none."""
    mend_float8()
    mend_bfloat16()
    scheme = parse("NVFP4")
    family = family_of(scheme)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6])
    for m, k, dtype in ((1, 4096 + 16, BF16), (5, 200, F16), (7, 333, F32), (8, 96, BF16), (0, 64, BF16)):
        x = torch.randn(m, k) * torch.logspace(-6, 3, m)[:, None]
        if m == 5:
            x[2, :16], x[4] = ties, 0
        cases = [x, torch.zeros_like(x)]
        if m == 8:
            cases += [
                x.index_put((torch.tensor(3), torch.tensor(9)), torch.tensor(v)) for v in (float("nan"), -torch.inf)
            ]
        for case in cases:
            case = case.to(dtype)
            found = kernel.run_rows(case, case.abs().amax(-1), scheme)
            assert_equal(found, family.quantize_input(case, scheme, None))
    kernel.MOST_MAXIMA, kernel.STEP = 6, 4
    for m in (5, 7):
        x = torch.randn(m, 48).to(BF16)
        assert_equal(kernel.run_rows(x, x.abs().amax(-1), scheme), family.quantize_input(x, scheme, None))


@needs_triton
@pytest.mark.parametrize("spec", ["NVFP4_STATIC", "MXFP4"])
def test_norm_and_quantization_are_those_of_eager_torch(spec: str) -> None:
    run_interpreted(__name__, "check_norm", spec)


@needs_triton
@pytest.mark.parametrize("spec", ["NVFP4_STATIC", "MXFP4"])
def test_zeros_nan_and_inf_in_a_norm(spec: str) -> None:
    run_interpreted(__name__, "check_awkward", spec)


@needs_triton
def test_rows_under_their_maxima_are_the_familys() -> None:
    run_interpreted(__name__, "check_rows")


# --- the ops ---


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("spec", ["NVFP4_STATIC", "MXFP4"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_op_on_cpu_is_the_eager_norm_then_the_family(spec: str, weighting: str, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 3, 72).to(dtype), torch.randn(2, 3, 72).to(dtype)
    scale = SCALE if parse(spec).static else None
    norm = Norm(weight_of(72, dtype), 1e-6, weighting)
    arguments = (norm.weight, norm.eps, weighting, spec, scale, "triton_fp4_norm")
    h, *planes = ops.norm_quantize(x, residual, *arguments)
    assert torch.equal(h, x + residual)
    for got, wanted in zip(planes, quantized(eager(h, norm), spec), strict=True):
        assert torch.equal(bits(got), bits(wanted))
    alone = ops.norm_quantize(h, None, *arguments)
    assert [torch.equal(bits(a), bits(b)) for a, b in zip(alone, planes, strict=True)] == [True, True]


@pytest.mark.parametrize("spec", ["NVFP4_STATIC", "MXFP4"])
def test_ops_obey_the_rules_of_custom_ops(spec: str) -> None:
    """Schemas, fakes and dynamic shapes, as torch checks them."""
    x = torch.randn(2, 3, 72).to(BF16)
    scale = SCALE if parse(spec).static else None
    for residual in (None, x * 2):
        arguments = (x, residual, weight_of(72, BF16), 1e-6, "one_plus", spec, scale, "triton_fp4_norm")
        torch.library.opcheck(ops.norm_quantize, arguments)
    torch.library.opcheck(ops.quantize_rows, (x, x.abs().amax(-1), "NVFP4", "triton_fp4_rows"))


# --- selection ---


def test_which_kernel_does_which_job() -> None:
    found: dict[str, list[str]] = {}
    for spec in ("NVFP4", "NVFP4_STATIC", "MXFP4", "NVFP4A16", "MXFP4A16", "FP8_DYNAMIC", "W8A8", "W4A8", "W4A16"):
        for job in ("norm", "maxima"):
            if input_kernel(job, parse(spec), BF16, Target.fake("sm100")) is not None:
                found.setdefault(spec, []).append(job)
    assert found == {"NVFP4": ["maxima"], "NVFP4_STATIC": ["norm"], "MXFP4": ["norm"]}


@pytest.mark.parametrize(
    ("spec", "dtype", "target", "reason"),
    [
        ("MXFP4", BF16, Target.fake("cpu"), "needs a CUDA GPU"),
        ("NVFP4", BF16, Target.fake("sm80"), "needs sm89 or newer, this is sm80"),
        ("MXFP4", BF16, Target.fake("sm100", FAKE_OPS - {"triton"}), "triton is not installed"),
        ("NVFP4_STATIC", torch.float64, Target.fake("sm100"), "not float64"),
        ("W8A8", BF16, Target.fake("sm100"), "quantizes inputs to FP4"),
    ],
)
def test_refusals(spec: str, dtype: torch.dtype, target: Target, reason: str) -> None:
    fit = kernel.fit_rows if spec == "NVFP4" else kernel.fit_norm
    answer = fit(parse(spec), dtype, target)
    assert answer is not None and reason in answer.reason


# --- compiled ---


@needs_triton
@pytest.mark.parametrize("k", [2576, 4096, 28672])
@pytest.mark.parametrize("spec", ["NVFP4_STATIC", "MXFP4"])
@pytest.mark.parametrize("arch", [90, 100, 120])
def test_norm_compiles_without_a_stack(spec: str, arch: int, k: int, tmp_path: Path) -> None:
    from quant_compile.lowering.kernels.fp4 import _triton_fp4_input as source

    nv = spec == "NVFP4_STATIC"
    group = 16 if nv else 32
    block, warps = kernel.block_and_warps(k, group, kernel.LONGEST_BLOCK)
    types = dict.fromkeys(("x_ptr", "residual_ptr", "w_ptr", "h_ptr"), "*bf16") | {"q_ptr": "*u8", "eps": "fp32"}
    types |= {"s_ptr": "*fp8e4nv" if nv else "*u8", "k": "i32", "groups": "i32"} | (
        {"whole_ptr": "*fp32"} if nv else {}
    )
    for weighting, residual in (("after_cast", True), ("one_plus", False)):
        used = types if residual else {n: t for n, t in types.items() if n not in ("residual_ptr", "h_ptr")}
        constants: dict[str, Any] = {n: None for n in ("residual_ptr", "h_ptr", "whole_ptr") if n not in used}
        constants |= {"WEIGHTING": weighting, "GROUP": group, "BLOCK": block, "LOOP": k > block}
        built = compile_cubin(source.norm_quantize_kernel, arch, used, constants, num_warps=warps)
        assert built.metadata.shared <= 48 * 1024
        assert stack_bytes(built, tmp_path) == 0


@needs_triton
@pytest.mark.parametrize("k", [200, 4096])
@pytest.mark.parametrize("arch", [90, 100, 120])
def test_rows_compile_without_a_stack(arch: int, k: int, tmp_path: Path) -> None:
    from quant_compile.lowering.kernels.fp4 import _triton_fp4_input as source

    block, warps = kernel.block_and_warps(k, 16, kernel.ROWS_BLOCK)
    types = dict.fromkeys(("x_ptr", "maxima_ptr"), "*bf16") | {
        "q_ptr": "*u8",
        "s_ptr": "*fp8e4nv",
        "whole_ptr": "*fp32",
    }
    types |= dict.fromkeys(("count", "k", "groups"), "i32")
    constants = {"GROUP": 16, "BLOCK": block, "STEP": kernel.STEP}
    built = compile_cubin(source.quantize_rows_kernel, arch, types, constants, num_warps=warps)
    assert built.metadata.shared <= 48 * 1024
    assert stack_bytes(built, tmp_path) == 0
