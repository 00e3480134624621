"""A bar shows that kernels are being chosen, once that takes seconds and someone is watching."""

from __future__ import annotations

import io
import sys
import time

import pytest

from quant_compile.runtime import progress
from quant_compile.runtime.progress import Choosing


class Terminal(io.StringIO):
    """A standard error that someone watches."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def choose(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, seconds: float) -> str:
    """What is written while two sites are chosen, one of which takes so long."""
    monkeypatch.setattr(sys, "stderr", stream)
    with Choosing(2) as choosing:
        choosing.begins()
        time.sleep(seconds)
        choosing.ends()
        choosing.begins()
        choosing.ends()
    return stream.getvalue()


def test_it_appears_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    assert "choosing kernels" in choose(monkeypatch, Terminal(), 0.5)


def test_it_stays_away_when_it_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, Terminal(), 0.0) == ""


def test_no_terminal_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    assert choose(monkeypatch, io.StringIO(), 0.3) == ""


def test_an_error_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="no kernel"), Choosing(2) as choosing:
        choosing.begins()
        time.sleep(0.3)
        raise ValueError("no kernel")
    assert choosing._bar is not None and not choosing._bar.live.is_started
