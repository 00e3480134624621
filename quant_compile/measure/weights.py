"""Which weights of a model a policy quantizes, with what a simulation needs of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quant_compile.ir.errors import MeasureError, MissingScalesError, SchemeError
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import Scheme
from quant_compile.model.weights import Weight, linear_weights, possible_weights
from quant_compile.options import PolicySource
from quant_compile.policy import Policy
from quant_compile.rules import scale_key
from quant_compile.simulate import Chosen


def all_weights(model: nn.Module) -> list[Weight]:
    """Every weight that products of a model may read."""
    return [*linear_weights(model), *possible_weights(model)]


def chosen_by(policy: Policy, model: nn.Module, values_of: nn.Module | None = None) -> list[Chosen]:
    """The weights that a policy quantizes, in the model's order.

    Args:
        values_of: another model whose weights of the same names are quantized in the place of the model's own.

    Raises:
        MissingScalesError: a static scheme has no calibrated scale.
        MeasureError: the other model lacks a weight, or has it in another shape.
    """
    out, source = list[Chosen](), PolicySource(policy, "")
    others = {name: weight for weight in all_weights(values_of) for name in weight.site.names} if values_of else {}
    for weight in all_weights(model):
        scheme = scheme_of(policy, weight)
        if scheme is None:
            continue
        values = None
        if values_of is not None:
            other = others.get(weight.site.names[0])
            if other is None or other.parameter.shape != weight.parameter.shape:
                raise MeasureError(
                    f"{weight.site.names[0]} of the reference is not in the model in this shape. Fix: a reference of the same architecture."
                )
            values = other.parameter
        rounding = source.rounding((weight.site.names[0],))
        out.append(Chosen(weight, scheme, values=values, rounding=rounding))
    return _with_scales(out, policy)


def scheme_of(policy: Policy, weight: Weight) -> Scheme | None:
    """What a policy makes of a weight; None keeps it, because of its dtype too."""
    if weight.parameter.dtype.itemsize == 1 or not weight.parameter.is_floating_point():
        return None
    scheme = policy.decide(weight.site).scheme
    if scheme is None and weight.parameter.dim() == 3 and not weight.site.blocks:
        scheme = policy.decide(replace(weight.site, kind="linear")).scheme
    refusal = None if scheme is None else family_of(scheme).quantizes(scheme)
    if scheme is not None and refusal is not None:
        raise SchemeError(
            f"{weight.site.names[0]} cannot be quantized to {scheme.spec}: {refusal.reason}. Fix: another scheme."
        )
    return scheme


def _with_scales(chosen: Sequence[Chosen], policy: Policy) -> list[Chosen]:
    """With the calibrated scales of static schemes."""
    static = [each for each in chosen if each.scheme.static]
    if not static:
        return list(chosen)
    scales = _scales(policy, [key for each in static for key in map(scale_key, each.weight.site.names)])
    out: list[Chosen] = []
    for each in chosen:
        keys = [scale_key(name) for name in each.weight.site.names]
        scale = next((scales[key] for key in keys if key in scales), None)
        if each.scheme.static and scale is None:
            raise MissingScalesError(
                f"{each.name} has the static scheme {each.scheme.spec} and no calibrated input scale.\n"
                "Fix: policy = quant_compile.calibrate(model, batches, policy) first, or use a dynamic scheme."
            )
        device = each.weight.parameter.device
        out.append(each if scale is None else replace(each, scale=scale.reshape(1).float().to(device)))
    return out


def _scales(policy: Policy, keys: Iterable[str]) -> dict[str, Tensor]:
    if policy.scales is None or not policy.scales.is_file():
        return {}
    try:
        with safe_open(str(policy.scales), framework="pt") as opened:
            known = set(opened.keys())
            return {key: opened.get_tensor(key) for key in keys if key in known}
    except SafetensorError as error:
        raise MissingScalesError(
            f"{policy.scales} is not readable as safetensors ({error}). Fix: calibrate again."
        ) from None
