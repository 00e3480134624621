"""Models with experts on the GPU: every block is one quantized node, in prefill and in decode, with CUDA graphs, released."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import quant_compile
from tests.moe_support import FAMILIES, moe_reference_of, usual_linears
from tests.runtime_support import store_bytes

pytestmark = pytest.mark.gpu

COMMON: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen3": lambda: transformers.Qwen3MoeConfig(
        **COMMON, intermediate_size=256, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4, head_dim=64
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2, head_dim=64
    ),
}
FAMILY = {"qwen3": "qwen3_moe", "mixtral": "mixtral", "gpt_oss": "gpt_oss"}
FOUR_BITS = ("W4A8", "W4AFP8", "NVFP4A16", "MXFP4A16", "QSERVE_W4A8_GROUP")
SPECS = ("FP8_DYNAMIC", "W8A8", "W4A16", "FP8_BLOCK", *FOUR_BITS)
# Kernels of linears that give equal bits twice, unlike humming's.
REPEATABLE = {
    "W4A8": "triton_w4a8",
    "W4AFP8": "triton_w4a8",
    "NVFP4A16": "triton_fp4a16_dequant",
    "MXFP4A16": "triton_fp4a16_dequant",
}
# What seven tokens may need at once beside weights.
ACTIVATIONS = 1 << 20


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with torch.inference_mode():
        yield
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def free() -> None:
    """Give back what is unreachable, and cuBLAS's workspace, which comes and goes."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def model_of(family: str) -> nn.Module:
    with torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.bfloat16).eval().cuda()


def ids_of(tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens + 1000 * seed)
    return torch.randint(0, 256, (1, tokens), device="cuda", generator=generator)


def errors(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Median over tokens of the relative error of logits [1, T, V]; a token whose router chose anew is far off, here and there."""
    ratios = [(f.float() - w.float()).norm(dim=-1) / w.float().norm(dim=-1) for f, w in zip(found, wanted, strict=True)]
    return float(torch.cat([ratio.flatten() for ratio in ratios]).median())


def experts_of(report: quant_compile.Report) -> list[Any]:
    return [line for line in report.lines if ".experts." in line.names[0] and "bias" not in line.names[0]]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", list(CONFIGS))
def test_prefill_and_decode_are_quantized(family: str, spec: str) -> None:
    """As far from bf16 as the eager quantized reference is; an unquantized or a mixed-up block would not be."""
    model = model_of(family)
    prompts = [[ids_of(33)], [ids_of(1, seed) for seed in range(9)]]
    wanted = [[model(ids).logits for ids in some] for some in prompts]
    reference = moe_reference_of(model, spec, FAMILIES[FAMILY[family]], usual_linears(spec))
    expected = [errors([reference(ids).logits for ids in some], logits) for some, logits in zip(prompts, wanted)]
    del reference
    quant_compile.compile(model, spec, tune="off", mode="reduce-overhead", dynamic=False)
    for some, logits, error in zip(prompts, wanted, expected, strict=True):
        for _ in range(3):
            found: list[Tensor] = []
            for ids in some:
                torch.compiler.cudagraph_mark_step_begin()
                found.append(model(ids).logits.clone())
        assert 0.5 * error <= errors(found, logits) <= 2 * error
    report = quant_compile.report(model).require(1.0)
    assert len(experts_of(report)) == 4 and all(line.scheme == spec for line in experts_of(report)), report.skips
    assert all("reference" not in line.kernels for line in report.lines)


SHARES = {"FP8_DYNAMIC": 0.51, "W4A16": 0.29, **dict.fromkeys(FOUR_BITS, 0.275), "NVFP4A16": 0.295}


@pytest.mark.parametrize(("spec", "share"), SHARES.items())
def test_released_experts_give_their_bytes_back(spec: str, share: float) -> None:
    config = transformers.Qwen3MoeConfig(
        **{**COMMON, "hidden_size": 1024}, intermediate_size=512, moe_intermediate_size=512, num_experts=32,
        num_experts_per_tok=4, head_dim=64,
    )  # fmt: skip
    with torch.inference_mode(False), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().cuda()
    experts = [p for name, p in model.named_parameters() if p.dim() == 3]
    size = sum(p.numel() * p.element_size() for p in experts)
    block = size // config.num_hidden_layers
    free()
    before = torch.cuda.memory_allocated()
    model(ids_of(7))  # cuBLAS's workspace, which is none of packing's
    warm = torch.cuda.memory_allocated()
    kernels = {spec: REPEATABLE[spec]} if spec in REPEATABLE else "auto"
    quant_compile.compile(model, spec, tune="off", release_weights=True, kernels=kernels)
    torch.cuda.reset_peak_memory_stats()
    first = model(ids_of(7)).logits.clone()
    again = model(ids_of(7)).logits
    peak = torch.cuda.max_memory_allocated() - warm
    free()
    linears = sum(line.bytes_before - line.bytes_after for line in quant_compile.report(model).lines if line.scheme)
    linears -= sum(line.bytes_before - line.bytes_after for line in experts_of(quant_compile.report(model)))
    held = torch.cuda.memory_allocated() - before + size + linears
    assert held <= share * size, f"{held / size:.3f} of the experts' bf16 bytes"
    limit = store_bytes(model) + block + ACTIVATIONS
    assert peak <= limit, f"packing took {peak / limit:.2f} of planes and a block beside the model"
    assert torch.equal(first, again)
    assert all(line.released for line in experts_of(quant_compile.report(model)))
