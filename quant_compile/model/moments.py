"""Second moments of the inputs that a model's weights meet, E[x x^T] or its diagonal, of each expert its own.

Reads the calls of a model that runs eagerly; keeps sums in f32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant_compile.model.follow import Following, Meeting

ROWS = 8192  # of inputs in f32 at a time
PARTNERS = 2048  # rows whose distances to all others are held at a time
TIE = 1e-3  # of what is FAR, squared: distances that differ by less are equal
# A row that is further than this share of its norm from its pair is another one, and this share of rows may be.
FAR, OTHERS = 0.7, 0.05


@dataclass(frozen=True)
class Size:
    """What sums a weight needs.

    Attributes:
        experts: 0 for a matrix.
        k: inputs.
        shape: of the Parameter.
    """

    experts: int
    k: int
    shape: tuple[int, ...]

    def nbytes(self, whole: bool) -> int:
        """Of its sums; ``whole``: with what is beside the diagonal."""
        return 4 * max(1, self.experts) * self.k * (self.k if whole else 1)


class Enough(BaseException):
    """Ends a run whose every weight of interest has been met."""


class Seeing(Following):
    """Shows the inputs of some weights, rows [t, k] of a matrix or an expert at a time, and computes what the model does.

    Attributes:
        left: weights that are still to be met in this run, which ends with ``Enough`` behind the last; None: it goes on to its end.
    """

    def __init__(self, weights: Mapping[int, str], sizes: Mapping[str, Size]) -> None:
        super().__init__(weights)
        self.sizes = sizes
        self.left: set[str] | None = None

    def meet(self, meetings: list[Meeting]) -> Any:
        for found in meetings:
            size = self.sizes.get(found.made.weight)
            if size is not None:
                for expert, x in _rows(found, size):
                    self.see(found.made.weight, size, expert, x.detach())
            if self.left is not None:
                self.left.discard(found.made.weight)
        if self.left is not None and not self.left:
            raise Enough
        return meetings[0].call()

    def see(self, name: str, size: Size, expert: int, x: Tensor) -> None:
        """Rows that a weight met."""
        raise NotImplementedError


class Moments(Seeing):
    """Sums over the inputs of some weights.

    Attributes:
        sums: by name, [experts or 1, k, k] f32, or [experts or 1, k] of squares alone.
        tokens: by name, [experts or 1].
    """

    def __init__(self, weights: Mapping[int, str], sizes: Mapping[str, Size], whole: bool) -> None:
        super().__init__(weights, sizes)
        self.whole = whole
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    def see(self, name: str, size: Size, expert: int, x: Tensor) -> None:
        count = max(1, size.experts)
        if name not in self.sums:
            shape = (count, size.k, size.k) if self.whole else (count, size.k)
            self.sums[name] = torch.zeros(shape, dtype=torch.float32, device=x.device)
            self.tokens[name] = torch.zeros(count, dtype=torch.int64)
        into = self.sums[name][expert]
        for part in x.split(ROWS):
            rows = part.float()
            if self.whole:
                into.addmm_(rows.t(), rows)
            else:
                into.add_(rows.square().sum(0))
        self.tokens[name][expert] += x.shape[0]


class Rows(Seeing):
    """All rows of one batch that the weights met, in order.

    Args:
        room: bytes that rows may take; None: any number.

    Attributes:
        rows: by name and expert (0 of a matrix), each call's [t, k]; those of weights that read one input are there once. Nothing where the
            room was too small.
        taken: bytes that they take.
        full: the room was too small.
    """

    def __init__(self, weights: Mapping[int, str], sizes: Mapping[str, Size], room: int | None = None) -> None:
        super().__init__(weights, sizes)
        self.room, self.taken, self.full = room, 0, False
        self.rows: dict[tuple[str, int], list[Tensor]] = {}
        self._last: Tensor | None = None

    def see(self, name: str, size: Size, expert: int, x: Tensor) -> None:
        if self.full:
            return
        last = self._last
        if last is None or not _same(last, x):
            self._last = last = x.clone()  # the model may write over it
            self.taken += last.nbytes
        if self.room is not None and self.taken > self.room:
            self.full, self._last = True, None
            self.rows.clear()
            return
        self.rows.setdefault((name, expert), []).append(last)


def _same(last: Tensor, x: Tensor) -> bool:
    alike = (last.shape, last.dtype, last.device) == (x.shape, x.dtype, x.device)
    return alike and torch.equal(last, x)


class Pairs(Moments):
    """Sums over the inputs y that weights meet in a quantized model, and over those with the inputs x of the model itself.

    The two runs feed a matrix the same rows in the same order, or it has no pairs. An expert gets others, where the router chooses
    otherwise: rows are paired by what they are, and those without a partner are left out of all sums.

    Attributes:
        plain: of the batch that runs, what weights met in the model itself, as of ``Rows``; taken from as the batch runs.
        cross: by name, [experts or 1, k, k] f32, sums of x y^T; none of a matrix which the two runs did not meet with the same rows.
        apart: by name, [experts or 1, k] f32, sums of (x - y)^2, of the same rows.
    """

    def __init__(self, weights: Mapping[int, str], sizes: Mapping[str, Size]) -> None:
        super().__init__(weights, sizes, whole=True)
        self.plain: dict[tuple[str, int], list[Tensor]] = {}
        self.cross: dict[str, Tensor] = {}
        self.apart: dict[str, Tensor] = {}
        self.unlike: set[str] = set()

    def see(self, name: str, size: Size, expert: int, x: Tensor) -> None:
        rows = self.plain.get((name, expert))
        plain = rows.pop(0) if rows else None
        if size.experts:
            plain = x[:0] if plain is None else plain
            if bool(torch.isfinite(plain).all()) and bool(torch.isfinite(x).all()):
                ours, theirs = _partners(plain, x)
                plain, x = plain[ours], x[theirs]
            else:  # shows in the sums
                plain = x = torch.cat([plain, x])
        super().see(name, size, expert, x)
        if name in self.unlike:
            return
        if plain is None or not (size.experts or _alike(plain, x)):
            self.unlike.add(name)
            self.cross.pop(name, None)
            return
        into = self.cross.get(name)
        if into is None:
            into = self.cross[name] = torch.zeros_like(self.sums[name])
            self.apart[name] = torch.zeros(into.shape[:2], device=x.device)
        for before, part in zip(plain.split(ROWS), x.split(ROWS), strict=True):
            before, part = before.float(), part.float()
            into[expert].addmm_(before.t(), part)
            self.apart[name][expert] += (before - part).square().sum(0)


def _partners(plain: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of rows of either that are nearest to each other, and no further than FAR: two [pairs], by the rows of ``quantized``.

    Of rows that are there several times each gets a partner, since all of these are as near.
    """
    none = torch.zeros(0, dtype=torch.int64, device=quantized.device)
    if not len(plain) or not len(quantized):
        return none, none
    middle = plain.float().mean(0)  # what all rows share would hide what tells them apart
    y = quantized.float() - middle
    own, nearest, far = y.square().sum(-1), list[Tensor](), list[Tensor]()
    least, partner = torch.full_like(own, float("inf")), torch.zeros_like(own, dtype=torch.int64)
    for start, part in zip(range(0, len(plain), PARTNERS), plain.split(PARTNERS), strict=True):
        far.append(part.float().square().sum(-1) * FAR**2)
        x = part.float() - middle
        apart = x.square().sum(-1)[:, None] + own - 2 * (x @ y.t())
        nearest.append(apart.min(1).values)
        best = apart.min(0)
        better = best.values < least
        least, partner = torch.where(better, best.values, least), torch.where(better, best.indices + start, partner)
    limit = torch.cat(far)[partner]
    mutual = (least <= limit) & (least <= torch.cat(nearest)[partner] + TIE * limit)
    return partner[mutual], mutual.nonzero().squeeze(-1)


def _alike(plain: Tensor, quantized: Tensor) -> bool:
    """Whether two runs fed a weight the same rows: one that picks rows by their values may pick others, or in another order."""
    if plain.shape != quantized.shape:
        return False
    other = 0
    for x, y in zip(plain.split(ROWS), quantized.split(ROWS), strict=True):
        x, y = x.float(), y.float()
        other += int(((y - x).square().sum(-1) > FAR**2 * x.square().sum(-1)).sum())
    return other <= OTHERS * len(plain)


def _rows(found: Meeting, size: Size) -> Iterator[tuple[int, Tensor]]:
    """(expert, its inputs [t, k]); nothing where a product is of another form."""
    x = found.x.mT if found.swapped else found.x
    if x.shape[-1] != size.k:
        return
    if not size.experts:
        yield 0, x.reshape(-1, size.k)
        return
    experts = found.made.of(torch.arange(size.experts).view(-1, 1, 1).expand(size.shape))
    if experts.dim() == 2:
        yield int(experts[0, 0]), x.reshape(-1, size.k)
        return
    ids = experts[:, 0, 0].tolist()
    if found.rows is not None:
        ends = [0, *found.rows.tolist()]
        yield from ((e, x[a:b]) for e, a, b in zip(ids, ends, ends[1:], strict=False) if b > a)
    elif x.dim() == 3 and x.shape[0] == len(ids):  # an expert may be there for each of its tokens
        chosen = torch.tensor(ids, device=x.device)
        yield from ((e, x[chosen == e].reshape(-1, size.k)) for e in dict.fromkeys(ids))
