"""Block layouts of GGUF against the ``gguf`` package: every type's numbers to the last bit, and bytes where it quantizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quant_compile.ir.errors import MissingLibraryError
from quant_compile.ir.ggml import grids
from quant_compile.ir.ggml.decode import decode
from quant_compile.ir.ggml.types import BY_NUMBER, PLAIN, TYPES

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
