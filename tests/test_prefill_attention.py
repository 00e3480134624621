"""Prompts of unmodified models on a pretended GPU: which of their attention the prefill kernel gets, and that nothing else changes.

Kernels' ops run as their truth on a CPU; the truth of the whole is the model's own eager output.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import quant_compile
from quant_compile import QuantizedStaticCache
from quant_compile.ir.report import Report
from quant_compile.lowering.target import Target
from tests.attention_support import MIXED, decoder, seeded
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]

HEADS = {"head_dim": 32, "max_position_embeddings": 128}
MODELS = {
    "llama3": decoder(hf.LlamaConfig, hf.LlamaForCausalLM, **HEADS),
    "gemma2": decoder(hf.Gemma2Config, hf.Gemma2ForCausalLM, attn_implementation="eager", **HEADS, **MIXED),
    "gpt_oss": decoder(
        hf.GptOssConfig, hf.GptOssForCausalLM, num_local_experts=4, num_experts_per_tok=2, **HEADS, **MIXED
    ),
}
# bf16 keeps 8 bits; models that write products round scores and weights to it, torch's CPU kernel and ours do not.
CLOSE_BF16 = 4e-2
MANY, CODES = (
    "4 heads over 2 of 32, many tokens, static cache",
    "4 heads over 2 of 32, many tokens, static cache of e4m3",
)


@pytest.fixture
def like_an_h200(plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend believes in an sm90, with the kernels that there are; the cache keeps e4m3 as sm90 does."""
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: Target.fake("sm90")))


def pieces(call: Any, cache: Any) -> list[Tensor]:
    """Logits of the last tokens of a prompt that is padded at the left, and of a second piece that continues it."""
    ids = torch.randint(3, 90, (2, 41), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = []
    with torch.no_grad():
        for start, end in ((0, 20), (20, 41)):
            given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "past_key_values": cache}
            out.append(call(**given, use_cache=True).logits[:, -1].float())
    return out


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert not torch.isnan(a).any()
        assert float((a - b).norm() / b.norm()) < CLOSE_BF16


def static(model: Any, length: int = 64) -> Any:
    """An empty static cache whose tensors exist."""
    cache = hf.StaticCache(config=model.config, max_cache_len=length)
    pieces(model, cache)
    cache.reset()
    return cache


def runs(report: Report) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in report.attention:
        found.setdefault(line.what, set()).add(line.runs)
    return found


@pytest.mark.parametrize("family", MODELS)
def test_a_prompt_and_its_continuation(family: str, like_an_h200: None, plain_inductor: CompileCounter) -> None:
    """Of every layer, windows and products included; the report says so. A mask is read once for all layers that have it."""
    model = seeded(MODELS[family], torch.bfloat16)
    wanted = pieces(model, static(model))
    cache = static(model)
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"})
    assert_close(pieces(model, cache), wanted)
    report = quant_compile.report(model)
    found = runs(report)
    assert found.pop(MANY) == {"triton_prefill"}
    assert all(kernels == {"triton_prefill"} for kernels in found.values()), found
    assert "attention: 4 heads over 2 of 32, many" in str(report)
    for gm in plain_inductor.graphs:
        calls = [node for node in gm.graph.nodes if str(node.target).startswith("sglq_kernels.")]
        masks = {node.args[3] for node in calls if "attention" in str(node.target)}
        reached = [node.args[0] for node in calls if "reach" in str(node.target)]
        assert len(reached) == len(masks) == (1 if family == "llama3" else 2) and set(reached) == masks


@pytest.mark.parametrize("family", MODELS)
def test_over_codes(family: str, like_an_h200: None) -> None:
    """As eager code that computes the values of all codes."""
    model = seeded(MODELS[family], torch.bfloat16)
    wanted = pieces(model, QuantizedStaticCache(model.config, max_cache_len=64))
    cache = QuantizedStaticCache(model.config, max_cache_len=64)
    pieces(model, cache)
    cache.reset()
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"})
    assert_close(pieces(model, cache), wanted)
    assert runs(quant_compile.report(model))[CODES] == {"triton_prefill"}


def test_keep_leaves_prompts_alone(like_an_h200: None) -> None:
    model = seeded(MODELS["llama3"], torch.bfloat16)
    cache = static(model)
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"}, attention="keep")
    pieces(model, cache)
    assert runs(quant_compile.report(model)) == {MANY: {"as written"}}


def test_one_graph_serves_padded_prompts_of_every_length(like_an_h200: None) -> None:
    """In ``generate``: a symbol for the tokens, and one for the room. A prompt without padding stays as it is written."""
    model = seeded(MODELS["llama3"], torch.bfloat16)
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"})
    for length in (20, 31):
        ids = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    lines = [line for line in quant_compile.report(model).attention if line.what == MANY]
    assert [(line.runs, line.count) for line in lines] == [("triton_prefill", 2)]
    model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    lines = [line for line in quant_compile.report(model).attention if line.what == MANY]
    assert {line.runs for line in lines} == {"triton_prefill", "as written"}
    assert "it is causal without a mask" in {line.reason for line in lines}
