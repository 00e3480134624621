"""Scales by error: of each group the scale, out of those that its grid offers, under which rounding to nearest loses least.

The error is the sum of squares, weighted by how large inputs are where that is known. The best of the grid's choices is fitted to its own
codes (the scale of least squares, as HQQ and others do in turns with rounding) as long as that helps. Nothing is ever worse, by that
error, than the scale of nearest rounding, which is among the choices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Grid, Planes, family_of
from quant_compile.ir.numerics import by_row_chunks
from quant_compile.ir.scheme import Scheme

FITS = 2


def searched(w: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Planes:
    """[n, k] -> planes in row form; nearest ones where the scheme's scales cannot be chosen.

    Args:
        importance: [k] f32, not negative: what a squared error of each input's weight costs, E[x^2]; None: all alike.
    """
    family = family_of(scheme)
    grid = family.grid(w, scheme)
    if grid is None or not w.numel():
        return family.quantize_weight(w, scheme)
    k = w.shape[1]
    weights = None if importance is None else grouped(positive(importance)[None], grid.size)

    def chunk(rows: Tensor) -> Planes:
        parts = grouped(rows, grid.size)
        scales, values = best(grid, parts, weights)
        return grid.planes(values.flatten(1)[:, :k], scales)

    return by_row_chunks(w, 1, chunk)


def grouped(w: Tensor, size: int) -> Tensor:
    """[n, k] -> [n, g, size] f32, zeros past k."""
    return pad(w, (0, -w.shape[1] % size)).float().unflatten(1, (-1, size))


def positive(importance: Tensor) -> Tensor:
    """Weights of mean one; inputs that were never seen count a little, so that their weights do not become anything at all."""
    mean = importance.mean()
    return torch.where(mean > 0, importance / mean, 1.0).clamp_min(1e-3)


def best(grid: Grid, w: Tensor, importance: Tensor | None) -> tuple[Planes, Tensor]:
    """Scales of least error, and the values under them.

    Args:
        w: [n, g, size] f32.
        importance: [1 or n, g, size] f32.
    """
    kept: _Kept | None = None
    for scales in grid.choices(w):
        kept = _better(grid, w, importance, scales, kept)
    assert kept is not None
    for _ in range(FITS):
        values = grid.values(w, kept.scales)
        weighted = values if importance is None else values * importance
        size = (weighted * values).sum(-1, keepdim=True)
        factor = (weighted * w).sum(-1, keepdim=True) / size
        fitted = grid.scaled(kept.scales, torch.where((size > 0) & (factor > 0), factor, 1.0))
        if fitted is None:
            break
        kept = _better(grid, w, importance, fitted, kept)
    return kept.scales, grid.values(w, kept.scales)


class _Kept(NamedTuple):
    error: Tensor
    scales: Planes


def _better(grid: Grid, w: Tensor, importance: Tensor | None, scales: Planes, kept: _Kept | None) -> _Kept:
    """Of each group the better of two scales."""
    difference = grid.values(w, scales).sub_(w).square_()
    error = (difference if importance is None else difference.mul_(importance)).sum(-1, keepdim=True)
    if kept is None:
        return _Kept(error, scales)
    better = error < kept.error
    chosen = tuple(torch.where(better, new, old) for new, old in zip(scales, kept.scales, strict=True))
    return _Kept(torch.where(better, error, kept.error), chosen)
