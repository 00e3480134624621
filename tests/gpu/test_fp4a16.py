"""FP4 weights under 16-bit inputs on the GPU: every kernel that accepts against the family's reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import PRESETS, parse
from quant_compile.lowering.kernels.fp4 import triton_fp4a16 as a16
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.schemes import fp4
from quant_compile.lowering.target import Target

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SPECS = ("NVFP4A16", "MXFP4A16")
SHAPES = ((6144, 4096), (4096, 14336), (2048, 7168), (1000, 1552), (77, 333), (1, 16))
LARGE = ((28672, 4096), (8192, 28672))
ROWS_OF_X = (1, 2, 3, 4, 5, 16, 64, 300, 4096)
# 16-bit outputs of f32 sums over weights that are rounded once; f32: sums in another order.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def exact_references() -> None:
    """The reference multiplies in f32; TF32 would be less exact than what it judges."""
    assert not torch.backends.cuda.matmul.allow_tf32


def weights(problem: Problem) -> Planes:
    """Scales of different sizes along k."""
    w = torch.randn(problem.n, problem.k, device=DEVICE) * torch.linspace(0.002, 0.1, problem.k, device=DEVICE)
    return family_of(problem.scheme).quantize_weight(w.to(problem.dtype), problem.scheme)


def error(got: Tensor, reference: Tensor) -> float:
    assert got.shape == reference.shape and got.dtype == reference.dtype
    return ((got.float() - reference.float()).norm() / reference.float().norm()).item()


def check_all(problem: Problem, rows_of_x: tuple[int, ...] = ROWS_OF_X, outputs: Tensor | None = None) -> set[str]:
    """Every kernel that accepts, for every number of rows; returns the names of those that ran (judged by some outputs, or all)."""
    target, planes, ran = Target.of(DEVICE), weights(problem), set()
    bias = torch.randn(problem.n, device=DEVICE).to(problem.dtype) if problem.has_bias else None
    judged = planes if outputs is None else tuple(plane[outputs] for plane in planes)
    for m in rows_of_x:
        x = torch.randn(m, problem.k, device=DEVICE).to(problem.dtype)
        reference = family_of(problem.scheme).linear((x,), judged, bias, problem.scheme, problem.dtype)
        for kernel in a16.KERNELS:
            if isinstance(kernel.fit(problem, m, target), Reject):
                continue
            y = kernel.run((x,), planes, bias, problem)
            got = error(y if outputs is None else y[:, outputs], reference)
            assert got <= TOLERANCE[problem.dtype], f"{kernel.name} m={m}: relative error {got:.2e}"
            ran.add(kernel.name)
    return ran


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_kernels(spec: str, shape: tuple[int, int]) -> None:
    problem = Problem(parse(spec), *shape, torch.bfloat16, has_bias=shape[0] % 128 != 0)
    assert check_all(problem) == {kernel.name for kernel in a16.KERNELS}


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_layers_of_large_models(spec: str, shape: tuple[int, int]) -> None:
    """The reference, which makes an f32 weight, has 128 outputs: the first, the last and any between."""
    between = torch.randperm(shape[0] - 2, device=DEVICE)[:126] + 1
    outputs = torch.cat((torch.tensor([0, shape[0] - 1], device=DEVICE), between))
    assert len(check_all(Problem(parse(spec), *shape, torch.bfloat16), (5, 300), outputs)) >= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_other_types(spec: str, dtype: torch.dtype) -> None:
    assert len(check_all(Problem(parse(spec), 1000, 1552, dtype, has_bias=True))) >= 2
    assert len(check_all(Problem(parse(spec), 77, 333, dtype))) >= 2


@pytest.mark.parametrize("spec", SPECS)
def test_quantizer_gives_the_bits_of_the_cpu(spec: str) -> None:
    """Eager torch divides exactly on both."""
    family, scheme = family_of(parse(spec)), parse(spec)
    w = torch.randn(257, 1000).bfloat16()
    for here, there in zip(
        family.quantize_weight(w, scheme), family.quantize_weight(w.to(DEVICE), scheme), strict=True
    ):
        assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))


@pytest.mark.parametrize("spec", SPECS)
def test_every_code_and_scale(spec: str) -> None:
    """All sixteen codes under all 256 scale bytes; NaN scales give NaN, subnormals are kept."""
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(256, 2)
    scale = torch.arange(256, device=DEVICE).to(torch.uint8)[:, None]
    planes: Planes = (fp4.pack_codes(codes), scale)
    if spec == "NVFP4A16":
        whole = torch.full((256, 1), 0.37, device=DEVICE)
        planes = (planes[0], scale.repeat(1, 2).view(torch.float8_e4m3fn), whole)
    problem = Problem(parse(spec), 256, 32, torch.float32)
    wanted = family_of(problem.scheme).dequantize_weight(planes, problem.scheme, 32)
    got = a16.dequantize(planes, problem)
    assert wanted.isnan().any() and torch.allclose(got, wanted, rtol=2e-7, atol=0, equal_nan=True)
    # Column by column through the GEMV, where codes are decoded in another way. Bytes whose sums stay in range.
    some = slice(1, 120) if spec == "NVFP4A16" else slice(100, 200)
    part = tuple(plane[some].contiguous() for plane in planes)
    narrow = Problem(parse(spec), part[0].shape[0], 32, torch.float32)
    for column in range(32):
        x = torch.zeros(1, 32, device=DEVICE)
        x[0, column] = 1.0
        assert torch.allclose(a16.run_gemv((x,), part, None, narrow)[0], wanted[some, column], rtol=2e-7, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_nan_weights_and_infinite_inputs_show(spec: str) -> None:
    problem = Problem(parse(spec), 512, 4096, torch.bfloat16)
    family, w = family_of(problem.scheme), torch.randn(512, 4096, device=DEVICE).bfloat16()
    x = torch.randn(70, 4096, device=DEVICE).bfloat16()
    w[3, 17] = float("nan")
    planes = family.quantize_weight(w, problem.scheme)
    for m in (1, 16, 70):
        for kernel in a16.KERNELS:
            if not isinstance(kernel.fit(problem, m, Target.of(DEVICE)), Reject):
                assert not torch.isfinite(kernel.run((x[:m],), planes, None, problem)[:, 3]).any(), kernel.name
    w[3, 17], x[0, 5] = 0.0, float("inf")
    planes = family.quantize_weight(w, problem.scheme)
    for kernel in a16.KERNELS:
        assert not torch.isfinite(kernel.run((x[:1],), planes, None, problem)[0]).any(), kernel.name


@pytest.mark.parametrize("spec", SPECS)
def test_equal_inputs_give_equal_bits_and_graphs_replay(spec: str) -> None:
    problem = Problem(parse(spec), 2048, 8192, torch.bfloat16)
    planes = weights(problem)
    for m, run in ((1, a16.run_gemv), (4, a16.run_gemv), (16, a16.run_matmul), (64, a16.run_dequant)):
        x = torch.randn(m, 8192, device=DEVICE, dtype=torch.bfloat16)
        first = run((x,), planes, None, problem)
        assert all(torch.equal(first, run((x,), planes, None, problem)) for _ in range(3)), run.__name__
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run((x,), planes, None, problem)
        x.normal_()
        graph.replay()
        reference = family_of(problem.scheme).linear((x,), planes, None, problem.scheme, problem.dtype)
        assert error(y, reference) <= TOLERANCE[problem.dtype], run.__name__


@pytest.mark.parametrize("name", ["NVFP4", "NVFP4_STATIC", "MXFP4"])
def test_compiled_input_quantization(name: str) -> None:
    """Inductor's Triton divides approximately: codes may differ where a value lies between two codes, and there alone."""
    scheme = PRESETS[name]
    family = family_of(scheme)
    scale = torch.tensor([0.002], device=DEVICE) if scheme.static else None
    x = torch.randn(64, 4096, device=DEVICE)
    eager = family.quantize_input(x, scheme, scale)
    compiled = torch.compile(lambda x: family.quantize_input(x, scheme, scale))(x)
    assert [(c.shape, c.dtype) for c in compiled] == [(e.shape, e.dtype) for e in eager]
    for c, e in zip(compiled[:2], eager[:2], strict=True):
        assert (c.view(torch.uint8) != e.view(torch.uint8)).float().mean() <= (1e-3 if len(eager) == 3 else 0)
