"""The user's text as windows of token ids that a causal language model is measured on.

Reads a string, a file or token ids, and the tokenizer that is given or lies beside the model; every mistake is an ``OptionError``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.errors import OptionError
from quant_compile.measure.windows import windows_of

FEWEST = 32
"""Tokens that must be predicted: fewer say nothing of a scheme."""
LENGTH = 512
"""Tokens of a window, where nothing else is asked for and the model and the text have so many."""


def windows_for(model: Any, text: Any, tokenizer: Any = None, length: int | None = None, count: int = 16) -> Tensor:
    """Windows [count, length + 1] of int64 on the CPU; in each, every token but the first is predicted.

    Args:
        model: whose vocabulary and positions bound the ids and the length.
        text: a string, the path of a text file, or token ids, [tokens] or [windows, length + 1].
        tokenizer: of transformers, or the path of one (a folder, or a tokenizer.json); None: the one that lies where the model was
            loaded from. Where it puts a token before every text, each window begins with that one.
        length: tokens predicted in a window; None: LENGTH, or what the model or the text has.
        count: windows at most.

    Raises:
        OptionError: the text is empty or too short, there is no such file, ids are not of the model, or there is no tokenizer.
    """
    for name, value in (("length", length), ("windows", count)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise OptionError(f"{name} must be a number from 1 up, got {value!r}")
    if isinstance(text, str | Path):
        ids, first = _encoded(_content(text), _tokenizer(model, tokenizer))
    else:
        ids, first = _ids(text), None
    _check_vocabulary(model, ids)
    if ids.dim() == 2 and ids.shape[0] > 1:
        if length is not None and length != ids.shape[1] - 1:
            raise OptionError(f"the token ids come in windows of {ids.shape[1]}, so length is {ids.shape[1] - 1}")
        windows = ids[:count]
    else:
        windows = _cut(model, ids.flatten(), length, count, text)
    if windows[:, 1:].numel() < FEWEST:
        raise OptionError(_too_short(windows[:, 1:].numel(), text))
    if first is not None:
        windows[:, 0] = first
    return windows


def _content(text: str | Path) -> str:
    """The text itself, or what the file holds that it names."""
    path = Path(text)
    if isinstance(text, Path) or os.path.isfile(text):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OptionError(f"the text file {path} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise OptionError(f"the text file {path} is not UTF-8. Fix: convert it, or give token ids.") from None
        if not text.strip():
            raise OptionError(f"the text file {path} is empty. Fix: give a text of some thousand words.")
    if not text.strip():
        raise OptionError(
            "the text is empty. Fix: give a text of some thousand words, like that which the model is for."
        )
    return text


def _tokenizer(model: Any, given: Any) -> Any:
    """The tokenizer itself.

    Raises:
        OptionError: there is none.
    """
    if given is not None and not isinstance(given, str | Path):
        if callable(given):
            return given
        raise OptionError(f"tokenizer must be one of transformers or a path, got {type(given).__name__}")
    name = str(given or getattr(model, "name_or_path", "") or "")
    fix = "Fix: give tokenizer=..., one of transformers, its folder or a tokenizer.json; or give token ids as the text."
    if not name:
        raise OptionError(f"the text is words, and the model does not say where its tokenizer is. {fix}")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if Path(name).is_file():
        return PreTrainedTokenizerFast(tokenizer_file=name)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises anything here, from OSError to KeyError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OptionError(f"no tokenizer in {name} ({reason}). {fix}") from None


def _encoded(text: str, tokenizer: Any) -> tuple[Tensor, int | None]:
    """Ids [tokens] without special tokens, and the token that the tokenizer puts before every text, if it does."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    framed = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    return torch.tensor(ids, dtype=torch.int64), bos if bos is not None and framed[:1] == [bos] else None


def _ids(text: Any) -> Tensor:
    if isinstance(text, Sequence) and any(isinstance(part, str) for part in text):
        raise OptionError('the text is a list of strings. Fix: join them, "\\n".join(texts).')
    try:
        ids = text if isinstance(text, Tensor) else torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(f"the text is a string, a path or token ids, got {type(text).__name__}") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise OptionError(f"token ids are whole numbers, got {ids.dtype}".replace("torch.", ""))
    if ids.dim() not in (1, 2) or not ids.numel():
        raise OptionError(f"token ids are [tokens] or [windows, length + 1], got {list(ids.shape)}")
    return ids.detach().to("cpu", torch.int64, copy=True)


def _check_vocabulary(model: Any, ids: Tensor) -> None:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(table, "num_embeddings", None)
    if ids.numel() and int(ids.min()) < 0:
        raise OptionError(f"token ids are 0 and more, got {int(ids.min())}")
    if ids.numel() and size is not None and int(ids.max()) >= size:
        raise OptionError(
            f"token {int(ids.max())} of the text is not in the model's vocabulary of {size}. Fix: use the model's own tokenizer."
        )


def _cut(model: Any, ids: Tensor, length: int | None, count: int, text: Any) -> Tensor:
    if ids.numel() <= FEWEST:
        raise OptionError(_too_short(max(0, ids.numel() - 1), text))
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    if length is not None and positions is not None and length > positions:
        raise OptionError(f"length {length} is more than the {positions} positions that the model has")
    if length is not None and ids.numel() <= length:
        raise OptionError(
            f"the text has {ids.numel()} tokens, and one window needs {length + 1}. Fix: a longer text, or a smaller length."
        )
    return windows_of(ids, length or min(LENGTH, positions or LENGTH, ids.numel() - 1), count)


def _too_short(predicted: int, text: Any) -> str:
    file = " (a file of that name would be read, and there is none)" if _looks_like_file(text) else ""
    return (
        f"the text is too short{file}: {predicted} tokens to predict, at least {FEWEST} are needed. "
        "Fix: give some thousand words, or a path; a few windows say little of a scheme."
    )


def _looks_like_file(text: Any) -> bool:
    return isinstance(text, str) and "\n" not in text and " " not in text and bool(Path(text).suffix)
