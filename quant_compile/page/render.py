"""A page as one HTML file that needs nothing else: styles, script and data are inside, and its policy lets nothing be loaded.

The script's data is JSON with ``<`` escaped, in columns, with each text and each view once: a page of 40,000 weights stays small.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Hashable
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files
from typing import Any

from quant_compile.page.content import Cell, Page, Side
from quant_compile.page.views import SiteView

# What would end the script element, or a line of JavaScript, inside of a JSON text.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class _Table:
    """Values by position, each once. Objects that come again are known by identity, since views are long to hash."""

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}
        self._seen: dict[int, tuple[Hashable, int]] = {}

    def place(self, value: Hashable) -> int:
        """The position of a value."""
        seen = self._seen.get(id(value))
        if seen is None:
            seen = self._seen[id(value)] = (value, self._places.setdefault(value, len(self._places)))
        return seen[1]

    def values(self) -> list[Any]:
        """All values in the order of their positions."""
        return list(self._places)


def render(page: Page) -> str:
    """The HTML text of a page."""
    from jinja2 import Environment
    from markupsafe import Markup

    style, script = _asset("report.css"), _asset("report.js")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_asset("report.html"))
    return template.render(
        title=" → ".join(side.policy for side in page.sides),
        page=page,
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        data=Markup(embedded(payload(page))),
    )


def embedded(data: Any) -> str:
    """JSON that is safe inside of a script element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def payload(page: Page) -> dict[str, Any]:
    """What the script reads: sides, rows in columns, and tables of texts and views."""
    texts, views = _Table(), _Table()
    rows = [[row.name, list(row.changed), *(_packed(cell, texts, views) for cell in row.cells)] for row in page.rows]
    return {
        "sides": [_side(side) for side in page.sides],
        "rows": rows,
        "texts": texts.values(),
        "views": [_view(view) for view in views.values()],
    }


def _side(side: Side) -> dict[str, Any]:
    return asdict(side) | {"timings": [list(pair) for pair in side.timings]}


def _packed(cell: Cell | None, texts: _Table, views: _Table) -> list[Any]:
    """A cell in the order that the script knows; 0 where there is none."""
    if cell is None:
        return []
    words = (cell.scheme or "", cell.layout, cell.kernels, cell.reason, cell.dtype, " ".join(cell.marks))
    return [
        cell.bytes_before,
        cell.bytes_after,
        *map(texts.place, words),
        list(cell.shape),
        [views.place(view) for view in cell.views],
        list(cell.names[1:]),
        cell.verified,
    ]


def _view(view: SiteView) -> dict[str, Any]:
    data = asdict(view)
    for side in ("before", "after"):
        if data[side] is not None:
            boxes = data[side]["boxes"]
            data[side]["boxes"] = [[box["label"], box["shape"], box["kind"], box["note"]] for box in boxes]
    data["times"] = [[t.m, t.kernel, t.microseconds, t.measured, t.floor] for t in view.times]
    return data


def _hash(text: str) -> str:
    """A source expression of the page's policy: this text and no other may be run or applied."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@lru_cache(maxsize=None)
def _asset(name: str) -> str:
    return files("quant_compile.page").joinpath("assets", name).read_text(encoding="utf-8")
