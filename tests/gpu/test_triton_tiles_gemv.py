"""The few-token kernels on humming's layouts against the family's reference; the layouts themselves need no humming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels import humming_4bit
from quant_compile.lowering.kernels import triton_tiles_gemv as gemv
from quant_compile.lowering.registry import Kernel, Problem

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LAYOUTS = {layout.name: layout for layout in humming_4bit.LAYOUTS}
KERNELS = {kernel.name: kernel for kernel in gemv.KERNELS}
FLAT = ("W4A8", "int4.group64+int8.tensor", "int4.group32+int8.token.dynamic", "int4.channel+int8.token.dynamic")
CASES = [("triton_flat_gemv", spec) for spec in FLAT] + [
    ("triton_wide_gemv", "W4AFP8"),
    ("triton_wide_gemv", "int4.group128+fp8e4m3.tensor"),
    ("triton_fp4_tiles_gemv", "NVFP4A16"),
    ("triton_fp4_tiles_gemv", "MXFP4A16"),
]
SHAPES = ((128, 128), (384, 640), (4096, 4096), (2048, 14336))
# One rounding of the output; f16 keeps three bits more than bf16.
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}


def most(kernel: Kernel) -> int:
    return gemv.FLAT_TOKENS if kernel.name == "triton_flat_gemv" else gemv.TOKENS


def weights(problem: Problem) -> Planes:
    """NVFP4: with two global scales, as siblings have."""
    w = (torch.randn(problem.n, problem.k, device=DEVICE) * 0.05 + 0.01).to(problem.dtype)
    family, half = family_of(problem.scheme), problem.n // 2
    if problem.scheme.weights.strategy != "tensor_group":
        return family.quantize_weight(w, problem.scheme)
    parts = [family.quantize_weight(rows, problem.scheme) for rows in (w[:half], 3 * w[half:])]
    return tuple(torch.cat(planes) for planes in zip(*parts, strict=True))


def inputs(problem: Problem, m: int) -> Planes:
    x = (torch.randn(m, problem.k, device=DEVICE) + 0.5).to(problem.dtype)
    if problem.scheme.input_activations is None:
        return (x,)
    scale = torch.tensor([0.04], device=DEVICE) if problem.scheme.static else None
    return family_of(problem.scheme).quantize_input(x, problem.scheme, scale)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got.float() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "spec"), CASES)
def test_equal_to_the_reference(name: str, spec: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and spec in ("MXFP4A16", "int4.channel+int8.token.dynamic"):
        pytest.skip("the layout is not used for these in float16")
    kernel = KERNELS[name]
    for n, k in SHAPES:
        problem = Problem(parse(spec), n, k, dtype, has_bias=n == 384, siblings=2)
        rows = weights(problem)
        packed = LAYOUTS[kernel.layout].pack(rows, problem)
        bias = torch.randn(n, device=DEVICE).to(dtype) if problem.has_bias else None
        for m in range(1, most(kernel) + 1):
            x = inputs(problem, m)
            wanted = family_of(problem.scheme).linear(x, rows, bias, problem.scheme, torch.float32)
            got = kernel.run(x, packed, bias, problem)
            assert got.dtype == dtype
            assert error(got, wanted) <= TOLERANCE[dtype], (n, k, m)
            assert torch.equal(got, kernel.run(x, packed, bias, problem)), "equal inputs give equal bits"


@pytest.mark.parametrize("spec", ["NVFP4A16", "MXFP4A16"])
def test_every_code_scale_and_column(spec: str) -> None:
    """Inputs that are 1 in one place give the weight's value, exactly, in every lane; NaN stays in its rows."""
    problem = Problem(parse(spec), 128, 128, torch.bfloat16)
    rows = list(weights(problem))
    scale = rows[1].view(torch.uint8)
    scale.copy_(torch.randint(1, 126, scale.shape, device=DEVICE).to(torch.uint8))
    if spec == "NVFP4A16":
        rows[2] = torch.full_like(rows[2], 2.0**-3)
        scale[5, 1] = 127
    else:
        scale[5, 1] = 255
    wanted = family_of(problem.scheme).dequantize_weight(tuple(rows), problem.scheme, 128)
    packed = LAYOUTS["fp4_tiles"].pack(tuple(rows), problem)
    others = torch.arange(128, device=DEVICE) != 5
    for first in range(0, 128, 8):
        x = torch.eye(128, device=DEVICE, dtype=torch.bfloat16)[first : first + 8]
        got = KERNELS["triton_fp4_tiles_gemv"].run((x,), packed, None, problem)
        assert torch.equal(got[:, others].float(), wanted[others, first : first + 8].t().bfloat16().float())
        assert bool(got[:, 5].isnan().all())


def check_graph(kernel: Kernel, problem: Problem, run: Callable[[Planes], torch.Tensor]) -> None:
    x = inputs(problem, 1)
    run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    for plane, fresh in zip(x, inputs(problem, 1), strict=True):
        plane.copy_(fresh)
    graph.replay()
    assert torch.equal(y, run(x)), kernel.name


def test_in_a_cuda_graph() -> None:
    for name, spec in (CASES[0], CASES[4], CASES[6]):
        kernel, problem = KERNELS[name], Problem(parse(spec), 4096, 4096, torch.bfloat16)
        packed = LAYOUTS[kernel.layout].pack(weights(problem), problem)
        check_graph(kernel, problem, lambda x, k=kernel, p=problem, w=packed: k.run(x, w, None, p))


def test_a_kernel_that_is_wrong_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, problem = KERNELS["triton_wide_gemv"], Problem(parse("W4AFP8"), 128, 1024, torch.bfloat16)
    wrong = replace(kernel, run=lambda x, w, b, p: kernel.run(x, w, b, p) * 1.01)
    assert gemv._trial.__wrapped__(kernel.name, problem, 0) is None
    monkeypatch.setattr(gemv, "KERNELS", (wrong,))
    assert "differs" in str(gemv._trial.__wrapped__(kernel.name, problem, 0))
