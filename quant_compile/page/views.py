"""What a graph does at one place, as data: drawn before and after, its kernels by m, what was joined, and what nearly was.

Holds no node and no tensor, and names weights from their layer on, so that layers alike have one view between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

KINDS = ("input", "op", "module", "weight", "quantize", "kernel", "fused")


@dataclass(frozen=True)
class Box:
    """One box of a drawing.

    Attributes:
        label: the operation, the module's class, or the weight's name from its layer on.
        shape: dtype and shape of its value, as in ``bf16[1, 16, 256]``; of several, one after the other.
        kind: one of KINDS: ``module`` stands for all that a module computes, ``fused`` for a kernel of our own that takes several
            operations, ``kernel`` for the one that multiplies.
        note: what else there is to say: layout of planes, kernels by m.
    """

    label: str
    shape: str = ""
    kind: str = "op"
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """Boxes in graph order, and edges between their positions, from value to reader."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]

    @staticmethod
    def of(data: Mapping[str, Any]) -> Drawing:
        """From what ``asdict`` gave."""
        boxes = tuple(Box(**box) for box in data["boxes"])
        return Drawing(boxes, tuple((start, end) for start, end in data["edges"]))


@dataclass(frozen=True)
class KernelTime:
    """The kernel for m rows.

    Attributes:
        m: rows of the input (tokens of an expert block).
        kernel: its name.
        microseconds: of one call; None: its own estimate is none here.
        measured: by the tuner on this GPU; else the kernel's estimate.
        floor: microseconds that the device's bandwidth or its rate of operations allows at best.
    """

    m: int
    kernel: str
    microseconds: float | None
    measured: bool
    floor: float

    @property
    def share(self) -> float | None:
        """Of the floor that it reaches: 1 is the best there can be; None where its time is not measured."""
        return self.floor / self.microseconds if self.measured and self.microseconds else None


@dataclass(frozen=True)
class SiteView:
    """One product of a graph, or several that one kernel runs.

    Attributes:
        weights: whose they are, from the layer on.
        before: as the model wrote it.
        after: as it runs; None: it stays as it is.
        times: by m, ascending; empty where it stays.
        fused: what was joined, in words.
        missed: what was nearly done, each with the reason why not.
        source: lines of the model's code, the innermost last: ``file:line in function: code``.
    """

    weights: tuple[str, ...]
    before: Drawing
    after: Drawing | None = None
    times: tuple[KernelTime, ...] = ()
    fused: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    source: tuple[str, ...] = ()

    @cached_property
    def joined(self) -> tuple[str, ...]:
        """What shares its kernel, and what was fused with it, in words."""
        return joined_of(self.weights, self.fused)

    @staticmethod
    def of(data: Mapping[str, Any]) -> SiteView:
        """From what ``asdict`` gave."""
        return SiteView(
            tuple(data["weights"]),
            Drawing.of(data["before"]),
            None if data["after"] is None else Drawing.of(data["after"]),
            tuple(KernelTime(**time) for time in data["times"]),
            *(tuple(data[name]) for name in ("fused", "missed", "source")),
        )


def joined_of(weights: tuple[str, ...], fused: tuple[str, ...]) -> tuple[str, ...]:
    """``SiteView.joined``, for those who draw nothing."""
    return ((f"one kernel for {' + '.join(weights)}",) if len(weights) > 1 else ()) + fused


def tail(name: str) -> str:
    """A qualified name from its layer on: ``model.layers.3.mlp.up_proj.weight`` -> ``mlp.up_proj.weight``."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)
