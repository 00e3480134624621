"""Backward hooks of a model, out of sight while compiled code of it runs.

A compiled call refuses gradients, so that none of them would run; and Dynamo ends a graph at every module that has one (transformers 5.17
gives them to the norms of divided attention).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

NAMES = ("_backward_hooks", "_backward_pre_hooks")


class BackwardHooks:
    """Those that modules of a model have now; the modules keep them, but for the time of compiled calls."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [(module, name) for module in model.modules() for name in NAMES if vars(module).get(name)]
        self._lock, self._calls = threading.Lock(), 0
        self._own: list[Any] = []

    def out_of_sight(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled function that sees none of them; itself where there are none."""
        if not self._places:
            return run

        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._hidden():
                return run(*args, **kwargs)

        return call

    @contextmanager
    def _hidden(self) -> Generator[None]:
        """Calls of several threads, and calls within calls, share it: the last one out puts them back."""
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._own = [vars(module)[name] for module, name in self._places]
                for module, name in self._places:
                    setattr(module, name, OrderedDict[int, Any]())
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0:
                    for (module, name), hooks in zip(self._places, self._own, strict=True):
                        setattr(module, name, hooks)
