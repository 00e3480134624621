"""Weights that get one scheme together: siblings that read one input, which graphs merge, and the weights of an expert block.

Found by watching what the model multiplies over the batches; names matter only for experts that are linears of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from quant_compile.ir.errors import MeasureError
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.measure.outputs import still
from quant_compile.measure.weights import all_weights
from quant_compile.model.follow import Meeting, run_batch
from quant_compile.model.weights import Weight
from quant_compile.rules import conventional
from quant_compile.simulate import Chosen, Watching

# Experts that are modules of their own: all below this belong together.
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..+")


@dataclass(frozen=True)
class Group:
    """Weights with one scheme, in the order in which the model uses them."""

    weights: tuple[Weight, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all weights."""
        return tuple(weight.site.names[0] for weight in self.weights)

    @property
    def name(self) -> str:
        """For people: ``model.layers.0.self_attn.q_proj + k_proj + v_proj``."""
        first, *others = self.names
        if len(others) > 3:
            return f"{first} and {len(others)} more"
        return " + ".join([first, *(name.rpartition(".")[2] for name in others)])

    @property
    def experts(self) -> bool:
        """It is an expert block of stacked weights."""
        return self.weights[0].parameter.dim() == 3

    @property
    def elements(self) -> int:
        """Numbers in all weights."""
        return sum(weight.parameter.numel() for weight in self.weights)

    def bytes_as(self, scheme: Scheme | None) -> int:
        """Bytes of all planes; of the weights themselves for None. A table that an embedding reads stays beside its planes."""
        return sum(_bytes(weight, scheme) for weight in self.weights)

    def refuses(self, scheme: Scheme | None) -> str | None:
        """Why one of the weights cannot have a scheme, or None."""
        if scheme is None:
            return None
        takes = family_of(scheme).takes_size
        answers = [takes(scheme, weight.site.n, weight.site.k) for weight in self.weights]
        return next((answer.reason for answer in answers if answer is not None), None)

    def chosen(self, scheme: Scheme) -> list[Chosen]:
        """All weights under one scheme."""
        return [Chosen(weight, scheme) for weight in self.weights]


def _bytes(weight: Weight, scheme: Scheme | None) -> int:
    parameter = weight.parameter
    if scheme is None:
        return parameter.nbytes
    planes = family_of(scheme).weight_planes(scheme, weight.site.n, weight.site.k, parameter.dtype)
    experts = parameter.shape[0] if parameter.dim() == 3 else 1
    return experts * sum(plane.nbytes for plane in planes) + parameter.nbytes * weight.in_embedding


@dataclass(frozen=True)
class Found:
    """Groups to decide, in the model's order, and weights that nothing was learnt of."""

    groups: tuple[Group, ...]
    unreached: tuple[Weight, ...]


def find_groups(model: nn.Module, batches: Sequence[Any]) -> Found:
    """What a search decides: all weights that products read and no convention keeps.

    Raises:
        MeasureError: there is none.
    """
    weights = {weight.site.names[0]: weight for weight in all_weights(model) if _is_free(weight)}
    by_input: Any = WeakTensorKeyDictionary()
    order: dict[str, None] = {}
    together = _Together()

    def observe(found: Meeting) -> None:
        name = found.made.weight
        order.setdefault(name)
        if weights[name].parameter.dim() == 2:
            together.join(name, by_input.setdefault(found.x, name))

    with still(model):
        for batch in batches:
            # Any scheme: the products stay the model's.
            with Watching([Chosen(weight, parse("W8A16")) for weight in weights.values()], observe):
                run_batch(model, batch)
    if not order:
        raise MeasureError(
            "the batches reach no weight that could be quantized. Fix: batches that run every layer; weights in 16 bits."
        )
    first: dict[str, str] = {}
    for name in order:
        for block in _blocks(weights[name]):
            together.join(name, first.setdefault(block, name))
    groups = tuple(Group(tuple(weights[name] for name in names)) for names in together.sets(order))
    certain = tuple(
        weight for name, weight in weights.items() if name not in order and weight.parameter.dim() in (2, 3)
    )
    return Found(groups, certain)


def _is_free(weight: Weight) -> bool:
    return (
        weight.parameter.is_floating_point() and weight.parameter.dtype.itemsize > 1 and not conventional(weight.site)
    )


def _blocks(weight: Weight) -> Iterable[str]:
    if weight.parameter.dim() == 3:
        return weight.site.blocks[:1]
    found = _EXPERT.fullmatch(weight.site.names[0])
    return (found[1],) if found else ()


class _Together:
    """Sets of names that are joined two by two."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def _top(self, name: str) -> str:
        while (above := self._above.get(name, name)) != name:
            name = above
        return name

    def join(self, one: str, other: str) -> None:
        """Put two into one set."""
        one, other = self._top(one), self._top(other)
        if one != other:
            self._above[one] = other

    def sets(self, order: Iterable[str]) -> list[list[str]]:
        """All sets, by their first member."""
        out: dict[str, list[str]] = {}
        for name in order:
            out.setdefault(self._top(name), []).append(name)
        return list(out.values())
