"""What plots need: matplotlib, in the one place that asks for it, and a path that can be drawn to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant_compile.ir.errors import MissingLibraryError, OptionError

# What matplotlib writes here.
ENDINGS = (".png", ".svg", ".pdf")


def drawable(path: str | Path, alone: tuple[str, ...] = ()) -> Path:
    """A path that a plot can be written to; asked before anything is measured.

    Args:
        alone: endings that need no matplotlib.

    Raises:
        OptionError: its ending is none that is drawn, or its folder does not exist.
        MissingLibraryError: matplotlib is needed and not installed.
    """
    path = Path(path)
    if path.suffix not in (known := dict.fromkeys((*ENDINGS, *alone))):
        raise OptionError(f"{path} is no picture that is drawn here. Fix: a path that ends in {', '.join(known)}.")
    if not path.absolute().parent.is_dir():
        raise OptionError(
            f"the folder {path.absolute().parent} of {path.name} does not exist. Fix: make it, or another path."
        )
    if path.suffix not in alone:
        figure_class(alone)
    return path


def figure_class(alone: tuple[str, ...] = ()) -> Any:
    """matplotlib's Figure.

    Args:
        alone: endings that would need no matplotlib.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        other = f", or a path that ends in {' or '.join(alone)}" if alone else ""
        raise MissingLibraryError(f'plots need matplotlib. Fix: pip install "quant-compile[plot]"{other}.') from None
    return Figure
