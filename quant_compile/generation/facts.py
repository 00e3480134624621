"""What transformers calls things, and when ``generate`` must go transformers' own way.

The only module that reads names of transformers' internals; what is missing in a version is a reason, never an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MODES = ("sample", "greedy_search", "beam_search", "beam_sample")
ATTENTIONS = ("sdpa", "eager")
CHOICES = ("cache_implementation", "compile_config", "prefill_chunk_size")
NEEDED = ("_prepare_cache_for_generation", "prepare_inputs_for_generation", "_get_static_cache_init_shape")


def mixin(model: nn.Module) -> type[Any] | None:
    """transformers' GenerationMixin, if the model has it; without importing transformers."""
    return next((kind for kind in type(model).__mro__ if kind.__name__ == "GenerationMixin"), None)


def cache_name(kind: type[Any]) -> str:
    """The argument of models that is a cache: ``past_key_values``, from transformers 5.2x on ``cache``."""
    return "cache" if "cache" in inspect.signature(kind.prepare_inputs_for_generation).parameters else "past_key_values"


class LayerShape(NamedTuple):
    """Heads and head size of what a layer of a cache keeps of keys, and of values."""

    heads: int
    size: int
    value_heads: int
    value_size: int


def cache_shape(model: Any) -> list[LayerShape] | None:
    """What each layer of the decoder's cache keeps; None if neither transformers knows it nor a look at the model tells.

    A cache of another shape would be an error in the middle of a call, so the sizes are compared with those of key projections.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    given = model._get_static_cache_init_shape()
    if given is not None:
        heads, sizes = (part if isinstance(part, list | tuple) else [part] * count for part in given)
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        found = {m.out_features for m in _key_projections(decoder)}
        if found <= {h * size for h, size in zip(heads, sizes, strict=True)}:
            return [LayerShape(h, size, h, size) for h, size in zip(heads, sizes, strict=True)]
    seen = _seen_shape(model)
    return None if seen is None else [seen] * count


def _seen_shape(model: Any) -> LayerShape | None:
    """What a model of this class with one layer and no weights gives its cache: of all layers, where they are of one class."""
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    try:
        config = deepcopy(model.config.get_text_config(decoder=True))
        config.num_hidden_layers, config.layer_types = 1, None
        with torch.device("meta"), torch.no_grad():
            small = type(model.get_decoder())(config).eval()
            watching = _watching()(config=config)
            with suppress(Exception):  # what comes after the first layer's attention need not run without values
                ids = torch.zeros(1, 1, dtype=torch.long)
                small(input_ids=ids, use_cache=True, **{cache_name(mixin(model) or type(model)): watching})
    except Exception:  # a class that is made otherwise
        return None
    alike = len({type(m) for m in _attentions(model)}) == 1
    return watching.seen if alike else None


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that have a layer's number, as attention that uses a cache has."""
    return (module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int))


@cache
def _watching() -> type[Any]:
    from transformers import DynamicCache

    class Watching(DynamicCache):
        seen: LayerShape | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            k, v = key_states.shape, value_states.shape
            self.seen = LayerShape(k[1], k[3], v[1], v[3]) if len(k) == len(v) == 4 else None
            return super().update(key_states, value_states, *args, **kwargs)

    return Watching


def kv_heads(model: Any, layers: int) -> list[int] | None:
    """Heads of K and V in each of so many layers; None if transformers does not say."""
    shape = cache_shape(model) if hasattr(model, "_get_static_cache_init_shape") else None
    return None if shape is None or len(shape) != layers else [layer.heads for layer in shape]


def _key_projections(decoder: nn.Module) -> Iterator[nn.Linear]:
    for name, module in decoder.named_modules():
        if name.rpartition(".")[2] in ("k_proj", "k") and isinstance(module, nn.Linear):
            yield module


def why_never(model: Any) -> str | None:
    """Why no call of this model's ``generate`` can have a cache of ours; None if it can."""
    kind = mixin(model)
    missing = [name for name in NEEDED if not hasattr(kind, name)]
    if missing:
        return f"this version of transformers has no {', '.join(missing)}"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not compile {type(model).__name__} over a static cache"
    if not model._supports_default_dynamic_cache():
        return f"{type(model).__name__} has a cache of its own kind"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1 or (getattr(model, "_tp_size", None) or 1) > 1:
        return "its layers are on several devices"
    dtypes = {p.dtype for p in model.parameters() if p.dim() > 1 and p.is_floating_point()}
    if len(dtypes) > 1:
        return f"its weights have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return None


def why_plain(model: Any, config: Any, mode: Any) -> str | None:
    """Why this call goes transformers' own way, though the user has not asked for that; None if it need not.

    Args:
        config: the call's generation config, with all arguments merged.
        mode: its generation mode.
    """
    if getattr(mode, "value", mode) not in MODES:
        return f"{getattr(mode, 'value', mode)} keeps a cache that grows"
    if config.is_assistant:
        return "an assistant takes tokens back from its cache"
    attention = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    if attention not in ATTENTIONS:
        return f"{attention} attention makes no masks of fixed size"
    if torch.is_autocast_enabled(model.device.type):
        return "under autocast the cache's dtype is not known before the first call"
    return None


def asked_for_plain(config: Any, kwargs: dict[str, Any], name: str) -> bool:
    """Whether a call's arguments choose a cache, or how to compile; what the user passes wins."""
    chosen = (*CHOICES, "disable_compile", "custom_generate", name, "past_key_values", "cache", "cache_params")
    if any(kwargs.get(key) is not None for key in chosen):
        return True
    return kwargs.get("use_cache") is False or (config is not None and chosen_by_config(config))


def chosen_by_config(config: Any) -> bool:
    """Whether a generation config names a cache, or turns ours off.

    ``disable_compile=True`` says nothing: a copy of the config of a compiled model has it, and pipelines pass such copies.
    """
    if any(getattr(config, key, None) is not None for key in CHOICES):
        return True
    return config.use_cache is False or config.disable_compile is False


def prompt_length(inputs: dict[str, Any]) -> int:
    """Tokens of the prompt as far as ``generate``'s prepared inputs tell; 0 if they do not."""
    for name in ("position_ids", "attention_mask"):
        value = inputs.get(name)
        if isinstance(value, torch.Tensor):
            return int(value.shape[-1])
    return 0
