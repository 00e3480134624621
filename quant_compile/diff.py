"""What differs between two policies of a model, two models, two reports saved as JSON, or two locks: weight by weight, and why.

Policies are planned on the model's configuration, without weights; reports and locks are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from quant_compile.explain import explain
from quant_compile.inspect.models import ModelSpec, build_model, example_inputs
from quant_compile.ir.errors import OptionError
from quant_compile.ir.lock import Lock, LockedSite, shown
from quant_compile.ir.report import Report
from quant_compile.ir.scheme import parse
from quant_compile.lowering.rounding import recipe
from quant_compile.lowering.target import Target
from quant_compile.page.content import Cell
from quant_compile.policy import Policy

KINDS = ("lock", "report", "policy")
OF_WEIGHTS = ("version", "name", "description", "default", "rules")  # what of a policy its weights show


@dataclass(frozen=True)
class Fact:
    """What a weight got.

    Attributes:
        scheme: None: kept.
        kernels: by m.
        layout: of its planes.
        joined: what was fused or merged around it.
        reason: why, where the source tells.
        shape: of the Parameter; None where the source does not tell.
        dtype: the same; of a lock, empty.
        missed: whether some graph reads it unquantized, against the policy; of a lock, which does not tell, None.
        rounding: of a policy, how codes are chosen where its scheme has a choice.
    """

    scheme: str | None
    kernels: str
    layout: str
    joined: tuple[str, ...]
    reason: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    missed: bool | None = None
    rounding: str = ""


@dataclass(frozen=True)
class Source:
    """One of the two that are compared.

    Attributes:
        label: what errors and tables call it.
        kind: one of KINDS.
        facts: name of a weight -> what it got; of a lock, only weights that graphs multiply by.
        report: where there is one.
        lock: where it is one.
        policy: where it is one.
    """

    label: str
    kind: str
    facts: Mapping[str, Fact]
    report: Report | None = None
    lock: Lock | None = None
    policy: Policy | None = None


@dataclass(frozen=True)
class Difference:
    """A weight that differs: in what, its values before and after, and why."""

    name: str
    what: tuple[str, ...]
    before: Fact | None
    after: Fact | None
    why: str


@dataclass(frozen=True)
class Diff:
    """All weights that differ.

    Attributes:
        before, after: the two labels.
        differences: in the order of the first.
        around: what differs around them: policy, device, versions of libraries.
        total: weights in either.
    """

    before: str
    after: str
    differences: tuple[Difference, ...]
    around: tuple[str, ...]
    total: int

    @property
    def same(self) -> bool:
        """No weight differs."""
        return not self.differences

    def table(self, full: bool = False) -> Table:
        """As a table: weights that differ alike share a row unless ``full``."""
        count = len(self.differences)
        title = f"{count} of {self.total} weights differ: {self.before} → {self.after}"
        table = Table(
            title=escape(title), title_justify="left", caption=escape("; ".join(self.around)), caption_justify="left"
        )
        for column in ("weights", "what", "before", "after", "why"):
            table.add_column(column, overflow="fold")
        groups: dict[Any, list[Difference]] = {}
        for one in self.differences:
            key = one.name if full else (one.what, _values(one.before, one.what), _values(one.after, one.what), one.why)
            groups.setdefault(key, []).append(one)
        for group in groups.values():
            first = group[0]
            values = [_values(fact, first.what) for fact in (first.before, first.after)]
            cells = (shown((one.name for one in group), 4), ", ".join(first.what), *values, first.why)
            table.add_row(*map(escape, cells))
        return table

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self) | {"same": self.same}, indent=1, ensure_ascii=False)


def read(source: str, model: ModelSpec | None, target: Target, tokens: int = 16) -> Source:
    """A lock, a report as JSON, or a policy of a model.

    Args:
        source: a file, or a policy's name.
        model: that a policy is planned for; None: policies are refused.
        target: that kernels are chosen for.
        tokens: of the traced input.

    Raises:
        LockError, PolicyError, OptionError, ModelError: it is none of them, with the line where there is one.
    """
    path = Path(source)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.startswith("lock:"):
        lock = Lock.parse(text, source)
        return Source(source, "lock", {name: _of_lock(site) for name, site in lock.sites.items()}, lock=lock)
    if text.lstrip().startswith("{"):
        return of_report(_report(text, source), source)
    if path.suffix in (".lock", ".json") and not path.is_file():
        raise OptionError(f"{source}: there is no such file.")
    policy = Policy.load(source)
    if model is None:
        raise OptionError(f"{source} is a policy, and what it does depends on the model. Fix: --model DIR_OR_ID.")
    built = build_model(model)
    explained = explain(built, example_inputs(built, tokens), policy, target)
    found = of_report(explained.report, f"{policy.name} of {model.source}", "policy")
    rounding = policy.rounding if policy.method is None else f"{policy.method}, {policy.rounding}"
    facts = {
        name: replace(fact, rounding=rounding) if fact.scheme and recipe.has_choices(parse(fact.scheme)) else fact
        for name, fact in found.facts.items()
    }
    return replace(found, facts=facts, policy=policy)


def of_report(report: Report, label: str, kind: str = "report") -> Source:
    """A report, as one of the two that are compared."""
    return Source(label, kind, {cell.names[0]: _of_cell(cell) for cell in report.cells()}, report)


def _report(text: str, label: str) -> Report:
    try:
        return Report.from_json(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"{label}:{error.lineno}: not readable as JSON: {error.msg}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OptionError(
            f"{label} is JSON, and no report: {error!r}.\nFix: write quant_compile.report(model).to_json() into it."
        ) from None


def compare(before: Source, after: Source) -> Diff:
    """Weights whose scheme, kernels, layout, fusion, rounding, shape or coverage differ, and those that only one has.

    Of a lock and something else, only weights that are in the lock are compared: it has no others.
    """
    names = dict.fromkeys((*before.facts, *after.facts))
    for side in (before, after):
        if side.kind == "lock" and before.kind != after.kind:
            names = dict.fromkeys(side.facts)
    found = (_difference(name, before.facts.get(name), after.facts.get(name)) for name in names)
    return Diff(before.label, after.label, tuple(one for one in found if one.what), _around(before, after), len(names))


def _difference(name: str, old: Fact | None, new: Fact | None) -> Difference:
    if old is None or new is None:
        return Difference(
            name, ("added",) if old is None else ("removed",), old, new, "only one of them has a weight of this name"
        )
    pairs: dict[str, tuple[Any, Any]] = {
        "scheme": (old.scheme, new.scheme),
        "kernel": (old.kernels, new.kernels),
        "layout": (old.layout, new.layout),
        "fusion": (old.joined, new.joined),
    }
    if old.shape is not None and new.shape is not None:
        dtypes = (old.dtype, new.dtype) if old.dtype and new.dtype else ("", "")
        pairs["shape"] = (old.shape, dtypes[0]), (new.shape, dtypes[1])
    if old.rounding and new.rounding:
        pairs["rounding"] = old.rounding, new.rounding
    if old.missed is not None and new.missed is not None:
        pairs["coverage"] = old.missed, new.missed
    what = tuple(word for word, (a, b) in pairs.items() if a != b)
    return Difference(name, what, old, new, _why(old, new, what))


def _why(old: Fact, new: Fact, what: Sequence[str]) -> str:
    if old.reason != new.reason and (old.reason and new.reason):
        return f"{old.reason} → {new.reason}"
    if "scheme" in what:
        return new.reason or old.reason
    if "shape" in what:
        return "the models have it in other sizes or another dtype"
    if "rounding" in what:
        return "the policies choose its codes in another way"
    if "coverage" in what:
        return "some graph of one of them reads it unquantized"
    return "its scheme is the same; another kernel is chosen" if "kernel" in what else ""


def _around(before: Source, after: Source) -> tuple[str, ...]:
    if before.lock is not None and after.lock is not None:
        old, new = before.lock, after.lock
        policy = () if old.policy_hash == new.policy_hash else (f"policy {old.policy} → {new.policy}",)
        return (*policy, *old.environment(new))
    if before.report is not None and after.report is not None:
        pairs: list[tuple[str, Any, Any]] = [
            ("policy", before.report.policy, after.report.policy),
            ("device", before.report.target, after.report.target),
        ]
        if before.policy is not None and after.policy is not None:
            old, new = before.policy.to_dict(), after.policy.to_dict()
            keys = [key for key in dict.fromkeys((*old, *new)) if key not in OF_WEIGHTS]
            pairs += [(key, _plain(old.get(key), key), _plain(new.get(key), key)) for key in keys]
        return tuple(f"{what} {a} → {b}" for what, a, b in pairs if a != b)
    return ()


def _plain(value: Any, key: str) -> str:
    if value is None and key == "rounding":
        return recipe.DEFAULT
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _of_lock(site: LockedSite) -> Fact:
    return Fact(site.scheme, " / ".join(site.kernels), site.layout, site.joined, shape=site.shape or None)


def _of_cell(cell: Cell) -> Fact:
    kernels = " / ".join(sorted(cell.kernels.split(" / ")))
    missed = "missed" in cell.marks
    shape = cell.shape if cell.size else None
    return Fact(cell.scheme, kernels, cell.layout, cell.fusion, cell.reason, shape, cell.dtype, missed)


def _values(fact: Fact | None, what: Sequence[str]) -> str:
    """The values of a weight that differ."""
    if fact is None:
        return "none"
    texts = {
        "scheme": fact.scheme or "kept",
        "kernel": fact.kernels or "none",
        "layout": fact.layout or "none",
        "fusion": "; ".join(fact.joined) or "none",
        "shape": f"{list(fact.shape or ())} {fact.dtype}".strip(),
        "rounding": fact.rounding,
        "coverage": "missed" if fact.missed else "whole",
    }
    return "\n".join(texts.get(word, fact.scheme or "kept") for word in what)
