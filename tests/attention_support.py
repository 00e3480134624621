"""Tiny models of each kind of attention, and backends that run their graphs with every attention replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, fx, nn

from quant_compile.ir.attention import find_attention
from quant_compile.ir.graph import copy_graph, verify
from quant_compile.ir.inline import inline
from quant_compile.lowering.attention import AttentionChoice
from quant_compile.passes.insert_attention import replace_attention

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}


def decoder(config: type, model: type, **changes: Any) -> Callable[[], Any]:
    """A decoder of the Llama kind."""
    return lambda: model(config(**(SIZES | changes)))


def gpt2(**changes: Any) -> Any:
    """Heads that are not grouped."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96, "pad_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, **changes))


DECODERS: Mapping[str, Callable[[], Any]] = {
    "llama3": decoder(hf.LlamaConfig, hf.LlamaForCausalLM),
    "qwen3": decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM),
    # transformers 5.17 takes sdpa unless it is told otherwise, and leaves the softcap out.
    "gemma2": decoder(hf.Gemma2Config, hf.Gemma2ForCausalLM, attn_implementation="eager", **MIXED),
    "gemma3": decoder(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, **MIXED),
    "gpt_oss": decoder(hf.GptOssConfig, hf.GptOssForCausalLM, num_local_experts=4, num_experts_per_tok=2, **MIXED),
    "gpt2": gpt2,
    "mixtral": decoder(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=4),
    "deepseek_v3": decoder(hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, **MLA),
    "llama3-eager": decoder(hf.LlamaConfig, hf.LlamaForCausalLM, attn_implementation="eager"),
    "gpt2-eager": lambda: gpt2(attn_implementation="eager"),
}


def seeded(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model with seeded weights; sinks and the like that are left empty get values."""
    torch.manual_seed(3)
    model = make().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            nn.init.normal_(parameter)
    return model.to(dtype)


@dataclass
class Seen:
    """A Dynamo backend that replaces every attention by its truth, and remembers what it found in each graph."""

    sites: list[int] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    found: list[Any] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graph = inline(copy_graph(gm))
        sites, misses = find_attention(graph)
        self.sites.append(len(sites))
        self.found += sites
        self.misses += [miss.reason for miss in misses]
        for site in sites:
            replace_attention(graph.graph, site, AttentionChoice("truth", "a test"))
        return verify(graph, "quantized").forward


def prompt(padded: bool) -> tuple[Tensor, Tensor | None]:
    """Two prompts of seven tokens; padded: the first has three tokens less, at its left."""
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(5))
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def static_cache(model: Any, length: int = 24) -> Any:
    """An empty static cache whose tensors exist."""
    cache = hf.StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        model(input_ids=prompt(False)[0].to(model.device), past_key_values=cache, use_cache=True)
    cache.reset()
    return cache


def generated(model: Any, call: Callable[..., Any], cache: Any, padded: bool, steps: int = 4) -> list[Tensor]:
    """Logits of a prompt (its last token's) and of some tokens after it; the tokens are given, so that no two runs part."""
    ids, mask = (None if x is None else x.to(model.device) for x in prompt(padded))
    assert ids is not None
    out: list[Tensor] = []
    with torch.no_grad():
        for step in range(steps):
            given = {} if mask is None else {"attention_mask": mask}
            out.append(call(input_ids=ids, past_key_values=cache, use_cache=True, **given).logits[:, -1].clone())
            ids = torch.full((2, 1), 7 + step, device=model.device)
            mask = None if mask is None else torch.cat((mask, torch.ones_like(ids)), 1)
    return out


def compiled(model: Any, backend: Any) -> Callable[..., Any]:
    """The model under a backend, with nothing compiled before."""
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)
