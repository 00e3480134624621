"""A scheme family: the torch truth of a group of schemes, and the one registry of families.

A family says, in plain torch that runs on any device, what weights and inputs become (their planes), how planes become
numbers again, and what a linear over planes computes. Everything faster is tested against it. Each file in
``lowering/schemes`` registers one family.

Planes of a weight are always in *row form*: every plane's first dimension is n (or n in blocks), data first, scale second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from quant_compile.ir.errors import SchemeError
from quant_compile.ir.numerics import FLOAT_MAX
from quant_compile.ir.scheme import Scheme, add_presets

Planes = tuple[Tensor, ...]


@dataclass(frozen=True)
class Reject:
    """A refusal with its reason: matchers, rules, families and kernels answer with it instead of raising."""

    reason: str


@dataclass(frozen=True)
class PlaneSpec:
    """Name, shape and dtype of one plane, known without data (for plans on the meta device)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the plane."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Grid(Protocol):
    """The values that a weight can take under a scheme, for whoever chooses scales and codes otherwise than to nearest.

    ``w`` is f32 [n, g, size]: groups of inputs under one scale each. Scales are tensors [n, g, 1] f32 that the planes hold exactly;
    the first is positive or negative and multiplies.
    """

    @property
    def size(self) -> int:
        """Inputs under one scale."""
        ...

    def choices(self, w: Tensor) -> Iterator[Planes]:
        """Scales worth trying, those of ``quantize_weight`` first."""
        ...

    def scaled(self, scales: Planes, factor: Tensor) -> Planes | None:
        """The scales nearest to ``scales`` times a positive ``factor`` [n, g, 1]; None where they come in powers of two."""
        ...

    def values(self, w: Tensor, scales: Planes) -> Tensor:
        """The nearest value of each number, [n, g, size] or [n, g] under scales without their last dimension."""
        ...

    def planes(self, values: Tensor, scales: Planes) -> Planes:
        """Row form of values [n, k] that ``values`` gave."""
        ...


def _largest_code(scheme: Scheme) -> float:
    a = scheme.input_activations
    return FLOAT_MAX[a.format] if a is not None and a.format is not None else 127.0


@dataclass(frozen=True)
class Family:
    """The functions of a scheme family.

    Attributes:
        accepts: ``scheme -> None`` when the family implements it, else a Reject.
        weight_planes: ``(scheme, n, k, dtype) -> specs`` of the row form of a weight of this dtype.
        quantize_weight: ``(w [n, k], scheme) -> planes`` in row form, on w's device.
        dequantize_weight: ``(planes, scheme, k) -> [n, k] f32``.
        quantize_input: ``(x [..., k], scheme, scale | None) -> planes``; plain torch calls, traced into graphs.
        linear: ``(x planes, w planes, bias | None, scheme, dtype) -> [..., n] dtype``.
        row_block: rows that share a scale; a row range that is a multiple of it can be cut from the planes.
        largest_input: the magnitude that an input has under a calibrated scale of 1; calibration divides by it.
        takes_size: ``(scheme, n, k) -> None | Reject``: whether a weight [n, k] can have the scheme; one that cannot stays as it is.
        takes_values: ``(scheme, weight of any shape) -> None | Reject``: whether finite numbers can have the scheme; looks at them.
        quantizes: ``scheme -> None | Reject``: whether ``quantize_weight`` can be called; else planes come from a checkpoint alone.
        grid: ``(w [n, k], scheme) -> Grid | None``: how scales and codes of this weight can be chosen otherwise; None: they cannot.
    """

    name: str
    presets: Mapping[str, Scheme]
    accepts: Callable[[Scheme], Reject | None]
    weight_planes: Callable[[Scheme, int, int, torch.dtype], tuple[PlaneSpec, ...]]
    quantize_weight: Callable[[Tensor, Scheme], Planes]
    dequantize_weight: Callable[[Planes, Scheme, int], Tensor]
    quantize_input: Callable[[Tensor, Scheme, Tensor | None], Planes]
    linear: Callable[[Planes, Planes, Tensor | None, Scheme, torch.dtype], Tensor]
    row_block: Callable[[Scheme], int] = lambda scheme: 1
    largest_input: Callable[[Scheme], float] = _largest_code
    takes_size: Callable[[Scheme, int, int], Reject | None] = lambda scheme, n, k: None
    takes_values: Callable[[Scheme, Tensor], Reject | None] = lambda scheme, weight: None
    quantizes: Callable[[Scheme], Reject | None] = lambda scheme: None
    grid: Callable[[Tensor, Scheme], Grid | None] = lambda w, scheme: None


FAMILIES: list[Family] = []


def register_family(family: Family) -> Family:
    """Add a family and its presets; called once by each file of ``lowering/schemes``."""
    FAMILIES.append(family)
    add_presets(family.presets)
    family_of.cache_clear()
    bits_per_weight.cache_clear()
    return family


@lru_cache(maxsize=None)
def family_of(scheme: Scheme) -> Family:
    """The family that implements ``scheme``.

    Raises:
        SchemeError: none does; gives each family's reason.
    """
    reasons: list[str] = []
    for family in FAMILIES:
        answer = family.accepts(scheme)
        if answer is None:
            return family
        reasons.append(f"  {family.name}: {answer.reason}")
    raise SchemeError("\n".join([f"no scheme family implements {scheme.spec}", *reasons, "Fix: use a preset."]))


@lru_cache(maxsize=None)
def bits_per_weight(scheme: Scheme) -> float:
    """Bits stored per weight of a large bf16 weight, by its family's planes: codes, scales of groups or blocks, zero points.

    Scales per row are too few to show.

    Raises:
        SchemeError: no family implements the scheme.
    """
    size = 1 << 20
    planes = family_of(scheme).weight_planes(scheme, size, size, torch.bfloat16)
    return round(8 * sum(plane.nbytes for plane in planes) / size**2, 4)
