"""Kernels for FP4 weights under 16-bit inputs: refusals, the interpreter against the family's linear, cubins per arch."""

from __future__ import annotations

import itertools

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.fp4 import triton_fp4a16 as a16
from quant_compile.lowering.registry import Problem, Rank
from quant_compile.lowering.schemes import fp4
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

SPECS = ("NVFP4A16", "MXFP4A16")
SHAPES = ((64, 256), (36, 208), (7, 33), (1, 7), (5, 1056))
# f32 sums in another order; f16 rounds weights (which are exact there) and the result once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
H200 = Target.fake("sm90")


def problem_of(spec: str, n: int, k: int, dtype: torch.dtype = torch.float16, has_bias: bool = False) -> Problem:
    return Problem(parse(spec), n, k, dtype, has_bias)


def weights(problem: Problem, seed: int = 0) -> Planes:
    """Row-form planes of random weights of different sizes by column, so that scales differ."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(problem.n, problem.k, generator=generator) * torch.linspace(0.002, 0.2, problem.k)
    return family_of(problem.scheme).quantize_weight(w.to(problem.dtype), problem.scheme)


# --- fit ---

FITS = (a16.fit_gemv, a16.fit_matmul, a16.fit_dequant)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("spec", SPECS)
def test_refusals(fit, spec: str) -> None:
    problem = problem_of(spec, 64, 128)
    assert all(isinstance(fit(problem, 1, Target.fake(f"sm{arch}")), Rank) for arch in (80, 89, 90, 100, 120))
    for other, target, words in (
        (problem, Target.fake("cpu"), "GPU"),
        (problem, Target("cuda", 75, 40, "fake", FAKE_OPS), "sm80"),
        (problem, Target.fake("sm90", frozenset()), "triton"),
        (problem_of("W4A16", 64, 128), H200, "FP4 weights with 16-bit inputs, not W4A16"),
        (problem_of(spec.removesuffix("A16"), 64, 128), H200, "16-bit inputs"),
        (problem_of("fp4e2m1.group16+16", 64, 128), H200, "tensor_group of 16"),
        (problem_of(spec, 64, 128, torch.float64), H200, "float64"),
    ):
        answer = fit(other, 1, target)
        assert isinstance(answer, Reject) and words in answer.reason, (answer, words)


def test_ranges_of_m() -> None:
    problem, wide = problem_of("NVFP4A16", 4096, 4096), problem_of("NVFP4A16", 4096, 4096, torch.float32)
    assert "at most 2 rows" in a16.fit_gemv(problem, 3, H200).reason
    assert "at most 128 rows" in a16.fit_matmul(problem, 129, H200).reason
    assert "TF32" in a16.fit_matmul(wide, 4, H200).reason
    assert all(isinstance(a16.fit_dequant(wide, m, H200), Rank) for m in (1, 7, 5000))


@pytest.mark.parametrize("spec", SPECS)
def test_costs_follow_the_rows(spec: str) -> None:
    """One row: no tensor cores. 16 and 64: decoded in registers. Thousands: the copy."""
    problem = problem_of(spec, 28672, 4096, torch.bfloat16)
    best = {}
    for m in (1, 2, 4, 16, 4096):
        ranks = {kernel.name: kernel.fit(problem, m, H200) for kernel in a16.KERNELS}
        best[m] = min((rank.cost, name) for name, rank in ranks.items() if isinstance(rank, Rank))[1]
    gemv, matmul, dequant = (kernel.name for kernel in a16.KERNELS)
    assert best == {1: gemv, 2: gemv, 4: matmul, 16: matmul, 4096: dequant}


@pytest.mark.parametrize(
    ("k", "words"), [(4096, 256), (28672, 256), (2048, 256), (7168, 128), (100, 128), (11008, 256)]
)
def test_steps_of_the_gemv(k: int, words: int) -> None:
    """Steps divide rows where 256 words can, and long rows take such steps anyway; two rows of x take small ones."""
    plan = a16.gemv_plan(problem_of("NVFP4A16", 4096, k), 1, 132)
    assert plan.words == words and plan.warps * 128 == words
    assert a16.gemv_plan(problem_of("NVFP4A16", 4096, k), 2, 132).words == 128


# --- kernels in the interpreter ---


def check(got: torch.Tensor, reference: torch.Tensor, what: object) -> None:
    error = ((got.float() - reference.float()).norm() / reference.float().norm()).item()
    assert got.dtype == reference.dtype and got.shape == reference.shape, what
    assert error <= TOLERANCE[got.dtype], f"{what}: relative error {error:.2e}"


def check_kernels(spec: str) -> None:
    """Every kernel over odd shapes; f32 for exactness, 16 bits for the other paths (dots of bf16 are garbage here)."""
    for (n, k), dtype in itertools.product(SHAPES, TOLERANCE):
        problem = problem_of(spec, n, k, dtype, has_bias=True)
        planes = weights(problem)
        bias = torch.randn(n).to(dtype)
        runs = ((1, a16.run_gemv), (3, a16.run_gemv), (4, a16.run_gemv), (19, a16.run_matmul), (3, a16.run_dequant))
        for m, run in runs:
            if dtype != torch.float16 and run is a16.run_gemv and m != 3:
                continue  # how many rows a program takes does not depend on the dtype
            if (dtype == torch.float32 and run is a16.run_matmul) or (
                dtype == torch.bfloat16 and run is not a16.run_gemv
            ):
                continue
            x = torch.randn(m, k).to(dtype)
            reference = family_of(problem.scheme).linear((x,), planes, bias, problem.scheme, torch.float32)
            if dtype == torch.bfloat16:  # the interpreter cuts f32 off where a GPU rounds
                reference = (reference.view(torch.int32) & -(1 << 16)).view(torch.float32)
            check(run((x,), planes, bias, problem), reference.to(dtype), (spec, n, k, m, dtype, run.__name__))


def check_plans(spec: str) -> None:
    """What the heuristics pick on large shapes, on a small one: several steps, split k, no bias."""
    problem = problem_of(spec, 130, 2048)
    planes = weights(problem)
    x = torch.randn(70, 2048).half()
    reference = family_of(problem.scheme).linear((x,), planes, None, problem.scheme, torch.float16)
    for plan in (a16.MatmulPlan(64, 64, 32, 4, 4, 3), a16.MatmulPlan(128, 128, 32, 8, 3, 1)):
        check(a16.run_matmul((x,), planes, None, problem, plan), reference, (spec, plan))
    for plan in (a16.GemvPlan(4, 128, 1), a16.GemvPlan(8, 256, 2)):
        check(a16.run_gemv((x[:2],), planes, None, problem, plan), reference[:2], (spec, plan))


def check_misaligned() -> None:
    """x that starts at an odd element cannot be read in words of four; planes that start within 16 bytes, as slices do."""
    problem = problem_of("NVFP4A16", 9, 80)
    planes = tuple(plane[1:] for plane in weights(problem_of("NVFP4A16", 10, 80)))
    x = torch.randn(161).half()[1:].reshape(2, 80)
    reference = family_of(problem.scheme).linear((x,), planes, None, problem.scheme, torch.float16)
    for run in (a16.run_gemv, a16.run_matmul):
        check(run((x,), planes, None, problem), reference, ("misaligned", run.__name__))
    row = torch.randn(1, 82).half()[:, :80]  # a row of a wider matrix is contiguous, whatever its stride
    reference = family_of(problem.scheme).linear((row,), planes, None, problem.scheme, torch.float16)
    check(a16.run_gemv((row,), planes, None, problem), reference, "one row of a wider matrix")


def check_special() -> None:
    """All sixteen codes under all 256 scale bytes, bit for bit; NaN scales and inf inputs surface as in the reference."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 2)
    for spec, copies in (("NVFP4A16", 2), ("MXFP4A16", 1)):
        problem = problem_of(spec, 256, 32, torch.float32)
        scale = torch.arange(256).to(torch.uint8)[:, None].repeat(1, copies)
        planes: Planes = (fp4.pack_codes(codes), scale)
        if spec == "NVFP4A16":
            planes = (planes[0], scale.view(torch.float8_e4m3fn), torch.full((256, 1), 0.37))
        family = family_of(problem.scheme)
        wanted = family.dequantize_weight(planes, problem.scheme, 32)
        got = a16.dequantize(planes, problem)
        assert torch.equal(got.isnan(), wanted.isnan()) and wanted.isnan().any()
        assert torch.allclose(got, wanted, rtol=2e-7, atol=0, equal_nan=True)
        x = torch.randn(1, 32)
        x[0, 3] = float("inf")
        y, reference = (
            a16.run_gemv((x,), planes, None, problem),
            family.linear((x,), planes, None, problem.scheme, torch.float32),
        )
        assert torch.equal(torch.isfinite(y), torch.isfinite(reference)) and not torch.isfinite(y).any()


@needs_triton
@pytest.mark.parametrize("function", ["check_kernels", "check_plans"])
@pytest.mark.parametrize("spec", SPECS)
def test_in_interpreter(function: str, spec: str) -> None:
    run_interpreted(__name__, function, spec)


@needs_triton
@pytest.mark.parametrize("function", ["check_special", "check_misaligned"])
def test_special_cases_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


# --- cubins ---

SIZES = dict.fromkeys(("m", "n", "k", "units", "width", "bytes_per_split"), "i32")
POINTERS = {"x_ptr": "*bf16", "s_ptr": "*u8", "y_ptr": "*bf16", "out_ptr": "*bf16", "global_ptr": "*fp32"}


def types_of(kernel, e8m0: bool, **pointers: str) -> dict[str, str]:
    all_types = SIZES | POINTERS | pointers
    return {
        name: kind for name, kind in all_types.items() if name in kernel.arg_names and not (e8m0 and "global" in name)
    }


@needs_triton
@pytest.mark.parametrize(
    ("arch", "e8m0"), [*((arch, False) for arch in (80, 89, 90, 100, 120)), (80, True), (90, True)]
)
def test_cubins(arch: int, e8m0: bool) -> None:
    import triton.language as tl

    from quant_compile.lowering.kernels.fp4 import _triton_fp4a16 as kernels

    none = {"bias_ptr": None} | ({"global_ptr": None} if e8m0 else {})
    shared = {"E8M0": e8m0, "EVEN": True, "OUT": tl.bfloat16}
    group = 16 if e8m0 else 8
    for m, rows in ((1, 4), (4, 2)):
        gemv = {"M": m, "BN": rows, "WORDS": 512, "LANES": 4, "X64": True, "BF16": True, "VECTOR": group // 4}
        kernel = kernels.gemv_fp4_kernel
        done = compile_cubin(
            kernel, arch, types_of(kernel, e8m0, w_ptr="*i32", x_ptr="*i64"), none | shared | gemv, num_warps=4
        )
        # The design: one 16-byte load of each row a step, nothing but last sums through shared memory, and
        # multiplications that keep subnormals, on which decoding rests.
        loads = [line for line in done.asm["ptx"].splitlines() if "ld.global.L1::evict_first" in line]
        assert len(loads) == rows and all(".v4.b32" in line for line in loads)
        assert done.metadata.shared <= 64
        assert ".ftz" not in done.asm["ptx"]
    problem = problem_of("MXFP4A16" if e8m0 else "NVFP4A16", 6144, 4096, torch.bfloat16)
    for m in (5, 50, 300):
        plan = a16.matmul_plan(problem, m, 132)
        tile = {"BM": plan.block_m, "BN": plan.block_n, "BYTES": plan.block_bytes, "GROUP": group, "SPLIT": False}
        kernel = kernels.matmul_fp4_kernel
        done = compile_cubin(
            kernel, arch, types_of(kernel, e8m0, w_ptr="*u8"), none | shared | tile,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        assert any(word in done.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
        assert ".ftz" not in done.asm["ptx"]
        assert done.metadata.shared <= 99 * 1024  # the smallest limit of the arches, sm89's and sm120's
    kernel = kernels.dequantize_fp4_kernel
    constants = {k: v for k, v in (none | shared).items() if k != "bias_ptr"} | {"BN": 8, "BYTES": 256, "GROUP": group}
    done = compile_cubin(kernel, arch, types_of(kernel, e8m0, w_ptr="*u8"), constants)
    assert ".ftz" not in done.asm["ptx"]
