"""triton_scaled_mm: against the families' references in Triton's interpreter, and compiled for every arch it claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401
from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.scaled import triton_scaled_mm as kernel
from quant_compile.lowering.registry import Problem, Rank
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

SCHEMES = ("FP8_DYNAMIC", "FP8", "FP8_E5M2_DYNAMIC", "W8A8", "W8A8_STATIC", "FP8_BLOCK")
# f32 output: only the order of f32 sums differs from the reference. (The interpreter cuts f32 to bf16 instead of
# rounding, which is 4e-3 by itself, so bf16 outputs are compared on the GPU.)
TOLERANCE = 2e-6
SM90 = Target.fake("sm90")
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


def make(spec: str, m: int, n: int, k: int, dtype: torch.dtype, has_bias: bool) -> tuple[Any, ...]:
    """(x planes, w planes, bias, problem, reference output) of seeded random data."""
    scheme = parse(spec)
    family = family_of(scheme)
    generator = torch.Generator().manual_seed(1000 * m + n + k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    w = (torch.randn(n, k, generator=generator) / 8).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if has_bias else None
    x_planes = family.quantize_input(x, scheme, torch.tensor([0.02]) if scheme.static else None)
    w_planes = family.quantize_weight(w, scheme)
    problem = Problem(scheme, n, k, dtype, has_bias)
    return x_planes, w_planes, bias, problem, family.linear(x_planes, w_planes, bias, scheme, dtype)


def check(spec: str, m: int, n: int, k: int, plan: str, has_bias: bool = True, **changes: object) -> None:
    """Run one plan in the interpreter and compare; integers must be equal bit for bit when there is no bias."""
    x, w, bias, problem, expected = make(spec, m, n, k, torch.float32, has_bias)
    config = replace(getattr(kernel, plan)(problem, m, SM90), **changes)
    actual = kernel.launch(x, w, bias, problem, config)
    error = float((actual - expected).norm() / expected.norm())
    assert error <= TOLERANCE, f"{spec} {m=} {n=} {k=} {config}: {error:.1e}"
    if spec.startswith("W8A8") and not has_bias:
        assert torch.equal(actual, expected), f"{spec} {m=} {n=} {k=} {config}: int8 is not exact"


def check_decode(spec: str) -> None:
    """gemv and slices over ragged n and k, every m class, with and without bias."""
    for m in (1, 2, 3, 4):
        check(spec, m, 37, 200, "gemv_config")
    check(spec, 1, 130, 640, "gemv_config", has_bias=False, stages=3)
    check(spec, 2, 16, 1024, "gemv_config", has_bias=False)
    check(spec, 1, 5, 7, "gemv_config")
    for m in (1, 8, 9, 16):
        check(spec, m, 37, 300, "_slices_config")
    check(spec, 3, 64, 1024, "_slices_config", has_bias=False)
    check(spec, 2, 5, 7, "_slices_config")


def check_tiles(spec: str) -> None:
    """tall and wide, split-K, tensor descriptors, promotion, a last tile of one row and a last step of a few inputs."""
    check(spec, 17, 70, 300, "_tall_config")
    check(spec, 3, 65, 700, "_tall_config", split=2)
    check(spec, 40, 64, 640, "_tall_config", has_bias=False, split=4, block_n=128)
    check(spec, 129, 130, 250, "_wide_config")
    check(spec, 65, 150, 320, "_wide_config", has_bias=False, tma=True)
    check(spec, 5, 129, 256, "_wide_config", split=2, block_m=64)
    check(spec, 33, 40, 128, "_wide_config", has_bias=False, promote=True, block_m=64, block_n=64)


def check_group_strides() -> None:
    """FP8_BLOCK reads input scales of any strides: column-major, or cut from a wider plane."""
    x, w, bias, problem, expected = make("FP8_BLOCK", 5, 130, 384, torch.float32, True)
    columns = (x[0], x[1].t().contiguous().t())
    wide = (x[0], torch.cat((x[1], x[1]), 1)[:, : x[1].shape[1]])
    for planes in (columns, wide):
        for plan in (kernel._slices_config, kernel._tall_config, kernel._wide_config):
            actual = kernel.launch(planes, w, bias, problem, plan(problem, 5, SM90))
            assert float((actual - expected).norm() / expected.norm()) <= TOLERANCE
    narrow = (x[0][:2], columns[1][:2])
    actual = kernel.run_gemv(narrow, w, bias, problem)
    assert float((actual - expected[:2]).norm() / expected[:2].norm()) <= TOLERANCE


def check_other_blocks() -> None:
    """Blocks other than 128x128, also with rows that no power of two divides."""
    for spec in ("fp8e4m3.block64x64+fp8e4m3.group64.dynamic", "fp8e4m3.block96x256+fp8e4m3.group256.dynamic"):
        check(spec, 2, 200, 600, "gemv_config")
        check(spec, 2, 200, 600, "_slices_config")
        check(spec, 20, 200, 600, "_tall_config")
        check(spec, 70, 200, 600, "_wide_config")


def check_run() -> None:
    """The registered entry points choose a plan by m and give f16 and bf16."""
    for m in (1, 5, 20, 130):
        for dtype, limit in ((torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
            x, w, bias, problem, expected = make("FP8_DYNAMIC", m, 48, 96, dtype, True)
            actual = kernel.run(x, w, bias, problem)
            assert actual.dtype == dtype
            assert float((actual.float() - expected.float()).norm() / expected.float().norm()) <= limit


def check_all(spec: str) -> None:
    """Every kind of plan of one scheme, in one process."""
    check_decode(spec)
    check_tiles(spec)


@needs_triton
@pytest.mark.parametrize("spec", SCHEMES)
def test_every_plan_in_interpreter(spec: str) -> None:
    run_interpreted(__name__, "check_all", spec)


@needs_triton
@pytest.mark.parametrize("function", ["check_group_strides", "check_other_blocks", "check_run"])
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


@needs_triton
def test_interpreted_check_can_fail() -> None:
    """A check that raises in the interpreter's process fails here: the tests above are not vacuous."""
    with pytest.raises(AssertionError, match="no attribute"):
        run_interpreted(__name__, "check", "FP8_DYNAMIC", 2, 8, 32, "no_such_plan")


def compile_plan(plan: kernel.Config, problem: Problem, arch: int, even: bool = True) -> Any:
    """The cubin that a launch of ``plan`` would build on ``arch``."""
    from quant_compile.lowering.kernels.scaled import _triton_scaled_mm as source

    integer = problem.scheme.weights.type == "int"
    names = {"e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}
    activations = problem.scheme.input_activations
    assert activations is not None
    x = "*i8" if integer else names[activations.format or ""]
    w = "*i8" if integer else names[problem.scheme.weights.format or ""]
    group_n, group_k = kernel.groups(problem)
    common = {
        "EVEN_K": even,
        "GROUP_K": group_k,
        "GROUP_N": group_n,
        "INTEGER": integer,
        "HAS_BIAS": True,
        "PDL": plan.pdl,
    }
    scales = {"bias_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "k": "i32", "m": "i32"}
    pdl = {"launch_pdl": plan.pdl}
    if plan.kind in ("gemv", "slices"):
        types = scales | {"sx_ptr": "*fp32", "sw_ptr": "*fp32", "x_ptr": x, "w_ptr": w}
        types |= {name: "i32" for name in ("sx_row", "sx_group", "sw_row", "sw_group")}
        sizes = {"BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, **common}
        if plan.kind == "gemv":
            if integer and even:
                types |= {"x_ptr": "*i32", "w_ptr": "*i32"}
                sizes["BLOCK_K"] //= 4
            sizes |= {"M": plan.block_m, "DP4A": integer and even, "PIPELINE": plan.stages}
            return compile_cubin(source.gemv_kernel, arch, types, sizes, aligned=even, num_warps=plan.warps, **pdl)
        sizes |= {"BLOCK_M": plan.block_m, "SLICES": plan.warps}
        options = {"num_warps": plan.warps, "num_stages": plan.stages, **pdl}
        return compile_cubin(source.slices_kernel, arch, types, sizes, aligned=even, **options)
    return _compile_tile(plan, arch, x, w, common, even)


def _compile_tile(plan: kernel.Config, arch: int, x: str, w: str, common: dict[str, Any], even: bool) -> Any:
    from quant_compile.lowering.kernels.scaled import _triton_scaled_mm as source

    tall = plan.kind == "tall"
    (a, block_a), (b, block_b) = ((x, plan.block_m), (w, plan.block_n))
    if tall:
        (a, block_a), (b, block_b) = (b, block_b), (a, block_a)
    if plan.tma:
        a, b = (f"tensordesc<{t[1:]}[{rows}, {plan.block_k}]>" for t, rows in ((a, block_a), (b, block_b)))
    split = plan.split > 1
    y = ("*i32" if common["INTEGER"] else "*fp32") if split else "*bf16"
    types = {"a_ptr": a, "b_ptr": b, "sa_ptr": "*fp32", "sb_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": y}
    integers = ("rows_a", "rows_b", "k", "sa_row", "sa_group", "sb_row", "sb_group", "steps")
    types |= {name: "i32" for name in integers} | {"y_b" if tall else "y_a": "i32"}
    constants = common | {"BLOCK_A": block_a, "BLOCK_B": block_b, "BLOCK_K": plan.block_k, "BAND": plan.band}
    constants |= {"SPLIT": plan.split, "W_IS_A": tall, "PROMOTE": plan.promote, "TMA": plan.tma}
    constants |= {"y_a" if tall else "y_b": 1, "HAS_BIAS": not split}
    options = {"num_warps": plan.warps, "num_stages": plan.stages, "launch_pdl": plan.pdl}
    return compile_cubin(source.tile_kernel, arch, types, constants, aligned=even, **options)


def plans(problem: Problem, target: Target) -> list[kernel.Config]:
    """Every distinct plan over the usual range of m."""
    decode = [kernel.gemv_config(problem, m, target) for m in (1, 4)]
    return list(dict.fromkeys([*decode, *(kernel.config(problem, m, target) for m in (4, 16, 64, 512, 4096))]))


ARCHES = [(80, "W8A8")] + [(arch, s) for arch in (89, 90, 100, 120) for s in ("FP8_DYNAMIC", "W8A8", "FP8_BLOCK")]


@needs_triton
@pytest.mark.parametrize("arch, spec", [*ARCHES, (89, "FP8_E5M2_DYNAMIC"), (90, "FP8_E5M2_DYNAMIC")])
def test_cubin(arch: int, spec: str) -> None:
    """Every plan of a shape compiles for the arch, within its shared memory."""
    target = Target.fake(f"sm{arch}")
    problem = Problem(parse(spec), 6144, 4096, torch.bfloat16, True)
    assert isinstance(kernel.fit(problem, 16, target), Rank)
    for plan in plans(problem, target):
        built = compile_plan(plan, problem, arch)
        assert built.asm["cubin"], plan
        assert built.metadata.shared <= SHARED_LIMIT[arch] * 1024, plan


@needs_triton
def test_cubin_of_ragged_k_and_long_k() -> None:
    ragged = Problem(parse("W8A8"), 70, 301, torch.bfloat16, True)
    long = Problem(parse("FP8_DYNAMIC"), 8192, 28672, torch.bfloat16, True)
    target = Target.fake("sm90")
    for plan in plans(ragged, target):
        assert compile_plan(plan, ragged, 90, even=False).asm["cubin"]
    for plan in plans(long, target):
        assert compile_plan(plan, long, 90).asm["cubin"]


@needs_triton
def test_hopper_uses_its_tensor_cores_and_wide_loads() -> None:
    """What the plans are made for: wgmma fed from shared memory, 16-byte loads, dp4a, descriptors."""
    problem = Problem(parse("FP8_DYNAMIC"), 6144, 4096, torch.bfloat16, True)
    tall = compile_plan(kernel.config(problem, 64, SM90), problem, 90).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3" in tall
    assert "cp.async.cg.shared.global" in tall
    wide = compile_plan(kernel.config(problem, 4096, SM90), problem, 90).asm["ptx"]
    assert "cp.async.bulk.tensor.2d" in wide and "wgmma" in wide
    gemv = compile_plan(kernel.gemv_config(problem, 1, SM90), problem, 90).asm["ptx"]
    assert "v4.b32" in gemv and "cvt.rn.f16x2.e4m3x2" in gemv
    integers = Problem(parse("W8A8"), 6144, 4096, torch.bfloat16, True)
    assert "dp4a.s32.s32" in compile_plan(kernel.gemv_config(integers, 1, SM90), integers, 90).asm["ptx"]


@needs_triton
@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "W8A8", "FP8_BLOCK"])
def test_early_start_reads_nothing_before_its_inputs_are_ready(spec: str) -> None:
    """Under programmatic dependent launch, only prefetches may come before the wait; without it there is no wait."""
    problem = Problem(parse(spec), 6144, 4096, torch.bfloat16, True)
    for plan in (kernel.gemv_config(problem, 1, SM90), *(kernel.config(problem, m, SM90) for m in (16, 64))):
        assert "griddepcontrol" not in compile_plan(plan, problem, 90).asm["ptx"]
        ptx = compile_plan(replace(plan, pdl=True), problem, 90).asm["ptx"]
        before, wait, after = ptx.partition("griddepcontrol.wait")
        assert wait and "prefetch.global.L2" in before and "griddepcontrol.launch_dependents" in after
        assert not any(access in before for access in ("ld.global", "st.global", "cp.async"))


@needs_triton
def test_reduce_cubin() -> None:
    from quant_compile.lowering.kernels.scaled import _triton_scaled_mm as source

    types = {"parts_ptr": "*fp32", "sx_ptr": "*fp32", "sw_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= {name: "i32" for name in ("m", "n", "sx_row", "sw_row")}
    constants = {"SPLIT": 4, "BLOCK": 512, "SCALED": True, "HAS_BIAS": True}
    for arch in (80, 90, 120):
        assert compile_cubin(source.reduce_kernel, arch, types, constants).asm["cubin"]


def problem_of(spec: str, n: int = 64, k: int = 128, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(parse(spec), n, k, dtype)


@pytest.mark.parametrize(
    "spec, target, reason",
    [
        ("FP8_DYNAMIC", Target.fake("cpu"), "needs a CUDA GPU"),
        ("FP8_DYNAMIC", Target.fake("sm90", FAKE_OPS - {"triton"}), "triton is not installed"),
        ("FP8_DYNAMIC", Target.fake("sm80"), "fp8 needs sm89 or newer, this is sm80"),
        ("FP8_BLOCK", Target.fake("sm80"), "fp8_block needs sm89 or newer, this is sm80"),
        ("W4A16", SM90, "multiplies 8-bit inputs by 8-bit weights, not W4A16"),
        ("fp8e4m3.channel+16", SM90, "16-bit inputs are not multiplied by 8-bit weights here"),
        ("fp8e4m3.block128x48+fp8e4m3.group48.dynamic", SM90, "blocks must have 32, 64 or a multiple of 128 columns"),
    ],
)
def test_refusals(spec: str, target: Target, reason: str) -> None:
    for fit in (kernel.fit, kernel.fit_gemv):
        answer = fit(problem_of(spec), 1, target)
        assert isinstance(answer, Reject) and reason in answer.reason


def test_refusal_of_dtype_and_of_m() -> None:
    answer = kernel.fit(problem_of("W8A8", dtype=torch.float64), 1, SM90)
    assert isinstance(answer, Reject) and "float64" in answer.reason
    answer = kernel.fit_gemv(problem_of("W8A8"), 5, SM90)
    assert isinstance(answer, Reject) and answer.reason == "serves at most 4 tokens, got 5"


def test_int8_runs_on_sm80() -> None:
    assert isinstance(kernel.fit(problem_of("W8A8"), 1, Target.fake("sm80")), Rank)


def test_costs_grow_with_work_and_prefer_gemv_for_one_token() -> None:
    problem = problem_of("FP8_DYNAMIC", 6144, 4096)
    costs = [kernel.fit(problem, m, SM90) for m in (1, 64, 512, 4096)]
    values = [answer.cost for answer in costs if isinstance(answer, Rank)]
    assert len(values) == 4 and values == sorted(values) and values[3] > 100
    gemv = kernel.fit_gemv(problem, 1, SM90)
    assert isinstance(gemv, Rank) and 5.9 < gemv.cost < values[0]


@pytest.mark.parametrize("spec", SCHEMES)
@pytest.mark.parametrize("arch", (80, 89, 90, 100, 120))
def test_configs_are_legal(spec: str, arch: int) -> None:
    """Powers of two, tokens covered, one group per step, pipelines within shared memory, descriptors only if legal."""
    target = Target.fake(f"sm{arch}")
    for n, k in ((6144, 4096), (28672, 4096), (8192, 28672), (70, 300), (1, 1)):
        problem = problem_of(spec, n, k)
        for m in (1, 3, 16, 17, 64, 100, 128, 129, 4096):
            plan = kernel.config(problem, m, target)
            sizes = (plan.block_m, plan.block_n, plan.block_k, plan.warps)
            assert all(size & (size - 1) == 0 for size in sizes), plan
            assert plan.kind == "wide" or plan.block_m >= m
            assert spec != "FP8_BLOCK" or 128 % plan.block_k == 0
            assert not plan.tma or (arch >= 90 and k % 16 == 0)
            per_step = (plan.block_m + plan.block_n) * plan.block_k * (plan.warps if plan.kind == "slices" else 1)
            assert plan.stages * per_step <= SHARED_LIMIT[arch] * 1024, plan
        gemv = kernel.gemv_config(problem, 1, target)
        assert kernel.groups(problem)[0] % gemv.block_n == 0


def test_split_k_fills_a_device_with_few_tiles() -> None:
    assert kernel.config(problem_of("FP8_DYNAMIC", 4096, 14336), 64, SM90).split > 1
    assert kernel.config(problem_of("FP8_DYNAMIC", 28672, 4096), 64, SM90).split == 1
