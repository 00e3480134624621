"""Models under GGUF types, end to end on CPU: logits of the dequantized weights, ledger, release, generate, save and load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import quant_compile
from quant_compile.ir.errors import PolicyWarning, RangeError
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.schemes import gguf
from quant_compile.lowering.weights import Key, quantize
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
ABLE = tuple(name for name, scheme in gguf.PRESETS.items() if gguf.quantizes(scheme) is None)


def model_of(kind: str) -> Any:
    torch.manual_seed(1)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    if kind == "mixtral":
        config: Any = transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES)
        return transformers.MixtralForCausalLM(config).eval()
    config = transformers.Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, **SIZES)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def dequantized(model: Any, name: str) -> Any:
    """A copy whose linears' and experts' weights are what their blocks say."""
    made, scheme = copy.deepcopy(model), parse(name)
    family = family_of(scheme)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if "proj" not in parameter_name:
                continue
            for matrix in parameter if parameter.dim() == 3 else (parameter,):
                matrix.copy_(family.dequantize_weight(family.quantize_weight(matrix, scheme), scheme, matrix.shape[-1]))
    return made


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 9))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("llama", name) for name in ABLE), *(("qwen3_moe", f"GGUF_{kind}") for kind in ("Q8_0", "Q4_K", "MXFP4"))],
)
@torch.no_grad()
def test_logits_are_those_of_dequantized_weights(
    kind: str, name: str, ids: Tensor, plain_inductor: CompileCounter
) -> None:
    model = model_of(kind)
    wanted, plain = dequantized(model, name)(ids).logits, model(ids).logits
    quant_compile.compile(model, policy=name)
    got = model(ids).logits
    assert relative(got, wanted) <= 1e-3 < relative(got, plain), "and not those of the weights as they were"
    report = quant_compile.report(model).require(coverage=1.0)
    assert {line.scheme for line in report.lines if "proj" in line.names[0]} == {name}


@pytest.mark.parametrize(("kind", "name"), [("llama", "GGUF_Q4_K"), ("mixtral", "GGUF_Q4_K")])
@torch.no_grad()
def test_a_compiled_model_lives_on_its_blocks(kind: str, name: str, ids: Tensor, tmp_path: Path) -> None:
    """With Inductor: released, generating, saved as it lies and loaded again."""
    model = model_of(kind)
    wanted = dequantized(model, name)
    quant_compile.compile(model, policy=name, release_weights=True)
    logits = model(ids).logits
    assert relative(logits, wanted(ids).logits) <= 1e-3
    lines = [line for line in quant_compile.report(model).lines if line.scheme == name]
    # Originals are gone: what is left of a weight of f32 are 4.5 bits of 32.
    assert lines and all(line.bytes_after == line.bytes_before * 4.5 / 32 for line in lines)
    told: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[:1], **told), wanted.generate(ids[:1], **told))
    quant_compile.save(model, tmp_path / "saved", "packed")
    loaded = quant_compile.load(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, logits)


@torch.no_grad()
def test_experts_whose_hidden_layer_is_no_whole_blocks_stay(ids: Tensor, plain_inductor: CompileCounter) -> None:
    torch.manual_seed(1)
    config: Any = transformers.MixtralConfig(
        num_local_experts=4, num_experts_per_tok=2, **SIZES | {"intermediate_size": 96}
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with pytest.warns(PolicyWarning, match="k must be a multiple of 256, the block of GGUF_Q5_K, got 96"):
        quant_compile.compile(model, policy="GGUF_Q5_K")
        model(ids)
    kept = [line for line in quant_compile.report(model).lines if ".experts." in line.names[0]]
    assert len(kept) == 4 and not any(line.scheme for line in kept)
    reason = "down_proj refuses, and an expert block has one scheme: k must be a multiple of 256, the block of GGUF_Q5_K, got 96"
    assert all(reason in line.reason and line.named for line in kept)


@torch.no_grad()
def test_blocks_are_no_form_of_compressed_tensors(ids: Tensor, tmp_path: Path, plain_inductor: CompileCounter) -> None:
    model = model_of("llama")
    quant_compile.compile(model, policy="GGUF_Q8_0")
    model(ids)
    with pytest.raises(quant_compile.QuantError, match="the format has no blocks of GGUF"):
        quant_compile.save(model, tmp_path / "saved")


@pytest.mark.parametrize("name", ["GGUF_Q8_0", "GGUF_Q4_K"])
@torch.no_grad()
def test_values_beyond_f16_keep_their_weight(name: str, ids: Tensor, plain_inductor: CompileCounter) -> None:
    """A linear alone, of a block of experts both weights: in 16 bits, in the ledger, with a warning, and nothing is NaN."""
    model = model_of("qwen3_moe")
    large = ("layers.0.self_attn.v_proj.weight", "layers.1.mlp.experts.down_proj")
    for end in large:
        model.model.get_parameter(end).view(-1)[5] = -1e6
    quant_compile.compile(model, policy=name)
    reason = f"it has a value of 1e+06, beyond the f16 in which {name} keeps its scales"
    with pytest.warns(PolicyWarning) as told:
        got = model(ids).logits
    texts = [str(warning.message) for warning in told]
    assert all(any(f"model.{end} stays float32: {reason}" in text for text in texts) for end in large)
    lines = {line.names[0]: line for line in quant_compile.report(model).lines if "proj" in line.names[0]}
    kept = {key for key, line in lines.items() if line.scheme is None}
    assert kept == {f"model.{end}" for end in (*large, "layers.1.mlp.experts.gate_up_proj")}
    assert all(reason in lines[key].reason and lines[key].named for key in kept)
    assert got.isfinite().all()


@pytest.mark.parametrize("name", ABLE)
def test_f16_holds_the_scales_of_what_is_quantized(name: str) -> None:
    """Up to the largest number that is let through; and the store is the last to refuse others."""
    scheme = parse(name)
    family, w = family_of(scheme), torch.randn(4, 256).clamp(-1, 1) * gguf.LARGEST
    w[0], w[1, ::2], w[1, 1::2] = gguf.LARGEST, -gguf.LARGEST, gguf.LARGEST
    assert family.takes_values(scheme, w) is None
    assert family.dequantize_weight(family.quantize_weight(w, scheme), scheme, 256).isfinite().all()
    w[3, 7] = 65520.0
    if name == "GGUF_MXFP4":
        assert family.takes_values(scheme, w) is None
        return
    with pytest.raises(RangeError, match=f"a weight: it has a value of 6.55e\\+04, beyond the f16 .* {name}"):
        quantize(torch.nn.Parameter(w), Key(name, "rows", False, torch.float32), "a weight")
