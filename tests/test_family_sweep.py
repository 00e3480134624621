"""The sweep over model families: its rules build models, its checks can fail, and every family is right (`--families`).

The code is that of ``benchmarks/families.py``; here each family is a test of its own, under the same limits.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = str(ROOT / "benchmarks")
QUICK = ("llama", "bert", "t5")

sys.path.insert(0, BENCHMARKS)
try:
    check, models, sweep = (importlib.import_module(name) for name in ("family_check", "family_models", "families"))
finally:
    sys.path.remove(BENCHMARKS)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that families are forked from import the scripts by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def row_of(family: str) -> dict[str, Any]:
    """A family checked in its own process."""
    return next(sweep.run([family], 1, sweep.LIMIT, False, True))


def assert_right(row: dict[str, Any]) -> None:
    """Right, and what the policy names is quantized or has a reason."""
    assert row["status"] == check.RIGHT, row
    assert row["error"] <= check.TOLERANCE
    assert row["coverage"] == 1.0 or row["skips"] or not row["quantized"]
    assert all(text.partition(": ")[2].strip() for text in row["skips"]), row["skips"]
    assert row["error"] < row["rounding"] or not row["quantized"]


@pytest.mark.parametrize("family", QUICK)
def test_three_families(family: str) -> None:
    row = row_of(family)
    assert_right(row)
    assert row["coverage"] == 1.0 and row["quantized"]
    assert row.get("generate") == (None if family == "bert" else "same")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All of them take an hour, so only where they are asked for."""
    if "any_family" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--families")
        metafunc.parametrize("any_family", models.families() if wanted else [])


@pytest.mark.slow
def test_every_family(any_family: str) -> None:
    family = any_family
    row = row_of(family)
    if row["status"] in (check.EAGER, check.TORCH, check.LATE, check.UNSTABLE):
        pytest.skip(f"{row['status']}: {row['reason']}")
    assert_right(row)
