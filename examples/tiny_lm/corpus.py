"""Text for the tiny models: the Python standard library's own sources, split by file hash, and a BPE tokenizer of them.

Reads the ``*.py`` files beside ``os.__file__``, or of a given folder (no site-packages); writes nothing. The order of
files is that of their paths and the split depends on the path alone, so that one Python version always gives the same
text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
"""Stands between two files, and begins every one."""

# Generated tables and word lists: near copies of each other or of nothing, which would flatter or spoil a perplexity.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3", "ensurepip"}
)
SKIPPED_PARTS = ("test/test_unicode_identifiers", "test/cjkencodings", "test/encoded_modules", "test/tokenizedata")
MAX_FILE_BYTES = 400_000
HELDOUT_PART = 32
HELDOUT_BYTES = 90_000
HELDOUT_PER_FILE = 6_000


@dataclass(frozen=True)
class Corpus:
    """Source texts, each one file, in path order. ``heldout`` files are in no training text."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes to train on."""
        return sum(len(text.encode()) for text in self.train)


def read_corpus(limit_bytes: int | None = None, folder: Path | None = None) -> Corpus:
    """Read a standard library: the running interpreter's, or the copy in ``folder``.

    Args:
        limit_bytes: stop after this much text (for smoke runs).
        folder: what to read instead, e.g. ``Lib`` of a CPython source release.

    Raises:
        FileNotFoundError: no readable sources there (a zipped library, say).
    """
    root = (folder or Path(os.__file__).parent).resolve()
    train: list[str] = []
    heldout: list[str] = []
    total = 0
    for path in sorted(_sources(root), key=lambda p: p.relative_to(root).as_posix()):
        text = _read(path)
        if text is None:
            continue
        name = path.relative_to(root).as_posix()
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        (heldout if digest % HELDOUT_PART == 0 else train).append(text)
        total += len(text)
        if limit_bytes is not None and total >= limit_bytes:
            break
    if not train or not heldout:
        raise FileNotFoundError(f"no Python sources to train on under {root}")
    return Corpus(tuple(train), tuple(heldout))


def _sources(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        place = Path(folder)
        if any(part in place.as_posix() for part in SKIPPED_PARTS):
            continue
        found += [place / name for name in files if name.endswith(".py")]
    return found


def _read(path: Path) -> str | None:
    """The file's text, or None where it is empty, huge, not UTF-8, or mostly digits and escapes (a table)."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not 200 <= len(data) <= MAX_FILE_BYTES:
        return None
    dense = sum(text.count(char) for char in "0123456789\\")
    return None if dense > 0.2 * len(text) else text.replace("\r\n", "\n")


def heldout_text(files: Sequence[str]) -> str:
    """About ``HELDOUT_BYTES`` of held-out text: the beginning of each file, so that many files are in it.

    A file gives at most ``HELDOUT_PER_FILE`` characters, cut at the end of a line; files are joined by ``END``.
    """
    pieces: list[str] = []
    size = 0
    for text in files:
        piece = text[:HELDOUT_PER_FILE]
        if len(piece) < len(text):
            piece = piece[: piece.rfind("\n") + 1]
        pieces.append(END + piece)
        size += len(piece.encode())
        if size >= HELDOUT_BYTES:
            break
    return "".join(pieces)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over ``texts``; every byte string can be encoded. ``END`` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """All texts as one stream of token ids, ``END`` before each."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids.append(end)
        ids.extend(encoding.ids)
    return ids
