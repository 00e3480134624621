"""The codebooks of iq1, iq2 and iq3: points of a lattice that were chosen by hand, which no formula gives.

They come from the ``gguf`` package, when they are first asked for. A point is kept as one integer whose bytes are its coordinates.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.errors import MissingLibraryError

POINTS = {
    "iq2_xxs": 8, "iq2_xs": 8, "iq2_s": 8, "iq3_xxs": 4, "iq3_s": 4, "iq1_s": 8, "iq1_m": 8,
}  # fmt: skip
"""Coordinates of a point of each type's codebook."""


@lru_cache(maxsize=None)
def points(name: str) -> tuple[int, ...]:
    """The codebook of a type, each point's coordinates (int8, the first in the lowest byte) as one integer.

    Raises:
        MissingLibraryError: the ``gguf`` package is not there.
    """
    try:
        quants: Any = importlib.import_module("gguf.quants")
    except ImportError:
        raise MissingLibraryError(
            f"blocks of {name.upper()} are points of a codebook that the gguf package has, which is not installed.\nFix: pip install gguf"
        ) from None
    kind = getattr(quants, name.upper())
    kind.init_grid()
    rows = kind.grid.reshape(-1, POINTS[name]).astype("int8")
    return tuple(int(value) for value in rows.view(f"<i{POINTS[name]}").reshape(-1))


@torch.compiler.assume_constant_result
def _constant(name: str) -> tuple[int, ...]:
    return points(name)


def look_up(name: str, index: Tensor) -> Tensor:
    """[..., c] indices into a type's codebook -> [..., c * coordinates] f32."""
    kind = torch.int64 if POINTS[name] == 8 else torch.int32
    table = torch.tensor(_constant(name), dtype=kind, device=index.device)
    return table.index_select(0, index.flatten().to(torch.int32)).view(index.shape).view(torch.int8).float()
