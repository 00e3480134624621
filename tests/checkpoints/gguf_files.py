"""GGUF files of tiny models, written by the ``gguf`` package with llama.cpp's conventions, and the models that they stand for.

Names come from the package's own map, types from its codecs (of k-quants, which it cannot make, from ours); what llama.cpp's converter does
to values is written out here, apart from the product: rows of q and k, 1 on Gemma's norms, experts in three tensors, kv_b in two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from quant_compile.ir.ggml.encode import encode

HIDDEN, INNER, VOCAB, LAYERS = 256, 256, 96, 2
SIZES: dict[str, Any] = dict(
    hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
    head_dim=64, max_position_embeddings=128, initializer_range=0.05, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
ENCODED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "mxfp4", "tq1_0", "tq2_0", "iq4_nl", "iq4_xs")
TypeOf = Callable[[str], str]
"""Tensor's name -> its type."""


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        model_type: of transformers.
        sizes: of its config, beside ``SIZES``.
        arch: of the gguf package.
        permuted: llama.cpp's converter reorders rows of q and k.
        offset: it adds 1 to norms.
        metadata: more than ``write`` has for all.
        latents: kv_b_proj is cut in two.
    """

    model_type: str
    arch: gguf.MODEL_ARCH
    sizes: dict[str, Any] = field(default_factory=dict)
    permuted: bool = False
    offset: bool = False
    metadata: Callable[[gguf.GGUFWriter, Any], None] = lambda w, c: None
    latents: bool = False


def _moe(w: gguf.GGUFWriter, c: Any, inner: int, count: int) -> None:
    w.add_expert_count(count)
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_feed_forward_length(inner)


def _mixtral(w: gguf.GGUFWriter, c: Any) -> None:
    w.add_expert_count(c.num_local_experts)
    w.add_expert_used_count(c.num_experts_per_tok)


def _qwen2moe(w: gguf.GGUFWriter, c: Any) -> None:
    _moe(w, c, c.moe_intermediate_size, c.num_experts)
    w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)


def _gemma(w: gguf.GGUFWriter, c: Any) -> None:
    w.add_sliding_window(c.sliding_window)
    if c.attn_logit_softcapping is not None:
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)


def _gpt_oss(w: gguf.GGUFWriter, c: Any) -> None:
    _moe(w, c, c.intermediate_size, c.num_local_experts)
    w.add_sliding_window(c.sliding_window)
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(c.rope_parameters["factor"])
    w.add_rope_scaling_orig_ctx_len(c.rope_parameters["original_max_position_embeddings"])


def _deepseek(w: gguf.GGUFWriter, c: Any) -> None:
    _moe(w, c, c.moe_intermediate_size, c.n_routed_experts)
    w.add_leading_dense_block_count(c.first_k_dense_replace)
    w.add_kv_lora_rank(c.kv_lora_rank)
    if c.q_lora_rank:
        w.add_q_lora_rank(c.q_lora_rank)
    w.add_expert_shared_count(c.n_shared_experts)
    w.add_expert_weights_scale(c.routed_scaling_factor)
    w.add_expert_group_count(c.n_group)
    w.add_expert_group_used_count(c.topk_group)
    if c.model_type == "deepseek_v3":
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        w.add_expert_weights_norm(c.norm_topk_prob)
    if c.rope_parameters["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(c.rope_parameters["factor"])
        w.add_rope_scaling_orig_ctx_len(c.rope_parameters["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_log_mul(0.1 * c.rope_parameters["mscale_all_dim"])


def _phi3(w: gguf.GGUFWriter, c: Any) -> None:
    w.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
    w.add_sliding_window(c.sliding_window or 0)


_EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, decoder_sparse_step=1, mlp_only_layers=[]
)
_LATENT = dict(
    head_dim=32, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, first_k_dense_replace=1, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=256, n_shared_experts=1, num_key_value_heads=4, routed_scaling_factor=1.5,
)  # fmt: skip
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [2.0 + i / 8 for i in range(32)],
    "short_factor": [1.0 + i / 32 for i in range(32)],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ARCH = gguf.MODEL_ARCH
CASES: dict[str, Case] = {
    "llama": Case("llama", ARCH.LLAMA, permuted=True),
    "llama biased": Case("llama", ARCH.LLAMA, dict(attention_bias=True), permuted=True),
    "llama tied": Case("llama", ARCH.LLAMA, dict(tie_word_embeddings=True), permuted=True),
    "llama 3.1": Case("llama", ARCH.LLAMA, dict(rope_parameters=_LLAMA3), permuted=True),
    "mistral": Case("mistral", ARCH.LLAMA, dict(sliding_window=None), permuted=True, metadata=lambda w, c: w.add_name("Mistral 7B")),
    "mixtral": Case("mixtral", ARCH.LLAMA, dict(num_local_experts=4, num_experts_per_tok=2), permuted=True, metadata=_mixtral),
    "qwen2": Case("qwen2", ARCH.QWEN2),
    "qwen3": Case("qwen3", ARCH.QWEN3),
    "qwen2moe": Case("qwen2_moe", ARCH.QWEN2MOE, _EXPERTS | dict(shared_expert_intermediate_size=512), metadata=_qwen2moe),
    "qwen3moe": Case(
        "qwen3_moe", ARCH.QWEN3MOE, _EXPERTS | dict(norm_topk_prob=True),
        metadata=lambda w, c: _moe(w, c, c.moe_intermediate_size, getattr(c, "num_experts", None) or c.num_local_experts),
    ),
    "gemma2": Case("gemma2", ARCH.GEMMA2, dict(sliding_window=16, query_pre_attn_scalar=64), offset=True, metadata=_gemma),
    "gemma3": Case(
        "gemma3_text", ARCH.GEMMA3, dict(sliding_window=16, query_pre_attn_scalar=64, num_hidden_layers=7), offset=True, metadata=_gemma
    ),
    "phi3": Case("phi3", ARCH.PHI3, metadata=_phi3),
    "phi3 long": Case(
        "phi3", ARCH.PHI3, dict(rope_parameters=_LONG, original_max_position_embeddings=64), metadata=_phi3
    ),
    "gpt-oss": Case(
        "gpt_oss", ARCH.GPT_OSS, dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=16), metadata=_gpt_oss
    ),
    "deepseek2": Case("deepseek_v2", ARCH.DEEPSEEK2, _LATENT | dict(q_lora_rank=None, n_group=1, topk_group=1), metadata=_deepseek),
    "deepseek2 yarn": Case(
        "deepseek_v2", ARCH.DEEPSEEK2, _LATENT | dict(q_lora_rank=64, n_group=1, topk_group=1, rope_parameters=_YARN), metadata=_deepseek
    ),
    "deepseek3": Case(
        "deepseek_v3", ARCH.DEEPSEEK2,
        _LATENT | dict(q_lora_rank=64, n_group=2, topk_group=1, norm_topk_prob=True, rope_parameters=_YARN),
        metadata=_deepseek, latents=True,
    ),
}  # fmt: skip


def make(case: Case) -> nn.Module:
    """The model of a case in f32, no parameter 0 or 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **SIZES | case.sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.dim() == 3 or "router" in name or name.endswith("gate.weight"):
                parameter.normal_(std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


def mixed(name: str) -> str:
    """What a mix has: two types of blocks, embeddings in a third, experts in one, all else in f32."""
    if not name.endswith("weight") or "norm" in name or "gate_inp" in name or "sinks" in name:
        return "f32"
    if "exps" in name:
        return "q4_k"
    if "attn_kv_b" in name or "attn_k_b" in name or "attn_v_b" in name or "q_b" in name:
        return "q8_0"
    return {"token_embd.weight": "q5_k", "output.weight": "q6_k"}.get(
        name, "q6_k" if "attn_v" in name or "blk.1.ffn_down" in name else "q4_k"
    )


def write(
    path: Path,
    case: Case,
    model: nn.Module,
    type_of: TypeOf = mixed,
    more: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """The file of a model; its matrices become what their blocks stand for, so that it is the truth."""
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[case.arch])
    _metadata(writer, case, config)
    if more is not None:
        more(writer)
    for name, index, tensor, put in parts(case, model):
        add(writer, name, tensor[index] if index is not None else tensor, type_of(name), put, index)
    for name, factors in _factors(config):
        writer.add_tensor(name, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(w: gguf.GGUFWriter, case: Case, c: Any) -> None:
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    w.add_rope_freq_base(rope["rope_theta"])
    latent = getattr(c, "kv_lora_rank", None)
    if latent and case.latents:  # as newer files have it
        w.add_key_length(latent + c.qk_rope_head_dim)
        w.add_value_length(latent)
        w.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
        w.add_value_length_mla(c.v_head_dim)
    elif latent:
        w.add_key_length(c.qk_nope_head_dim + c.qk_rope_head_dim)
        w.add_value_length(c.v_head_dim)
    else:
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(c.qk_rope_head_dim if latent else c.head_dim)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    case.metadata(w, c)


def _factors(c: Any) -> Iterator[tuple[str, np.ndarray]]:
    rope = c.rope_parameters
    if rope.get("rope_type") == "llama3":  # as llama.cpp's converter computes them
        out = []
        for i in range(0, c.head_dim, 2):
            wave = 2 * np.pi * rope["rope_theta"] ** (i / c.head_dim)
            low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
            high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
            if wave < high:
                out.append(1.0)
            elif wave > low:
                out.append(rope["factor"])
            else:
                smooth = (rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"]
                )
                out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        yield "rope_freqs.weight", np.array(out, dtype=np.float32)
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"], dtype=np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], dtype=np.float32)


Put = Callable[[Tensor], None]


def parts(case: Case, model: nn.Module) -> Iterator[tuple[str, Tensor | None, Tensor, Put]]:
    """(name in the file, order of rows in the file, values, what to do with those that the file has, in the model's order)."""
    c: Any = model.config
    names = gguf.get_tensor_name_map(case.arch, c.num_hidden_layers)
    tensors = {n: p.data for n, p in model.named_parameters()} | {
        n: b for n, b in model.named_buffers() if "correction" in n
    }
    for name, tensor in tensors.items():
        whole = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if whole.endswith("self_attn.sinks"):
            whole += ".weight"
        stem, _, suffix = whole.rpartition(".")
        if ".experts." in name:
            yield from experts(case, names, name, tensor)
        elif case.latents and stem.endswith("kv_b_proj"):
            yield from latents(names, stem, tensor, c)
        else:
            found = names.get_name(stem)
            assert found is not None, name
            yield from one(case, f"{found}.{suffix}", tensor, c)


def one(case: Case, name: str, tensor: Tensor, c: Any) -> Iterator[tuple[str, Tensor | None, Tensor, Put]]:
    index = None
    if case.permuted and (".attn_q." in name or ".attn_k." in name):
        heads = c.num_attention_heads if ".attn_q." in name else c.num_key_value_heads
        rows = torch.arange(tensor.shape[0])
        index = rows.reshape(heads, 2, tensor.shape[0] // heads // 2).swapaxes(1, 2).reshape(-1)
    if case.offset and name.endswith("norm.weight"):
        yield name, None, tensor + 1, lambda made: None
    elif name.endswith("ffn_gate_inp_shexp.weight"):
        yield name, None, tensor.reshape(-1), lambda made: None
    else:
        yield name, index, tensor, tensor.copy_


def experts(case: Case, names: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor | None, Tensor, Put]]:
    """gate, up and down in a tensor each, rows before columns."""
    bias = name.endswith("_bias")
    layer = name.split(".")[2]
    suffix = "bias" if bias else "weight"
    stored = tensor.transpose(1, 2) if case.arch == ARCH.GPT_OSS and not bias else tensor
    if "down_proj" in name:
        yield f"blk.{layer}.ffn_down_exps.{suffix}", None, stored, stored.copy_
        return
    alternate = case.arch == ARCH.GPT_OSS
    gate, up = (stored[:, 0::2], stored[:, 1::2]) if alternate else stored.chunk(2, 1)
    yield f"blk.{layer}.ffn_gate_exps.{suffix}", None, gate, gate.copy_
    yield f"blk.{layer}.ffn_up_exps.{suffix}", None, up, up.copy_


def latents(names: Any, stem: str, tensor: Tensor, c: Any) -> Iterator[tuple[str, Tensor | None, Tensor, Put]]:
    layer = stem.split(".")[2]
    whole = tensor.view(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
    keys, values = whole[:, : c.qk_nope_head_dim].transpose(1, 2), whole[:, c.qk_nope_head_dim :]
    yield f"blk.{layer}.attn_k_b.weight", None, keys, keys.copy_
    yield f"blk.{layer}.attn_v_b.weight", None, values, values.copy_


def add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str, put: Put, index: Tensor | None) -> None:
    data = blocks(tensor, kind)
    writer.add_tensor(name, data, raw_dtype=Type[kind.upper()])
    made = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, Type[kind.upper()]))).reshape(
        tensor.shape
    )
    if index is not None:
        made = torch.empty_like(made).index_copy_(0, index, made)
    put(made)


def blocks(tensor: Tensor, kind: str) -> np.ndarray:
    """Bytes of a tensor's blocks, or its numbers."""
    values = tensor.contiguous().float()
    if kind in ENCODED:
        flat = encode(kind, values.flatten(0, -2))
        return flat.reshape(*values.shape[:-1], -1).numpy()
    return gguf.quants.quantize(values.numpy(), Type[kind.upper()])
