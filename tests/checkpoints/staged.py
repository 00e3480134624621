"""A device that is none, for a ``Stager``: its copies happen late, and it spoils what must not be touched until then."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from quant_compile.checkpoints.staging import Sizes

SMALL = Sizes(readers=2, buffer=64, ahead=256, pieces=3, worth=0)
SPOILT = 0xEE


class Mark:
    """What the caller's stream was told: until it happens, memory that was given out since the last is somebody else's."""

    def __init__(self, fresh: list[Tensor]) -> None:
        self.fresh = fresh

    def happen(self) -> None:
        for tensor in self.fresh:
            tensor.reshape(-1).view(torch.uint8).fill_(SPOILT)
        self.fresh = []


class LateLink:
    """Copies in a thread of its own, one after the other, ``delay`` seconds after they were asked for."""

    def __init__(self, delay: float = 0.0, on_copy: Callable[[int], None] = lambda count: None) -> None:
        self.delay, self.on_copy = delay, on_copy
        self.fresh: list[Tensor] = []
        self.pinned_bytes = self.copies = self.most_pairs = self.given_back = 0
        self.asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stream = threading.Thread(target=self.run, daemon=True)
        self.stream.start()

    def run(self) -> None:
        while (asked := self.asked.get()) is not None:
            pairs, after, event = asked
            time.sleep(self.delay)
            after.happen()
            for target, source in pairs:
                target.copy_(source)
            event.set()

    def pinned(self, nbytes: int) -> Tensor:
        self.pinned_bytes = nbytes
        return torch.full((nbytes,), SPOILT, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.fresh.append(torch.empty(shape, dtype=dtype))
        return self.fresh[-1]

    def mark(self) -> Mark:
        made, self.fresh = Mark(self.fresh), []
        return made

    def thread(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Mark) -> threading.Event:
        self.copies += 1
        self.most_pairs = max(self.most_pairs, len(pairs))
        self.on_copy(self.copies)
        event = threading.Event()
        self.asked.put((pairs, after, event))
        return event

    def wait(self, event: threading.Event) -> None:
        event.wait()

    def follow(self, event: threading.Event) -> None:
        event.wait()

    def close(self) -> None:
        self.asked.put(None)
        self.stream.join()

    def give_back(self) -> None:
        self.given_back += 1


def readers() -> list[threading.Thread]:
    """Threads of stagers that live."""
    return [thread for thread in threading.enumerate() if thread.name == "sglquant-reader"]
