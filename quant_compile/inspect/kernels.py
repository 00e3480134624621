"""Which kernel would run each planned weight on a target, and why the others would not.

Works from a plan, one problem per weight or expert block; in a compiled graph siblings may be merged into one larger problem,
and only there the activation and the experts of a token are known: estimates take silu and two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from quant_compile.ir.errors import NoKernelError
from quant_compile.ir.family import PlaneSpec
from quant_compile.ir.moe import Activation, MoeProblem, parse_spec
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.moe import STACKED, MoeDispatch, choose_moe, moe_fits, moe_kernels, planes_of
from quant_compile.lowering.registry import Problem, kernels, layouts
from quant_compile.lowering.select import BUCKETS, AnyProblem, Dispatch, Request, choose, fallback_of, fits, name_for
from quant_compile.lowering.target import FAKE_SM_COUNT, RUN_ON, Target
from quant_compile.model.plan import Plan, PlanEntry, label_of


class _Everything(frozenset[str]):
    """The ops of a machine that has every library in every release."""

    def __contains__(self, name: object) -> bool:
        return True


@dataclass(frozen=True)
class Loser:
    """A kernel that could run and was not chosen.

    Attributes:
        layout: where it reads another layout than the chosen one, that layout.
        least, most: its estimated cost over that of the chosen kernel, at the M where it comes off best and worst.
    """

    layout: str | None
    least: float
    most: float

    @property
    def reason(self) -> str:
        """In words."""
        where = f"reads layout {self.layout}; " if self.layout else ""
        same = f"{self.least:.2f}" == f"{self.most:.2f}"
        span = f"{self.most:.2f}" if same else f"{self.least:.2f} to {self.most:.2f}"
        return f"can run; {where}estimated {span} times the chosen kernel's cost"


@dataclass(frozen=True)
class KernelChoice:
    """What would run the weights that share one problem.

    Attributes:
        entries: the weights.
        problem: scheme, sizes and dtype of a linear or of an expert block.
        dispatch: layout and kernels by M; None when nothing can run it.
        refusals: kernel -> why it does not run, each M range with its reason.
        losers: kernels that could run and were not chosen.
        bytes_packed: bytes of all these weights in that layout.
        bytes_stored: in row form, as plans count them.
        fix: what would help where nothing can run it.
        asked: the policy's scheme where its ``fallback`` serves another.
    """

    entries: tuple[PlanEntry, ...]
    problem: Problem | MoeProblem
    dispatch: Dispatch | MoeDispatch | None
    refusals: Mapping[str, str]
    losers: Mapping[str, Loser]
    bytes_packed: int
    bytes_stored: int
    fix: str = ""
    asked: Scheme | None = None

    @property
    def kind(self) -> str:
        """What the weights are: ``linears`` or ``experts``."""
        return "linears" if isinstance(self.problem, Problem) else "experts"

    @property
    def size(self) -> str:
        """Sizes for people: ``n x k``, or ``experts x hidden x intermediate``."""
        p = self.problem
        return f"{p.n} x {p.k}" if isinstance(p, Problem) else f"{p.experts} x {p.hidden} x {p.intermediate}"


def held(choices: Sequence[KernelChoice], target: Target) -> list[str]:
    """Where kernels hold more or less than a plan counts, one sentence a scheme and layout."""
    groups: dict[tuple[str, str], list[KernelChoice]] = {}
    for choice in choices:
        if choice.dispatch is not None and choice.bytes_packed != choice.bytes_stored:
            groups.setdefault((choice.problem.spec, choice.dispatch.layout), []).append(choice)
    texts: list[str] = []
    for (spec, layout), found in groups.items():
        packed, stored = sum(choice.bytes_packed for choice in found), sum(choice.bytes_stored for choice in found)
        count = sum(prod(entry.shape) for choice in found for entry in choice.entries)
        bits = f"{8 * packed / count:.2f} bits a weight and not {8 * stored / count:.2f}"
        size = f"{packed / 1e6:,.2f} MB and not {stored / 1e6:,.2f}"
        texts.append(f"{spec} takes {bits} on {target.label}, {size}: by estimate kernels there read layout {layout}")
    return texts


def kernel_choices(plan: Plan, target: Target) -> list[KernelChoice]:
    """One choice for each distinct problem of the plan, in the plan's order."""
    request = Request(allow_reference=plan.policy.allow_reference)
    groups: dict[Problem, list[PlanEntry]] = {}
    for entry in plan.entries:
        if entry.decision.scheme is not None and not entry.block:
            dtype = getattr(torch, entry.dtype)
            groups.setdefault(Problem(entry.decision.scheme, entry.n, entry.k, dtype, entry.has_bias), []).append(entry)
    fallback = plan.policy.fallback
    choices = [_served(_choice, problem, entries, fallback, target, request) for problem, entries in groups.items()]
    blocks = _blocks(plan).items()
    return choices + [_served(_moe_choice, problem, entries, fallback, target, request) for problem, entries in blocks]


def _served(
    choose_of: Callable[[AnyProblem, Sequence[PlanEntry], Target, Request], KernelChoice],
    problem: AnyProblem,
    entries: Sequence[PlanEntry],
    fallback: str | None,
    target: Target,
    request: Request,
) -> KernelChoice:
    """The problem's choice, or that of what the policy's fallback puts in its place where only that has kernels."""
    choice = choose_of(problem, entries, target, request)
    other = fallback_of(problem.scheme, fallback)
    if choice.dispatch is not None or other is None:
        return choice
    instead = choose_of(replace(problem, scheme=other), entries, target, request)
    return choice if instead.dispatch is None else replace(instead, asked=problem.scheme)


def _blocks(plan: Plan) -> dict[MoeProblem, list[PlanEntry]]:
    """The plan's expert blocks by problem."""
    by_name: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        if entry.block:
            by_name.setdefault(entry.block, []).append(entry)
    out: dict[MoeProblem, list[PlanEntry]] = {}
    for entries in by_name.values():
        if len(entries) != 2:
            continue
        first, second = entries
        up, down = (first, second) if first.n == 2 * second.k else (second, first)
        scheme, scheme2 = up.decision.scheme, down.decision.scheme
        if scheme is not None:
            sizes = (up.shape[0], up.k, up.n // 2, min(2, up.shape[0]))
            dtype, act = getattr(torch, up.dtype), Activation("silu")
            problem = MoeProblem(scheme, *sizes, act, dtype, up.has_bias, scheme2=scheme2)
            out.setdefault(problem, []).extend(entries)
    return out


def _moe_choice(problem: MoeProblem, entries: Sequence[PlanEntry], target: Target, request: Request) -> KernelChoice:
    answers = {bucket: moe_fits(problem, target, request, bucket) for bucket in BUCKETS}
    try:
        dispatch, fix = choose_moe(problem, target, request, entries[0].block), ""
    except NoKernelError as error:
        dispatch, fix = None, error.fix
    sizes = [_nbytes(chain(*planes_of(layout, problem))) for layout in _layouts_of(dispatch, STACKED.name)]
    named = {name: kernel.layout for name, kernel in moe_kernels().items()}
    return _made(problem, entries, answers, dispatch, len(entries) // 2, sizes, named, fix)


def _choice(problem: Problem, entries: Sequence[PlanEntry], target: Target, request: Request) -> KernelChoice:
    answers = {bucket: fits(problem, target, request, bucket) for bucket in BUCKETS}
    try:
        dispatch, fix = choose(problem, target, request, entries[0].names[0]), ""
    except NoKernelError as error:
        dispatch, fix = None, error.fix
    sizes = [_nbytes(layouts()[layout].planes(problem)) for layout in _layouts_of(dispatch, "rows")]
    named = {name: kernel.layout for name, kernel in kernels().items()}
    return _made(problem, entries, answers, dispatch, len(entries), sizes, named, fix)


def _layouts_of(dispatch: Dispatch | MoeDispatch | None, rows: str) -> tuple[str, ...]:
    """The row form, and the layout that kernels read."""
    return (rows,) if dispatch is None else (rows, dispatch.layout)


def _nbytes(planes: Iterable[PlaneSpec]) -> int:
    return sum(plane.nbytes for plane in planes)


def _made(
    problem: Problem | MoeProblem,
    entries: Sequence[PlanEntry],
    answers: Mapping[int, Mapping[str, float | str]],
    dispatch: Dispatch | MoeDispatch | None,
    count: int,
    sizes: Sequence[int],
    layout_of: Mapping[str, str],
    fix: str,
) -> KernelChoice:
    """The choice for ``count`` problems alike, whose bytes are ``sizes``: in row form and, where something runs them, packed."""
    refusals, able = _refusals(answers)
    losers = _losers(answers, able, dispatch, layout_of) if dispatch else {}
    packed = count * sizes[1] if dispatch is not None else 0
    return KernelChoice(tuple(entries), problem, dispatch, refusals, losers, packed, count * sizes[0], fix)


def _losers(
    answers: Mapping[int, Mapping[str, float | str]],
    able: Sequence[str],
    dispatch: Dispatch | MoeDispatch,
    layout_of: Mapping[str, str],
) -> dict[str, Loser]:
    chosen = {name for _, name in dispatch.table}
    losers: dict[str, Loser] = {}
    for name in able:
        if name in chosen:
            continue
        ratios: list[float] = []
        for bucket in BUCKETS:
            own, best = answers[bucket][name], answers[bucket][name_for(dispatch.table, bucket)]
            if not isinstance(own, str) and not isinstance(best, str):
                ratios.append(own / best)
        other = layout_of[name] if layout_of[name] != dispatch.layout else None
        losers[name] = Loser(other, min(ratios), max(ratios))
    return losers


def _refusals(answers: Mapping[int, Mapping[str, float | str]]) -> tuple[dict[str, str], list[str]]:
    """Kernel -> reasons by range of M, and the kernels that can run at some M."""
    refusals: dict[str, str] = {}
    able: list[str] = []
    for name in answers[BUCKETS[0]]:
        by_bucket = {bucket: answers[bucket][name] for bucket in BUCKETS}
        if not all(isinstance(answer, str) for answer in by_bucket.values()):
            able.append(name)
        runs = _refused_ranges(by_bucket)
        if runs:
            refusals[name] = "; ".join(_range_text(*run) for run in runs)
    return refusals, able


def _refused_ranges(by_bucket: Mapping[int, float | str]) -> list[tuple[int, int, str]]:
    """(lowest m, highest m, reason) of each stretch of refusals whose reasons differ in numbers only."""
    runs: list[tuple[int, int, str]] = []
    low = 1
    for bucket, answer in by_bucket.items():
        if isinstance(answer, str):
            adjoins = runs and runs[-1][1] == low - 1
            if adjoins and re.sub(r"\d+", "", runs[-1][2]) == re.sub(r"\d+", "", answer):
                runs[-1] = (runs[-1][0], bucket, runs[-1][2])
            else:
                runs.append((low, bucket, answer))
        low = bucket + 1
    return runs


def _range_text(low: int, high: int, reason: str) -> str:
    if low == 1 and high == BUCKETS[-1]:
        return reason
    return f"m>={low}: {reason}" if high == BUCKETS[-1] else f"m {low}-{high}: {reason}"


def kernels_table(choices: Sequence[KernelChoice], target: Target) -> Table:
    """What runs: one row a problem."""
    note = None
    if target.device == "cuda" and target.arch not in RUN_ON:
        ran = ", ".join(f"sm{arch}" for arch in RUN_ON)
        note = f"Kernels for {target.label} are compiled and emulated in the tests; they have been run on {ran} only."
    title = f"kernels on {target.label}: one weight a problem, by estimate"
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    size = "n x k, or experts x hidden x inner"
    for column in ("weights", "scheme", size, "layout", "MB packed", "kernels"):
        table.add_column(column, overflow="fold", justify="right" if column == "MB packed" else "left")
    for choice in choices:
        problem, dispatch = choice.problem, choice.dispatch
        by = f"\n(fallback of {choice.asked.spec})" if choice.asked else ""
        cells = [
            "\n".join(label_of(choice.entries)),
            problem.spec + by,
            choice.size,
            dispatch.layout if dispatch else "none",
            f"{choice.bytes_packed / 1e6:,.2f}",
            dispatch.ranges.replace(", ", "\n") if dispatch else f"NONE. Fix: {choice.fix}",
        ]
        table.add_row(*map(escape, cells))
    return table


@lru_cache(maxsize=None)
def _strangers(spec: str, experts: bool) -> frozenset[str]:
    """Kernels that no device and no size would bring to this scheme."""
    (scheme, scheme2), targets = parse_spec(spec), [Target("cpu")]
    targets += [Target("cuda", arch, count, f"any sm{arch}", _Everything()) for arch, count in FAKE_SM_COUNT.items()]
    asked: list[Mapping[str, float | str]] = []
    for dtype in (torch.bfloat16, torch.float32):
        problem: Any = Problem(scheme, 4096, 4096, dtype)
        block: Any = MoeProblem(scheme, 8, 4096, 4096, 2, Activation("silu"), dtype, scheme2=scheme2)
        asked += [
            moe_fits(block, target, Request(), 1) if experts else fits(problem, target, Request(), 1)
            for target in targets
        ]
    return frozenset(name for name in asked[0] if all(isinstance(answers[name], str) for answers in asked))


def refusals_table(choices: Sequence[KernelChoice]) -> Table:
    """What does not run and why: kernels that give one reason for the same problems share a row; those of other schemes too."""
    shapes: dict[tuple[str, str], set[str]] = {}
    for choice in choices:
        shapes.setdefault((choice.problem.spec, choice.kind), set()).add(choice.size)
    joined: dict[tuple[str, str, str], list[str]] = {}
    for (spec, kind, kernel, reason), where in _reasons(choices).items():
        both = {other for known, other in shapes if known == spec}
        every = "all" if len(both) == 1 else f"all {kind}"
        text = every if where == shapes[spec, kind] else "\n".join(sorted(where))
        joined.setdefault((spec, text, reason), []).append(kernel)
    table = Table(title="kernels not chosen", title_justify="left")
    for column in ("scheme", "size", "kernels", "reason"):
        table.add_column(column, overflow="fold")
    for (spec, where, reason), names in joined.items():
        table.add_row(spec, where, ", ".join(names), escape(reason))
    return table


OTHERS = "multiply weights and inputs of other schemes"


def _reasons(choices: Sequence[KernelChoice]) -> dict[tuple[str, str, str, str], set[str]]:
    """(scheme, kind, kernel, reason) -> sizes; kernels of other schemes last."""
    losers: dict[tuple[str, str, str, str | None], list[tuple[Loser, str]]] = {}
    rows: dict[tuple[str, str, str, str], set[str]] = {}
    others: dict[tuple[str, str, str, str], set[str]] = {}
    for choice in choices:
        spec, kind = choice.problem.spec, choice.kind
        for kernel, loser in choice.losers.items():
            losers.setdefault((spec, kind, kernel, loser.layout), []).append((loser, choice.size))
        strangers = _strangers(spec, kind == "experts")
        for kernel, reason in choice.refusals.items():
            strange = kernel in strangers and kernel not in choice.losers
            kept, text = (others, OTHERS) if strange else (rows, reason)
            kept.setdefault((spec, kind, kernel, text), set()).add(choice.size)
    out: dict[tuple[str, str, str, str], set[str]] = {}
    for (spec, kind, kernel, layout), found in losers.items():
        whole = Loser(layout, min(loser.least for loser, _ in found), max(loser.most for loser, _ in found))
        out[spec, kind, kernel, whole.reason] = {size for _, size in found}
    return out | rows | others
