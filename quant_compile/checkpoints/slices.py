"""What a rank reads of a checkpoint: jobs of whole weights become jobs of this rank's parts, each stored tensor cut where the weight is.

How torch divides a weight says ``ir.shards``; which rows and columns a stored tensor's dimensions go with, and how many an item stands
for, says its format (``axes``). A cut that no item begins at is refused: planes are taken over as they are, or not at all. Readers see
a smaller weight and know nothing of ranks. Reads headers only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import NoReturn

from quant_compile.checkpoints.description import Description
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, Part
from quant_compile.checkpoints.formats import FORMATS
from quant_compile.checkpoints.names import Copy, ExpertBias, Experts, Job, Linear, Mapped, Slot, Stem
from quant_compile.checkpoints.weight import REAL, Axes, Axis, K, N
from quant_compile.ir.shards import Runs, Shard
from quant_compile.lowering.identity import local_of, shard_of

ONE_GPU = "or load it on one GPU."


def divided(mapped: Mapped, files: Files, description: Description) -> Mapped:
    """The jobs of this rank, of a model whose Parameters are distributed.

    Args:
        mapped: of whole weights; a dry pass has found their tensors to be of their formats.

    Raises:
        CheckpointError: a part's bounds lie inside of what a format stores as one item, or are not known to its reader.
    """
    slicer = _Slicer(files, description)
    return replace(mapped, jobs=tuple(slicer.of_rank(job) for job in mapped.jobs))


@dataclass(frozen=True)
class _Cut:
    """What a rank has of one dimension of a weight.

    Attributes:
        runs: of it.
        size: of the whole weight's.
    """

    runs: Runs
    size: int

    @property
    def is_all(self) -> bool:
        """Whether nothing is cut."""
        return self.runs == ((0, self.size),)

    @property
    def local(self) -> int:
        """How much it has."""
        return sum(last - first for first, last in self.runs)

    def within(self, first: int, last: int) -> _Cut:
        """The same of that part of the dimension."""
        found = tuple((a, b) for a, b in self.runs if a < last and b > first)
        return _Cut(tuple((max(a, first) - first, min(b, last) - first) for a, b in found), last - first)


@dataclass(frozen=True)
class _Slicer:
    files: Files
    description: Description

    def of_rank(self, job: Job) -> Job:
        """A job of this rank's part of the weight."""
        shard = shard_of(job.slot.tensor)
        slot = replace(job.slot, tensor=local_of(job.slot.tensor))
        if shard is None or not shard.cuts:
            return replace(job, slot=slot)
        if isinstance(job, Copy):
            return Copy(slot, self._copied(job, shard))
        if isinstance(job, Linear):
            rows, columns = _cuts(shard, job.transposed)
            return replace(job, slot=slot, stem=self._stem(job.stem, rows, columns, slot))
        return self._experts(job, slot, shard) if isinstance(job, Experts) else self._biases(job, slot, shard)

    def _copied(self, job: Copy, shard: Shard) -> Part:
        part = job.part
        for dim in sorted({cut for cut, _, _ in shard.cuts}):
            runs = shard.runs(dim)
            if dim == 0 and len(shard.shape) == 3 and len(runs) != 1:
                self._fail(
                    job.slot, f"its experts are divided as {shard.placements}", "Fix: whole experts for each rank"
                )
            part = part.cut(dim, runs)
        return part

    def _experts(self, job: Experts, slot: Slot, shard: Shard) -> Experts:
        rows, columns = _cuts(shard, job.transposed)
        own = [expert for first, last in shard.runs(0) for expert in range(first, last)]
        if job.alternates and not job.interleaved and not rows.is_all:
            self._fail(
                slot,
                "its rows of gate and up alternate, and those of the files do not: ranks' parts are not cut out of these",
                "Fix: expert parallelism, which gives each rank whole experts (ep_size of DistributedConfig)",
            )
        stems: list[tuple[Stem, ...]] = []
        for expert in own:
            start, made = 0, list[Stem]()
            for stem in job.stems[expert]:
                made.append(self._stem(stem, rows.within(start, start + stem.n), columns, slot))
                start += stem.n
            stems.append(tuple(made))
        return replace(job, slot=slot, stems=tuple(stems))

    def _biases(self, job: ExpertBias, slot: Slot, shard: Shard) -> ExpertBias:
        numbers = _Cut(shard.runs(1), shard.shape[1])
        if job.alternates and not numbers.is_all:
            self._fail(
                slot, "its numbers of gate and up alternate, and those of the files do not", "Fix: expert parallelism"
            )
        out: list[tuple[Part, ...]] = []
        for expert in [expert for first, last in shard.runs(0) for expert in range(first, last)]:
            size = shard.shape[1] // len(job.sources[expert])
            cuts = [numbers.within(i * size, (i + 1) * size) for i in range(len(job.sources[expert]))]
            parts = zip(job.sources[expert], cuts, strict=True)
            out.append(tuple(part if cut.is_all else part.cut(0, cut.runs) for part, cut in parts))
        return replace(job, slot=slot, sources=tuple(out))

    def _stem(self, stem: Stem, rows: _Cut, columns: _Cut, slot: Slot) -> Stem:
        """The tensors of a part of a linear's weight."""
        if rows.is_all and columns.is_all:
            return stem
        axes = self._axes(stem, slot)
        tensors = {
            suffix: self._part(part, axes.get(suffix, ()), rows, columns, slot) for suffix, part in stem.tensors.items()
        }
        column = columns.runs[0][0] if columns.runs else 0
        return Stem(stem.name, tensors, rows.local, columns.local, (stem.n, stem.k), column)

    def _axes(self, stem: Stem, slot: Slot) -> Axes:
        if set(stem.tensors) == {"weight"} and self.files.tensors[stem.tensors["weight"].name].dtype in REAL:
            return {"weight": (N, K)}
        stored = self.description.stored(stem.name)
        found = FORMATS[stored.format].axes(stored) if stored is not None else None
        if found is None:
            text = stored.text if stored is not None else "no known format"
            self._fail(
                slot,
                f"it is stored as {text}, of which no parts are read",
                "Fix: write it as compressed-tensors (sglquant convert SRC DST)",
            )
        return found

    def _part(self, part: Part, axes: tuple[Axis, ...], rows: _Cut, columns: _Cut, slot: Slot) -> Part:
        """What a rank has of one tensor."""
        info = part.info(self.files.tensors[part.name])
        for dim, (axis, items) in enumerate(zip(axes, info.shape, strict=False)):
            cut = rows if axis.of == "n" else columns
            runs = None if cut.is_all else _items(axis, cut, items)
            if isinstance(runs, str):
                self._fail(
                    slot,
                    f"{part.name} {runs}",
                    "Fix: fewer ranks, a checkpoint with smaller groups (or without zero points, where these are cut)",
                )
            if runs is not None and runs != ((0, items),):
                part = part.cut(dim, runs)
        return part

    def _fail(self, slot: Slot, what: str, fix: str) -> NoReturn:
        raise CheckpointError(f"{self.files.folder}: {slot.name} is divided among ranks, and {what}.\n{fix}, {ONE_GPU}")


def _cuts(shard: Shard, transposed: bool) -> tuple[_Cut, _Cut]:
    """What a rank has of rows and of columns."""
    last = len(shard.shape) - 1
    n, k = (last, last - 1) if transposed else (last - 1, last)
    return _Cut(shard.runs(n), shard.shape[n]), _Cut(shard.runs(k), shard.shape[k])


def _items(axis: Axis, cut: _Cut, items: int) -> Runs | str:
    """A rank's items of a tensor's dimension, or why its bounds are inside of one.

    Args:
        items: size of the dimension.
    """
    if items == cut.size:
        return cut.runs
    unit = axis.unit
    if unit is None or ceil(Fraction(cut.size) / unit) != items:
        if items == 1:  # of the tensor, or of all rows or columns
            return ((0, 1),)
        return f"has {items} items for {cut.size} of {axis.of}, which its format does not say how to cut"
    out: list[tuple[int, int]] = []
    for first, last in cut.runs:
        low, high = Fraction(first) / unit, Fraction(last) / unit
        if last == cut.size:
            high = Fraction(items)
        if low.denominator != 1 or high.denominator != 1:
            return f"has an item for {unit} of {axis.of}, through which the part {first} to {last} of {cut.size} is cut"
        out.append((int(low), int(high)))
    return tuple(out)
