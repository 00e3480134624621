"""The choice of one option for each group under limits, by an integer program: one binary a group and option.

    minimize  sum error[g, o] x[g, o]    where  sum_o x[g, o] = 1,  sum bytes[g, o] x[g, o] <= limit, ...

Errors of groups are added. To second order the divergence of several small, unrelated errors is their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant_compile.ir.errors import MeasureError, MissingLibraryError
from quant_compile.ir.scheme import Scheme

ERROR, BYTES, MS = "error", "bytes", "ms"
_SECONDS = 60.0


@dataclass(frozen=True)
class Option:
    """What a group would cost under a scheme (None: as it is).

    Attributes:
        error: nats.
        bytes: of its weights.
        ms: at the user's m; 0 where none was given.
    """

    scheme: Scheme | None
    error: float
    bytes: int
    ms: float = 0.0

    def of(self, what: str) -> float:
        """``error``, ``bytes`` or ``ms``."""
        return float(getattr(self, what))


def total(options: Sequence[Option], what: str) -> float:
    """Sum over groups."""
    return sum(option.of(what) for option in options)


def least(options: Sequence[Sequence[Option]], what: str) -> float:
    """The smallest total that there is."""
    return sum(min(option.of(what) for option in group) for group in options)


def most(options: Sequence[Sequence[Option]], what: str) -> float:
    """The largest total that there is."""
    return sum(max(option.of(what) for option in group) for group in options)


def choose(options: Sequence[Sequence[Option]], limits: Mapping[str, float], goal: str = ERROR) -> list[Option]:
    """The best option of each group.

    Args:
        options: of each group.
        limits: on ``error``, ``bytes`` and ``ms`` in all.
        goal: what is to be least.

    Raises:
        MeasureError: nothing meets the limits.
        MissingLibraryError: SciPy is not installed.
    """
    np, optimize = _scipy()
    able = [[option for option in group if math.isfinite(option.error)] for group in options]
    for what, limit in limits.items():
        if least(able, what) > limit * (1 + 1e-9):
            raise MeasureError(_too_tight(what, limit, least(able, what)))
    flat = [option for group in able for option in group]
    rows = np.repeat(np.arange(len(able)), [len(group) for group in able])
    one_each = np.zeros((len(able), len(flat)))
    one_each[rows, np.arange(len(flat))] = 1.0
    constraints: list[Any] = [optimize.LinearConstraint(one_each, 1.0, 1.0)]
    for what, limit in limits.items():
        scale = max(limit, 1e-30)
        constraints.append(optimize.LinearConstraint([option.of(what) / scale for option in flat], ub=limit / scale))
    # Of options that are as good, the smaller one.
    cost = _scaled(np, [option.of(goal) for option in flat]) + 1e-6 * _scaled(np, [option.of(BYTES) for option in flat])
    found = optimize.milp(
        cost,
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": _SECONDS},
    )
    if found.x is None:
        raise MeasureError(
            f"no choice of schemes meets {_words(limits)} together. Fix: a larger budget, or more schemes to choose from."
        )
    taken = found.x.reshape(-1)
    return [flat[max(own, key=lambda at: taken[at])] for own in _ranges(able)]


def _ranges(groups: Sequence[Sequence[Option]]) -> list[range]:
    out: list[range] = []
    start = 0
    for group in groups:
        out.append(range(start, start + len(group)))
        start += len(group)
    return out


def _scaled(np: Any, values: Sequence[float]) -> Any:
    """Around 1, as solvers want them."""
    array = np.asarray(values, dtype=float)
    largest = np.abs(array).max(initial=0.0)
    return array / largest * len(values) if largest else array


def _too_tight(what: str, limit: float, smallest: float) -> str:
    show: Callable[[float], str] = (lambda value: f"{value:,.0f}") if what == BYTES else (lambda value: f"{value:.4g}")
    unit = {ERROR: "nats", BYTES: "bytes", MS: "ms"}[what]
    return (
        f"the budget of {show(limit)} {unit} cannot be met: the schemes given need at least {show(smallest)} {unit}.\n"
        f"Fix: a budget of {show(smallest)} or more, or schemes that need less."
    )


def _words(limits: Mapping[str, float]) -> str:
    return " and ".join(f"{what} <= {limit:.6g}" for what, limit in limits.items())


def _scipy() -> tuple[Any, Any]:
    try:
        import numpy as np
        from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingLibraryError('search needs SciPy. Fix: pip install "quant-compile[search]".') from None
    return np, optimize
