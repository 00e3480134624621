"""A block of transformers' FP8Experts in the place of which the model's own experts stand again, over the block's codes.

FP8Experts are one class for all architectures, whose ``forward`` calls kernels. What the architecture has in their place is found by making
the model once more, without weights; its rows and columns must be those of FP8Experts. Makes jobs for ``fill``; changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.checkpoints.files import Part
from quant_compile.checkpoints.library_modules import Holding, stays
from quant_compile.checkpoints.names import Experts, Slot, Stem
from quant_compile.ir.errors import QuantError
from quant_compile.ir.family import Reject
from quant_compile.model.weights import _stores_columns

# Endings of a block's tensors -> suffixes of the reader.
_ENDINGS = {"": "weight", "_scale_inv": "weight_scale_inv", "_activation_scale": "activation_scale"}


@dataclass
class Twins:
    """Makes the modules that a model would have without its quantization; the model is made once, at the first question."""

    model: nn.Module
    _made: nn.Module | str | None = field(default=None)

    def of(self, name: str) -> nn.Module | Reject:
        """The module of this name, Parameters on the meta device."""
        if self._made is None:
            self._made = self._make()
        if isinstance(self._made, str):
            return stays(self._made)
        try:
            return self._made.get_submodule(name)
        except AttributeError:
            return stays(f"{type(self.model).__name__} has no {name} of its own")

    def _make(self) -> nn.Module | str:
        model: Any = self.model
        try:
            config = copy.deepcopy(model.config)
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config
            with torch.device("meta"):
                return type(model)._from_config(config, dtype=torch.get_default_dtype())
        except QuantError:
            raise
        except Exception as error:  # whatever a model's own code raises
            why = (str(error).splitlines() or [""])[0][:200]
            return f"{type(model).__name__} cannot be made without weights ({type(error).__name__}: {why})"


def jobs_of(name: str, twin: nn.Module, held: Holding, dtype: torch.dtype) -> list[Experts] | Reject:
    """A job for each weight of a block.

    Args:
        name: of the block's module.
        twin: the model's own module; its Parameters become those of ``dtype``.
        held: FP8Experts' tensors, which the jobs name ``<name>.<attribute>``.
        dtype: of the model.
    """
    codes = {key: t for key, t in held.tensors.items() if f"{key}_scale_inv" in held.tensors}
    own = {key: p for key, p in twin._parameters.items() if p is not None}
    if _stores_columns(twin) or not getattr(twin, "is_concatenated", True):
        return stays(f"{type(twin).__name__} has its experts in another order than FP8Experts")
    shapes = {key: tuple(p.shape) for key, p in own.items()}
    if shapes != {key: tuple(t.shape) for key, t in codes.items()}:
        return stays(f"{type(twin).__name__} has {_text(shapes)} and not the sizes of FP8Experts")
    jobs: list[Experts] = []
    for key, parameter in own.items():
        full = f"{name}.{key}"
        meta = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="meta"), requires_grad=False)
        slot = Slot(full, meta, ((twin, key),), (full,))
        stems = _stems(full, held.tensors, key, 2 if key.startswith("gate_up") else 1)
        jobs.append(Experts(slot, stems, False, False, False))
    return jobs


def _stems(full: str, held: Mapping[str, Tensor], key: str, parts: int) -> tuple[tuple[Stem, ...], ...]:
    """Gate and up of each expert, or its one weight: a tensor that has rows is cut into ``parts`` of them."""
    count, n, k = held[key].shape
    tensors = {suffix: ending for ending, suffix in _ENDINGS.items() if f"{key}{ending}" in held}
    out: list[tuple[Stem, ...]] = []
    for expert in range(count):
        stems: list[Stem] = []
        for part in range(parts):
            own: dict[str, Part] = {}
            for suffix, ending in tensors.items():
                rows = _share(held[f"{key}{ending}"].shape, part, parts)
                own[suffix] = Part(f"{full}{ending}", expert, rows=rows)
            stems.append(Stem(f"{full}.{expert}", own, n // parts, k))
        out.append(tuple(stems))
    return tuple(out)


def _share(shape: Sequence[int], part: int, parts: int) -> tuple[int, int] | None:
    """Rows of gate or of up in a tensor of all experts."""
    if parts == 1 or len(shape) < 2 or shape[1] % parts:
        return None
    rows = shape[1] // parts
    return part * rows, (part + 1) * rows


def _text(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items()) or "no weights"
