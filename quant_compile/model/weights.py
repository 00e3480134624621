"""The weights of a model that linears multiply by, found by module without tracing, with every name each of them has.

Works on any device, meta too: only names, shapes and dtypes are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
    """

    site: SiteInfo
    parameter: nn.Parameter
    in_embedding: bool
    has_bias: bool
    certain: bool = False


@dataclass(frozen=True)
class _Owner:
    name: str
    module: nn.Module
    attribute: str

    @property
    def qualified(self) -> str:
        """Name as rules see it: the dotted name without ``.weight``."""
        full = f"{self.name}.{self.attribute}" if self.name else self.attribute
        return full.removesuffix(".weight")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile(model)``, so that names carry no ``_orig_mod.``."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def linear_weights(model: nn.Module) -> list[Weight]:
    """Every weight of ``model`` that can be a site, in the order of its first name.

    Linears are nn.Linear and its subclasses, transformers' Conv1D ([k, n]), and any other module's 2-D parameter
    outside embeddings whose name ends in ``weight`` (routers, packed projections); these are taken to be [n, k], which
    only tracing can confirm. Expert parameters are 3-D parameters of modules named like experts.
    """
    model = unwrap(model)
    heads = output_embeddings(model)
    return [found for owners in _owners(model) if (found := _weight(owners, heads)) is not None]


def possible_weights(model: nn.Module) -> list[Weight]:
    """Parameters outside of ``linear_weights`` that a product may turn out to read when the model is traced.

    Other 2-D and 3-D ones of floats that no embedding holds; 2-D ones are taken to be [n, k], 3-D ones to be experts [E, n, k].
    """
    model = unwrap(model)
    listed = {id(weight.parameter) for weight in linear_weights(model)}
    out: list[Weight] = []
    for owners in _owners(model):
        owner = owners[0]
        parameter = getattr(owner.module, owner.attribute)
        if id(parameter) in listed or parameter.dim() not in (2, 3) or not parameter.is_floating_point():
            continue
        if any(isinstance(o.module, _NOT_LINEAR) for o in owners):
            continue
        names, module = tuple(dict.fromkeys(o.qualified for o in owners)), type(owner.module).__name__
        linear = SiteInfo(names, "linear", module, *parameter.shape[-2:])
        site = linear if parameter.dim() == 2 else expert_site(names, module, parameter)
        out.append(Weight(site, parameter, False, False))
    return out


def expert_site(
    names: Iterable[str], module_class: str | None, parameter: nn.Parameter, transposed: bool = False
) -> SiteInfo:
    """What rules see of one weight [E, n, k] of an expert block (``transposed``: stored [E, k, n])."""
    names = tuple(names)
    n, k = parameter.shape[-2:]
    sizes = (k, n) if transposed else (n, k)
    blocks = tuple(dict.fromkeys(filter(None, (name.rpartition(".")[0] for name in names))))
    return SiteInfo(names, "moe", module_class, *sizes, blocks=blocks)


def _owners(model: nn.Module) -> Iterator[list[_Owner]]:
    """For each Parameter all the places that hold it, aliases included."""
    by_id: dict[int, list[_Owner]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                by_id.setdefault(id(parameter), []).append(_Owner(name, module, attribute))
    return iter(by_id.values())


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


def _weight(owners: list[_Owner], heads: frozenset[int]) -> Weight | None:
    roles = [(role, owner) for owner in owners if (role := _role(owner)) is not None]
    if not roles:
        return None
    (kind, transposed), owner = roles[0]
    parameter = getattr(owner.module, owner.attribute)
    n, k = parameter.shape[-2:]
    if transposed:
        n, k = k, n
    names = tuple(dict.fromkeys(o.qualified for o in owners))
    if kind == "moe":
        site = expert_site(names, type(owner.module).__name__, parameter, transposed)
        return Weight(site, parameter, False, any("bias" in name for name in owner.module._parameters))
    site = SiteInfo(names, kind, type(owner.module).__name__, n, k, id(parameter) in heads)
    has_bias = isinstance(getattr(owner.module, "bias", None), nn.Parameter)
    certain = any(isinstance(o.module, nn.Linear) or type(o.module).__name__ == "Conv1D" for o in owners)
    return Weight(site, parameter, any(_is_embedding(o.module) for o in owners), has_bias, certain)


def _role(owner: _Owner) -> tuple[str, bool] | None:
    """``(kind, weight is [k, n])`` of a Parameter in one of its places, or None."""
    parameter = getattr(owner.module, owner.attribute)
    if parameter.dim() == 3 and _is_experts(owner):
        return "moe", _stores_columns(owner.module)
    if parameter.dim() != 2 or _is_embedding(owner.module):
        return None
    if not owner.attribute.endswith("weight") or isinstance(owner.module, _NOT_LINEAR):
        return None
    return "linear", type(owner.module).__name__ == "Conv1D"


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
_NOT_LINEAR = (
    *(nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase),
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU),
)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _is_experts(owner: _Owner) -> bool:
    return "experts" in owner.qualified.split(".") or type(owner.module).__name__.endswith(("Experts", "MoE"))


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
