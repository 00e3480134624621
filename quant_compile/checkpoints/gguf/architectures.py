"""What architectures of GGUF are in transformers: a config out of metadata, names of tensors, and what llama.cpp's converter has changed.

One record for each ``general.architecture``. Reads the metadata, and the small tensors that hold factors of rotary frequencies. Whatever
the file says of the model's sizes is set, also where it is transformers' default. Sources: the GGUF specification, the names that the
``gguf`` package lists, and llama.cpp's graphs for what a file does not say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from quant_compile.checkpoints.files import Part
from quant_compile.checkpoints.gguf.container import fail
from quant_compile.checkpoints.gguf.files import GgufFiles
from quant_compile.checkpoints.weight import REAL

Config = dict[str, Any]
_T = TypeVar("_T", int, float, str)
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
MOST_FACTORS = 1 << 16
# How llama3 scales frequencies, but for the factor; no file says it, and all models of that kind have it so.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func


@dataclass(frozen=True)
class Facts:
    """The metadata of a model, by keys without the architecture."""

    files: GgufFiles
    architecture: str

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> Any:
        """A value; a number of layers' own (an array) is none.

        Raises:
            CheckpointError: it has another type.
        """
        return self.files.head.get(f"{self.architecture}.{key}", kind, default)

    def need(self, key: str, kind: type[_T]) -> Any:
        """A value that must be there; sizes are above 0.

        Raises:
            CheckpointError: it is not, or has another type.
        """
        found = self.files.head.need(f"{self.architecture}.{key}", kind)
        if kind is int and not 0 < found < 1 << 31:
            fail(self.files.folder, f"{self.architecture}.{key} is {found}")
        return found

    def has(self, tensor: str) -> bool:
        """Whether the model has a tensor."""
        return tensor in self.files.tensors

    def rows(self, tensor: str) -> int:
        """Of a tensor's matrices.

        Raises:
            CheckpointError: it is missing, or no matrix.
        """
        info = self.files.tensors.get(tensor)
        if info is None or len(info.shape) < 2:
            fail(self.files.folder, f"has no {tensor}", "Fix: download the whole model.")
        return info.shape[-2]

    def factors(self, tensor: str) -> list[float]:
        """The numbers of a small tensor.

        Raises:
            CheckpointError: it is no short list of positive numbers.
        """
        info = self.files.tensors[tensor]
        if info.dtype not in REAL or len(info.shape) != 1 or info.shape[0] > MOST_FACTORS:
            fail(info.where, f"must be at most {MOST_FACTORS} plain numbers")
        found: list[float] = self.files.load(Part(tensor), "cpu").float().tolist()
        if not all(math.isfinite(factor) and factor > 0 for factor in found):
            fail(info.where, "holds a factor that is no positive number")
        return found


@dataclass(frozen=True)
class Architecture:
    """What a ``general.architecture`` is in transformers.

    Attributes:
        config: the metadata -> ``model_type`` and the rest of transformers' config.
        names: of tensors, without ``blk.N.`` and mostly without ``.weight`` -> of modules, without ``model.layers.N.``.
        permuted: rows of q and k are in llama.cpp's order.
        offset: norms are stored with 1 added.
        exports: ``writer`` can make such a file.
    """

    config: Callable[[Facts], Config]
    names: Mapping[str, str]
    permuted: bool = False
    offset: bool = False
    exports: bool = False


# --- names ---

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FFN = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_DENSE = {**_OUTER, **_ATTENTION, **_FFN, **_FFN_NORM}
_GEMMA = {
    **_OUTER, **_ATTENTION, **_FFN, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def _shared(module: str) -> dict[str, str]:
    return {f"{name}_shexp": f"mlp.{module}.{path.removeprefix('mlp.')}" for name, path in _FFN.items()}


_LATENT = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": "self_attn.kv_b_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias", "exp_probs_b": "mlp.gate.e_score_correction_bias",
}  # fmt: skip

# --- configs ---


def _base(f: Facts) -> Config:
    """What all have."""
    hidden, heads = f.need("embedding_length", int), f.need("attention.head_count", int)
    vocab = f.get("vocab_size", int) or f.rows("token_embd.weight")
    return {
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": f.get("attention.head_count_kv", int, heads),
        "head_dim": f.get("attention.key_length", int, hidden // heads), "num_hidden_layers": f.need("block_count", int),
        "intermediate_size": f.need("feed_forward_length", int), "max_position_embeddings": f.need("context_length", int),
        "rms_norm_eps": f.need("attention.layer_norm_rms_epsilon", float), "vocab_size": vocab,
        "tie_word_embeddings": not f.has("output.weight"), "rope_parameters": _rope(f), **_tokens(f),
    }  # fmt: skip


def _tokens(f: Facts) -> Config:
    """Ids of tokens; a second one that ends a turn ends generation as well."""

    count = f.get("vocab_size", int) or f.rows("token_embd.weight")

    def of(name: str) -> int | None:
        token = f.files.head.get(f"tokenizer.ggml.{name}_token_id", int)
        if token is None or token in (-1, (1 << 32) - 1):  # no token
            return None
        if not 0 <= token < count:
            fail(f.files.folder, f"tokenizer.ggml.{name}_token_id is {token}, and there are {count} tokens")
        return token

    ends = [token for token in dict.fromkeys((of("eos"), of("eot"))) if token is not None]
    last = ends if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": of("bos"), "eos_token_id": last, "pad_token_id": of("padding")}


def _rope(f: Facts) -> Config:
    """Rotary frequencies, as ``rope_parameters`` has them."""
    out: Config = {"rope_type": "default", "rope_theta": f.get("rope.freq_base", float, 10000.0)}
    kind, factor = f.get("rope.scaling.type", str, "none"), f.get("rope.scaling.factor", float, 1.0)
    context = f.get("rope.scaling.original_context_length", int)
    if f.has(FREQUENCIES):
        return out | (_llama3(f, out["rope_theta"], context) or {})
    if kind == "linear" and factor != 1:
        return out | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor != 1:
        betas = {key: f.get(f"rope.scaling.yarn_{key}", float) for key in ("beta_fast", "beta_slow")}
        betas = {key: value for key, value in betas.items() if value is not None}
        context = context or f.need("context_length", int)
        return out | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context, **betas}
    if kind not in ("none", "linear", "yarn", "longrope"):
        fail(f.files.folder, f"{f.architecture}.rope.scaling.type {kind[:40]!r} is not known")
    return out


def _llama3(f: Facts, theta: float, context: int | None) -> Config | None:
    """The factors of Llama 3.1 and later as its rule; None where they follow from none, and ``own_frequencies`` uses them as they are."""
    factors = torch.tensor(f.factors(FREQUENCIES), dtype=torch.float64)
    rule = {"factor": float(factors.max()), "original_max_position_embeddings": context or LLAMA3_CONTEXT, **LLAMA3}
    made = llama3_factors(len(factors), theta, rule)
    return {"rope_type": "llama3", **rule} if rule["factor"] > 1 and torch.allclose(made, factors, rtol=1e-4) else None


def llama3_factors(count: int, theta: float, rule: Mapping[str, Any]) -> Tensor:
    """What llama3 divides each frequency by, f64 [count]."""
    waves = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    low, high, context = rule["low_freq_factor"], rule["high_freq_factor"], rule["original_max_position_embeddings"]
    smooth = ((context / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rule["factor"] + smooth)


def own_frequencies(f: Facts, config: Any) -> list[float] | None:
    """Factors that divide a model's frequencies, where its config has no rule for them."""
    rope = config.rope_parameters if f.has(FREQUENCIES) else {"rope_type": "llama3"}
    factors = [] if rope.get("rope_type") == "llama3" else f.factors(FREQUENCIES)
    return factors if any(factor != 1 for factor in factors) else None


def _experts(f: Facts, count: str = "num_experts") -> Config:
    inner = f.get("expert_feed_forward_length", int) or f.rows(_first_experts(f))
    return {
        count: f.need("expert_count", int), "num_experts_per_tok": f.need("expert_used_count", int),
        "moe_intermediate_size": inner,
    }  # fmt: skip


def _first_experts(f: Facts) -> str:
    first = f.get("leading_dense_block_count", int, 0)
    return f"blk.{first}.ffn_up_exps.weight"


def _llama(f: Facts) -> Config:
    """Llama, Mistral and Mixtral, which files call by one name."""
    out = _base(f)
    if f.get("expert_count", int, 0):
        experts = {
            "num_local_experts": f.need("expert_count", int),
            "num_experts_per_tok": f.need("expert_used_count", int),
        }
        return {**out, "model_type": "mixtral", **experts, "sliding_window": f.get("attention.sliding_window", int)}
    if "mistral" in f.files.head.get("general.name", str, "").lower() and not f.has("blk.0.attn_q.bias"):
        return {**out, "model_type": "mistral", "sliding_window": f.get("attention.sliding_window", int)}
    biased = {"attention_bias": f.has("blk.0.attn_q.bias"), "mlp_bias": f.has("blk.0.ffn_up.bias")}
    return {**out, "model_type": "llama", **biased}


def _qwen2(f: Facts) -> Config:
    return {**_base(f), "model_type": "qwen2", "use_sliding_window": False}


def _qwen3(f: Facts) -> Config:
    return {
        **_base(f),
        "model_type": "qwen3",
        "use_sliding_window": False,
        "attention_bias": f.has("blk.0.attn_q.bias"),
    }


def _qwen2moe(f: Facts) -> Config:
    shared = f.get("expert_shared_feed_forward_length", int) or f.rows("blk.0.ffn_up_shexp.weight")
    return {
        **_base(f), "model_type": "qwen2_moe", **_experts(f), "shared_expert_intermediate_size": shared, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": False, "use_sliding_window": False,
    }  # fmt: skip


def _qwen3moe(f: Facts) -> Config:
    return {
        **_base(f), "model_type": "qwen3_moe", **_experts(f), "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "use_sliding_window": False, "attention_bias": f.has("blk.0.attn_q.bias"),
    }  # fmt: skip


def _gemma(f: Facts, largest: int) -> Config:
    """``largest``: layers of the model whose attention is scaled by its hidden size, and not by that of its heads."""
    out = _base(f)
    scalar = (
        out["hidden_size"] // out["num_attention_heads"] if out["num_hidden_layers"] == largest else out["head_dim"]
    )
    scale = f.get("attention.scale", float)
    return {
        **out, "query_pre_attn_scalar": scalar if scale is None else scale**-2, "sliding_window": f.need("attention.sliding_window", int),
        "attn_logit_softcapping": f.get("attn_logit_softcapping", float),
        "final_logit_softcapping": f.get("final_logit_softcapping", float),
    }  # fmt: skip


def _gemma2(f: Facts) -> Config:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    found = _gemma(f, largest=46)
    return {**found, **{key: found[key] or value for key, value in caps.items()}, "model_type": "gemma2"}


def _gemma3(f: Facts) -> Config:
    out = _gemma(f, largest=62)
    every = f.get("attention.sliding_window_pattern", int, 6)
    kinds = [
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(min(out["num_hidden_layers"], 1 << 16))
    ]
    whole = {**out["rope_parameters"], "rope_theta": f.get("rope.freq_base", float, 1e6)}
    local = {"rope_type": "default", "rope_theta": f.get("rope.freq_base_swa", float, 10000.0)}
    ropes = {"full_attention": whole, "sliding_attention": local}
    return {**out, "model_type": "gemma3_text", "layer_types": kinds, "rope_parameters": ropes}


def _phi3(f: Facts) -> Config:
    out = _base(f)
    rope, context = out["rope_parameters"], f.get("rope.scaling.original_context_length", int)
    rope["partial_rotary_factor"] = f.get("rope.dimension_count", int, out["head_dim"]) / out["head_dim"]
    if f.has(LONG) and f.has(SHORT):
        rope |= {"rope_type": "longrope", "long_factor": f.factors(LONG), "short_factor": f.factors(SHORT)}
    out |= {"original_max_position_embeddings": context or out["max_position_embeddings"]}
    out |= {"bos_token_id": out["bos_token_id"], "pad_token_id": out["pad_token_id"]}
    return {**out, "model_type": "phi3", "sliding_window": f.get("attention.sliding_window", int) or None}


def _gpt_oss(f: Facts) -> Config:
    out = _base(f)
    experts = _experts(f, "num_local_experts")
    if out["rope_parameters"]["rope_type"] == "yarn":
        out["rope_parameters"] |= {"truncate": False}
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(min(out["num_hidden_layers"], 1 << 16))]
    out |= {"intermediate_size": experts.pop("moe_intermediate_size"), "layer_types": kinds}
    return {**out, "model_type": "gpt_oss", **experts, "sliding_window": f.need("attention.sliding_window", int)}


def _deepseek2(f: Facts) -> Config:
    """DeepSeek V2, whose router has a softmax, and V3, whose router has sigmoids."""
    out = _base(f)
    out.pop("head_dim")
    rope = f.need("rope.dimension_count", int)
    key = f.get("attention.key_length_mla", int) or f.need("attention.key_length", int)
    value = f.get("attention.value_length_mla", int) or f.need("attention.value_length", int)
    multiplier = f.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if out["rope_parameters"]["rope_type"] == "yarn" and multiplier:
        mscale = round(10 * multiplier, 6)
        out["rope_parameters"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    out |= {
        "kv_lora_rank": f.need("attention.kv_lora_rank", int), "q_lora_rank": f.get("attention.q_lora_rank", int),
        "qk_rope_head_dim": rope, "qk_nope_head_dim": key - rope, "v_head_dim": value, "num_key_value_heads": out["num_attention_heads"],
        "first_k_dense_replace": f.get("leading_dense_block_count", int, 0), **_experts(f, "n_routed_experts"),
        "n_shared_experts": f.get("expert_shared_count", int) or None, "routed_scaling_factor": f.get("expert_weights_scale", float, 1.0),
        "num_hidden_layers": out["num_hidden_layers"] - f.get("nextn_predict_layers", int, 0),
    }  # fmt: skip
    whole = 8 if out["n_routed_experts"] == 256 else 1
    groups, used = f.get("expert_group_count", int, whole), f.get("expert_group_used_count", int, max(1, whole // 2))
    if f.get("expert_gating_func", int, SOFTMAX) == SIGMOID:
        more = {"norm_topk_prob": f.get("expert_weights_norm", bool, True), "n_group": groups, "topk_group": used}
        return {**out, "model_type": "deepseek_v3", **more}
    method = "group_limited_greedy" if groups > 1 else "greedy"
    more = {
        "topk_method": method,
        "n_group": groups,
        "topk_group": used,
        "norm_topk_prob": f.get("expert_weights_norm", bool, False),
    }
    return {**out, "model_type": "deepseek_v2", **more}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_llama, {**_DENSE, **_ROUTER}, permuted=True, exports=True),
    "qwen2": Architecture(_qwen2, _DENSE, exports=True),
    "qwen3": Architecture(_qwen3, {**_DENSE, **_QK_NORMS}, exports=True),
    "qwen2moe": Architecture(
        _qwen2moe, {**_DENSE, **_ROUTER, **_shared("shared_expert"), "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
    ),
    "qwen3moe": Architecture(_qwen3moe, {**_DENSE, **_QK_NORMS, **_ROUTER}, exports=True),
    "gemma2": Architecture(_gemma2, _GEMMA, offset=True),
    "gemma3": Architecture(_gemma3, {**_GEMMA, **_QK_NORMS}, offset=True),
    "phi3": Architecture(
        _phi3, {**_DENSE, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    ),
    "gpt-oss": Architecture(
        _gpt_oss,
        {
            **_OUTER, **_ATTENTION, "ffn_gate_inp": "mlp.router", "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "post_attention_layernorm", "attn_sinks.weight": "self_attn.sinks", "attn_sinks": "self_attn.sinks",
        },
    ),
    "deepseek2": Architecture(_deepseek2, {**_DENSE, **_LATENT, **_ROUTER, **_shared("shared_experts")}),
}  # fmt: skip
"""By ``general.architecture``."""
