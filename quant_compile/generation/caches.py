"""transformers' static caches as the pool keeps them: made before the first call, reset in place, grown, copied for a user.

Two things differ from transformers' own. A cache that holds nothing says so with a Python 0, so that a compiled prefill may attend
to the prompt alone; and its length is read from its tensors, so that one graph serves caches of every length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as once
from typing import Any

import torch
from torch import Tensor

from quant_compile.generation import quantized
from quant_compile.generation.facts import LayerShape
from quant_compile.generation.quantized import Scales
from quant_compile.ir.errors import MissingScalesError
from quant_compile.ir.kv import CacheScheme
from quant_compile.rules import CacheRules


@dataclass(frozen=True)
class Kept:
    """How a cache keeps K and V.

    Attributes:
        schemes: of each layer, None for 16 bits; empty: all are.
        scales: fixed ones, for each layer.
    """

    schemes: tuple[CacheScheme | None, ...] = ()
    scales: Sequence[Scales | None] | None = None

    @staticmethod
    def by(rules: CacheRules | None, layers: Sequence[str], scales: Callable[[str], Scales | None]) -> Kept:
        """As a policy says of layers of such names.

        Args:
            scales: fixed ones of a layer.

        Raises:
            MissingScalesError: a layer's are fixed, and there are none.
        """
        if rules is None:
            return PLAIN
        schemes = tuple(map(rules.of, layers))
        if not any(schemes):
            return PLAIN
        found = [
            scales(name) if scheme and scheme.fixed else None for name, scheme in zip(layers, schemes, strict=True)
        ]
        for name, scheme, fixed in zip(layers, schemes, found, strict=True):
            if scheme is not None and scheme.fixed and fixed is None:
                raise MissingScalesError(
                    f"the policy keeps K and V of {name} as {scheme.name}, whose scales are fixed, and has none for it.\n"
                    f"Fix: policy = quant_compile.calibrate(model, batches, policy), or kv_cache: {scheme.dynamic.name}."
                )
        return Kept(schemes, found)

    @property
    def text(self) -> str:
        """For the report."""
        found = [scheme.name if scheme else "16 bits" for scheme in self.schemes]
        return ", ".join(f"{name} in {found.count(name)} of {len(found)} layers" for name in dict.fromkeys(found))


PLAIN = Kept()


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

    class KeptQuantizedLayer(quantized.types().static):
        @property
        def max_cache_len(self) -> int:
            return self.keys.shape[-2]

    class KeptQuantizedSlidingLayer(quantized.types().sliding):
        @property
        def max_cache_len(self) -> int:
            return self.keys.shape[-2]

    layers: dict[type[Any], type[Any]] = {
        StaticLayer: KeptLayer,
        StaticSlidingWindowLayer: KeptSlidingLayer,
        quantized.types().static: KeptQuantizedLayer,
        quantized.types().sliding: KeptQuantizedSlidingLayer,
    }
    return Types(KeptCache, EncoderDecoderCache, DynamicCache, layers)


def make(
    config: Any,
    shape: Sequence[LayerShape],
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    kept: Kept = PLAIN,
) -> Any:
    """A cache of a decoder whose tensors exist; None where transformers uses layers that cannot be made beforehand.

    Args:
        shape: of each layer.
        kept: how it keeps K and V.
    """
    kinds = types()
    # Ordinary tensors, whatever mode the caller is in: inference tensors could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        made = kinds.static(config=config, max_cache_len=length)
        if len(shape) != len(made.layers) or any(type(layer) not in kinds.layers for layer in made.layers):
            return None
        if kept.schemes:
            quantized.quantize_layers(made.layers, kept.schemes, kept.scales)
        for layer, (heads, size, value_heads, value_size) in zip(made.layers, shape, strict=True):
            sizes = (heads, 0, size), (value_heads, 0, value_size)
            layer.lazy_initialization(*(torch.zeros((batch, *one), dtype=dtype, device=device) for one in sizes))
    for layer in made.layers:
        for part in _parts_of(layer):
            part.__class__ = kinds.layers[type(part)]
            vars(part).pop("max_cache_len", None)
        for tensor in tensors_of(layer):
            vars(tensor).pop("_dynamo_static_input_type", None)
        for _, _, tensor in _planes(layer):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
    return made


def parts(cache: Any) -> tuple[Any, ...]:
    """The decoder's own cache, and that of the encoder's states if there is one."""
    if isinstance(cache, types().pair):
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


def _parts_of(layer: Any) -> tuple[Any, ...]:
    """A layer, and the one of its scales."""
    scales = getattr(layer, "scales", None)
    return (layer,) if scales is None else (layer, scales)


def _planes(layer: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """(owner, attribute, what is kept there of each token [B, H, L, ..])."""
    for part in _parts_of(layer):
        for name in ("keys", "values"):
            yield part, name, getattr(part, name)


def tensors_of(layer: Any) -> list[Tensor]:
    """All that a layer holds and writes."""
    return [getattr(part, name) for part in _parts_of(layer) for name in ("keys", "values", "cumulative_length")]


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
                for own in _parts_of(layer):
                    own.cumulative_length_int = 0
    for layer in getattr(cache, "is_updated", {}):  # whether the encoder's states are held
        cache.is_updated[layer] = False


def fill(cache: Any) -> None:
    """Tell a cache that it holds something from now on."""
    for part in parts(cache):
        part.fresh = False


def reorder(cache: Any, beams: Tensor) -> None:
    """Take over the rows of other beams; in place, so that CUDA graphs go on reading the right memory."""
    for layer in cache.layers:
        for _, _, tensor in _planes(layer):
            tensor.copy_(tensor.index_select(0, beams.to(tensor.device)))


def move(small: Any, large: Any, used: int) -> None:
    """Exchange the tensors of two caches of one model, having copied what the small one holds into the large one's.

    The small cache object goes on with the large tensors, the large one gets the small tensors.

    Args:
        used: tokens that are held.
    """
    for index, (own, others) in enumerate(zip(parts(small), parts(large), strict=True)):
        for layer, other_layer in zip(own.layers, others.layers, strict=True):
            for mine, other in zip(_parts_of(layer), _parts_of(other_layer), strict=True):
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
    """A growing cache with copies of what a kept one holds, in the model's dtype: what transformers would have returned.

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
        keys, values = layer.held() if isinstance(layer, quantized.Quantized) else (layer.keys, layer.values)
        made.update(keys[:, :, :count].clone(), values[:, :, :count].clone(), index)
        if used is not None and hasattr(made.layers[index], "cumulative_length"):
            made.layers[index].cumulative_length = used
    return made


def sliding(cache: Any) -> list[Any]:
    """Layers that keep only their window."""
    return [layer for part in parts(cache)[:1] for layer in part.layers if layer.is_sliding]
