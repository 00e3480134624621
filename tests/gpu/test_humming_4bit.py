"""humming's 4-bit kernels on the GPU: against the family's reference, and layouts against humming's own transformation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels import _humming
from quant_compile.lowering.kernels.w4a8 import humming_4bit as humming
from quant_compile.lowering.registry import Kernel, Problem
from quant_compile.lowering.target import Target, probe_library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not probe_library("humming"), reason="humming_kernels is not installed"),
]

DEVICE = torch.device("cuda")
LAYOUTS = {layout.name: layout for layout in humming.LAYOUTS}
PRESETS = ("W4A8", "W4AFP8", "NVFP4A16", "MXFP4A16")
OTHERS = (
    "int4.group64+int8.token.dynamic",
    "int4.group32+int8.tensor",
    "int4.channel+int8.token.dynamic",
    "int4.group64+fp8e4m3.token.dynamic",
    "int4.group32+fp8e4m3.tensor.dynamic",
    "int4.channel+fp8e4m3.token.dynamic",
)
LARGE = ((6144, 4096), (28672, 4096), (8192, 28672))
ROWS_OF_X = (1, 5, 16, 64, 300, 4096)
# Programs that share an output add their parts to it in its own dtype, which is rounded each time; sums of e4m3 products are
# kept to about 14 bits by tensor cores.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}
# One rounding more, of the result times a ratio or of each group's scale.
SIBLINGS = {torch.bfloat16: 6e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def exact_references() -> None:
    """The reference multiplies in f32; TF32 would be less exact than what it judges."""
    assert not torch.backends.cuda.matmul.allow_tf32


def here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def kernel_of(problem: Problem) -> Kernel:
    """The one kernel that serves the problem here."""
    target = Target.of(DEVICE)
    answers = {kernel: kernel.fit(problem, 16, target) for kernel in humming.KERNELS}
    found = [kernel for kernel, answer in answers.items() if not isinstance(answer, Reject)]
    if not found:
        pytest.skip("; ".join(answer.reason for answer in answers.values() if isinstance(answer, Reject)))
    assert len(found) == 1
    return found[0]


def weights(problem: Problem) -> Planes:
    w = torch.randn(problem.n, problem.k, device=DEVICE) * 0.05
    return family_of(problem.scheme).quantize_weight(w.to(problem.dtype), problem.scheme)


def inputs(problem: Problem, m: int) -> Planes:
    x = (torch.randn(m, problem.k, device=DEVICE) + 0.1).to(problem.dtype)
    if problem.scheme.input_activations is None:
        return (x,)
    scale = torch.tensor([0.04], device=DEVICE) if problem.scheme.static else None
    return family_of(problem.scheme).quantize_input(x, problem.scheme, scale)


def error(got: torch.Tensor, reference: torch.Tensor) -> float:
    assert got.shape == reference.shape
    return ((got.float() - reference.float()).norm() / reference.float().norm()).item()


def compile_all(problem: Problem, rows_of_x: tuple[int, ...]) -> Kernel:
    """The GEMMs of all these rows, compiled side by side."""
    kernel = kernel_of(problem)
    prepare = kernel.prepare
    assert prepare is not None
    with ThreadPoolExecutor(8) as pool:
        for result in [pool.submit(prepare, problem, _humming.range_of(m), here()) for m in rows_of_x]:
            result.result()
    return kernel


def check(
    problem: Problem, rows: Planes, rows_of_x: tuple[int, ...] = ROWS_OF_X, outputs: torch.Tensor | None = None
) -> None:
    """For every number of rows; compared in some outputs, or in all."""
    kernel = compile_all(problem, rows_of_x)
    packed = LAYOUTS[kernel.layout].pack(rows, problem)
    bias = torch.randn(problem.n, device=DEVICE).to(problem.dtype) if problem.has_bias else None
    judged = rows if outputs is None else tuple(plane[outputs] for plane in rows)
    for m in rows_of_x:
        x = inputs(problem, m)
        reference = family_of(problem.scheme).linear(x, judged, bias, problem.scheme, torch.float32)
        got = kernel.run(x, packed, bias, problem)
        assert got.dtype == problem.dtype
        found = error(got if outputs is None else got[:, outputs], reference)
        assert found <= TOLERANCE[problem.dtype], f"{kernel.name} m={m}: relative error {found:.2e}"
        assert not packed[-1].any(), f"locks after m={m}"


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 2048), (384, 640)], ids=str)
@pytest.mark.parametrize("spec", PRESETS)
def test_bf16(spec: str, shape: tuple[int, int]) -> None:
    problem = Problem(parse(spec), *shape, torch.bfloat16, has_bias=shape[0] == 384)
    check(problem, weights(problem))


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("spec", PRESETS)
def test_layers_of_large_models(spec: str, shape: tuple[int, int]) -> None:
    """The reference, which makes an f32 weight, has 128 outputs: the first, the last and any between."""
    problem = Problem(parse(spec), *shape, torch.bfloat16)
    between = torch.randperm(shape[0] - 2, device=DEVICE)[:126] + 1
    outputs = torch.cat((torch.tensor([0, shape[0] - 1], device=DEVICE), between))
    check(problem, weights(problem), (5, 300), outputs)


@pytest.mark.parametrize("spec", OTHERS)
def test_other_groups_and_inputs(spec: str) -> None:
    problem = Problem(parse(spec), 1024, 2048, torch.bfloat16, has_bias=True)
    check(problem, weights(problem), (1, 16, 300))


@pytest.mark.parametrize("spec", ["W4A8", "W4AFP8", "NVFP4A16"])
def test_f16(spec: str) -> None:
    problem = Problem(parse(spec), 1024, 2048, torch.float16)
    check(problem, weights(problem), (1, 16, 300))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_siblings_keep_their_own_global_scale(dtype: torch.dtype) -> None:
    """Three merged weights of different sizes, each held to the reference for itself."""
    scheme = parse("NVFP4A16")
    part, problem = Problem(scheme, 256, 1024, dtype), Problem(scheme, 768, 1024, dtype, siblings=3)
    factors = (1.0, 37.0, 0.02)
    parts = [(q[0], q[1], q[2] * factor) for q, factor in zip((weights(part) for _ in factors), factors, strict=True)]
    rows = tuple(torch.cat(planes) for planes in zip(*parts, strict=True))
    served = [k for k in humming.KERNELS if not isinstance(k.fit(problem, 16, Target.of(DEVICE)), Reject)]
    assert len(served) == (2 if dtype == torch.bfloat16 else 1)
    for kernel in served:
        packed = LAYOUTS[kernel.layout].pack(rows, problem)
        for m in (1, 64):
            x = inputs(problem, m)
            y = kernel.run(x, packed, None, problem)
            for index, planes in enumerate(parts):
                reference = family_of(scheme).linear(x, planes, None, scheme, torch.float32)
                got = error(y[:, 256 * index : 256 * (index + 1)], reference)
                assert got <= SIBLINGS[dtype], (kernel.name, index, m, got)


@pytest.mark.parametrize("spec", [*PRESETS, *OTHERS])
def test_layouts_are_hummings_own(spec: str) -> None:
    """Our pack and humming's transformation of the same weight agree bit for bit."""
    from humming.config import LayerConfig
    from humming.transform import transform_humming_tensors

    problem = Problem(parse(spec), 256, 512, torch.bfloat16)
    rows, kernel = weights(problem), kernel_of(problem)
    ours = LAYOUTS[kernel.layout].pack(rows, problem)
    fields = humming.layer_config(problem) | {"use_packed_k_layout": kernel.layout == "w4_wide8"}
    tensors = {"weight": rows[0].view(torch.int32), "weight_scale": rows[1].contiguous()}
    if fields.get("bs_dtype") == "float8e8m0":
        tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e8m0fnu)
    if fields.get("weight_scale_2_type") == "tensor":
        tensors["weight_scale_2"] = torch.ones(1, device=DEVICE)
    theirs = transform_humming_tensors(LayerConfig(**fields), tensors)
    assert torch.equal(ours[0], theirs["weight"])
    assert torch.equal(ours[1].view(torch.uint8), theirs["weight_scale"].view(torch.uint8))


def test_every_code_of_every_lane() -> None:
    """Inputs that are 1 in one place give the weight's codes, exactly."""
    for spec in ("W4A8", "W4AFP8"):
        problem = Problem(parse(spec), 256, 128, torch.bfloat16)
        codes = torch.randint(0, 16, (256, 128), device=DEVICE, dtype=torch.uint8)
        rows = (codes[:, 0::2] | (codes[:, 1::2] << 4), torch.ones(256, 1, dtype=torch.bfloat16, device=DEVICE))
        kernel = kernel_of(problem)
        x = torch.eye(128, device=DEVICE).to(torch.int8 if spec == "W4A8" else torch.float8_e4m3fn)
        packed = LAYOUTS[kernel.layout].pack(rows, problem)
        y = kernel.run((x, torch.ones(128, 1, device=DEVICE)), packed, None, problem)
        assert torch.equal(y.float(), codes.t().float() - 8), spec


@pytest.mark.parametrize("spec", PRESETS)
def test_in_a_cuda_graph(spec: str) -> None:
    """Replays with new inputs in the same place."""
    problem = Problem(parse(spec), 1024, 2048, torch.bfloat16)
    rows, kernel = weights(problem), compile_all(problem, (1, 16))
    packed = LAYOUTS[kernel.layout].pack(rows, problem)
    for m in (1, 16):
        x = inputs(problem, m)
        kernel.run(x, packed, None, problem)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernel.run(x, packed, None, problem)
        for old, new in zip(x, inputs(problem, m), strict=True):
            old.copy_(new)
        graph.replay()
        reference = family_of(problem.scheme).linear(x, rows, None, problem.scheme, torch.float32)
        assert error(y, reference) <= TOLERANCE[problem.dtype], m
