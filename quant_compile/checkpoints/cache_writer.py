"""Fixed scales of a KV cache to the tensors and the ``kv_cache_scheme`` of compressed-tensors: the inverse of ``cache``.

The format has one scheme for all layers, fixed scales, and e4m3 or int8; what it has no words for is not written, with a note.
Reads names and classes of the model's modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from quant_compile.checkpoints.cache import FORMATS, STRATEGIES
from quant_compile.checkpoints.spelling import names_in_file
from quant_compile.checkpoints.write import Item, Job
from quant_compile.ir.family import Reject
from quant_compile.ir.kv import HEAD, CacheScheme
from quant_compile.model.cache_scales import CacheScales
from quant_compile.model.places import modules_of

USUAL = "self_attn"


@dataclass(frozen=True)
class CacheForm:
    """What is written of a KV cache.

    Attributes:
        jobs: tensors.
        scheme: ``kv_cache_scheme``; None: nothing is.
        notes: what is not, or what others make of it; one sentence each.
    """

    jobs: tuple[Job, ...] = ()
    scheme: dict[str, Any] | None = None
    notes: tuple[str, ...] = field(default_factory=tuple[str, ...])


def cache_form(
    model: nn.Module, schemes: Mapping[str, CacheScheme | None], scales: Mapping[str, CacheScales]
) -> CacheForm:
    """The form of a model's cache.

    Args:
        schemes: of its layers, by name; empty: all keep 16 bits.
        scales: of those whose scheme has fixed ones.
    """
    used = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    if not used:
        return CacheForm()
    attentions = {layer: _attention(model, layer) for layer in scales}
    reason = _refusal(used, [layer for layer, name in attentions.items() if name is None])
    if isinstance(reason, Reject):
        names = ", ".join(scheme.name for scheme in used)
        return CacheForm(
            notes=(
                f"the KV cache ({names}) is not in the folder, and keeps 16 bits when it is loaded: {reason.reason}",
            )
        )
    spell = names_in_file(model)
    jobs: list[Job] = []
    for layer, name in attentions.items():
        for side, values in (("k_scale", scales[layer].k), ("v_scale", scales[layer].v)):
            jobs.append(_job(spell(f"{name}.{side}"), values.reshape(-1, 1, 1) if used[0].scale == HEAD else values))
    return CacheForm(tuple(jobs), _scheme(used[0]), tuple(_notes(used[0], schemes)))


def _refusal(used: Sequence[CacheScheme], nameless: Sequence[str]) -> Reject | None:
    if len(used) > 1:
        return Reject("the format has one scheme for all layers")
    if not used[0].fixed:
        return Reject("vLLM takes fixed scales alone; calibrate them for FP8_TENSOR or FP8_HEAD")
    if used[0].format not in FORMATS.values():
        return Reject("the format's 8-bit floats are e4m3")
    if nameless:
        return Reject(f"{nameless[0]} has no attention that is known by its name or its class")
    return None


def _notes(scheme: CacheScheme, schemes: Mapping[str, CacheScheme | None]) -> Sequence[str]:
    out: list[str] = []
    if scheme.format == "int8":
        out.append(
            f"the KV cache is {scheme.name}: vLLM keeps 8-bit floats alone, and would take these scales for theirs"
        )
    plain = [layer for layer, own in schemes.items() if own is None]
    if plain:
        more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
        out.append(
            f"{plain[0]}{more}: load keeps K and V in 16 bits; vLLM keeps all layers in 8, with a scale of 1 where there is none"
        )
    return out


def _attention(model: nn.Module, layer: str) -> str | None:
    """The name of a layer's attention: ``self_attn``, or the one module in it whose class is called so."""
    modules = dict(modules_of(model))
    if f"{layer}.{USUAL}" in modules:
        return f"{layer}.{USUAL}"
    found = [
        name for name, part in modules.items() if name.startswith(f"{layer}.") and "Attention" in type(part).__name__
    ]
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return found[0] if len(found) == 1 else None


def _scheme(scheme: CacheScheme) -> dict[str, Any]:
    kind, bits = next(key for key, format in FORMATS.items() if format == scheme.format)
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": next(name for name, scale in STRATEGIES.items() if scale == scheme.scale),
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
    }


def _job(name: str, values: Tensor) -> Job:
    values = values.contiguous()
    return Job((Item(name, values.dtype, tuple(values.shape)),), lambda: {name: values})
