"""Small checkpoints, written by hand: packers that know nothing of the package's own, and tiny models to put them into."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN, INNER, VOCAB, HEADS = 256, 384, 96, 4


def tiny_llama(layers: int = 2, tied: bool = False) -> nn.Module:
    """A Llama in bf16 whose q, k and v have different sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=128, tie_word_embeddings=tied, dtype="bfloat16", initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def tiny_moe() -> nn.Module:
    """A Qwen3-MoE in bf16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, moe_intermediate_size=128, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=VOCAB, head_dim=64, dtype="bfloat16",
        initializer_range=0.05, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def tiny_gpt_oss() -> nn.Module:
    """A GPT-OSS in bf16: biases, transposed and interleaved experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=VOCAB, dtype="bfloat16", sliding_window=32, max_position_embeddings=512,
    )  # fmt: skip
    model = GptOssForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def tiny_nemotron() -> nn.Module:
    """A Nemotron-H in bf16 of an attention and a mixture of experts, which have no gate."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(
        hidden_size=128, intermediate_size=128, layers_block_type=["full_attention", "moe"], num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=VOCAB, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64, n_group=1, topk_group=1, mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16,
        n_groups=1, dtype="bfloat16", initializer_range=0.05,
    )  # fmt: skip
    return NemotronHForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def write(folder: Path, model: nn.Module, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    """A checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator, assignment]
    config["architectures"] = [type(model).__name__]
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
        str(folder / "model.safetensors"),
    )
    return folder


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers' linears; lm_head and routers are not quantized by anyone."""
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not n.endswith(("lm_head", "mlp.gate", "router"))
    }


Pack = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
"""(module's name, weight [n, k]) -> (tensors by suffix, what they dequantize to)."""


def quantized(folder: Path, model: nn.Module, pack: Pack, quantization: dict[str, Any]) -> Path:
    """A checkpoint with every linear packed; the model gets the dequantized values, so that it is the truth."""
    tensors = dict(model.state_dict())
    if getattr(model.config, "tie_word_embeddings", False):  # type: ignore[union-attr]
        tensors.pop("lm_head.weight")
    for name, linear in linears(model).items():
        made, values = pack(name, linear.weight.detach().float())
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
        linear.weight.data = values.to(linear.weight.dtype)
    return write(folder, model, tensors, quantization)


def quantized_experts(folder: Path, model: nn.Module, pack: Pack, quantization: dict[str, Any]) -> Path:
    """A checkpoint of which only the experts are packed, each projection of each in tensors of its own, as libraries write them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "experts" not in name:
            tensors[name] = tensor
            continue
        for expert, whole in enumerate(tensor):
            kinds = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            for kind, part in zip(kinds, whole.chunk(len(kinds)), strict=True):
                module = f"{name.rpartition('.')[0]}.{expert}.{kind}"
                tensors |= {f"{module}.{suffix}": made for suffix, made in pack(module, part.float())[0].items()}
    ignored = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]
    return write(folder, model, tensors, {**quantization, "ignore": ignored})


def stream(codes: np.ndarray, bits: int) -> Tensor:
    """[r, c] of small numbers -> i32 [r, ceil(c bits / 32)]: field j at bit ``bits * j``. One bit after the other."""
    rows = codes.shape[0]
    plane = (
        ((codes[:, :, None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64)) & 1)
        .astype(np.uint8)
        .reshape(rows, -1)
    )
    plane = np.pad(plane, ((0, 0), (0, -plane.shape[1] % 32)))
    words = np.packbits(plane.reshape(rows, -1, 32), axis=2, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(words.reshape(rows, -1)).view("<i4").copy())


def integers(
    weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype = torch.float16
) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Codes [n, k], scales [n, g] and zero points [n, g] of a weight, by rounding."""
    n, k = weight.shape
    grouped = weight.reshape(n, k // group, group)
    top = 2**bits - 1
    if symmetric:
        scale = (grouped.abs().amax(-1) / (top / 2)).to(dtype)
        zero = np.full((n, k // group), 2 ** (bits - 1))
    else:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, top).numpy().astype(int)
    codes = ((grouped / scale.float()[..., None]).round() + torch.from_numpy(zero)[..., None]).clamp(0, top)
    return codes.reshape(n, k).numpy().astype(int), scale, zero


def logits(model: nn.Module, tokens: int = 24) -> Tensor:
    """[1, tokens, vocab] f32."""
    with torch.inference_mode():
        return model(torch.arange(tokens)[None] % VOCAB).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius error of a to b."""
    return float((a - b).norm() / b.norm())
