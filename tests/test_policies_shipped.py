"""Every shipped policy fits a tiny model of its family: each rule decides something, and the bulk is quantized."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

from quant_compile.inspect.plan import Plan
from quant_compile.policy import SHIPPED, Policy, shipped_policies

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


def gemma3_multimodal() -> transformers.PretrainedConfig:
    return transformers.Gemma3Config(
        text_config={**TINY, "head_dim": 8},
        vision_config={**VISION, "patch_size": 14, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    )


def deepseek() -> transformers.PretrainedConfig:
    return transformers.DeepseekV3Config(
        **(TINY | {"num_key_value_heads": 4}), moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip


BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# (shipped policy, class, config, names that must be kept, weights quantized per layer)
CASES = {
    "llama3": ("llama3", "LlamaForCausalLM", lambda: transformers.LlamaConfig(**TINY), {"lm_head"}, 7),
    "llama3-tied": (
        "llama3",
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
        {"lm_head"},
        7,
    ),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**TINY, head_dim=8), {"lm_head"}, 7),
    "mistral": (
        "mistral",
        "MistralForCausalLM",
        lambda: transformers.MistralConfig(**TINY, head_dim=8),
        {"lm_head"},
        7,
    ),
    "gemma3-text": (
        "gemma3",
        "Gemma3ForCausalLM",
        lambda: transformers.Gemma3TextConfig(**TINY, head_dim=8),
        {"lm_head"},
        7,
    ),
    "gemma3-images": (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        gemma3_multimodal,
        {"lm_head", "vision_tower", "multi_modal_projector"},
        7,
    ),
    "phi3": ("phi3", "Phi3ForCausalLM", lambda: transformers.Phi3Config(**TINY, pad_token_id=0), {"lm_head"}, 4),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        {"lm_head", "mlp.gate"},
        6,
    ),
    "mixtral": (
        "mixtral",
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(**TINY, num_local_experts=4, head_dim=8),
        {"lm_head", "mlp.gate"},
        6,
    ),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM", deepseek, {"lm_head", "mlp.gate"}, 10),
    "bert": ("bert", "BertModel", lambda: transformers.BertConfig(**BERT), {"pooler"}, 6),
    "bert-masked": ("bert", "BertForMaskedLM", lambda: transformers.BertConfig(**BERT), {"decoder", "transform"}, 6),
    "bert-classifier": (
        "bert",
        "BertForSequenceClassification",
        lambda: transformers.BertConfig(**BERT),
        {"pooler", "classifier"},
        6,
    ),
}


def meta_model(class_name: str, config: transformers.PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(transformers, class_name)(config)


@pytest.mark.parametrize("case", CASES)
def test_every_rule_decides_and_the_layers_are_quantized(case: str) -> None:
    policy_name, class_name, config, kept, per_layer = CASES[case]
    policy = Policy.load(policy_name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = policy.resolve(meta_model(class_name, config()))
    assert plan.problems == ()
    quantized = [e for e in plan.entries if e.decision.scheme is not None]
    assert len(quantized) == 2 * per_layer
    special = {rule.scheme for rule in policy.rules} - {None}
    assert {e.decision.scheme for e in quantized} == {policy.default, *special}
    # What is not in a layer is kept, and each kept weight is one that the case names.
    for entry in plan.entries:
        if entry.decision.scheme is None:
            assert any(part in name for part in kept for name in entry.names), entry.names
    assert all(any(part in name for e in plan.entries for name in e.names if e.scheme == "keep") for part in kept)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_experts_are_quantized_and_routers_kept(name: str) -> None:
    config = transformers.Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    plan = Plan.of(Policy.load(name), meta_model("Qwen3MoeForCausalLM", config))
    by_name = {e.names[0]: e for e in plan.entries}
    reason = by_name["model.layers.0.mlp.gate"].decision.reason
    assert reason == "kept by convention: MoE router gate" if name == "qwen3" else reason.endswith(": router")
    experts = by_name["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.kind == "moe" and experts.block == "model.layers.0.mlp.experts"
    assert experts.decision.scheme is not None and not experts.decision.refused
    assert not plan.unmatched_rules


def test_every_shipped_file_is_covered_and_commented() -> None:
    assert {case[0] for case in CASES.values()} == set(shipped_policies())
    for path in SHIPPED.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path
        assert Policy.load(path).content_hash == Policy.load(path.stem).content_hash
