"""Attention over DeepSeek's latents: absorbed where few tokens read a static cache, the same as eager, and said in the report.

The truth is the model's own eager output. In f32 the two differ in the order of sums; in 16 bits also in what is rounded: q in latents
and sums of latents instead of k and v.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import quant_compile
from quant_compile.ir.family import family_of
from quant_compile.ir.report import Report
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.attention import torch_latent
from quant_compile.lowering.latent import ABSORBED
from quant_compile.measure.weights import chosen_by
from quant_compile.passes.absorb_latent import EXPANDED
from quant_compile.simulate import quantized_values
from tests.attention_support import MLA, decoder, generated, seeded, static_cache
from tests.generation.support import prompt, tokens
from tests.runtime_support import CompileCounter, plain_inductor
from tests.test_kv_cache import cache_of

__all__ = ["plain_inductor"]

# The order of sums in f32, over two layers.
CLOSE = 1e-4
# bf16 keeps 8 bits; eager rounds k and v, the absorbed form q in latents and sums of latents: as far from f32 as from each other.
CLOSE_BF16 = 6e-2
DENSE = {"first_k_dense_replace": 2}  # no experts, which are not what is tested here
FAMILIES: dict[str, Any] = {
    "deepseek_v2": (hf.DeepseekV2Config, hf.DeepseekV2ForCausalLM, {"topk_method": "greedy"}),
    "deepseek_v3": (hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, {}),
}


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config, model, more = FAMILIES[family]
    return seeded(decoder(config, model, **(MLA | DENSE | more | changes)), dtype)


@pytest.fixture(autouse=True)
def launches_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models would be launches and nothing else."""
    monkeypatch.setattr(torch_latent, "ABSORBED_LAUNCHES", 0)


def error(got: list[Any], wanted: list[Any]) -> float:
    assert not any(torch.isnan(x).any() for x in got)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))


def decode_lines(report: Report) -> list[Any]:
    return [line for line in report.attention if " 1 token" in line.what]


def absorbed_weight(line: Any) -> str:
    """The kernels of a quantized linear that prefill multiplies by and decode absorbs."""
    return line.kernels.split(" / ")[-1]


@pytest.mark.parametrize(
    ("family", "rank", "attention"),
    [("deepseek_v2", None, "sdpa"), ("deepseek_v3", 24, "eager"), ("deepseek_v3", None, "sdpa")],
)
def test_decode_absorbs_and_is_eager(family: str, rank: int | None, attention: str) -> None:
    """Left-padded, over a cache in f32: two layers."""
    model = model_of(family, q_lora_rank=rank, attn_implementation=attention)
    wanted = generated(model, model, static_cache(model), True)
    cache = static_cache(model)
    quant_compile.compile(model, {"default": "keep"})
    got = generated(model, model, cache, True)
    (line,) = decode_lines(quant_compile.report(model))
    assert (line.runs, line.count) == (ABSORBED, 2), line
    assert "static cache of latents (24 + 8)" in line.what and "the linear of K and V is absorbed" in line.reason
    assert error(got, wanted) < CLOSE


@pytest.mark.slow
def test_in_bf16_it_is_as_near_to_f32_as_eager() -> None:
    exact, model = model_of("deepseek_v3"), model_of("deepseek_v3", torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    truth = generated(exact, exact, static_cache(exact), True)
    eager = generated(model, model, static_cache(model), True)
    cache = static_cache(model)
    quant_compile.compile(model, {"default": "keep"})
    got = generated(model, model, cache, True)
    assert decode_lines(quant_compile.report(model))[0].runs == ABSORBED
    assert error(got, truth) < max(1.5 * error(eager, truth), CLOSE_BF16)


@pytest.mark.parametrize(("scheme", "family"), [("FP8", "deepseek_v3"), ("INT8", "deepseek_v2")])
def test_a_cache_in_codes_is_absorbed_into(scheme: str, family: str) -> None:
    """Token for token what the eager cache gives, left-padded."""
    model, inputs = model_of(family), prompt(2, 7, padded=True)
    wanted = tokens(model, inputs, past_key_values=cache_of(model, scheme, length=40), max_new_tokens=12)
    quant_compile.compile(model, {"default": "keep", "kv_cache": scheme})
    assert torch.equal(tokens(model, inputs, max_new_tokens=12), wanted)
    (line,) = decode_lines(quant_compile.report(model))
    assert line.runs == ABSORBED and " of latents (24 + 8)" in line.what
    assert ("e4m3" if scheme == "FP8" else "int8") in line.what


def test_a_quantized_linear_is_made_of_its_planes_and_released() -> None:
    """Both phases read one copy of the planes; the values of the originals are not needed."""
    model, policy = model_of("deepseek_v3"), {"default": "keep", "rules": [{"match": "kv_b_proj", "scheme": "W8A8"}]}
    scheme = parse("W8A8")
    exact = copy.deepcopy(model)
    for name, parameter in exact.named_parameters():
        if "kv_b_proj" in name:
            planes = family_of(scheme).quantize_weight(parameter.data, scheme)
            parameter.data = family_of(scheme).dequantize_weight(planes, scheme, parameter.shape[1])
    truth = generated(exact, exact, static_cache(exact), True)
    cache = static_cache(model)
    quant_compile.compile(model, policy, release_weights=True)
    got = generated(model, model, cache, True)
    report = quant_compile.report(model).require(1.0)
    lines = [line for line in report.lines if "kv_b_proj" in line.names[0]]
    assert len(lines) == 2 and all(line.released and line.layout == "rows" for line in lines)
    assert {absorbed_weight(line) for line in lines} == {
        "absorbed by attention, in float32 made of its planes at each step"
    }
    assert all(line.bytes_after < line.bytes_before / 3 for line in lines)
    assert decode_lines(report)[0].runs == ABSORBED
    # The prompt's latents go through int8, those of decode do not.
    assert error(got, truth) < 3e-2


def test_planes_for_an_input_with_factors_are_absorbed(
    plain_inductor: CompileCounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents meet no factor where the linear is absorbed, so that the weight that is made of its planes gets it."""
    monkeypatch.chdir(tmp_path)
    model = model_of("deepseek_v3")
    ids = torch.randint(0, model.config.vocab_size, (4, 40), generator=torch.Generator().manual_seed(0))
    given = {
        "default": "keep",
        "rules": [{"match": "kv_b_proj", "scheme": parse("int4.group16+16").to_fields()}],
        "method": "awq",
    }
    policy = quant_compile.calibrate(model, [{"input_ids": ids, "use_cache": False}], given, progress=False)
    exact, chosen = copy.deepcopy(model), chosen_by(policy, model)
    assert len(chosen) == 2 and all(each.rounding and each.rounding.factor for each in chosen)
    for each in chosen:
        values = quantized_values(each.source.data, each.scheme, each.rounding)
        exact.get_parameter(f"{each.name}.weight").data = values
    truth = generated(exact, exact, static_cache(exact), True)
    cache = static_cache(model)
    quant_compile.compile(model, policy, kernels="reference")
    got = generated(model, model, cache, True)
    assert decode_lines(quant_compile.report(model))[0].runs == ABSORBED
    assert error(got, truth) < CLOSE


def test_attention_keep_leaves_it_as_written() -> None:
    model = model_of("deepseek_v3")
    cache = static_cache(model)
    quant_compile.compile(model, {"default": "keep", "attention": "keep"})
    generated(model, model, cache, False, steps=2)
    lines = decode_lines(quant_compile.report(model))
    assert [line.runs for line in lines] == ["as written"]
    assert lines[0].reason.count("the policy keeps it (attention: keep)") == 2 and EXPANDED in lines[0].reason
