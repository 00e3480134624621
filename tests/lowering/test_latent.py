"""When a linear is absorbed: an estimate of both forms, and its reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quant_compile.ir.scheme import parse
from quant_compile.lowering.attention import WRITTEN
from quant_compile.lowering.latent import ABSORBED, LatentProblem, choose_latent
from quant_compile.lowering.target import Target

# DeepSeek-V3: 128 heads, K of 128 without rope, V of 128; decode over a cache of 4096.
V3 = LatentProblem(1, 128, 192, 128, 512, 64, 1, 4096, 128 * 256, torch.bfloat16)


@pytest.mark.parametrize("target", ["cpu", "sm80", "sm90", "sm100"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokens": 16},
        {"batch": 64},
        {"codes": "e4m3"},
        {"scheme": parse("FP8_DYNAMIC")},
        {"batch": None, "length": None},
    ],
)
def test_decode_over_a_long_cache_absorbs(target: str, changes: dict[str, Any]) -> None:
    choice = choose_latent(replace(V3, **changes), Target.fake(target))
    assert choice.runs == (ABSORBED if target == "cpu" else "triton_latent"), choice
    assert "the linear of K and V is absorbed: estimated at" in choice.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 17}, "absorbed are up to 16 tokens"),
        ({"tokens": None}, "absorbed are up to 16 tokens"),
        ({"length": 16, "scheme": parse("FP8_DYNAMIC")}, "if they were absorbed"),
        ({"length": 4, "tokens": 16}, "if they were absorbed"),
    ],
)
def test_what_gains_nothing_stays(changes: dict[str, Any], reason: str) -> None:
    choice = choose_latent(replace(V3, **changes), Target.fake("cpu"))
    assert choice.runs == WRITTEN and reason in choice.reason


def test_a_layout_that_is_taken_apart_at_each_step_counts() -> None:
    """Of a cache of this size the linear costs less than its planes in another order than rows."""
    coded = replace(V3, length=192, scheme=parse("W4A16"))
    assert choose_latent(coded, Target.fake("cpu")).runs == ABSORBED
    assert choose_latent(replace(coded, layout="cpu_int4", length=16), Target.fake("cpu")).runs == WRITTEN


def test_what_no_kernel_takes_is_plain_torch() -> None:
    for changes in ({"dtype": torch.float32}, {"mask": "bool", "mask_heads": True}, {"rank": 384, "rows": 128 * 256}):
        assert choose_latent(replace(V3, **changes), Target.fake("sm90")).runs == ABSORBED


def test_lines_name_what_is_cached() -> None:
    assert V3.text == "128 heads of 192 and 128, 1 token, static cache of latents (512 + 64)"
    assert "static cache of int8 of latents" in replace(V3, codes="int8").text
