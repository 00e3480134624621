"""Notice that a model's weights are no longer those that a CUDA graph was recorded with.

A recorded graph reads planes and parameters where they lay. ``Weights`` counts the changes: an update in place is seen at each
token; a Parameter that is replaced, or moved to other memory, when a call of ``generate`` begins.
"""

from __future__ import annotations

import weakref
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from quant_compile.lowering.weights import STORE

_VERSION = attrgetter("_version")


class Weights:
    """The Parameters and buffers of a model, and how often they have changed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._places: list[tuple[int, int]] = []
        self._watched: list[Tensor] = []
        self._versions: list[int] = []
        self._changes = 0

    def look(self, again: bool) -> None:
        """Compare all that a graph may read; at the start of a call.

        Args:
            again: modules may have been exchanged since the last look.
        """
        if again or not self._slots:
            self._slots = list(_slots(self._model()))
        held = [values[name] for values, name in self._slots]
        with torch._C.DisableTorchFunctionSubclass():
            places = [(id(t), 0 if t is None or _released(t) else t.data_ptr()) for t in held]
            if places != self._places:
                self._places = places
                self._changes += 1
                self._watched = [t for t in held if isinstance(t, Parameter) and not t.is_inference() and not _released(t)]
                self._versions = list(map(_VERSION, self._watched))

    def state(self) -> tuple[int, int]:
        """Counts that move when a weight is updated in place or planes are packed anew; cheap."""
        with torch._C.DisableTorchFunctionSubclass():
            versions = list(map(_VERSION, self._watched))
        if versions != self._versions:
            self._versions = versions
            self._changes += 1
        return self._changes, STORE.epoch


def _slots(model: nn.Module | None) -> Any:
    for module in model.modules() if model is not None else ():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    yield held, name


def _released(tensor: Tensor) -> bool:
    return type(tensor) is not Parameter and getattr(tensor, "released_by_sglquant", False)
