"""Choose, for a problem on a target, one layout and for every M a kernel that reads it.

A weight is packed once, so prefill and decode share its layout: the layout is chosen for both, then each range of M takes
the best kernel of that layout. Costs are the kernels' own estimates, or measurements of this GPU (``lowering/tune.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch

from quant_compile.ir.errors import NoKernelError, SchemeError
from quant_compile.ir.family import Reject
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.registry import Kernel, Problem, Rank, kernels, layouts
from quant_compile.lowering.target import Target

# Upper ends of the ranges of M that get a kernel of their own, and what each is worth when layouts are compared: decode
# runs thousands of steps for one prefill, so small M count for more.
WEIGHTS = {
    1: 4.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 2.0, 32: 1.0, 64: 1.0, 128: 0.5, 256: 0.5, 512: 1.0, 1024: 0.5, 2048: 1.0, 4096: 1.0,
}  # fmt: skip
BUCKETS = tuple(WEIGHTS)
NOT_FITTING = 1e12
FALLBACKS = ("weight_only", "fp8")

CostOf = Callable[[Kernel, Problem, int], float]
Table = tuple[tuple[int, str], ...]
"""(largest m, kernel name), ascending; the last is unbounded."""


def name_for(table: Table, m: int) -> str:
    """Name of the kernel that serves m rows."""
    return next((name for bound, name in table if m <= bound), table[-1][1])


def ranges_text(table: Table, letter: str) -> str:
    """A table for people: ``m<=16: a, m>16: b``."""
    if len(table) == 1:
        return table[0][1]
    parts = [f"{letter}<={bound}: {name}" for bound, name in table[:-1]]
    return ", ".join([*parts, f"{letter}>{table[-2][0]}: {table[-1][1]}"])


def table_text(table: Table) -> str:
    """A table as one word."""
    return ";".join(f"{m}={name}" for m, name in table)


def parse_table(text: str) -> Table:
    """Inverse of ``table_text``."""
    return tuple((int(m), name) for m, name in (entry.split("=") for entry in text.split(";")))


@dataclass(frozen=True)
class Dispatch:
    """The kernels of one problem: all read ``layout``; ``table`` is (largest m, kernel name), ascending, last is unbounded."""

    problem: Problem
    layout: str
    table: Table
    column_scales: bool = False

    @property
    def text(self) -> str:
        """Everything about the dispatch as one word: it is an argument of the kernel op and part of Inductor's cache key."""
        p = self.problem
        dtype = dtype_name(p.dtype)
        rows = str(p.n) if p.siblings == 1 else f"{p.n}/{p.siblings}"
        head = f"{p.scheme.spec}|{rows}|{p.k}|{dtype}|{int(p.has_bias)}|{self.layout}|{int(self.column_scales)}"
        return f"{head}|{table_text(self.table)}"

    @property
    def ranges(self) -> str:
        """The table for people: ``m<=16: triton_gemv, m>16: sgl_fp8``."""
        return ranges_text(self.table, "m")

    def kernel_for(self, m: int) -> Kernel:
        """The kernel that serves m rows."""
        return kernels()[name_for(self.table, m)]


@lru_cache(maxsize=None)
def parse_dispatch(text: str) -> Dispatch:
    """Inverse of ``Dispatch.text``."""
    spec, rows, k, dtype, bias, layout, column, table = text.split("|")
    n, _, siblings = rows.partition("/")
    problem = Problem(parse(spec), int(n), int(k), getattr(torch, dtype), bias == "1", int(siblings or 1))
    return Dispatch(problem, layout, parse_table(table), column == "1")


@dataclass(frozen=True)
class Request:
    """What the user wants of kernels.

    Attributes:
        kernels: ``auto``, ``reference``, or (scheme spec or ``*``, kernel name) pins, each for what its kernel serves: linears
            or expert blocks.
        allow_reference: the reference kernel may serve on a GPU.
        tune: ``off`` (estimates), ``quick`` or ``full`` (measure on the GPU).
    """

    kernels: str | tuple[tuple[str, str], ...] = "auto"
    allow_reference: bool = False
    tune: str = "off"

    @property
    def unpinned(self) -> Request:
        """The same with every kernel: what a device can do at all."""
        return self if isinstance(self.kernels, str) else replace(self, kernels="auto")

    def pin_for(self, spec: str, named: Collection[str], reference: str = "reference") -> str | None:
        """Which of the kernels ``named`` this scheme is pinned to; ``reference`` is their reference kernel."""
        if isinstance(self.kernels, str):
            return reference if self.kernels == "reference" else None
        own = {key: name for key, name in self.kernels if name in named}
        return own.get(spec, own.get("*"))


def fits(problem: Problem, target: Target, request: Request, bucket: int, provider: str = "") -> dict[str, float | str]:
    """Kernel name -> its estimated cost at m = bucket, or its reason why not; of names that begin with ``provider``."""
    pin = request.pin_for(problem.scheme.spec, kernels())
    named = {name: kernel for name, kernel in kernels().items() if name.startswith(provider)}
    return answers_of(named, pin, problem, target, request, bucket)


class _Fitting(Protocol):
    """What selection asks of a kernel, of linears or of expert blocks."""

    @property
    def layout(self) -> str: ...
    @property
    def reference(self) -> bool: ...
    @property
    def only_pinned(self) -> str | None: ...
    @property
    def fit(self) -> Callable[[Any, int, Target], Rank | Reject]: ...


def answers_of(
    named: Mapping[str, _Fitting], pin: str | None, problem: Any, target: Target, request: Request, bucket: int
) -> dict[str, float | str]:
    """Every kernel's estimated cost, or its reason why not; ``pin`` refuses all others."""
    out: dict[str, float | str] = {}
    pinned = f"the options pin {problem.spec} to {pin}"
    for name, kernel in named.items():
        if pin is not None and name != pin:
            out[name] = pinned
        elif kernel.reference and pin is None and target.device != "cpu" and not request.allow_reference:
            out[name] = "the torch reference on a GPU needs allow_reference: true"
        elif kernel.only_pinned is not None and pin is None:
            out[name] = kernel.only_pinned
        else:
            answer = kernel.fit(problem, bucket, target)
            out[name] = answer.reason if isinstance(answer, Reject) else answer.cost
    return out


def choose(
    problem: Problem,
    target: Target,
    request: Request | None = None,
    site: str = "",
    cost: CostOf | None = None,
    only: str | None = None,
) -> Dispatch:
    """The dispatch for a problem.

    Args:
        problem: what to run.
        target: where.
        request: pins and permissions.
        site: the weight's name, for the error.
        cost: measured costs instead of estimates; ``lowering.tune.measured`` gives them.
        only: consider this layout alone.

    Raises:
        NoKernelError: some range of M has no kernel in any layout; each kernel's reason is given.
    """
    request = request or Request()
    answers = {bucket: fits(problem, target, request, bucket) for bucket in BUCKETS}
    best = best_layout(
        answers,
        kernels(),
        layouts() if only is None else (only,),
        None if cost is None else lambda name, m: cost(kernels()[name], problem, m),
    )
    if best is None:
        raise _no_kernel(problem, target, request, answers, site)
    layout, table = best
    return Dispatch(problem, layout, table, any(kernels()[name].column_scales for _, name in table))


def best_layout(
    answers: Mapping[int, Mapping[str, float | str]],
    named: Mapping[str, _Fitting],
    candidates: Iterable[str],
    cost: Callable[[str, int], float] | None,
) -> tuple[str, Table] | None:
    """The layout whose best kernels cost least over all buckets, and its table; None where no layout serves them all.

    Args:
        answers: bucket -> what each kernel said of it.
        cost: measured cost of a kernel at a bucket instead of its estimate; asked only of layouts that serve every bucket.
    """
    best: tuple[float, str, dict[int, str]] | None = None
    estimates = {bucket: _by_layout(answers[bucket], named) for bucket in WEIGHTS}
    for layout in candidates:
        if not all(layout in by_layout for by_layout in estimates.values()):
            continue  # some m would have no kernel; nothing of this layout needs measuring
        table: dict[int, str] = {}
        score = 0.0
        for bucket, weight in WEIGHTS.items():
            costs = estimates[bucket][layout]
            if cost is not None:
                costs = {name: cost(name, bucket) for name in costs}
            table[bucket] = min(costs, key=lambda name, costs=costs: (costs[name], name))
            score += weight * math.log(max(costs[table[bucket]], 1e-3))
        if best is None or score < best[0]:
            best = (score, layout, table)
    return None if best is None else (best[1], _ranges(best[2]))


def _by_layout(answers: Mapping[str, float | str], named: Mapping[str, _Fitting]) -> dict[str, dict[str, float]]:
    """Layout -> estimated costs of its kernels that fit; without layouts that have none."""
    out: dict[str, dict[str, float]] = {}
    for name, cost in answers.items():
        if not isinstance(cost, str):
            out.setdefault(named[name].layout, {})[name] = cost
    return out


def _ranges(table: Mapping[int, str]) -> Table:
    """Adjacent buckets of one kernel merged."""
    out: list[tuple[int, str]] = []
    for bound, name in table.items():
        if out and out[-1][1] == name:
            out.pop()
        out.append((bound, name))
    return tuple(out)


def _no_kernel(
    problem: Problem, target: Target, request: Request, answers: Mapping[int, Mapping[str, float | str]], site: str
) -> NoKernelError:
    words = (
        f"{site or 'a linear'} ({problem.scheme.spec}, n={problem.n} k={problem.k}, {problem.dtype}, {target.label})"
    )
    fix = "map this weight to another scheme in the policy (W8A8 or `keep`), or set allow_reference: true."
    return NoKernelError(words, reasons_of(answers, kernels()), fallback_fix(problem, target, request, choose) + fix)


AnyProblem = TypeVar("AnyProblem", Problem, MoeProblem)


def fallback_fix(
    problem: AnyProblem, target: Target, request: Request, chooser: Callable[[AnyProblem, Target, Request], object]
) -> str:
    """The beginning of a fix: the fallbacks that have a kernel here; nothing where none has."""
    ways: list[str] = []
    for fallback in FALLBACKS:
        other = fallback_of(problem.scheme, fallback)
        if other is None:
            continue
        try:
            chooser(replace(problem, scheme=other), target, request)
        except (NoKernelError, SchemeError):
            continue
        ways.append(f"`fallback: {fallback}` in the policy, which serves it as {other.spec} here; or ")
    return f"set {''.join(ways)}" if ways else ""


def fallback_of(scheme: Scheme, fallback: str | None) -> Scheme | None:
    """What a policy's ``fallback`` puts in the place of a scheme that no kernel serves; None: nothing."""
    if fallback == "weight_only" and scheme.input_activations is not None:
        return Scheme(scheme.weights)
    floats = scheme.weights.type == "float" and scheme.weights.num_bits == 4
    return parse("FP8_DYNAMIC") if fallback == "fp8" and floats else None


def reasons_of(answers: Mapping[int, Mapping[str, float | str]], named: Mapping[str, _Fitting]) -> dict[str, str]:
    """Each kernel's first reason, for an error."""
    reasons: dict[str, str] = {}
    for bucket, by_kernel in answers.items():
        for name, answer in by_kernel.items():
            if isinstance(answer, str):
                reasons.setdefault(name, answer)
            elif bucket == BUCKETS[0]:
                reasons.setdefault(name, f"its layout {named[name].layout} has no kernel for every m")
    return reasons


def bucket_of(m: int) -> int:
    """The bucket whose kernel serves m."""
    return next((bound for bound in BUCKETS if m <= bound), BUCKETS[-1])
