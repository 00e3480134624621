"""Attention of unmodified models: found in every graph, the same when it is replaced, and named in the report.

The truth is the model's own eager output; in f32 the two differ in the order of sums alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention_support import DECODERS, Seen, compiled, generated, seeded, static_cache

# The order of sums in f32, over two layers.
CLOSE = 1e-4
# bf16 keeps 8 bits; the truth of sdpa rounds scores not at all, torch's CPU kernel does not either, but in blocks.
CLOSE_BF16 = 4e-2


def assert_close(got: list[Tensor], wanted: list[Tensor], close: float = CLOSE) -> None:
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert not torch.isnan(b).any()
        error = float((a - b).norm() / b.norm())
        assert error < close, f"step {step}: {error}"


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", DECODERS)
def test_every_attention_of_a_decoder_is_found_and_the_same(family: str, padded: bool) -> None:
    """Prefill and decode over a static cache: two layers, two sites in each graph, and no miss."""
    model = seeded(DECODERS[family])
    wanted = generated(model, model, static_cache(model), padded)
    cache, seen = static_cache(model), Seen()
    got = generated(model, compiled(model, seen), cache, padded)
    assert set(seen.sites) == {2} and len(seen.sites) >= 2, seen.sites
    assert seen.misses == []
    assert_close(got, wanted)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt_oss"])
def test_in_bf16_the_truth_rounds_where_the_model_does(family: str) -> None:
    model = seeded(DECODERS[family], torch.bfloat16)
    wanted = generated(model, model, static_cache(model), True)
    got = generated(model, compiled(model, Seen()), static_cache(model), True)
    assert_close(got, wanted, CLOSE_BF16)
