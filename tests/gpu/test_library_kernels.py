"""Every kernel of the registry that accepts a problem on this GPU, against the scheme's reference on the same codes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import PRESETS, Scheme, parse
from quant_compile.lowering import schemes as _schemes  # noqa: F401  (registers the families)
from quant_compile.lowering.registry import Kernel, Problem, Rank, kernels, layouts
from quant_compile.lowering.target import Target

pytestmark = pytest.mark.gpu

BF16, F16 = torch.bfloat16, torch.float16
# (n, k) -> rows tried. The large shapes are real projections; the others are multiples of nothing useful.
SHAPES = {
    (6144, 4096): (1, 5, 16, 64, 300, 4096),
    (4096, 14336): (1, 16, 300),
    (1000, 776): (1, 5, 64, 300),
    (130, 200): (1, 5, 16, 300),
}
# The output's rounding to 16 bits is about 1.7e-3 in bf16 on each side; FP8 tensor cores keep fewer bits than f32 while
# they accumulate, and some kernels round before they add the bias. A wrong scale or a wrong group is far above this.
TOLERANCE = 5e-3


def weight_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> Planes:
    weight = torch.randn(n, k, device="cuda", dtype=dtype).mul_(k**-0.5)
    return family_of(scheme).quantize_weight(weight, scheme)


def input_planes(scheme: Scheme, x: Tensor) -> Planes:
    if scheme.input_activations is None:
        return (x,)
    scale = None
    if scheme.static:
        limit = 448.0 if scheme.input_activations.type == "float" else 127.0
        scale = (x.abs().amax().float() / limit).reshape(1)
    return family_of(scheme).quantize_input(x, scheme, scale)


def fitting(problem: Problem, m: int) -> Iterator[Kernel]:
    target = Target.of("cuda")
    for kernel in kernels().values():
        if (
            kernel.reference or kernel.name == "sgl_gguf_a8"
        ):  # which rounds inputs of its own accord: tests/gpu/test_gguf.py
            continue
        if isinstance(kernel.fit(problem, m, target), Rank):
            yield kernel


def in_layout(kernel: Kernel, x: Planes) -> Planes:
    """Group scales in the order the kernel asks for."""
    return (x[0], x[1].t().contiguous().t()) if kernel.column_scales else x


def relative_error(y: Tensor, reference: Tensor) -> float:
    difference = (y.float() - reference.float()).norm() / reference.float().norm()
    return float(difference)


def failures_of(scheme: Scheme, n: int, k: int, rows: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """One line for each kernel and m that raised or was too far off; all are tried, so that one run shows all."""
    family = family_of(scheme)
    refusal = family.quantizes(scheme) or family.takes_size(scheme, n, k)
    if refusal is not None:
        pytest.skip(refusal.reason)
    weight = weight_planes(scheme, n, k, dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    packed: dict[str, Planes] = {}
    failures: list[str] = []
    for m in rows:
        x = input_planes(scheme, torch.randn(m, k, device="cuda", dtype=dtype))
        plain = family_of(scheme).linear(x, weight, None, scheme, torch.float32)
        for with_bias in (False, True):
            problem = Problem(scheme, n, k, dtype, with_bias)
            reference = plain + bias.float() if with_bias else plain
            for kernel in fitting(problem, m):
                where = f"{kernel.name} {n}x{k} m={m} bias={with_bias} {dtype}"
                try:
                    if kernel.layout not in packed:
                        packed[kernel.layout] = layouts()[kernel.layout].pack(weight, problem)
                    y = kernel.run(in_layout(kernel, x), packed[kernel.layout], bias if with_bias else None, problem)
                    torch.cuda.synchronize()
                except Exception as error:
                    failures.append(f"{where}: {type(error).__name__} {str(error).splitlines()[:1]}")
                    continue
                if (y.shape, y.dtype, y.is_contiguous()) != (reference.shape, dtype, True):
                    failures.append(f"{where}: shape {tuple(y.shape)} {y.dtype} strides {y.stride()}")
                elif not relative_error(y, reference) <= TOLERANCE:  # NaN fails too
                    failures.append(f"{where}: error {relative_error(y, reference):.2e}")
    return failures


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", PRESETS)
def test_kernels_match_the_reference(name: str, shape: tuple[int, int]) -> None:
    failures = failures_of(parse(name), *shape, SHAPES[shape], BF16)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("shape", [(6144, 4096), (1000, 776)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", PRESETS)
def test_kernels_match_the_reference_in_float16(name: str, shape: tuple[int, int]) -> None:
    failures = failures_of(parse(name), *shape, (1, 64), F16)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC"])
def test_small_integer_sums_are_exact(name: str) -> None:
    """Sparse codes in -1, 0, 1 under unit scales give sums that bf16 holds: any lost or misplaced term shows."""
    n, k = 1024, 2048
    scheme = parse(name)
    codes = torch.int8 if name == "W8A8" else torch.float8_e4m3fn

    def sparse(rows: int) -> Tensor:
        return (torch.randint(-1, 2, (rows, k), device="cuda") * (torch.rand(rows, k, device="cuda") < 0.3)).to(codes)

    ones = torch.ones(n, 1, device="cuda")
    weight = (sparse(n), ones)
    for m in (1, 16, 300):
        x = (sparse(m), torch.ones(m, 1, device="cuda"))
        expected = (x[0].double() @ weight[0].double().t()).to(BF16)
        problem = Problem(scheme, n, k, BF16)
        for kernel in fitting(problem, m):
            y = kernel.run(x, layouts()[kernel.layout].pack(weight, problem), None, problem)
            assert torch.equal(y, expected), f"{kernel.name} m={m}"


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16"])
def test_kernels_replay_in_cuda_graphs(name: str) -> None:
    """After one warm-up call a kernel can be captured, and a replay reads the inputs as they are then."""
    scheme, n, k, m = parse(name), 1024, 1024, 16
    weight = weight_planes(scheme, n, k, BF16)
    problem = Problem(scheme, n, k, BF16)
    samples = [input_planes(scheme, torch.randn(m, k, device="cuda", dtype=BF16)) for _ in range(2)]
    failures: list[str] = []
    for kernel in fitting(problem, m):
        packed = layouts()[kernel.layout].pack(weight, problem)
        static = tuple(plane.clone() for plane in in_layout(kernel, samples[0]))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            kernel.run(static, packed, None, problem)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernel.run(static, packed, None, problem)
        for plane, new in zip(static, samples[1], strict=True):
            plane.copy_(new)
        graph.replay()
        reference = family_of(scheme).linear(samples[1], weight, None, scheme, torch.float32)
        if not relative_error(y, reference) <= TOLERANCE:
            failures.append(f"{kernel.name}: error {relative_error(y, reference):.2e}")
    assert not failures, "\n".join(failures)
