"""4-bit weights under 8-bit inputs on the GPU: every kernel that accepts against the family's reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.w4a8 import sgl_int8_decoded, sgl_qserve
from quant_compile.lowering.kernels.w4a8 import triton_w4a8 as w4a8
from quant_compile.lowering.registry import ROWS, Kernel, Layout, Problem
from quant_compile.lowering.target import Target

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ROWS, *sgl_qserve.LAYOUTS)}
KERNELS: tuple[Kernel, ...] = (*w4a8.KERNELS, *sgl_qserve.KERNELS, *sgl_int8_decoded.KERNELS)
SHAPES = ((4096, 4096), (2048, 7168), (1000, 1544), (77, 333))
ROWS_OF_X = (1, 5, 16, 64, 300, 4096)
PRESETS = ("W4A8", "W4AFP8", "QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP")
LARGE = ((6144, 4096), (28672, 4096), (8192, 28672))
OTHERS = ("int4.group64+int8.tensor", "int4.group256+fp8e4m3.tensor.dynamic", "int4.channel+int8.token.dynamic")
# One rounding of the output; f32: sums in another order, and sm90's short sums of e4m3 products within a group.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-5}
FP8_TOLERANCE = 1e-3


def serves(kernel: Kernel, problem: Problem, m: int, target: Target) -> bool:
    return not isinstance(kernel.fit(problem, m, target), Reject)


def weights(problem: Problem) -> Planes:
    w = torch.randn(problem.n, problem.k, device=DEVICE) * 0.05 + 0.01
    return family_of(problem.scheme).quantize_weight(w.to(problem.dtype), problem.scheme)


def inputs(problem: Problem, m: int) -> Planes:
    """Off centre, so that zero points and sums matter."""
    x = (torch.randn(m, problem.k, device=DEVICE) + 0.5).to(problem.dtype)
    scale = torch.tensor([0.04], device=DEVICE) if problem.scheme.static else None
    return family_of(problem.scheme).quantize_input(x, problem.scheme, scale)


def error(got: torch.Tensor, reference: torch.Tensor) -> float:
    assert got.shape == reference.shape and got.dtype == reference.dtype
    return ((got.float() - reference.float()).norm() / reference.float().norm()).item()


def check_all(problem: Problem, rows_of_x: tuple[int, ...] = ROWS_OF_X, outputs: Tensor | None = None) -> int:
    """Every kernel that accepts, for every number of rows; returns how many runs were compared (in some outputs, or in all)."""
    target, scheme = Target.of(DEVICE), problem.scheme
    rows, count = weights(problem), 0
    packed = {
        kernel.layout: LAYOUTS[kernel.layout].pack(rows, problem)
        for kernel in KERNELS
        if serves(kernel, problem, 1, target)
    }
    bias = torch.randn(problem.n, device=DEVICE).to(problem.dtype) if problem.has_bias else None
    judged = rows if outputs is None else tuple(plane[outputs] for plane in rows)
    limit = TOLERANCE[problem.dtype]
    if problem.dtype == torch.float32 and w4a8.float8(scheme):
        limit = FP8_TOLERANCE
    for m in rows_of_x:
        x = inputs(problem, m)
        reference = family_of(scheme).linear(x, judged, bias, scheme, problem.dtype)
        for kernel in KERNELS:
            if not serves(kernel, problem, m, target):
                continue
            y = kernel.run(x, packed[kernel.layout], bias, problem)
            got = error(y if outputs is None else y[:, outputs], reference)
            assert got <= limit, f"{kernel.name} {scheme.spec} m={m}: relative error {got:.2e}"
            count += 1
    return count


@pytest.fixture(autouse=True)
def exact_references() -> None:
    """References multiply in f32; TF32 would be less exact than what it judges."""
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", [*PRESETS, *OTHERS])
def test_bf16(spec: str, shape: tuple[int, int]) -> None:
    assert check_all(Problem(parse(spec), *shape, torch.bfloat16, has_bias=shape[0] % 128 != 0)) >= len(ROWS_OF_X)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("spec", PRESETS)
def test_layers_of_large_models(spec: str, shape: tuple[int, int]) -> None:
    """The reference, which makes f32 and f64 weights, has 128 outputs: the first, the last and any between."""
    between = torch.randperm(shape[0] - 2, device=DEVICE)[:126] + 1
    outputs = torch.cat((torch.tensor([0, shape[0] - 1], device=DEVICE), between))
    assert check_all(Problem(parse(spec), *shape, torch.bfloat16), (5, 300), outputs) >= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("spec", PRESETS)
def test_other_types(spec: str, dtype: torch.dtype) -> None:
    assert check_all(Problem(parse(spec), 1000, 1544, dtype, has_bias=True)) >= len(ROWS_OF_X)
    assert check_all(Problem(parse(spec), 2048, 7168, dtype)) >= len(ROWS_OF_X)


@pytest.mark.parametrize("spec", ["QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP"])
@pytest.mark.parametrize("shape", [(4096, 4096), (77, 333)])
def test_qserves_integers_are_exact(spec: str, shape: tuple[int, int]) -> None:
    """f32 output of one part of k: equal bits with the reference's integer product."""
    problem = Problem(parse(spec), *shape, torch.float32)
    rows = weights(problem)
    for m in ROWS_OF_X:
        x = inputs(problem, m)
        reference = family_of(problem.scheme).linear(x, rows, None, problem.scheme, torch.float32)
        plan = w4a8.config(problem, m, Target.of(DEVICE))
        if plan.split == 1:
            assert torch.equal(w4a8.launch(x, rows, None, problem, plan), reference), m
        if serves(w4a8.KERNELS[1], problem, m, Target.of(DEVICE)):
            assert torch.equal(w4a8.run_gemv(x, rows, None, problem), reference), m


def test_every_code_of_every_byte() -> None:
    """Both conversions of nibbles: inputs that are 1 in one place give the weight's code."""
    for spec, dtype in (("W4A8", torch.int8), ("W4AFP8", torch.float8_e4m3fn)):
        scheme = parse(spec)
        low = torch.arange(256, device=DEVICE)[:, None] & 15
        high = torch.arange(256, device=DEVICE)[:, None] >> 4
        data = (
            (torch.arange(256, device=DEVICE, dtype=torch.int32)[:, None].expand(256, 64)).to(torch.uint8).contiguous()
        )
        problem = Problem(scheme, 256, 128, torch.float32)
        x = torch.eye(128, device=DEVICE).to(dtype)
        y = w4a8.run((x, torch.ones(128, 1, device=DEVICE)), (data, torch.ones(256, 1, device=DEVICE)), None, problem)
        wanted = torch.cat((low, high), 1).repeat(1, 64).t().float() - 8
        assert torch.equal(y, wanted), spec


def test_equal_inputs_give_equal_bits() -> None:
    for spec in PRESETS:
        problem = Problem(parse(spec), 1024, 8192, torch.bfloat16)
        rows = weights(problem)
        for m in (1, 16, 300):
            x = inputs(problem, m)
            first = w4a8.run(x, rows, None, problem)
            assert all(torch.equal(first, w4a8.run(x, rows, None, problem)) for _ in range(3)), (spec, m)


def test_in_a_cuda_graph() -> None:
    """Kernels replay inside a graph, with new inputs in the same place."""
    target = Target.of(DEVICE)
    for spec in PRESETS:
        problem = Problem(parse(spec), 4096, 4096, torch.bfloat16)
        rows = weights(problem)
        for m in (1, 16):
            for kernel in KERNELS:
                if not serves(kernel, problem, m, target):
                    continue
                packed = LAYOUTS[kernel.layout].pack(rows, problem)
                x = inputs(problem, m)
                kernel.run(x, packed, None, problem)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = kernel.run(x, packed, None, problem)
                for old, new in zip(x, inputs(problem, m), strict=True):
                    old.copy_(new)
                graph.replay()
                reference = family_of(problem.scheme).linear(x, rows, None, problem.scheme, problem.dtype)
                assert error(y, reference) <= TOLERANCE[problem.dtype], (kernel.name, m)
