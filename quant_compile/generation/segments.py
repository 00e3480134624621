"""A remembered call's graphs as CUDA graphs: one recording for each row of graphs that feed each other.

A segment ends where a graph gets a tensor that is made outside of compiled graphs: a mask of another kind, or what the last norm makes of
the last block's result.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_compile.generation.calls import Answer, Called, Remembering, Slot, is_input, plain_in, tensors_in

APART = 64  # elements between the beginnings of tensors without values: each has an address of its own
MOST = 16  # segments: with more, little is gained

Record = Callable[[Callable[[], None]], Callable[[], None]]  # what a function launches -> what launches it again


class Unsuited(Exception):
    """A call whose graphs cannot be recorded; the message is the reason."""


@dataclass(frozen=True)
class Blank:
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> Blank:
        """As the tensor."""
        return Blank(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    @property
    def elements(self) -> int:
        """From its first to its last one."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))


class Segments:
    """Records the graphs of a remembered call.

    Results that only graphs read are not kept: their memory serves what follows, and ``answers`` puts tensors full of NaN in their
    places.
    """

    def __init__(self, remembered: Remembering) -> None:
        self._calls = remembered.calls
        self._numbers = remembered.count
        self._static: dict[int, Tensor] = dict(enumerate(remembered.fixed))
        self._last = {number: at for at, call in enumerate(self._calls) for number in call.sources}
        self._places: dict[int, tuple[int, int]] = {}  # number of a result -> (its call, its position)
        self._made: list[list[object]] = []
        self._slots: dict[int, dict[int, Slot]] = {}
        self._replays: dict[int, Callable[[], None]] = {}

    def record(self, record: Record) -> None:
        """Record all segments.

        Raises:
            Unsuited: there are too many, or tensors on other devices come in between.
        """
        starts = [at for at, call in enumerate(self._calls) if call.fresh or at == 0]
        if len(starts) > MOST:
            raise Unsuited(f"tensors from outside of compiled graphs come in at {len(starts)} places")
        for start, end in zip(starts, [*starts[1:], len(self._calls)], strict=True):
            self._slots[start] = self._slots_of(self._calls[start])
            self._replays[start] = record(lambda span=range(start, end): self._run(span))

    def _slots_of(self, call: Called) -> dict[int, Slot]:
        tensors = dict(zip(call.sources, tensors_in(call.args), strict=True))
        devices = {tensor.device for tensor in self._static.values()}
        if any(tensors[number].device not in devices for number in call.fresh):
            raise Unsuited("a graph gets tensors on another device")
        slots = {number: Slot.of(tensors[number]) for number in call.fresh}
        self._static |= {number: slot.view for number, slot in slots.items()}
        return slots

    def _run(self, span: range) -> None:
        for at in span:
            call = self._calls[at]
            numbers = iter(call.sources)
            made = list(call.graph(*[self._static[next(numbers)] if is_input(arg) else arg for arg in call.args]))
            self._made.append(made)
            results = iter(call.results)
            for position, value in enumerate(made):
                if is_input(value) and (number := next(results)) not in self._static:
                    self._static[number], self._places[number] = value, (at, position)
            for number in set(call.sources) & self._places.keys():
                if self._last[number] == at:
                    self._let_go(number)

    def _let_go(self, number: int) -> None:
        at, position = self._places.pop(number)
        self._made[at][position] = Blank.of(self._static.pop(number))

    def answers(self) -> tuple[tuple[Answer, ...], list[int]]:
        """(an answer for each call, the address of each tensor by number)."""
        addresses = [0] * self._numbers
        blanks = _tensors_of([value for made in self._made for value in made if isinstance(value, Blank)])
        found: list[Answer] = []
        for at, (call, made) in enumerate(zip(self._calls, self._made, strict=True)):
            outputs = tuple(next(blanks) if isinstance(value, Blank) else value for value in made)
            for number, tensor in zip(call.results, tensors_in(outputs), strict=True):
                addresses[number] = tensor.data_ptr()
            bound = weakref.ref(call.graph.bound(call.args))
            slots, replay = self._slots.get(at, {}), self._replays.get(at)
            found.append(Answer(id(call.graph), bound, plain_in(call.args), call.sources, slots, replay, outputs))
        for number, tensor in self._static.items():
            addresses[number] = tensor.data_ptr()
        return tuple(found), addresses


def _tensors_of(blanks: list[Blank]) -> Iterator[Tensor]:
    """Tensors for blanks, in their order; they share memory, which is full of NaN, or of -1 where there is none."""
    kinds = dict.fromkeys((blank.dtype, blank.device) for blank in blanks)
    bases: dict[object, Tensor] = {}
    for dtype, device in kinds:
        size = max(blank.elements for blank in blanks if (blank.dtype, blank.device) == (dtype, device))
        value = float("nan") if dtype.is_floating_point else -1
        bases[dtype, device] = torch.full((size + APART * len(blanks),), value, dtype=dtype, device=device)
    for at, blank in enumerate(blanks):
        yield bases[blank.dtype, blank.device].as_strided(blank.shape, blank.strides, APART * at)
