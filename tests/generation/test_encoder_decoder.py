"""Encoder-decoder models: ``generate`` calls the encoder by itself, and the cache has a part for the encoder's states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import quant_compile
from tests.generation.support import NEW, TapeRecorder, compiled, prompt, recorder, reference, seeded
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor", "recorder"]
ENDLESS = {"eos_token_id": None, "forced_eos_token_id": None}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def t5() -> Any:
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = T5Config(
        **sizes, pad_token_id=0, decoder_start_token_id=0, tie_word_embeddings=False, initializer_factor=3.0, **ENDLESS
    )
    return seeded(lambda: T5ForConditionalGeneration(config))


def bart_like(kind: Any, config: Any, **more: Any) -> Any:
    sizes = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.5}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 2, **ENDLESS}
    return seeded(lambda: kind(config(**sizes, **heads, **ids, **more)))


def marian() -> Any:
    return bart_like(MarianMTModel, MarianConfig, max_position_embeddings=128)


def whisper(positions: int = 20) -> Any:
    ends = {"suppress_tokens": None, "begin_suppress_tokens": None}
    sizes = {"num_mel_bins": 8, "max_source_positions": positions, "max_target_positions": 64}
    return bart_like(WhisperForConditionalGeneration, WhisperConfig, **sizes, **ends)


def sound(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(rows, 8, 40, generator=torch.Generator().manual_seed(seed))}


MODELS = {
    "t5": (t5, lambda: prompt(2, 7, padded=True), lambda: prompt(2, 11, seed=6)),
    "marian": (marian, lambda: prompt(2, 7, padded=True), lambda: prompt(2, 11, seed=6)),
    "whisper": (whisper, sound, lambda: sound(seed=1)),
}


def answer(model: Any, inputs: Any, **more: Any) -> Any:
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **more})


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
def test_tokens(name: str, more: dict[str, Any], recorder: TapeRecorder) -> None:
    make, first, second = MODELS[name]
    model = make()
    eager = reference(model)
    calls = [first(), second(), first(), second()]
    wanted = [answer(eager, inputs, **more) for inputs in calls]
    assert not torch.equal(wanted[0], wanted[1])
    compiled(model)
    for inputs, result in zip(calls, wanted, strict=True):
        assert torch.equal(answer(model, inputs, **more), result)
    assert recorder.recorded == (1 if name == "whisper" else 2), "one for each length of the encoder's states"
    assert not quant_compile.report(model).notes
    assert quant_compile.report(model).coverage == 1.0, "the encoder is quantized too"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_released(name: str, plain_inductor: CompileCounter) -> None:
    make, first, second = MODELS[name]
    model = make()
    eager = reference(model)
    wanted = [answer(eager, inputs()) for inputs in (first, second)]
    compiled(model, release_weights=True)
    for _ in range(2):
        for inputs, result in zip((first, second), wanted, strict=True):
            assert torch.equal(answer(model, inputs()), result)
    assert all(line.released for line in quant_compile.report(model).lines if line.scheme)
    named = [line.names[0] for line in quant_compile.report(model).lines if line.scheme]
    assert any(".encoder." in f".{text}" for text in named), "names are those of the whole model"


def test_the_encoder_alone_and_the_whole_model_share_planes(plain_inductor: CompileCounter) -> None:
    model = t5()
    eager = reference(model)
    inputs = prompt(2, 7)
    wanted = eager.get_encoder()(**inputs).last_hidden_state
    compiled(model)
    torch.testing.assert_close(model.get_encoder()(**inputs).last_hidden_state, wanted)
    whole = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(
        whole, eager(**inputs, decoder_input_ids=inputs["input_ids"]).logits, rtol=1e-4, atol=1e-4
    )
    quant_compile.uncompile(model)
    assert "_compiled_call_impl" not in vars(model.get_encoder())


def test_a_returned_cache_of_both_parts(recorder: TapeRecorder) -> None:
    model = t5()
    inputs = prompt(2, 7, padded=True)
    wanted = answer(reference(model), inputs, return_dict_in_generate=True)
    name = next(key for key in ("cache", "past_key_values") if key in wanted)
    compiled(model)
    found = answer(model, inputs, return_dict_in_generate=True)
    assert torch.equal(found.sequences, wanted.sequences)
    for part in ("self_attention_cache", "cross_attention_cache"):
        mine, theirs = getattr(found[name], part), getattr(wanted[name], part)
        torch.testing.assert_close(mine.layers[0].keys, theirs.layers[0].keys, rtol=1e-3, atol=1e-3)
