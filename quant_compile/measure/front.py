"""The Pareto front of a search as a table, a picture and a page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from quant_compile.measure.figures import drawable, figure_class

# Endings of pictures that are written here.
ALONE = (".html", ".svg")
# Of the drawing, in its own units.
_WIDTH, _HEIGHT, _LEFT, _BELOW, _ABOVE = 720, 440, 80, 56, 24


@dataclass(frozen=True)
class Point:
    """One choice for the whole model.

    Attributes:
        label: ``search``, or the scheme that all weights have.
        bits: of a decided weight, on average.
        bytes: of the whole model.
        predicted: sum of the groups' divergences, nats.
        measured: divergence of the model so quantized, nats; None where it was not measured.
        ms: at the profile; None without one.
        chosen: it is what the policy says.
    """

    label: str
    bits: float
    bytes: int
    predicted: float
    measured: float | None = None
    ms: float | None = None
    chosen: bool = False

    @property
    def error(self) -> float:
        """Measured where that is known."""
        return self.predicted if self.measured is None else self.measured

    def at(self, by_ms: bool) -> float:
        """Where it is drawn from left to right."""
        return self.ms if by_ms and self.ms is not None else self.bits


def table(points: Sequence[Point], how: str | None) -> Table:
    """Points by size, for people.

    Args:
        how: how times were found; None: there are none.
    """
    made = Table(title="what budgets buy", title_justify="left", caption=how, caption_justify="left")
    columns = ["", "bits a weight", "MB", "KL predicted", "KL measured", *(["ms"] if how else [])]
    for column in columns:
        made.add_column(column, justify="right" if column else "left")
    for point in sorted(points, key=lambda point: (point.bits, point.error)):
        cells = [point.label, f"{point.bits:.3f}", f"{point.bytes / 1e6:,.2f}", f"{point.predicted:.4g}"]
        cells.append("" if point.measured is None else f"{point.measured:.4g}")
        cells += [f"{point.ms:.3f}" if point.ms is not None else ""] if how else []
        made.add_row(*cells, style="bold" if point.chosen else None)
    return made


def plot(points: Sequence[Point], path: str | Path, by_ms: bool = False) -> Path:
    """Draw the front: ``.html`` and ``.svg`` by themselves, other endings (``.png``) through matplotlib.

    Raises:
        OptionError: the path is none that can be drawn to.
        MissingLibraryError: matplotlib is needed and not installed.
    """
    path = drawable(path, ALONE)
    if path.suffix in ALONE:
        drawn = svg(points, by_ms)
        path.write_text(page(points, drawn) if path.suffix == ".html" else drawn, encoding="utf-8")
        return path
    figure: Any = figure_class(ALONE)(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    front, others = _split(points, by_ms)
    axes.plot([point.at(by_ms) for point in front], [point.error for point in front], "o-", label="search")
    for point in others:
        axes.plot([point.at(by_ms)], [point.error], "s", label=point.label)
    for point in points:
        if point.chosen:
            axes.plot([point.at(by_ms)], [point.error], "*", markersize=16, label="chosen")
    axes.set_yscale("log")
    axes.set_xlabel(_axis(by_ms))
    axes.set_ylabel("KL divergence, nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(str(path), dpi=120)
    return path


def _split(points: Sequence[Point], by_ms: bool) -> tuple[list[Point], list[Point]]:
    """Points of the search from left to right, and the others; those without an error to draw are left out."""
    good = [point for point in points if 0 < point.error < math.inf]
    front = sorted((point for point in good if point.label == "search"), key=lambda point: point.at(by_ms))
    return front, [point for point in good if point.label != "search"]


def _axis(by_ms: bool) -> str:
    return "milliseconds of linears and experts" if by_ms else "bits a weight"


def svg(points: Sequence[Point], by_ms: bool = False) -> str:
    """The front as a drawing, errors by their logarithm."""
    front, others = _split(points, by_ms)
    drawn = [*front, *others]
    if not drawn:
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"/>'
    low, high = (f(point.at(by_ms) for point in drawn) for f in (min, max))
    down, up = (f(math.log10(point.error) for point in drawn) for f in (min, max))
    wide, tall = high - low or 1.0, up - down or 1.0

    def x(point: Point) -> float:
        return _LEFT + 16 + (point.at(by_ms) - low) / wide * (_WIDTH - _LEFT - 140)

    def y(error: float) -> float:
        return _HEIGHT - _BELOW - 12 - (math.log10(error) - down) / tall * (_HEIGHT - _BELOW - _ABOVE - 24)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<path d="M{_LEFT} {_ABOVE}V{_HEIGHT - _BELOW}H{_WIDTH - 20}" fill="none" stroke="#888"/>',
        f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">{_axis(by_ms)}</text>',
        f'<text x="16" y="{_HEIGHT / 2:.0f}" transform="rotate(-90 16 {_HEIGHT / 2:.0f})" text-anchor="middle">KL, nats</text>',
    ]
    for power in range(math.floor(down), math.ceil(up) + 1):
        if down <= power <= up:
            parts.append(f'<text x="{_LEFT - 8}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">1e{power}</text>')
    for value in sorted({low, (low + high) / 2, high}):
        at = _LEFT + 16 + (value - low) / wide * (_WIDTH - _LEFT - 140)
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BELOW + 18}" text-anchor="middle">{value:.3g}</text>')
    if front:
        line = " ".join(f"{x(point):.1f},{y(point.error):.1f}" for point in front)
        parts.append(f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="2"/>')
    for point in drawn:
        colour = "#1f77b4" if point.label == "search" else "#d62728"
        at = f'cx="{x(point):.1f}" cy="{y(point.error):.1f}"'
        words = html.escape(f"{point.label}: {point.at(by_ms):.4g}, KL {point.error:.4g}")
        parts.append(f'<circle {at} r="{7 if point.chosen else 4}" fill="{colour}"><title>{words}</title></circle>')
        if point.label != "search" or point.chosen:
            name = html.escape("chosen" if point.chosen else point.label)
            parts.append(f'<text x="{x(point) + 9:.1f}" y="{y(point.error) + 4:.1f}">{name}</text>')
    return "\n".join([*parts, "</svg>"])


def page(points: Sequence[Point], drawing: str) -> str:
    """A page of the drawing and the table."""
    rows = "\n".join(
        f"<tr><td>{html.escape(point.label)}{' (chosen)' if point.chosen else ''}</td><td>{point.bits:.3f}</td>"
        f"<td>{point.bytes / 1e6:,.2f}</td><td>{point.predicted:.4g}</td>"
        f"<td>{'' if point.measured is None else f'{point.measured:.4g}'}</td>"
        f"<td>{'' if point.ms is None else f'{point.ms:.3f}'}</td></tr>"
        for point in sorted(points, key=lambda point: (point.bits, point.error))
    )
    head = "<tr><th></th><th>bits a weight</th><th>MB</th><th>KL predicted</th><th>KL measured</th><th>ms</th></tr>"
    style = "body{font-family:sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em 1em;text-align:right}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>sglquant search</title><style>{style}</style>\n'
        f"<h1>What budgets buy</h1>\n{drawing}\n<table>\n{head}\n{rows}\n</table></html>\n"
    )
