"""Shared by the tests of expert blocks: tiny models of ten families, small user-written blocks, and an eager quantized reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import Activation
from quant_compile.ir.scheme import Scheme, parse
from tests.runtime_support import reference_of

EXPERTS = 6
VOCABULARY = 61


@dataclass(frozen=True)
class Family:
    """One family of Mixture-of-experts models.

    Attributes:
        config, model: transformers' classes.
        fields: of the config, besides those that all share.
        experts_class: class of the block's module.
        activation: its text.
        transposed: both weights of an expert are stored [k, n].
        interleaved: gate and up alternate.
        dense: computed over all experts, by no implementation that can be set.
    """

    config: Any
    model: Any
    experts_class: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "silu"
    transposed: bool = False
    interleaved: bool = False
    dense: bool = False

    def make(
        self, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 1
    ) -> nn.Module:
        """A random model whose experts all matter; every layer has a block."""
        torch.manual_seed(seed)
        shared = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "num_experts_per_tok": 2,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        model = self.model(self.config(**(shared | self.fields)))
        if not self.dense:
            model.set_experts_implementation(implementation)
        return randomize(model).to(dtype)


def randomize(model: nn.Module) -> nn.Module:
    """Weights that keep activations at order one; biases and routers' corrections that are not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.shape[0] == EXPERTS and parameter.dim() == 2:
                parameter.normal_(0.0, 0.5)  # routers and experts' biases
            elif parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(0.0, 0.1)
    return model.eval().requires_grad_(False)


LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
ROUTED = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "intermediate_size": 48,
}

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(hf.MixtralConfig, hf.MixtralForCausalLM, "MixtralExperts", {"num_local_experts": EXPERTS}),
    "qwen2_moe": Family(
        hf.Qwen2MoeConfig,
        hf.Qwen2MoeForCausalLM,
        "Qwen2MoeExperts",
        {"num_experts": EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": Family(
        hf.Qwen3MoeConfig,
        hf.Qwen3MoeForCausalLM,
        "Qwen3MoeExperts",
        {"num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    ),
    "deepseek_v2": Family(
        hf.DeepseekV2Config,
        hf.DeepseekV2ForCausalLM,
        "DeepseekV2Experts",
        LATENT | ROUTED | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": Family(hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, "DeepseekV3Experts", LATENT | ROUTED),
    "gpt_oss": Family(
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        "GptOssExperts",
        {"num_local_experts": EXPERTS, "head_dim": 16},
        activation="silu(1.702,7.0,1.0)",
        transposed=True,
        interleaved=True,
    ),
    "llama4": Family(
        hf.Llama4TextConfig,
        hf.Llama4ForCausalLM,
        "Llama4TextExperts",
        {"num_local_experts": EXPERTS, "intermediate_size_mlp": 48, "head_dim": 16},
        transposed=True,
        dense=True,
    ),
    "olmoe": Family(hf.OlmoeConfig, hf.OlmoeForCausalLM, "OlmoeExperts", {"num_experts": EXPERTS}),
    "glm4_moe": Family(hf.Glm4MoeConfig, hf.Glm4MoeForCausalLM, "Glm4MoeExperts", ROUTED | {"head_dim": 16}),
    "granite_moe": Family(
        hf.GraniteMoeConfig, hf.GraniteMoeForCausalLM, "GraniteMoeExperts", {"num_local_experts": EXPERTS}
    ),
}


def tokens(batch: int = 2, length: int = 5, seed: int = 7) -> Tensor:
    """Random token ids."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products this small wait longer for other threads than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- user-written blocks ----------------------------------------------------------------------------------------------


def gated_silu(hidden: Tensor) -> Tensor:
    """[.., gate | up] -> silu(gate) * up."""
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


class TinyExperts(nn.Module):
    """Experts as a user may write them: gathered and batched. ``activation`` [.., 2 i] -> [.., i]."""

    def __init__(
        self,
        experts: int = 4,
        hidden: int = 32,
        inner: int = 24,
        activation: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.activation = activation or gated_silu
        self.gate_up_proj = nn.Parameter((torch.randn(experts, 2 * inner, hidden) * hidden**-0.5).to(dtype))
        self.down_proj = nn.Parameter((torch.randn(experts, hidden, inner) * inner**-0.5).to(dtype))
        self.requires_grad_(False)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids and weights [T, k] -> [T, H]."""
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(ids.shape[1], 0)
        hidden = torch.bmm(self.gate_up_proj[flat], rows.unsqueeze(-1)).squeeze(-1)
        out = torch.bmm(self.down_proj[flat], self.activation(hidden).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(*ids.shape, x.shape[-1]).sum(1)


class TinyMoe(nn.Module):
    """Router and experts."""

    def __init__(self, experts: int = 4, hidden: int = 32, inner: int = 24, top_k: int = 2, **more: Any) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False, dtype=more.get("dtype", torch.float32))
        self.experts = TinyExperts(experts, hidden, inner, **more)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.router(rows).float().softmax(-1).topk(self.top_k, -1)
        return x + self.experts(rows, ids, weights.to(x.dtype)).view(x.shape)


class Layers(nn.Module):
    """Several modules, one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Through all of them."""
        for layer in self.layers:
            x = layer(x)
        return x


class Routed(nn.Module):
    """Experts whose routing is given by the caller."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.experts = TinyExperts(**more)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As ``TinyExperts``."""
        return self.experts(x, ids, weights)


# --- eager quantized reference ----------------------------------------------------------------------------------------


class ReferenceExperts(nn.Module):
    """A block by its scheme's own torch functions: each token and each of its experts, one after the other.

    Follows the definition in the issue of numerics: products in the model's dtype, the activation in f32 and then rounded,
    the weighted sum in f32. Shares with the product only the functions that say what a scheme is.
    """

    def __init__(self, experts: nn.Module, family: Family | None, spec: str | None) -> None:
        super().__init__()
        self.family, self.dense = family, family is not None and family.dense
        self.act = Activation.parse(family.activation if family is not None else "silu")
        self.scheme: Scheme | None = parse(spec) if spec else None
        self.planes: list[list[Planes]] = [[], []]
        self.biases = [getattr(experts, name, None) for name in ("gate_up_proj_bias", "down_proj_bias")]
        interleaved = family is not None and family.interleaved
        if interleaved and self.biases[0] is not None:
            self.biases[0] = torch.cat((self.biases[0][:, 0::2], self.biases[0][:, 1::2]), 1)
        for i, name in enumerate(("gate_up_proj", "down_proj")):
            for weight in getattr(experts, name).detach():
                weight = weight.t() if family is not None and family.transposed else weight
                weight = torch.cat((weight[0::2], weight[1::2])) if interleaved and i == 0 else weight
                self.planes[i].append(self._quantized(weight.contiguous()))

    def _quantized(self, weight: Tensor) -> Planes:
        if self.scheme is None:
            return (weight.clone(),)
        with torch.inference_mode(False), torch.no_grad():
            return family_of(self.scheme).quantize_weight(weight.clone(), self.scheme)

    def _linear(self, x: Tensor, which: int, expert: int) -> Tensor:
        bias = self.biases[which]
        own = None if bias is None else bias[expert]
        if self.scheme is None:
            return F.linear(x, self.planes[which][expert][0], own)
        family = family_of(self.scheme)
        planes = (x,) if self.scheme.input_activations is None else family.quantize_input(x, self.scheme, None)
        return family.linear(planes, self.planes[which][expert], own, self.scheme, x.dtype)

    def forward(self, x: Tensor, ids: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """As the block that it stands for."""
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        if ids is None:
            count = len(self.planes[0])
            ids = torch.arange(count, device=x.device).repeat_interleave(x.shape[0] // count).unsqueeze(1)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for token in range(x.shape[0]):
            for j in range(ids.shape[1]):
                expert = int(ids[token, j])
                if 0 <= expert < len(self.planes[0]):
                    hidden = self.act(self._linear(x[token : token + 1], 0, expert))
                    y = self._linear(hidden, 1, expert)[0].float()
                    out[token] += y if weights is None else y * weights[token, j].float()
        return out.to(x.dtype).view(shape)


def moe_reference_of(
    model: nn.Module, spec: str | None, family: Family | None = None, linears: Callable[[str], str | None] | None = None
) -> nn.Module:
    """A copy of ``model`` whose experts, and the linears that ``linears`` names a scheme for, are quantized eagerly."""
    made = reference_of(model, linears or (lambda name: None))
    for name, module in list(made.named_modules()):
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and module.gate_up_proj.dim() == 3:
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, ReferenceExperts(module, family, spec))
    return made


def usual_linears(spec: str) -> Callable[[str], str | None]:
    """Every linear but output heads and routers, as conventions have it."""
    kept = ("lm_head", "mlp.gate", "shared_expert_gate", "router", "router.layer", "block_sparse_moe.gate")
    return lambda name: None if any(name == end or name.endswith(f".{end}") for end in kept) else spec


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every 3-D parameter by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 3}


def deep(model: nn.Module) -> nn.Module:
    """A copy."""
    return copy.deepcopy(model)


def nudge(y: Tensor) -> Tensor:
    """Every 16-bit float moved to the next one, away from zero or towards it at random; zeros stay."""
    steps = torch.randint(0, 2, y.shape, device=y.device, dtype=torch.int16) * 2 - 1
    moved = (y.view(torch.int16) + steps).view(y.dtype)
    return torch.where((y == 0) | ~torch.isfinite(moved), y, moved)


def nudged(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An activation whose results are one step of their dtype off: the most that another order of f32 sums does to them.

    What the truth itself makes of that is how far a correct kernel may be from it: 1/16 of the fp8 codes are others.
    """
    return lambda hidden: nudge(activation(hidden))
