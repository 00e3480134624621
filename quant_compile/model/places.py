"""Where a model holds its Parameters, each place under the name that a checkpoint of the model has for it.

Wrappers are left out of names: what ``torch.compile``, FSDP, activation checkpointing, data parallelism, averaging and PEFT
put around a module. A wrapper is known by its class, or by an attribute that torch keeps for itself, so that a model's own
attribute called ``module`` stays in its names. Reads modules only; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from quant_compile.lowering.identity import local_of

# Attributes that torch's wrappers keep what they wrap in; no model uses these names for itself.
RESERVED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Wrappers whose attribute has an ordinary name: package, class (or a base of it), attribute.
_AROUND = (
    ("torch", "DataParallel", "module"),
    ("torch", "DistributedDataParallel", "module"),
    ("torch", "AveragedModel", "module"),
    ("deepspeed", "DeepSpeedEngine", "module"),
)
_PEFT = (
    ("peft", "PeftModel", "base_model"),
    ("peft", "BaseTuner", "model"),
    ("peft", "BaseTunerLayer", "base_layer"),
    ("peft", "AuxiliaryTrainingWrapper", "original_module"),
    ("peft", "TrainableTokensWrapper", "token_adapter"),
)
# Where PEFT keeps trained copies of what is wrapped: rules see them under its name, checkpoints do not.
_COPIES = (("peft", "AuxiliaryTrainingWrapper", "modules_to_save"),)
_TUNERS = {"lora": "LoRA adapter"}
_PEFTS_OWN = (("peft", "BaseTunerLayer"), ("peft", "BaseTuner"), ("peft", "PeftModel"))
_WRAPPERS = (*_AROUND, *_PEFT, *_COPIES)


@dataclass(frozen=True, eq=False)
class Place:
    """One attribute of one module that holds a Parameter.

    Attributes:
        name: as a checkpoint has it: dotted, without wrappers.
        raw: as ``named_parameters`` has it.
        alias: ``name``, but without a parametrization (``fc.weight`` for ``fc.parametrizations.weight.original``) and for
            PEFT's trained copy of a module (``modules_to_save``) that module's name.
        module: that holds it.
        attribute: its name there.
        parameter: the Parameter; of one that is distributed this rank's part.
        role: ``LoRA adapter`` or the like; empty for a weight of the model.
        tuners: PEFT's layers around it, which may merge adapters into it; the outermost first.
        owner: the parametrized module, where ``module`` is only what a parametrization keeps.
    """

    name: str
    raw: str
    alias: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    role: str = ""
    tuners: tuple[nn.Module, ...] = ()
    owner: nn.Module | None = None

    @property
    def module_class(self) -> str:
        """Class name of the module that the weight belongs to; of a parametrized one that which its author gave it."""
        kind = type(self.owner or self.module)
        # torch gives a parametrized module a class of its own, ParametrizedLinear, below the one that it had.
        return (kind.__mro__[1] if "parametrizations" in (self.owner or self.module)._modules else kind).__name__


@dataclass(frozen=True, eq=False)
class _At:
    """Where a walk is: dotted prefixes without a trailing dot, and what lies around."""

    name: str = ""
    raw: str = ""
    alias: str = ""
    role: str = ""
    tuners: tuple[nn.Module, ...] = ()
    owner: nn.Module | None = None

    def to(self, module: nn.Module, attribute: str) -> _At:
        """One step down."""
        if not _is_special(type(module), attribute):
            name, raw, alias = (_joined(prefix, attribute) for prefix in (self.name, self.raw, self.alias))
            return _At(name, raw, alias, self.role, self.tuners, self.owner)
        here = replace(self, raw=_joined(self.raw, attribute))
        if is_a(module, "peft", "BaseTunerLayer"):
            here = replace(here, tuners=(*self.tuners, module))
        if _is_around(module, attribute):
            return here
        here = replace(here, name=_joined(self.name, attribute), role=self.role or _adapter(module))
        copied = _is_step(module, attribute, _COPIES)
        return here if copied else replace(here, alias=_joined(self.alias, attribute))


def places(model: nn.Module) -> list[Place]:
    """Every place of every Parameter of a model, aliases included, in the order of ``named_parameters``.

    Modules that are kept in plain lists and dicts, which torch does not register, come after all others, unless they hold
    the model themselves.
    """
    found: list[Place] = []
    hidden: list[tuple[_At, nn.Module, str, Any]] = []
    for at, module in _walk(model, _At(), ()):
        found += _own(at, module)
        hidden += [(at, module, attribute, value) for attribute, value in _unregistered(module)]
    known = {id(place.parameter) for place in found}
    registered = {id(module) for module in model.modules()}
    for at, module, attribute, value in hidden:
        for place in _hidden(at.to(module, attribute), module, attribute, value, model, registered):
            if id(place.parameter) not in known:
                found.append(place)
    return found


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Every Parameter of a model once, those in plain lists and dicts of modules too."""
    return list({id(place.parameter): place.parameter for place in places(model)}.values())


def by_parameter(model: nn.Module) -> dict[int, list[Place]]:
    """id of each Parameter -> all places that hold it."""
    out: dict[int, list[Place]] = {}
    for place in places(model):
        out.setdefault(id(place.parameter), []).append(place)
    return out


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``named_modules`` under names without wrappers; a wrapper comes before what it wraps, under one name."""
    return [(at.name, module) for at, module in _walk(model, _At(), ())]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that hold nothing else: ``torch.compile(model)``, ``DistributedDataParallel(model)``."""
    while True:
        inner = next((child for name, child in model.named_children() if _is_plain_wrapper(model, name)), None)
        if inner is None:
            return model
        model = inner


def wrapped_by_peft(model: nn.Module) -> nn.Module | None:
    """The model inside of PEFT's, or None where there is none."""
    inner = model
    for name, attribute in (("PeftModel", "base_model"), ("BaseTuner", "model")):
        if is_a(inner, "peft", name):
            inner = inner._modules[attribute] or inner
    return None if inner is model else inner


def without_reserved(name: str) -> str:
    """A dotted name without what torch's wrappers put in, as far as that shows without their classes."""
    return ".".join(part for part in name.split(".") if part not in RESERVED)


def is_a(module: nn.Module, package: str, name: str) -> bool:
    """Whether a class or a base of it is called so in a package; nothing is imported for that."""
    return (package, name) in _bases(type(module))


@lru_cache(maxsize=4096)
def _bases(kind: type) -> frozenset[tuple[str, str]]:
    """(package, name) of a class and all its bases."""
    return frozenset((base.__module__.split(".")[0], base.__name__) for base in kind.__mro__)


@lru_cache(maxsize=4096)
def _is_special(kind: type, attribute: str) -> bool:
    """Whether names below an attribute of a module of this class are not just longer by the attribute."""
    return attribute in RESERVED or any((package, name) in _bases(kind) for package, name, *_ in _WRAPPERS)


def _joined(prefix: str, part: str) -> str:
    return f"{prefix}.{part}" if prefix else part


def _is_step(module: nn.Module, attribute: str, table: Iterable[tuple[str, str, str]]) -> bool:
    return any(attribute == step and is_a(module, package, name) for package, name, step in table)


def _is_plain_wrapper(module: nn.Module, attribute: str) -> bool:
    return attribute in RESERVED or _is_step(module, attribute, _AROUND)


def _is_around(module: nn.Module, attribute: str) -> bool:
    return _is_plain_wrapper(module, attribute) or _is_step(module, attribute, _PEFT)


def _adapter(module: nn.Module) -> str:
    """What a part of one of PEFT's modules is that is not the wrapped module; empty for other modules."""
    if _bases(type(module)).isdisjoint(_PEFTS_OWN):
        return ""
    parts = type(module).__module__.split(".")
    kind = parts[2] if len(parts) > 2 and parts[1] == "tuners" else "prompt"
    return _TUNERS.get(kind, f"PEFT adapter ({kind})")


def _walk(module: nn.Module, at: _At, above: tuple[int, ...]) -> list[tuple[_At, nn.Module]]:
    """Modules in the order of ``named_modules``, every place of each."""
    found: list[tuple[_At, nn.Module]] = []
    _walk_into(found, module, at, above)
    return found


def _walk_into(found: list[tuple[_At, nn.Module]], module: nn.Module, at: _At, above: tuple[int, ...]) -> None:
    found.append((at, module))
    around = (*above, id(module))
    for attribute, child in module._modules.items():
        if child is None or id(child) in around:
            continue
        below = at.to(module, attribute)
        if isinstance(child, nn.ModuleDict) and _is_step(module, attribute, _COPIES):
            found.append((below, child))
            for key, copy in child.items():  # one for each adapter
                step = replace(below, name=_joined(below.name, key), raw=_joined(below.raw, key))
                _walk_into(found, copy, step, around)
        elif attribute == "parametrizations" and isinstance(child, nn.ModuleDict):
            found.append((below, child))
            for key, parametrization in child.items():
                step = replace(below.to(child, key), alias=_joined(at.alias, key), owner=module)
                _walk_into(found, parametrization, step, around)
        else:
            _walk_into(found, child, below, around)


def _own(at: _At, module: nn.Module) -> Iterator[Place]:
    role = at.role or _adapter(module)
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            name, raw = _joined(at.name, attribute), _joined(at.raw, attribute)
            original = isinstance(module, ParametrizationList) and attribute.startswith("original")
            alias = at.alias if original else _joined(at.alias, attribute)
            own = local_of(parameter)
            yield Place(name, raw, alias, module, attribute, own, role, at.tuners, at.owner if original else None)


_TORCHS_OWN = frozenset(vars(nn.Module()))


def _unregistered(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that may hold modules or Parameters that torch does not know of."""
    for attribute, value in vars(module).items():
        if attribute not in _TORCHS_OWN and isinstance(value, list | tuple | dict | nn.Module):
            yield attribute, value


def _hidden(
    at: _At, module: nn.Module, attribute: str, value: Any, root: nn.Module, registered: set[int]
) -> Iterator[Place]:
    """Places in a plain container, to a depth of three containers."""
    if isinstance(value, nn.Module):
        if id(value) not in registered and not any(part is root for part in value.modules()):
            for below, part in _walk(value, at, ()):
                yield from _own(below, part)
    elif isinstance(value, nn.Parameter):
        yield Place(at.name, at.raw, at.alias, module, attribute, local_of(value), at.role, at.tuners)
    elif attribute.count(".") < 3:
        for key, item in _items(value):
            step = replace(at, name=_joined(at.name, key), raw=_joined(at.raw, key), alias=_joined(at.alias, key))
            yield from _hidden(step, module, f"{attribute}.{key}", item, root, registered)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and items of a container that may be, or hold, modules and Parameters."""
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = cast(Mapping[Any, Any], value).items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(cast(list[Any], value))
    else:
        return
    for key, item in pairs:
        if isinstance(item, nn.Module | nn.Parameter | list | tuple | dict):
            yield str(key), item
