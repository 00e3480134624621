"""Fixed scales of a KV cache that came with a model, from the checkpoint that it was loaded from.

They are an attribute of the model, so that a deep copy has them too and they end with the model. Reads and writes nothing else of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from quant_compile.ir.kv import CacheScheme
from quant_compile.model.places import unwrap

MARK = "sglq_cache_scales"


@dataclass(frozen=True, eq=False)
class CacheScales:
    """Of one decoder layer.

    Attributes:
        scheme: that they were measured for; another one has other codes.
        k: of keys, f32 [heads] or [1], on the CPU.
        v: of values.
    """

    scheme: CacheScheme
    k: Tensor
    v: Tensor


def keep(model: nn.Module, scales: Mapping[str, CacheScales]) -> None:
    """Let a model have the scales of its layers, by name; none takes them away."""
    own = vars(unwrap(model))
    own.pop(MARK, None)
    if scales:
        own[MARK] = dict(scales)


def scales_of(model: nn.Module, layer: str, scheme: CacheScheme | None) -> tuple[Tensor, Tensor] | None:
    """Those of a layer's K and V under a scheme; None where the model has none for it."""
    found: CacheScales | None = vars(unwrap(model)).get(MARK, {}).get(layer)
    return (found.k, found.v) if found is not None and found.scheme == scheme else None
