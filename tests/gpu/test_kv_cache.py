"""A quantized KV cache on the GPU: codes that Inductor's kernels write, tokens through the decode kernel, and bytes by the allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import quant_compile
from quant_compile.ir.kv import encode, parse_cache
from tests.attention_support import DECODERS, seeded
from tests.generation.support import prompt

pytestmark = pytest.mark.gpu

SCHEMES = ("FP8", "FP8_E5M2", "INT8")
# p, v and the result are rounded to bf16, which keeps 8 bits, through two layers.
CLOSE = 4e-2


@pytest.mark.parametrize("name", SCHEMES)
def test_writes(name: str) -> None:
    """Bit for bit the eager codes and scales: rows of all sizes, zeros, NaN and inf."""
    scheme = parse_cache(name)
    x = (
        torch.randn(2, 4, 33, 128, device="cuda", dtype=torch.bfloat16)
        * torch.logspace(-20, 20, 33, device="cuda").bfloat16()[:, None]
    )
    x[0, 0, 0], x[0, 0, 1, 5], x[0, 0, 2, 7] = 0.0, float("nan"), float("inf")
    positions = torch.randperm(64, device="cuda")[:33]

    def write(x: Tensor, codes: Tensor, scales: Tensor) -> None:
        made, own = encode(x, scheme)
        codes.index_copy_(2, positions, made)
        scales.index_copy_(2, positions, own)

    found, wanted = (
        [torch.zeros(2, 4, 64, 128, dtype=scheme.stored, device="cuda"), torch.zeros(2, 4, 64, 1, device="cuda")]
        for _ in range(2)
    )
    torch.compile(write)(x, *found)
    write(x, *wanted)
    odd = found[1].isnan() & wanted[1].isnan() | (found[1].isinf() & wanted[1].isinf())
    assert ((found[1] == wanted[1]) | odd).all()
    assert ((found[0] == wanted[0]) | odd).all()


@pytest.mark.parametrize("family", ["llama3", "gemma3", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("name", SCHEMES)
def test_generate_is_the_eager_cache(family: str, name: str) -> None:
    """Logits of each step, left-padded, past the windows; the same tokens are forced on both."""
    model = seeded(DECODERS[family], torch.bfloat16).cuda()
    inputs = {key: value.cuda() for key, value in prompt(2, 7, padded=True).items()}
    forced = torch.randint(3, 90, (12,), generator=torch.Generator().manual_seed(2)).tolist()

    class Forced(hf.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            token = forced[input_ids.shape[1] - 7]
            return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([token], device=scores.device), 0.0)

    def logits(**more: Any) -> list[Tensor]:
        made = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True,
            logits_processor=hf.LogitsProcessorList([Forced()]), **more,
        )  # fmt: skip
        return [step.float() for step in made.logits]

    cache = quant_compile.QuantizedStaticCache(model.config.get_text_config(decoder=True), 40, name)
    wanted = logits(past_key_values=cache)
    quant_compile.compile(model, {"default": "keep", "kv_cache": name})
    for _ in range(3):  # compiled, recorded, replayed
        for a, b in zip(logits(), wanted, strict=True):
            assert float((a - b).norm() / b.norm()) < CLOSE
    lines = [line for line in quant_compile.report(model).attention if "1 token" in line.what]
    if family in ("gemma3", "llama3", "gpt_oss"):
        assert lines and all("static cache of" in line.what for line in lines)


def test_bytes_by_the_allocator() -> None:
    """At most 0.53 of the cache in 16 bits."""
    config = hf.LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, hidden_size=1024)
    held = []
    for kind in (hf.StaticCache, quant_compile.QuantizedStaticCache):
        before = torch.cuda.memory_allocated()
        cache = kind(config, 8192)
        cache.early_initialization(4, 8, 128, torch.bfloat16, torch.device("cuda"))
        held.append(torch.cuda.memory_allocated() - before)
        del cache
    assert held[1] <= 0.53 * held[0]
