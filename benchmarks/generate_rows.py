"""What becomes of the lines of ``generate_worker.py``: one row a stack, cells that were not run, ratios, the acceptance table.

Pure functions over dicts; only ``compare_logits`` reads files, the logits that the stacks left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from generate_worker import BF16, DEFAULT, LLAMA, QWEN, cell_name, logits_file

Row = dict[str, Any]
Key = tuple[str, str]
# Logits that have less in common with bf16's belong to a broken stack. Random weights say nothing about quality: 4-bit
# weights move these logits far (a cosine of 0.6), while logits of another model or of noise have a cosine of 0.
LEAST_COSINE = 0.1


@dataclass(frozen=True)
class Grid:
    """Which cells are measured.

    Attributes:
        main: the prompt length that the acceptance takes for every batch size.
        long: prompt lengths whose first token is accepted, beside ``main``, at the first batch size.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    prompts: tuple[int, ...] = (32, 128, 512, 2048)
    main: int = 128
    long: tuple[int, ...] = (512, 2048)
    new_tokens: int = 64

    def first_cells(self, model: str) -> tuple[tuple[int, int], ...]:
        """What the acceptance asks of a model."""
        one = self.batches[0]
        if model == QWEN:
            return ((one, self.main),)
        return (*((batch, self.main) for batch in self.batches), *((one, prompt) for prompt in self.long))

    def cells(self, model: str) -> tuple[tuple[int, int], ...]:
        """All cells, those of the acceptance first."""
        every = [(batch, prompt) for prompt in self.prompts for batch in self.batches]
        return tuple(dict.fromkeys((*self.first_cells(model), *every)))


# --- rows ------------------------------------------------------------------------------------------------------------


def merge(
    keys: Sequence[Key], lines: Sequence[Mapping[str, Any]], endings: Mapping[tuple[str, str, str], str], grid: Grid
) -> list[Row]:
    """A row of each (model, stack), from whatever lines there are.

    ``endings`` says of a (model, stack, phase) that did not end well how it ended; the reason stands in every cell that
    was not measured for it.
    """
    rows = []
    for model, stack in keys:
        row: Row = {"model": model, "stack": stack, "error": None, "cells": {}}
        mine = [line for line in lines if (line["model"], line["stack"]) == (model, stack)]
        for line in mine:
            _add(row, line)
        ended = {phase: text for (m, s, phase), text in endings.items() if (m, s) == (model, stack)}
        row["error"] = row["error"] or next(iter(ended.values()), None)
        if stack != "wrapper":
            _add_missing(row, mine, ended, [cell_name(*cell) for cell in grid.cells(model)])
        rows.append(row)
    return rows


def _add(row: Row, line: Mapping[str, Any]) -> None:
    values = {
        key: value for key, value in line.items() if key not in ("model", "stack", "phase", "kind", "cell", "call")
    }
    kind = line["kind"]
    if kind == "cell":
        row["cells"][line["cell"]] = values
    elif kind == "call":
        row.setdefault("calls", {})[line["call"]] = values
    elif kind == "first":
        # The first process has empty caches. The second finds what the first left, if there was one for that alone.
        if "cold" not in row:
            row["cold"] = values
        elif line["phase"] == "first":
            row["warm"] = values
    elif kind == "error":
        row["error"] = row["error"] or values["message"]
    elif kind == "guard":
        row.setdefault(kind, {"kept": {}})["kept"] |= values["kept"]
    elif kind != "begin":
        row.setdefault(kind, values)


def _add_missing(row: Row, lines: Sequence[Mapping[str, Any]], ended: Mapping[str, str], wanted: Sequence[str]) -> None:
    begun = {line["cell"] for line in lines if line["kind"] == "begin"}
    for cell in [name for name in wanted if name not in row["cells"]]:
        why = row["error"] or "not asked for"
        row["cells"][cell] = {"reason": f"not done: {why}" if cell in begun else f"not run: {why}"}
    row["cells"] = {cell: row["cells"][cell] for cell in wanted}


def compare_logits(rows: Sequence[Row], folder: Path) -> None:
    """Into every measured cell, the cosine of its logits to those of Hugging Face's bf16: first step, and least of all steps.

    A cell whose logits are not numbers, all alike, or nothing like bf16's gets a reason and no ratio.
    """
    for row in rows:
        for name, cell in row["cells"].items():
            if "first_token_ms" not in cell:
                continue
            own = _logits(folder, row["model"], row["stack"], name)
            others = (_logits(folder, row["model"], stack, name) for stack in ("hf-eager", "hf-auto"))
            reference = next((logits for logits in others if logits is not None), None)
            if own is not None and reference is not None:
                count = min(len(own), len(reference))
                cosine = torch.nn.functional.cosine_similarity(own[:count], reference[:count], -1).amin(1)
                cell |= {"cosine_first": float(cosine[0]), "cosine_least": float(cosine.min())}
            reason = insane(cell)
            if reason:
                cell["reason"] = reason


def _logits(folder: Path, model: str, stack: str, cell: str) -> torch.Tensor | None:
    path = logits_file(folder, model, stack, cell)
    try:
        return torch.load(path).float()
    except (OSError, RuntimeError, EOFError):  # not there, or a process was ended while it wrote
        return None


def insane(cell: Mapping[str, Any]) -> str | None:
    """Why a measured cell must not count, if so."""
    if not cell.get("finite", True):
        return "its logits are not finite"
    if not cell.get("varied", True):
        return "its logits are all alike"
    least = cell.get("cosine_least")
    if least is not None and not least >= LEAST_COSINE:
        return f"its logits have a cosine of {least:.2f} to bf16's"
    return None


def add_ratios(rows: Sequence[Row]) -> None:
    """Into every sane cell, how many times faster it is than ``hf-auto``, and than the best bf16 to the first token.

    The best is the faster of Hugging Face eager and of Inductor.
    """
    found = {(row["model"], row["stack"]): row["cells"] for row in rows}
    for row in rows:
        for name, cell in row["cells"].items():
            if "first_token_ms" not in cell or "reason" in cell:
                continue
            base, *best = (
                _sane(found.get((row["model"], stack), {}).get(name)) for stack in ("hf-auto", "hf-eager", "inductor")
            )
            known = [other["first_token_ms"] for other in best if other]
            cell["speedup"] = _ratio(base, cell, "ms_per_token")
            cell["first_token_speedup"] = _ratio(base, cell, "first_token_ms")
            cell["first_token_to_best"] = min(known) / cell["first_token_ms"] if len(known) == len(best) else None


def _sane(cell: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return cell if cell and "reason" not in cell else None


def _ratio(base: Mapping[str, Any] | None, cell: Mapping[str, Any], name: str) -> float | None:
    return base[name] / cell[name] if base and base.get(name) and cell.get(name) else None


# --- acceptance ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Criterion:
    """One thing that must be so.

    Attributes:
        least: smallest ratio that passes, or None.
        most: largest ratio that passes, or None.
        measured: None where it could not be measured; that passes nothing.
        missing: what was not measured of it.
    """

    point: int
    what: str
    measured: float | None
    least: float | None = None
    most: float | None = None
    missing: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is so."""
        if self.measured is None or self.missing:
            return False
        return (self.least is None or self.measured >= self.least) and (self.most is None or self.measured <= self.most)

    @property
    def required(self) -> str:
        """``≥ 1.5`` or ``≤ 1.05``."""
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    def fields(self) -> dict[str, Any]:
        """For a result file."""
        return asdict(self) | {"required": self.required, "passed": self.passed}


def acceptance(rows: Sequence[Row], grid: Grid, policies: Sequence[str]) -> list[Criterion]:
    """Everything that is asked of ``generate``, in order; ``policies`` are those no cell of which may lose to bf16."""
    found = {(row["model"], row["stack"]): row for row in rows}
    return [*_decode(found, grid), *_first_token(found, grid, policies), *_calls(found, grid), *_start(found, policies)]


Found = Mapping[Key, Row]


def _cell(found: Found, model: str, stack: str, batch: int, prompt: int, name: str) -> float | None:
    return found.get((model, stack), {}).get("cells", {}).get(cell_name(batch, prompt), {}).get(name)


def _decode(found: Found, grid: Grid) -> Iterator[Criterion]:
    one, *more = grid.batches
    needs = [(LLAMA, "FP8_DYNAMIC", one, 1.5), (LLAMA, "W4A16", one, 1.6), (LLAMA, "W4A8", one, 1.7)]
    needs += [(LLAMA, "FP8_DYNAMIC", batch, 1.25) for batch in more] + [(QWEN, "FP8_DYNAMIC", one, 1.4)]
    for model, stack, batch, least in needs:
        what = f"{model} {stack} {cell_name(batch, grid.main)}: a token"
        yield Criterion(1, what, _cell(found, model, stack, batch, grid.main, "speedup"), least=least)


def _first_token(found: Found, grid: Grid, policies: Sequence[str]) -> Iterator[Criterion]:
    for prompt, least in zip((grid.main, *grid.long), (1.0, 1.2, 1.4)):
        value = _cell(found, LLAMA, "FP8_DYNAMIC", grid.batches[0], prompt, "first_token_to_best")
        yield Criterion(2, f"{LLAMA} FP8_DYNAMIC, prompt {prompt}: first token", value, least=least)
    for model, stack in [key for key in found if key[1] in policies]:
        for name, words in (("speedup", "a token"), ("first_token_to_best", "first token")):
            cells = found[model, stack]["cells"]
            known = {cell: values[name] for cell, values in cells.items() if values.get(name) is not None}
            worst = min(known, key=known.__getitem__, default="")
            missing = f"{len(cells) - len(known)} of {len(cells)} cells" if len(known) < len(cells) else ""
            what = f"{model} {stack}, every cell: {words}" + (f"; least at {worst}" if worst else "")
            yield Criterion(2, what, known.get(worst), least=1.0, missing=missing)


def _calls(found: Found, grid: Grid) -> Iterator[Criterion]:
    stack = next((s for m, s in found if m == LLAMA and s.endswith(DEFAULT)), f"FP8_DYNAMIC{DEFAULT}")
    own, base = (found.get((LLAMA, name), {}).get("calls", {}) for name in (stack, "inductor"))

    def over(call: str, name: str) -> float | None:
        return own[call][name] / base[call][name] if call in own and call in base else None

    prefills = [f"prefill {prompt}" for prompt in grid.long]
    for call in ("decode", *prefills):
        yield Criterion(3, f"{stack}: host time of {call}, to Inductor's", over(call, "host_ms"), most=1.05)
    for call, least in (("decode", 1.0), (prefills[0], 1.2)):
        ratio = over(call, "wall_ms")
        yield Criterion(3, f"{stack}: wall of {call}, faster than Inductor", 1 / ratio if ratio else None, least=least)


def _start(found: Found, policies: Sequence[str]) -> Iterator[Criterion]:
    base = found.get((LLAMA, "hf-auto"), {}).get("cold", {}).get("seconds")
    for stack in policies:
        row = found.get((LLAMA, stack), {})
        cold, warm = (row.get(name, {}).get("seconds") for name in ("cold", "warm"))
        yield Criterion(4, f"{stack}: first call, to hf-auto's cold", cold / base if cold and base else None, most=1.5)
        yield Criterion(
            4, f"{stack}: second process, to its own cold", warm / cold if cold and warm else None, most=0.5
        )
    cost = found.get((LLAMA, "wrapper"), {}).get("wrapper", {})
    one, *more = (value for name, value in cost.items() if name.startswith("us_")) if cost else (None, None)
    yield Criterion(4, "the wrapper, µs a call of 300 weights", one, most=30.0)
    yield Criterion(
        4, "the wrapper with ten models bound, to one", more[0] / one if one and more[0] else None, most=1.1
    )


__all__ = ["BF16", "Criterion", "Grid", "acceptance", "add_ratios", "compare_logits", "insane", "merge"]
