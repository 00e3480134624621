"""What the store is told of a weight's rounding: a method that needs no data, or planes that calibration made of it.

Knows families and schemes; the store keeps one ``Rounding`` for each Parameter and asks ``planes_of`` where it packs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant_compile.ir.errors import WeightError
from quant_compile.ir.family import Grid, Planes, family_of
from quant_compile.ir.numerics import checksum
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.rounding.gptq import compensated
from quant_compile.lowering.rounding.search import searched

AUTO, NEAREST, SEARCH, COMPENSATE = "auto", "nearest", "search", "compensate"
ROUNDINGS = (AUTO, NEAREST, SEARCH, COMPENSATE)
GPTQ, GPTAQ, AWQ, SMOOTHQUANT = "gptq", "gptaq", "awq", "smoothquant"
# Methods of ``calibrate``: the search weighted by E[x^2], GPTQ, GPTQ over what the quantized weights before make of inputs, and factors
# of inputs before one of these.
METHODS = (
    SEARCH,
    GPTQ,
    GPTAQ,
    *(f"{before}{step}" for before in (AWQ, SMOOTHQUANT) for step in ("", f"+{GPTQ}", f"+{GPTAQ}")),
)
# Metadata of a file of planes: JSON of each weight's scheme and method; a hash of all planes.
PLANES_OF, TOKEN = "planes_of", "token"
# In these metadata, of a weight whose inputs have factors: a hash of them, by which the file keeps them once.
FACTOR = "factor"
# What a policy that says nothing gets.
DEFAULT = AUTO
# Of a weight on a CPU, above which ``auto`` is a search and nearest: a search takes several times as long as nearest, compensation
# (whose products grow with a third power) several times as long as a search.
AUTO_COMPENSATED_ON_CPU, AUTO_LARGEST_ON_CPU = 1 << 20, 1 << 24


def uses(method: str | None, part: str) -> bool:
    """Whether a method is, or has as a step, ``part``."""
    return method is not None and part in method.split("+")


@dataclass(frozen=True)
class Factor:
    """What a weight's input is multiplied by before it is quantized, since its planes are those of the weight over this.

    Attributes:
        name: a hash of the values.
        read: gives them, [k] on the CPU, in the dtype of inputs.
    """

    name: str
    read: Callable[[], Tensor] = field(compare=False)


@dataclass(frozen=True)
class Rounding:
    """How the planes of one weight are made of its values; two that are equal make the same.

    Attributes:
        method: one of ``ROUNDINGS``, or the name of what made ``planes``.
        token: of the planes' file, so that others are not taken for these.
        planes: ``(scheme, expert or None) -> planes`` in row form on the CPU; None: by ``method``.
        checksums: of the values that these planes were made of, one for each expert.
        factor: of inputs, that these planes belong to; None: inputs come as they are.
    """

    method: str = NEAREST
    token: str = ""
    planes: Callable[[Scheme, int | None], Planes] | None = field(default=None, compare=False)
    checksums: tuple[int, ...] = ()
    factor: Factor | None = None

    def label(self, scheme: Scheme, w: Tensor) -> str:
        """What a ledger says; empty for nearest."""
        if self.planes is not None:
            return f"rounding: {self.method}"
        found = _found(self.method, scheme, w.numel() // (w.shape[0] if w.dim() == 3 else 1), w)
        return "" if found == NEAREST else f"rounding: {found}"


TO_NEAREST = Rounding()


def _grid(scheme: Scheme) -> Grid | None:
    return family_of(scheme).grid(torch.zeros(1, 256, dtype=torch.bfloat16), scheme)


@lru_cache(maxsize=None)
def searchable(scheme: Scheme) -> bool:
    """Whether a weight's scales and codes can be chosen otherwise than to nearest."""
    return _grid(scheme) is not None


@lru_cache(maxsize=None)
def has_choices(scheme: Scheme) -> bool:
    """Whether a search for scales has more than nearest's to choose from; MXFP4's has not."""
    grid = _grid(scheme)
    return grid is not None and len(list(grid.choices(torch.zeros(1, 256 // grid.size, grid.size)))) > 1


def plane_key(name: str, index: int) -> str:
    """Where a file of planes keeps plane ``index`` of a weight."""
    return f"{name}.plane{index}"


def factor_key(name: str) -> str:
    """Where a file of planes keeps the factors of inputs that are called ``name``."""
    return f"input_factor.{name}"


def token_of(path: Path) -> str:
    """The hash that a file of planes has in its header; ``absent`` where there is none."""
    try:
        with safe_open(str(path), "pt") as file:
            return (file.metadata() or {}).get(TOKEN, "")
    except (OSError, SafetensorError):
        return "absent"


def _found(method: str, scheme: Scheme, numel: int, w: Tensor) -> str:
    """What a method that needs no data is for a matrix of ``numel`` under a scheme."""
    if method == AUTO:  # without a choice of scales, compensation raised one bundled model's perplexity
        method = _auto(numel, w.device) if has_choices(scheme) else NEAREST
    usable = {SEARCH: has_choices, COMPENSATE: searchable}.get(method)
    return method if usable is None or usable(scheme) else NEAREST


def _auto(numel: int, device: torch.device) -> str:
    if device.type != "cpu":
        return SEARCH
    return COMPENSATE if numel <= AUTO_COMPENSATED_ON_CPU else SEARCH if numel <= AUTO_LARGEST_ON_CPU else NEAREST


def planes_of(w: Tensor, scheme: Scheme, rounding: Rounding, expert: int | None = None) -> Planes:
    """[n, k] -> planes in row form, on its device.

    Raises:
        WeightError: planes that were made of other values, or for another size.
    """
    family = family_of(scheme)
    if rounding.planes is not None:
        if checksum(w) != rounding.checksums[expert or 0]:
            raise WeightError(
                f"planes by {rounding.method} are not those of this weight: its values, or their dtype, were others when they were made.\n"
                "Fix: quant_compile.calibrate(model, batches, policy) with the model as it is now, or a policy without `planes`."
            )
        planes = tuple(plane.to(w.device) for plane in rounding.planes(scheme, expert))
        n, k = w.shape
        wanted = [(spec.shape, spec.dtype) for spec in family.weight_planes(scheme, n, k, w.dtype)]
        if [(tuple(plane.shape), plane.dtype) for plane in planes] != wanted:
            raise WeightError(
                f"planes by {rounding.method} are of another size, dtype or scheme than a weight {tuple(w.shape)} {w.dtype}.\n"
                "Fix: quant_compile.calibrate(model, batches, policy) makes them for this model."
            )
        return planes
    method = _found(rounding.method, scheme, w.numel(), w)
    if method == NEAREST:
        return family.quantize_weight(w, scheme)
    planes = compensated(w, scheme) if method == COMPENSATE else None
    return searched(w, scheme) if planes is None else planes
