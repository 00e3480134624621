"""A GGUF file's tokenizer gives the tokens of the one that it was written from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")

import quant_compile  # noqa: E402
from quant_compile.checkpoints.errors import CheckpointError  # noqa: E402

TEXTS = (
    "Hello world, it's 12345 o'clock!",
    "  two  spaces\n\nlines\t",
    "naïve 字符 🙂 x",
    "<s>marked</s> <think>here",
    "",
    "I'LL don't",
)
CORPUS = [*TEXTS, "the quick brown fox jumps over the lazy dog " * 3, "return 12 + 345", "hello hello world world"]


def byte_level(pattern: str | None) -> Any:
    """A byte-level BPE, trained."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    made.add_tokens(["<think>"])
    return made


# As the models' own tokenizer.json has them.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


@pytest.mark.parametrize(("pre", "pattern"), [("gpt-2", None), ("qwen2", QWEN2), ("llama-bpe", LLAMA3)])
def test_byte_level(pre: str, pattern: str | None, tmp_path: Path) -> None:
    import json

    truth = byte_level(pattern)
    tokens = [truth.id_to_token(i) for i in range(truth.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(truth.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 4 if token == "<think>" else 1 for token in tokens])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    finish(writer)
    found = quant_compile.tokenizer(tmp_path / "model.gguf")
    for text in TEXTS:
        ids = found(text).input_ids
        assert ids == truth.encode(text).ids, text
        assert found.decode(ids, skip_special_tokens=False) == text
    assert (found.bos_token, found.eos_token, found.chat_template) == ("<s>", "</s>", "{{ messages }}")
    assert "<think>" not in found.all_special_tokens


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


PIECES = {
    "▁": -1.0,
    "h": -2.0,
    "e": -2.1,
    "l": -2.2,
    "o": -2.3,
    "▁h": -0.5,
    "el": -0.7,
    "lo": -0.6,
    "llo": -0.3,
    "▁hel": -0.2,
    "ell": -0.4,
    "▁hello": -0.1,
}


def by_score(text: str) -> list[str]:
    """sentencepiece's BPE: the two neighbours whose whole has the best score, the left ones first, become one, until none do."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(PIECES.get(a + b, float("-inf")), -i) for i, (a, b) in enumerate(pairwise(parts))]
        if not pairs or max(pairs)[0] == float("-inf"):
            return parts
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_sentencepiece(tmp_path: Path) -> None:
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (len(tokens) - len(PIECES)) + list(PIECES.values()))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    finish(writer)
    found = quant_compile.tokenizer(tmp_path / "model.gguf")
    for text in ("hello", "hello hello", "hell o", "lololo ell", "hello é"):
        pieces: list[str] = []
        for part in by_score(text):
            pieces += [part] if part in PIECES else [f"<0x{byte:02X}>" for byte in part.encode()]
        ids = found(text).input_ids
        assert found.convert_ids_to_tokens(ids) == ["<s>", *pieces], text
        assert found.decode(ids, skip_special_tokens=True) == text
    assert found("hello", "hello").input_ids == found("hello").input_ids * 2


BAD = {
    "an unknown cut": (lambda w: w.add_tokenizer_pre("new-model"), "'new-model'"),
    "an unknown kind": (lambda w: w.add_tokenizer_model("t5"), "'t5'"),
    "merges of no tokens": (lambda w: w.add_token_merges(["zz yy"]), "no tokenizer that can be made"),
    "merges that are none": (lambda w: w.add_token_merges(["zz"]), "not two tokens"),
    "an id beyond": (lambda w: w.add_eos_token_id(99), "99, and there are 3 tokens"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_tokenizers(what: str, tmp_path: Path) -> None:
    change, words = BAD[what]
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    change(writer)
    have = set(writer.kv_data[0])
    for key, value in keys.items():
        if key not in have:
            writer.add_string(key, value)
    if "tokenizer.ggml.merges" not in have:
        writer.add_token_merges(["a b"])
    writer.add_token_list(["a", "b", "ab"])
    finish(writer)
    with pytest.raises(CheckpointError, match=words):
        quant_compile.tokenizer(tmp_path / "model.gguf")
