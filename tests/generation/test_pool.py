"""Blocks of cache: their lengths, whose they are, and how many are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant_compile.generation import caches
from quant_compile.generation.facts import LayerShape
from quant_compile.generation.pool import MOST_IDLE, Key, Pool, rounded
from tests.generation.support import llama

CPU = torch.device("cpu")


def key(rows: int = 2, length: int = 64) -> Key:
    return Key(rows, length, 0, torch.float32, CPU)


def make(rows: int = 2, length: int = 64) -> Any:
    return caches.make(llama().config, [LayerShape(2, 8, 2, 8)], rows, length, torch.float32, CPU)


def test_lengths_are_multiples_of_64_and_at_most_an_eighth_too_long() -> None:
    assert [rounded(n) for n in (1, 64, 65, 192, 1024, 1025, 2113, 5000)] == [64, 64, 128, 192, 1024, 1152, 2304, 5120]
    for tokens in range(1, 20000, 7):
        length = rounded(tokens)
        assert length % 64 == 0 and tokens <= length <= max(tokens + 63, tokens * 9 // 8 + 1)


def test_a_block_is_one_callers_at_a_time_and_comes_back_empty() -> None:
    pool = Pool()
    first, second = pool.take(key(), make), pool.take(key(), make)
    assert first is not None and second is not None and first is not second
    caches.fill(first.cache)
    first.cache.layers[0].keys.fill_(3)
    first.cache.layers[0].cumulative_length.add_(5)
    addresses = [tensor.data_ptr() for tensor in caches.tensors(first.cache)]
    pool.give(first)
    again = pool.take(key(), make)
    assert again is first and again.cache.fresh and again.cache.get_seq_length() == 0
    assert [tensor.data_ptr() for tensor in caches.tensors(again.cache)] == addresses
    assert not any(tensor.any() for tensor in caches.tensors(again.cache))


def test_the_least_recently_used_block_goes() -> None:
    pool = Pool()
    blocks = [pool.take(key(length=64 * n), lambda n=n: make(length=64 * n)) for n in range(1, MOST_IDLE + 3)]
    for block in blocks:
        assert block is not None
        pool.give(block)
    assert len(pool) == MOST_IDLE
    assert pool.take(key(length=64), make) is not blocks[0]
    assert pool.take(key(length=64 * 3), make) is blocks[2]


def test_no_memory_for_a_block_frees_the_idle_ones() -> None:
    pool = Pool()
    block = pool.take(key(), make)
    assert block is not None
    pool.give(block)
    calls = []

    def once_out_of_memory() -> Any:
        calls.append(len(pool))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return make(4)

    assert pool.take(key(4), once_out_of_memory) is not None
    assert calls == [1, 0]


def test_growing_keeps_the_cache_object_and_what_it_holds() -> None:
    small, large = make(length=64), make(length=128)
    caches.fill(small)
    for tensor in (small.layers[0].keys, small.layers[0].values):
        tensor.normal_()
    small.layers[0].cumulative_length.fill_(10)
    held = small.layers[0].keys[:, :, :10].clone()
    old, new = small.layers[0].keys.data_ptr(), large.layers[0].keys.data_ptr()
    caches.move(small, large, 10)
    assert small.layers[0].keys.data_ptr() == new and large.layers[0].keys.data_ptr() == old
    assert torch.equal(small.layers[0].keys[:, :, :10], held) and small.get_max_length() == 128
    assert int(small.layers[0].cumulative_length) == 10 and not small.layers[0].keys[:, :, 10:].any()


def test_beams_are_reordered_in_place() -> None:
    cache = make(rows=3)
    caches.fill(cache)
    layer = cache.layers[0]
    layer.keys.normal_()
    before, address = layer.keys.clone(), layer.keys.data_ptr()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.keys.data_ptr() == address
    assert torch.equal(layer.keys, before[[2, 0, 0]])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_blocks_are_ordinary_tensors(mode: Any) -> None:
    """A block made under inference mode must be writable outside of it."""
    with mode():
        made = make()
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in caches.tensors(made))
