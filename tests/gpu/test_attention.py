"""Decode attention on the GPU: against the reference, in CUDA graphs, and in what they read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quant_compile.ir.family import Reject
from quant_compile.lowering.kernels.attention import triton_decode
from quant_compile.lowering.target import Target
from tests.lowering.test_attention import BF16, E4M3, E5M2, F16, TOLERANCE, Case, additive, filled

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Heads of Llama-3-8B, Llama-3-70B, Qwen3-30B-A3B, Phi-2, GPT-OSS, Gemma 2 and DeepSeek-V3; the last has K wider than V.
HEADS = ((32, 8, 128), (64, 8, 128), (32, 4, 128), (32, 32, 80), (64, 8, 64), (8, 4, 256), (16, 16, 192))


@pytest.fixture(autouse=True)
def exact_references() -> None:
    """The reference multiplies in f32; TF32 would be less exact than what it judges."""
    assert not torch.backends.cuda.matmul.allow_tf32


def seen(*arguments: Any, **more: Any) -> Tensor:
    return filled(*arguments, **more).to(DEVICE)


def case(b: int, heads: tuple[int, int, int], t: int, length: int, **more: Any) -> Case:
    dv = 128 if heads[2] == 192 else 0
    return Case(b, heads[0], heads[1], t, heads[2], length, dv=dv, device=DEVICE, **more)


@pytest.mark.parametrize("cache", [None, E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_and_caches(heads: tuple[int, int, int], cache: torch.dtype | None) -> None:
    """Few and many queries, with and without a mask, lengths that fill no block, both dtypes."""
    for t, length in ((1, 333), (5, 1024), (16, 700)):
        for dtype in (BF16, F16):
            one = case(2, heads, t, length, dtype=dtype, cache=cache)
            one.check()
            one.check(seen(2, t, length, 300, left=(0, 57)))
            one.check(additive(seen(2, t, length, 300, window=128), dtype))


@pytest.mark.parametrize("cache", [None, E4M3])
@pytest.mark.parametrize(
    ("b", "length", "end"), [(1, 32768, 512), (1, 32768, 32768), (16, 2048, 2000), (64, 8192, 700)]
)
def test_long_caches(b: int, length: int, end: int, cache: torch.dtype | None) -> None:
    one = case(b, (8, 2, 128), 1, length, dtype=BF16, cache=cache)
    one.check(seen(b, 1, length, end))
    one.check(seen(b, 1, length, end, left=tuple(i * 7 for i in range(b))), sinks=torch.randn(8, device=DEVICE))


def test_variants() -> None:
    """Scales of heads and of the whole, sinks, softcap, a bias for each head, strides, more rows than a program takes."""
    for scales in ("head", "tensor"):
        case(2, HEADS[0], 1, 500, dtype=BF16, cache=E4M3, scales=scales).check(seen(2, 1, 500, 400))
    one = case(2, HEADS[2], 2, 500, dtype=BF16)
    one.check(seen(2, 2, 500, 400), sinks=torch.randn(32, device=DEVICE, dtype=BF16))
    one.check(seen(2, 2, 500, 400), softcap=0.5)
    one.check(torch.randn(2, 32, 2, 500, device=DEVICE, dtype=BF16))
    one.k, one.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (one.k, one.v))
    one.check(seen(2, 2, 500, 400))
    case(1, (40, 4, 64), 16, 200, dtype=BF16, cache=E4M3).check(seen(1, 16, 200, 190))


@pytest.mark.parametrize("cache", [None, E4M3, E5M2, torch.int8])
def test_gaps(cache: torch.dtype | None) -> None:
    """Masks that hide keys in between, for all heads and for each, bool and additive; a bias that hides nothing; e4m3 as bytes."""
    for t in (1, 3):
        one = case(2, HEADS[0], t, 640, dtype=BF16, cache=cache)
        for heads in (1, 32):
            mask = torch.rand(2, heads, t, 640, device=DEVICE) > 0.4
            one.check(mask)
            one.check(additive(mask, BF16))
            one.check(torch.randn(2, heads, t, 640, device=DEVICE))
        if cache == E4M3:
            one.k, one.v = one.k.view(torch.uint8), one.v.view(torch.uint8)
            one.check(seen(2, t, 640, 400, left=(0, 57)))


def test_every_byte() -> None:
    """All codes of each format, through a softmax with one key; NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).reshape(1, 1, 1, 256)
    q, k = torch.zeros(1, 1, 1, 32, dtype=F16, device=DEVICE), torch.zeros(1, 1, 1, 32, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    for kind in (E4M3, E5M2, torch.int8):
        found = triton_decode.decode(q, k.to(kind), codes.view(kind), None, 1.0, k_scale=one, v_scale=one)
        wanted = codes.view(kind).half()
        assert torch.equal(found.nan_to_num(7.5, 1.5, -1.5), wanted.nan_to_num(7.5, 1.5, -1.5)), kind
    as_bytes = triton_decode.decode(q, k.byte(), codes, None, 1.0, k_scale=one, v_scale=one)
    assert torch.equal(as_bytes.nan_to_num(7.5), codes.view(E4M3).half().nan_to_num(7.5))


@pytest.mark.parametrize("form", ["bool", "finite", "infinite"])
def test_odd_numbers(form: str) -> None:
    """Rows that see nothing are zeros; NaN before and after what is seen has no influence."""
    one = case(2, HEADS[0], 2, 640, dtype=BF16)
    mask = seen(2, 2, 640, 400, left=(30, 1000))
    forms = {"bool": mask, "finite": additive(mask, BF16)}
    given = forms.get(form, torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf")))
    wanted = one.wanted(mask)
    for plane in (one.k, one.v):
        plane[:, :, :30], plane[:, :, 400:] = float("nan"), float("inf")
    found = one.found(given)
    assert not found[1].any()
    assert float((found[0].float() - wanted[0].float()).norm() / wanted[0].float().norm()) <= TOLERANCE[BF16]
    one.v[0, 0, 100] = float("nan")
    found = one.found(given)
    assert found[0, :4].isnan().all() and not found[0, 4:].isnan().any()


def test_as_near_to_the_truth_as_flash_attention() -> None:
    """Against f64 of the same bf16 inputs, our error is that of torch's own, which rounds p as we do (a fifth is left to chance)."""
    one, end = case(4, HEADS[0], 1, 4096, dtype=BF16), 3000
    keys, values = (x[:, :, :end].repeat_interleave(4, 1) for x in (one.k, one.v))
    wide = (x.double() for x in (one.q, keys, values))
    truth = scaled_dot_product_attention(*wide, scale=one.scale)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = scaled_dot_product_attention(one.q, keys, values, scale=one.scale)
    ours = one.found(seen(4, 1, 4096, end))
    assert (ours.double() - truth).norm() <= 1.2 * (theirs.double() - truth).norm()


def replayed(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("cache", [None, E4M3])
def test_in_a_cuda_graph(cache: torch.dtype | None) -> None:
    """One graph serves while the cache fills: what is new is q, the mask and the cache; equal inputs give equal bits."""
    one = case(2, HEADS[0], 1, 2048, dtype=BF16, cache=cache)
    mask = seen(2, 1, 2048, 40)
    graph, out = replayed(lambda: one.found(mask))
    for end in (40, 64, 65, 1000, 2048):
        one.q.normal_()
        mask.copy_(seen(2, 1, 2048, end))
        graph.replay()
        assert float((out.float() - one.wanted(mask).float()).norm() / out.float().norm()) <= TOLERANCE[BF16], end
        assert torch.equal(out, one.found(mask))


def time_of(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of the fastest of ten replays."""
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


@pytest.mark.parametrize("cache", [None, E4M3])
def test_what_is_not_filled_is_not_read(cache: torch.dtype | None) -> None:
    """512 of 32k tokens take less than a fifth of the time of all; reading all of 2 GiB (1 GiB) takes over 200 us anywhere."""
    one = case(16, HEADS[0], 1, 32768, dtype=BF16, cache=cache)
    mask = seen(16, 1, 32768, 32768)
    graph, _ = replayed(lambda: one.found(mask))
    whole = time_of(graph)
    mask.copy_(seen(16, 1, 32768, 512))
    assert time_of(graph) < whole / 5


def test_fit_accepts_what_was_run() -> None:
    one = case(2, HEADS[0], 1, 333, dtype=BF16, cache=E4M3)
    problem = triton_decode.problem_of(one.q, one.k, one.v, None, **one.scales)
    assert not isinstance(triton_decode.fit(problem, Target.of(DEVICE)), Reject)
    assert isinstance(triton_decode.fit(replace(problem, tokens=17), Target.of(DEVICE)), Reject)
    assert math.isclose(problem.cache_bytes, 2 * 8 * 333 * (2 * 128 + 8))
