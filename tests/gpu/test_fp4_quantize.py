"""The kernels that quantize FP4 inputs on a GPU: equal to eager torch and the family on the CPU, also inside of a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering import ops
from quant_compile.lowering.kernels.fp4 import triton_fp4_input as kernel
from tests.lowering.test_triton_fp4_input import FLIPPED, WEIGHTINGS, assert_equal, bits, exact_rows, flipped, weight_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SHAPES = [(m, k) for m in (1, 5, 300) for k in (4096, 14336, 2560 + 16)]
NORM_SPECS = ("NVFP4_STATIC", "MXFP4")
TYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE = torch.tensor([0.002])


def normed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weighting: str, spec: str) -> list[Tensor]:
    """The op, on the device of x."""
    scale = SCALE.to(x.device) if parse(spec).static else None
    return ops.norm_quantize(x, residual, weight, eps, weighting, spec, scale, "triton_fp4_norm")


def on_cpu(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.cpu() for t in tensors)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", NORM_SPECS)
def test_norm_on_exact_sums(spec: str, shape: tuple[int, int], weighting: str) -> None:
    """Mean and eps sum up to 4, whose root is exact, so that every bit must be that of the CPU."""
    for dtype in TYPES:
        x, eps = exact_rows(*shape, dtype)
        half = (torch.randint(-8, 9, shape) / 8).to(dtype)
        weight = weight_of(shape[1], dtype)
        for a, b in ((x, None), (x - half, half)):
            wanted = normed(a, b, weight, eps, weighting, spec)
            found = normed(a.to(DEVICE), None if b is None else b.to(DEVICE), weight.to(DEVICE), eps, weighting, spec)
            assert len(found) == len(wanted)
            if b is not None:
                assert torch.equal(found[0].cpu(), x)
            assert_equal(on_cpu(found[-2:]), tuple(wanted[-2:]))


@pytest.mark.parametrize("shape", [*SHAPES, (7, 28672), (3, 72)], ids=str)
@pytest.mark.parametrize("spec", NORM_SPECS)
def test_norm_on_any_numbers(spec: str, shape: tuple[int, int]) -> None:
    """Sums are added in another order; the residual's sum is rounded alike."""
    for dtype in TYPES:
        for weighting in WEIGHTINGS:
            x, half = (3 * torch.randn(2, *shape)).to(dtype)
            weight = weight_of(shape[1], dtype)
            wanted = normed(x, half, weight, 1e-6, weighting, spec)
            found = on_cpu(normed(x.to(DEVICE), half.to(DEVICE), weight.to(DEVICE), 1e-6, weighting, spec))
            assert torch.equal(found[0], wanted[0])
            # A ratio of few bytes is coarse: one may always differ.
            allowed = max(FLIPPED, 1.5 / wanted[2].numel())
            assert flipped(found[1:], tuple(wanted[1:])) <= allowed, (dtype, weighting)


@pytest.mark.parametrize("spec", NORM_SPECS)
def test_norm_of_zeros_nan_and_inf(spec: str) -> None:
    x = torch.randn(5, 4096).bfloat16()
    x[1], x[2, 40], x[3, 7] = 0, float("nan"), float("inf")
    weight = weight_of(4096, torch.bfloat16)
    wanted = normed(x, None, weight, 1e-6, "after_cast", spec)
    found = on_cpu(normed(x.to(DEVICE), None, weight.to(DEVICE), 1e-6, "after_cast", spec))
    scale = [
        t.float() if t.dtype == torch.float8_e4m3fn else t.float().where(t != 255, float("nan"))
        for t in (found[1], wanted[1])
    ]
    assert torch.equal(scale[0].isnan(), scale[1].isnan()) and scale[1][2].isnan().all()
    assert torch.equal(bits(found[0])[1], bits(wanted[0])[1]) and torch.equal(bits(found[1])[1], bits(wanted[1])[1])


@pytest.mark.parametrize("shape", [*SHAPES, (2048, 64), (2049, 64), (0, 64), (3, 28672), (4, 333)], ids=str)
def test_rows_are_the_familys(shape: tuple[int, int]) -> None:
    scheme = parse("NVFP4")
    for dtype in TYPES:
        x = (torch.randn(shape) * torch.logspace(-4, 2, max(1, shape[0]))[: shape[0], None]).to(dtype)
        cases = [x]
        if shape[0] > 2:
            cases += [
                x.index_put((torch.tensor(2), torch.tensor(9)), torch.tensor(v, dtype=dtype))
                for v in (float("nan"), torch.inf)
            ]
        for case in cases:
            wanted = family_of(scheme).quantize_input(case, scheme, None)
            here = case.to(DEVICE)
            found = on_cpu(ops.quantize_rows(here, here.abs().amax(-1), "NVFP4", "triton_fp4_rows"))
            assert [(p.shape, p.dtype) for p in found] == [(p.shape, p.dtype) for p in wanted]
            assert_equal(found, wanted)


def test_leading_dimensions_and_strides() -> None:
    """Inputs of any layout; planes keep the leading dimensions."""
    x = torch.randn(4, 3, 128, device=DEVICE).bfloat16().transpose(0, 1)
    weight = weight_of(128, torch.bfloat16).to(DEVICE)
    found = normed(x, x, weight, 1e-6, "one_plus", "MXFP4")
    wanted = normed(x.contiguous(), x.contiguous(), weight, 1e-6, "one_plus", "MXFP4")
    assert [tuple(p.shape) for p in found] == [(3, 4, 128), (3, 4, 64), (3, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("m", [1, 300, kernel.MOST_MAXIMA + 1])
@pytest.mark.parametrize("spec", ["NVFP4", *NORM_SPECS])
def test_in_a_cuda_graph(spec: str, m: int) -> None:
    """Captured once, replayed on other numbers."""
    x = torch.randn(m, 4096, device=DEVICE).bfloat16()
    half, weight = torch.randn_like(x), weight_of(4096, torch.bfloat16).to(DEVICE)
    scale = SCALE.to(DEVICE) if parse(spec).static else None

    def call() -> list[Tensor]:
        if spec == "NVFP4":
            return ops.quantize_rows(x, x.abs().amax(-1), spec, "triton_fp4_rows")
        return ops.norm_quantize(x, half, weight, 1e-6, "after_cast", spec, scale, "triton_fp4_norm")

    call()  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.copy_(torch.randn_like(x) * 2)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, call(), strict=True):
        assert torch.equal(bits(a), bits(b))
