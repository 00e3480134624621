"""Attention over DeepSeek's latents: absorbed where few tokens read a static cache, the same as eager, and said in the report.

The truth is the model's own eager output. In f32 the two differ in the order of sums; in 16 bits also in what is rounded: q in latents
and sums of latents instead of k and v.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import quant_compile
from quant_compile.ir.report import Report
from quant_compile.lowering import latent
from quant_compile.lowering.latent import ABSORBED
from tests.attention_support import MLA, decoder, generated, seeded, static_cache
from tests.runtime_support import plain_inductor

__all__ = ["plain_inductor"]

# The order of sums in f32, over two layers.
CLOSE = 1e-4
# bf16 keeps 8 bits; eager rounds k and v, the absorbed form q in latents and sums of latents: as far from f32 as from each other.
CLOSE_BF16 = 6e-2
DENSE = {"first_k_dense_replace": 2}  # no experts, which are not what is tested here
FAMILIES: dict[str, Any] = {
    "deepseek_v2": (hf.DeepseekV2Config, hf.DeepseekV2ForCausalLM, {"topk_method": "greedy"}),
    "deepseek_v3": (hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, {}),
}
KEPT_HEAD = [{"match": "lm_head", "scheme": "keep"}]


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config, model, more = FAMILIES[family]
    return seeded(decoder(config, model, **(MLA | DENSE | more | changes)), dtype)


@pytest.fixture(autouse=True)
def launches_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models would be launches and nothing else."""
    monkeypatch.setattr(latent, "ABSORBED_LAUNCHES", 0)


def error(got: list[Any], wanted: list[Any]) -> float:
    assert not any(torch.isnan(x).any() for x in got)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))


def decode_lines(report: Report) -> list[Any]:
    return [line for line in report.attention if " 1 token" in line.what]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "rank"), [("deepseek_v2", None), ("deepseek_v3", 24)])
def test_decode_absorbs_and_is_eager(family: str, rank: int | None, attention: str) -> None:
    """Left-padded, over a cache in f32: two layers, and nothing else is."""
    model = model_of(family, q_lora_rank=rank, attn_implementation=attention)
    wanted = generated(model, model, static_cache(model), True)
    cache = static_cache(model)
    quant_compile.compile(model, {"default": "keep"})
    got = generated(model, model, cache, True)
    (line,) = decode_lines(quant_compile.report(model))
    assert (line.runs, line.count) == (ABSORBED, 2), line
    assert "static cache of latents (24 + 8)" in line.what and "the linear of K and V is absorbed" in line.reason
    assert error(got, wanted) < CLOSE
