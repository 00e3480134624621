"""What the page of one report, or of two side by side, shows: what became of each weight, in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant_compile.page.views import SiteView


@dataclass(frozen=True)
class Attention:
    """Attention of one kind: what it is, what runs it, why, and how often it is there."""

    what: str
    runs: str
    reason: str
    count: int


@dataclass(frozen=True)
class Side:
    """What is said of one report as a whole.

    Attributes:
        policy, target: names.
        warnings: what the user should know.
        bytes_before, bytes_after: of all parameters.
        coverage: quantized bytes over those that the policy names, 0 to 1.
        share: quantized bytes over all.
        timings: seconds by stage.
        attention: its kinds.
    """

    policy: str
    target: str
    warnings: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    coverage: float
    share: float
    timings: tuple[tuple[str, float], ...]
    attention: tuple[Attention, ...]


@dataclass(frozen=True)
class Cell:
    """What became of one weight in one report.

    Attributes:
        names: all its names.
        shape, dtype: of the Parameter.
        bytes_before, bytes_after: of the Parameter, and of what the model computes with.
        scheme: None: kept.
        layout, kernels, reason: as in the ledger.
        marks: ``missed``, ``guarded``, ``released``, ``verified``, ``named``.
        views: what graphs do with it.
        verified: the largest relative error to the unfused reference, where ``verify: true`` has replayed that.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes_before: int
    bytes_after: int
    scheme: str | None
    layout: str
    kernels: str
    reason: str
    marks: tuple[str, ...] = ()
    views: tuple[SiteView, ...] = ()
    verified: float | None = None

    @property
    def size(self) -> str:
        """Shape and dtype, where they are known."""
        return f"{list(self.shape)} {self.dtype}".strip() if self.shape or self.dtype else ""

    @property
    def fusion(self) -> tuple[str, ...]:
        """What was joined around it, in any graph, with the weights that share its kernel."""
        return tuple(sorted({text for view in self.views for text in view.joined}))


@dataclass(frozen=True)
class Row:
    """One weight in each report, None where it has none of that name; ``changed``: what differs, in words."""

    name: str
    cells: tuple[Cell | None, ...]
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """One report, or two side by side."""

    sides: tuple[Side, ...]
    rows: tuple[Row, ...]


def changes(before: Cell | None, after: Cell | None) -> tuple[str, ...]:
    """What differs of a weight: ``added``, ``removed``, or of ``scheme``, ``kernel``, ``layout``, ``fusion``, ``coverage``, ``shape``."""
    if before is None or after is None:
        return ("added",) if before is None else ("removed",)
    pairs = {
        "scheme": (before.scheme, after.scheme),
        "kernel": (before.kernels, after.kernels),
        "layout": (before.layout, after.layout),
        "fusion": (before.fusion, after.fusion),
        "coverage": ("missed" in before.marks, "missed" in after.marks),
        "shape": (before.size, after.size) if before.size and after.size else ("", ""),
    }
    return tuple(what for what, (old, new) in pairs.items() if old != new)


def side_by_side(sides: Sequence[Side], cells: Sequence[Sequence[Cell]]) -> Page:
    """The page of one report, or of two whose weights are matched by their first names.

    Args:
        sides: one or two.
        cells: of each side, in the model's order.
    """
    if len(cells) == 1:
        return Page(tuple(sides), tuple(Row(cell.names[0], (cell,)) for cell in cells[0]))
    first, second = ({cell.names[0]: cell for cell in side} for side in cells)
    rows = [
        Row(name, (first.get(name), second.get(name)), changes(first.get(name), second.get(name)))
        for name in dict.fromkeys((*first, *second))
    ]
    return Page(tuple(sides), tuple(rows))
