"""Compile in the background what a graph is about to need: kernels of libraries that take seconds each.

Threads of this process do the waiting, since such a compiler is a process of its own. They end with the process, whatever is
left to do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from functools import wraps
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from quant_compile.lowering.registry import Problem

Made = TypeVar("Made")
THREADS = 16


def once(make: Callable[..., Made]) -> Callable[..., Made]:
    """What ``make`` answered to these (hashable) arguments; who asks while another thread makes it waits. Errors are not kept."""
    known: dict[Hashable, Future[Made]] = {}
    lock = threading.Lock()

    @wraps(make)
    def made(*arguments: Any) -> Made:
        with lock:
            found = known.get(arguments)
            first = found is None
            if found is None:
                found = known[arguments] = Future()
        if first:
            try:
                found.set_result(make(*arguments))
            except BaseException as error:
                with lock:
                    del known[arguments]
                found.set_exception(error)
        return found.result()

    return made


class Prepared(Generic[Made]):
    """One thing for each problem and range of m on a device, each made once, in the background where that was foreseen.

    Args:
        make: ``(problem, top, device)``, in any thread.
        range_of: the m that stands for all that share one.
        alone: what of a problem matters.
    """

    def __init__(
        self,
        make: Callable[[Problem, int, torch.device], Made],
        range_of: Callable[[int], int],
        alone: Callable[[Problem], Problem] = lambda problem: problem,
    ) -> None:
        self._make, self._range_of, self._alone = once(make), range_of, alone
        self._begun: set[tuple[Problem, int, torch.device]] = set()
        self._served: set[tuple[Problem, torch.device]] = set()
        # Problems of a graph are the same objects at each call: they are told apart without hashing all that they say.
        self._called: dict[tuple[int, int, torch.device], tuple[Problem, Made]] = {}

    def __call__(self, problem: Problem, m: int, device: torch.device) -> Made:
        """The one for m rows. If nobody has asked for it, others that serve will be asked for their m next: they are begun."""
        top = self._range_of(m)
        called = self._called.get((id(problem), top, device))
        if called is not None:
            return called[1]
        alone = self._alone(problem)
        if (alone, top, device) not in self._begun:
            self._begun.add((alone, top, device))
            if (alone, device) in self._served:
                for other, place in list(self._served):
                    if place == device:
                        self.begin(other, m, device)
        made = self._make(alone, top, device)
        self._called[id(problem), top, device] = problem, made
        return made

    def begin(self, problem: Problem, m: int, device: torch.device) -> None:
        """Make the one for m rows in the background; an error comes again when it is asked for."""
        key = self._alone(problem), self._range_of(m), device
        if key not in self._begun:
            self._begun.add(key)
            _later(lambda: self._make(*key))

    def serve(self, problem: Problem, device: torch.device) -> None:
        """Say that a graph runs this problem, so that it is asked for its m when others of the graph are."""
        self._served.add((self._alone(problem), device))


_jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
_threads: list[threading.Thread] = []
_starting = threading.Lock()


def _later(job: Callable[[], object]) -> None:
    with _starting:
        if len(_threads) < min(THREADS, os.cpu_count() or 1):
            _threads.append(threading.Thread(target=_work, name="sglquant-ahead", daemon=True))
            _threads[-1].start()
    _jobs.put(job)


def _work() -> None:
    while True:
        job = _jobs.get()
        with suppress(BaseException):  # whoever needs it makes it anew, and gets the error
            job()
