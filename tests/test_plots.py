"""The pictures in docs/images are of the results that are committed, for light and dark pages, and can be drawn."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = str(ROOT / "benchmarks")

sys.path.insert(0, BENCHMARKS)
try:
    plots, renderer = (importlib.import_module(name) for name in ("plot", "render_readme"))
finally:
    sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("theme", [theme.name for theme in plots.THEMES])
@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_picture_is_of_the_committed_result(name: str, theme: str) -> None:
    text = (plots.IMAGES / f"{name}-{theme}.svg").read_text(encoding="utf-8")
    result = renderer.read(plots.PLOTS[name][1][0], renderer.RESULTS)
    assert renderer.place(result) in text and "<script" not in text


def test_speeds_are_those_of_the_table() -> None:
    text = (plots.IMAGES / "speed-light.svg").read_text(encoding="utf-8")
    drawn = sorted(re.findall(r">(\d\.\d\d)×<", text))
    rows: list[dict[str, Any]] = renderer.read("generate", renderer.RESULTS)["rows"]
    cells = [row["cells"] for row in rows if row["model"] == "Llama-3-8B" and row["stack"] in plots.DECODE]
    assert drawn == sorted(f"{cell[f'B={b} P=128']['speedup']:.2f}" for cell in cells for b in plots.BATCHES)


def test_shares_are_those_of_a_hand() -> None:
    """FP8, n = k = 4096, m = 1: 16.8 MB in 10 us of 4.3 TB/s."""
    row = {"scheme": "FP8_DYNAMIC", "n": 4096, "k": 4096, "m": 1, "dispatch_us": 10.0}
    memory, arithmetic = plots.shares(row, "sm90")
    assert memory == pytest.approx((4096 * 4096 + 4096 + 2 * 4096) / 10 / 4.3e6)
    assert arithmetic == pytest.approx(2 * 4096 * 4096 / 10 / 1979e6)


def test_pictures_are_drawn_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for turn in ("a", "b"):
        assert plots.main(["--out", str(tmp_path / turn)]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_no_results_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert plots.main(["--only", "speed", "--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert "speed: no results" in capsys.readouterr().out and not list(tmp_path.iterdir())
