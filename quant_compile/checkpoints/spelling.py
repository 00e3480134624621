"""Names in files and names in the model, both ways, as transformers maps them for an architecture.

Reads transformers' mapping of the model's class; for models that are not its own, names in files are those of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

# What an expert's parts are called where transformers maps no names.
PARTS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",),
}  # fmt: skip
_PART = re.compile(r"\.\*\.(\w+)\.weight$")
# Operations that leave every expert's rows as they are.
_STACKING = ("MergeModulelist", "Concatenate")


def names_from_file(model: nn.Module) -> Callable[[str], str]:
    """transformers' renamings of this architecture's older names; the identity for other models."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings: list[Any] = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]  # type: ignore[arg-type]
    except (ImportError, AttributeError):
        return lambda name: name
    return lambda name: rename_source_key(name, renamings, [])[0]


def names_in_file(model: nn.Module) -> Callable[[str], str]:
    """What ``save_pretrained`` calls a tensor of this model; the identity for other models."""
    try:
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamings: list[Any] = [t.reverse_transform() for t in _mapping(model)[::-1] if isinstance(t, WeightRenaming)]
    except (ImportError, AttributeError):
        return lambda name: name
    return lambda name: apply_renamings(name, renamings)


def expert_parts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Attribute of a block's module -> names of the tensors that an expert has for it in files: gate before up.

    Empty where files hold the block's weights as the model does.
    """
    out: dict[str, tuple[str, ...]] = {}
    try:
        from transformers.core_model_loading import WeightConverter

        converters: list[Any] = [t for t in _mapping(model) if isinstance(t, WeightConverter)]
    except (ImportError, AttributeError):
        return out
    for converter in converters:
        found = [_PART.search(pattern) for pattern in converter.source_patterns]
        target = converter.target_patterns[0].rpartition(".")[2]
        stacks = all(type(operation).__name__ in _STACKING for operation in converter.operations)
        if target in PARTS and stacks and len(found) == len(PARTS[target]) and all(found):
            out[target] = tuple(part[1] for part in found if part is not None)
    return out


def _mapping(model: nn.Module) -> list[Any]:
    """The mapping that transformers undoes when it saves: that of the files the model came from, else its architecture's."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    known: list[Any] | None = getattr(model, "_weight_conversions", None)
    if known is not None:
        return list(known)
    found = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    return [entry for entry in found if not isinstance(entry, PrefixChange)]
