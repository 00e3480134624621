"""GPTQ: codes chosen one input after the other, each error spread over the inputs that are still to come.

Source: Frantar et al. 2022, arXiv 2210.17323. Inputs are taken as they lie, so that no kernel sees an order, and a group's scale is
searched for when its first input is reached, over what the errors before it have made of its weights. Taking inputs by size, with scales
chosen beforehand, was tried and is worse on groups of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.rounding.search import best, grouped, positive

BLOCK = 128
DAMPING = 0.01
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
    size, k = grid.size, w.shape[1]
    diagonal = moments.diagonal().clone()
    if not _finite(moments) or not bool(diagonal.max() > 0):
        return None
    weights = positive(diagonal)
    backwards = _inverse_factor(moments, diagonal.mean())
    if backwards is None:
        return None
    values = w.to(torch.float32, copy=True)
    chosen: list[Planes] = []
    own: Planes = ()
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, errors = values[:, start:stop], values.new_empty((w.shape[0], stop - start))
        upper = backwards[k - stop : k - start].flip(0, 1)
        factor = upper[:, start:stop]
        for i in range(stop - start):
            at = start + i
            if at % size == 0:
                end = min(at + size, k)
                scales, _ = best(grid, grouped(values[:, at:end], size), grouped(weights[None, at:end], size))
                chosen.append(scales)
                own = tuple(plane.squeeze(-1) for plane in scales)
            column = block[:, i : i + 1]
            rounded = grid.values(column, own)
            error = (column - rounded) / factor[i, i]
            errors[:, i : i + 1] = error
            block[:, i + 1 :].addr_(error[:, 0], factor[i, i + 1 :], alpha=-1)
            block[:, i : i + 1] = rounded
        values[:, stop:].addmm_(errors, upper[:, stop:], alpha=-1)
    return grid.planes(values, tuple(torch.cat(parts, 1) for parts in zip(*chosen, strict=True)))


def _inverse_factor(moments: Tensor, mean: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse of damped moments [k, k], read backwards; two such matrices are held, as k may be large.

    Read from its last input to its first, the matrix is M M^T with a lower M. Read forwards, M is an upper R, and the matrix R R^T: R^-1 is
    the factor, and M^-1 the factor read backwards. The inverse itself is never made.
    """
    damping, failed = DAMPING, moments.new_empty((), dtype=torch.int32)
    backwards, factor = moments.flip(0, 1), moments.mT  # columns first, as LAPACK's, or torch makes a third
    while damping <= MOST_DAMPING:
        backwards.diagonal().add_(damping * mean)
        torch.linalg.cholesky_ex(backwards, out=(factor, failed))
        if not bool(failed):
            inverse = backwards.zero_().fill_diagonal_(1.0)
            torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
            return inverse if _finite(inverse) else None
        damping *= 10
    return None


def _finite(matrix: Tensor) -> bool:
    """Whether all of a matrix in f32 is finite, told by a sum, which takes no memory."""
    return bool(torch.isfinite(matrix.sum(dtype=torch.float64)))
