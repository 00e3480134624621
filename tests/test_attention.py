"""Attention of unmodified models: found in every graph, the same when it is replaced, and named in the report.

The truth is the model's own eager output; in f32 the two differ in the order of sums alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import quant_compile
from quant_compile.explain import explain
from quant_compile.ir.report import Report
from quant_compile.lowering import attention
from quant_compile.lowering.attention import AttentionKernel
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target
from quant_compile.policy import Policy
from tests.attention_support import DECODERS, MIXED, Seen, compiled, decoder, generated, seeded, static_cache
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]

# The order of sums in f32, over two layers.
CLOSE = 1e-4
# bf16 keeps 8 bits; the truth of sdpa rounds scores not at all, torch's CPU kernel does not either, but in blocks.
CLOSE_BF16 = 4e-2


FULL = ("llama3", "gemma2", "gpt_oss")  # without padding too: each way to write attention once


def assert_close(got: list[Tensor], wanted: list[Tensor], close: float = CLOSE) -> None:
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert not torch.isnan(b).any()
        error = float((a - b).norm() / b.norm())
        assert error < close, f"step {step}: {error}"


@pytest.mark.parametrize(
    ("family", "padded"), [*((family, True) for family in DECODERS), *((family, False) for family in FULL)]
)
def test_every_attention_of_a_decoder_is_found_and_the_same(family: str, padded: bool) -> None:
    """Prefill and decode over a static cache: two layers, two sites in each graph, and no miss."""
    model = seeded(DECODERS[family])
    wanted = generated(model, model, static_cache(model), padded)
    cache, seen = static_cache(model), Seen()
    got = generated(model, compiled(model, seen), cache, padded)
    assert set(seen.sites) == {2} and len(seen.sites) >= 2, seen.sites
    assert seen.misses == []
    assert_close(got, wanted)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt_oss"])
def test_in_bf16_the_truth_rounds_where_the_model_does(family: str) -> None:
    model = seeded(DECODERS[family], torch.bfloat16)
    wanted = generated(model, model, static_cache(model), True)
    got = generated(model, compiled(model, Seen()), static_cache(model), True)
    assert_close(got, wanted, CLOSE_BF16)


def encoder(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return sizes | {"vocab_size": 96} | changes


def t5(**changes: Any) -> Any:
    sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, **changes))


def whisper() -> Any:
    sizes = {
        "vocab_size": 96,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_source_positions": 20,
        "max_target_positions": 32,
        "num_mel_bins": 8,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **tokens))


def bloom() -> Any:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4))


IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(7))
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))}
SOUND = {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(7))}
DECODED = {"decoder_input_ids": IDS[:, :5]}
# Model, call, how many sites its one graph has, and the reasons of misses.
OTHERS: dict[str, tuple[Any, dict[str, Any], int, set[str]]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**encoder())), PADDED, 2, set()),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**encoder(image_size=32, patch_size=8))), IMAGES, 2, set()),
    "t5": (t5, PADDED | DECODED, 6, set()),
    "t5-eager": (lambda: t5(attn_implementation="eager"), PADDED | DECODED, 0, {"two tensors are added to its scores"}),
    "whisper": (whisper, SOUND | DECODED, 6, set()),
    "bloom": (
        bloom,
        {"input_ids": IDS, "use_cache": False},
        0,
        {"its weights go through view before they are multiplied with V"},
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_encoders_and_their_decoders_are_found_or_named(family: str) -> None:
    """Position biases are masks, cross-attention is attention, and what is written otherwise is named."""
    make, call, sites, misses = OTHERS[family]
    model, seen = seeded(make), Seen()
    with torch.no_grad():
        wanted = model(**call)[0]
        got = compiled(model, seen)(**call)[0]
    assert seen.sites == [sites] and set(seen.misses) == misses
    assert_close([got], [wanted])


def decoded(model: Any, call: Any, given: dict[str, Any]) -> list[Tensor]:
    """Logits of two tokens of a decoder over static caches of itself and of its encoder."""
    cache = hf.EncoderDecoderCache(*(hf.StaticCache(config=model.config, max_cache_len=n) for n in (12, length(given))))
    with torch.no_grad():
        encoded = model.get_encoder()(**given)
        states = {"encoder_outputs": encoded, "past_key_values": cache, "use_cache": True}
        first = model(decoder_input_ids=IDS[:, :1], **states).logits
        return [first, *(call(decoder_input_ids=IDS[:, i : i + 1], **states).logits.clone() for i in (1, 2))]


def length(given: dict[str, Any]) -> int:
    return given["input_features"].shape[-1] // 2 if "input_features" in given else given["input_ids"].shape[1]


@pytest.mark.parametrize(("make", "given"), [(t5, {"input_ids": IDS}), (whisper, SOUND)], ids=["t5", "whisper"])
def test_cross_attention_in_decode(make: Any, given: dict[str, Any]) -> None:
    """Both kinds in each layer; only the decoder's own cache is written to."""
    model, seen = seeded(make), Seen()
    wanted = decoded(model, model, given)
    got = decoded(model, compiled(model, seen), given)
    assert set(seen.sites) == {4} and not seen.misses
    assert [site.cached for site in seen.found[:4]] == [True, False] * 2
    assert_close(got, wanted)


ONE_TOKEN = "4 heads over 2 of 16, 1 token, static cache"


@pytest.fixture
def like_a_gpu(plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The backend believes in an sm90 with a kernel that serves everything, whose op runs as its truth on a CPU."""
    asked: list[Any] = []
    kernel = AttentionKernel("kernel", lambda p, target: asked.append(p) or Rank(1.0), lambda *given: None, False)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(attention, "attention_kernels", lambda: {"kernel": kernel})
    monkeypatch.setattr("quant_compile.lowering.expand.attention_kernels", lambda: {"kernel": kernel})
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: Target.fake("sm90")))
    return asked


def runs(report: Report) -> dict[str, tuple[str, int]]:
    return {line.what: (line.runs, line.count) for line in report.attention}


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt_oss"])
def test_decode_through_the_backend(family: str, like_a_gpu: list[Any]) -> None:
    """Of a policy without one quantized linear: few tokens over a cache get the kernel's op, and the same logits come out."""
    model = seeded(DECODERS[family])
    wanted = generated(model, model, static_cache(model), True)
    cache = static_cache(model)
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"})
    got = generated(model, model, cache, True)
    assert_close(got, wanted)
    report = quant_compile.report(model)
    assert runs(report)[ONE_TOKEN] == ("kernel", 2)
    assert {p.softcap for p in like_a_gpu} == {family == "gemma2"} and {p.sinks for p in like_a_gpu} == {
        family == "gpt_oss"
    }
    assert Report.from_json(report.to_json()).attention == report.attention
    assert "attention: 4 heads over 2 of 16, 1" in str(report)


@pytest.mark.parametrize("how", ["policy", "option"])
def test_keep_turns_it_off(how: str, like_a_gpu: list[Any]) -> None:
    model = seeded(DECODERS["llama3"])
    cache = static_cache(model)
    torch._dynamo.reset()
    if how == "policy":
        quant_compile.compile(model, {"default": "keep", "attention": "keep"})
    else:
        quant_compile.compile(model, {"default": "keep"}, attention="keep")
    generated(model, model, cache, False, steps=2)
    assert not like_a_gpu
    found = quant_compile.report(model).attention
    assert found and {line.runs for line in found} == {"as written"}
    assert {line.reason for line in found} == {"the policy keeps it (attention: keep)"}


def test_an_option_wins_over_the_policy(like_a_gpu: list[Any]) -> None:
    model = seeded(DECODERS["llama3"])
    cache = static_cache(model)
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep", "attention": "keep"}, attention="auto")
    generated(model, model, cache, False, steps=2)
    assert like_a_gpu


@pytest.mark.parametrize("value", ["off", True, 1, "KEEP", ["keep"]])
def test_bad_values_are_told(value: Any) -> None:
    with pytest.raises(quant_compile.PolicyError, match=r"attention must be auto or keep, got"):
        Policy.load({"default": "keep", "attention": value})
    with pytest.raises(quant_compile.OptionError, match=r"attention must be one of auto, keep, got"):
        quant_compile.compile(seeded(DECODERS["llama3"]), "W8A16", attention=value)


def test_the_key_is_written_and_read_back(tmp_path: Any) -> None:
    kept = Policy.load({"default": "keep", "attention": "keep"})
    assert kept.attention == "keep" and Policy.load(kept.save(tmp_path / "p.yaml")) == kept
    plain = Policy.load({"default": "keep"})
    assert plain == Policy.load({"default": "keep", "attention": "auto"}) and "attention" not in plain.to_dict()
    assert plain.content_hash != kept.content_hash


def test_on_a_cpu_all_stays_and_the_report_says_why(plain_inductor: CompileCounter) -> None:
    model = seeded(DECODERS["llama3"])
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"})
    with torch.no_grad():
        model(input_ids=IDS)
    (line,) = quant_compile.report(model).attention
    assert (line.runs, line.reason, line.count, line.missed) == (
        "as written",
        "attention kernels run on a GPU",
        2,
        False,
    )


def test_misses_are_in_the_report(plain_inductor: CompileCounter) -> None:
    model = seeded(bloom)
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"})
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    (line,) = quant_compile.report(model).attention
    assert line.missed and line.count == 2 and line.what == "not matched" and "go through view" in line.reason


def test_explain_shows_the_op(like_a_gpu: list[Any]) -> None:
    model = seeded(DECODERS["gemma3"])
    cache = static_cache(model)
    example = {"input_ids": IDS[:, :1], "past_key_values": cache, "use_cache": True}
    explained = explain(model, example, {"default": "keep"}, Target.fake("sm90"))
    shown = [line for line in explained.after if "sglq_kernels.attention" in line]
    assert len(shown) == 2 and all(line.startswith("*") and line.endswith("# attention kernel") for line in shown)
    assert not [
        line
        for line in explained.after
        if "scaled_dot_product_attention" in line or ("expand(" in line and "keys" in line)
    ]
    assert runs(explained.report)[ONE_TOKEN] == ("kernel", 2)


def test_blocks_that_share_a_graph_have_the_op_once(like_a_gpu: list[Any], plain_inductor: CompileCounter) -> None:
    """Of four layers in ``generate``: one graph of a decoding block, with one attention; tokens are those of the model."""
    make = decoder(hf.LlamaConfig, hf.LlamaForCausalLM, num_hidden_layers=4)
    asked = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False}
    wanted = seeded(make).generate(**asked)
    model = seeded(make)
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"}, blocks=True)
    assert torch.equal(model.generate(**asked), wanted)
    assert runs(quant_compile.report(model))[ONE_TOKEN] == ("kernel", 1)
    ops = [
        str(node.target) for gm in plain_inductor.graphs for node in gm.graph.nodes if "attention" in str(node.target)
    ]
    assert sum("sglq_kernels.attention" in op for op in ops) >= 1


@pytest.mark.slow
def test_inductor_compiles_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Inductor's own code around it, which writes the cache in place before the op reads it."""
    kernel = AttentionKernel("kernel", lambda p, target: Rank(1.0), lambda *given: None, False)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(attention, "attention_kernels", lambda: {"kernel": kernel})
    monkeypatch.setattr(
        "quant_compile.runtime.variant.choose_attention",
        lambda p, target, rows: attention.choose_attention(p, Target.fake("sm90"), rows),
    )
    model = seeded(
        decoder(hf.GptOssConfig, hf.GptOssForCausalLM, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1)
    )
    wanted = generated(model, model, static_cache(model), True, steps=3)
    cache = static_cache(model)
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"})
    assert_close(generated(model, model, cache, True, steps=3), wanted)
    assert {line.runs for line in quant_compile.report(model).attention} == {"kernel"}


@pytest.mark.parametrize("family", ["llama3", "gpt_oss"])
def test_a_second_model_with_other_heads_is_matched(family: str, plain_inductor: CompileCounter) -> None:
    """Its scale is another number: Dynamo must not take it for a symbol because it has seen the first one's."""
    kinds = {"llama3": (hf.LlamaConfig, hf.LlamaForCausalLM), "gpt_oss": (hf.GptOssConfig, hf.GptOssForCausalLM)}
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, **MIXED} if family == "gpt_oss" else {}
    for head in (16, 8):
        model = seeded(decoder(*kinds[family], head_dim=head, **more))
        quant_compile.compile(model, {"default": "keep"})
        generated(model, model, static_cache(model), True)
        lines = quant_compile.report(model).attention
        assert lines and not any("not matched" in line.what for line in lines), (head, lines)
