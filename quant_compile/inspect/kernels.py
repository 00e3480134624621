"""Which kernel would run each planned weight on a target, and why the others would not.

Works from a plan, one problem per weight or expert block; in a compiled graph siblings may be merged into one larger problem,
and only there the activation and the experts of a token are known: estimates take silu and two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.markup import escape
from rich.table import Table

from quant_compile.inspect.plan import Plan, PlanEntry, label_of
from quant_compile.ir.errors import NoKernelError
from quant_compile.ir.family import PlaneSpec
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.lowering.moe import MoeDispatch, choose_moe, moe_fits, moe_layouts
from quant_compile.lowering.registry import Problem, layouts
from quant_compile.lowering.select import BUCKETS, Dispatch, Request, choose, fits
from quant_compile.lowering.target import Target

FIX = "map these weights to another scheme in the policy (W8A8 or `keep`), or set allow_reference: true."


@dataclass(frozen=True)
class KernelChoice:
    """What would run the weights that share one problem.

    Attributes:
        entries: the weights.
        problem: scheme, sizes and dtype of a linear or of an expert block.
        dispatch: layout and kernels by M; None when nothing can run it.
        refusals: kernel -> why it does not run, each M range with its reason.
        losers: kernels that could run and are estimated slower, or read another layout.
        bytes_packed: bytes of all these weights in that layout.
    """

    entries: tuple[PlanEntry, ...]
    problem: Problem | MoeProblem
    dispatch: Dispatch | MoeDispatch | None
    refusals: Mapping[str, str]
    losers: tuple[str, ...]
    bytes_packed: int

    @property
    def kind(self) -> str:
        """What the weights are: ``linears`` or ``experts``."""
        return "linears" if isinstance(self.problem, Problem) else "experts"

    @property
    def size(self) -> str:
        """Sizes for people: ``n x k``, or ``experts x hidden x intermediate``."""
        p = self.problem
        return f"{p.n} x {p.k}" if isinstance(p, Problem) else f"{p.experts} x {p.hidden} x {p.intermediate}"


def kernel_choices(plan: Plan, target: Target) -> list[KernelChoice]:
    """One choice for each distinct problem of the plan, in the plan's order."""
    request = Request(allow_reference=plan.policy.allow_reference)
    groups: dict[Problem, list[PlanEntry]] = {}
    for entry in plan.entries:
        if entry.decision.scheme is not None and not entry.block:
            dtype = getattr(torch, entry.dtype)
            groups.setdefault(Problem(entry.decision.scheme, entry.n, entry.k, dtype, entry.has_bias), []).append(entry)
    choices = [_choice(problem, entries, target, request) for problem, entries in groups.items()]
    return choices + [_moe_choice(problem, entries, target, request) for problem, entries in _blocks(plan).items()]


def _blocks(plan: Plan) -> dict[MoeProblem, list[PlanEntry]]:
    """The plan's expert blocks by problem; a block whose weights have two schemes is kept as a whole."""
    by_name: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        if entry.block:
            by_name.setdefault(entry.block, []).append(entry)
    out: dict[MoeProblem, list[PlanEntry]] = {}
    for entries in by_name.values():
        if len(entries) == 2 and entries[0].decision.scheme == entries[1].decision.scheme is not None:
            first, second = entries
            up = first if first.n == 2 * second.k else second
            scheme, dtype = up.decision.scheme, getattr(torch, up.dtype)
            assert scheme is not None
            sizes = (up.shape[0], up.k, up.n // 2, min(2, up.shape[0]))
            out.setdefault(MoeProblem(scheme, *sizes, Activation("silu"), dtype, up.has_bias), []).extend(entries)
    return out


def _moe_choice(problem: MoeProblem, entries: Sequence[PlanEntry], target: Target, request: Request) -> KernelChoice:
    answers = {bucket: moe_fits(problem, target, request, bucket) for bucket in BUCKETS}
    try:
        dispatch = choose_moe(problem, target, request, entries[0].block)
    except NoKernelError:
        dispatch = None
    planes: Sequence[PlaneSpec] = ()
    if dispatch is not None:
        specs = moe_layouts()[dispatch.layout].planes
        sizes = ((2 * problem.intermediate, problem.hidden), (problem.hidden, problem.intermediate))
        planes = [plane for size in sizes for plane in specs(problem, *size)]
    return _made(problem, entries, answers, dispatch, len(entries) // 2, planes)


def _choice(problem: Problem, entries: Sequence[PlanEntry], target: Target, request: Request) -> KernelChoice:
    answers = {bucket: fits(problem, target, request, bucket) for bucket in BUCKETS}
    try:
        dispatch = choose(problem, target, request, entries[0].names[0])
    except NoKernelError:
        dispatch = None
    planes = layouts()[dispatch.layout].planes(problem) if dispatch else ()
    return _made(problem, entries, answers, dispatch, len(entries), planes)


def _made(
    problem: Problem | MoeProblem,
    entries: Sequence[PlanEntry],
    answers: Mapping[int, Mapping[str, float | str]],
    dispatch: Dispatch | MoeDispatch | None,
    count: int,
    planes: Sequence[PlaneSpec],
) -> KernelChoice:
    """The choice for ``count`` problems alike, each of which packs into ``planes``."""
    refusals, able = _refusals(answers)
    chosen = {name for _, name in dispatch.table} if dispatch else set[str]()
    losers = tuple(name for name in able if name not in chosen)
    packed = count * sum(plane.nbytes for plane in planes)
    return KernelChoice(tuple(entries), problem, dispatch, refusals, losers, packed)


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
    table = Table(title=f"kernels on {target.label}: one weight a problem, by estimate", title_justify="left")
    for column in ("weights", "scheme", "size", "layout", "MB packed", "kernels"):
        table.add_column(column, overflow="fold", justify="right" if column == "MB packed" else "left")
    for choice in choices:
        problem, dispatch = choice.problem, choice.dispatch
        cells = [
            "\n".join(label_of(choice.entries)),
            problem.scheme.spec,
            choice.size,
            dispatch.layout if dispatch else "none",
            f"{choice.bytes_packed / 1e6:,.2f}",
            dispatch.ranges.replace(", ", "\n") if dispatch else f"NONE. Fix: {FIX}",
        ]
        table.add_row(*map(escape, cells))
    return table


def refusals_table(choices: Sequence[KernelChoice]) -> Table:
    """What does not run and why: kernels that give one reason for the same problems share a row."""
    shapes: dict[tuple[str, str], set[str]] = {}
    rows: dict[tuple[str, str, str, str], set[str]] = {}
    for choice in choices:
        spec, shape, kind = choice.problem.scheme.spec, choice.size, choice.kind
        shapes.setdefault((spec, kind), set()).add(shape)
        reasons = dict.fromkeys(choice.losers, "can run; estimated slower, or reads another layout")
        for kernel, reason in (reasons | dict(choice.refusals)).items():
            rows.setdefault((spec, kind, kernel, reason), set()).add(shape)
    joined: dict[tuple[str, str, str], list[str]] = {}
    for (spec, kind, kernel, reason), where in rows.items():
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
