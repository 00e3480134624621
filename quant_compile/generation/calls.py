"""Calls of compiled graphs within one call of a model: noted, remembered, or answered by CUDA graphs with nothing else launched.

A CUDA graph knows nothing of Dynamo's guards, nor of what stands around compiled graphs. So a call of the model always goes its whole
way on the host. ``Answering`` stands before the compiled graphs on that way: where the first of a segment is reached, the segment's
recording is launched, and all its graphs answer at once with what they will return. A call that reaches other graphs, or the same ones
with other arguments, has strayed: the model is not the one that was recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from quant_compile.backend import sglquant


class Graph(Protocol):
    """A compiled graph."""

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        ...

    def bound(self, args: tuple[Any, ...]) -> Any:
        """What would run with these arguments; the same object as long as that is the same work. None: not known before."""
        ...


class Watcher(Protocol):
    """What stands between a call and its compiled graphs.

    Attributes:
        compiles: whether graphs may be compiled meanwhile.
    """

    compiles: bool

    def __call__(self, graph: Graph, args: tuple[Any, ...]) -> Any:
        """What the graph returns."""
        ...

    def enter(self) -> None:
        """A compiled function is called: one graph is to follow."""
        ...


class Strayed(Exception):
    """A call did not go the way that is remembered."""


class Noting:
    """Notes the graphs that ran."""

    compiles = True

    def __init__(self) -> None:
        self._graphs: list[int] = []

    def __call__(self, graph: Graph, args: tuple[Any, ...]) -> Any:
        self._graphs.append(id(graph))
        return graph(*args)

    def enter(self) -> None:
        """Nothing to note."""

    @property
    def graphs(self) -> tuple[int, ...]:
        """In their order."""
        return tuple(self._graphs)


@dataclass(frozen=True, eq=False)
class Called:
    """One call of a graph, with all that it was given and returned.

    Attributes:
        graph: the graph.
        args: its arguments.
        made: what it returned.
        sources: number of each tensor among the arguments that is no Parameter; equal ones have one number.
        fresh: those of them that come from outside of compiled graphs, and come for the first time.
        results: numbers of the tensors that it returned.
    """

    graph: Graph
    args: tuple[Any, ...]
    made: tuple[Any, ...]
    sources: tuple[int, ...]
    fresh: tuple[int, ...]
    results: tuple[int, ...]


class Remembering:
    """Remembers what goes from graph to graph in a call that runs as ever.

    Args:
        fixed: tensors that every call gets as they are: a cache's.
    """

    compiles = True

    def __init__(self, fixed: Iterable[Tensor]) -> None:
        self.calls: list[Called] = []
        self.fixed = list(fixed)
        self.entered = 0
        self._numbers = {_key(tensor): number for number, tensor in enumerate(self.fixed)}

    def __call__(self, graph: Graph, args: tuple[Any, ...]) -> Any:
        made, known = graph(*args), len(self._numbers)
        sources = tuple(map(self._number, tensors_in(args)))
        fresh = tuple(dict.fromkeys(number for number in sources if number >= known))
        results = tuple(map(self._number, tensors_in(made)))
        self.calls.append(Called(graph, args, made, sources, fresh, results))  # alive, so that no address comes twice
        return made

    def enter(self) -> None:
        """Count compiled functions: more graphs than these have code in between that no graph stands for."""
        self.entered += 1

    def _number(self, tensor: Tensor) -> int:
        return self._numbers.setdefault(_key(tensor), len(self._numbers))

    @property
    def count(self) -> int:
        """Tensors that were seen."""
        return len(self._numbers)


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a recording reads a tensor from outside; memory that the tensor repeats is there once.

    Attributes:
        base: the memory.
        view: as the recording sees it.
    """

    base: Tensor
    view: Tensor

    @staticmethod
    def of(tensor: Tensor) -> Slot:
        """Filled with the tensor's values."""
        sizes = [1 if step == 0 else size for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
        base = torch.empty_strided(sizes, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        made = Slot(base, base.expand(tensor.shape))
        made.fill(tensor)
        return made

    def fill(self, tensor: Tensor) -> None:
        """Copy a tensor's values.

        Raises:
            Strayed: it is laid out in another way.
        """
        if tensor.shape != self.view.shape or tensor.stride() != self.view.stride():
            raise Strayed
        once = tensor.as_strided(self.base.shape, tensor.stride(), tensor.storage_offset())
        self.base.copy_(once)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a call of a graph must be, and what it gets.

    Attributes:
        graph: identity of the graph.
        bound: what ran, weakly.
        plain: the arguments that are no tensors.
        sources: as of ``Called``.
        slots: where the recording reads what is fresh, by number.
        replay: launches the segment that begins with this call; None within a segment.
        outputs: what it returns.
    """

    graph: int
    bound: Callable[[], Any]
    plain: list[Any]
    sources: tuple[int, ...]
    slots: Mapping[int, Slot]
    replay: Callable[[], None] | None
    outputs: tuple[Any, ...]


class Answering:
    """Answers each call of a graph.

    Args:
        answers: in their order.
        addresses: of all tensors by number; those of fresh ones do not count.

    Raises:
        Strayed: when called, if the graph or its arguments are not those that are remembered.
    """

    compiles = False

    def __init__(self, answers: Sequence[Answer], addresses: Sequence[int]) -> None:
        self._answers, self._addresses, self._at = answers, list(addresses), 0
        self._held: list[Tensor] = []  # alive, so that no address comes twice

    def __call__(self, graph: Graph, args: tuple[Any, ...]) -> Any:
        if self._at == len(self._answers):
            raise Strayed
        answer, bound = self._answers[self._at], graph.bound(args)
        if answer.graph != id(graph) or bound is None or answer.bound() is not bound or answer.plain != plain_in(args):
            raise Strayed
        tensors = tensors_in(args)
        if len(tensors) != len(answer.sources):
            raise Strayed
        if answer.replay is not None:
            self._begin(answer, tensors, answer.replay)
        known = self._addresses
        if [tensor.data_ptr() for tensor in tensors] != [known[number] for number in answer.sources]:
            raise Strayed
        self._at += 1
        return answer.outputs

    def _begin(self, answer: Answer, tensors: list[Tensor], replay: Callable[[], None]) -> None:
        for number, slot in answer.slots.items():
            tensor = tensors[answer.sources.index(number)]
            slot.fill(tensor)
            self._addresses[number] = tensor.data_ptr()
            self._held.append(tensor)
        replay()

    def enter(self) -> None:
        """Nothing to do."""

    @property
    def done(self) -> bool:
        """Whether all graphs were called."""
        return self._at == len(self._answers)


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


def enter() -> None:
    """Say that a compiled function is called."""
    if _CURRENT.watcher is not None:
        _CURRENT.watcher.enter()


def noted(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend ``sglquant``, whose graphs are called by way of the watcher."""
    if _CURRENT.watcher is not None and not _CURRENT.watcher.compiles:
        raise Strayed
    graph: Any = sglquant(gm, example_inputs, mode=mode, options=options)

    def call(*args: Any) -> Any:
        watcher = _CURRENT.watcher
        return graph(*args) if watcher is None else watcher(graph, args)

    return call


def is_input(value: Any) -> bool:
    """Whether a graph's argument is a tensor that differs from call to call, or may."""
    return isinstance(value, Tensor) and not isinstance(value, Parameter)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among a graph's arguments or results that are no Parameters."""
    return [value for value in values if is_input(value)]


def plain_in(values: Iterable[Any]) -> list[Any]:
    """What is no tensor among a graph's arguments."""
    return [value for value in values if not isinstance(value, Tensor)]


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
