"""Kernels that call torch's or another library's op: CPU ones against the references, GPU calls against doubles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from quant_compile.ir import numerics
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import PRESETS, Scheme, parse
from quant_compile.lowering import schemes as _schemes  # noqa: F401  (registers the families)
from quant_compile.lowering.kernels.cpu import torch_cpu
from quant_compile.lowering.kernels.scaled import deep_gemm, sgl_fp8, sgl_int8, torch_cuda
from quant_compile.lowering.registry import Kernel, Problem, Rank, Reject, kernels, layouts
from quant_compile.lowering.target import Target

CPU = Target.fake("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Blocks of GGUF that only files bring: test_gguf.py.
ABLE = tuple(name for name, scheme in PRESETS.items() if family_of(scheme).quantizes(scheme) is None)
SCHEMES = (*ABLE, "int4.group32.asym+16", "int4.channel+16")
# Multiples of everything, ragged in every way, a single element, and more rows than one packing window.
SHAPES = ((64, 128), (131, 203), (1, 1), (208, 512), (40, 257))
# Packed kernels round the scale or the zero point, the product and the sum with the bias to bf16: a few times 2^-9.
PACKED_TOLERANCE = 5e-3
# Dequantization differs from the reference by the order of f32 sums, which can flip the last bit of a 16-bit result.
DEQUANT_TOLERANCE = {BF16: 1e-3, F16: 2e-4, F32: 2e-6}


def quantized(scheme: Scheme, n: int, k: int, m: int, dtype: torch.dtype) -> tuple[Planes, Planes]:
    """Random input planes and row-form weight planes."""
    family = family_of(scheme)
    weight = family.quantize_weight((torch.randn(n, k) * 0.1).to(dtype), scheme)
    x = torch.randn(m, k).to(dtype)
    if scheme.input_activations is None:
        return (x,), weight
    return family.quantize_input(x, scheme, torch.tensor([0.03]) if scheme.static else None), weight


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    reference = reference.double()
    return ((y.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def fitting(problem: Problem, m: int) -> Iterator[Kernel]:
    """CPU kernels that accept, without the reference."""
    for kernel in kernels().values():
        if not kernel.reference and isinstance(kernel.fit(problem, m, CPU), Rank):
            yield kernel


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_cpu_kernels_match_the_reference(name: str, dtype: torch.dtype) -> None:
    scheme = parse(name)
    for n, k in [size for size in SHAPES if family_of(scheme).takes_size(scheme, *size) is None]:
        inputs, weight = quantized(scheme, n, k, 33, dtype)
        packed = {}
        for m, with_bias in itertools.product((1, 2, 7, 33), (False, True)):
            problem = Problem(scheme, n, k, dtype, with_bias)
            bias = torch.randn(n).to(dtype) if with_bias else None
            x = tuple(plane[:m] for plane in inputs)
            reference = family_of(scheme).linear(x, weight, bias, scheme, dtype)
            for kernel in fitting(problem, m):
                if kernel.layout not in packed:
                    packed[kernel.layout] = layouts()[kernel.layout].pack(weight, problem)
                y = kernel.run(x, packed[kernel.layout], bias, problem)
                # torch_cpu_int8_bf16 rounds to bf16 before the scale and after it.
                twice = "pack" in kernel.name or kernel.name == "torch_cpu_int8_bf16"
                limit = PACKED_TOLERANCE if twice else DEQUANT_TOLERANCE[dtype]
                assert (y.shape, y.dtype) == (reference.shape, dtype), kernel.name
                assert relative_error(y, reference) <= limit, (kernel.name, n, k, m)


def test_every_scheme_has_a_cpu_kernel_besides_the_reference() -> None:
    for name in SCHEMES:
        assert any(fitting(Problem(parse(name), 131, 203, F16), 3)), name


def test_packed_cpu_kernels_are_chosen_for_decoding() -> None:
    """int8 and int4 weights under bf16 inputs decode on the packed kernels, large batches on dequantization.

    Of int8 to bf16, which is exact, where the CPU multiplies bf16.
    """
    eight = "torch_cpu_int8_bf16" if torch_cpu._bf16_units() else "torch_cpu_dequant"
    for name, packed, large in (
        ("W8A16", "torch_cpu_int8pack", eight),
        ("W4A16", "torch_cpu_int4pack", "torch_cpu_dequant"),
    ):
        problem = Problem(parse(name), 4096, 4096, BF16)
        best = {m: min(fitting(problem, m), key=lambda kernel: kernel.fit(problem, m, CPU).cost) for m in (1, 1024)}
        assert (best[1].name, best[1024].name) == (packed, large)


def test_int8_product_is_exact() -> None:
    """The same integer sums and the same order of f32 multiplications give the reference's bits."""
    scheme = parse("W8A8")
    x, weight = quantized(scheme, 37, 4096, 5, BF16)
    bias = torch.randn(37).to(BF16)
    y = torch_cpu.run_int_mm(x, weight, bias, Problem(scheme, 37, 4096, BF16, True))
    assert torch.equal(y, family_of(scheme).linear(x, weight, bias, scheme, BF16))


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_float8_codes_become_f16_exactly(format: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(numerics.FLOAT_DTYPES[format])
    factor = torch_cpu.E4M3_AS_F16 if format == "e4m3" else 1.0
    values = torch_cpu._as_f16(codes, torch.empty(256, dtype=torch.int16)).float() * factor
    expected = codes.float()
    keep = ~expected.isnan()
    assert torch.equal(values[keep], expected[keep])


def test_packed_kernels_accept_unaligned_inputs() -> None:
    """The vectorized loops use aligned loads; a slice of a larger tensor must not crash or misread."""
    for name, layout in (("W8A16", "rows"), ("W4A16", "cpu_int4")):
        scheme = parse(name)
        problem = Problem(scheme, 64, 128, BF16)
        _, weight = quantized(scheme, 64, 128, 3, BF16)
        x = torch.randn(3 * 128 + 1).to(BF16)[1:].view(3, 128)
        assert x.data_ptr() % 16
        kernel = next(k for k in fitting(problem, 3) if k.layout == layout and "pack" in k.name)
        y = kernel.run((x,), layouts()[layout].pack(weight, problem), None, problem)
        reference = family_of(scheme).linear((x,), weight, None, scheme, BF16)
        assert relative_error(y, reference) <= PACKED_TOLERANCE


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "int4.group32.asym+16", "int4.group64+16"])
@pytest.mark.parametrize("n", [16, 48, 64, 208])
def test_int4_layout_round_trip(name: str, n: int) -> None:
    scheme = parse(name)
    problem = Problem(scheme, n, 256, BF16)
    weight = quantized(scheme, n, 256, 1, BF16)[1]
    layout = layouts()["cpu_int4"]
    packed = layout.pack(weight, problem)
    assert [(tuple(p.shape), p.dtype) for p in packed] == [(s.shape, s.dtype) for s in layout.planes(problem)]
    assert all(torch.equal(a, b) for a, b in zip(layout.unpack(packed, problem), weight, strict=True))


def test_int4_packing_in_chunks_equals_packing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = parse("W4A16")
    problem = Problem(scheme, 208, 128, BF16)
    weight = quantized(scheme, 208, 128, 1, BF16)[1]
    whole = layouts()["cpu_int4"].pack(weight, problem)
    monkeypatch.setattr(numerics, "CHUNK_ELEMENTS", 64 * 64)
    assert all(torch.equal(a, b) for a, b in zip(layouts()["cpu_int4"].pack(weight, problem), whole, strict=True))


@pytest.mark.parametrize("name", SCHEMES)
def test_cpu_outputs_are_fresh(name: str) -> None:
    scheme = parse(name)
    problem = Problem(scheme, 64, 256, BF16, True)
    x, weight = quantized(scheme, 64, 256, 1, BF16)
    bias = torch.randn(64).to(BF16)
    for kernel in fitting(problem, 1):
        packed = layouts()[kernel.layout].pack(weight, problem)
        inputs = (*x, *packed, bias)
        before = [t.view(torch.uint8).clone() for t in inputs]
        y = kernel.run(x, packed, bias, problem)
        storages = {t.untyped_storage().data_ptr() for t in inputs}
        assert y.untyped_storage().data_ptr() not in storages, kernel.name
        assert all(torch.equal(t.view(torch.uint8), old) for t, old in zip(inputs, before, strict=True)), kernel.name


NONE: frozenset[str] = frozenset()
REFUSALS = [
    ("torch_cpu_int8pack", "W8A16", (64, 128), BF16, Target.fake("sm90"), "CPU only"),
    ("torch_cpu_int8pack", "W4A16", (64, 128), BF16, CPU, "8-bit integer weights with 16-bit inputs"),
    ("torch_cpu_int8pack", "W8A8", (64, 128), BF16, CPU, "8-bit integer weights with 16-bit inputs"),
    ("torch_cpu_int8pack", "W8A16", (64, 128), F32, CPU, "only bfloat16 is vectorized, got torch.float32"),
    ("torch_cpu_int8pack", "W8A16", (64, 120), BF16, CPU, "k must be a multiple of 32, got 120"),
    ("torch_cpu_int8_bf16", "W8A16", (64, 128), BF16, Target.fake("sm90"), "CPU only"),
    ("torch_cpu_int8_bf16", "W8A8", (64, 128), BF16, CPU, "8-bit integer weights with 16-bit inputs"),
    ("torch_cpu_int8_bf16", "W8A16", (64, 128), F32, CPU, "multiplies bfloat16, got torch.float32"),
    ("torch_cpu_int_mm", "W8A8", (64, 128), BF16, Target.fake("sm90"), "CPU only"),
    ("torch_cpu_int_mm", "W8A16", (64, 128), BF16, CPU, "8-bit integer inputs"),
    ("torch_cpu_int_mm", "FP8_DYNAMIC", (64, 128), BF16, CPU, "8-bit integer inputs"),
    ("torch_cpu_int4pack", "W4A16", (64, 128), BF16, Target.fake("sm90"), "CPU only"),
    ("torch_cpu_int4pack", "W8A16", (64, 128), BF16, CPU, "4-bit integer weights"),
    ("torch_cpu_int4pack", "W4A16", (64, 128), F16, CPU, "only bfloat16"),
    ("torch_cpu_int4pack", "int4.group16+16", (64, 128), BF16, CPU, "groups must be one of 32, 64, 128, 256, got 16"),
    ("torch_cpu_int4pack", "W4A16", (64, 192), BF16, CPU, "k must be a multiple of the group size 128, got 192"),
    ("torch_cpu_int4pack", "W4A16", (40, 128), BF16, CPU, "n must be a multiple of 16, got 40"),
    ("torch_cpu_dequant", "W4A16", (64, 128), BF16, Target.fake("sm90"), "CPU only"),
    ("torch_scaled_mm", "FP8_DYNAMIC", (64, 128), BF16, CPU, "needs a CUDA GPU"),
    ("torch_scaled_mm", "FP8_DYNAMIC", (64, 128), BF16, Target.fake("sm80"), "needs sm89 or newer, this is sm80"),
    ("torch_scaled_mm", "FP8_DYNAMIC", (64, 128), F16, Target.fake("sm89"), "writes bfloat16, not float16"),
    ("torch_scaled_mm", "FP8_DYNAMIC", (64, 120), BF16, Target.fake("sm90"), "k must be a multiple of 16, got 120"),
    ("torch_scaled_mm", "FP8_DYNAMIC", (72, 128), BF16, Target.fake("sm90"), "n must be a multiple of 16, got 72"),
    ("torch_scaled_mm", "FP8_E5M2_DYNAMIC", (64, 128), BF16, Target.fake("sm90"), "got e5m2 weights"),
    ("torch_scaled_mm", "FP8_BLOCK", (128, 128), BF16, Target.fake("sm90"), "scales per row or tensor"),
    ("torch_scaled_mm", "W8A8", (128, 128), BF16, Target.fake("sm90"), "8-bit float"),
    ("torch_scaled_mm", "fp8e4m3.channel+16", (128, 128), BF16, Target.fake("sm90"), "8-bit float inputs"),
    ("torch_scaled_mm_block", "FP8_BLOCK", (128, 512), BF16, Target.fake("sm100"), "up to sm90, this is sm100"),
    ("torch_scaled_mm_block", "FP8_BLOCK", (128, 512), F16, Target.fake("sm90"), "writes bfloat16 or float32"),
    ("torch_scaled_mm_block", "FP8_BLOCK", (128, 640), BF16, Target.fake("sm90"), "k must be a multiple of 512"),
    ("torch_scaled_mm_block", "FP8_BLOCK", (192, 512), BF16, Target.fake("sm90"), "n must be a multiple of 128"),
    ("torch_scaled_mm_block", "FP8_DYNAMIC", (128, 512), BF16, Target.fake("sm90"), "block scales"),
    ("torch_int_mm", "W8A8", (64, 128), BF16, CPU, "needs a CUDA GPU"),
    ("torch_int_mm", "W8A8", (64, 120), BF16, Target.fake("sm80"), "k must be a multiple of 16"),
    ("torch_int_mm", "W8A8", (60, 128), BF16, Target.fake("sm80"), "n must be a multiple of 8"),
    ("torch_int_mm", "W8A16", (64, 128), BF16, Target.fake("sm80"), "8-bit integer inputs"),
    ("sgl_fp8", "FP8_DYNAMIC", (64, 128), BF16, Target.fake("sm90", NONE), "no fp8_scaled_mm"),
    ("sgl_fp8", "FP8_DYNAMIC", (64, 128), BF16, Target.fake("sm80"), "needs sm89"),
    ("sgl_fp8", "FP8_DYNAMIC", (64, 128), F32, Target.fake("sm90"), "writes bfloat16 or float16, not float32"),
    ("sgl_fp8", "FP8_DYNAMIC", (64, 120), BF16, Target.fake("sm90"), "k must be a multiple of 16"),
    ("sgl_fp8", "FP8_DYNAMIC", (60, 128), BF16, Target.fake("sm90"), "n must be a multiple of 8"),
    ("sgl_fp8", "FP8_E5M2_DYNAMIC", (64, 128), BF16, Target.fake("sm90"), "e5m2"),
    ("sgl_fp8_block", "FP8_BLOCK", (128, 128), BF16, Target.fake("sm90", NONE), "no fp8_blockwise_scaled_mm"),
    ("sgl_fp8_block", "FP8_BLOCK", (128, 128), BF16, Target.fake("sm89"), "needs sm90"),
    ("sgl_fp8_block", "FP8_BLOCK", (128, 128), BF16, Target.fake("sm120"), "up to sm100"),
    ("sgl_fp8_block", "FP8_BLOCK", (128, 128), F32, Target.fake("sm90"), "not float32"),
    ("sgl_fp8_block", "FP8_BLOCK", (128, 192), BF16, Target.fake("sm90"), "k must be a multiple of 128"),
    ("sgl_fp8_block", "FP8_BLOCK", (64, 128), BF16, Target.fake("sm90"), "n must be a multiple of 128"),
    ("sgl_fp8_block", "FP8_DYNAMIC", (128, 128), BF16, Target.fake("sm90"), "block scales"),
    ("sgl_int8", "W8A8", (64, 128), BF16, Target.fake("sm90", NONE), "no int8_scaled_mm"),
    ("sgl_int8", "W8A8", (64, 128), BF16, Target.fake("sm100"), "up to sm90"),
    ("sgl_int8", "W8A8", (64, 128), F32, Target.fake("sm90"), "not float32"),
    ("sgl_int8", "W8A8", (64, 120), BF16, Target.fake("sm90"), "k must be a multiple of 16"),
    ("sgl_int8", "W8A8", (60, 128), BF16, Target.fake("sm90"), "n must be a multiple of 8"),
    ("sgl_int8", "FP8_DYNAMIC", (64, 128), BF16, Target.fake("sm90"), "8-bit integer"),
    ("deep_gemm", "FP8_BLOCK", (128, 128), BF16, Target.fake("sm90", NONE), "cannot be imported"),
    ("deep_gemm", "FP8_BLOCK", (128, 128), BF16, Target.fake("sm100"), "up to sm90"),
    ("deep_gemm", "FP8_BLOCK", (128, 128), F16, Target.fake("sm90"), "not float16"),
    ("deep_gemm", "FP8_BLOCK", (128, 192), BF16, Target.fake("sm90"), "k must be a multiple of 128"),
    ("deep_gemm", "FP8_BLOCK", (96, 128), BF16, Target.fake("sm90"), "n must be a multiple of 64"),
    ("deep_gemm", "FP8_DYNAMIC", (128, 128), BF16, Target.fake("sm90"), "block scales"),
    (
        "deep_gemm",
        "fp8e4m3.block64x64+fp8e4m3.group64.dynamic",
        (128, 128),
        BF16,
        Target.fake("sm90"),
        "128x128, got 64x64",
    ),
]


@pytest.mark.parametrize(("kernel", "scheme", "shape", "dtype", "target", "reason"), REFUSALS)
def test_refusals(
    kernel: str, scheme: str, shape: tuple[int, int], dtype: torch.dtype, target: Target, reason: str
) -> None:
    answer = kernels()[kernel].fit(Problem(parse(scheme), *shape, dtype), 4, target)
    assert isinstance(answer, Reject)
    assert reason in answer.reason


def test_block_scales_need_cuda_12_9(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(parse("FP8_BLOCK"), 128, 512, BF16)
    for version, kind in (("12.8", Reject), ("12.9", Rank), ("13.0", Rank), (None, Rank)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert isinstance(torch_cuda.fit_scaled_mm_block(problem, 4, Target.fake("sm90")), kind)


def test_libraries_win_where_they_were_measured_faster() -> None:
    """H200: sgl-kernel leads torch on FP8 and INT8 rows at every m, DeepGEMM leads on blocks for small m."""
    sm90 = Target.fake("sm90")

    def cost(kernel: str, scheme: str, m: int) -> float:
        answer = kernels()[kernel].fit(Problem(parse(scheme), 6144, 4096, BF16), m, sm90)
        assert isinstance(answer, Rank)
        return answer.cost

    for m in (1, 16, 512, 4096):
        assert cost("sgl_fp8", "FP8_DYNAMIC", m) < cost("torch_scaled_mm", "FP8_DYNAMIC", m)
        assert cost("sgl_int8", "W8A8", m) < cost("torch_int_mm", "W8A8", m)
    assert cost("deep_gemm", "FP8_BLOCK", 16) < cost("sgl_fp8_block", "FP8_BLOCK", 16)


# ---- GPU ops: doubles that check what the libraries check, and compute on CPU


def check_operands(a: Tensor, b: Tensor, dtype: torch.dtype, alignment: int) -> None:
    """A row-major, B column-major, both of ``dtype``, k aligned."""
    assert a.dtype == b.dtype == dtype
    assert a.dim() == b.dim() == 2
    assert a.shape[1] == b.shape[0]
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert a.shape[1] % alignment == 0


def check_block_scales(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> None:
    """Input scales along m, weight scales along k, one per 128."""
    m, k, n = *a.shape, b.shape[1]
    assert scale_a.dtype == scale_b.dtype == F32
    assert tuple(scale_a.shape) == (m, k // 128)
    assert tuple(scale_b.shape) == (k // 128, n // 128)
    assert scale_a.stride(0) == 1
    assert scale_a.shape[1] == 1 or scale_a.stride(1) == m
    assert scale_b.t().is_contiguous()


def block_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    scheme = parse("FP8_BLOCK")
    planes = (b.t().contiguous(), scale_b.t().contiguous())
    return family_of(scheme).linear((a, scale_a), planes, None, scheme, dtype)


def row_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = a.float() @ b.float() * scale_a * scale_b.reshape(-1)
    return (y if bias is None else y + bias.float()).to(dtype)


def scaled_mm_double(
    a: Tensor,
    b: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """torch._scaled_mm on CUDA: its checks for the rowwise and the block modes."""
    check_operands(a, b, torch.float8_e4m3fn, 16)
    assert b.shape[1] % 16 == 0
    assert out_dtype is not None
    if bias is not None:
        assert out_dtype != F32
        assert bias.dtype == out_dtype
    if tuple(scale_a.shape) == (a.shape[0], 1) and tuple(scale_b.shape) == (1, b.shape[1]):
        assert scale_a.is_contiguous()
        assert scale_b.t().is_contiguous()
        assert use_fast_accum
        return row_product(a, b, scale_a, scale_b, bias, out_dtype)
    check_block_scales(a, b, scale_a, scale_b)
    assert a.shape[0] % 4 == 0
    assert (a.shape[1] // 128) % 4 == 0
    assert not use_fast_accum
    return block_product(a, b, scale_a, scale_b, out_dtype)


def sgl_rows_double(codes: torch.dtype) -> Callable[..., Tensor]:
    """sgl_kernel fp8_scaled_mm and int8_scaled_mm."""

    def run(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
    ) -> Tensor:
        check_operands(a, b, codes, 16)
        assert b.shape[1] % 8 == 0
        assert out_dtype in (BF16, F16)
        assert scale_a.dtype == scale_b.dtype == F32
        assert scale_a.numel() == a.shape[0]
        assert scale_b.numel() == b.shape[1]
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert bias is None or (bias.is_contiguous() and bias.dtype == out_dtype and bias.numel() == b.shape[1])
        return row_product(a, b, scale_a, scale_b, bias, out_dtype)

    return run


def sgl_block_double(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    check_operands(a, b, torch.float8_e4m3fn, 16)
    check_block_scales(a, b, scale_a, scale_b)
    assert a.shape[0] % 4 == 0
    assert out_dtype in (BF16, F16)
    return block_product(a, b, scale_a, scale_b, out_dtype)


def deep_gemm_double(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor) -> None:
    """fp8_gemm_nt with f32 scales on sm90; input scales row-major, or along m in columns of whole 16 bytes."""
    (data, scale), (weight, weight_scale) = a, b
    check_operands(data, weight.t(), torch.float8_e4m3fn, 128)
    assert out.dtype == BF16
    assert out.is_contiguous()
    m, k = data.shape
    assert tuple(scale.shape) == (m, k // 128)
    assert scale.is_contiguous() or (scale.stride() == (1, m) and m % 4 == 0)
    assert tuple(weight_scale.shape) == (-(-weight.shape[0] // 128), k // 128)
    assert weight_scale.is_contiguous()
    scheme = parse("FP8_BLOCK")
    out.copy_(family_of(scheme).linear((data, scale), (weight, weight_scale), None, scheme, BF16))


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    sgl = {"fp8_scaled_mm": sgl_rows_double(torch.float8_e4m3fn), "fp8_blockwise_scaled_mm": sgl_block_double}
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm_double)
    monkeypatch.setattr(sgl_fp8, "_op", sgl.__getitem__)
    monkeypatch.setattr(sgl_int8, "_op", lambda: sgl_rows_double(torch.int8))
    monkeypatch.setattr(deep_gemm, "_gemm", lambda: deep_gemm_double)


GPU_CASES = [
    ("torch_scaled_mm", ("FP8_DYNAMIC", "FP8", "FP8_TENSOR_DYNAMIC"), (48, 64), (BF16, F16, F32)),
    ("torch_scaled_mm_block", ("FP8_BLOCK",), (256, 512), (BF16, F32)),
    ("torch_int_mm", ("W8A8", "W8A8_STATIC"), (40, 64), (BF16, F16, F32)),
    ("sgl_fp8", ("FP8_DYNAMIC", "FP8", "FP8_TENSOR_DYNAMIC"), (40, 64), (BF16, F16)),
    ("sgl_fp8_block", ("FP8_BLOCK",), (256, 384), (BF16, F16)),
    ("sgl_int8", ("W8A8", "W8A8_STATIC"), (40, 64), (BF16, F16)),
    ("deep_gemm", ("FP8_BLOCK",), (192, 384), (BF16,)),
]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("name", "scheme_names", "shape", "dtypes"), GPU_CASES)
@pytest.mark.parametrize("m", [1, 3, 4, 17, 64])
def test_gpu_calls(
    name: str, scheme_names: tuple[str, ...], shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], m: int
) -> None:
    """Each op gets operands and scales in the layouts its wrapper checks, and the result is the family's linear."""
    kernel = kernels()[name]
    for scheme in map(parse, scheme_names):
        for dtype in dtypes:
            x, weight = quantized(scheme, *shape, m, dtype)
            if kernel.column_scales:
                x = (x[0], x[1].t().contiguous().t())
            for bias in (None, torch.randn(shape[0]).to(dtype)):
                problem = Problem(scheme, *shape, dtype, bias is not None)
                assert isinstance(kernel.fit(problem, m, Target.fake("sm90")), Rank)
                y = kernel.run(x, weight, bias, problem)
                reference = family_of(scheme).linear(x, weight, bias, scheme, dtype)
                assert (y.shape, y.dtype, y.is_contiguous()) == (reference.shape, dtype, True)
                assert relative_error(y, reference) <= 5e-3


@pytest.mark.usefixtures("doubles")
def test_block_kernels_accept_row_major_scales() -> None:
    """A caller that ignored ``column_scales`` gets the right numbers, not a crash inside a library."""
    scheme = parse("FP8_BLOCK")
    x, weight = quantized(scheme, 256, 512, 8, BF16)
    reference = family_of(scheme).linear(x, weight, None, scheme, BF16)
    for name in ("torch_scaled_mm_block", "sgl_fp8_block"):
        y = kernels()[name].run(x, weight, None, Problem(scheme, 256, 512, BF16))
        assert relative_error(y, reference) <= 5e-3


def test_cuda_int_mm_never_gets_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = torch._int_mm

    def spy(a: Tensor, b: Tensor) -> Tensor:
        rows.append(a.shape[0])
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", spy)
    scheme = parse("W8A8")
    for m in (1, 16, 17):
        x, weight = quantized(scheme, 8, 32, m, BF16)
        torch_cuda.run_int_mm(x, weight, None, Problem(scheme, 8, 32, BF16))
    assert min(rows) > 16
