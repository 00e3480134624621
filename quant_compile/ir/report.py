"""The ledger as data: what became of every parameter's bytes and why, for people, for JSON and for CI gates."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quant_compile.ir.errors import CoverageError, OptionError
from quant_compile.page.content import Attention, Cell, Side, side_by_side
from quant_compile.page.files import written_whole
from quant_compile.page.render import render
from quant_compile.page.views import SiteView


@dataclass(frozen=True)
class WeightLine:
    """What became of one Parameter.

    Attributes:
        names: every qualified name.
        bytes_before: bytes of the Parameter as the model defines it.
        bytes_after: bytes of its planes, or bytes_before if kept.
        scheme: spec it is quantized to, None if kept.
        layout: layout of its planes.
        kernels: kernels per range of M.
        reason: why it is as it is.
        named: the policy names a scheme for it.
        released: the original values were freed.
        missed: some graph reads it unquantized, against the policy; it does not count as covered.
        guarded: both times of the graphs that read it in 16 bits because these are faster there (``guard: never_slower``); it
            counts as covered, and where other graphs quantize it, ``bytes_after`` are its planes' and its own.
        shape, dtype: of the Parameter.
        views: positions in ``Report.views`` of what graphs do with it.
        shard: of a weight that ranks have in parts, how it is divided; its bytes are those of this rank's part.
        copies: how many ranks have the same part.
        verified: where ``verify: true`` has replayed what graphs do with it, the largest relative error to the unfused reference.
    """

    names: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    scheme: str | None
    layout: str
    kernels: str
    reason: str
    named: bool
    released: bool = False
    missed: bool = False
    guarded: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    views: tuple[int, ...] = ()
    shard: str = ""
    copies: int = 1
    verified: float | None = None

    @property
    def covered(self) -> bool:
        """Quantized, or kept where 16 bits are measured to be faster, in every graph."""
        return bool(self.scheme or self.guarded) and not self.missed

    @property
    def marks(self) -> tuple[str, ...]:
        """What else is true of it, in words: ``named``, ``missed``, ``guarded``, ``released``, ``verified``."""
        found = {"named": self.named, "missed": self.missed, "guarded": self.guarded, "released": self.released}
        found |= {"verified": self.verified is not None}
        return tuple(word for word, holds in found.items() if holds)


@dataclass(frozen=True)
class AttentionLine:
    """What became of the attention of one kind.

    Attributes:
        what: heads, their size, tokens, and whether it is over a static cache; ``not matched`` of what only looks like attention.
        runs: kernel, or ``as written``.
        reason: why that.
        missed: it is not understood.
        count: how many there are in the graph that has most of them.
    """

    what: str
    runs: str
    reason: str
    missed: bool = False
    count: int = 1


@dataclass(frozen=True)
class Report:
    """The ledger of one model.

    Attributes:
        policy: name of the policy.
        target: device it runs on.
        lines: one for each distinct Parameter, in the model's order.
        notes: what the user should know: warnings, refusals, limits.
        misses: linear-like nodes over Parameters that were not quantized: (parameter or node, reason).
        timings: seconds by stage (``passes.*``, ``packing``, ``selection``, ``inductor``).
        attention: one line for each kind of attention in the graphs, and for what looks like some.
        views: what graphs do at each product; layers alike share one.
    """

    policy: str
    target: str
    lines: tuple[WeightLine, ...]
    notes: tuple[str, ...] = ()
    misses: tuple[tuple[str, str], ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    attention: tuple[AttentionLine, ...] = ()
    views: tuple[SiteView, ...] = ()

    @property
    def bytes_total(self) -> int:
        """Bytes of all parameters before quantization; equals the model's own total."""
        return sum(line.bytes_before for line in self.lines)

    @property
    def bytes_after(self) -> int:
        """Bytes that the model computes with: planes of quantized parameters and the kept ones."""
        return sum(line.bytes_after for line in self.lines)

    @property
    def coverage(self) -> float:
        """Quantized bytes, and those that the guard keeps, over the bytes that the policy names; 0 when it names none."""
        named = sum(line.bytes_before for line in self.lines if line.named)
        done = sum(line.bytes_before for line in self.lines if line.named and line.covered)
        return done / named if named else 0.0

    @property
    def share(self) -> float:
        """Quantized bytes over all parameter bytes."""
        done = sum(line.bytes_before for line in self.lines if line.scheme)
        return done / self.bytes_total if self.bytes_total else 0.0

    @property
    def skips(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of every parameter that the policy names and that is not quantized, then the misses."""
        lines = [(line.names[0], line.reason) for line in self.lines if line.named and not line.covered]
        return (*lines, *self.misses)

    @property
    def guarded(self) -> tuple[tuple[str, str], ...]:
        """(name, both times) of every parameter that ``guard: never_slower`` keeps in 16 bits, in some graphs or in all."""
        return tuple((line.names[0], line.guarded) for line in self.lines if line.guarded)

    def all_ranks(self, group: Any = None) -> Report:
        """The ledger of a model that ranks have in parts, summed: the bytes of each weight's parts, each part once.

        A collective: every rank must call it, and every rank gets the same. What ranks say differently of a weight is joined with
        `` / ``; a weight counts as covered where it is on all of them. Times are those of the slowest rank.

        Args:
            group: torch.distributed's process group; None: the default one, and this report itself where there is none.
        """
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            return self
        reports: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, self, group=group)
        return _summed(reports)

    def require(self, coverage: float = 1.0) -> Report:
        """Return the report if enough was quantized.

        Raises:
            CoverageError: ``.coverage`` is below ``coverage``; names the weights and reasons.
        """
        if self.coverage >= coverage:
            return self
        reasons = [f"  {name}: {reason}" for name, reason in self.skips[:20]] or [
            "  the policy names no weight of this model"
        ]
        head = f"coverage is {self.coverage:.4f}, required {coverage:.4f}; not quantized:"
        raise CoverageError(
            "\n".join([head, *reasons, "Fix: run the model once, or change the policy (see the reasons)."])
        )

    def table(self, full: bool = False) -> Table:
        """The ledger as a rich table: lines alike are joined unless ``full``."""
        table = Table(
            title=escape(f"sglquant ledger: {self.policy} on {self.target}"),
            caption=self._caption(),
            title_justify="left",
        )
        for column in ("weights", "scheme", "layout", "kernels", "bytes", "reason"):
            table.add_column(column, overflow="fold", justify="right" if column == "bytes" else "left")
        for group in _grouped(self.lines, full):
            first = group[0]
            before, after = sum(line.bytes_before for line in group), sum(line.bytes_after for line in group)
            size = f"{_size(before)} → {_size(after)}" if first.scheme else _size(before)
            cells = (_label(group), first.scheme or "kept", first.layout, first.kernels, size, first.reason)
            table.add_row(*map(escape, cells))
        for site in self.attention:
            cells = (f"attention: {site.what} ({site.count})", "", "", site.runs, "", site.reason)
            table.add_row(*map(escape, cells))
        for note in self.notes:
            table.add_row("note", "", "", "", "", escape(note))
        return table

    def _caption(self) -> str:
        return (
            f"coverage {self.coverage:.1%} of the bytes the policy names, {self.share:.1%} of all; "
            f"{_size(self.bytes_total)} → {_size(self.bytes_after)}"
        )

    def to_json(self) -> str:
        """The report as JSON; ``from_json`` reads it."""
        data = asdict(self) | {"coverage": self.coverage, "share": self.share, "bytes_total": self.bytes_total}
        return json.dumps(data, indent=1)

    def html(self, path: str | Path, other: Report | None = None) -> Path:
        """Write the report as one HTML file that needs no network: the model as a tree, each product before and after, totals.

        Args:
            path: the file; written whole or not at all.
            other: a second report, side by side with this one, which comes first; what changed is marked.

        Returns:
            The path.

        Raises:
            OptionError: the file cannot be written, and what was there is untouched; ``other`` is no report.
        """
        if other is not None and not isinstance(other, Report):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(
                f"other must be a report, got a {type(other).__name__}. Fix: quant_compile.report(model)."
            )
        path = Path(path).expanduser()
        reports = [self] if other is None else [self, other]
        page = side_by_side([report._side() for report in reports], [report.cells() for report in reports])
        try:
            return written_whole(path, render(page))
        except OSError as error:
            raise OptionError(
                f"{path} cannot be written: {error.strerror}. Fix: name a file in a folder that is there."
            ) from None

    def cells(self) -> list[Cell]:
        """What became of each weight, with what graphs do with it."""
        return [
            Cell(
                line.names,
                line.shape,
                line.dtype,
                line.bytes_before,
                line.bytes_after,
                line.scheme,
                line.layout,
                line.kernels,
                line.reason,
                line.marks,
                tuple(self.views[i] for i in line.views),
                line.verified,
            )
            for line in self.lines
        ]

    def _side(self) -> Side:
        unquantized = [f"{name}: {reason}" for name, reason in self.skips]
        attention = tuple(Attention(site.what, site.runs, site.reason, site.count) for site in self.attention)
        sizes = self.bytes_total, self.bytes_after, self.coverage, self.share
        warnings = (*self.notes, *unquantized)
        return Side(self.policy, self.target, warnings, *sizes, tuple(self.timings.items()), attention)

    @staticmethod
    def from_json(text: str) -> Report:
        """Inverse of ``to_json``."""
        data: dict[str, Any] = json.loads(text)
        tuples = ("names", "shape", "views")
        rows: list[dict[str, Any]] = [
            line | {key: tuple(line.get(key, ())) for key in tuples} for line in data["lines"]
        ]
        lines = tuple(WeightLine(**row) for row in rows)
        misses = tuple((name, reason) for name, reason in data["misses"])
        attention = tuple(AttentionLine(**site) for site in data.get("attention", ()))
        views = tuple(map(SiteView.of, data.get("views", ())))
        return Report(
            data["policy"], data["target"], lines, tuple(data["notes"]), misses, data["timings"], attention, views
        )

    def __str__(self) -> str:
        console = Console(width=150, record=False, file=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _summed(reports: list[Report]) -> Report:
    """One report of those of all ranks."""
    lines: dict[tuple[str, ...], list[WeightLine]] = {}
    attention: dict[AttentionLine, None] = {}
    views: dict[SiteView, int] = {}
    for report in reports:
        for line in report.lines:
            seen = tuple(views.setdefault(report.views[i], len(views)) for i in line.views)
            lines.setdefault(line.names, []).append(replace(line, views=seen))
        attention |= dict.fromkeys(report.attention)
    first = reports[0]
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    misses = dict.fromkeys(miss for report in reports for miss in report.misses)
    timings = {
        key: max(report.timings.get(key, 0.0) for report in reports)
        for key in dict.fromkeys(key for report in reports for key in report.timings)
    }
    whole = tuple(_joined(parts) for parts in lines.values())
    return Report(
        first.policy, first.target, whole, tuple(notes), tuple(misses), timings, tuple(attention), tuple(views)
    )


def _joined(parts: list[WeightLine]) -> WeightLine:
    """What ranks say of one weight as one line."""
    first = parts[0]

    def said(field: str) -> str:
        return " / ".join(dict.fromkeys(text for line in parts if (text := getattr(line, field))))

    copies = first.copies if first.shard else len(parts)
    unlike = len({line.scheme for line in parts}) > 1
    return replace(
        first,
        bytes_before=sum(line.bytes_before for line in parts) // copies,
        bytes_after=sum(line.bytes_after for line in parts) // copies,
        scheme=said("scheme") or None,
        layout=said("layout"),
        kernels=said("kernels"),
        reason=said("reason"),
        guarded=said("guarded"),
        named=any(line.named for line in parts),
        missed=unlike or any(line.missed for line in parts),
        released=all(line.released for line in parts),
        views=tuple(dict.fromkeys(i for line in parts for i in line.views)),
        verified=None if any(line.verified is None for line in parts) else max(line.verified or 0.0 for line in parts),
        copies=1,
    )


def _grouped(lines: tuple[WeightLine, ...], full: bool) -> list[list[WeightLine]]:
    groups: dict[Any, list[WeightLine]] = {}
    for i, line in enumerate(lines):
        key: Any = (
            i if full else (line.scheme, line.layout, line.kernels, line.reason, _pattern(line.names[0]), line.released)
        )
        groups.setdefault(key, []).append(line)
    return list(groups.values())


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _label(group: list[WeightLine]) -> str:
    name = group[0].names[0] if len(group) == 1 else f"{_pattern(group[0].names[0])} ({len(group)})"
    others = group[0].names[1:] if len(group) == 1 else ()
    return name + (f" = {', '.join(others)}" if others else "") + (" [released]" if group[0].released else "")


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 10_000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.4g} GB"
