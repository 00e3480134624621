"""Attention over DeepSeek's latents on the GPU: the kernel against plain torch, and whole models against eager."""

from __future__ import annotations

import pytest
import torch

import quant_compile
from quant_compile.lowering.kernels.attention import torch_latent
from quant_compile.lowering.latent import ABSORBED
from tests.attention_support import generated, static_cache
from tests.lowering.test_attention import BF16, F16, additive, filled
from tests.lowering.test_triton_latent import compare
from tests.test_kv_cache import made
from tests.test_latent import model_of

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# K and V of the truth are rounded, and q in latents and sums of latents are here.
CLOSE_BF16 = 6e-2


@pytest.mark.parametrize("scheme", ["", "e4m3", "e5m2", "int8"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_kernel(scheme: str, dtype: torch.dtype) -> None:
    """DeepSeek's sizes and smaller ones, few and many rows, padded, unfilled, split and not."""
    for heads, t, rank, rope, length in (
        (128, 1, 512, 64, 4096),
        (16, 3, 512, 64, 700),
        (20, 1, 128, 32, 333),
        (128, 16, 256, 64, 1024),
    ):
        mask = filled(2, t, length, length - 7, left=(0, 5)).to(DEVICE)
        for splits in (None, 1, 5):
            compare(2, heads, t, rank, rope, length, mask, dtype=dtype, scheme=scheme, splits=splits, device=DEVICE)
        compare(2, heads, t, rank, rope, length, additive(mask, dtype), dtype=dtype, scheme=scheme, device=DEVICE)
        compare(1, heads, t, rank, rope, length, None, dtype=dtype, scheme=scheme, fixed=bool(scheme), device=DEVICE)


@pytest.mark.parametrize("scheme", ["", "FP8", "INT8"])
@pytest.mark.parametrize("policy", ["keep", "FP8_DYNAMIC"])
@pytest.mark.parametrize(("rank", "runs"), [(64, "triton_latent"), (24, ABSORBED)])
def test_models(scheme: str, policy: str, rank: int, runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left-padded decode over a static cache, with the linear in 16 bits and in planes that prefill shares."""
    monkeypatch.setattr(torch_latent, "WRITTEN_LAUNCHES", 1000)  # tiny models are launches and nothing else
    model = model_of("deepseek_v3", BF16, kv_lora_rank=rank, qk_rope_head_dim=32, head_dim=32).to(DEVICE)
    make = (lambda: made(model, scheme)) if scheme else (lambda: static_cache(model))
    wanted, cache = generated(model, model, make(), True), make()
    quant_compile.compile(model, {"default": "keep", "rules": [{"match": "kv_b_proj", "scheme": policy}]})
    got = generated(model, model, cache, True)
    (line,) = [line for line in quant_compile.report(model).attention if " 1 token" in line.what]
    assert line.runs == runs, line
    # Inputs in codes, and keys in codes, flip where sums in bf16 lie on two sides of a tie.
    close = CLOSE_BF16 * (1 + (policy != "keep") + bool(scheme))
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < close
