"""Weight-only kernels on the GPU against the family's reference, and layouts against the libraries that own them."""

from __future__ import annotations

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, Reject
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.weight_only import humming_w4a16, torch_int4
from quant_compile.lowering.kernels.weight_only import triton_w4a16 as w4
from quant_compile.lowering.registry import ROWS, Kernel, Layout, Problem
from quant_compile.lowering.schemes import weight_only
from quant_compile.lowering.target import Target, probe_library

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ROWS, *w4.LAYOUTS, *torch_int4.LAYOUTS)}
KERNELS: tuple[Kernel, ...] = (*w4.KERNELS, *humming_w4a16.KERNELS, *torch_int4.KERNELS)
SHAPES = ((4096, 4096), (2048, 7168), (1000, 1544), (77, 333))
ROWS_OF_X = (1, 5, 16, 64, 300, 4096)
SPECS = ("W4A16", "W4A16_ASYM", "int4.group64+16", "int4.group32.asym+16", "int4.channel+16", "int4.channel.asym+16")
# 16-bit outputs of f32 sums over weights that some kernels round once; f32: products lose at most 11 of 24 bits.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 2e-4}
needs_humming = pytest.mark.skipif(not probe_library("humming"), reason="humming_kernels is not installed")


def weights(problem: Problem) -> Planes:
    w = torch.randn(problem.n, problem.k, device=DEVICE) * 0.05 + 0.02
    return weight_only.quantize_weight(w.to(problem.dtype), problem.scheme)


def error(got: torch.Tensor, reference: torch.Tensor) -> float:
    assert got.shape == reference.shape and got.dtype == reference.dtype
    return ((got.float() - reference.float()).norm() / reference.float().norm()).item()


def check_all(problem: Problem) -> int:
    """Every kernel that accepts, for every number of rows; returns how many runs were compared."""
    target = Target.of(DEVICE)
    rows = weights(problem)
    packed = {name: layout.pack(rows, problem) for name, layout in LAYOUTS.items() if _serves(name, problem, target)}
    bias = torch.randn(problem.n, device=DEVICE).to(problem.dtype) if problem.has_bias else None
    count = 0
    for m in ROWS_OF_X:
        x = torch.randn(m, problem.k, device=DEVICE).to(problem.dtype)
        reference = weight_only.linear((x,), rows, bias, problem.scheme, problem.dtype)
        for kernel in KERNELS:
            if isinstance(kernel.fit(problem, m, target), Reject):
                continue
            got = error(kernel.run((x,), packed[kernel.layout], bias, problem), reference)
            assert got <= TOLERANCE[problem.dtype], f"{kernel.name} m={m}: relative error {got:.2e}"
            count += 1
    return count


def _serves(layout: str, problem: Problem, target: Target) -> bool:
    return any(k.layout == layout and not isinstance(k.fit(problem, 1, target), Reject) for k in KERNELS)


@pytest.fixture(autouse=True)
def exact_references() -> None:
    """The reference multiplies in f32; TF32 would be less exact than what it judges."""
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int4(spec: str, shape: tuple[int, int]) -> None:
    assert check_all(Problem(parse(spec), *shape, torch.bfloat16, has_bias=shape[0] % 128 != 0)) >= 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int4_other_types(dtype: torch.dtype) -> None:
    assert check_all(Problem(parse("W4A16_ASYM"), 1000, 1544, dtype, has_bias=True)) >= 7
    assert check_all(Problem(parse("W4A16"), 2048, 7168, dtype)) >= 7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert check_all(Problem(parse("W8A16"), *shape, dtype, has_bias=True)) >= 7


@needs_humming
@pytest.mark.parametrize("spec", SPECS)
def test_tiles_are_hummings_own(spec: str) -> None:
    """Our pack and humming's transformation of the same weight agree bit for bit."""
    from humming.config import LayerConfig
    from humming.transform import transform_humming_tensors

    problem = Problem(parse(spec), 256, 512, torch.bfloat16)
    rows = weights(problem)
    ours = w4.pack_tiles(rows, problem)
    tensors = {"weight": rows[0].view(torch.int32), "weight_scale": rows[1]}
    if not problem.scheme.weights.symmetric:
        zero = weight_only.unpack_nibbles(rows[2], rows[1].shape[1])
        # humming packs zero points along n, first row in the low nibble.
        tensors["zero_point"] = weight_only.pack_nibbles(zero.t().contiguous()).view(torch.int32).t().contiguous()
    theirs = transform_humming_tensors(LayerConfig(**humming_w4a16.layer_config(problem)), tensors)
    assert torch.equal(ours[0], theirs["weight"])
    assert torch.equal(ours[1], theirs["weight_scale"])
    if "zero_point" in theirs:
        assert torch.equal(ours[2], theirs["zero_point"])


@needs_humming
def test_humming_leaves_its_locks_free() -> None:
    problem = Problem(parse("W4A16"), 4096, 4096, torch.bfloat16)
    packed = w4.pack_tiles(weights(problem), problem)
    for m in (1, 16, 64, 512):
        humming_w4a16.run((torch.randn(m, 4096, device=DEVICE, dtype=torch.bfloat16),), packed, None, problem)
        assert not packed[-1].any(), m


@pytest.mark.parametrize("spec", ["W4A16", "W4A16_ASYM", "int4.group32+16"])
def test_layouts_unpack_to_what_was_packed(spec: str) -> None:
    problem = Problem(parse(spec), 264, 640, torch.bfloat16)
    rows = weights(problem)
    for layout in (w4.W4_TILES, torch_int4.TINYGEMM):
        packed = layout.pack(rows, problem)
        assert [(tuple(p.shape), p.dtype) for p in packed] == [(s.shape, s.dtype) for s in layout.planes(problem)]
        assert all(torch.equal(a, b) for a, b in zip(rows, layout.unpack(packed, problem), strict=True)), layout.name


def test_equal_inputs_give_equal_bits() -> None:
    problem = Problem(parse("W4A16"), 1024, 8192, torch.bfloat16)
    packed = w4.pack_tiles(weights(problem), problem)
    for m, run in ((1, w4.run_gemv), (16, w4.run_matmul), (64, w4.run_dequant)):
        x = torch.randn(m, 8192, device=DEVICE, dtype=torch.bfloat16)
        first = run((x,), packed, None, problem)
        assert all(torch.equal(first, run((x,), packed, None, problem)) for _ in range(3)), run.__name__


def test_in_a_cuda_graph() -> None:
    """Kernels replay inside a graph, with new inputs in the same place."""
    problem = Problem(parse("W4A16"), 4096, 4096, torch.bfloat16)
    target = Target.of(DEVICE)
    rows = weights(problem)
    packed = {name: layout.pack(rows, problem) for name, layout in LAYOUTS.items() if _serves(name, problem, target)}
    for m in (1, 16):
        x = torch.randn(m, 4096, device=DEVICE, dtype=torch.bfloat16)
        for kernel in KERNELS:
            if isinstance(kernel.fit(problem, m, target), Reject):
                continue
            kernel.run((x,), packed[kernel.layout], None, problem)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = kernel.run((x,), packed[kernel.layout], None, problem)
            x.normal_()
            graph.replay()
            reference = weight_only.linear((x,), rows, None, problem.scheme, problem.dtype)
            assert error(y, reference) <= TOLERANCE[problem.dtype], (kernel.name, m)
