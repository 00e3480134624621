"""Name Parameters by identity: which model a graph's weights belong to, and all the names each of them has there.

Dynamo's own names are relative to the compiled frame and wrong after graph breaks and in per-layer compilation, so names
come from (1) models given to ``quant_compile.compile``, (2) the outermost nn.Module on the Python stack that holds the
Parameter: a ``self``, a local variable, or an attribute of a ``self``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quant_compile.model.weights import output_embeddings, unwrap


@dataclass(frozen=True)
class Names:
    """Names of one Parameter, full and as rules see them (without ``.weight``), and the class of the module that holds it."""

    full: tuple[str, ...]
    is_output_embedding: bool
    module_class: str

    @property
    def rules(self) -> tuple[str, ...]:
        """Names without a trailing ``.weight``."""
        return tuple(name.removesuffix(".weight") for name in self.full)


_TORCH = str(Path(torch.__file__).parent)
_REGISTERED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def register(model: nn.Module) -> None:
    """Use this model's names for its Parameters, however it is called."""
    _REGISTERED.add(unwrap(model))


def owner_of(parameters: Iterable[nn.Parameter]) -> nn.Module | None:
    """The model that holds any of these Parameters: a registered one, else the outermost on the Python stack."""
    wanted = set(map(id, parameters))
    if not wanted:
        return None
    for model in list(_REGISTERED):
        if _holds(model, wanted):
            return model
    found = _outermost(_selves_on_stack(), wanted)
    if found is None:
        found = _outermost(_locals_on_stack(), wanted)
    return None if found is None else unwrap(found)


def _outermost(modules: Iterable[nn.Module], wanted: set[int]) -> nn.Module | None:
    """The last of ``modules`` (inner to outer) that holds a wanted Parameter."""
    outermost = None
    seen: set[int] = set()
    for module in modules:
        if id(module) not in seen:
            seen.add(id(module))
            if _holds(module, wanted):
                outermost = module
    return outermost


def _holds(model: nn.Module, wanted: set[int]) -> bool:
    return any(id(parameter) in wanted for parameter in model.parameters())


def _selves_on_stack() -> Iterator[nn.Module]:
    frame = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames:
            value = frame.f_locals.get("self")
            if isinstance(value, nn.Module):
                yield value
        frame = frame.f_back


def _locals_on_stack() -> Iterator[nn.Module]:
    """Modules in local variables and in attributes of a ``self``, for models called by a compiled function.

    Only asked when no ``self`` is the model: reading ``f_locals`` makes a frame hold its locals as they are now.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_TORCH):
            found = frame.f_locals
            holder = vars(found["self"]) if hasattr(found.get("self"), "__dict__") else {}
            yield from (value for value in [*found.values(), *holder.values()] if isinstance(value, nn.Module))
        frame = frame.f_back


def names_in(model: nn.Module | None) -> dict[int, Names]:
    """id of each Parameter -> its names in ``model``."""
    if model is None:
        return {}
    heads = output_embeddings(model)
    by_id: dict[int, list[str]] = {}
    classes: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                by_id.setdefault(id(parameter), []).append(f"{path}.{attribute}" if path else attribute)
                classes.setdefault(id(parameter), type(module).__name__)
    return {identity: Names(tuple(names), identity in heads, classes[identity]) for identity, names in by_id.items()}
