"""Block layouts of GGUF against the ``gguf`` package: every type's numbers to the last bit, and bytes where it quantizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quant_compile.ir.errors import MissingLibraryError
from quant_compile.ir.ggml import grids
from quant_compile.ir.ggml.decode import decode
from quant_compile.ir.ggml.encode import encode
from quant_compile.ir.ggml.types import BY_NUMBER, PLAIN, TYPES

EXACT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")
"""Types that the package quantizes to, so that bytes can be compared."""
SEARCHED = tuple(name for name, block in TYPES.items() if block.encodes and name not in EXACT)
GRIDS = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m")
# Where the f16 fields of a block lie; iq1_m has its scale in the high bits of four words, mxfp4 and nvfp4 have none.
HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,),
    "iq3_s": (0,), "iq1_s": (0,), "iq4_nl": (0,), "iq4_xs": (0,), "tq1_0": (52,), "tq2_0": (64,),
}  # fmt: skip
# Zeros of both signs, the least subnormal, the largest one, the least normal number, one, the largest, and negatives.
EXTREME_HALVES = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF)


def theirs(name: str, blocks: Tensor) -> Tensor:
    """[..., bytes] -> f32, by the package."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[name.upper()]))


def finite_halves(name: str, blocks: Tensor) -> Tensor:
    """The blocks, f16 fields that are inf or NaN made finite."""
    places = [(place + 1, 0x7C, 0x40) for place in HALVES.get(name, ())]
    if name == "iq1_m":  # the exponent's highest bits are in the last word
        places = [(55, 0x70, 0x40)]
    for place, exponent, bit in places:
        full = (blocks[..., place] & exponent) == exponent
        blocks[..., place] = torch.where(full, blocks[..., place] ^ bit, blocks[..., place])
    return blocks


def random_blocks(name: str, seed: int = 0, rows: int = 17, count: int = 5) -> Tensor:
    """[rows, count blocks] of random bytes."""
    made = torch.Generator().manual_seed(seed)
    shape = (rows, count, TYPES[name].nbytes)
    return finite_halves(name, torch.randint(0, 256, shape, dtype=torch.uint8, generator=made)).flatten(1)


def extreme_blocks(name: str) -> Iterator[Tensor]:
    """Blocks whose fields are at their ends: each byte value in all places, each place's bit alone, extreme f16 fields."""
    size = TYPES[name].nbytes
    yield torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, size).clone()
    bits = torch.zeros(size * 8, size, dtype=torch.uint8)
    places = torch.arange(size * 8)
    bits[places, places // 8] = (1 << (places % 8)).to(torch.uint8)
    yield bits
    yield ~bits
    for halves in EXTREME_HALVES:
        blocks = random_blocks(name, halves, 9, 1)
        for place in HALVES.get(name, ()):
            blocks[:, place], blocks[:, place + 1] = halves & 255, halves >> 8
        yield blocks


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_sizes_and_numbers_are_those_of_the_package() -> None:
    assert {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"} == {
        kind.name for kind in GGMLQuantizationType
    } - {name.upper() for name in (*TYPES, *PLAIN)}
    for block in (*TYPES.values(), *PLAIN.values()):
        kind = GGMLQuantizationType[block.name.upper()]
        assert (kind.value, GGML_QUANT_SIZES[kind]) == (block.number, (block.size, block.nbytes))
        assert BY_NUMBER[block.number] is block


@pytest.mark.parametrize("name", TYPES)
def test_random_blocks_have_the_packages_numbers(name: str) -> None:
    blocks = random_blocks(name)
    assert same_bits(decode(name, blocks), theirs(name, blocks))


@pytest.mark.parametrize("name", TYPES)
def test_fields_at_their_ends_have_the_packages_numbers(name: str) -> None:
    for blocks in extreme_blocks(name):
        blocks = finite_halves(name, blocks)
        assert same_bits(decode(name, blocks), theirs(name, blocks))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers_pass_through(name: str) -> None:
    blocks = torch.randint(0, 256, (5, 64), dtype=torch.uint8)
    got = decode(name, blocks)
    assert torch.equal(got.nan_to_num(), theirs(name, blocks).nan_to_num())


@pytest.mark.parametrize("name", TYPES)
def test_leading_dimensions_and_odd_addresses(name: str) -> None:
    """Experts have a dimension more, and a slice of a row begins anywhere."""
    blocks = random_blocks(name, rows=12)
    whole = decode(name, blocks)
    assert torch.equal(decode(name, blocks.view(3, 4, -1)).flatten(0, 1), whole)
    skipped = blocks[:, TYPES[name].nbytes :]
    assert torch.equal(decode(name, skipped), whole[:, TYPES[name].size :])


@pytest.mark.parametrize("name", TYPES)
def test_fake_and_meta_blocks_have_shapes(name: str) -> None:
    blocks = random_blocks(name)
    wanted = (17, 5 * TYPES[name].size)
    assert tuple(decode(name, blocks.to("meta")).shape) == wanted
    with FakeTensorMode() as mode:
        assert tuple(decode(name, mode.from_tensor(blocks)).shape) == wanted


@pytest.mark.parametrize("name", TYPES)
def test_decoding_compiles_as_one_graph(name: str) -> None:
    blocks = random_blocks(name)
    torch.compiler.reset()
    run = torch.compile(lambda b: decode(name, b), fullgraph=True, backend="aot_eager")
    assert same_bits(run(blocks), decode(name, blocks))


@pytest.mark.parametrize("name", GRIDS)
def test_codebooks_without_the_package_are_an_error_with_the_fix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    grids.points.cache_clear()
    with pytest.raises(MissingLibraryError, match=f"blocks of {name.upper()} .*\nFix: pip install gguf"):
        decode(name, random_blocks(name))


def test_types_without_a_codebook_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    for name in TYPES:
        if name not in GRIDS:
            decode(name, random_blocks(name))


# --- to blocks ---


def packages_bytes(name: str, x: Tensor) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(quantize(x.float().numpy(), GGMLQuantizationType[name.upper()]))


def awkward_rows() -> Iterator[tuple[str, Tensor]]:
    """Rows of 256 of every kind that rounding may treat in its own way."""
    ramp = torch.arange(256.0)
    yield "zeros", torch.zeros(256)
    yield "negative zeros", -torch.zeros(256)
    yield "zeros of both signs", torch.where(ramp % 2 == 0, 0.0, -0.0)
    yield "ones", torch.ones(256)
    yield "all equal, negative", torch.full((256,), -3.7)
    yield "whole numbers, whose codes tie", torch.randn(256).mul(6).round()
    yield "halves of the range", (ramp % 33 - 16) / 2
    yield "magnitudes that tie", torch.where(ramp % 3 == 0, 2.0, -2.0)
    yield "minus one, zero, one", ramp % 3 - 1
    yield "one number", torch.where(ramp % 32 == 7, 5.0, 0.0)
    yield "scales that are subnormal in f16", torch.randn(256) * 1e-5
    yield "scales that are zero in f16", torch.randn(256) * 1e-9
    yield "subnormal", torch.randn(256) * 1e-39
    yield "the least subnormals", torch.randn(256) * 1e-44
    yield "scales that are inf in f16", torch.randn(256) * 1e7
    yield "huge", torch.randn(256) * 1e37


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_are_the_packages(name: str, dtype: torch.dtype) -> None:
    for sigma in (0.02, 1.0, 300.0):
        x = (torch.randn(37, 512) * sigma).to(dtype)
        assert torch.equal(encode(name, x), packages_bytes(name, x))


@pytest.mark.parametrize("name", EXACT)
def test_bytes_of_awkward_numbers_are_the_packages(name: str) -> None:
    for kind, row in awkward_rows():
        if name == "mxfp4" and "subnormal" in kind and "f16" not in kind:
            continue  # the package makes a byte of a negative exponent, which is what the machine makes of it
        if name in ("q4_1", "q5_1") and kind == "zeros of both signs":
            continue  # which zero numpy calls the least depends on its vector unit; the next test says which is ours
        assert torch.equal(encode(name, row[None]), packages_bytes(name, row[None])), kind


def test_a_minimum_of_zero_has_the_sign_of_the_first() -> None:
    """llama.cpp keeps a minimum until a number is less."""
    for first, byte in ((0.0, 0x00), (-0.0, 0x80)):
        row = torch.zeros(1, 32)
        row[0, ::2] = -0.0
        row[0, 0], row[0, 1] = first, 1.0
        assert encode("q4_1", row)[0, 3] == encode("q5_1", row)[0, 3] == byte


def test_mxfp4_of_subnormals_keeps_the_least_scale() -> None:
    row = torch.full((1, 32), 2.0**-140)
    blocks = encode("mxfp4", row)
    assert blocks[0, 0] == 0 and torch.equal(decode("mxfp4", blocks), torch.zeros(1, 32))


def samples() -> Iterator[Tensor]:
    """[64, 512] of several distributions."""
    yield torch.randn(64, 512) * 0.02
    yield torch.rand(64, 512)
    yield torch.distributions.StudentT(4.0).sample((64, 512)) * 0.02
    yield torch.randn(64, 512) * torch.rand(64, 1).exp2() + 0.5
    yield torch.randn(64, 512).bfloat16().float() * 40


def error(name: str, x: Tensor) -> float:
    return float((decode(name, encode(name, x)) - x).norm() / x.norm())


def plainly(x: Tensor, sub: int, top: int, most: int) -> Tensor:
    """Round to nearest, by the range of each group, its scale and minimum in their few bits below the block's."""
    groups = x.unflatten(-1, (-1, 256 // sub, sub))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1)
    scale, minimum = (high - low) / top, -low
    d, dmin = (part.amax(-1, keepdim=True).clamp_min(1e-30) / most for part in (scale, minimum))
    scale, minimum = ((scale / d).round() * d).unsqueeze(-1), ((minimum / dmin).round() * dmin).unsqueeze(-1)
    codes = ((groups + minimum) / scale.clamp_min(1e-30)).round().clamp(0, top)
    return (codes * scale - minimum).flatten(-3)


def plainly_signed(x: Tensor, sub: int, half: int, most: int) -> Tensor:
    """The same without minima: the largest magnitude is the lowest code."""
    groups = x.unflatten(-1, (-1, 256 // sub, sub))
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = peak / -half
    d = scale.abs().amax(-2, keepdim=True).clamp_min(1e-30) / most
    scale = (scale / d).round() * d
    codes = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-half, half - 1)
    return (codes * scale).flatten(-3)


PLAINLY = {
    "q2_k": lambda x: plainly(x, 16, 3, 15),
    "q3_k": lambda x: plainly_signed(x, 16, 4, 31),
    "q4_k": lambda x: plainly(x, 32, 15, 63),
    "q5_k": lambda x: plainly(x, 32, 31, 63),
    "q6_k": lambda x: plainly_signed(x, 16, 32, 127),
}


@pytest.mark.parametrize("name", PLAINLY)
def test_the_search_is_better_than_rounding_by_the_range(name: str) -> None:
    for x in samples():
        plain = float((PLAINLY[name](x) - x).norm() / x.norm())
        assert error(name, x) < 0.99 * plain


@pytest.mark.parametrize(("name", "below"), [("iq4_nl", "q4_0"), ("iq4_xs", "q4_0")])
def test_uneven_values_suit_numbers_that_are_mostly_small(name: str, below: str) -> None:
    assert error(name, torch.randn(64, 512)) < error(below, torch.randn(64, 512))


# Relative error of the root of mean squares over normal numbers: that of a uniform quantizer of so many levels over the range of
# 16 or 32 numbers, rounded up by a tenth for scales of few bits.
BOUNDS = {"q2_k": 0.31, "q3_k": 0.17, "q4_k": 0.078, "q5_k": 0.039, "q6_k": 0.0195, "iq4_nl": 0.083, "iq4_xs": 0.084}


@pytest.mark.parametrize("name", BOUNDS)
def test_error_over_normal_numbers(name: str) -> None:
    assert error(name, torch.randn(64, 1024) * 0.02) < BOUNDS[name]


@pytest.mark.parametrize("name", SEARCHED)
def test_searched_blocks_of_awkward_numbers(name: str) -> None:
    """Zeros stay zeros, equal numbers stay near, and nothing that an f16 scale can hold becomes inf or NaN."""
    for kind, row in awkward_rows():
        back = decode(name, encode(name, row[None]))[0]
        if "zeros" in kind or "zero in f16" in kind or kind in ("subnormal", "the least subnormals"):
            assert torch.equal(back, torch.zeros(256)), kind
        elif kind not in ("huge", "scales that are inf in f16"):
            assert torch.isfinite(back).all(), kind
        if kind in ("ones", "all equal, negative"):
            assert ((back - row).abs() <= 0.02 * row.abs()).all(), kind


@pytest.mark.parametrize("name", [name for name, block in TYPES.items() if block.encodes])
def test_rows_are_quantized_alike_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(19, 512)
    whole = encode(name, x)
    monkeypatch.setattr("quant_compile.ir.ggml.encode.CHUNK_ELEMENTS", 512 * 4)
    assert torch.equal(encode(name, x), whole)
    assert torch.equal(encode(name, x[5:6]), whole[5:6])


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])
def test_small_numbers_keep_their_digits(name: str) -> None:
    """A scale of scales that f16 would round to nothing is the least one: the scales below it have bits left."""
    w = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    usual, small = (float((decode(name, encode(name, x)) - x).norm() / x.norm()) for x in (w, w * 1e-5))
    assert small < 1.5 * usual + 0.01
