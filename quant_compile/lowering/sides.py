"""Questions about sizes that are symbols, above all which side of SPLIT a number of rows is on.

Graphs for any number of rows are compiled once for each side. Dynamo checks what was asked at each call from the first question on, and
compiles the other side when a call first has it. Inductor is not to make more of an answer than that (``loops_over_symbols``).
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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
    """Whether a symbol m is above ``bound``, which Dynamo checks at each call from now on; None where it cannot, or no longer."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(m > bound):
        return True
    if statically_known_true(m <= bound):
        return False
    return bool(m > bound) if can_ask(m) else None


def equal(first: Any, second: Any) -> bool:
    """Whether two sizes are equal, which Dynamo checks at each call from now on if they are of two symbols; False where it cannot."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(first == second) or (can_ask(first, second) and bool(first == second))


@contextmanager
def loops_over_symbols() -> Generator[None]:
    """Inside, Inductor makes loops of sums over sizes that are symbols, as it does where it knows no upper bound of them.

    From a side that was asked torch concludes one. Inductor would then hold all of such a sum at once, up to the bound, with rows and
    threads for the traced size: 256 numbers a thread of a softmax, in kernels that take up to a minute each to compile.
    """
    from torch._inductor.virtualized import V

    own: Any = V.choices

    def holds_at_once(features: Any, *arguments: Any, **named: Any) -> bool:
        symbols = getattr(features.reduction_numel, "free_symbols", ())
        return not symbols and own.should_use_persistent_reduction(features, *arguments, **named)

    choices = copy.copy(own)
    choices.should_use_persistent_reduction = holds_at_once
    with V.set_choices_handler(choices):
        yield
