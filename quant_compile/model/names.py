"""Name Parameters by identity: which model each of a graph's weights belongs to, and all the names it has there.

Dynamo's own names are relative to the compiled frame and wrong after graph breaks and in per-layer compilation, so names
come from (1) models given to ``quant_compile.compile``, (2) the outermost nn.Module on the Python stack that holds the
Parameter as a ``self``, (3) the largest one that frames on the stack reach: by local variables, by globals and cells that
their code names, and by what those hold (lists, dicts, attributes of objects, functions). Each Parameter has a model of its
own: a compiled function may call several.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import nn

from quant_compile.lowering.identity import local_of
from quant_compile.model.places import Place, by_parameter, unwrap
from quant_compile.model.weights import describe, output_embeddings, rule_names


@dataclass(frozen=True)
class Names:
    """Names of one Parameter, and what rules see of it besides its shape.

    Attributes:
        full: as checkpoints have them, without wrappers.
        rules: as rules see them: without ``.weight``, and with the name that a parametrized weight has outside.
        raw: as ``named_parameters`` has them.
        is_output_embedding: it is what the model's ``get_output_embeddings`` multiplies by.
        module_class: class of the module that holds it.
        role: what it is that keeps its precision by convention, as far as modules tell; or empty.
        tuners: PEFT's layers around it.
        kept: why it stays as it is if no linear is seen to read it, for ledgers.
    """

    full: tuple[str, ...]
    rules: tuple[str, ...]
    raw: tuple[str, ...]
    is_output_embedding: bool
    module_class: str
    role: str
    tuners: tuple[nn.Module, ...]
    kept: str


@dataclass(frozen=True, eq=False)
class Owners:
    """The models that the Parameters of one call belong to.

    Attributes:
        models: each once, in the order of the Parameters.
        beside: other modules that the compiled function reaches, where it is no module's own: graph breaks divide its models
            among several graphs.
    """

    models: tuple[nn.Module, ...]
    beside: tuple[nn.Module, ...]
    _names: Mapping[int, Names]

    @staticmethod
    def of(parameters: Iterable[nn.Parameter]) -> Owners:
        """Find them; those that no model is found for have no names."""
        parameters, beside = list(map(local_of, parameters)), list[nn.Module]()
        walks = _CURRENT.walks or _Walks()
        found = {identity: unwrap(model) for identity, model in _find(set(map(id, parameters)), beside, walks).items()}
        models = tuple({id(model): model for p in parameters if (model := found.get(id(p))) is not None}.values())
        heads = {id(model): output_embeddings(model) for model in models}
        held = {identity: walks.of(model).get(identity) for identity, model in found.items()}
        names = {
            identity: _names(places, identity in heads[id(found[identity])])
            for identity, places in held.items()
            if places
        }
        return Owners(models, tuple(beside), names)

    def names(self, parameter: nn.Parameter) -> Names | None:
        """Its names there."""
        return self._names.get(id(local_of(parameter)))


class _Walks:
    """Models that were walked through: graphs of single layers ask for names as often as a model has layers."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[nn.Module, dict[int, list[Place]]]] = {}

    def of(self, model: nn.Module) -> dict[int, list[Place]]:
        """``by_parameter``."""
        if id(model) not in self._known:
            self._known[id(model)] = model, by_parameter(model)
        return self._known[id(model)][1]


class _Current(threading.local):
    walks: _Walks | None = None


_CURRENT = _Current()


@contextmanager
def walked_once() -> Generator[None]:
    """What is asked of models within is asked of them as they are now: each is walked through once, in this thread."""
    before = _CURRENT.walks
    _CURRENT.walks = before or _Walks()
    try:
        yield
    finally:
        _CURRENT.walks = before


_TORCH = str(Path(torch.__file__).parent)
_REGISTERED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def register(model: nn.Module) -> None:
    """Use this model's names for its Parameters, however it is called."""
    _REGISTERED.add(unwrap(model))


def names_in(model: nn.Module | None) -> dict[int, Names]:
    """id of each Parameter -> its names in ``model``."""
    if model is None:
        return {}
    heads = output_embeddings(model)
    return {identity: _names(held, identity in heads) for identity, held in by_parameter(model).items()}


def _names(held: list[Place], is_head: bool) -> Names:
    first = held[0]
    return Names(
        tuple(dict.fromkeys(place.name for place in held)),
        rule_names(held),
        tuple(dict.fromkeys(place.raw for place in held)),
        is_head,
        first.module_class,
        first.role,
        tuple(dict.fromkeys(tuner for place in held for tuner in place.tuners)),
        f"kept by convention: {first.role}"
        if first.role
        else f"not a linear weight: {describe(first.module, first.attribute, first.parameter)}",
    )


# --- which model -------------------------------------------------------------------------------------------------------


def _find(wanted: set[int], reached: list[nn.Module], walks: _Walks) -> dict[int, nn.Module]:
    """id of each Parameter -> the outermost model that holds it; ``reached`` gets what was looked at beyond ``self``."""
    found: dict[int, nn.Module] = {}
    for source in (_registered, _selves_on_stack):
        found |= _outermost(source(), wanted - set(found), walks)
    if wanted - set(found):
        reached += _reached_from_stack()
        found |= _outermost(reached, wanted - set(found), walks)
    return found


def _outermost(models: Iterable[nn.Module], wanted: set[int], walks: _Walks) -> dict[int, nn.Module]:
    """For each wanted Parameter the model with the most Parameters, of equals the last."""
    best: dict[int, tuple[int, nn.Module]] = {}
    seen: set[int] = set()
    for model in models if wanted else ():
        if id(model) in seen:
            continue
        seen.add(id(model))
        held = walks.of(model).keys()
        for identity in held & wanted:
            if identity not in best or best[identity][0] <= len(held):
                best[identity] = len(held), model
    return {identity: model for identity, (_, model) in best.items()}


def _registered() -> list[nn.Module]:
    """Models given to ``compile``; where one holds another, those that are running now before all others."""
    models = list(_REGISTERED)
    if len(models) < 2:
        return models
    running = {id(unwrap(module)) for module in _selves_on_stack()}
    return [model for model in models if id(model) in running] or models


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _selves_on_stack() -> Iterator[nn.Module]:
    for frame in _frames():
        if "self" in frame.f_code.co_varnames:
            value = frame.f_locals.get("self")
            if isinstance(value, nn.Module):
                yield value


# What is looked through from a frame: so many steps deep, and so many objects in all.
DEPTH, MOST_OBJECTS = 5, 100_000


def _reached_from_stack() -> Iterator[nn.Module]:
    """Modules that frames reach, for models called by a compiled function.

    Only asked when no ``self`` is the model: reading ``f_locals`` makes a frame hold its locals as they are now.
    """
    seen: set[int] = set()
    level: list[Any] = []
    for frame in _frames():
        level += _roots(frame)
    for _ in range(DEPTH):
        below: list[Any] = []
        for value in level:
            if id(value) in seen or len(seen) > MOST_OBJECTS:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                yield value
            else:
                below += _inside(value)
        level = below


def _roots(frame: FrameType) -> list[Any]:
    """What the code of a frame can name; of Dynamo's frames, what the code that is being compiled can."""
    if not frame.f_code.co_filename.startswith(_TORCH):
        return [*frame.f_locals.values(), *_globals_of(frame.f_code, frame.f_globals)]
    if frame.f_code.co_name != "_compile" or not frame.f_code.co_filename.endswith("convert_frame.py"):
        return []
    of = frame.f_locals
    cells: tuple[CellType, ...] = of.get("closure") or ()
    return [*of.get("locals", {}).values(), *map(_content, cells), *_globals_of(of["code"], of.get("globals", {}))]


def _globals_of(code: CodeType, names: Mapping[str, Any]) -> list[Any]:
    """Globals that a piece of code names, in comprehensions and functions inside of it too."""
    found = [names[name] for name in code.co_names if name in names]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _globals_of(constant, names)
    return found


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _inside(value: Any) -> list[Any]:
    """What an object holds that may lead to a module."""
    if isinstance(value, FunctionType):
        defaults = value.__defaults__ or ()
        wrapped = getattr(value, "__wrapped__", None)
        return [
            *map(_content, value.__closure__ or ()), *defaults, wrapped, *_globals_of(value.__code__, value.__globals__)
        ]  # fmt: skip
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        part = cast("functools.partial[Any]", value)
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(value, dict):
        return list(cast(dict[Any, Any], value).values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(cast(list[Any], value))
    if isinstance(value, CellType):
        return [_content(value)]
    if isinstance(value, type | ModuleType | torch.Tensor) or type(value).__module__.split(".")[0] == "torch":
        return []
    slots = [getattr(value, name, None) for name in getattr(type(value), "__slots__", ()) if isinstance(name, str)]
    return [*getattr(value, "__dict__", {}).values(), *slots]
