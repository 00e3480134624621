"""GGUF weights on the GPU: every kernel that accepts against the family's reference, linears and experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.ggml.decode import scales_of
from quant_compile.ir.ggml.types import TYPES
from quant_compile.lowering.kernels.experts import triton_gguf_moe as moe
from quant_compile.lowering.kernels.gguf import sgl_gguf, torch_gguf, triton_gguf, triton_gguf_mxfp4
from quant_compile.lowering.moe import moe_kernels
from quant_compile.lowering.registry import Kernel, Problem, layouts
from quant_compile.lowering.target import Target
from tests.lowering.test_gguf_kernels import blocks, problem_of, rounded_q8_1
from tests.lowering.test_triton_gguf_moe import MIXES, SPECS, packed
from tests.lowering.test_triton_moe import Case, relative

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
NAMES = ("q4_k", "q8_0", "q6_k", "q5_k", "q4_0", "mxfp4")
ROWS_OF_X = (1, 3, 16, 64, 512)
SHAPES = ((1024, 4096), (77, 2816))
# Triton compiles every combination anew, which is what the time goes into: f16 on one shape.
CASES = (
    *((name, shape, torch.bfloat16) for name in NAMES for shape in SHAPES),
    *((name, SHAPES[0], torch.float16) for name in NAMES),
)
KERNELS = (*triton_gguf.KERNELS, *triton_gguf_mxfp4.KERNELS, *torch_gguf.KERNELS, sgl_gguf.KERNELS[0])
# 16-bit outputs of f32 sums over weights that are rounded once (sgl-kernel's copy: several times, in f16).
# sgl-kernel multiplies unsigned codes of these types by inputs in Q8_1, and their offset by the sum of the inputs as they were.
OFFSETS = ("q4_0", "q4_k")
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def exact_references() -> None:
    """The reference multiplies in f32; TF32 would be less exact than what it judges."""
    assert not torch.backends.cuda.matmul.allow_tf32


def random_weight(name: str, n: int, k: int) -> Planes:
    if name == "mxfp4":
        own = torch.randint(0, 256, (n, k // 32, 17), dtype=torch.uint8)
        own[..., 0] = torch.randint(110, 125, (n, k // 32), dtype=torch.uint8)
        return (own.flatten(1).to(DEVICE),)
    return (blocks(name, n, k).to(DEVICE),)


def error(got: Tensor, reference: Tensor) -> float:
    assert got.shape == reference.shape and got.dtype == reference.dtype
    return relative(got, reference)


def check_all(problem: Problem, own: Planes, kernels: tuple[Kernel, ...] = KERNELS) -> set[str]:
    """Every kernel that accepts, for every number of rows; returns the names of those that ran."""
    target, ran = Target.of(DEVICE), set()
    packed_planes = {kernel.layout: None for kernel in kernels}
    bias = torch.randn(problem.n, device=DEVICE).to(problem.dtype) if problem.has_bias else None
    for m in ROWS_OF_X:
        x = torch.randn(m, problem.k, device=DEVICE).to(problem.dtype)
        reference = family_of(problem.scheme).linear((x,), own, bias, problem.scheme, problem.dtype)
        for kernel in kernels:
            if isinstance(kernel.fit(problem, m, target), Reject):
                continue
            if packed_planes[kernel.layout] is None:
                packed_planes[kernel.layout] = layouts()[kernel.layout].pack(own, problem)
            y = kernel.run((x,), packed_planes[kernel.layout], bias, problem)
            got = error(y, reference)
            assert got <= TOLERANCE[problem.dtype], f"{kernel.name} m={m}: relative error {got:.2e}"
            ran.add(kernel.name)
    return ran


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES, ids=str)
def test_kernels(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    problem = problem_of(name, *shape, dtype, has_bias=shape[0] % 128 != 0)
    own = triton_gguf_mxfp4.KERNELS if name == "mxfp4" else triton_gguf.KERNELS
    assert check_all(problem, random_weight(name, *shape)) >= {kernel.name for kernel in own}


@pytest.mark.parametrize("name", NAMES)
def test_copies_in_f32(name: str) -> None:
    problem = problem_of(name, 256, 1024, torch.float32)
    assert check_all(problem, random_weight(name, 256, 1024))


@pytest.mark.parametrize("name", torch_gguf.TYPES)
def test_types_without_a_kernel_of_their_own(name: str) -> None:
    problem = problem_of(name, 512, 1024, torch.bfloat16)
    w = torch.randn(512, 1024, device=DEVICE)
    assert "torch_gguf_dequant" in check_all(problem, family_of(problem.scheme).quantize_weight(w, problem.scheme))


@pytest.mark.parametrize("name", ["q4_k", "q8_0", "q6_k"])
def test_plans_of_large_layers(name: str) -> None:
    """Tiles, warps and splits that small shapes do not choose; the first, the last and some other outputs are judged."""
    for n, k in ((28672, 2048), (8192, 7168)):
        problem = problem_of(name, n, k, torch.bfloat16)
        own = random_weight(name, n, k)
        planes = triton_gguf.pack(own, problem)
        outputs = torch.cat((torch.tensor([0, n - 1]), torch.randperm(n - 2)[:126] + 1)).to(DEVICE)
        for m, run in (
            (1, triton_gguf.run_gemv),
            (2, triton_gguf.run_gemv),
            (16, triton_gguf.run_matmul),
            (64, triton_gguf.run_matmul),
        ):
            x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
            judged = tuple(plane[outputs] for plane in own)
            reference = family_of(problem.scheme).linear((x,), judged, None, problem.scheme, torch.bfloat16)
            assert error(run((x,), planes, None, problem)[:, outputs], reference) <= TOLERANCE[torch.bfloat16], (
                n,
                k,
                m,
            )


def test_in_a_cuda_graph() -> None:
    """Captured once, replayed over other inputs."""
    problem = problem_of("q4_k", 1024, 1024, torch.bfloat16)
    own = random_weight("q4_k", 1024, 1024)
    planes = triton_gguf.pack(own, problem)
    for m, kernel in ((1, triton_gguf.KERNELS[0]), (16, triton_gguf.KERNELS[1]), (64, triton_gguf.KERNELS[2])):
        x = torch.randn(m, 1024, device=DEVICE, dtype=torch.bfloat16)
        kernel.run((x,), planes, None, problem)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernel.run((x,), planes, None, problem)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, kernel.run((x,), planes, None, problem))


@pytest.mark.parametrize("name", ["q4_k", "q8_0", "q6_k", "q4_0"])
def test_products_that_round_inputs(name: str) -> None:
    """sgl-kernel's own, against a reference that does the same: codes times inputs in Q8_1, offsets times exact sums (f16 there)."""
    problem, target = problem_of(name, 1024, 1024, torch.float16), Target.of(DEVICE)
    answer = sgl_gguf.fit_a8(problem, 1, target)
    if isinstance(answer, Reject):
        pytest.skip(answer.reason)
    w = torch.randn(1024, 1024, device=DEVICE) * 0.03
    family = family_of(problem.scheme)
    own = family.quantize_weight(w, problem.scheme)
    dense = family.dequantize_weight(own, problem.scheme, 1024)
    offset = torch.zeros_like(dense)
    if name in OFFSETS:
        offset = (
            scales_of(name, own[0].unflatten(-1, (-1, TYPES[name].nbytes)))[1].flatten(-2).repeat_interleave(32, -1)
        )
    for m in (1, 5, 64):
        x = torch.randn(m, 1024, device=DEVICE).half()
        reference = rounded_q8_1(x) @ (dense - offset).t() + x.float() @ offset.t()
        assert error(sgl_gguf.run_a8((x,), own, None, problem), reference.half()) <= TOLERANCE[torch.bfloat16], m


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        *((spec, torch.bfloat16) for spec in (*SPECS, *MIXES)),
        *((s, torch.float16) for s in ("GGUF_Q4_K", "GGUF_Q8_0", MIXES[0])),
    ],
)
def test_experts(spec: str, dtype: torch.dtype) -> None:
    """Both forms; one and many tokens for each expert, illegal ids; down of another type as well."""
    for tokens, sizes in (
        (1, (8, 4, 512, 256)),
        (3, (8, 4, 512, 768)),
        (16, (16, 4, 512, 256)),
        (200, (4, 2, 256, 512)),
    ):
        case = Case(spec, tokens, *sizes, dtype=dtype, device="cuda")
        case.ids[0, 0] = -1
        arguments, expected = packed(case), case.expected()
        runs = [moe.run, moe.run_decode] if tokens * sizes[1] <= 64 else [moe.run]
        for run in runs:
            # Hidden rows are rounded as well.
            assert relative(run(*arguments), expected) <= 2 * TOLERANCE[torch.bfloat16], (tokens, run)


def test_experts_of_mxfp4() -> None:
    case = Case("GGUF_MXFP4", 3, 8, 4, 512, 256, dtype=torch.bfloat16, device="cuda")
    for name in ("triton_gguf_mxfp4_moe_decode", "triton_gguf_mxfp4_moe"):
        y = moe_kernels()[name].run(*packed(case, "experts_gguf_mxfp4"))
        assert relative(y, case.expected()) <= TOLERANCE[torch.bfloat16], name


def test_types_are_known() -> None:
    assert set(NAMES) <= set(TYPES)
