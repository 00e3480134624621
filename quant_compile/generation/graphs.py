"""One decode step with fixed inputs: recorded as a CUDA graph where possible, replayed for every further token.

``Recorder`` is the only part that needs a GPU; tests put another one in its place.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from quant_compile.lowering.capture import capturing

Run = Callable[[], Any]


class Recorder(Protocol):
    """Records what a function launches."""

    def warm(self, run: Run) -> Any:
        """Run a function so that a later recording finds nothing left to set up."""
        ...

    def record(self, run: Run) -> tuple[Callable[[], None], Any]:
        """(what launches the same work again, what the function returned). The work itself is not done yet."""
        ...

    def place(self) -> Any:
        """What a recording is bound to: the stream that is current."""
        ...


class CudaRecorder:
    """CUDA graphs that share one memory pool; made on one stream, since each stream costs memory for good."""

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}
    _busy: ClassVar[Any] = threading.RLock()  # one stream: another thread's work would become a part of a recording

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: dict[int, Any] = {}

    def place(self) -> int:
        """The current stream: two streams must not share the memory of intermediate results."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def _side(self) -> torch.cuda.Stream:
        if self._device not in self._streams:
            self._streams[self._device] = torch.cuda.Stream(self._device)
        return self._streams[self._device]

    def warm(self, run: Run) -> Any:
        """One call on the stream of recordings."""
        here = torch.cuda.current_stream(self._device)
        with self._busy:
            side = self._side()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                made = run()
            here.wait_stream(side)
        return made

    def record(self, run: Run) -> tuple[Callable[[], None], Any]:
        """One CUDA graph; other threads may go on using the GPU meanwhile."""
        place = self.place()
        if place not in self._pools:
            self._pools[place] = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with self._busy:
            try:
                with torch.cuda.stream(self._side()):
                    torch.cuda.current_blas_handle()  # each thread has its own, which cannot be made while a stream is captured
                with capturing(graph, self._side(), self._pools[place]):
                    made = run()
            except BaseException:
                self._pools.pop(place)  # torch takes a pool for still in use after a capture that failed
                raise
        return graph.replay, made


Layers = Sequence[Any]
Counts = tuple[tuple[int, str, int], ...]


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded step.

    Attributes:
        replay: launches it.
        result: makes what the step returned anew, with copies of what the next replay overwrites.
        counts: (position of a layer of the cache, attribute, by how much) of Python numbers that a step counts up.
        state: of the weights that it was made with.
    """

    replay: Callable[[], None]
    result: Callable[[], Any]
    counts: Counts
    state: Any

    def __call__(self, layers: Layers) -> Any:
        """The next token's outputs."""
        self.replay()
        for position, name, amount in self.counts:
            vars(layers[position])[name] += amount
        return self.result()


def copier(value: Any, kept: Callable[[Any], Callable[[], Any] | None]) -> Callable[[], Any]:
    """What makes a step's output anew after each replay.

    Args:
        kept: what is handed on as it is -> the function that gives it; None for all else.
    """
    found = kept(value)
    if found is not None:
        return found
    if isinstance(value, Tensor):
        return value.clone
    if is_dataclass(value) and not isinstance(value, type):
        named = {
            f.name: copier(getattr(value, f.name), kept) for f in fields(value) if getattr(value, f.name) is not None
        }
        return partial(_output, type(value), named)
    if isinstance(value, dict):
        items: dict[Any, Callable[[], Any]] = {key: copier(item, kept) for key, item in value.items()}
        return lambda: {key: item() for key, item in items.items()}
    if isinstance(value, tuple | list):
        parts = [copier(item, kept) for item in value]
        return partial(_sequence, type(value), parts)
    return lambda: value


def _output(kind: Callable[..., Any], parts: dict[str, Callable[[], Any]]) -> Any:
    made = {name: part() for name, part in parts.items()}
    if not (isinstance(kind, type) and issubclass(kind, OrderedDict)):
        return kind(**made)
    # transformers' constructor looks through the class's fields once for each of them, at every token.
    output: Any = kind.__new__(kind)
    vars(output).update(made)
    for name, value in made.items():
        OrderedDict.__setitem__(output, name, value)
    return output


def _sequence(kind: Callable[[Any], Any], parts: list[Callable[[], Any]]) -> Any:
    return kind([part() for part in parts])


def python_state(layers: Layers) -> list[dict[str, Any]]:
    """The Python values of a cache's layers, to see what a step changes that no recording holds."""
    return [{name: value for name, value in vars(layer).items() if _plain(value)} for layer in layers]


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | type(None))


def counted(layers: Layers, before: list[dict[str, Any]]) -> Counts | None:
    """What Python numbers have grown by since ``python_state``; None if something else has changed."""
    found: list[tuple[int, str, int]] = []
    for position, (layer, old) in enumerate(zip(layers, before, strict=True)):
        for name, value in old.items():
            now = vars(layer).get(name)
            if now == value:
                continue
            if type(value) is not int or type(now) is not int:
                return None
            found.append((position, name, now - value))
    return tuple(found)


def put_back(layers: Layers, before: list[dict[str, Any]]) -> None:
    """Undo what a step that did not run has counted."""
    for layer, old in zip(layers, before, strict=True):
        vars(layer).update(old)
