"""What is wrong with a checkpoint: always with the file or the tensor, and the fix."""

from __future__ import annotations

from quant_compile.ir.errors import QuantError


class CheckpointError(QuantError, ValueError):
    """A checkpoint cannot be read: a file, a tensor or a key, what is wrong with it, and the fix."""
