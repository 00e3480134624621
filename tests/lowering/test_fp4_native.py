"""FP4 kernels of sm100 and newer, which no test can run: selection, exact calls, numbers by emulation, and cubins."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.errors import NoKernelError
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.fp4 import fp4_native, triton_fp4
from quant_compile.lowering.kernels.fp4._fp4 import padded, unswizzle
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import choose
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.library_schemas import through_schema
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

BF16 = torch.bfloat16
SM100 = Target.fake("sm100")
SGL = Target.fake("sm100", FAKE_OPS | {"sgl_kernel::cutlass_scaled_fp4_mm"})
SIZES = ((5, 48, 64), (1, 160, 96), (130, 64, 544))


def operands(m: int, n: int, k: int, merged: bool = False) -> tuple[Problem, Planes, Planes, Tensor]:
    """Problem, input planes, row-form weight planes (``merged``: of two siblings of unlike size) and bias."""
    problem = Problem(parse("NVFP4"), n, k, BF16, True)
    family = family_of(problem.scheme)
    torch.manual_seed(m)
    w, x = torch.randn(n, k).to(BF16), torch.randn(m, k).to(BF16)
    parts = (w[: n // 2], w[n // 2 :] * 30) if merged else (w,)
    planes = [family.quantize_weight(part, problem.scheme) for part in parts]
    whole = tuple(torch.cat(rows) for rows in zip(*planes, strict=True))
    return problem, family.quantize_input(x, problem.scheme, None), whole, torch.randn(n).to(BF16)


def product(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, factor: Tensor) -> Tensor:
    """What the libraries compute from codes [m, k/2], [n, k/2] and swizzled scales, f32."""
    sides = []
    for codes, flat in ((a, sa), (b, sb)):
        codes = codes.view(torch.uint8)
        scale = unswizzle(flat, codes.shape[0], codes.shape[1] * 2 // fp4_native.GROUP)
        ones = torch.ones(codes.shape[0], 1)
        sides.append(
            family_of(parse("NVFP4")).dequantize_weight((codes, scale, ones), parse("NVFP4"), codes.shape[1] * 2)
        )
    return (sides[0] @ sides[1].t()) * factor


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merged", [False, True])
def test_torch_call_and_numbers(size: tuple[int, int, int], merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is that of torch's signature; its emulation gives what the scheme's reference gives."""
    problem, x, w, bias = operands(*size, merged=merged)
    calls: list[Any] = []

    def double(a: Tensor, b: Tensor, scale_a: Any, recipe_a: Any, scale_b: Any, recipe_b: Any, swizzle_a: Any,
               swizzle_b: Any, *, output_dtype: torch.dtype) -> Tensor:  # fmt: skip
        calls.append((recipe_a, recipe_b, swizzle_a, swizzle_b))
        assert a.dtype == b.dtype == torch.float4_e2m1fn_x2 and b.stride(0) == 1
        assert a.shape == (size[0], size[2] // 2) and b.shape == (size[2] // 2, size[1])
        return product(a, scale_a[0], b.t(), scale_b[0], scale_a[1] * scale_b[1]).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", double)
    y = fp4_native.run_torch(x, fp4_native.pack(w, problem), bias, problem)
    wanted = family_of(problem.scheme).linear(x, w, bias, problem.scheme, BF16)
    assert y.dtype == BF16 and relative(y, wanted) <= 5e-3
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    assert calls == [(recipe, recipe, order, order)]


@pytest.mark.parametrize("merged", [False, True])
def test_sgl_call_and_numbers(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands as sgl-kernel 0.3 checks them: scales are matrices of the padded sizes, though swizzled."""
    problem, x, w, bias = operands(33, 64, 96, merged=merged)

    def double(out: Tensor, a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, alpha: Tensor) -> None:
        assert a.dtype == b.dtype == torch.uint8 and sa.dtype == sb.dtype == torch.float8_e4m3fn
        assert tuple(sa.shape) == padded(33, 6) == (128, 8) and tuple(sb.shape) == padded(64, 6)
        assert all(t.is_contiguous() for t in (a, b, sa, sb)) and tuple(out.shape) == (33, 64) and out.dtype is BF16
        assert alpha.shape == (1,) and alpha.dtype == torch.float32
        out.copy_(product(a, sa, b, sb, alpha))

    monkeypatch.setattr(fp4_native, "_sgl", lambda: through_schema("cutlass_scaled_fp4_mm", double))
    y = fp4_native.run_sgl(x, fp4_native.pack(w, problem), bias, problem)
    assert relative(y, family_of(problem.scheme).linear(x, w, bias, problem.scheme, BF16)) <= 5e-3


@pytest.mark.parametrize("size", SIZES)
def test_torch_takes_the_call(size: tuple[int, int, int]) -> None:
    """torch's own checks, which run on the meta device: to 2.13 those of scales, recipes and orders, from 2.15 those of shapes.

    Control: a scale too short, and a weight with too few columns; each version refuses one of them.
    """
    problem, x, w, bias = operands(*size)
    packed = fp4_native.pack(w, problem)
    x, bias, packed = tuple(t.to("meta") for t in x), bias.to("meta"), tuple(t.to("meta") for t in packed)
    y = fp4_native.run_torch(x, packed, bias, problem)
    assert tuple(y.shape) == (size[0], size[1]) and y.dtype is BF16
    short, narrow = (packed[0], packed[1][:-512], *packed[2:]), (packed[0][:, :-16], *packed[1:])
    with pytest.raises(Exception, match=r"scale|cannot be multiplied"):
        for wrong in (short, narrow):
            fp4_native.run_torch(x, wrong, bias, problem)


def test_a_wrong_order_of_scales_is_seen() -> None:
    """Negative control of the emulation."""
    _, x, w, _ = operands(130, 256, 512)
    good = product(x[0], fp4_native.swizzle(x[1]), w[0], fp4_native.swizzle(w[1]), x[2])
    plain = torch.cat((x[1].flatten().view(torch.uint8), torch.full((1 << 14,), 56, dtype=torch.uint8)))
    wrong = product(
        x[0], plain[: fp4_native.swizzle(x[1]).numel()].view(torch.float8_e4m3fn), w[0], fp4_native.swizzle(w[1]), x[2]
    )
    assert relative(wrong, good) > 0.05


@pytest.mark.parametrize("run", ["torch", "sgl"])
def test_siblings_of_unlike_size_keep_their_range(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are rounded to 16 bits before a row's own scale multiplies them: neither inf nor zero may come of that."""
    problem = replace(operands(4, 96, 256)[0], n=96, dtype=torch.float16, siblings=3)
    family, x = family_of(problem.scheme), torch.randn(4, 256) * 1e4
    outlier = torch.randn(32, 256) * 0.01
    outlier[0, 0] = 2.0  # sets a scale under which the results of the third would be beyond f16
    dense = (outlier, torch.zeros(32, 256), torch.randn(32, 256) * 0.04)
    parts = [family.quantize_weight(w, problem.scheme) for w in dense]
    w = tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
    planes = family.quantize_input(x, problem.scheme, None)

    def sgl(out: Tensor, a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, alpha: Tensor) -> None:
        out.copy_(product(a, sa, b, sb, alpha))

    def scaled_mm(
        a: Tensor, b: Tensor, scale_a: Any, recipe_a: Any, scale_b: Any, *rest: Any, output_dtype: Any
    ) -> Tensor:
        return product(a, scale_a[0], b.t(), scale_b[0], scale_a[1] * scale_b[1]).to(output_dtype)

    monkeypatch.setattr(fp4_native, "_sgl", lambda: sgl)
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    y = getattr(fp4_native, f"run_{run}")(planes, fp4_native.pack(w, problem), None, problem)
    wanted = family.linear(planes, w, None, problem.scheme, torch.float16)
    assert torch.isfinite(y).all() and y[:, 32:64].eq(0).all()
    for rows in (slice(0, 32), slice(64, 96)):
        assert relative(y[:, rows], wanted[:, rows]) <= 1e-3


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (130, 100), (1, 16)])
def test_packing_is_undone(size: tuple[int, int], merged: bool) -> None:
    problem, _, w, _ = operands(1, *size, merged=merged and size[0] > 1)
    packed = fp4_native.pack(w, problem)
    assert [(s.shape, s.dtype) for s in fp4_native.layout_planes(problem)] == [
        (tuple(p.shape), p.dtype) for p in packed
    ]
    data, scale, whole = fp4_native.unpack(packed, problem)
    assert torch.equal(data, w[0]) and torch.equal(scale.view(torch.uint8), w[1].view(torch.uint8))
    assert torch.allclose(whole, w[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", ["NVFP4", "NVFP4_STATIC", "MXFP4"])
@pytest.mark.parametrize("target", ["sm100", "sm120"])
def test_native_kernels_serve_from_sm100(spec: str, target: str) -> None:
    dispatch = choose(Problem(parse(spec), 6144, 4096, BF16), Target.fake(target))
    assert {name for _, name in dispatch.table} <= {"torch_nvfp4", "triton_fp4"}


def test_libraries_serve_where_they_are() -> None:
    """What is chosen from estimates is Triton's kernel, which needs no swizzled copy of the scales."""
    problem = Problem(parse("NVFP4"), 6144, 4096, BF16)
    torch_alone = Target.fake("sm100", frozenset({"aten::_scaled_mm_v2"}))
    assert {name for _, name in choose(problem, torch_alone).table} == {"torch_nvfp4"}
    sgl_alone = Target.fake("sm100", frozenset({"sgl_kernel::cutlass_scaled_fp4_mm"}))
    assert {name for _, name in choose(problem, sgl_alone).table} == {"sgl_nvfp4"}
    odd = Problem(parse("NVFP4"), 6144, 4100, BF16)
    assert isinstance(fp4_native.fit_sgl(odd, 1, SGL), Reject) and isinstance(
        fp4_native.fit_torch(odd, 1, SM100), Reject
    )


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_below_sm100_it_is_an_error_that_names_the_reasons(target: str) -> None:
    with pytest.raises(NoKernelError, match="needs sm100 or newer"):
        choose(Problem(parse("NVFP4"), 6144, 4096, BF16), Target.fake(target))
    for arch in (110, 121):
        answer = triton_fp4.fit(Problem(parse("MXFP4"), 64, 64, BF16), 1, replace(SM100, arch=arch))
        assert isinstance(answer, Reject) and f"sm100, sm103 and sm120, this is sm{arch}" in answer.reason
    answer = fp4_native.fit_torch(Problem(parse("NVFP4A16"), 64, 64, BF16), 1, SM100)
    assert isinstance(answer, Reject) and "NVFP4 inputs" in answer.reason


def check_dense(spec: str) -> None:
    """``triton_fp4`` over sizes that its tiles divide and do not, siblings with their own global scales, with and without bias."""
    from tests.lowering.test_triton_fp4_moe import mend_dot_scaled

    mend_dot_scaled()
    for m, n, k, has_bias in ((3, 40, 128, True), (70, 33, 80, False), (1, 16, 200, True)):
        problem = Problem(parse(spec), n, k, torch.float32, has_bias)
        family, x = family_of(problem.scheme), torch.randn(m, k)
        planes = family.quantize_input(x, problem.scheme, torch.tensor([0.002]) if problem.scheme.static else None)
        parts = [
            family.quantize_weight(part, problem.scheme)
            for part in (torch.randn(n // 2, k), torch.randn(n - n // 2, k) * 9)
        ]
        w = tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
        bias = torch.randn(n) if has_bias else None
        wanted = family.linear(planes, w, bias, problem.scheme, torch.float32)
        for tiles in (triton_fp4.tiles(m, SM100), triton_fp4.Tiles(16, 16, 64, 4, 2, 1)):
            found = triton_fp4.launch(planes, w, bias, problem, tiles)
            assert relative(found, wanted) <= 1e-6, (spec, m, n, k)  # f32 sums in another order


@needs_triton
@pytest.mark.parametrize("spec", ["NVFP4", "NVFP4_STATIC", "MXFP4"])
def test_dense_numbers_with_the_block_scaled_product_emulated(spec: str) -> None:
    run_interpreted(__name__, "check_dense", spec)


@needs_triton
@pytest.mark.parametrize("spec", ["NVFP4", "MXFP4"])
@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("even", [True, False])
def test_cubins_use_the_block_scaled_instruction(spec: str, arch: int, even: bool) -> None:
    from quant_compile.lowering.kernels.fp4 import _triton_fp4 as source

    tiles = triton_fp4.tiles(4096, Target.fake(f"sm{arch}"))
    scale = "*fp8e4nv" if spec == "NVFP4" else "*u8"
    types = {"x_ptr": "*u8", "sx_ptr": scale, "w_ptr": "*u8", "sw_ptr": scale, "y_ptr": "*bf16", "bias_ptr": "*bf16"}
    constants: dict[str, Any] = {"gx_ptr": None, "gw_ptr": None}
    if spec == "NVFP4":
        types, constants = types | {"gx_ptr": "*fp32", "gw_ptr": "*fp32"}, {}
    constants |= {"GROUP": triton_fp4.GROUPS[spec.lower()], "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
    constants |= {"BLOCK_K": tiles.block_k, "BAND": tiles.band, "EVEN_K": even}
    built = compile_cubin(
        source.dot_scaled_kernel, arch, types | {"m": "i32", "n": "i32", "k": "i32"}, constants,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    assert built.asm["cubin"] and re.search(r"mma\S*block_scale", built.asm["ptx"])
    assert built.metadata.shared <= {100: 227, 120: 99}[arch] * 1024


@pytest.mark.parametrize("fallback", ["weight_only", "fp8", None])
def test_a_policy_may_fall_back(fallback: str | None) -> None:
    """On sm90 NVFP4 has no kernel; by the policy's leave its weights serve under 16-bit inputs or as FP8, and the ledger says so."""
    from quant_compile.explain import explain

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(BF16)
    example = {"input_ids": torch.zeros(1, 4, dtype=torch.int64, device="meta"), "use_cache": False}
    policy = {"default": "NVFP4", **({"fallback": fallback} if fallback else {})}
    if fallback is None:
        with pytest.raises(BackendCompilerFailed, match="needs sm100 or newer") as caught:
            explain(model, example, policy, Target.fake("sm90"))
        assert "Fix: set `fallback: weight_only` in the policy, which serves it as NVFP4A16 here; or" in str(
            caught.value
        )
        return
    lines = [line for line in explain(model, example, policy, Target.fake("sm90")).report.lines if line.scheme]
    assert {line.scheme for line in lines} == {"NVFP4A16" if fallback == "weight_only" else "FP8_DYNAMIC"}
    assert len(lines) == 7
    assert all("fallback" in line.reason and "NVFP4" in line.reason for line in lines)
    native = [line for line in explain(model, example, policy, Target.fake("sm100")).report.lines if line.scheme]
    assert {line.scheme for line in native} == {"NVFP4"}
