"""The inputs of a decode step, kept at fixed addresses, and how they are made without transformers' help from the second token on.

transformers builds a 4-D mask for every token of a static cache, which takes the host longer than all else. Here the first token's
mask is kept, and each step writes what the next token may see into it: on the device, as a part of the recorded step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant_compile.generation import caches

IDS = ("input_ids", "decoder_input_ids")
EMBEDS = ("inputs_embeds", "decoder_inputs_embeds")
LENGTH_LAST = (*IDS, "position_ids", "decoder_position_ids", "token_type_ids", "mm_token_type_ids")
HIDDEN = ("hidden_states", "position_embeddings")
MASKS = ("attention_mask", "decoder_attention_mask")
BY_KIND = ("full_attention", "sliding_attention")


def tokens_in(inputs: Mapping[str, Any]) -> int:
    """How many tokens of each row a call has."""
    for name in (*IDS, *EMBEDS):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[1]
    return 0


def mark(name: str, value: Any) -> None:
    """Let Dynamo take an input's length for a variable, so that one graph serves every length of prompts, caches and encoders' states."""
    if name in MASKS and isinstance(value, dict):
        for mask in value.values():
            mark(name, mask)
    elif name == "encoder_outputs" and not isinstance(value, Tensor | None):
        mark(name, value[0])
    elif isinstance(value, Tensor):
        for dim in _lengths(name, value):
            if value.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(value, dim)


def marked(name: str, value: Any) -> Any:
    """The same, of another tensor over the same memory, so that the caller's stays as it is."""
    if isinstance(value, Tensor) and _lengths(name, value):
        value = value.detach()
    elif name in HIDDEN and isinstance(value, tuple):
        return tuple(marked(name, part) for part in value)
    elif name in MASKS and isinstance(value, dict):
        return {kind: marked(name, mask) for kind, mask in value.items()}
    mark(name, value)
    return value


def _lengths(name: str, value: Tensor) -> tuple[int, ...]:
    if name in LENGTH_LAST:
        return (value.dim() - 1,)
    if name in EMBEDS or name == "encoder_outputs":
        return (1,)
    if name in HIDDEN:
        return (value.dim() - 2,)
    if name in MASKS:
        return (2, 3) if value.dim() == 4 else (1,) if value.dim() == 2 else ()
    return ()


class Slot:
    """A tensor input: its fixed memory, and the tensor whose values it has now."""

    def __init__(self, value: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.buffer = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        self.source: Tensor | None = None
        self._version = -1
        self._shape, self._dtype, self._device = value.shape, value.dtype, value.device

    def accepts(self, value: Any) -> bool:
        """Whether a value fits."""
        if value is self.buffer or (value is self.source and value is not None):
            return True
        return (
            isinstance(value, Tensor)
            and value.shape == self._shape
            and value.dtype == self._dtype
            and value.device == self._device
        )

    def fill(self, value: Tensor) -> None:
        """Copy a value, unless it is there already."""
        if value is self.buffer:
            return
        seen = -1 if value.is_inference() else value._version
        if value is self.source and seen == self._version >= 0:
            return
        self.buffer.copy_(value)
        self.source, self._version = value, seen


class Fixed:
    """An input that is no tensor."""

    def __init__(self, value: Any) -> None:
        self.buffer = value

    def accepts(self, value: Any) -> bool:
        """Whether a step that was made with the one value serves the other."""
        return value is self.buffer or (type(value) is type(self.buffer) and _simple(value) and value == self.buffer)

    def fill(self, value: Any) -> None:
        """Nothing to do."""


class Several:
    """A dict, a tuple or a model's output with tensors inside."""

    def __init__(self, value: Any, items: dict[Any, Any], build: Callable[[dict[Any, Any]], Any]) -> None:
        self._kind, self.items = type(value), items
        self.buffer = build({name: item.buffer for name, item in items.items()})

    def accepts(self, value: Any) -> bool:
        """Whether the same members are there, and fit."""
        if value is self.buffer:
            return True
        if type(value) is not self._kind:
            return False
        found = _members(value)
        return found.keys() == self.items.keys() and all(self.items[name].accepts(item) for name, item in found.items())

    def fill(self, value: Any) -> None:
        """Copy each member."""
        if value is not self.buffer:
            for name, item in _members(value).items():
                self.items[name].fill(item)


def _simple(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | type(None))


def _members(value: Any) -> dict[Any, Any]:
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) is not None}
    return dict(value) if isinstance(value, Mapping) else dict(enumerate(value))


def slot_of(value: Any) -> Any:
    """The slot for a value; None if the value has parts that are no plain data."""
    if isinstance(value, Tensor):
        return Slot(value)
    if _simple(value):
        return Fixed(value)
    output = is_dataclass(value) and not isinstance(value, type)
    if not output and not (isinstance(value, dict | tuple | list)):
        return None
    items = {name: slot_of(item) for name, item in _members(value).items()}
    if any(item is None for item in items.values()):
        return None
    if output:
        return Several(value, items, partial(_output, type(value)))
    return Several(value, items, dict if isinstance(value, dict) else partial(_sequence, type(value)))


def _output(kind: Callable[..., Any], made: dict[Any, Any]) -> Any:
    return kind(**made)


def _sequence(kind: Callable[..., Any], made: dict[Any, Any]) -> Any:
    return kind(made.values())


def shape_of(value: Any) -> Any:
    """What two steps must have in common to share their slots; hashable."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if _simple(value):
        return type(value), value
    if isinstance(value, dict | tuple | list) or is_dataclass(value):
        return type(value), *((name, shape_of(item)) for name, item in _members(value).items())
    return type(value)


def leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, in dicts, sequences and models' outputs too; a cache's are left out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list) or (is_dataclass(value) and not isinstance(value, type)):
        for item in _members(value).values():
            yield from leaves(item)


@dataclass(frozen=True)
class Mask:
    """A 4-D mask [rows, 1, 1, length], and the layer of the cache that it is for."""

    buffer: Tensor
    visible: bool | float
    layer: int
    is_sliding: bool

    def advance(self, layers: list[Any], full: bool) -> None:
        """Let the next token see this one, after the step.

        Args:
            full: a sliding window that holds as many tokens as it can: its oldest one goes.
        """
        last = self.buffer.shape[-1] - 1
        if full and self.is_sliding:
            self.buffer.copy_(self.buffer.roll(-1, -1))
            self.buffer[..., last:].fill_(self.visible)
            return
        position = layers[self.layer].cumulative_length.view(1)
        self.buffer.index_fill_(3, position.clamp(max=last) if self.is_sliding else position, self.visible)


def masks_of(value: Any, cache: Any) -> list[Mask] | None:
    """The masks among a step's fixed inputs, if each step may write the next one's; None if there are others.

    Args:
        value: the step's mask: a tensor, a dict of them by kind of layer, or None.
    """
    layers = caches.parts(cache)[0].layers
    if value is None:
        return [] if not any(layer.is_sliding for layer in layers) else None
    if isinstance(value, Tensor):
        kinds = {layer.is_sliding for layer in layers}
        return None if len(kinds) > 1 else _known([_mask(value, kinds.pop(), layers)])
    if not isinstance(value, dict) or not set(value) <= set(BY_KIND):
        return None
    return _known([_mask(mask, kind == "sliding_attention", layers) for kind, mask in value.items()])


def _known(found: list[Mask | None]) -> list[Mask] | None:
    masks = [mask for mask in found if mask is not None]
    return masks if len(masks) == len(found) else None


def _mask(value: Any, is_sliding: bool, layers: list[Any]) -> Mask | None:
    at = next((i for i, layer in enumerate(layers) if layer.is_sliding == is_sliding), None)
    if at is None or not isinstance(value, Tensor) or value.dim() != 4 or value.shape[2] != 1:
        return None
    if value.shape[3] != layers[at].keys.shape[2] or not (value.dtype == torch.bool or value.is_floating_point()):
        return None
    return Mask(value, True if value.dtype == torch.bool else 0.0, at, is_sliding)
