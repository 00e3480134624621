"""Questions about sizes that are symbols, above all which side of SPLIT a number of rows is on.

Graphs for any number of rows are compiled once for each side. Dynamo checks what was asked at each call from the first question on, and
compiles the other side when a call first has it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_LATE: ContextVar[bool] = ContextVar("sglquant_late", default=False)
# Graphs whose m is a symbol are compiled once for m up to it and once for more, each when first met.
SPLIT = 1024


@contextmanager
def without_guards() -> Generator[None]:
    """Inside, Dynamo is done with the graph, so that no condition on sizes may be added."""
    token = _LATE.set(True)
    try:
        yield
    finally:
        _LATE.reset(token)


def is_late() -> bool:
    """Whether Dynamo is done with the graph that is being compiled."""
    return _LATE.get()


def can_ask(*values: Any) -> bool:
    """Whether conditions on sizes, or on those of tensors, can be checked from now on: Dynamo is not done, and knows what they were."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return not is_late() and not any(free_unbacked_symbols(value) for value in values)


def beyond(m: Any, bound: int = SPLIT) -> bool | None:
    """Whether a symbol m is above ``bound``, which Dynamo checks at each call from now on; None where it cannot, or no longer.

    Asked of the larger of both: torch solves no maximum for its symbols, and so learns no upper bounds of them. By such a bound
    Inductor would hold all that is summed over a symbol at once, with the threads that the traced size needs, in kernels that
    take minutes to compile.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(m > bound):
        return True
    if statically_known_true(m <= bound):
        return False
    larger = torch.sym_max(m, bound)
    asked = {guard.expr for guard in m.node.shape_env.guards}  # torch concludes nothing from those either
    if (larger > bound).node.expr in asked:
        return True
    if (larger <= bound).node.expr in asked:
        return False
    return bool(larger > bound) if can_ask(m) else None


def equal(first: Any, second: Any) -> bool:
    """Whether two sizes are equal, which Dynamo checks at each call from now on if they are of two symbols; False where it cannot."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(first == second) or (can_ask(first, second) and bool(first == second))
