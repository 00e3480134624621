"""Every shipped policy fits a tiny model of its family: each rule decides something, and the bulk is quantized."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from quant_compile.ir.scheme import PRESETS
from quant_compile.model.plan import Plan
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


def qwen3_moe() -> transformers.PretrainedConfig:
    return transformers.Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


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
        qwen3_moe,
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
    "nvfp4_experts": ("nvfp4_experts", "Qwen3MoeForCausalLM", qwen3_moe, {"lm_head", "mlp.gate"}, 6),
    "nvfp4_experts-shared": ("nvfp4_experts", "DeepseekV3ForCausalLM", deepseek, {"lm_head", "mlp.gate"}, 10),
}
# Policies of a format, for any model: no rules, so that conventions alone keep weights.
FORMATS = ("w4a8", "w4afp8", "nvfp4", "nvfp4a16", "mxfp4")
for _name in FORMATS:
    CASES[_name] = (_name, "LlamaForCausalLM", lambda: transformers.LlamaConfig(**TINY), {"lm_head"}, 7)
    CASES[f"{_name}-moe"] = (_name, "Qwen3MoeForCausalLM", qwen3_moe, {"lm_head", "mlp.gate"}, 6)


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
    plan = Plan.of(Policy.load(name), meta_model("Qwen3MoeForCausalLM", qwen3_moe()))
    by_name = {e.names[0]: e for e in plan.entries}
    reason = by_name["model.layers.0.mlp.gate"].decision.reason
    assert reason == "kept by convention: MoE router gate" if name == "qwen3" else reason.endswith(": router")
    experts = by_name["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.kind == "moe" and experts.block == "model.layers.0.mlp.experts"
    assert experts.decision.scheme is not None and not experts.decision.refused
    assert not plan.unmatched_rules


def test_the_mixed_policy_gives_fp4_to_experts_alone() -> None:
    """Shared experts and attention are linears: FP8."""
    plan = Plan.of(Policy.load("nvfp4_experts"), meta_model("DeepseekV3ForCausalLM", deepseek()))
    given = {e.names[0].removeprefix("model.layers.0."): e.scheme for e in plan.entries if ".layers.0." in e.names[0]}
    experts = {name for name in given if name.startswith("mlp.experts.")}
    assert len(experts) == 2 and {given[name] for name in experts} == {"NVFP4"}
    assert given.pop("mlp.gate") == "keep"
    assert "mlp.shared_experts.up_proj" in given and "self_attn.o_proj" in given
    assert {scheme for name, scheme in given.items() if name not in experts} == {"FP8_DYNAMIC"}


def test_a_file_named_like_a_preset_says_what_the_preset_says() -> None:
    """Names of presets are tried first, so a file of that name must not mean anything else."""
    alike = [name for name in shipped_policies() if name.upper() in PRESETS]
    assert sorted(alike) == sorted(FORMATS)
    for name in alike:
        from_file, preset = Policy.load(shipped_policies()[name]), Policy.load(name)
        assert preset.source is None and from_file == preset == Policy(PRESETS[name.upper()])
        assert from_file.content_hash == preset.content_hash


def test_names_win_over_files_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nvfp4", "nvfp4.yaml", "llama3"):
        Path(name).write_text("default: W8A16", encoding="utf-8")
    for name in ("nvfp4", "NVFP4"):
        assert Policy.load(name).default == PRESETS["NVFP4"]
    assert Policy.load("llama3").source == str(SHIPPED / "llama3.yaml")
    for name in ("./nvfp4", "nvfp4.yaml", Path("nvfp4"), "./llama3"):
        assert Policy.load(name).default == PRESETS["W8A16"]


def test_no_shipped_policy_falls_back_by_itself() -> None:
    """What was asked for is served or is an error; the files tell which line changes that, and for whom."""
    for name, path in shipped_policies().items():
        policy = Policy.load(path)
        assert policy.fallback is None, name
        text, line = path.read_text(encoding="utf-8"), "# fallback: weight_only\n"
        assert (line in text) == (name in ("w4afp8", "nvfp4", "mxfp4", "nvfp4_experts"))
        if line in text:
            allowed = Policy.load(dict(yaml.safe_load(text.replace(line, line[2:]))))
            assert allowed == replace(policy, fallback="weight_only")


def test_every_shipped_file_is_covered_and_commented() -> None:
    assert {case[0] for case in CASES.values()} == set(shipped_policies())
    for path in SHIPPED.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path
        assert Policy.load(path).content_hash == Policy.load(path.stem).content_hash
