"""GPTQ: codes chosen one input after the other, each error spread over the inputs that are still to come.

Source: Frantar et al. 2022, arXiv 2210.17323. Inputs are taken as they lie, so that no kernel sees an order, and a group's scale is
searched for when its first input is reached, over what the errors before it have made of its weights. Taking inputs by size, with scales
chosen beforehand, was tried and is worse on groups of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Grid, Planes, family_of
from quant_compile.ir.numerics import by_row_chunks, row_chunks
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.rounding.search import best, grouped, positive

BLOCK = 128
DAMPING = 0.01
# Of a weight's own moments, and how many inputs are rounded at once under them.
OWN_DAMPING, OWN_STEP = 2.0, 8
# Rows are independent of each other, and a head of a large vocabulary in f32 is several layers: these are 256 MiB.
ELEMENTS = 1 << 26
INVERTED = 1024  # rows of an inverse at a time
# Damping is raised until the matrix has a Cholesky factor; with this much it is all but diagonal.
MOST_DAMPING = 100.0


def gptq(w: Tensor, scheme: Scheme, moments: Tensor) -> Planes | None:
    """[n, k] -> planes in row form; None where the scheme's codes cannot be chosen, or the moments are of no use.

    Args:
        moments: [k, k] f32, the mean of x x^T over tokens; its memory is used.
    """
    grid = family_of(scheme).grid(w, scheme)
    if grid is None:
        return None
    weights = positive(moments.diagonal())
    upper = _inverse_factor(moments, DAMPING)
    return None if upper is None else _by_rows(w, grid, upper, weights, 1)


def corrected(w: Tensor, moments: Tensor, cross: Tensor, apart: Tensor, tokens: int) -> Tensor | None:
    """[n, k] -> the weight whose products with a quantized model's inputs y come nearest to w's with the model's own x, in w's dtype.

    It is W E[x y^T] E[y y^T]^-1, both damped alike, so that it is W where the inputs are the same. None: moments of no use.
    Source: Li et al. 2025, arXiv 2504.02692, which spreads the same difference while it rounds; here it is taken whole, before.

    That is a regression of x - y on y. Over t tokens, k inputs that have nothing to do with it seem to explain k/t of it, so of the change
    as large a share is made as what is explained exceeds that by (the adjusted R^2 over R^2). What the whole is counts x - y of each
    input by itself.

    Args:
        moments: [k, k] f32, E[y y^T].
        cross: [k, k] f32, E[x y^T]; its memory is used.
        apart: [k] f32, E[(x - y)^2].
        tokens: how many the means are of.
    """
    damping = DAMPING * moments.diagonal().mean()
    moments.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(moments)
    moments.diagonal().sub_(damping)
    change = cross.sub_(moments)
    if bool(failed) or not _finite(change):
        return None
    explained, whole = torch.zeros((), device=w.device), torch.zeros((), device=w.device)

    def rows(part: Tensor) -> Planes:
        values = part.float()
        product = values @ change
        found = torch.cholesky_solve(product.t(), factor).t()
        explained.add_((found * product).sum())
        whole.add_((values.square() * apart).sum())
        return (found.to(w.dtype),)

    (found,) = by_row_chunks(w, 1, rows, ELEMENTS)
    better = torch.add(w, found, alpha=_share(float(explained / whole), w.shape[1] / tokens))
    return better if _finite(better) else None


def _share(explained: float, chance: float) -> float:
    """The adjusted R^2 over R^2, of what is ``explained`` of a whole where ``chance`` alone would explain as much; 0 for no number."""
    if not explained > chance or chance >= 1:
        return 0.0
    explained = min(explained, 1.0)
    return (explained - chance) / (explained * (1 - chance))


def compensated(w: Tensor, scheme: Scheme) -> Planes | None:
    """[n, k] -> planes in row form, by no data; None where the scheme's codes cannot be chosen, or values are zero or not finite.

    Holds two matrices [k, k] in f32 besides some rows in f32.
    """
    grid = family_of(scheme).grid(w, scheme)
    if grid is None or not w.numel():
        return None
    moments = torch.zeros(w.shape[1], w.shape[1], device=w.device)
    for rows in row_chunks(w, 1, ELEMENTS):
        values = rows.float()
        moments.addmm_(values.t(), values)
    upper = _inverse_factor(moments, OWN_DAMPING)
    return None if upper is None else _by_rows(w, grid, upper, None, OWN_STEP)


def _by_rows(w: Tensor, grid: Grid, backwards: Tensor, weights: Tensor | None, step: int) -> Planes:
    return by_row_chunks(w, 1, lambda rows: _spread(rows, grid, backwards, weights, step), ELEMENTS)


def _spread(w: Tensor, grid: Grid, backwards: Tensor, weights: Tensor | None, step: int) -> Planes:
    """Inputs are rounded ``step`` at a time, and their errors spread over those to come.

    Args:
        backwards: factor of the inverse [k, k], as ``_inverse_factor`` gives it.
        weights: [k], what errors cost where scales are searched for; None: all alike.
        step: divides the grid's size, or the size is all of k.
    """
    size, k = grid.size, w.shape[1]
    values = w.to(torch.float32, copy=True)
    chosen: list[Planes] = []
    own: Planes = ()
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, errors = values[:, start:stop], values.new_empty((w.shape[0], stop - start))
        upper = backwards[k - stop : k - start].flip(0, 1)
        factor = upper[:, start:stop]
        for i in range(0, stop - start, step):
            at, j = start + i, min(i + step, stop - start)
            if at % size == 0:
                end = min(at + size, k)
                cost = None if weights is None else grouped(weights[None, at:end], size)
                scales, _ = best(grid, grouped(values[:, at:end], size), cost)
                chosen.append(scales)
                own = tuple(plane.squeeze(-1) for plane in scales)
            part = block[:, i:j]
            rounded = grid.values(part, own)
            error = _solved(part - rounded, factor[i:j, i:j])
            errors[:, i:j] = error
            block[:, j:].addmm_(error, factor[i:j, j:], alpha=-1)
            part.copy_(rounded)
        values[:, stop:].addmm_(errors, upper[:, stop:], alpha=-1)
    return grid.planes(values, tuple(torch.cat(parts, 1) for parts in zip(*chosen, strict=True)))


def _solved(difference: Tensor, factor: Tensor) -> Tensor:
    """X with X factor = difference [n, s], factor [s, s] upper."""
    if factor.shape[0] == 1:
        return difference / factor
    return torch.linalg.solve_triangular(factor, difference, upper=True, left=False)


def _inverse_factor(moments: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of the inverse of damped moments [k, k], read backwards; two such matrices are held, as k may be large.

    Read from its last input to its first, the matrix is M M^T with a lower M. Read forwards, M is an upper R, and the matrix R R^T: R^-1 is
    the factor, and M^-1 the factor read backwards. The inverse itself is never made. None: the moments are zero, or not finite.
    """
    if not _finite(moments) or not bool(moments.diagonal().max() > 0):
        return None
    mean, failed = moments.diagonal().mean(), moments.new_empty((), dtype=torch.int32)
    backwards, factor = moments.flip(0, 1), moments.mT  # columns first, as LAPACK's, or torch makes a third
    while damping <= MOST_DAMPING:
        backwards.diagonal().add_(damping * mean)
        torch.linalg.cholesky_ex(backwards, out=(factor, failed))
        if not bool(failed):
            return _inverted(factor, backwards)
        damping *= 10
    return None


def _inverted(lower: Tensor, into: Tensor) -> Tensor | None:
    """The inverse of a lower triangle, some rows at a time by those above them: a solve copies its triangle. None: not finite."""
    into.zero_().fill_diagonal_(1.0)
    for start in range(0, lower.shape[0], INVERTED):
        stop = min(start + INVERTED, lower.shape[0])
        rows = into[start:stop, :stop]
        rows[:, :start].addmm_(lower[start:stop, :start], into[:start, :start], alpha=-1)
        rows.copy_(torch.linalg.solve_triangular(lower[start:stop, start:stop], rows, upper=False))
    return into if _finite(into) else None


def _finite(matrix: Tensor) -> bool:
    """Whether all of a matrix is finite, told by its ends, which keep NaN; a sum in float64 would copy the matrix to float64 first."""
    return not matrix.numel() or bool(torch.isfinite(torch.stack(matrix.aminmax())).all())
