"""Kernels for GGUF weights: the layout, refusals and choices, the interpreter against the family's linear, cubins per arch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.errors import NoKernelError
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.ggml.encode import encode
from quant_compile.ir.ggml.types import TYPES
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.gguf import sgl_gguf as sgl
from quant_compile.lowering.kernels.gguf import torch_gguf
from quant_compile.lowering.kernels.gguf import triton_gguf as gg
from quant_compile.lowering.kernels.gguf import triton_gguf_mxfp4 as mxfp4
from quant_compile.lowering.registry import Problem, Rank
from quant_compile.lowering.select import Request, choose, fits
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.library_schemas import through_schema
from tests.lowering.triton_support import compile_cubin, mend_bfloat16, needs_triton, run_interpreted, stack_bytes

NAMES = tuple(gg.FORMS)
# f32 sums in another order; 16 bits round weights and the result, and errors of the few sums of small shapes do not average out.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
H200 = Target.fake("sm90")
ARCHES = (80, 89, 90, 100, 120)


def problem_of(name: str, n: int, k: int, dtype: torch.dtype = torch.float16, has_bias: bool = False) -> Problem:
    return Problem(parse(f"GGUF_{name.upper()}"), n, k, dtype, has_bias)


def half(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float16).view(torch.uint8)


SCALES = {"q8_0": (0,), "q4_0": (0,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
"""Where the f16 of a block stand."""


def blocks(name: str, n: int, k: int, seed: int = 0) -> Tensor:
    """Random bytes with scales of ordinary sizes; some zero, negative or large."""
    generator = torch.Generator().manual_seed(seed)
    kind = TYPES[name]
    b = torch.randint(0, 256, (n, k // kind.size, kind.nbytes), generator=generator).to(torch.uint8)
    for place in SCALES[name]:
        d = torch.randn(b.shape[:2], generator=generator) * 0.01
        d[torch.rand(b.shape[:2], generator=generator) < 0.1] = 0
        b[..., place : place + 2] = d.half().unsqueeze(-1).view(torch.uint8)
    # The first block of the first row has every code and six-bit field at its end.
    body = torch.full((kind.nbytes,), 255, dtype=torch.uint8)
    for place in SCALES[name]:
        body[place : place + 2] = half(0.02)
    b[0, 0] = body
    return b.flatten(1)


def packed(problem: Problem, seed: int = 0) -> tuple[Planes, Planes]:
    """(blocks, gguf_planes)."""
    own = (blocks(problem.scheme.weights.format or "", problem.n, problem.k, seed),)
    return own, gg.pack(own, problem)


# --- layout ---


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_exact_and_as_it_says(name: str) -> None:
    problem = problem_of(name, 5, 768)
    generator = torch.Generator().manual_seed(1)
    size = 768 // TYPES[name].size * TYPES[name].nbytes
    for own in (torch.randint(0, 256, (5, size), generator=generator).to(torch.uint8), blocks(name, 5, 768)):
        planes = gg.pack((own,), problem)
        assert torch.equal(gg.unpack(planes, problem)[0], own)
        specs = gg.planes(problem)
        assert [(tuple(p.shape), p.dtype) for p in planes] == [(s.shape, s.dtype) for s in specs]
        stored = sum(p.numel() * p.element_size() for p in planes) * 8 / (5 * 768)
        assert stored == pytest.approx(gg.FORMS[name].stored)
        rows = gg.pack((own[1:3],), problem_of(name, 2, 768))
        assert all(
            torch.equal(a.view(torch.uint8), b[1:3].view(torch.uint8)) for a, b in zip(rows, planes, strict=True)
        )


# --- fit ---

FITS = (gg.fit_gemv, gg.fit_matmul, gg.fit_dequant)


@pytest.mark.parametrize("fit", FITS)
def test_refusals(fit) -> None:
    problem = problem_of("q4_k", 64, 256)
    assert all(isinstance(fit(problem, 1, Target.fake(f"sm{arch}")), Rank) for arch in ARCHES)
    for other, target, words in (
        (problem, Target.fake("cpu"), "GPU"),
        (problem, Target("cuda", 75, 40, "fake", FAKE_OPS), "sm80"),
        (problem, Target.fake("sm90", frozenset()), "triton"),
        (Problem(parse("W4A16"), 64, 256, torch.float16), H200, "GGUF"),
        (problem_of("q2_k", 64, 256), H200, "Q4_K"),
    ):
        answer = fit(other, 1, target)
        assert isinstance(answer, Reject) and words in answer.reason, (answer, words)


def test_ranges_of_m_and_dtypes() -> None:
    problem, wide = problem_of("q4_k", 4096, 4096), problem_of("q4_k", 4096, 4096, torch.float32)
    assert "at most 2 rows" in gg.fit_gemv(problem, 3, H200).reason
    assert "at most 128 rows" in gg.fit_matmul(problem, 129, H200).reason
    assert "float32" in gg.fit_gemv(wide, 1, H200).reason and "float32" in gg.fit_matmul(wide, 4, H200).reason
    assert all(isinstance(gg.fit_dequant(wide, m, H200), Rank) for m in (1, 7, 5000))


@pytest.mark.parametrize("name", NAMES)
def test_selection_follows_the_rows(name: str) -> None:
    """One row: no tensor cores. 16 and 64: decoded in registers. Thousands: the copy."""
    dispatch = choose(problem_of(name, 28672, 4096, torch.bfloat16), Target.fake("sm90", frozenset({"triton"})))
    names = {m: dispatch.kernel_for(m).name for m in (1, 2, 4, 16, 64, 1024, 4096)}
    assert dispatch.layout == "gguf_planes"
    gemv, matmul, dequant = (kernel.name for kernel in gg.KERNELS)
    assert names == {1: gemv, 2: gemv, 4: matmul, 16: matmul, 64: matmul, 1024: dequant, 4096: dequant}


@pytest.mark.parametrize(
    ("name", "n", "k", "rows", "warps"),
    [
        ("q4_k", 28672, 4096, 8, 1), ("q6_k", 28672, 4096, 4, 1), ("q4_k", 6144, 4096, 4, 1), ("q4_k", 4096, 4096, 4, 2),
        ("q4_k", 8192, 28672, 4, 1), ("q4_k", 1024, 4096, 2, 4), ("q4_k", 1024, 1024, 4, 1),
    ],
)  # fmt: skip
def test_programs_of_the_gemv(name: str, n: int, k: int, rows: int, warps: int) -> None:
    """Few rows leave less work to share; warps that share a row need 1024 columns each."""
    assert gg.gemv_plan(problem_of(name, n, k), 1, 132) == gg.GemvPlan(rows, 32 * warps, warps)


# --- kernels in the interpreter ---


def check(got: Tensor, reference: Tensor, what: object) -> None:
    error = ((got.float() - reference.float()).norm() / reference.float().norm()).item()
    assert got.dtype == reference.dtype and got.shape == reference.shape, what
    assert error <= TOLERANCE[got.dtype], f"{what}: relative error {error:.2e}"


def check_kernels(name: str) -> None:
    """Every kernel over odd shapes (dots of bf16 are garbage here)."""
    mend_bfloat16()
    torch.manual_seed(0)
    for (n, k), dtype in itertools.product(((7, 512), (65, 256), (3, 1280), (1, 1024)), DTYPES):
        if n == 7 and TYPES[name].size == 32:
            k = 96
        problem = problem_of(name, n, k, dtype, has_bias=True)
        own, planes = packed(problem)
        bias = torch.randn(n).to(dtype)
        for m, run in ((1, gg.run_gemv), (2, gg.run_gemv), (19, gg.run_matmul), (3, gg.run_dequant)):
            if (run is gg.run_matmul and dtype == torch.bfloat16) or (
                run is not gg.run_dequant and dtype == torch.float32
            ):
                continue
            if run is gg.run_dequant and dtype == torch.bfloat16 and n == 1:
                continue  # rounding errors of three sums do not average out
            x = torch.randn(m, k).to(dtype)
            reference = family_of(problem.scheme).linear((x,), own, bias, problem.scheme, dtype)
            check(run((x,), planes, bias, problem), reference, (name, n, k, m, dtype, run.__name__))


DTYPES = tuple(TOLERANCE)


def check_plans(name: str) -> None:
    """What the heuristics pick on large shapes, on a small one: several steps, split k, no bias."""
    torch.manual_seed(0)
    problem = problem_of(name, 130, 2048)
    own, planes = packed(problem)
    x = torch.randn(70, 2048).half()
    reference = family_of(problem.scheme).linear((x,), own, None, problem.scheme, torch.float16)
    for plan in (gg.MatmulPlan(16, 64, 4, 4, 4, 3), gg.MatmulPlan(64, 128, 2, 4, 3, 1)):
        check(gg.run_matmul((x,), planes, None, problem, plan), reference, (name, plan))
    for plan in (gg.GemvPlan(8, 32, 1), gg.GemvPlan(2, 64, 2)):
        check(gg.run_gemv((x[:2],), planes, None, problem, plan), reference[:2], (name, plan))


def check_weights(name: str) -> None:
    """The copy in f32 is the decoded weight, for any bytes; what is not finite is so in every kernel's result."""
    problem = problem_of(name, 4, 1024, torch.float32)
    generator = torch.Generator().manual_seed(2)
    size = 1024 // TYPES[name].size * TYPES[name].nbytes
    own = (torch.randint(0, 256, (4, size), generator=generator).to(torch.uint8),)
    own[0][3] = blocks(name, 1, 1024)[0]
    place = TYPES[name].nbytes + SCALES[name][0]
    own[0][0, place : place + 2] = half(float("inf"))
    wanted = family_of(problem.scheme).dequantize_weight(own, problem.scheme, 1024)
    planes = gg.pack(own, problem)
    got = gg.dequantize(planes, problem)
    finite = wanted.isfinite()
    assert torch.equal(got.isfinite(), finite) and not finite.all() and finite.any()
    # A minimum is taken off in one rounding or two.
    assert torch.allclose(got[finite], wanted[finite], rtol=1e-6, atol=1e-6 * wanted[finite].abs().max().item())
    sixteen = problem_of(name, 4, 1024)
    x = torch.randn(2, 1024).half()
    for run in (gg.run_gemv, gg.run_matmul):
        y = run((x,), planes, None, sixteen)
        assert torch.equal(y[:, 3].isfinite(), torch.ones(2, dtype=torch.bool))
        assert not y[:, ~finite.all(1)].isfinite().any(), run.__name__


def check_misaligned() -> None:
    """x that starts at an odd element; planes that are slices of rows."""
    problem = problem_of("q4_k", 9, 512)
    own, planes = packed(problem_of("q4_k", 10, 512))
    own, planes = tuple(p[1:] for p in own), tuple(p[1:] for p in planes)
    x = torch.randn(1025).half()[1:].reshape(2, 512)
    reference = family_of(problem.scheme).linear((x,), own, None, problem.scheme, torch.float16)
    for run in (gg.run_gemv, gg.run_matmul):
        check(run((x,), planes, None, problem), reference, ("misaligned", run.__name__))


@needs_triton
@pytest.mark.parametrize("function", ["check_kernels", "check_plans", "check_weights"])
@pytest.mark.parametrize("name", NAMES)
def test_in_interpreter(function: str, name: str) -> None:
    run_interpreted(__name__, function, name)


@needs_triton
def test_misaligned_in_interpreter() -> None:
    run_interpreted(__name__, "check_misaligned")


# --- cubins ---

POINTERS = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*bf16", "w_ptr": "*u8", "h_ptr": "*u8"}
SIZES = dict.fromkeys(("m", "n", "groups", "groups_per_split", "near", "far", "byte", "zero"), "i32")


def types_of(kernel, name: str, dtype: str = "bf16") -> dict[str, str]:
    kind = gg.FORMS[name].kind
    own = {"s_ptr": "*fp16" if kind == "half" else "*i8", "d_ptr": "*fp16"}
    if name == "q8_0":
        own |= {"w_ptr": "*i8", "h_ptr": "*i8"}
    everything = POINTERS | SIZES | own | {key: f"*{dtype}" for key in ("x_ptr", "y_ptr", "out_ptr")}
    return {key: value for key, value in everything.items() if key in kernel.arg_names}


@needs_triton
@pytest.mark.parametrize(
    ("arch", "name"), [*((90, name) for name in NAMES), *((arch, "q4_k") for arch in ARCHES if arch != 90)]
)
def test_cubins(arch: int, name: str, tmp_path) -> None:
    import triton.language as tl

    from quant_compile.lowering.kernels.gguf import _triton_gguf as kernels

    form, problem = gg.FORMS[name], problem_of(name, 28672, 4096, torch.bfloat16)
    shared = {"bias_ptr": None, "OUT": tl.bfloat16, "EVEN": True, **form.constants}
    kernel = kernels.gemv_kernel
    for m in (1, 2):
        plan = gg.gemv_plan(problem, m, 132)
        gemv = {"M": m, "BN": plan.rows, "G": plan.groups, "BF16": True}
        done = compile_cubin(kernel, arch, types_of(kernel, name), shared | gemv, num_warps=plan.warps)
        # The design: 16-byte loads of each row a step, nothing but last sums through shared memory, no spills.
        loads = [line for line in done.asm["ptx"].splitlines() if "ld.global.L1::evict_first" in line]
        wide = [line for line in loads if ".v4.b32" in line]
        assert len(wide) == plan.rows * (2 if name == "q8_0" else 1), loads
        assert done.metadata.shared <= 128 and stack_bytes(done, tmp_path) == 0
    kernel = kernels.matmul_kernel
    for m in (5, 20, 50, 100):
        plan = gg.matmul_plan(problem, m, Target.fake(f"sm{arch}"))
        tile = {"BM": plan.block_m, "BN": plan.block_n, "G": plan.groups, "SPLIT": False, "ASM": True}
        tile["PLACED"] = name != "q8_0"
        done = compile_cubin(
            kernel, arch, types_of(kernel, name), shared | tile, num_warps=plan.warps, num_stages=plan.stages
        )
        assert any(word in done.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
        assert done.metadata.shared <= (99 if arch in (89, 120) else 163) * 1024  # 227 KiB on sm90 and sm100
        assert stack_bytes(done, tmp_path) == 0, (m, plan)
    kernel = kernels.dequantize_kernel
    constants = form.constants | {"BN": 4, "G": 32, "OUT": tl.bfloat16, "ASM": True}
    compile_cubin(kernel, arch, types_of(kernel, name), constants, num_warps=2)


# --- MXFP4 ---


def check_mxfp4() -> None:
    """Kernels of MXFP4A16 over GGUF's blocks, any bytes but scales of NaN."""
    problem = problem_of("mxfp4", 9, 96, torch.float32)
    generator = torch.Generator().manual_seed(0)
    own = torch.randint(0, 256, (9, 3, 17), generator=generator).to(torch.uint8)
    own[..., 0] = torch.randint(100, 140, (9, 3), generator=generator).to(torch.uint8)
    planes = mxfp4.pack((own.flatten(1),), problem)
    x = torch.randn(2, 96)
    reference = family_of(problem.scheme).linear((x,), (own.flatten(1),), None, problem.scheme, torch.float32)
    gemv, _, dequant = mxfp4.KERNELS
    for kernel in (gemv, dequant):
        check(kernel.run((x,), planes, None, problem), reference, kernel.name)


@needs_triton
def test_mxfp4_in_interpreter() -> None:
    run_interpreted(__name__, "check_mxfp4")


def test_mxfp4_is_that_of_the_other_family() -> None:
    """The same planes as a weight that MXFP4A16 stores, back to the same blocks, and the same choice."""
    problem = problem_of("mxfp4", 7, 128, torch.bfloat16)
    own = torch.randint(0, 256, (7, 4 * 17), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    planes = mxfp4.pack((own,), problem)
    assert torch.equal(mxfp4.unpack(planes, problem)[0], own)
    other = mxfp4.same_numbers(problem)
    assert [(tuple(p.shape), p.dtype) for p in planes] == [(s.shape, s.dtype) for s in mxfp4.planes(problem)]
    usual = planes[1] < 255
    wanted = family_of(problem.scheme).dequantize_weight((own,), problem.scheme, 128)
    got = family_of(other.scheme).dequantize_weight(planes, other.scheme, 128)
    assert torch.equal(got.view(7, 4, 32)[usual], wanted.view(7, 4, 32)[usual])
    dispatch = choose(problem, Target.fake("sm90", frozenset({"triton"})))
    assert dispatch.layout == "gguf_mxfp4" and dispatch.kernel_for(1).name == "triton_gguf_mxfp4_gemv"
    assert isinstance(mxfp4.KERNELS[0].fit(problem_of("q4_k", 8, 256), 1, H200), Reject)


# --- other kernels: from blocks as they are ---


def rounded_q8_1(x: Tensor) -> Tensor:
    """x [m, k] as ggml's Q8_1 holds it, f32."""
    grouped = x.float().unflatten(-1, (-1, 32))
    amax = grouped.abs().amax(-1, keepdim=True)
    d = amax / 127
    codes = torch.where(amax > 0, (grouped / d).round(), 0.0)
    return (codes * d.half().float()).flatten(-2)


def test_library_ops_take_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments, through the library's own schemas: weights first, the type's number, and rows."""
    problem = problem_of("q4_k", 6, 512, torch.float16, has_bias=True)
    own, family = (blocks("q4_k", 6, 512),), family_of(problem.scheme)
    dense = family.dequantize_weight(own, problem.scheme, 512)

    def decoded(w: Tensor, kind: int, m: int, n: int, dtype: torch.dtype) -> Tensor:
        assert kind == 12 and torch.equal(w, own[0])
        return dense.reshape(m, n).to(dtype)

    def multiplied(w: Tensor, x: Tensor, kind: int, row: int) -> Tensor:
        assert kind == 12 and row == 6 and torch.equal(w, own[0])
        return (rounded_q8_1(x) @ dense.t()).to(x.dtype)

    ops = {"ggml_dequantize": decoded, "ggml_mul_mat_vec_a8": multiplied, "ggml_mul_mat_a8": multiplied}
    monkeypatch.setattr(sgl, "_op", lambda name: through_schema(name, ops[name]))
    bias = torch.randn(6).half()
    for m in (1, 5):
        x = torch.randn(m, 512).half()
        reference = family.linear((x,), own, bias, problem.scheme, torch.float16)
        check(sgl.run_dequant((x,), own, bias, problem), reference, "dequantized")
        rounded = family.linear((rounded_q8_1(x),), own, bias, problem.scheme, torch.float16)
        check(sgl.run_a8((x,), own, bias, problem), rounded, "rounded")


def test_what_rounds_inputs_runs_only_where_it_is_pinned() -> None:
    problem = problem_of("q4_k", 4096, 4096, torch.bfloat16)
    assert "Q8_1" in str(fits(problem, H200, Request(), 1)["sgl_gguf_a8"])
    pinned = choose(problem, H200, Request(kernels=(("GGUF_Q4_K", "sgl_gguf_a8"),)))
    assert pinned.layout == "rows" and {name for _, name in pinned.table} == {"sgl_gguf_a8"}
    assert isinstance(sgl.fit_a8(problem_of("iq4_xs", 256, 256), 1, H200), Reject)
    without = Target.fake("sm90", frozenset({"triton"}))
    assert "no ggml_mul_mat_a8" in sgl.fit_a8(problem, 1, without).reason


@pytest.mark.parametrize("name", ["q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "tq1_0", "tq2_0", "iq4_xs", "iq1_s"])
def test_types_without_a_kernel_of_their_own(name: str) -> None:
    """A copy by sgl-kernel, or by torch; types with tables have none without the library."""
    problem = problem_of(name, 4096, 4096, torch.bfloat16)
    table = {kernel for _, kernel in choose(problem, H200).table}
    assert table == ({"torch_gguf_dequant"} if name.startswith("tq") else {"sgl_gguf_dequant"})
    alone = Target.fake("sm90", frozenset({"triton"}))
    if name.startswith("iq"):
        with pytest.raises(NoKernelError, match="torch_gguf_dequant: decodes Q4_1"):
            choose(problem, alone)
    else:
        assert choose(problem, alone).ranges == "torch_gguf_dequant"


@pytest.mark.parametrize("name", torch_gguf.TYPES)
def test_copy_by_torch(name: str) -> None:
    problem = problem_of(name, 5, 512, torch.float32, has_bias=True)
    own = (encode(name, torch.randn(5, 512)),)
    x, bias = torch.randn(3, 512), torch.randn(5)
    reference = family_of(problem.scheme).linear((x,), own, bias, problem.scheme, torch.float32)
    check(torch_gguf.run((x,), own, bias, problem), reference, name)


# --- CPU ---


@pytest.mark.parametrize(
    ("name", "dtype", "chosen"),
    [
        ("q4_k", torch.bfloat16, "torch_cpu_gguf_int4pack"), ("q4_0", torch.bfloat16, "torch_cpu_gguf_int4pack"),
        ("q8_0", torch.bfloat16, "torch_cpu_gguf_q8"), ("q8_0", torch.float32, "torch_cpu_gguf_q8"),
        ("q4_k", torch.float32, "torch_cpu_gguf"), ("q6_k", torch.bfloat16, "torch_cpu_gguf"),
    ],
)  # fmt: skip
def test_choice_on_a_cpu(name: str, dtype: torch.dtype, chosen: str) -> None:
    """One token: never by decoding blocks where there is another way; results are those of test_library_kernels.py."""
    assert choose(problem_of(name, 4096, 4096, dtype), Target.fake("cpu")).kernel_for(1).name == chosen


# --- the packed decoding, which the interpreter does not run ---


def real(bits: int) -> float:
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def joined(high: int, low: int, dtype: torch.dtype) -> int:
    halves = torch.tensor([real(low), real(high)]).to(dtype).view(torch.int16).tolist()
    return (halves[0] & 0xFFFF) | (halves[1] & 0xFFFF) << 16


def permuted(a: int, b: int, selector: int) -> int:
    return sum(((a | b << 32) >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))


PTX: dict[str, Callable[..., int]] = {
    "lop3.b32": lambda a, b, c, table: {0xEA: (a & b) | c, 0x6A: (a & b) ^ c}[table],
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": permuted,
    "neg.f32": lambda a: a ^ 0x80000000,
    "mul.f32": lambda a, b: int(np.array([real(a) * real(b)], np.float32).view(np.uint32)[0]),
    "fma.rn.f32": lambda a, b, c: int(np.array([real(a) * real(b) + real(c)], np.float32).view(np.uint32)[0]),
    "cvt.rn.bf16x2.f32": lambda high, low: joined(high, low, torch.bfloat16),
    "cvt.rn.f16x2.f32": lambda high, low: joined(high, low, torch.float16),
}


def run_ptx(text: str, values: dict[str, int]) -> dict[str, int]:
    """The few PTX instructions of the decoding, on one thread's 32-bit registers."""
    for statement in text.strip("{} ").split(";"):
        words = statement.replace(",", " ").split()
        if words and words[0] != ".reg":
            op, to, *names = words
            numbers = [values[n] if n in values else int(n[2:], 16) if n[:2] == "0f" else int(n, 0) for n in names]
            values[to] = PTX[op](*numbers)
    return values


def registers(first: int, numbers: Sequence[float]) -> dict[str, int]:
    """f32 in registers from ``first`` on."""
    return {f"${first + i}": int(np.array([v], np.float32).view(np.uint32)[0]) for i, v in enumerate(numbers)}


def weights_in(values: dict[str, int], register: int, dtype: torch.dtype) -> Tensor:
    """Two weights of a register."""
    return torch.tensor([values[f"${register}"]], dtype=torch.int64).to(torch.int32).view(dtype).float()


def check_weights_of(
    found: Tensor, codes: Sequence[int], scale: float, minimum: float, dtype: torch.dtype, what: object
) -> None:
    """The weight rounded once, or, at a tie, its neighbour."""
    wanted = torch.tensor([code * float(scale) - float(minimum) for code in codes], dtype=torch.float64).float()
    assert torch.allclose(found, wanted, rtol=torch.finfo(dtype).eps, atol=1e-5), (what, found, wanted)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_packed_decoding_instruction_by_instruction(bits: int, dtype: torch.dtype) -> None:
    """Every place of all words, under random scales and minima, which differ by row."""
    from quant_compile.lowering.kernels.gguf import _triton_gguf as kernels

    text = getattr(kernels, f"{'BF16' if dtype == torch.bfloat16 else 'F16'}_{bits}_ASM").value
    random = np.random.default_rng(bits)
    for _ in range(50):
        words = [int(word) for word in random.integers(0, 1 << 32, 2)]
        scales, others = random.normal(size=2) * 0.01, abs(random.normal(size=2)) * 0.05
        scales, others = scales.astype(np.float32), others.astype(np.float32)
        by_word, by_other = [scales[0]] * 2 + [scales[1]] * 2, [others[0]] * 2 + [others[1]] * 2
        if bits == 8:
            values = run_ptx(text, {"$2": words[0]} | registers(3, by_word))
            for half in (0, 1):
                codes = [(words[0] >> 16 * half + 8 * e & 255 ^ 128) - 128 for e in (0, 1)]
                check_weights_of(weights_in(values, half, dtype), codes, scales[half], 0.0, dtype, half)
            continue
        if bits == 4:
            own = {"$4": words[0]} | registers(5, [scales[0]] * 2 + [others[0]] * 2)
        else:
            high = int(random.integers(0, 1 << 32))
            if bits == 5:  # both words of a register have the same byte
                high = high & 0x00FF00FF | (high & 0x00FF00FF) << 8
            own = {"$8": words[0], "$9": words[1], "$10": high} | registers(11, by_word) | registers(15, by_other)
        values = run_ptx(text, own)
        for half, j in itertools.product(range(1 if bits == 4 else 2), range(4)):
            codes = [words[half] >> 16 * e + 4 * j & 15 for e in (0, 1)]
            if bits == 5:
                codes = [code | (high >> 16 * half + 4 * e + j & 1) << 4 for e, code in enumerate(codes)]
            if bits == 6:
                codes = [(code | (high >> 16 * half + 8 * e + 2 * j & 3) << 4) - 32 for e, code in enumerate(codes)]
            scale, minimum = scales[half], others[half]
            if bits == 6:
                scale, minimum = (scale if j < 2 else others[half]), 0.0
            register = j if bits == 4 else 2 * j + half
            check_weights_of(weights_in(values, register, dtype), codes, scale, minimum, dtype, (half, j))
