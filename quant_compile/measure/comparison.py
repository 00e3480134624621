"""What ``compare`` found, as data: one row a policy, as a table, a plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quant_compile.measure.figures import drawable, figure_class

WIDTH = 150


@dataclass(frozen=True)
class Row:
    """One policy on the model and the text; what was not measured is None.

    Attributes:
        label: the policy, or ``eager``: the model as it was given.
        bits: bits held for a quantized weight, scales included; where nothing is quantized, those of the model's weights.
        bytes: of all parameters as the model computes with them, originals of quantized weights not counted.
        coverage: quantized bytes over those that the policy names; None where it names none.
        perplexity: exp of the mean negative log-likelihood of the predicted tokens.
        kl: mean KL divergence of the next token's distribution from the eager model's, in nats.
        kl_999: its 99.9th percentile over tokens.
        top1: share of tokens for which both find the same token the likeliest.
        tokens_per_second: of ``generate`` after the first token, all sequences together.
        seconds: for the whole row, compiling included.
        unquantized: (weight, reason) of what the policy names and nothing quantized.
        error: why something is missing.
    """

    label: str
    bits: float | None = None
    bytes: int | None = None
    coverage: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    kl_999: float | None = None
    top1: float | None = None
    tokens_per_second: float | None = None
    seconds: float = 0.0
    unquantized: tuple[tuple[str, str], ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Rows, the eager model's first, and what they were measured on.

    Attributes:
        rows: one a policy, in the order given.
        meta: ``model``, ``parameters``, ``device``, ``windows``, ``length``, ``tokens`` (predicted), ``batch`` and ``new_tokens`` (of
            ``tokens_per_second``), ``versions``, ``date``.
    """

    rows: tuple[Row, ...]
    meta: Mapping[str, Any]

    def __getitem__(self, label: str) -> Row:
        """The row of a label."""
        found = next((row for row in self.rows if row.label == label), None)
        if found is None:
            raise KeyError(f"no row {label!r}; there are {', '.join(row.label for row in self.rows)}")
        return found

    def table(self) -> Table:
        """One line a policy; reasons of what is missing below."""
        base = self.rows[0].perplexity if self.rows else None
        table = Table(title=self._title(), title_justify="left", caption=self._caption(), caption_justify="left")
        columns = (
            "policy",
            "bits",
            "bytes",
            "coverage",
            "perplexity",
            "to eager",
            "KL mean",
            "KL 99.9 %",
            "top-1",
            "tokens/s",
        )
        for column in columns:
            table.add_column(column, justify="left" if column == "policy" else "right", overflow="fold")
        for row in self.rows:
            ratio = row.perplexity / base - 1 if row.perplexity is not None and base else None
            cells = [
                escape(row.label),
                _shown(row.bits, "{:.4g}"),
                "–" if row.bytes is None else size_text(row.bytes),
                _shown(row.coverage, "{:.1%}"),
                _shown(row.perplexity, "{:.4f}"),
                _shown(None if row is self.rows[0] else ratio, "{:+.2%}"),
                _shown(row.kl, "{:.5f}"),
                _shown(row.kl_999, "{:.4f}"),
                _shown(row.top1, "{:.2%}"),
                _shown(row.tokens_per_second, "{:.1f}"),
            ]
            table.add_row(*cells)
        return table

    def _title(self) -> str:
        meta = self.meta
        return f"{meta['model']} on {meta['device']}: {meta['tokens']} tokens in {meta['windows']} windows of {meta['length']}"

    def _caption(self) -> str:
        lines = [f"{row.label}: {row.error.splitlines()[0]}" for row in self.rows if row.error]
        for row in self.rows:
            if row.unquantized:
                name, reason = row.unquantized[0]
                more = f" and {len(row.unquantized) - 1} more" if len(row.unquantized) > 1 else ""
                lines.append(f"{row.label}: {name}{more} not quantized: {reason}")
        return escape("\n".join(lines))

    def __str__(self) -> str:
        console = Console(width=WIDTH, file=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def to_json(self, path: str | Path | None = None) -> str:
        """Rows and what they were measured on, as JSON; written to ``path`` as well if one is given."""
        text = json.dumps({**self.meta, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> Path:
        """Draw perplexity and KL divergence over bytes held, and tokens per second, to a file (PNG, SVG, PDF).

        Raises:
            OptionError: the path is none that can be drawn to.
            MissingLibraryError: matplotlib is not installed.
        """
        path = drawable(path)
        figure = figure_class()(figsize=(13, 4.5), layout="constrained")
        axes = figure.subplots(1, 3)
        figure.suptitle(self._title())
        colors = {row.label: f"C{index % 10}" for index, row in enumerate(self.rows)}
        eager, *others = self.rows
        points = [row for row in others if row.bytes is not None]
        _scatter(axes[0], points, [row.perplexity for row in points], colors, "perplexity", "linear")
        if eager.perplexity is not None:
            axes[0].axhline(eager.perplexity, ls="--", lw=1, color="0.5")
            axes[0].annotate(
                eager.label, (0.01, eager.perplexity), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
            )
        _scatter(
            axes[1], points, [row.kl for row in points], colors, "mean KL divergence to the eager model, nats", "log"
        )
        _bars(axes[2], [row for row in self.rows if row.tokens_per_second is not None], colors)
        figure.savefig(path, dpi=150)
        return Path(path)


def _scatter(
    axis: Any, rows: Sequence[Row], values: Sequence[float | None], colors: Mapping[str, str], what: str, scale: str
) -> None:
    shown = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None and value > 0]
    unit, name = (1e9, "GB") if max((row.bytes or 0 for row, _ in shown), default=0) >= 1e9 else (1e6, "MB")
    axis.set_yscale(scale if shown else "linear")
    axis.set_xlabel(f"weights held, {name}")
    axis.set_ylabel(what)
    axis.margins(x=0.25, y=0.15)
    for index, (row, value) in enumerate(shown):
        at = ((row.bytes or 0) / unit, value)
        axis.plot(*at, "o", color=colors[row.label])
        axis.annotate(row.label, at, (0, 7 if index % 2 else -13), textcoords="offset points", ha="center", fontsize=8)
    axis.grid(alpha=0.3)


def _bars(axis: Any, rows: Sequence[Row], colors: Mapping[str, str]) -> None:
    labels = [row.label for row in rows]
    axis.barh(labels, [row.tokens_per_second for row in rows], color=[colors[label] for label in labels])
    axis.invert_yaxis()
    axis.set_xlabel("tokens per second")
    axis.grid(axis="x", alpha=0.3)


def size_text(size: float) -> str:
    """Bytes for people: ``812 B``, ``3.21 MB``, ``16.1 GB``."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}" if size < 1000 * limit else f"{size / limit:.0f} {unit}"
    return f"{size:.0f} B"


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
