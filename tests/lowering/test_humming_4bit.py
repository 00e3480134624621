"""humming's 4-bit kernels without a GPU: layouts and their inverses, refusals, and what humming is told of a layer."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels._humming import order_of
from quant_compile.lowering.kernels.w4a8 import humming_4bit as humming
from quant_compile.lowering.kernels.weight_only.triton_w4a16 import pack_tiles
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.schemes.fp4 import unpack_codes
from quant_compile.lowering.schemes.weight_only import unpack_nibbles
from quant_compile.lowering.target import FAKE_OPS, Target

BF16, F16 = torch.bfloat16, torch.float16
LAYOUTS = {layout.name: layout for layout in humming.LAYOUTS}
KERNELS = {kernel.name: kernel for kernel in humming.KERNELS}
INT4 = ("W4A8", "W4AFP8", "int4.group32+int8.tensor", "int4.channel+fp8e4m3.token.dynamic")
INT4_LAYOUTS = ("w4_flat", "w4_tiles8", "w4_wide8")
H200 = Target.fake("sm90")


def problem_of(spec: str, n: int = 128, k: int = 256, dtype: torch.dtype = BF16) -> Problem:
    return Problem(parse(spec), n, k, dtype)


def weights(problem: Problem, seed: int = 0) -> Planes:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(problem.n, problem.k, generator=generator) * 0.05
    return family_of(problem.scheme).quantize_weight(w.to(problem.dtype), problem.scheme)


def bits(plane: torch.Tensor) -> torch.Tensor:
    """Every byte of a plane; floats of one byte do not compare."""
    return torch.empty(plane.numel(), dtype=plane.dtype).copy_(plane.flatten()).view(torch.uint8)


def nibble(data: torch.Tensor, word: int, place: int) -> int:
    return (int(data.flatten()[word]) >> (4 * place)) & 15


# --- layouts ---


def check_inverse(layout: str, problem: Problem, rows: Planes) -> Planes:
    packed = LAYOUTS[layout].pack(rows, problem)
    assert [(tuple(p.shape), p.dtype) for p in packed] == [(s.shape, s.dtype) for s in LAYOUTS[layout].planes(problem)]
    assert all(plane.is_contiguous() for plane in packed) and not packed[-1].any()
    back = LAYOUTS[layout].unpack(packed, problem)
    assert [(b.dtype, b.shape) for b in back] == [(r.dtype, r.shape) for r in rows]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(rows, back, strict=True))
    return packed


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(INT4),
    layout=st.sampled_from(INT4_LAYOUTS),
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    dtype=st.sampled_from((BF16, F16)),
    seed=st.integers(0, 5),
)
def test_int4_unpacks_to_what_was_packed(spec: str, layout: str, n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    problem = problem_of(spec, n, k, dtype)
    check_inverse(layout, problem, weights(problem, seed))


@settings(max_examples=40, deadline=None)
@given(
    spec=st.sampled_from(("NVFP4A16", "MXFP4A16")),
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    seed=st.integers(0, 5),
)
def test_fp4_unpacks_to_what_was_packed(spec: str, n: int, k: int, seed: int) -> None:
    problem = problem_of(spec, n, k)
    rows = weights(problem, seed)
    check_inverse("fp4_tiles", problem, rows)
    if spec == "NVFP4A16":
        _, scale, _, _ = check_inverse("fp4_folded", problem, rows)
        assert scale.dtype == BF16


def test_many_rows_are_packed_in_chunks() -> None:
    problem = problem_of("W4AFP8", 2048 + 130, 64)
    for layout in INT4_LAYOUTS:
        check_inverse(layout, problem, weights(problem))


PLACES = tuple(itertools.product((0, 1, 7, 8, 17, 37, 64, 127), (0, 1, 4, 15, 16, 33, 63, 131, 255)))


def test_flat_order_is_the_documented_one() -> None:
    problem = problem_of("W4A8")
    rows = weights(problem)
    data = LAYOUTS["w4_flat"].pack(rows, problem)[0]
    codes = unpack_nibbles(rows[0], problem.k)
    for row, column in PLACES:
        word = (column // 32 * problem.n + row) * 4 + column % 32 // 8
        signed = nibble(data, word, column % 8)
        assert (signed ^ 8) == codes[row, column]


@pytest.mark.parametrize("layout", ["w4_tiles8", "w4_wide8"])
def test_tile_orders_are_the_documented_ones(layout: str) -> None:
    """Each code where the module says it lies, computed one by one."""
    problem = problem_of("W4AFP8")
    rows = weights(problem)
    data = LAYOUTS[layout].pack(rows, problem)[0]
    codes = unpack_nibbles(rows[0], problem.k)
    for row, column in PLACES:
        i2, i3, i4, t4 = row % 64 // 32, row % 32 // 16, row % 16 // 8, row % 8
        i1, i5, tq, i6 = column % 64 // 32, column % 32 // 16, column % 16 // 4, column % 4
        lane = 4 * t4 + tq
        if layout == "w4_tiles8":
            block = column // 32 * 4 * problem.n + row // 64 * 256
            got = nibble(data, block + i2 * 128 + lane * 4 + i3 * 2 + i4, 2 * i6 + i5)
        else:
            block = column // 64 * 8 * problem.n + row // 64 * 512
            got = nibble(data, block + i2 * 256 + i3 * 128 + lane * 4 + i1 * 2 + i5, 2 * i6 + i4)
        value = int(codes[row, column]) - 8
        assert got == (value if value >= 0 else 7 - value), (row, column)


def test_fp4_codes_lie_as_int4_codes_do() -> None:
    """The same nibbles in ``w4_tiles`` and ``fp4_tiles``; scales in the order of grouped scales."""
    fp4, int4 = problem_of("NVFP4A16"), problem_of("W4A16")
    rows = weights(fp4)
    packed = LAYOUTS["fp4_tiles"].pack(rows, fp4)
    assert torch.equal(packed[0], pack_tiles((rows[0], *weights(int4)[1:]), int4)[0])
    for row, group in itertools.product((0, 1, 7, 8, 37, 64, 127), (0, 15)):
        place = row // 64 * 64 + row % 8 * 8 + row % 64 // 8
        assert bits(packed[1][group, place]) == bits(rows[1][row, group])


def test_scales_lie_as_in_w4_tiles() -> None:
    for group in ("group64", "channel"):
        rows = weights(problem_of(f"int4.{group}+int8.token.dynamic"))
        wanted = pack_tiles(rows, problem_of(f"int4.{group}+16"))[1]
        for layout in INT4_LAYOUTS:
            packed = LAYOUTS[layout].pack(rows, problem_of(f"int4.{group}+int8.token.dynamic"))
            assert torch.equal(packed[1], wanted), layout


# --- global scales of siblings ---


def test_one_tensor_has_ratios_of_one() -> None:
    problem = problem_of("NVFP4A16")
    rows = weights(problem)
    _, _, ratio, whole_of_rows, whole, _ = check_inverse("fp4_tiles", problem, rows)
    assert torch.equal(ratio, torch.ones(problem.n)) and torch.equal(whole, rows[2][0])
    assert torch.equal(whole_of_rows, rows[2])


def test_siblings_keep_their_own_global_scale() -> None:
    whole = torch.tensor([[3.0], [0.5], [1.75], [0.5]])
    least, ratio = humming.common_scale(whole)
    assert least.tolist() == [0.5] and ratio.tolist() == [6.0, 1.0, 3.5, 1.0]


def test_zeros_set_no_scale_for_their_siblings() -> None:
    """Under the scale of a weight of zeros, f16 would round everything else to zero."""
    family = family_of(parse("NVFP4"))
    zeros, other = (family.quantize_weight(w, parse("NVFP4"))[2] for w in (torch.zeros(1, 16), torch.ones(1, 16)))
    least, ratio = humming.common_scale(torch.cat((zeros, other)))
    assert torch.equal(least, other[0]) and ratio[1] == 1.0 and 0 < ratio[0] < 1e-20


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_global_scale_spoils_its_own_rows_only(bad: float) -> None:
    least, ratio = humming.common_scale(torch.tensor([[bad], [0.25]]))
    assert least.tolist() == [0.25] and ratio[1] == 1.0
    assert torch.equal(ratio[:1], torch.tensor([bad]) / 0.25) or (bad != bad and bool(ratio[0].isnan()))
    alone, ratio = humming.common_scale(torch.tensor([[bad]]))
    assert alone.tolist() == [1.0] and (ratio[0] == bad or bool(ratio[0].isnan()))


# --- fit ---


@pytest.mark.parametrize(
    ("kernel", "spec", "target"),
    [
        ("humming_w4a8", "W4A8", "sm80"),
        ("humming_w4a8", "int4.group32+int8.tensor", "sm90"),
        ("humming_w4afp8", "W4AFP8", "sm89"),
        ("humming_w4afp8", "int4.group64+fp8e4m3.token.dynamic", "sm90"),
        ("humming_w4afp8_wide", "W4AFP8", "sm90"),
        ("humming_fp4a16", "NVFP4A16", "sm80"),
        ("humming_fp4a16", "MXFP4A16", "sm90"),
    ],
)
def test_one_kernel_serves(kernel: str, spec: str, target: str) -> None:
    """Exactly one, so that a weight never lies in an order that the GEMM of its device does not read."""
    answers = {k.name: k.fit(problem_of(spec), 16, Target.fake(target)) for k in humming.KERNELS}
    assert [name for name, answer in answers.items() if isinstance(answer, Rank)] == [kernel]


NO_HUMMING = Target.fake("sm90", FAKE_OPS - {"humming"})
REFUSALS = [
    ("humming_w4a8", problem_of("W4A8"), Target.fake("cpu"), "needs a CUDA GPU"),
    ("humming_w4a8", problem_of("W4A8"), NO_HUMMING, "humming is not installed"),
    ("humming_w4a8", problem_of("W4A8", n=100), H200, "n must be a multiple of 128, got 100"),
    ("humming_w4a8", problem_of("W4A8", k=192), H200, "k must be a multiple of 128, got 192"),
    ("humming_w4a8", problem_of("W4A8", dtype=torch.float32), H200, "float32"),
    ("humming_w4a8", problem_of("W4AFP8"), H200, "8-bit int inputs"),
    ("humming_w4a8", problem_of("W4A16"), H200, "8-bit int inputs"),
    ("humming_w4a8", problem_of("int4.group256+int8.token.dynamic"), H200, "group_size"),
    ("humming_w4a8", problem_of("int4.channel+int8.token.dynamic", dtype=F16), H200, "overflows float16"),
    ("humming_w4a8", problem_of("QSERVE_W4A8_GROUP"), H200, "symmetric"),
    ("humming_w4afp8", problem_of("W4AFP8"), Target.fake("sm80"), "needs sm89"),
    ("humming_w4afp8", problem_of("W4AFP8"), H200, "order of their own on sm90"),
    ("humming_w4afp8_wide", problem_of("W4AFP8"), Target.fake("sm100"), "on sm90"),
    ("humming_w4afp8_wide", problem_of("int4.group64+fp8e4m3.token.dynamic"), H200, "groups of 128"),
    ("humming_fp4a16", problem_of("NVFP4"), H200, "16-bit inputs"),
    ("humming_fp4a16", problem_of("W4A16"), H200, "FP4 weights"),
    ("humming_fp4a16", problem_of("NVFP4A16"), Target.fake("sm100"), "sm99"),
    ("humming_fp4a16", problem_of("MXFP4A16", dtype=F16), H200, "range of e8m0"),
    ("humming_fp4a16_folded", problem_of("NVFP4A16"), H200, "siblings of NVFP4"),
    ("humming_fp4a16_folded", problem_of("MXFP4A16"), H200, "siblings of NVFP4"),
    ("humming_fp4a16_folded", replace(problem_of("NVFP4A16", dtype=F16), siblings=2), H200, "float16"),
    ("humming_fp4a16", problem_of("NVFP4A16"), NO_HUMMING, "humming is not installed"),
]


@pytest.mark.parametrize(("kernel", "problem", "target", "words"), REFUSALS)
def test_refusals(kernel: str, problem: Problem, target: Target, words: str) -> None:
    answer = KERNELS[kernel].fit(problem, 16, target)
    assert isinstance(answer, Reject) and words in answer.reason, answer


def test_siblings_of_nvfp4_have_two_ways() -> None:
    problem = replace(problem_of("NVFP4A16"), siblings=2)
    served = [k.name for k in humming.KERNELS if isinstance(k.fit(problem, 16, H200), Rank)]
    assert served == ["humming_fp4a16", "humming_fp4a16_folded"]


# --- what humming is told ---


def test_layer_config() -> None:
    assert humming.layer_config(problem_of("W4A8", 384, 512)) == {
        "shape_n": 384,
        "shape_k": 512,
        "a_dtype": "int8",
        "b_dtype": "uint4",
        "c_dtype": "bfloat16",
        "bs_dtype": "bfloat16",
        "weight_scale_group_size": 128,
        "input_quant_mode": "dynamic_token",
        "use_int_weight_scale": False,
    }
    static = humming.layer_config(problem_of("int4.channel+fp8e4m3.tensor"))
    assert static["input_quant_mode"] == "static_tensor" and static["weight_scale_group_size"] == 0
    assert static["a_dtype"] == "float8e4m3" and static["weight_scale_2_type"] == "tensor"
    nv = humming.layer_config(problem_of("NVFP4A16", dtype=F16))
    assert (nv["a_dtype"], nv["b_dtype"], nv["bs_dtype"]) == ("float16", "float4e2m1", "float8e4m3")
    assert (nv["weight_scale_group_size"], nv["weight_scale_2_type"]) == (16, "tensor")
    folded = humming.layer_config(problem_of("NVFP4A16"), folded=True)
    assert folded["bs_dtype"] == "bfloat16" and "weight_scale_2_type" not in folded
    mx = humming.layer_config(problem_of("MXFP4A16"))
    assert (mx["bs_dtype"], mx["weight_scale_group_size"]) == ("float8e8m0", 32) and "weight_scale_2_type" not in mx


class Layer:
    """The flags of a LayerConfig."""

    def __init__(self, *flags: str) -> None:
        for name in ("use_raw_weight", "use_native_dequant", "use_flat_weight", "use_packed_k_layout"):
            setattr(self, name, name in flags)


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        ((), "tiles"),
        (("use_flat_weight",), "flat"),
        (("use_packed_k_layout",), "wide"),
        (("use_native_dequant",), "native"),
        (("use_raw_weight",), "raw"),
    ],
)
def test_orders_of_humming(flags: tuple[str, ...], order: str) -> None:
    assert order_of(Layer(*flags)) == order


# --- run, with humming's op replaced by the reference over what it was given ---


RUNS = [(kernel, spec, 1) for spec in ("W4A8", "W4AFP8", "NVFP4A16", "MXFP4A16") for kernel in KERNELS]
RUNS += [("humming_fp4a16", "NVFP4A16", 2), ("humming_fp4a16_folded", "NVFP4A16", 2)]


@pytest.mark.parametrize(("name", "spec", "siblings"), RUNS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_run_gives_humming_all_that_the_product_needs(
    name: str, spec: str, siblings: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, problem = KERNELS[name], Problem(parse(spec), 128, 128, BF16, has_bias, siblings)
    arch = "sm89" if name == "humming_w4afp8" else "sm90"
    if isinstance(kernel.fit(problem, 4, Target.fake(arch)), Reject):
        return
    parts = [weights(problem_of(spec, 128 // siblings, 128), seed) for seed in range(siblings)]
    rows = tuple(torch.cat(planes) for planes in zip(*parts, strict=True))
    if siblings > 1:
        rows = (*rows[:2], rows[2] * torch.tensor([1.0, 3.7]).repeat_interleave(64)[:, None])
    layout, scheme, family = LAYOUTS[kernel.layout], problem.scheme, family_of(problem.scheme)

    def launch(gemm, x, data, scale, locks, *, whole=None, x_scale=None):
        """What humming computes: one scale of all rows, or none where ``scale`` holds it."""
        assert torch.equal(data, packed[0]) and locks.dtype == torch.int32 and locks.numel() == 2048
        plain = layout.unpack(packed, problem)
        if whole is not None and spec == "NVFP4A16":
            plain = (*plain[:2], whole.expand(problem.n, 1))
        return family.linear((x,) if x_scale is None else (x, x_scale), plain, None, scheme, BF16)

    for order in humming.PREPARE:
        monkeypatch.setitem(humming.PREPARE, order, lambda *args: None)
    monkeypatch.setattr(humming._humming, "launch", launch)
    packed = layout.pack(rows, problem)
    x = torch.randn(4, 128).to(BF16)
    planes = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, None)
    bias = torch.randn(128).to(BF16) if has_bias else None
    expected = family.linear(planes, rows, bias, scheme, torch.float32)
    got = kernel.run(planes, packed, bias, problem)
    assert got.dtype == BF16
    assert (got.float() - expected).norm() / expected.norm() <= 5e-3  # three roundings to bf16 at most


def test_all_kernels_compile_ahead() -> None:
    assert all(isinstance(kernel, Kernel) and kernel.prepare is not None for kernel in humming.KERNELS)


def test_codes_of_fp4_are_not_changed() -> None:
    """Every one of the 16 codes stays what it is, signs of zero included."""
    problem = problem_of("MXFP4A16", 64, 64)
    data = torch.arange(256, dtype=torch.uint8).repeat(8).reshape(64, 32)
    scale = torch.full((64, 2), 127, dtype=torch.uint8)
    back = LAYOUTS["fp4_tiles"].unpack(LAYOUTS["fp4_tiles"].pack((data, scale), problem), problem)
    assert torch.equal(unpack_codes(back[0]), unpack_codes(data))
