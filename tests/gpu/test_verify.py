"""``verify: true`` on the GPU: real kernels are proven on a model's own inputs, and damaged ones are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import quant_compile
from quant_compile.lowering import ops
from quant_compile.lowering.moe import moe_kernels
from quant_compile.lowering.registry import kernels

pytestmark = pytest.mark.gpu

# From three layers on, generate compiles one graph for all.
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256,
}  # fmt: skip
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    ops._ready.cache_clear()
    # Graphs that call a damaged kernel are not for other processes.
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        yield
    ops._ready.cache_clear()


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(DEVICE, torch.bfloat16).eval()


def moe() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM(config).to(DEVICE, torch.bfloat16).eval()


def needs_fp8(spec: str) -> None:
    if "FP8" in spec and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 products below sm89")


def run(model: Any, policy: Any, **options: Any) -> quant_compile.Report:
    ids = torch.arange(48, device=DEVICE)[None] * 5 % 256
    quant_compile.compile(model, policy, verify=True, **options)
    model(ids)
    model.generate(ids, max_new_tokens=4, do_sample=False)
    return quant_compile.report(model)


@pytest.mark.parametrize(
    "spec", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A8", "MXFP4A16", "GGUF_Q4_K"]
)
@pytest.mark.parametrize("made", [llama, moe])
def test_what_kernels_compute_is_proven(made: Any, spec: str) -> None:
    needs_fp8(spec)
    report = run(made(), spec)
    assert report.coverage == 1, report.skips
    assert all(line.verified is not None for line in report.lines if line.scheme is not None)
    assert not [note for note in report.notes if "unfused reference" in note], report.notes


@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "W8A8", "W4A16"])
def test_a_kernel_that_is_a_little_off_is_refused(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_fp8(spec)
    for name, kernel in list(kernels().items()):
        wrong = replace(kernel, recorded=None, run=lambda *args, right=kernel.run: right(*args) * 1.05)
        monkeypatch.setitem(kernels(), name, wrong)
    model = llama()
    ids = torch.arange(48, device=DEVICE)[None] * 5 % 256
    wanted = model(ids).logits.float()
    report = run(model, spec)
    assert report.coverage == 0 and len(report.skips) == 21
    assert all("from the unfused reference" in reason for name, reason in report.skips if "_proj" in name)
    torch.testing.assert_close(model(ids).logits.float(), wanted, rtol=0.05, atol=0.05)


def test_an_expert_kernel_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kernel in list(moe_kernels().items()):
        wrong = replace(kernel, run=lambda *args, right=kernel.run: right(*args) * 1.2)
        monkeypatch.setitem(moe_kernels(), name, wrong)
    report = run(moe(), "W8A16")
    experts = [name for name, reason in report.skips if "from the unfused reference" in reason]
    assert len(experts) == 6 and all(".experts." in name for name in experts)
    assert all(
        line.scheme is not None for line in report.lines if "_proj" in line.names[0] and "experts" not in line.names[0]
    )
