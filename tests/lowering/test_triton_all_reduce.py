"""triton_all_reduce: the one-shot sum of two ranks and what follows it, equal to the sequence of torch, in Triton's interpreter.

The other rank is played by a buffer with its rows and by flags that are up already, or go up from a thread while the kernel waits.
"""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.collectives import triton_all_reduce as kernel
from quant_compile.lowering.ops import normed
from quant_compile.lowering.registry import Norm
from quant_compile.lowering.symmetric import MOST_ROWS, Workspace
from tests.lowering.test_triton_moe import mend_float8
from tests.lowering.triton_support import compile_cubin, mend_bfloat16, needs_triton, run_interpreted

BF16 = torch.bfloat16
# Sums of squares in another order move a normed value by an ulp of f32, and few of them across a tie.
FLIPPED = 0.002


class Played:
    """A world on the CPU, seen from one rank: the other ranks' buffers are filled by hand."""

    def __init__(self, rank: int, world: int, k: int, dtype: torch.dtype) -> None:
        self.rank, self.world, self.k = rank, world, k
        self.flags_at = 2 * MOST_ROWS * k * dtype.itemsize
        self.buffers = [torch.zeros(self.flags_at + MOST_ROWS * world * 4, dtype=torch.uint8) for _ in range(world)]
        self.counts = torch.zeros(MOST_ROWS, dtype=torch.int32)
        self.dtype = dtype
        addresses = tuple(buffer.data_ptr() for buffer in self.buffers)
        self.space = Workspace(rank, world, addresses, self.counts, self.flags_at, 0)

    def values(self, rank: int) -> Tensor:
        return self.buffers[rank][: self.flags_at].view(self.dtype).view(MOST_ROWS, 2, self.k)

    def flags(self, rank: int) -> Tensor:
        return self.buffers[rank][self.flags_at :].view(torch.int32).view(MOST_ROWS, self.world)

    def offer(self, parts: list[Tensor]) -> None:
        """What the other ranks do in a call: their rows lie in their buffers, and their flags are up in this rank's."""
        m = parts[0].shape[0]
        for other in range(self.world):
            if other != self.rank:
                for row in range(m):
                    count = int(self.counts[row]) + 1
                    self.values(other)[row, count % 2] = parts[other][row]
                    self.flags(self.rank)[row, other] = count


def steps(parts: list[Tensor], residual: Tensor | None, norm: Norm | None, spec: str, keep: bool) -> list[Tensor]:
    """The sequence of torch, with the sum in f32 in the order of ranks."""
    total = sum(part.float() for part in parts)
    h: Any = total.to(parts[0].dtype)  # type: ignore[union-attr]
    h = h if residual is None else h + residual
    if norm is None:
        return [h]
    y = normed(h, norm)
    planes = family_of(parse(spec)).quantize_input(y, parse(spec), None) if spec else ()
    return [h, *([y] if keep else []), *planes]


def bits(plane: Tensor) -> Tensor:
    return plane.view(torch.uint8) if plane.dtype.itemsize == 1 else plane


def assert_near(found: Any, wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert torch.equal(found[0], wanted[0])
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        if mine.dtype == torch.float32:
            torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=0)  # of a maximum that is rounded to 16 bits
        else:
            assert float((bits(mine) != bits(theirs)).float().mean()) <= FLIPPED


def check_calls(rank: int, world: int) -> None:
    """Calls one after the other, with unlike rows and numbers of rows: both slots of each row are in use, flags and counts go up."""
    mend_float8()
    mend_bfloat16()
    k = 72
    played = Played(rank, world, k, BF16)
    kinds = (("FP8_DYNAMIC", False), ("W8A8", True), ("", True), (None, False))
    for call, (m, weighting) in enumerate(((2, "after_cast"), (3, "before_cast"), (1, "one_plus"), (3, "after_cast"))):
        spec, keep = kinds[call]
        g = torch.Generator().manual_seed(call)
        parts = [torch.randn(m, k, generator=g).to(BF16) for _ in range(world)]
        residual = torch.randn(m, k, generator=g).to(BF16) if call % 2 == 0 else None
        norm = None if spec is None else Norm(torch.rand(k, generator=g).to(BF16) + 0.5, 1e-6, weighting)
        before = played.counts.clone()
        played.offer(parts)
        found = kernel.run(parts[rank], residual, norm, parse(spec) if spec else None, keep, played.space)
        assert_near(found, steps(parts, residual, norm, spec or "", keep))
        raised = torch.arange(MOST_ROWS) < m
        assert torch.equal(played.counts - before, raised.int())
        for other in range(world):
            if other != rank:
                assert torch.equal(played.flags(other)[:m, rank], played.counts[:m])
        assert torch.equal(played.values(rank)[0, int(played.counts[0]) % 2], parts[rank][0])


def check_waits() -> None:
    """Without the other's flag the kernel does not go on; with a flag of the call before neither."""
    mend_bfloat16()
    k = 64
    played = Played(0, 2, k, BF16)
    first = [torch.full((1, k), 1.0, dtype=BF16), torch.full((1, k), 2.0, dtype=BF16)]
    played.offer(first)
    kernel.run(first[0], None, None, None, False, played.space)
    second = [torch.full((1, k), 5.0, dtype=BF16), torch.full((1, k), 7.0, dtype=BF16)]
    raised = threading.Event()

    def late() -> None:
        time.sleep(0.3)
        raised.set()
        played.offer(second)

    other = threading.Thread(target=late)
    other.start()
    found = kernel.run(second[0], None, None, None, False, played.space)
    assert raised.is_set()
    other.join()
    assert torch.equal(found[0], torch.full((1, k), 12.0, dtype=BF16))


def check_wraps() -> None:
    """Counts may go past the largest int32."""
    played = Played(0, 2, 64, torch.float16)
    played.counts.fill_(2**31 - 1)
    parts = [torch.ones(2, 64, dtype=torch.float16) for _ in range(2)]
    for row in range(2):
        played.values(1)[row, 0] = parts[1][row]
        played.flags(0)[row, 1] = -(2**31)
    found = kernel.run(parts[0], None, None, None, False, played.space)
    assert torch.equal(found[0], torch.full((2, 64), 2.0, dtype=torch.float16))
    assert int(played.counts[0]) == -(2**31)


@needs_triton
@pytest.mark.parametrize(("rank", "world"), [(0, 2), (1, 2), (1, 4)])
def test_sums_of_ranks(rank: int, world: int) -> None:
    run_interpreted(__name__, "check_calls", rank, world)


@needs_triton
@pytest.mark.parametrize("check", ["check_waits", "check_wraps"])
def test_flags(check: str) -> None:
    run_interpreted(__name__, check, timeout=60)


@needs_triton
def test_order_of_memory() -> None:
    """What the interpreter cannot show: flags are raised after the rows and read before them, across GPUs, and rows move in wide words."""
    source = importlib.import_module("quant_compile.lowering.kernels.collectives._triton_all_reduce")
    types = {
        "x_ptr": "*bf16", "residual_ptr": "*bf16", "w_ptr": "*bf16", "counts_ptr": "*i32", "h_ptr": "*bf16", "q_ptr": "*fp8e4nv",
        "s_ptr": "*fp32", "k": "i32", "eps": "fp32", "flags_at": "i32", "limit_ns": "i64", "bases": ("i64", "i64"),
    }  # fmt: skip
    constants = {
        "y_ptr": None,
        "RANK": 0,
        "WORLD": 2,
        "LIMITED": True,
        "WEIGHTING": "after_cast",
        "LIMIT": 448.0,
        "BLOCK": 8192,
    }
    built = compile_cubin(source.all_reduce_kernel, 90, types, constants, num_warps=16)
    text = [line.strip() for line in built.asm["ptx"].splitlines()]
    stores = [i for i, line in enumerate(text) if "st.global.v4" in line]
    barriers = [i for i, line in enumerate(text) if line.startswith("bar.sync")]
    raised = next(i for i, line in enumerate(text) if "atom.global.sys.release.exch" in line)
    seen = max(i for i, line in enumerate(text) if "sys.acquire" in line)
    read = next(i for i, line in enumerate(text) if "ld.global.cg.v4" in line)
    assert any(stores[0] < i < raised for i in barriers)
    assert raised < seen < read
    assert any(seen < i < read for i in barriers)
    assert any("trap" in line for line in text)


def test_codes_of_schemes() -> None:
    assert kernel.codes_of(parse("FP8_DYNAMIC")) == (torch.float8_e4m3fn, 448.0)
    assert kernel.codes_of(parse("W8A8")) == (torch.int8, 127.0)
    assert kernel.codes_of(parse("W4A8")) == (torch.int8, 127.0)
    for spec in ("FP8", "FP8_TENSOR_DYNAMIC", "W8A16", "NVFP4", "MXFP4", "FP8_BLOCK"):
        assert kernel.codes_of(parse(spec)) is None, spec


def test_refusals() -> None:
    assert kernel.fit(8192, BF16) is None
    refusal = kernel.fit(8192, torch.float32)
    assert refusal is not None and "float32" in refusal.reason
    refusal = kernel.fit(20000, BF16)
    assert refusal is not None and "20000" in refusal.reason
