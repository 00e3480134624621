"""Calls of compiled graphs within one call of a model: noted, remembered, or answered from memory with nothing launched.

A recorded CUDA graph knows nothing of Dynamo's guards. ``Answering`` lets a call of the model go its whole way on the host, guards and
all, while the device already works on the recording: a compiled graph that is reached hands out what it returned before. If the call
reaches other graphs, or the same ones with other arguments, the model is not the one that was recorded.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from quant_compile.backend import sglquant


class Graph(Protocol):
    """A compiled graph, or what is to be treated as one."""

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        ...

    def bound(self, args: tuple[Any, ...]) -> Any:
        """What would run with these arguments; the same object as long as that is the same work. None: not known before."""
        ...


class AsGraph:
    """A function of tensors that is always the same work, as a graph."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return (self._function(*args),)

    def bound(self, args: tuple[Any, ...]) -> Any:
        """Itself."""
        return self


class Watcher(Protocol):
    """What stands between a call and its compiled graphs."""

    def __call__(self, graph: Graph, args: tuple[Any, ...]) -> Any:
        """What the graph returns."""
        ...


class Strayed(Exception):
    """A call did not go the way that is remembered."""


@dataclass(frozen=True, eq=False)
class Called:
    """One call of a graph.

    Attributes:
        graph: its identity.
        bound: what ran, weakly.
        given: its arguments that are no tensors.
        outputs: what it returned; a ``Blank`` for what only the next graph reads.
    """

    graph: int
    bound: Callable[[], Any]
    given: tuple[Any, ...]
    outputs: Any


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

    def made(self) -> Tensor:
        """A tensor full of NaN, or of -1: who reads it notices."""
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return made.fill_(float("nan") if self.dtype.is_floating_point else -1)


class Noting:
    """Notes the graphs that ran."""

    def __init__(self) -> None:
        self._graphs: list[int] = []

    def __call__(self, graph: Graph, args: tuple[Any, ...]) -> Any:
        self._graphs.append(id(graph))
        return graph(*args)

    @property
    def graphs(self) -> tuple[int, ...]:
        """In their order."""
        return tuple(self._graphs)


class Remembering:
    """Remembers each graph's arguments and results, with no tensor kept that only the next graph reads."""

    def __init__(self) -> None:
        self._calls: list[Called] = []
        self._read: set[int] = set()

    def __call__(self, graph: Graph, args: tuple[Any, ...]) -> Any:
        made, before = graph(*args), self._read
        self._read = {arg.data_ptr() for arg in args if isinstance(arg, Tensor)}
        if self._calls:
            own_results = self._read - before  # not the memory of its own arguments
            self._calls[-1] = _without_values(self._calls[-1], own_results)
        self._calls.append(Called(id(graph), weakref.ref(graph.bound(args)), _given(args), made))
        return made

    def calls(self) -> tuple[Called, ...]:
        """All calls, with tensors in the places of those that were not kept; equal ones are one."""
        blanks: dict[tuple[int, Blank], Tensor] = {}
        return tuple(replace(call, outputs=_filled(call.outputs, blanks)) for call in self._calls)


class Answering:
    """Answers each call of a graph from memory.

    Raises:
        Strayed: when called, if the graph or its arguments are not those that are remembered.
    """

    def __init__(self, calls: Sequence[Called]) -> None:
        self._calls, self._at = calls, 0

    def __call__(self, graph: Graph, args: tuple[Any, ...]) -> Any:
        if self._at == len(self._calls):
            raise Strayed
        found, bound = self._calls[self._at], graph.bound(args)
        if found.graph != id(graph) or bound is None or found.bound() is not bound or found.given != _given(args):
            raise Strayed
        self._at += 1
        return found.outputs

    @property
    def done(self) -> bool:
        """Whether all graphs were called."""
        return self._at == len(self._calls)


class _Current(threading.local):
    watcher: Watcher | None = None


_CURRENT = _Current()


@contextmanager
def watched(watcher: Watcher) -> Generator[None]:
    """Let a watcher stand before the compiled graphs that this thread calls."""
    before, _CURRENT.watcher = _CURRENT.watcher, watcher
    try:
        yield
    finally:
        _CURRENT.watcher = before


def through(graph: Graph, args: tuple[Any, ...]) -> Any:
    """Call a graph by way of the watcher."""
    watcher = _CURRENT.watcher
    return graph(*args) if watcher is None else watcher(graph, args)


def noted(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend ``sglquant``, whose graphs go through the watcher."""
    graph: Any = sglquant(gm, example_inputs, mode=mode, options=options)

    def call(*args: Any) -> Any:
        return through(graph, args)

    return call


def _given(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([arg for arg in args if not isinstance(arg, Tensor)])


def _without_values(call: Called, read: set[int]) -> Called:
    if not isinstance(call.outputs, tuple | list):
        return call
    outputs = [Blank.of(o) if isinstance(o, Tensor) and o.data_ptr() in read else o for o in call.outputs]
    return replace(call, outputs=tuple(outputs))


def _filled(outputs: Any, blanks: dict[tuple[int, Blank], Tensor]) -> Any:
    if not isinstance(outputs, tuple | list):
        return outputs
    made: list[Any] = []
    for position, output in enumerate(outputs):
        if isinstance(output, Blank):
            found = blanks.get((position, output))
            output = blanks[position, output] = output.made() if found is None else found
        made.append(output)
    return tuple(made)
