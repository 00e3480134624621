"""Scales of the KV cache in a checkpoint: what its config says of them, which tensors hold them, and what becomes of them.

    K or V = codes * scale          k_scale, v_scale of an attention (compressed-tensors) or of its projections (modelopt); output_scale
                                    of k_proj and v_proj (compressed-tensors before 0.12)
                                    kv_scale of an attention, for both (AutoFP8 before July 2024)
    scale = amax / largest code     {k,v}_bmm_quantizer._amax, what modelopt exports k_scale from

One number for a layer, or one for each head of K and V. Reads headers, and the scales themselves in ``read`` alone; writes nothing.
Source: compressed-tensors 0.20 (``initialize_attn_qparams``), modelopt 0.47 (``postprocess_state_dict``), AutoFP8
(``quantize_activations``), auto-round 0.16 (``experimental/kv_cache.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from quant_compile.checkpoints.description import CacheStored, Keys, alike
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, TensorInfo
from quant_compile.ir.kv import HEAD, TENSOR, TOKEN, CacheScheme
from quant_compile.ir.numerics import dtype_name
from quant_compile.model.cache_scales import CacheScales
from quant_compile.rules import CacheRule, CacheRules

Side = Literal["k", "v"]
FORMATS = {("float", 8): "e4m3", ("int", 8): "int8"}
STRATEGIES = {"tensor": TENSOR, "attn_head": HEAD}
_E4M3 = ("static", "fp8", "float8_e4m3fn", "torch.float8_e4m3fn")
ALGORITHMS = {"FP8": CacheScheme("e4m3", TENSOR), "INT8": CacheScheme("int8", TENSOR)}
_SCALE = re.compile(r"\.(?:(kv?|v)_scale|([kv])_proj\.output_scale|([kv])_bmm_quantizer\.(_amax))$")
# Other tensors of quantized attention -> why they are not used.
_OTHERS = (
    (re.compile(r"\.[kvq]_zero_point$"), "zero point of attention, whose symmetric schemes have none"),
    (
        re.compile(r"\.(?:q_scale|q_proj\.output_scale|prob_output_scale)$"),
        "scale of attention's own products, whose queries and probabilities keep 16 bits here",
    ),
    (re.compile(r"\.[kv]_bmm_quantizer\S*$"), "of a quantizer of the KV cache, and no scale"),
    (re.compile(r"\.[kvq]_global_scale$"), "global scale of a cache in NVFP4, which no scheme has"),
)
_REAL = (torch.bfloat16, torch.float16, torch.float32)
_SMALLEST = torch.finfo(torch.float32).tiny  # below it a reciprocal is inf
AGAIN = "Fix: download or write the checkpoint again, or load it with a policy that says `kv_cache: keep`."


# --- configs ---


def stored_of(keys: Keys) -> CacheStored:
    """Of ``kv_cache_scheme``, whose keys and defaults are compressed-tensors' QuantizationArgs.

    Raises:
        CheckpointError: a key has another type.
    """
    bits, kind = keys.number("num_bits", 8), keys.get("type", str, "int")
    strategy = keys.get("strategy", str) or ("group" if keys.group() else "tensor")
    symmetric, dynamic = keys.get("symmetric", bool, True), keys.get("dynamic", (bool, str), False)
    text = f"{kind} of {bits} bits, {'dynamic, ' if dynamic else ''}a scale for each {strategy}"
    format = FORMATS.get((kind, bits or 0))
    if format is None:
        return CacheStored(text, keys.where, reason=f"no scheme has {kind} codes of {bits} bits")
    if not symmetric:
        return CacheStored(text, keys.where, reason="no scheme has zero points")
    if dynamic is True and strategy == "token":
        return CacheStored(text, keys.where, CacheScheme(format, TOKEN))
    if dynamic or strategy not in STRATEGIES:
        return CacheStored(text, keys.where, reason="scales are fixed for a layer or a head, or made for each token")
    return CacheStored(text, keys.where, CacheScheme(format, STRATEGIES[strategy]))


def static_of(words: str, where: str, scale: str = TENSOR) -> CacheStored:
    """Of a config that says in a word or two that K and V have fixed scales: AutoFP8's ``static``, and auto-round's keys."""
    kind = words.rpartition(" ")[2]
    if kind in _E4M3:
        return CacheStored(words, where, CacheScheme("e4m3", scale))
    return CacheStored(words[:60], where, reason=f"{', '.join(_E4M3)} are kept, and nothing else")


def algorithm_of(name: str, where: str) -> CacheStored | None:
    """Of modelopt's ``kv_cache_quant_algo``."""
    if name.upper() in ("", "NONE"):
        return None
    scheme = ALGORITHMS.get(name.upper())
    reason = "" if scheme else f"{', '.join(ALGORITHMS)} are kept, and no other algorithm"
    return CacheStored(f"kv_cache_quant_algo {name[:60]}", where, scheme, reason)


# --- tensors ---


def sides_of(name: str) -> tuple[tuple[Side, ...], bool] | None:
    """What a tensor of this name scales, and whether it holds largest magnitudes; None for other tensors."""
    found = _SCALE.search(name)
    if found is None:
        return None
    own = found[1] or found[2] or found[3]
    sides: tuple[Side, ...] = ("k", "v")
    return tuple(side for side in sides if side in own), found[4] is not None


def unused(name: str) -> str | None:
    """Why a tensor of quantized attention that is no scale of K or V is not used; None for other tensors."""
    return next((why for pattern, why in _OTHERS if pattern.search(name)), None)


@dataclass(frozen=True)
class Scale:
    """A tensor with scales of a layer's K or V; ``amax``: it holds largest magnitudes."""

    info: TensorInfo
    amax: bool


@dataclass(frozen=True)
class Decoder:
    """What a model lets a KV cache be.

    Attributes:
        layers: names of its layers.
        heads: of K and V in each layer; None: not known.
        reason: why its cache keeps 16 bits in any case, or empty.
    """

    layers: Sequence[str]
    heads: Sequence[int] | None = None
    reason: str = ""


@dataclass(frozen=True)
class CachePlan:
    """What becomes of a checkpoint's word on the KV cache.

    Attributes:
        scheme: that its scales are for.
        scales: of K and of V, of every layer that will use them.
        rules: for a policy that does not say how the cache is kept; None: in 16 bits.
        unused: tensor -> why it is not read.
        notes: one sentence each.
    """

    scheme: CacheScheme | None = None
    scales: Mapping[str, tuple[Scale, Scale]] = field(default_factory=dict[str, tuple[Scale, Scale]])
    rules: CacheRules | None = None
    unused: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


def plan(
    stored: CacheStored | None,
    found: Mapping[str, tuple[str, ...]],
    files: Files,
    decoder: Decoder,
    users: tuple[CacheRules | None] | None,
) -> CachePlan:
    """What to do; headers only.

    Args:
        stored: what the config says; None: nothing.
        found: tensors with scales -> names that they may have in the model.
        users: the rules of the user's policy or options, which win; None: these say nothing.

    Raises:
        CheckpointError: a tensor that would be used has a dtype or a shape that is none of scales.
    """
    if stored is None:
        return CachePlan(unused=dict.fromkeys(found, "scale of the KV cache, and the config names no scheme for it"))
    reason = stored.reason or decoder.reason
    if reason or stored.scheme is None:
        return _without(found, stored, reason, users)
    if users is not None:
        return _by_user(found, stored, stored.scheme, files, decoder, users[0])
    if not stored.scheme.fixed:
        note = f"KV cache: {stored.scheme.name}, as {stored.where} says ({stored.text})"
        why = dict.fromkeys(found, "scale of the KV cache, whose scales are made as tokens come")
        return CachePlan(stored.scheme, {}, CacheRules(stored.scheme), why, (note,))
    scales, why = _pairs(found, files, decoder)
    _check(scales, stored.scheme, decoder)
    if not scales:
        note = f"KV cache: in 16 bits, though {stored.where} says {stored.text}: no layer has scales of both K and V"
        return CachePlan(unused=why, notes=(note,))
    without = [layer for layer in decoder.layers if layer not in scales]
    rest = f"; {len(without)} have none and keep 16 bits, {without[0]} first" if without else ""
    note = f"KV cache: {stored.scheme.name} with the checkpoint's own scales, in {len(scales)} of {len(decoder.layers)} layers{rest}"
    return CachePlan(stored.scheme, scales, _rules(stored.scheme, scales, decoder.layers), why, (note,))


def _without(
    found: Iterable[str], stored: CacheStored, reason: str, users: tuple[CacheRules | None] | None
) -> CachePlan:
    """No layer can be kept as the config says."""
    why = dict.fromkeys(found, f"scale of the KV cache, for {stored.text}: {reason}")
    kept = "in 16 bits" if users is None else "as the policy says"
    return CachePlan(unused=why, notes=(f"KV cache: {kept}, though {stored.where} says {stored.text}: {reason}",))


def _by_user(
    found: Mapping[str, tuple[str, ...]],
    stored: CacheStored,
    scheme: CacheScheme,
    files: Files,
    decoder: Decoder,
    rules: CacheRules | None,
) -> CachePlan:
    """The user's rules, with the checkpoint's scales where they ask for just such."""
    wanted = {layer for layer in decoder.layers if scheme.fixed and rules is not None and rules.of(layer) == scheme}
    scales, why = _pairs(found, files, decoder) if wanted else ({}, dict[str, str]())
    scales = {layer: pair for layer, pair in scales.items() if layer in wanted}
    _check(scales, scheme, decoder)
    used = {scale.info.name for pair in scales.values() for scale in pair}
    why |= {
        name: "scale of the KV cache, which the policy keeps otherwise" for name in found if name not in {*used, *why}
    }
    note = f"KV cache: as the policy says, and not {stored.text} as {stored.where}"
    if scales:
        where = f"in {len(scales)} of {len(decoder.layers)} layers, unless the policy has scales for them"
        note = f"KV cache: as the policy says, with the checkpoint's own scales of {scheme.name} {where}"
    return CachePlan(scheme, scales, None, why, (note,))


def _pairs(
    found: Mapping[str, tuple[str, ...]], files: Files, decoder: Decoder
) -> tuple[dict[str, tuple[Scale, Scale]], dict[str, str]]:
    """Scales of layers that have both, each once; why the other tensors are not used."""
    sides: dict[tuple[str, Side], list[Scale]] = {}
    why: dict[str, str] = {}
    for name, spellings in found.items():
        layer = next((x for x in decoder.layers if any(key.startswith(f"{x}.") for key in spellings)), None)
        kind = sides_of(name)
        if layer is None or kind is None:
            why[name] = "scale of a KV cache, of no layer of the decoder"
        else:
            for side in kind[0]:
                sides.setdefault((layer, side), []).append(Scale(files.tensors[name], kind[1]))
    out: dict[str, tuple[Scale, Scale]] = {}
    for layer in decoder.layers:
        k, v = sides.get((layer, "k"), []), sides.get((layer, "v"), [])
        if len(k) == len(v) == 1:
            out[layer] = k[0], v[0]
        else:
            text = f"scale of the KV cache, and {layer} has {len(k)} of K and {len(v)} of V"
            why |= {scale.info.name: text for scale in (*k, *v)}
    return out, why


def _check(scales: Mapping[str, tuple[Scale, Scale]], scheme: CacheScheme, decoder: Decoder) -> None:
    heads = dict(zip(decoder.layers, decoder.heads, strict=True)) if decoder.heads is not None else {}
    for layer, pair in scales.items():
        for scale in pair:
            info, wanted = scale.info, heads.get(layer) if scheme.scale == HEAD else 1
            if info.dtype not in _REAL:
                _fail(info, f"is {dtype_name(info.dtype)}, and a scale of the KV cache has 16 or 32 bits")
            count = torch.Size(info.shape).numel()
            if count != wanted and (wanted is not None or not count):
                _fail(
                    info, f"has {count} numbers, and {scheme.name} needs {wanted or 'one for each head'} for this layer"
                )


def _rules(scheme: CacheScheme, scales: Mapping[str, object], layers: Sequence[str]) -> CacheRules:
    if len(scales) == len(layers):
        return CacheRules(scheme)
    kinds = alike({layer: layer in scales for layer in layers})
    found = [f"re:{pattern}" for pattern, layer in kinds if layer in scales]
    return CacheRules(None, tuple(CacheRule(pattern, scheme, "as the checkpoint has it") for pattern in found))


# --- values ---


def read(plan: CachePlan, files: Files) -> dict[str, CacheScales]:
    """The scales, f32 on the CPU, by layer.

    Raises:
        CheckpointError: one is no positive number.
    """
    if plan.scheme is None:
        return {}
    return {
        layer: CacheScales(plan.scheme, _values(k, plan.scheme, files), _values(v, plan.scheme, files))
        for layer, (k, v) in plan.scales.items()
    }


def _values(scale: Scale, scheme: CacheScheme, files: Files) -> Tensor:
    found = files.get(scale.info.name).to(torch.float32, copy=True).flatten()
    return positive(found / scheme.largest if scale.amax else found, scale.info)


def positive(values: Tensor, info: TensorInfo, fix: str = AGAIN) -> Tensor:
    """The same scales; ``fix`` ends the message.

    Raises:
        CheckpointError: one is no positive number, or too small to divide by.
    """
    good = (values >= _SMALLEST) & values.isfinite()
    if not bool(good.all()):
        bad = float(values[~good][0])
        _fail(info, f"has {bad:g} among its values, and scales of the KV cache are positive numbers", fix)
    return values


def _fail(info: TensorInfo, what: str, fix: str = AGAIN) -> None:
    raise CheckpointError(f"{info.where} {what}.\n{fix}")
