"""transformers' static caches as the pool keeps them: made before the first call, reset in place, grown, copied for a user.

Two things differ from transformers' own. A cache that holds nothing says so with a Python 0, so that a compiled prefill may attend
to the prompt alone; and its length is read from its tensors, so that one graph serves caches of every length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as once
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Types:
    """transformers' classes and ours over them."""

    static: type[Any]
    pair: type[Any]
    dynamic: type[Any]
    layers: dict[type[Any], type[Any]]


@once
def types() -> Types:
    """The classes, made when transformers is first needed."""
    from transformers.cache_utils import (
        DynamicCache,
        EncoderDecoderCache,
        StaticCache,
        StaticLayer,
        StaticSlidingWindowLayer,
    )

    class KeptCache(StaticCache):
        fresh = True

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return 0 if self.fresh else super().get_seq_length(layer_idx)

        def get_query_offset(self, layer_idx: int = 0) -> Any:
            return self.get_seq_length(layer_idx)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if not self.fresh:
                reorder(self, beam_idx)

    class KeptLayer(StaticLayer):
        @property
        def max_cache_len(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
            return self.keys.shape[-2]  # pyright: ignore[reportOptionalMemberAccess]

    class KeptSlidingLayer(StaticSlidingWindowLayer):
        @property
        def max_cache_len(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
            return self.keys.shape[-2]  # pyright: ignore[reportOptionalMemberAccess]

    layers: dict[type[Any], type[Any]] = {StaticLayer: KeptLayer, StaticSlidingWindowLayer: KeptSlidingLayer}
    return Types(KeptCache, EncoderDecoderCache, DynamicCache, layers)


def make(config: Any, shape: tuple[Any, Any], batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A cache of a decoder whose tensors exist; None where transformers uses layers that cannot be made beforehand.

    Args:
        shape: heads and head size, each a number or one for each layer.
    """
    kinds = types()
    # Ordinary tensors, whatever mode the caller is in: inference tensors could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        made = kinds.static(config=config, max_cache_len=length)
        if any(type(layer) not in kinds.layers for layer in made.layers):
            return None
        made.early_initialization(batch_size=batch, num_heads=shape[0], head_dim=shape[1], dtype=dtype, device=device)
    for layer in made.layers:
        layer.__class__ = kinds.layers[type(layer)]
        vars(layer).pop("max_cache_len", None)
        for tensor in tensors_of(layer):
            vars(tensor).pop("_dynamo_static_input_type", None)
        for tensor in (layer.keys, layer.values):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
    return made


def parts(cache: Any) -> tuple[Any, ...]:
    """The decoder's own cache, and that of the encoder's states if there is one."""
    if isinstance(cache, types().pair):
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


def tensors_of(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """All that a layer holds."""
    return layer.keys, layer.values, layer.cumulative_length


def tensors(cache: Any) -> Iterator[Tensor]:
    """All that a cache holds."""
    for part in parts(cache):
        for layer in part.layers:
            yield from tensors_of(layer)


def reset(cache: Any) -> None:
    """Empty a cache in place; in few launches, since the first token waits for it."""
    torch._foreach_zero_(list(tensors(cache)))
    for part in parts(cache):
        part.fresh = True
        for layer in part.layers:
            if layer.is_sliding:
                layer.cumulative_length_int = 0
    for layer in getattr(cache, "is_updated", {}):  # whether the encoder's states are held
        cache.is_updated[layer] = False


def fill(cache: Any) -> None:
    """Tell a cache that it holds something from now on."""
    for part in parts(cache):
        part.fresh = False


def reorder(cache: Any, beams: Tensor) -> None:
    """Take over the rows of other beams; in place, so that CUDA graphs go on reading the right memory."""
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor.copy_(tensor.index_select(0, beams.to(tensor.device)))


def move(small: Any, large: Any, used: int) -> None:
    """Exchange the tensors of two caches of one model, having copied what the small one holds into the large one's.

    The small cache object goes on with the large tensors, the large one gets the small tensors.

    Args:
        used: tokens that are held.
    """
    for index, (own, others) in enumerate(zip(parts(small), parts(large), strict=True)):
        for mine, other in zip(own.layers, others.layers, strict=True):
            for name in ("keys", "values"):
                old, new = getattr(mine, name), getattr(other, name)
                count = min(used, old.shape[2]) if index == 0 else old.shape[2]
                new[:, :, :count].copy_(old[:, :, :count])
            other.cumulative_length.copy_(mine.cumulative_length)
            for name in ("keys", "values", "cumulative_length"):
                old, new = getattr(mine, name), getattr(other, name)
                setattr(mine, name, new)
                setattr(other, name, old)


def for_user(cache: Any, config: Any, used: int) -> Any:
    """A growing cache with copies of what a kept one holds: what transformers would have returned.

    Args:
        config: the decoder's.
        used: tokens that are held.
    """
    copies = [_grown(part, config, used if i == 0 else None) for i, part in enumerate(parts(cache))]
    return copies[0] if len(copies) == 1 else types().pair(*copies)


def _grown(part: Any, config: Any, used: int | None) -> Any:
    made = types().dynamic(config=config)
    for index, layer in enumerate(part.layers):
        count = layer.keys.shape[2] if used is None else min(used, layer.keys.shape[2])
        made.update(layer.keys[:, :, :count].clone(), layer.values[:, :, :count].clone(), index)
        if used is not None and hasattr(made.layers[index], "cumulative_length"):
            made.layers[index].cumulative_length = used
    return made


def sliding(cache: Any) -> list[Any]:
    """Layers that keep only their window."""
    return [layer for part in parts(cache)[:1] for layer in part.layers if layer.is_sliding]
