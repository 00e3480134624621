"""Models on the GPU whose decode attention runs in the kernel: the eager output, the report, and tokens of ``generate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import quant_compile
from tests.attention_support import MIXED, decoder, seeded

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 512}
MODELS = {
    "llama3": decoder(hf.LlamaConfig, hf.LlamaForCausalLM, **WIDE),
    "gemma2": decoder(hf.Gemma2Config, hf.Gemma2ForCausalLM, attn_implementation="eager", **WIDE, **MIXED),
    "gpt_oss": decoder(
        hf.GptOssConfig, hf.GptOssForCausalLM, num_local_experts=4, num_experts_per_tok=2, **WIDE, **MIXED
    ),
}
# What the kernel may add to the error that the model's own bf16 makes, which rounds scores and weights of attention.
WORSE = 1.1


def step(call: Any, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return call(input_ids=ids, past_key_values=cache, use_cache=True, attention_mask=mask).logits[:, -1].float()


@pytest.mark.parametrize("family", MODELS)
def test_decode_in_the_kernel(family: str) -> None:
    """A left-padded prompt, then tokens that are given; a policy that quantizes nothing; held to the model in f32."""
    model = seeded(MODELS[family], torch.bfloat16).cuda()
    exact = seeded(MODELS[family], torch.bfloat16).float().cuda()
    prompt = torch.randint(3, 90, (2, 40), device="cuda")
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    masks = [torch.cat((mask, torch.ones(2, n, dtype=mask.dtype, device="cuda")), 1) for n in (1, 2, 3)]
    tokens = torch.full((2, 1), 11, device="cuda")

    def run(call: Any, cache: Any) -> Tensor:
        return torch.stack([step(call, cache, tokens, given) for given in masks])

    with torch.no_grad():
        caches = [hf.StaticCache(config=model.config, max_cache_len=300) for _ in range(3)]
        for call, cache in zip((model, model, exact), caches, strict=True):
            step(call, cache, prompt, mask)
        eager, truth = run(model, caches[0]), run(exact, caches[2])
        torch._dynamo.reset()
        quant_compile.compile(model, {"default": "keep"})
        got = run(model, caches[1])
    assert float((got - truth).norm()) <= WORSE * float((eager - truth).norm())
    runs = {line.runs: line.count for line in quant_compile.report(model).attention}
    assert runs == {"triton_decode": 2}


def test_generate_in_the_kernel() -> None:
    """Blocks that share a graph, recorded steps: the report names the kernel."""
    model = seeded(
        decoder(hf.LlamaConfig, hf.LlamaForCausalLM, **(WIDE | {"num_hidden_layers": 4})), torch.bfloat16
    ).cuda()
    asked = {"input_ids": torch.randint(3, 90, (2, 40), device="cuda"), "max_new_tokens": 24, "do_sample": False}
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"})
    found = model.generate(**asked)
    assert found.shape == (2, 64) and torch.equal(found, model.generate(**asked))
    assert "triton_decode" in {line.runs for line in quant_compile.report(model).attention}
