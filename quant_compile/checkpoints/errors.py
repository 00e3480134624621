"""What is wrong with a checkpoint that is read or written: always with the file or the tensor, and the fix."""

from __future__ import annotations

from quant_compile.ir.errors import QuantError


def cut(text: str, most: int = 200) -> str:
    """A name for a message, at most ``most`` letters of it."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


class CheckpointError(QuantError, ValueError):
    """A checkpoint cannot be read: a file, a tensor or a key, what is wrong with it, and the fix."""


class SaveError(QuantError, ValueError):
    """A model cannot be saved: which weights or which folder, why, and the fix. Nothing has been replaced."""
