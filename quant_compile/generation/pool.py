"""Blocks of memory for static caches, kept between calls of ``generate``: the same addresses serve the next call, and so do the
CUDA graphs that read them. A block belongs to one call at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from quant_compile.generation import caches
from quant_compile.generation.prompts import Prompts

MOST_IDLE = 6  # blocks that wait for another call
SHARE_OF_DEVICE = 8  # blocks beyond the last one may take an eighth of a device's memory
STEP = 64  # lengths are multiples of this
AHEAD = 256  # tokens beyond the prompt that the first block of a call has room for; then it grows


class Key(NamedTuple):
    """What two calls must have in common to share a block."""

    batch: int
    length: int
    source_length: int
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class Block:
    """A cache with its memory, and what was recorded over it: decode steps and short prompts."""

    key: Key
    cache: Any
    plans: dict[Any, Any] = field(default_factory=dict)
    prompts: Prompts = field(default_factory=Prompts)

    @property
    def bytes(self) -> int:
        """Size of the cache."""
        return sum(tensor.numel() * tensor.element_size() for tensor in caches.tensors(self.cache))


def rounded(tokens: int) -> int:
    """The length of a block for so many tokens: a multiple of 64, or of an eighth of the power of two below."""
    step = max(STEP, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


class Pool:
    """Idle blocks of one model, the least recently used first."""

    def __init__(self) -> None:
        self._idle: list[Block] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, key: Key, make: Callable[[], Any]) -> Block | None:
        """An empty block; None if the cache cannot be made."""
        with self._lock:
            found = next((block for block in reversed(self._idle) if block.key == key), None)
            if found is not None:
                self._idle.remove(found)
        if found is None:
            made = self._make(make)
            if made is None:
                return None
            found = Block(key, made)
        caches.reset(found.cache)
        return found

    def _make(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except torch.OutOfMemoryError:
            self.clear()
            return make()

    def give(self, block: Block) -> None:
        """Keep a block for another call."""
        with self._lock:
            self._idle.append(block)
            while len(self._idle) > MOST_IDLE or (len(self._idle) > 1 and self._too_large(block.key.device)):
                self._idle.pop(0)

    def _too_large(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        held = sum(block.bytes for block in self._idle[:-1])
        return held > torch.cuda.mem_get_info(device)[1] // SHARE_OF_DEVICE

    def clear(self) -> None:
        """Free all idle blocks."""
        with self._lock:
            self._idle.clear()
