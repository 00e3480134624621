"""transformers' pipelines over a compiled model; tokenizers are made here, nothing is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperTokenizer, pipeline

import quant_compile
from tests.generation.support import NEW, TapeRecorder, compiled, llama, recorder, reference
from tests.generation.test_encoder_decoder import whisper
from tests.runtime_support import plain_inductor

__all__ = ["plain_inductor", "recorder"]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def words() -> PreTrainedTokenizerFast:
    """Token i is the word ``w<i>``."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w0", padding_side="left")


def letters() -> WhisperTokenizer:
    """Whisper's tokenizer with a letter for each token."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    found = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:91], *special]
    end = {"unk_token": special[0], "bos_token": special[0], "eos_token": special[0]}
    return WhisperTokenizer(vocab={text: i for i, text in enumerate(found)}, merges=[], **end)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_generation(batch_size: int, recorder: TapeRecorder) -> None:
    model, tokenizer = llama(), words()
    texts = ["w5 w6 w7 w8 w9", "w11 w12 w13", "w40 w41 w42 w43"]
    more = {"max_new_tokens": NEW, "do_sample": False, "batch_size": batch_size}
    wanted = pipeline("text-generation", model=reference(model), tokenizer=tokenizer)(texts, **more)
    compiled(model)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for _ in range(2):
        assert run(texts, **more) == wanted
    assert len({text[0]["generated_text"] for text in wanted}) == 3
    assert not quant_compile.report(model).notes
    before = recorder.recorded
    assert run(texts, **more) == wanted and recorder.recorded == before


def test_speech_recognition(recorder: TapeRecorder) -> None:
    model, tokenizer = whisper(positions=50), letters()
    features = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    sounds = [np.sin(np.arange(16000) / rate).astype("float32") for rate in (5, 20)]
    parts = {"tokenizer": tokenizer, "feature_extractor": features, "generate_kwargs": {"max_new_tokens": NEW}}
    wanted = pipeline("automatic-speech-recognition", model=reference(model), **parts)(sounds)
    assert all(len(answer["text"]) > 2 for answer in wanted)
    compiled(model)
    run = pipeline("automatic-speech-recognition", model=model, **parts)
    for _ in range(2):
        assert run(sounds) == wanted
    assert not quant_compile.report(model).notes
    assert recorder.recorded == 1 and quant_compile.report(model).coverage == 1.0
