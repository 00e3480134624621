"""What the store is told of a weight's rounding: a method that needs no data, or planes that calibration made of it.

Knows families and schemes; the store keeps one ``Rounding`` for each Parameter and asks ``planes_of`` where it packs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from quant_compile.ir.errors import WeightError
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.rounding.search import searched

AUTO, NEAREST, SEARCH = "auto", "nearest", "search"
ROUNDINGS = (AUTO, NEAREST, SEARCH)
# What a policy that says nothing gets.
DEFAULT = AUTO
# Of a weight on a CPU, above which ``auto`` is nearest: a search takes about fifteen times as long, there a second for each.
AUTO_LARGEST_ON_CPU = 1 << 24


@dataclass(frozen=True)
class Rounding:
    """How the planes of one weight are made of its values; two that are equal make the same.

    Attributes:
        method: one of ``ROUNDINGS``, or the name of what made ``planes``.
        token: of the planes' file, so that others are not taken for these.
        planes: ``(scheme, expert or None) -> planes`` in row form on the CPU; None: by ``method``.
    """

    method: str = NEAREST
    token: str = ""
    planes: Callable[[Scheme, int | None], Planes] | None = field(default=None, compare=False)

    def label(self, scheme: Scheme, w: Tensor) -> str:
        """What a ledger says; empty for nearest."""
        if self.planes is None and (family_of(scheme).grid(w[:1] if w.dim() == 2 else w[0, :1], scheme) is None):
            return ""
        found = self.method if self.method != AUTO else _auto(w.numel() // (w.shape[0] if w.dim() == 3 else 1), w)
        return "" if found == NEAREST else f"rounding: {found}"


def _auto(numel: int, w: Tensor) -> str:
    return NEAREST if w.device.type == "cpu" and numel > AUTO_LARGEST_ON_CPU else SEARCH


def planes_of(w: Tensor, scheme: Scheme, rounding: Rounding, expert: int | None = None) -> Planes:
    """[n, k] -> planes in row form, on its device.

    Raises:
        WeightError: planes that were made for another size.
    """
    family = family_of(scheme)
    if rounding.planes is not None:
        planes = tuple(plane.to(w.device) for plane in rounding.planes(scheme, expert))
        wanted = [(spec.shape, spec.dtype) for spec in family.weight_planes(scheme, *w.shape, w.dtype)]
        if [(tuple(plane.shape), plane.dtype) for plane in planes] != wanted:
            raise WeightError(
                f"planes by {rounding.method} are of another size, dtype or scheme than a weight {tuple(w.shape)} {w.dtype}.\n"
                "Fix: quant_compile.calibrate(model, batches, policy) makes them for this model."
            )
        return planes
    method = rounding.method if rounding.method != AUTO else _auto(w.numel(), w)
    return searched(w, scheme) if method == SEARCH else family.quantize_weight(w, scheme)
