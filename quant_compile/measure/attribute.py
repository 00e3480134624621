"""Which weight costs what: of each quantized one its own error, what it adds to the final divergence, and where it is used.

Runs the model eagerly over the batches: once as it is, once to compare all products, once with everything quantized, and once for
each weight alone. Nothing is changed.
"""

from __future__ import annotations

import io
import json
import linecache
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import nn

from quant_compile.ir.errors import MeasureError, OptionError
from quant_compile.measure.figures import drawable, figure_class
from quant_compile.measure.outputs import Reference, checked, still
from quant_compile.measure.weights import chosen_by
from quant_compile.model.distributed import refuse_parts
from quant_compile.model.follow import Meeting, run_batch
from quant_compile.policy import Policy
from quant_compile.simulate import Chosen, Simulation, Values, Watching

WIDTH = 170
_PACKAGE = Path(__file__).resolve().parents[1]
# What multiplies for a model and is not its own code.
_NOT_THE_MODEL = (
    str(Path(torch.__file__).parent),
    *(str(_PACKAGE / part) for part in ("measure", "model", "simulate.py")),
)
_HELPERS = ("/transformers/integrations/", "/peft/tuners/", "/accelerate/")


@dataclass(frozen=True)
class Attributed:
    """One quantized weight.

    Attributes:
        name: the weight's.
        scheme: what it was quantized to.
        own_error: ||y_q - y|| / ||y|| of its product over all batches, under inputs of the model as it is.
        kl: mean divergence of the final logits, in nats, with this weight alone quantized; None where ``top`` left it out.
        share: ``kl`` over the sum of all that were measured.
        unusual: ``own_error`` over the median of the weights under the same scheme (of all, where fewer than three have it). Far above
            1 is a weight that the scheme does not suit, or one that was damaged.
        depth: its place among the weights, in the order in which the model uses them.
        source: file and line in the model's code where the product is computed.
        code: that line.
    """

    name: str
    scheme: str
    own_error: float
    kl: float | None
    share: float | None
    unusual: float
    depth: int
    source: str
    code: str


@dataclass(frozen=True)
class Attribution:
    """What each quantized weight costs, the worst first.

    Attributes:
        policy: its name.
        rows: by ``kl`` times the square of ``unusual`` where that is above 1; those without ``kl`` by ``own_error``. Weights differ
            tenfold in what the same error of theirs costs, so that damage to one that matters little would stand below
            ordinary rounding of others; errors count by their squares.
        total: mean divergence with all weights quantized, nats.
        positions: of the logits that were compared.
        unreached: weights that the policy quantizes and no batch used.
    """

    policy: str
    rows: tuple[Attributed, ...]
    total: float
    positions: int
    unreached: tuple[str, ...] = ()

    def table(self, top: int | None = None) -> Table:
        """A table for people.

        Args:
            top: only so many rows.
        """
        title = f"{self.policy}: KL {self.total:.4g} nats with all quantized, over {self.positions} positions"
        table = Table(title=title, title_justify="left")
        for column in ("weight", "scheme", "own error", "x median", "KL alone", "share", "computed at", "code"):
            right = column in ("own error", "x median", "KL alone", "share")
            table.add_column(column, overflow="fold", justify="right" if right else "left")
        for row in self.rows[:top]:
            table.add_row(
                escape(row.name),
                escape(row.scheme),
                f"{row.own_error:.3%}",
                f"{row.unusual:.2f}",
                "" if row.kl is None else f"{row.kl:.3e}",
                "" if row.share is None else f"{row.share:.1%}",
                escape(row.source),
                escape(row.code),
            )
        return table

    def __str__(self) -> str:
        console = Console(width=WIDTH, highlight=False, file=io.StringIO())
        with console.capture() as captured:
            console.print(self.table())
            if self.unreached:
                console.print(f"no batch used: {', '.join(self.unreached)}", markup=False)
        return captured.get().rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """``to_dict`` as JSON text, written to a file where one is named. Numbers that are infinite are null."""
        text = json.dumps(_finite(self.to_dict()), indent=2)
        if path is not None:
            Path(path).write_text(f"{text}\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> Path:
        """Own error and divergence of each weight by its depth, as a picture of the kind that the path's ending says.

        Raises:
            OptionError: the path is none that can be drawn to.
            MissingLibraryError: matplotlib is not installed.
        """
        path = drawable(path)
        rows = sorted(self.rows, key=lambda row: row.depth)
        figure: Any = figure_class()(figsize=(max(6.0, 0.18 * len(rows)), 7.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        kinds = sorted({_kind(row.name) for row in rows})
        for kind in kinds:
            own = [row for row in rows if _kind(row.name) == kind]
            at = [row.depth for row in own]
            above.plot(at, [row.own_error for row in own], "o", label=kind)
            below.plot(at, [math.nan if row.kl is None else row.kl for row in own], "o", label=kind)
        above.set_ylabel("own error")
        below.set_ylabel("KL alone, nats")
        below.set_xlabel("weights in the order in which the model uses them")
        for axes in (above, below):
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
        above.set_title(f"{self.policy}: KL {self.total:.3g} nats in all")
        above.legend(fontsize=8, ncols=4)
        figure.savefig(str(path), dpi=120)
        return Path(path)


def attribute(
    model: nn.Module,
    batches: Iterable[Any],
    policy: Any,
    *,
    reference: nn.Module | None = None,
    top: int | None = None,
    progress: bool = True,
) -> Attribution:
    """For each weight that a policy quantizes: its own error, what it adds to the final divergence, and its line in the model's code.

    Args:
        model: the model, with its weights in 16 bits or f32; it is run eagerly and not changed. Where it is compiled, the planes that
            its linears run with under the same scheme are measured, whatever made them.
        batches: each a mapping (keyword arguments), a tuple (positional arguments) or one tensor.
        policy: preset name, YAML path, dict or Policy.
        reference: what is compared with, and whose code is run: a model of the same architecture, e.g. from before an edit that is
            under suspicion. Default: the model itself.
        top: measure the divergence of so many weights only, those with the largest own error.
        progress: show a progress bar with the time left.

    Returns:
        The weights, the worst first.

    Raises:
        OptionError: no batches, or ``top`` below 1.
        MeasureError: the policy quantizes nothing, no batch reaches a quantized weight, or the logits are NaN.
        MissingScalesError: a static scheme has no calibrated scale.
    """
    if top is not None and top < 1:
        raise OptionError(f"top must be 1 or more, got {top}. Fix: leave it out to measure all weights.")
    refuse_parts(model, "attribute")
    given = checked(batches)
    loaded = Policy.load(policy)
    running, values_of = (model, None) if reference is None else (reference, model)
    chosen = {each.name: each for each in chosen_by(loaded, running, values_of)}
    if not chosen:
        raise MeasureError(
            f"policy {loaded.name} quantizes no weight of this model. Fix: `sglquant check` says why; another policy."
        )
    wanted = Reference(running, given)
    values = Values(served=reference is None)
    errors = _own_errors(running, given, list(chosen.values()), values, progress)
    if not errors:
        raise MeasureError("no batch reached a weight that the policy quantizes. Fix: batches that run every layer.")
    total = wanted.divergence(Simulation(chosen.values(), values))
    ranked = sorted(errors, key=lambda name: -_badness(errors[name].relative))[:top]
    kl = {
        name: wanted.divergence(Simulation([chosen[name]], values))
        for name in track(ranked, "one weight at a time", disable=not progress)
    }
    return _made(loaded, chosen, errors, kl, total, wanted.positions)


@dataclass
class Error:
    """Sums of squares over all products with one weight."""

    depth: int
    source: str
    code: str
    squares: float = 0.0
    of: float = 0.0

    @property
    def relative(self) -> float:
        """||y_q - y|| / ||y||."""
        return math.sqrt(self.squares / self.of) if self.of else (0.0 if not self.squares else math.inf)


def _own_errors(
    model: nn.Module, batches: Sequence[Any], chosen: Sequence[Chosen], values: Values, progress: bool
) -> dict[str, Error]:
    """By name, of the weights that were used."""
    out: dict[str, Error] = {}

    def observe(found: Meeting) -> None:
        name = found.made.weight
        if name not in out:
            out[name] = Error(len(out), *source_line())
        both = watching.compared(found)
        out[name].squares += float((both.quantized - both.plain).square().sum(dtype=torch.float64))
        out[name].of += float(both.plain.square().sum(dtype=torch.float64))

    watching = Watching(chosen, observe, values)
    with still(model):
        for batch in track(batches, "own errors", disable=not progress):
            with watching:
                run_batch(model, batch)
    return out


def _made(
    policy: Policy,
    chosen: dict[str, Chosen],
    errors: dict[str, Error],
    kl: dict[str, float],
    total: float,
    positions: int,
) -> Attribution:
    whole = sum(value for value in kl.values() if math.isfinite(value))
    median = _medians({name: (chosen[name].scheme.spec, error.relative) for name, error in errors.items()})
    rows: list[Attributed] = []
    for name, error in errors.items():
        own = kl.get(name)
        share = None if own is None else (own / whole if whole and math.isfinite(own) else (1.0 if own else 0.0))
        spec = chosen[name].scheme.spec
        unusual = error.relative / median[spec] if median[spec] else (math.inf if error.relative else 1.0)
        found = Attributed(name, spec, error.relative, own, share, unusual, error.depth, error.source, error.code)
        rows.append(found)
    rows.sort(key=lambda row: (row.kl is None, -_rank(row), -_badness(row.own_error)))
    unreached = tuple(name for name in chosen if name not in errors)
    return Attribution(policy.name, tuple(rows), total, positions, unreached)


def _medians(errors: dict[str, tuple[str, float]]) -> dict[str, float]:
    """Median error by scheme; of all weights where fewer than three have the scheme."""
    by: dict[str, list[float]] = {}
    for spec, error in errors.values():
        by.setdefault(spec, []).append(error)
    every = statistics.median(error for _, error in errors.values())
    return {spec: statistics.median(found) if len(found) > 2 else every for spec, found in by.items()}


def _rank(row: Attributed) -> float:
    return 0.0 if not row.kl else _badness(row.kl) * max(1.0, _badness(row.unusual)) ** 2


def source_line() -> tuple[str, str]:
    """``file:line`` of the model's code that computes the product which is being looked at, and the line's text."""
    frame = sys._getframe(1)
    last: tuple[str, str] = ("", "")
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((*_NOT_THE_MODEL, "<")):
            code = linecache.getline(file, frame.f_lineno).strip()
            found = f"{_short(file)}:{frame.f_lineno}", code
            if not any(part in file for part in _HELPERS):
                return found
            last = last if last[0] else found
        frame = frame.f_back
    return last


def _short(file: str) -> str:
    """A file's path from its package on."""
    for folder in ("site-packages/", "dist-packages/"):
        if folder in file:
            return file.rpartition(folder)[2]
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _badness(value: float) -> float:
    return math.inf if value != value else value


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
