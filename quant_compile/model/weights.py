"""The weights of a model that linears multiply by, found by module without tracing, with every name each of them has.

Works on any device, meta too: only names, shapes and dtypes are read. Of a weight that ranks have in parts the Parameter is this
rank's, and the sizes in its site are those of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from quant_compile.ir.numerics import dtype_name
from quant_compile.lowering.shards import whole_shape
from quant_compile.model.places import Place, by_parameter, unwrap
from quant_compile.rules import SiteInfo


@dataclass(frozen=True)
class Weight:
    """One Parameter that a linear or an expert block multiplies by.

    Attributes:
        site: what rules see.
        parameter: the Parameter itself.
        in_embedding: an Embedding looks rows up in it, so the original stays whatever the linear does.
        has_bias: the module that holds it adds a bias.
        certain: its module is a linear; else only names and sizes say so.
        transposed: it is stored [k, n], or [E, k, n].
    """

    site: SiteInfo
    parameter: nn.Parameter
    in_embedding: bool
    has_bias: bool
    certain: bool = False
    transposed: bool = False


def linear_weights(model: nn.Module) -> list[Weight]:
    """Every weight of ``model`` that can be a site, in the order of its first name.

    Linears are nn.Linear and its subclasses, transformers' Conv1D ([k, n]), and any other module's 2-D parameter
    outside embeddings whose name ends in ``weight`` (routers, packed projections); these are taken to be [n, k], which
    only tracing can confirm. Expert parameters are 3-D parameters of modules named like experts.
    """
    model = unwrap(model)
    heads = output_embeddings(model)
    return [found for held in by_parameter(model).values() if (found := _weight(held, heads)) is not None]


def possible_weights(model: nn.Module) -> list[Weight]:
    """Parameters outside of ``linear_weights`` that a product may turn out to read when the model is traced.

    Other 2-D and 3-D ones of floats that no embedding holds; 2-D ones are taken to be [n, k], 3-D ones to be experts [E, n, k].
    """
    model = unwrap(model)
    listed = {id(weight.parameter) for weight in linear_weights(model)}
    out: list[Weight] = []
    for held in by_parameter(model).values():
        place = held[0]
        parameter = place.parameter
        if id(parameter) in listed or parameter.dim() not in (2, 3) or not parameter.is_floating_point():
            continue
        if any(_reader(p.module, p.attribute) is not None for p in held):
            continue
        n, k = whole_shape(parameter)[-2:]
        linear = SiteInfo(rule_names(held), "linear", place.module_class, n, k)
        site = linear if parameter.dim() == 2 else expert_site(rule_names(held), place.module_class, parameter)
        out.append(Weight(replace(site, role=place.role), parameter, False, False))
    return out


def expert_site(
    names: Iterable[str], module_class: str | None, parameter: nn.Parameter, transposed: bool = False
) -> SiteInfo:
    """What rules see of one weight [E, n, k] of an expert block (``transposed``: stored [E, k, n])."""
    names = tuple(names)
    n, k = whole_shape(parameter)[-2:]
    sizes = (k, n) if transposed else (n, k)
    blocks = tuple(dict.fromkeys(filter(None, (name.rpartition(".")[0] for name in names))))
    return SiteInfo(names, "moe", module_class, *sizes, blocks=blocks)


def output_embeddings(model: nn.Module) -> frozenset[int]:
    """ids of the weights that some part of the model calls its output embeddings."""
    found: set[int] = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            head: Any = getter()
        except (NotImplementedError, AttributeError):
            continue
        weight = getattr(head, "weight", None)
        if isinstance(weight, nn.Parameter):
            found.add(id(weight))
    return frozenset(found)


def rule_names(held: Sequence[Place]) -> tuple[str, ...]:
    """Names of one Parameter as rules see them."""
    return tuple(dict.fromkeys(name.removesuffix(".weight") for p in held for name in (p.name, p.alias)))


def _weight(held: list[Place], heads: frozenset[int]) -> Weight | None:
    roles = [(role, place) for place in held if (role := _role(place)) is not None]
    if not roles:
        return None
    (kind, transposed), place = roles[0]
    parameter, names = place.parameter, rule_names(held)
    n, k = whole_shape(parameter)[-2:]
    if transposed:
        n, k = k, n
    if kind == "moe":
        site = expert_site(names, place.module_class, parameter, transposed)
        has_bias = any("bias" in name for name in place.module._parameters)
        return Weight(site, parameter, False, has_bias, transposed=transposed)
    site = SiteInfo(names, kind, place.module_class, n, k, id(parameter) in heads, role=place.role)
    has_bias = isinstance(getattr(place.module, "bias", None), nn.Parameter)
    certain = any(isinstance(p.module, nn.Linear) or type(p.module).__name__ == "Conv1D" for p in held)
    return Weight(site, parameter, any(_is_embedding(p.module) for p in held), has_bias, certain, transposed)


def _role(place: Place) -> tuple[str, bool] | None:
    """``(kind, weight is [k, n])`` of a Parameter in one of its places, or None."""
    parameter = place.parameter
    if parameter.dim() == 3 and _is_experts(place):
        return "moe", _stores_columns(place.module)
    if parameter.dim() != 2 or _reader(place.module, place.attribute) is not None:
        return None
    if not place.attribute.endswith("weight"):
        return None
    return "linear", type(place.module).__name__ == "Conv1D"


def _stores_columns(module: nn.Module) -> bool:
    """Whether a module's experts are stored [k, n]: by the sizes of its two weights, else by its own word."""
    weights = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    if len(weights) == 2:
        (_, up_rows, up_columns), (_, down_rows, down_columns) = (tuple(w.shape) for w in weights)
        as_rows = up_rows == 2 * down_columns and up_columns == down_rows
        as_columns = up_columns == 2 * down_rows and up_rows == down_columns
        if as_rows != as_columns:
            return as_columns
    return bool(getattr(module, "is_transposed", False))


# Modules of torch whose matrices are tables, kernels or factors.
def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _is_experts(place: Place) -> bool:
    named = "experts" in place.name.split(".") or type(place.module).__name__.endswith(("Experts", "MoE"))
    return named and _reader(place.module, place.attribute) is None


_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _reader(module: nn.Module, attribute: str) -> str | None:
    """What a Parameter is by the class of its module, where that reads it in no product of its own; None where it may."""
    kind = type(module).__name__
    if isinstance(module, _CONVOLUTIONS):
        return f"convolution kernel of {kind}" if attribute == "weight" else None
    if _is_embedding(module):
        return "embedding" if attribute == "weight" else None
    if isinstance(module, _NORMS) or kind.endswith("Norm"):
        return f"{attribute} of {kind}, a norm" if attribute in ("weight", "bias") else None
    return None


def describe(module: nn.Module, attribute: str, parameter: nn.Parameter) -> str:
    """What a Parameter is, in words for a ledger, where no product was seen to read it.

    Args:
        module: the module that holds it.
        attribute: its name there.
        parameter: the Parameter.

    Returns:
        e.g. ``convolution kernel of Conv1d``, ``embedding``, ``recurrent weight of LSTM``, ``vector (norm, bias)``.
    """
    if parameter.dim() < 2:
        return "vector (norm, bias)" if parameter.dim() else "single number"
    known = _reader(module, attribute)
    if known is not None:
        return known
    if not parameter.is_floating_point():
        return f"{dtype_name(parameter.dtype)} numbers"
    kind = type(module).__name__
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"projection of {kind}" if attribute.startswith("weight_hr") else f"recurrent weight of {kind}"
    if isinstance(module, nn.MultiheadAttention):
        return f"projection of {kind}, not read by any product that was traced"
    if isinstance(module, nn.Bilinear):
        return f"weight of {kind}, a product of two inputs"
    if kind.endswith(("Embedding", "Embeddings")):
        return f"table of {kind}, not read by any product that was traced"
    return "not read by any product that was traced"
