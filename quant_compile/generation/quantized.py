"""transformers' static cache layers that keep codes and scales, and a cache made of them.

A layer quantizes what ``update`` gets, writes codes and scales, and returns what it holds as ``sglq.cache_values`` of them: right
wherever it is called, eager too, and what compiled attention reads past, to the codes themselves. Everything else, lengths, windows
and masks, is transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache as once
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir import ops
from quant_compile.ir.errors import OptionError
from quant_compile.ir.kv import BITS, HEAD, CacheScheme, encode, parse_cache
from quant_compile.lowering.target import Target

Scales = tuple[Tensor, Tensor]
"""Fixed scales of K and of V: [H] f32, or of one element."""


@dataclass(frozen=True)
class Types:
    """The classes over transformers' own."""

    static: type[Any]
    sliding: type[Any]
    cache: type[Any]

    @property
    def of(self) -> Mapping[type[Any], type[Any]]:
        """transformers' class of a layer -> ours."""
        return {kind.__mro__[2]: kind for kind in (self.static, self.sliding)}


class Quantized:
    """What the layers have in common; a mixin in front of a static layer of transformers."""

    scheme: CacheScheme
    fixed: Scales | None = None
    by_bits = False  # the device has no e4m3: its bytes are made and read by arithmetic on integers
    values_dtype: torch.dtype
    scales: Any = None  # a layer of the same kind, whose keys and values are the scales of tokens
    keys: Any
    values: Any
    cumulative_length: Any

    @staticmethod
    def over(layer: Any, scheme: CacheScheme, fixed: Scales | None) -> Any:
        """One that keeps codes, in the place of a layer of transformers that holds nothing yet and becomes the one of its scales."""
        kind = types().of[type(layer)]
        made: Any = object.__new__(kind)
        vars(made).update(vars(layer), scheme=scheme)
        if scheme.fixed:
            made.fixed = fixed
        else:
            made.scales = layer
            layer.cumulative_length = layer.cumulative_length.clone()
        return made

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the planes for K and V of such heads."""
        self.by_bits = self.scheme.format == "e4m3" and _lacks_e4m3(key_states.device)
        self.values_dtype = key_states.dtype
        given = key_states, value_states
        if self.fixed is not None:
            pairs = zip(self.fixed, given, strict=True)
            self.fixed = tuple(_spread(scale, self.scheme, x) for scale, x in pairs)  # type: ignore[assignment]
        codes = [x.new_empty((*x.shape[:2], 0, x.shape[3]), dtype=self.scheme.stored) for x in given]
        super().lazy_initialization(*codes)  # type: ignore[misc]
        if self.fixed is None:
            one = key_states.new_empty((*key_states.shape[:2], 0, 1), dtype=torch.float32)
            self.scales.lazy_initialization(one, one)

    @property
    def key_scale(self) -> Tensor:
        """[B, H, L, 1], or fixed [1, H or 1, 1, 1]."""
        return self.scales.keys if self.fixed is None else self.fixed[0]

    @property
    def value_scale(self) -> Tensor:
        """The same for values."""
        return self.scales.values if self.fixed is None else self.fixed[1]

    def _encoded(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.is_initialized:  # type: ignore[attr-defined]
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        k_scale, v_scale = self.fixed or (None, None)
        k, k_scale = encode(key_states, self.scheme, k_scale, self.by_bits)
        v, v_scale = encode(value_states, self.scheme, v_scale, self.by_bits)
        return k, v, k_scale, v_scale

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, given, kept in (("keys", key_states, self.keys), ("values", value_states, self.values)):
            found, wanted = (*given.shape[:2], given.shape[3]), (*kept.shape[:2], kept.shape[3])
            if found != wanted or given.device != kept.device:
                raise ValueError(
                    f"the cache holds {name} of (batch, heads, size) {wanted} on {kept.device} and got {found} on {given.device}. "
                    "Fix: a cache serves the model and the batch that it was made for; make another one."
                )

    def _check_room(self, count: int) -> None:
        """Where asking for the length costs nothing; elsewhere the write itself fails."""
        if torch.compiler.is_compiling() or self.keys.device.type != "cpu":
            return
        held, room = int(self.cumulative_length), self.keys.shape[-2]
        if held + count > room:
            raise ValueError(
                f"the cache holds {held} of {room} tokens, and {count} more do not fit. Fix: a longer cache."
            )

    def _decoded(self, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor]:
        format, dtype = BITS if self.by_bits else self.scheme.format, self.values_dtype
        return ops.cache_values(k, k_scale, format, dtype), ops.cache_values(v, v_scale, format, dtype)

    def held(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens that there is room for, in the model's dtype."""
        return self._decoded(self.keys, self.values, self.key_scale, self.value_scale)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[misc]
        if self.scales is not None:
            self.scales.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over the rows of other beams."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.scales is not None and self.scales.is_initialized:
            for name in ("keys", "values"):
                plane = getattr(self.scales, name)
                setattr(self.scales, name, plane.index_select(0, beam_idx.to(plane.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """As of transformers' static layers."""
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.scales is not None:
            self.scales.crop(tokens_to_remove)

    def offload(self) -> None:
        """To the CPU, scales too."""
        super().offload()  # type: ignore[misc]
        if self.scales is not None:
            self.scales.offload()

    def prefetch(self) -> None:
        """Back to the device."""
        super().prefetch()  # type: ignore[misc]
        if self.scales is not None:
            self.scales.prefetch()


@once
def types() -> Types:
    """The classes, made when transformers is first needed."""
    from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

    class QuantizedStaticLayer(Quantized, StaticLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            k, v, k_scale, v_scale = self._encoded(key_states, value_states)
            count = key_states.shape[-2]
            self._check_room(count)
            positions = torch.arange(count, device=self.keys.device) + self.cumulative_length
            self.cumulative_length.add_(count)
            self.keys.index_copy_(2, positions, k)
            self.values.index_copy_(2, positions, v)
            if self.scales is not None:
                self.scales.keys.index_copy_(2, positions, k_scale)
                self.scales.values.index_copy_(2, positions, v_scale)
            return self.held()

    class QuantizedSlidingLayer(Quantized, StaticSlidingWindowLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            k, v, k_scale, v_scale = self._encoded(key_states, value_states)
            count = self.cumulative_length_int
            k, v = StaticSlidingWindowLayer.update(self, k, v)
            if self.scales is None:
                return self._decoded(k, v, k_scale, v_scale)
            self.scales.cumulative_length_int = count  # a replayed step counts up the layer's own number alone
            k_scale, v_scale = self.scales.update(k_scale, v_scale)
            return self._decoded(k, v, k_scale, v_scale)

    class QuantizedStaticCache(StaticCache):
        """A StaticCache that keeps K and V as 8-bit codes.

        Args:
            config: of the model.
            max_cache_len: tokens that it holds.
            scheme: ``FP8`` (e4m3), ``FP8_E5M2`` or ``INT8``, one scale for each token and head; ``_HEAD`` and ``_TENSOR`` behind
                them: fixed scales.
            scales: (of K, of V) for each layer, f32 [heads] or one number, where scales are fixed.

        Raises:
            SchemeError: an unknown scheme.
            OptionError: a layer of another kind than static or sliding; fixed scales are missing.
        """

        def __init__(
            self, config: Any, max_cache_len: int, scheme: str | CacheScheme = "FP8", scales: Sequence[Scales] | None = None,
            **kwargs: Any,
        ) -> None:  # fmt: skip
            super().__init__(config=config, max_cache_len=max_cache_len, **kwargs)
            made = scheme if isinstance(scheme, CacheScheme) else parse_cache(scheme)
            quantize_layers(self.layers, [made] * len(self.layers), scales)

    return Types(QuantizedStaticLayer, QuantizedSlidingLayer, QuantizedStaticCache)


def quantize_layers(
    layers: list[Any], schemes: Sequence[CacheScheme | None], scales: Sequence[Scales | None] | None = None
) -> None:
    """Let layers that hold nothing yet keep codes; those without a scheme stay as they are.

    Raises:
        OptionError: a layer is of another kind, or its scheme needs scales that are not given; no layer has been changed.
    """
    for i, (layer, scheme) in enumerate(zip(layers, schemes, strict=True)):
        if scheme is None:
            continue
        if type(layer) not in types().of:
            raise OptionError(
                f"layer {i} of the cache is a {type(layer).__name__}, which cannot keep codes; {scheme.name} serves static and "
                "sliding layers. Fix: transformers' own StaticCache."
            )
        if scheme.fixed and (scales is None or i >= len(scales) or scales[i] is None):
            raise OptionError(
                f"{scheme.name} has fixed scales, and none are given for layer {i}. Fix: calibrate, or use {scheme.dynamic.name}."
            )
    for i, (layer, scheme) in enumerate(zip(layers, schemes, strict=True)):
        if scheme is not None:
            layers[i] = Quantized.over(layer, scheme, scales[i] if scheme.fixed and scales is not None else None)


def _spread(scale: Tensor, scheme: CacheScheme, x: Tensor) -> Tensor:
    """[heads] or one number -> [1, heads or 1, 1, 1] f32."""
    flat, wanted = scale.to(x.device, torch.float32).flatten(), x.shape[1] if scheme.scale == HEAD else 1
    if flat.numel() != wanted:
        raise OptionError(
            f"{scheme.name} has {wanted} scales for each of K and V of this model, and {flat.numel()} are given"
        )
    return flat.reshape(1, -1, 1, 1)


def _lacks_e4m3(device: torch.device) -> bool:
    return device.type == "cuda" and Target.of(device).arch < 89
