"""The few-token kernel on humming's layout ``w4_flat`` against the family's reference; the layout itself needs no humming."""

from __future__ import annotations

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.w4a8 import humming_4bit
from quant_compile.lowering.kernels.w4a8 import triton_flat_gemv as gemv
from quant_compile.lowering.registry import Problem

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SPECS = ("W4A8", "int4.group64+int8.tensor", "int4.group32+int8.token.dynamic", "int4.channel+int8.token.dynamic")
SHAPES = ((128, 128), (384, 640), (4096, 4096), (2048, 14336), (16384, 1024))
# One rounding of the output; f16 keeps three bits more than bf16.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}


def packed_weights(problem: Problem) -> tuple[Planes, Planes]:
    """(row form, ``w4_flat``)."""
    w = (torch.randn(problem.n, problem.k, device=DEVICE) * 0.05 + 0.01).to(problem.dtype)
    rows = family_of(problem.scheme).quantize_weight(w, problem.scheme)
    return rows, humming_4bit.pack_flat(rows, problem)


def inputs(problem: Problem, m: int) -> Planes:
    x = (torch.randn(m, problem.k, device=DEVICE) + 0.5).to(problem.dtype)
    scale = torch.tensor([0.04], device=DEVICE) if problem.scheme.static else None
    return family_of(problem.scheme).quantize_input(x, problem.scheme, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_equal_to_the_reference(spec: str, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        problem = Problem(parse(spec), n, k, dtype, has_bias=n == 384)
        rows, packed = packed_weights(problem)
        bias = torch.randn(n, device=DEVICE).to(dtype) if problem.has_bias else None
        for m in range(1, gemv.TOKENS + 1):
            x = inputs(problem, m)
            wanted = family_of(problem.scheme).linear(x, rows, bias, problem.scheme, torch.float32)
            got = gemv.run(x, packed, bias, problem)
            assert got.dtype == dtype and got.shape == wanted.shape
            error = ((got.float() - wanted).norm() / wanted.norm()).item()
            assert error <= TOLERANCE[dtype], (n, k, m)
            assert torch.equal(got, gemv.run(x, packed, bias, problem)), "equal inputs give equal bits"


def test_in_a_cuda_graph() -> None:
    problem = Problem(parse("W4A8"), 4096, 4096, torch.bfloat16)
    _, packed = packed_weights(problem)
    x = inputs(problem, 1)
    gemv.run(x, packed, None, problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gemv.run(x, packed, None, problem)
    for plane, fresh in zip(x, inputs(problem, 1), strict=True):
        plane.copy_(fresh)
    graph.replay()
    assert torch.equal(y, gemv.run(x, packed, None, problem))
