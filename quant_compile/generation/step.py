"""A compiled model's call: what is inside of ``generate`` with a cache of ours goes to its lease, all else straight to compiled code.

Prompts get a dynamic length from the first on, so that one graph serves them all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from quant_compile.generation.calls import Watcher, watched
from quant_compile.generation.inputs import marked, tokens_in
from quant_compile.generation.lease import Lease, Names


class Step:
    """What ``model(...)`` calls.

    Attributes:
        inside: the compiled model for calls inside of ``generate``; its code has no CUDA graphs of Inductor's.
        outside: for all other calls; the same one, unless Inductor's CUDA graphs were asked for.
        leases: caches in use, by identity.
    """

    def __init__(self, inside: Callable[..., Any], outside: Callable[..., Any], names: Names, dynamic: bool) -> None:
        self.inside, self.outside, self.names = inside, outside, names
        self.leases: dict[int, Lease] = {}
        self._dynamic = dynamic
        self._depth = threading.local()

    def __enter__(self) -> Step:
        self._depth.value = getattr(self._depth, "value", 0) + 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth.value -= 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lease = self.leases.get(id(kwargs.get(self.names.cache)))
        if lease is not None and not args:
            tokens = tokens_in(kwargs)
            if tokens == 1 and lease.length:
                return lease.decode(kwargs)
            lease.reserve(tokens)
            return lease.fill(kwargs, tokens, self._fill)
        if getattr(self._depth, "value", 0):
            return self.inside(*args, **(self._marked(kwargs)))
        return self.outside(*args, **kwargs)

    def _fill(self, inputs: dict[str, Any], watcher: Watcher) -> Any:
        with watched(watcher):
            return self.inside(**self._marked(inputs))

    def _marked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: marked(name, value) for name, value in inputs.items()} if self._dynamic else inputs
