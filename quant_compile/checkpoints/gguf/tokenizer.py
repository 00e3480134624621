"""The tokenizer that a GGUF file holds, as transformers' ``PreTrainedTokenizerFast``: byte-level BPE, and BPE in the way of sentencepiece.

Reads the metadata. How text is cut into words is named there (``tokenizer.ggml.pre``) and not said: the patterns below are those of the
models that the names stand for. A name that is not known is an error, since another pattern would give other tokens without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from quant_compile.checkpoints.errors import cut
from quant_compile.checkpoints.gguf.container import Container, fail, read

PREFIX = "tokenizer.ggml."
CONTROL, USER_DEFINED = 3, 4  # token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(contractions: str, digits: str) -> str:
    """Words by case, as GPT-4o and Tekken cut them."""
    words = f"{_WORD}{_UPPER}*{_LOWER}+{contractions}|{_WORD}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{_TAIL}"
_GPT4O = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
WORDS: dict[str, str | None] = {
    "gpt-2": None, "default": None,  # ByteLevel's own
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3, "falcon3": _LLAMA3, "pixtral": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "gpt-4o": _GPT4O, "llama4": _GPT4O, "tekken": _cased("", r"\p{N}"),
}  # fmt: skip
"""``tokenizer.ggml.pre`` -> what cuts text into words."""
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer(path: str | Path) -> Any:
    """The tokenizer of a GGUF file.

    Args:
        path: the file; of several splits the first.

    Returns:
        A ``PreTrainedTokenizerFast``, with the chat template where the file has one.

    Raises:
        CheckpointError: the file cannot be read, or its tokenizer is none of the kinds that are known.
    """
    from transformers import PreTrainedTokenizerFast

    head = read(Path(path))
    kind = head.need(f"{PREFIX}model", str)
    tokens = _texts(head, "tokens")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        _unknown(head, f"a tokenizer of the kind {kind[:40]!r}; read here are {', '.join(makers)}")
    made = makers[kind](head, tokens)
    _add_tokens(head, made, tokens)
    special = {
        name: tokens[token] for name, key in _NAMES.items() if (token := _id(head, key, len(tokens))) is not None
    }
    made.post_processor = _ends(head, kind, tokens) or made.post_processor
    out = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
    out.chat_template = head.get("tokenizer.chat_template", str)
    return out


def _texts(head: Container, key: str) -> list[str]:
    found = head.need(PREFIX + key, list)
    if not found or not all(isinstance(text, str) for text in found):
        fail(head.file, f"{PREFIX}{key} must be texts")
    return found


def _id(head: Container, name: str, count: int) -> int | None:
    found = head.get(f"{PREFIX}{name}_token_id", int)
    if found is not None and not 0 <= found < count:
        fail(head.file, f"{PREFIX}{name}_token_id is {found}, and there are {count} tokens")
    return found


def _byte_level(head: Container, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = head.get(f"{PREFIX}pre", str, "default")
    if name not in WORDS:
        _unknown(head, f"text cut into words by {cut(name, 40)!r} ({PREFIX}pre); known are {', '.join(WORDS)}")
    pairs = [_pair(head, merge) for merge in _texts(head, "merges")]
    made = Tokenizer(
        _bpe(head, models.BPE, vocab=_vocabulary(tokens), merges=pairs, ignore_merges=WORDS[name] == _LLAMA3)
    )
    pattern = WORDS[name]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_])
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(head: Container, tokens: list[str]) -> Any:
    """Pieces merge by score, those of the best first; bytes stand for letters without a piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = head.need(f"{PREFIX}scores", list)
    if len(scores) != len(tokens):
        fail(head.file, f"has {len(scores)} scores of {len(tokens)} tokens")
    vocabulary = _vocabulary(tokens)
    unknown = _id(head, "unknown", len(tokens))
    model = _bpe(
        head, models.BPE, vocab=vocabulary, merges=_merges(vocabulary, scores), byte_fallback=True, fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )  # fmt: skip
    made = Tokenizer(model)
    prefix = head.get(f"{PREFIX}add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return made


def _bpe(head: Container, make: Any, **parts: Any) -> Any:
    try:
        return make(**parts)
    except Exception as error:  # whatever tokenizers raises for merges of tokens that are not there
        fail(head.file, f"has no tokenizer that can be made: {str(error)[:200]}")


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Of a token that is there twice the first counts, as in llama.cpp."""
    out: dict[str, int] = {}
    for number, token in enumerate(tokens):
        out.setdefault(token, number)
    return out


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All cuts of every piece into two pieces, by the score of the whole, then by the pieces' numbers."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, number in vocabulary.items():
        for cut_at in range(1, min(len(piece), 256)):
            left, right = piece[:cut_at], piece[cut_at:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[number], vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _pair(head: Container, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        fail(head.file, f"{PREFIX}merges has {cut(merge, 40)!r}, which are not two tokens")
    return left, right


def _add_tokens(head: Container, made: Any, tokens: list[str]) -> None:
    """Tokens that are matched whole: those that control, and the user's own."""
    from tokenizers import AddedToken

    kinds = head.get(f"{PREFIX}token_type", list, [])
    pairs = list(zip(tokens, kinds, strict=False))
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in pairs if kind == CONTROL])
    made.add_tokens([AddedToken(t, normalized=False) for t, kind in pairs if kind == USER_DEFINED])


def _ends(head: Container, kind: str, tokens: list[str]) -> Any:
    """What puts tokens before and after a text; None: nothing does."""
    from tokenizers import processors

    first = _id(head, "bos", len(tokens)) if head.get(f"{PREFIX}add_bos_token", bool, kind == "llama") else None
    last = _id(head, "eos", len(tokens)) if head.get(f"{PREFIX}add_eos_token", bool, False) else None
    ends = [token for token in (first, last) if token is not None]
    if not ends:
        return None

    def around(text: str) -> list[str]:
        before, after = ([] if token is None else [f"{tokens[token]}:{text[-1]}"] for token in (first, last))
        return [*before, text, *after]

    special = [(tokens[token], token) for token in dict.fromkeys(ends)]
    return processors.TemplateProcessing(
        single=around("$A:0"), pair=around("$A:0") + around("$B:1"), special_tokens=special
    )


def _unknown(head: Container, what: str) -> NoReturn:
    fail(head.file, f"has {what}", "Fix: take the tokenizer of the model that the file was made of.")
