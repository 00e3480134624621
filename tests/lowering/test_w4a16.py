"""Weight-only kernels: the layout's inverse, refusals, the interpreter against the reference, cubins per arch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Reject
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.weight_only import humming_w4a16, torch_int4
from quant_compile.lowering.kernels.weight_only import triton_w4a16 as w4
from quant_compile.lowering.registry import Problem, Rank, kernels
from quant_compile.lowering.schemes import fp8, weight_only
from quant_compile.lowering.select import choose
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

SPECS = (
    "W4A16",
    "W4A16_ASYM",
    "int4.group64+16",
    "int4.group64.asym+16",
    "int4.group32+16",
    "int4.group16.asym+16",
    "int4.group256+16",
    "int4.channel+16",
    "int4.channel.asym+16",
)
SHAPES = ((64, 256), (36, 202), (7, 33))
# f32 output: the codes' offset of 2048 costs 11 of 24 bits of one product. f16: one rounding of each weight and of y.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-3}
H200 = Target.fake("sm90")


def problem_of(spec: str, n: int, k: int, dtype: torch.dtype = torch.float16, has_bias: bool = False) -> Problem:
    return Problem(parse(spec), n, k, dtype, has_bias)


def weights(problem: Problem, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Row-form planes of random weights, off centre so that zero points differ from 8."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(problem.n, problem.k, generator=generator) * 0.05 + 0.02
    return weight_only.quantize_weight(w.to(problem.dtype), problem.scheme)


# --- layout ---


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    seed=st.integers(0, 5),
)
def test_tiles_unpack_to_what_was_packed(spec: str, n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    problem = problem_of(spec, n, k, dtype)
    rows = weights(problem, seed)
    packed = w4.pack_tiles(rows, problem)
    specs = w4.tile_planes(problem)
    assert [(tuple(p.shape), p.dtype) for p in packed] == [(s.shape, s.dtype) for s in specs]
    assert all(p.is_contiguous() for p in packed)
    back = w4.unpack_tiles(packed, problem)
    assert [(b.dtype, b.shape) for b in back] == [(r.dtype, r.shape) for r in rows]
    assert all(torch.equal(a, b) for a, b in zip(rows, back, strict=True))


def test_tile_order_is_the_documented_one() -> None:
    """Each code, scale and zero point where the module says it lies, computed one by one."""
    problem = problem_of("W4A16_ASYM", 128, 256, torch.bfloat16)
    rows = weights(problem)
    data, scale, zero, locks = w4.pack_tiles(rows, problem)
    codes = weight_only.unpack_nibbles(rows[0], problem.k)
    zeros = weight_only.unpack_nibbles(rows[2], 2)
    words = data.reshape(-1).tolist()
    for row, column in itertools.product((0, 1, 7, 8, 37, 64, 127), (0, 1, 2, 8, 15, 16, 131, 255)):
        t4, i4, i3 = row % 8, row // 8 % 2, row % 64 // 16
        tq, i6, i5 = column % 8 // 2, column % 2, column % 16 // 8
        word = words[column // 16 * 2 * 128 + row // 64 * 128 + (4 * t4 + tq) * 4 + i3]
        assert (word >> (4 * (i6 * 4 + i4 * 2 + i5))) & 15 == codes[row, column]
        place = row // 64 * 64 + t4 * 8 + i3 * 2 + i4
        assert scale[column // 128, place] == rows[1][row, column // 128]
        assert (int(zero[column // 128, place // 8]) >> (4 * (place % 8))) & 15 == zeros[row, column // 128]
    assert not locks.any()


def test_channel_scale_order() -> None:
    problem = problem_of("int4.channel+16", 64, 64)
    rows = weights(problem)
    scale = w4.pack_tiles(rows, problem)[1]
    for row in range(64):
        place = row // 32 * 32 + row // 2 % 4 * 8 + row // 8 % 4 * 2 + row % 2
        assert scale[0, place] == rows[1][row, 0]


def test_bytes_of_tiles() -> None:
    """4 bits a weight, 16 a group, 4 a zero point, and 8 KiB of locks."""
    problem = problem_of("W4A16_ASYM", 6144, 4096, torch.bfloat16)
    weights_count = 6144 * 4096
    expected = weights_count // 2 + weights_count // 128 * 2 + weights_count // 256 + 8192
    assert sum(spec.nbytes for spec in w4.tile_planes(problem)) == expected


# --- fit ---

TRITON_FITS = (w4.fit_gemv, w4.fit_matmul, w4.fit_dequant)


@pytest.mark.parametrize("fit", TRITON_FITS)
def test_triton_refusals(fit) -> None:
    problem = problem_of("W4A16", 64, 128)
    assert isinstance(fit(problem, 1, H200), Rank)
    for other, target, words in (
        (problem, Target.fake("cpu"), "GPU"),
        (problem, Target("cuda", 75, 40, "fake", FAKE_OPS), "sm80"),
        (problem, Target.fake("sm90", frozenset()), "triton"),
        (problem_of("W8A16", 64, 128), H200, "4-bit integer"),
        (problem_of("W8A8", 64, 128), H200, "4-bit integer"),
        (problem_of("W4A16", 64, 128, torch.float64), H200, "float64"),
    ):
        answer = fit(other, 1, target)
        assert isinstance(answer, Reject) and words in answer.reason, (answer, words)


def test_triton_ranges_of_m() -> None:
    problem, wide = problem_of("W4A16", 4096, 4096), problem_of("W4A16", 4096, 4096, torch.float32)
    assert isinstance(w4.fit_gemv(problem, 2, H200), Reject)
    assert isinstance(w4.fit_matmul(problem, w4.MATMUL_ROWS + 1, H200), Reject)
    assert "TF32" in w4.fit_matmul(wide, 4, H200).reason
    for m in (1, 7, 5000):
        assert isinstance(w4.fit_dequant(wide, m, H200), Rank)


def test_eight_bit_fits() -> None:
    problem = problem_of("W8A16", 100, 33)
    assert all(isinstance(f(problem, 1, H200), Rank) for f in (w4.fit_gemv8, w4.fit_matmul8, w4.fit_dequant8))
    assert "8-bit integer" in w4.fit_matmul8(problem_of("W4A16", 64, 128), 1, H200).reason


@pytest.mark.parametrize(
    ("problem", "target", "words"),
    [
        (problem_of("W4A16", 128, 256), Target.fake("sm90", frozenset({"triton"})), "humming is not installed"),
        (problem_of("W4A16", 128, 256), Target.fake("cpu"), "GPU"),
        (problem_of("W4A16", 100, 256), H200, "n must be a multiple of 128, got 100"),
        (problem_of("W4A16", 128, 192), H200, "k must be a multiple of 128, got 192"),
        (problem_of("int4.group256+16", 128, 256), H200, "group_size"),
        (problem_of("W4A16", 128, 256, torch.float32), H200, "float32"),
        (problem_of("W8A16", 128, 256), H200, "4-bit"),
    ],
)
def test_humming_refusals(problem: Problem, target: Target, words: str) -> None:
    answer = humming_w4a16.fit(problem, 1, target)
    assert isinstance(answer, Reject) and words in answer.reason


def test_humming_ranges_are_few_and_cover_all() -> None:
    tops = [humming_w4a16.range_of(m) for m in (1, 8, 9, 16, 17, 100, 5000, 100000)]
    assert tops == [8, 8, 16, 16, 32, 128, 8192, 8192]


@pytest.mark.parametrize(
    ("problem", "target", "words"),
    [
        (problem_of("W4A16", 128, 256, torch.bfloat16), Target.fake("cpu"), "needs a GPU"),
        (problem_of("W4A16", 128, 256), H200, "must be bfloat16, got float16"),
        (problem_of("W4A16", 100, 256, torch.bfloat16), H200, "n must be a multiple of 8"),
        (problem_of("W4A16", 128, 192, torch.bfloat16), H200, "k must be a multiple of 128"),
        (problem_of("int4.channel+16", 128, 256, torch.bfloat16), H200, "group_size"),
    ],
)
def test_tinygemm_refusals(problem: Problem, target: Target, words: str) -> None:
    answer = torch_int4.fit(problem, 1, target)
    assert isinstance(answer, Reject) and words in answer.reason


def test_costs_follow_the_rows() -> None:
    """One row: the kernel without tensor cores. 16: one that decodes in registers. Thousands: any but those two."""
    problem = problem_of("W4A16", 28672, 4096, torch.bfloat16)
    kernels = (*w4.KERNELS[:3], *humming_w4a16.KERNELS)
    cost = {k.name: {m: k.fit(problem, m, H200) for m in (1, 16, 4096)} for k in kernels}

    def best(m: int) -> str:
        return min((r[m].cost, name) for name, r in cost.items() if isinstance(r[m], Rank))[1]

    assert best(1) == "triton_w4a16_gemv"
    assert best(16) == "humming_w4a16"
    assert best(4096) in ("humming_w4a16", "triton_w4a16_dequant")


def test_tinygemm_planes_match_torch() -> None:
    """The specs say what torch's own shape function says."""
    problem = problem_of("W4A16_ASYM", 64, 256, torch.bfloat16)
    codes = torch.empty(64, 128, dtype=torch.uint8, device="meta")
    data = torch.ops.aten._convert_weight_to_int4pack(codes, torch_int4.INNER_K_TILES)
    spec = torch_int4.planes(problem)[0]
    assert (tuple(data.shape), data.dtype) == (spec.shape, spec.dtype)


# --- kernels in the interpreter ---


def check(got: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, what: object) -> None:
    error = ((got.float() - reference.float()).norm() / reference.float().norm()).item()
    assert got.dtype == reference.dtype and got.shape == reference.shape, what
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e}"


def check_int4(*specs: str) -> None:
    """Every 4-bit kernel over odd shapes; f32 for exactness, f16 for the 16-bit paths (bf16 dots are garbage here)."""
    for spec, (n, k), dtype in itertools.product(specs, SHAPES, (torch.float32, torch.float16)):
        problem = problem_of(spec, n, k, dtype, has_bias=True)
        rows = weights(problem)
        packed = w4.pack_tiles(rows, problem)
        bias = torch.randn(n).to(dtype)
        for m, run in ((1, w4.run_gemv), (19, w4.run_matmul), (3, w4.run_dequant)):
            if run is w4.run_matmul and dtype == torch.float32:
                continue
            x = torch.randn(m, k).to(dtype)
            reference = weight_only.linear((x,), rows, bias, problem.scheme, dtype)
            check(run((x,), packed, bias, problem), reference, dtype, (spec, n, k, dtype, run.__name__))
    for spec in specs:
        check_configs(spec)


def check_configs(spec: str) -> None:
    """What the heuristics pick on large shapes, on a small one: split k, several tiles, unrolled loops."""
    problem = problem_of(spec, 128, 600)
    rows = weights(problem)
    packed = w4.pack_tiles(rows, problem)
    x = torch.randn(17, 600).half()
    reference = weight_only.linear((x,), rows, None, problem.scheme, torch.float16)
    matmul = {"BM": 32, "NB": 2, "RB": 4, "W": 8, "STAGES": 2, "SPLITS": 3}
    check(w4.run_matmul((x,), packed, None, problem, matmul), reference, torch.float16, (spec, matmul))
    gemv = {"Q": 8, "W": 2, "UNROLL": 2, "STAGES": 2}
    check(w4.run_gemv((x[:1],), packed, None, problem, gemv), reference[:1], torch.float16, (spec, gemv))


def check_int8() -> None:
    """Every 8-bit kernel over odd shapes."""
    for (n, k), dtype in itertools.product((*SHAPES, (16, 1100)), (torch.float32, torch.float16)):
        problem = problem_of("W8A16", n, k, dtype, has_bias=True)
        check_rows(problem, weights(problem), weight_only.linear)


def check_rows(problem: Problem, rows: tuple[torch.Tensor, ...], linear: Callable[..., torch.Tensor]) -> None:
    """Every kernel of 8-bit rows against ``linear``, with a bias."""
    dtype, bias = problem.dtype, torch.randn(problem.n).to(problem.dtype)
    for m, run in ((1, w4.run_gemv8), (19, w4.run_matmul8), (3, w4.run_dequant8)):
        if run is w4.run_matmul8 and dtype == torch.float32:
            continue
        x = torch.randn(m, problem.k).to(dtype)
        reference = linear((x,), rows, bias, problem.scheme, dtype)
        check(run((x,), rows, bias, problem), reference, dtype, (problem.n, problem.k, dtype, run.__name__))


def check_fp8() -> None:
    """The same kernels over e4m3: every code, subnormals and both zeros among them, and odd shapes."""
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn).reshape(1, -1)
    for (n, k), dtype in itertools.product((*SHAPES, (16, 1100), (1, 254)), (torch.float32, torch.float16)):
        problem = problem_of("fp8e4m3.channel+16", n, k, dtype, has_bias=True)
        rows = fp8.quantize_weight(torch.randn(n, k), problem.scheme)
        if n == 1:
            rows = every, torch.ones(1, 1)
        check_rows(problem, rows, fp8.linear)


def check_misaligned() -> None:
    """x that starts at an odd element cannot be read in pairs; it is copied."""
    problem = problem_of("W4A16", 64, 256)
    rows = weights(problem)
    packed = w4.pack_tiles(rows, problem)
    x = torch.randn(257).half()[1:].reshape(1, 256)
    reference = weight_only.linear((x,), rows, None, problem.scheme, torch.float16)
    check(w4.run_gemv((x,), packed, None, problem), reference, torch.float16, "misaligned")


@needs_triton
@pytest.mark.parametrize("specs", [SPECS[:3], SPECS[3:6], SPECS[6:]])
def test_int4_in_interpreter(specs: tuple[str, ...]) -> None:
    run_interpreted(__name__, "check_int4", *specs)


@needs_triton
@pytest.mark.parametrize("function", ["check_int8", "check_fp8", "check_misaligned"])
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "FP8", "fp8e5m2.channel+16", "W8A16"])
def test_what_fp8_kernels_refuse(spec: str) -> None:
    kernel = kernels()["triton_fp8a16"]
    answer = kernel.fit(problem_of(spec, 64, 64), 16, Target.fake("sm80"))
    assert answer == Reject("serves e4m3 weights with 16-bit inputs")
    for wanted in ("fp8e4m3.channel+16", "fp8e4m3.tensor+16"):
        assert "triton_fp8a16" in choose(problem_of(wanted, 64, 64), Target.fake("sm80")).text


# --- cubins ---

SIZES = dict.fromkeys(("n", "m", "k", "columns", "blocks", "padded_n", "groups", "chunks", "near", "far"), "i32")
SIZES |= dict.fromkeys(("zero", "blocks_per_split", "k_per_split", "size", "splits"), "i32")
ARCHES = (80, 89, 90, 100, 120)


def types_of(kernel, pointers: dict[str, str]) -> dict[str, str]:
    return {name: kind for name, kind in (SIZES | pointers).items() if name in kernel.arg_names}


@needs_triton
@pytest.mark.parametrize(("arch", "asymmetric"), [*((arch, False) for arch in ARCHES), (80, True), (90, True)])
def test_int4_cubins(arch: int, asymmetric: bool) -> None:
    import triton.language as tl

    from quant_compile.lowering.kernels.weight_only import _triton_w4a16 as kernels

    zero = {"z_ptr": "*u8"} if asymmetric else {}
    none = {"bias_ptr": None} | ({} if asymmetric else {"z_ptr": None})
    pointers = {"w_ptr": "*i32", "s_ptr": "*i32", "y_ptr": "*bf16", "out_ptr": "*bf16"} | zero
    shared = {"CHANNEL": False, "EVEN": True, "BF16": True, "OUT": tl.bfloat16}
    gemv = {"J": 8, "CHUNKS_PER_GROUP": 1, "X32": False, "S32": False, "Q": 4, "G": 16, "UNROLL": 1, "STAGES": 1}
    done = compile_cubin(
        kernels.gemv_w4_kernel, arch, types_of(kernels.gemv_w4_kernel, {"x_ptr": "*i32"} | pointers),
        none | shared | gemv, num_warps=8,
    )  # fmt: skip
    # The design: one 16-byte load a word quad, and no exchange between threads inside the loop.
    assert done.asm["ptx"].count("ld.global.v4.b32") >= 8
    dequant = {"BLOCKS_PER_GROUP": 8, "S32": False, "NB": 1, "RB": 8}
    compile_cubin(
        kernels.dequantize_w4_kernel, arch, types_of(kernels.dequantize_w4_kernel, pointers),
        {k: v for k, v in none.items() if k == "z_ptr"} | shared | dequant,
    )  # fmt: skip
    for m in (1, 300):
        config = w4.matmul_config(m)
        tiles = {"BLOCKS_PER_GROUP": 8, "SPLIT": False} | {name: config[name] for name in ("BM", "NB", "RB")}
        done = compile_cubin(
            kernels.matmul_w4_kernel, arch, types_of(kernels.matmul_w4_kernel, {"x_ptr": "*bf16"} | pointers),
            none | shared | tiles, num_warps=config["W"], num_stages=config["STAGES"],
        )  # fmt: skip
        assert any(word in done.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
        assert done.metadata.shared <= 99 * 1024  # the smallest limit of the arches, sm89's and sm120's


@needs_triton
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("codes", ["i8", "u8"])
def test_8_bit_cubins(codes: str, arch: int) -> None:
    """int8, and e4m3 as bytes, since sm80 has no such type."""
    import triton.language as tl

    from quant_compile.lowering.kernels.weight_only import _triton_w4a16 as kernels

    pointers = {"x_ptr": "*bf16", "w_ptr": f"*{codes}", "s_ptr": "*fp32", "y_ptr": "*bf16", "out_ptr": "*bf16"}
    even = {"bias_ptr": None, "EVEN": True, "OUT": tl.bfloat16, "FP8": codes != "i8"}
    gemv = {"BN": 8, "BK": 1024}
    compile_cubin(kernels.gemv_w8_kernel, arch, types_of(kernels.gemv_w8_kernel, pointers), even | gemv)
    for bm, bn, bk in ((16, 64, 128), (128, 128, 64)):
        tiles = {"BM": bm, "BN": bn, "BK": bk, "SPLIT": False}
        done = compile_cubin(
            kernels.matmul_w8_kernel, arch, types_of(kernels.matmul_w8_kernel, pointers), even | tiles,
            num_warps=8 if bm == 128 else 4, num_stages=3,
        )  # fmt: skip
        assert done.metadata.shared <= 99 * 1024
    types = types_of(kernels.dequantize_w8_kernel, pointers)
    compile_cubin(
        kernels.dequantize_w8_kernel, arch, types, {"BN": 16, "BK": 512, "OUT": tl.bfloat16, "FP8": codes != "i8"}
    )
    types = types_of(kernels.sum_parts_kernel, {"parts_ptr": "*fp32", "y_ptr": "*bf16"})
    compile_cubin(
        kernels.sum_parts_kernel, arch, types, {"scale_ptr": None, "bias_ptr": None, "BLOCK": 1024, "OUT": tl.bfloat16}
    )
