"""A progress bar for the choice of kernels, which measures them and may compile them first; only where it takes seconds.

Writes to the terminal of standard error, and nowhere if that is none.
"""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any

SECONDS = 2.0


class Choosing:
    """Counts the sites of one graph whose kernels are chosen; the bar appears SECONDS after the first begins.

    Args:
        sites: how many there are; merged ones count when they are chosen, so that the bar may end early.
    """

    def __init__(self, sites: int) -> None:
        self._sites, self._done = sites, 0
        self._lock = threading.Lock()
        self._later: threading.Timer | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Choosing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._later is not None:
                self._later.cancel()
            if self._bar is not None:
                self._bar.stop()
            self._sites = 0

    def begins(self) -> None:
        """The choice for a site begins."""
        if self._later is None and sys.stderr.isatty():
            self._later = threading.Timer(SECONDS, self._show)
            self._later.daemon = True
            self._later.start()

    def ends(self) -> None:
        """It is made."""
        with self._lock:
            self._done += 1
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)

    def _show(self) -> None:
        with self._lock:
            if self._sites:
                self._start()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("sglquant: choosing kernels (measured once per GPU, then kept)"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=self._sites, completed=self._done)
        self._bar.start()
