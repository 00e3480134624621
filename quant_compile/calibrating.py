"""What example batches tell: static scales of inputs and of K and V, and weights rounded by a policy's method. They are run eagerly.

The model is not changed and its compiled code is not used while it is watched.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_compile.generation.blocks import layer_names
from quant_compile.generation.facts import cache_name, mixin
from quant_compile.ir.errors import MissingScalesError, OptionError, PolicyError, PolicyWarning
from quant_compile.ir.family import family_of
from quant_compile.ir.kv import HEAD, CacheScheme
from quant_compile.ir.numerics import SMALLEST_AMAX
from quant_compile.ir.scheme import Scheme
from quant_compile.model.distributed import refuse_parts
from quant_compile.model.follow import Following, Meeting, eagerly, evaluating, listed, run_batch
from quant_compile.model.weights import linear_weights, possible_weights
from quant_compile.options import PolicySource
from quant_compile.policy import Policy
from quant_compile.rounded import Rounded, round_weights, write_planes
from quant_compile.rules import CACHE_SCHEMES, cache_scale_key, scale_key

_SAMPLE = 1 << 20


class _Observer(Following):
    """Largest magnitude (or a percentile of it) of the inputs that meet the watched weights, times the factors that they have."""

    def __init__(self, weights: Mapping[int, str], percentile: float | None, factors: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.percentile, self.factors = percentile, factors
        self.largest: dict[str, Tensor] = {}

    def meet(self, meetings: list[Meeting]) -> Any:
        for found in meetings:
            # Rows after the last group belong to no expert here and may hold anything.
            x = found.x if found.rows is None else found.x[: int(found.rows[-1])]
            factor = self.factors.get(found.made.weight)
            self._see(found.made.weight, x if factor is None else x * factor.to(x))
        return meetings[0].call()

    def _see(self, name: str, x: Tensor) -> None:
        magnitude = x.detach().abs().float().flatten()
        if not magnitude.numel():
            return
        if self.percentile is None:
            value = magnitude.amax()
        else:
            value = torch.quantile(magnitude[:: max(1, magnitude.numel() // _SAMPLE)][:_SAMPLE], self.percentile / 100)
        before = self.largest.get(name)
        self.largest[name] = value if before is None else torch.maximum(before, value)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    policy: Any,
    *,
    percentile: float | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Policy:
    """Measure what the policy wants to know of inputs, and save it: scales of static schemes and of a fixed KV cache, rounded weights.

    With ``method`` in the policy every weight whose codes can be chosen is rounded by it, and the planes are saved in a file of their
    own; ``compile`` with the returned policy (or its file) takes them and needs no batches. Under ``awq`` and ``smoothquant`` these are for
    inputs that graphs multiply by factors; the file has those too.

    The two weights of an expert block have one scale each: of the block's tokens, and of the hidden layers of all experts.

    Args:
        model: the model; run eagerly in inference mode.
        batches: each a mapping (keyword arguments), a tuple (positional arguments) or one tensor.
        policy: preset name, YAML path, dict or Policy.
        percentile: of the magnitudes, e.g. 99.9; None: the largest.
        path: the safetensors file of scales; planes go beside it, with ``.planes`` before the ending. Default: beside the policy's
            file, else ``<policy>.scales.safetensors`` and ``<policy>.planes.safetensors`` here, with a number where that exists,
            since another model may be using it. A policy file without the key ``scales`` or ``planes`` gets it, so that loading it
            again finds them.
        progress: show a progress bar.

    Returns:
        The policy with its ``scales`` and ``planes``.

    Raises:
        OptionError: percentile out of range, no batches, or one batch in place of a list of them.
        MissingScalesError: a static weight met no input, or NaN or inf; nothing is written.
    """
    if percentile is not None and not 0 < percentile <= 100:
        raise OptionError(f"percentile must lie in (0, 100], got {percentile}")
    refuse_parts(model, "calibrate")
    loaded = Policy.load(policy)
    weights = _static_weights(model, loaded)
    layers = _fixed_layers(model, loaded)
    if not weights and not layers and loaded.method is None:
        raise OptionError(
            f"policy {loaded.name} has no static scheme for this model and no method; dynamic schemes need no calibration.\n"
            "Fix: `method: gptq` in the policy, to round weights by these batches."
        )
    given = listed(batches)
    targets = {
        kind: _file_of(loaded, path, kind)
        for kind, wanted in (("scales", weights or layers), ("planes", loaded.method))
        if wanted
    }
    with evaluating(model):
        rounded = _rounded(model, given, loaded, progress) if loaded.method is not None else {}
        factors = _factors(loaded, weights, rounded)
        scales = _scales(model, given, weights, factors, layers, percentile, progress) if weights or layers else {}
    # All is measured before anything is written, so that what fails leaves nothing behind.
    if "planes" in targets:
        write_planes(targets["planes"], rounded, loaded)
        _mention(loaded, "planes", targets["planes"])
        loaded = replace(loaded, planes=targets["planes"])
    if "scales" in targets:
        metadata = {"format": "pt", "percentile": str(percentile or "amax"), "batches": str(len(given))}
        if layers:
            metadata[CACHE_SCHEMES] = json.dumps({name: scheme.name for name, scheme in layers.items()})
        save_file(scales, str(targets["scales"]), metadata=metadata)
        _mention(loaded, "scales", targets["scales"])
        loaded = replace(loaded, scales=targets["scales"])
    return loaded


def _scales(
    model: nn.Module,
    batches: list[Any],
    weights: Mapping[str, _Watched],
    factors: Mapping[str, Tensor],
    layers: Mapping[str, CacheScheme],
    percentile: float | None,
    progress: bool,
) -> dict[str, Tensor]:
    """Of the inputs of static weights, and of K and V of the layers that fix them."""
    cached: dict[str, Tensor] = {}
    observer = _Observer({weight.pointer: name for name, weight in weights.items()}, percentile, factors)
    with eagerly(), torch.inference_mode():
        for batch in track(batches, "calibrating", disable=not progress):
            with observer:
                run_batch(model, batch, watching_cache(model, layers, cached) if layers else None)
    missing = [name for name, weight in weights.items() if weight.required and name not in observer.largest]
    if missing:
        raise MissingScalesError(
            f"no batch reached {missing[0]} ({len(missing)} weights in all). Fix: batches that run every layer, or `keep` it."
        )
    _refuse_useless(observer.largest, "inputs")
    _refuse_useless({name: amax.max() for name, amax in cached.items()}, "keys or values")
    scales = {scale_key(name): _scale(amax, weights[name].scheme) for name, amax in sorted(observer.largest.items())}
    return scales | _cache_scales(layers, cached)


def _factors(policy: Policy, weights: Iterable[str], rounded: Mapping[str, Rounded]) -> dict[str, Tensor]:
    """What the inputs of weights are multiplied by: by their planes of today, or those that the policy has."""
    if policy.method is not None:
        return {name: made.factor for name, made in rounded.items() if made.factor is not None}
    source = PolicySource(policy, "")
    found = {name: source.rounding((name,)).factor for name in weights}
    return {name: factor.read() for name, factor in found.items() if factor is not None}


def _rounded(model: nn.Module, batches: list[Any], policy: Policy, progress: bool) -> dict[str, Rounded]:
    """Planes of weights, by the policy's method."""

    def shown(items: Iterable[Any], text: str) -> Iterable[Any]:
        return track(items, text, disable=not progress)

    made = round_weights(model, batches, policy, shown)
    if not made:
        raise OptionError(
            f"policy {policy.name} has method {policy.method}, and no weight of this model has a scheme whose codes can be chosen.\n"
            "Fix: W4A16, W4A8, W8A8, NVFP4, MXFP4 or another scheme of integers or FP4, or leave `method` out."
        )
    return made


def _fixed_layers(model: Any, policy: Policy) -> dict[str, CacheScheme]:
    """Layers of a decoder whose K and V have fixed scales, in order; the others have none."""
    if policy.kv_cache is None or not any(scheme.fixed for scheme in policy.kv_cache.schemes):
        return {}
    if mixin(model) is None:
        raise OptionError(
            f"{type(model).__name__} does not generate, so that it has no KV cache. Fix: leave kv_cache out."
        )
    found = {name: policy.kv_cache.of(name) for name in layer_names(model)}
    return {name: scheme for name, scheme in found.items() if scheme is not None and scheme.fixed}


def _cache_scales(layers: Mapping[str, CacheScheme], largest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """f32 [heads] or [1] for K and V of each layer."""
    out: dict[str, Tensor] = {}
    for name, scheme in layers.items():
        for side in ("k", "v"):
            key = cache_scale_key(name, side)
            if key not in largest:
                raise MissingScalesError(
                    f"no batch reached the KV cache of {name}. Fix: batches of token ids; where the layer keeps no K and V (a convolution, "
                    "a state), leave it out by a rule of kv_cache with scheme keep."
                )
            amax = largest[key] if scheme.scale == HEAD else largest[key].amax(0, keepdim=True)
            out[key] = amax.cpu().float().clamp_min(SMALLEST_AMAX) * (1.0 / scheme.largest)
    return out


def watching_cache(model: Any, layers: Mapping[str, CacheScheme], largest: dict[str, Tensor]) -> dict[str, Any]:
    """The argument that gives a model a growing cache which notes the largest magnitude of K and V of each head."""
    from transformers import DynamicCache, EncoderDecoderCache

    names = layer_names(model)

    class Watching(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            name = names[layer_idx]
            for side, x in (("k", key_states), ("v", value_states)) if name in layers else ():
                key, amax = cache_scale_key(name, side), x.abs().amax((0, 2, 3)).float()
                largest[key] = torch.maximum(largest[key], amax) if key in largest else amax
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    config = model.config.get_text_config(decoder=True)
    watching = Watching(config=config)
    if getattr(model.config, "is_encoder_decoder", False):
        watching = EncoderDecoderCache(watching, DynamicCache())
    return {cache_name(mixin(model)): watching, "use_cache": True}  # type: ignore[arg-type]


def _refuse_useless(largest: Mapping[str, Tensor], what: str) -> None:
    """No scale follows from inputs that are NaN or inf somewhere."""
    for name, amax in sorted(largest.items()):
        if not float(amax) < float("inf"):
            raise MissingScalesError(
                f"the {what} of {name} were NaN or inf somewhere in these batches, so it has no scale; nothing was written.\n"
                "Fix: other batches, or `keep` it in the policy."
            )


@dataclass(frozen=True)
class _Watched:
    """A weight with a static scheme: its address; whether it is an error that no batch reached it."""

    pointer: int
    scheme: Scheme
    required: bool


def _static_weights(model: nn.Module, policy: Policy) -> dict[str, _Watched]:
    """Static weights by name: linears and experts, and other Parameters, which are weights only if a product reads them."""
    out: dict[str, _Watched] = {}
    for required, weights in ((True, linear_weights(model)), (False, possible_weights(model))):
        for weight in weights:
            site = weight.site
            # What kind of product reads one of three dimensions only tracing can tell.
            kinds = (site,) if required else (site, replace(site, kind="linear"))
            scheme = next((s for kind in kinds if (s := policy.decide(kind).scheme) is not None and s.static), None)
            if scheme is not None:
                out[weight.site.names[0]] = _Watched(weight.parameter.data_ptr(), scheme, required)
    return out


def _scale(largest: Tensor, scheme: Scheme) -> Tensor:
    """amax over the largest code, [1] f32."""
    limit = family_of(scheme).largest_input(scheme)
    return (largest.cpu().clamp_min(SMALLEST_AMAX) * (1.0 / limit)).reshape(1)


def _file_of(policy: Policy, path: str | Path | None, kind: str) -> Path:
    """Where scales or planes go, as a whole path, since the policy may be used from another folder.

    Raises:
        OptionError: its folder is not there.
    """
    file = Path(os.path.abspath(_named(policy, path, kind)))
    if not file.parent.is_dir():
        raise OptionError(f"{file.parent} is no folder, so {kind} cannot be written there. Fix: make it first.")
    return file


def _named(policy: Policy, path: str | Path | None, kind: str) -> Path:
    """With both, planes stand beside the scales that ``path`` names."""
    if path is not None:
        given = Path(path)
        return given if kind == "scales" or policy.method is None else given.with_suffix(f".planes{given.suffix}")
    if policy.source is not None and not _is_shipped(policy):
        return Path(policy.source).with_suffix(f".{kind}.safetensors")
    name, number = policy.name.lower(), 1
    file = Path(f"{name}.{kind}.safetensors")
    while file.exists():
        number += 1
        file = Path(f"{name}.{number}.{kind}.safetensors")
    return file


def _mention(policy: Policy, key: str, path: Path) -> None:
    """Add ``scales:`` or ``planes:`` to a policy file that has none, leaving the rest of its text alone.

    Warns:
        PolicyWarning: the file names another one, or is written in a way that a line cannot be added to.
    """
    if policy.source is None or _is_shipped(policy):
        return
    file = Path(policy.source)
    if not file.is_file() or file.suffix not in (".yaml", ".yml"):
        return
    name = path.name if path.parent.resolve() == file.parent.resolve() else str(path.resolve())
    text = file.read_text(encoding="utf-8")
    if getattr(policy, key) is None:
        partial = file.with_name(f"{file.stem}.part{file.suffix}")
        line = yaml.safe_dump({key: name}, allow_unicode=True, width=1 << 20)
        partial.write_text(f"{text.rstrip()}\n{line}", encoding="utf-8")
        try:
            found = getattr(Policy.load(partial), key)
        except PolicyError:
            found = None
        if found is not None and found.resolve() == path.resolve():
            partial.replace(file)
            return
        partial.unlink()
    elif getattr(policy, key).resolve() == path.resolve():
        return
    warnings.warn(
        f"{file} was left as it is; the policy that calibrate returns has the new file.\nFix: `{key}: {name}` in {file.name}, by hand.",
        PolicyWarning,
        stacklevel=4,
    )


def _is_shipped(policy: Policy) -> bool:
    """It came with the package, whose folder is no place for a user's files."""
    return policy.source is not None and Path(policy.source).resolve().is_relative_to(Path(__file__).resolve().parent)
