"""The ledger as data: sums, gates, JSON and text."""

from __future__ import annotations

import pytest

from quant_compile.ir.errors import CoverageError
from quant_compile.ir.report import Report, WeightLine


def line(
    name: str,
    before: int,
    after: int | None = None,
    scheme: str | None = None,
    named: bool = True,
    reason: str = "because",
) -> WeightLine:
    return WeightLine(
        (name,),
        before,
        before if after is None else after,
        scheme,
        "rows" if scheme else "",
        "k" if scheme else "",
        reason,
        named,
    )


REPORT = Report(
    "W8A8",
    "cpu",
    (
        line("model.layers.0.q.weight", 1000, 500, "W8A8"),
        line("model.layers.1.q.weight", 1000, 500, "W8A8"),
        line("model.layers.0.odd.weight", 500, reason="the weight is computed by mul before it is used"),
        line("lm_head.weight", 3000, named=False, reason="kept by convention: output head"),
        line("norm.weight", 100, named=False, reason="not a linear weight"),
    ),
    ("a note",),
    (("experts.weight", "bmm over a Parameter is not a linear"),),
    {"inductor": 1.5},
)


def test_sums() -> None:
    assert REPORT.bytes_total == 5600 and REPORT.bytes_after == 4600
    assert REPORT.coverage == pytest.approx(2000 / 2500)
    assert REPORT.share == pytest.approx(2000 / 5600)


def test_skips_are_named_weights_and_misses() -> None:
    assert [name for name, _ in REPORT.skips] == ["model.layers.0.odd.weight", "experts.weight"]


def test_require() -> None:
    assert REPORT.require(0.8) is REPORT
    with pytest.raises(CoverageError) as error:
        REPORT.require(0.95)
    text = str(error.value)
    assert "coverage is 0.8000, required 0.9500" in text
    assert "model.layers.0.odd.weight: the weight is computed by mul" in text and "Fix:" in text


def test_nothing_named_is_no_coverage() -> None:
    empty = Report("keep", "cpu", (line("a.weight", 10, named=False),))
    assert empty.coverage == 0.0 and empty.share == 0.0
    with pytest.raises(CoverageError, match="names no weight"):
        empty.require(0.5)
    assert Report("none", "none", ()).share == 0.0


def test_json_round_trip() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_table_joins_layers_and_shows_every_reason() -> None:
    text = str(REPORT)
    assert "model.layers.*.q.weight (2)" in text
    for words in ("a note", "output head", "W8A8", "80.0%"):
        assert words in text
    assert "model.layers.0.q.weight" in next(iter(REPORT.table(full=True).columns[0].cells))
