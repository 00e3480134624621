"""The page as a file: it needs nothing else, nothing in it is markup that was not ours, and its data say what the report says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from quant_compile.ir.errors import OptionError
from quant_compile.ir.report import Report
from quant_compile.page.content import changes, side_by_side
from quant_compile.page.render import embedded, payload
from tests.page.reports import EVIL, moe, other, synthetic


def written(report: Report, folder: Path, other: Report | None = None) -> str:
    return report.html(folder / "report.html", other).read_text(encoding="utf-8")


def data_of(text: str) -> dict[str, list[object]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_what_names_and_reasons_say_is_never_markup(tmp_path: Path) -> None:
    text = written(synthetic(60), tmp_path)
    assert "<img" not in text and "&lt;img src=x" in text  # the note, in the page itself
    assert text.count("</script>") == 2 and text.count("<script") == 2  # the data and the script
    data = data_of(text)
    assert data["rows"][-1][0] == f"{EVIL}.weight"  # type: ignore[index]  the data are as they were
    assert f"</script>{EVIL}" in data["texts"]


def test_json_cannot_end_its_element() -> None:
    for text in ("</script>", "<!--", "]]>", "\u2028", "&lt;"):
        assert not re.search(r"[<>&\u2028\u2029]", embedded([text])) and json.loads(embedded([text])) == [text]


def test_the_policy_of_the_page_lets_nothing_be_loaded(tmp_path: Path) -> None:
    text = written(synthetic(5), tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy[1] and "http" not in policy[1]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r"\sstyle=|\son\w+=\"", text.split("<script", 1)[0])


def test_the_data_are_those_of_the_report() -> None:
    report = moe()
    data = payload(side_by_side([report._side()], [report.cells()]))
    assert [row[0] for row in data["rows"]] == [line.names[0] for line in report.lines]
    assert sum(row[2][0] for row in data["rows"]) == report.bytes_total
    assert sum(row[2][1] for row in data["rows"]) == report.bytes_after
    assert len(data["views"]) == len(report.views)


def test_layers_alike_share_a_view() -> None:
    """Four layers; q, k and v, then o, and experts, are drawn once, but for the first layer's input, which is an embedding."""
    report = moe()
    q = [line for line in report.lines if line.names[0].endswith("q_proj.weight")]
    assert len({line.views for line in q}) == 2 and len(report.views) == 6


def test_json_keeps_views() -> None:
    report = moe()
    assert Report.from_json(report.to_json()) == report


def test_json_of_before_there_were_views_is_read() -> None:
    data = json.loads(replace(moe(), views=()).to_json())
    del data["views"]
    for line in data["lines"]:
        for key in ("views", "shape", "dtype"):
            del line[key]
    assert Report.from_json(json.dumps(data)).coverage == 1.0


def test_two_reports_name_exactly_what_differs(tmp_path: Path) -> None:
    one, two = moe(), other()
    page = side_by_side([one._side(), two._side()], [one.cells(), two.cells()])
    changed = {row.name for row in page.rows if row.changed}
    assert changed == {line.names[0] for line in one.lines if line.scheme}
    assert not any(row.changed for row in side_by_side([one._side()] * 2, [one.cells()] * 2).rows)
    assert len(data_of(written(one, tmp_path, two))["sides"]) == 2


def test_what_is_in_one_report_only() -> None:
    cells = moe().cells()
    sides = [moe()._side()] * 2
    page = side_by_side(sides, [cells, cells[1:]])
    assert page.rows[0].changed == ("removed",) and page.rows[0].cells[1] is None
    assert side_by_side(sides, [cells[1:], cells]).rows[-1].changed == ("added",)
    assert changes(cells[1], replace(cells[1], kernels="other", layout="other")) == ("kernel", "layout")


def test_a_report_without_lines(tmp_path: Path) -> None:
    assert "No warnings" in written(Report("none", "cpu", ()), tmp_path)


def test_a_file_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no/report\.html cannot be written: No such file"):
        synthetic(1).html(tmp_path / "no" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OptionError, match="cannot be written: Is a directory"):
        synthetic(1).html(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
