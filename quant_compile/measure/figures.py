"""matplotlib, where it is: the one place that asks for it."""

from __future__ import annotations

from typing import Any

from quant_compile.ir.errors import MissingLibraryError


def figure_class(fix: str = "pip install matplotlib") -> Any:
    """matplotlib's Figure.

    Args:
        fix: what the error says is to be done.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingLibraryError(f"plots need matplotlib. Fix: {fix}.") from None
    return Figure
