"""Notice that PEFT has merged an adapter into a weight, or taken it out again, so that its planes are made anew.

PEFT edits ``weight.data``, which torch records neither in the Parameter's version nor in its address. What tells is the layer
around the weight: the adapters that it says are merged, their scale, and the versions of their Parameters. Reads those; drops
planes in the store; changes nothing in the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from quant_compile.lowering.weights import STORE
from quant_compile.model.names import Owners

State = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Merges:
    """What PEFT's layers around some weights said of themselves.

    Attributes:
        layers: the layers, held weakly.
        states: of each, as it was.
    """

    layers: tuple[weakref.ref[nn.Module], ...] = ()
    states: tuple[State, ...] = ()

    @staticmethod
    def of(parameters: Iterable[Any]) -> Merges:
        """As ``notice`` saw them last."""
        seen = [found for p in parameters if (found := _SEEN.get(p)) is not None] if len(_SEEN) else []
        return Merges(
            tuple(layer for found in seen for layer in found.layers),
            tuple(state for found in seen for state in found.states),
        )

    def unchanged(self) -> bool:
        """Whether every layer says the same now."""
        return not self.layers or all(
            (found := layer()) is not None and _state(found) == state
            for layer, state in zip(self.layers, self.states, strict=True)
        )


_SEEN: Any = WeakTensorKeyDictionary()


def notice(parameters: Iterable[Parameter], owners: Owners) -> None:
    """Drop the planes of weights into which something was merged, or from which it was taken, since they were last seen."""
    for parameter in parameters:
        known = owners.names(parameter)
        tuners = known.tuners if known is not None else ()
        before: Merges | None = _SEEN.get(parameter)
        if not tuners and before is None:
            continue
        now = Merges(tuple(map(weakref.ref, tuners)), tuple(map(_state, tuners)))
        # A layer that is gone has left its adapter in the weight (``merge_and_unload``), or not (``unload``): nothing tells.
        changed = any(now.states) if before is None else before.states != now.states
        entry = STORE.peek(parameter)
        if changed and entry is not None and not entry.released:
            STORE.refresh([parameter])
        _SEEN[parameter] = now


def _state(layer: Any) -> State:
    """What is merged into a layer's weight; empty for nothing."""
    merged = tuple(layer.merged_adapters)
    if not merged:
        return ()
    adapters = [p for name, part in layer.named_children() if name != "base_layer" for p in part.parameters()]
    versions = tuple(None if p.is_inference() else p._version for p in adapters)
    return (*merged, str(getattr(layer, "scaling", None)), versions)
