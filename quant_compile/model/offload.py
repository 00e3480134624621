"""Weights that accelerate lends to a module for one call: their identity and their content, whichever Parameter has them now.

An offloading hook puts a new Parameter into a module before each call and a meta one after it. All of them get the anchor of
their place, so that planes and ledger lines outlive them. Content is known by what it is copied from: a tensor in memory by its
place and version, a file by its time and size; else by a checksum of the values. Reads the hooks; writes anchors.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quant_compile.lowering.identity import ANCHOR, Anchor, peek_anchor, place_of, version_of
from quant_compile.lowering.weights import fingerprint
from quant_compile.model.places import modules_of


class Lent(Anchor):
    """A place that weights are lent to: a module and an attribute of it."""

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        self.holder, self.name = weakref.ref(holder), name


_PLACES: weakref.WeakKeyDictionary[nn.Module, dict[str, Lent]] = weakref.WeakKeyDictionary()


def adopt(model: nn.Module) -> None:
    """Give the Parameters that are in lent places now the identity of their place; forget places that are lent no more."""
    lent: dict[nn.Module, set[str]] = {}
    for module, hook in _hooked(model):
        for holder, name, full in _names(module, hook):
            lent.setdefault(holder, set()).add(name)
            _adopt(holder, name, hook, full)
    for module in [module for module in model.modules() if module in _PLACES]:
        for name in _PLACES[module].keys() - lent.get(module, set()):
            del _PLACES[module][name]


def adopt_at(places: Iterable[Lent], parameters: Iterable[nn.Parameter]) -> bool:
    """``adopt`` for Parameters that are in some of these places; whether all of them have an identity now."""
    known = list(places)
    for parameter in parameters:
        if peek_anchor(parameter) is not None:
            continue
        for place in known:
            holder = place.holder()
            if holder is not None and holder._parameters.get(place.name) is parameter:
                vars(parameter)[ANCHOR] = place
                break
        else:
            return False
    return True


def lent_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The Parameters that are in lent places now."""
    found = (holder._parameters[name] for module, hook in _hooked(model) for holder, name, _ in _names(module, hook))
    return [parameter for parameter in found if parameter is not None]


def execution_device(model: nn.Module) -> Any:
    """Device that lent weights are computed on, or None where none are lent."""
    return next((hook.execution_device for _, hook in _hooked(model) if hook.execution_device is not None), None)


def _hooked(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for _, module in modules_of(model):
        hook = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) is True and getattr(one, "weights_map", None) is not None:
                yield module, one


def _names(module: nn.Module, hook: Any) -> Iterator[tuple[nn.Module, str, str]]:
    """(module that holds a lent Parameter, its name there, its name in the hook's map)."""
    inside = module.named_modules() if getattr(hook, "place_submodules", False) else [("", module)]
    for path, holder in inside:
        for name, parameter in holder._parameters.items():
            if parameter is not None:
                yield holder, name, f"{path}.{name}" if path else name


def _adopt(holder: nn.Module, name: str, hook: Any, full: str) -> None:
    parameter = holder._parameters[name]
    assert parameter is not None
    places = _PLACES.setdefault(holder, {})
    found = peek_anchor(parameter)
    if isinstance(found, Lent) and found is not places.get(name):
        places[name] = found  # tied: it is in a place that was seen before
        return
    place = places.setdefault(name, Lent(holder, name))
    place.content = partial(_content, hook.weights_map, full)
    vars(parameter)[ANCHOR] = place


def _content(source: Any, name: str, parameter: Tensor) -> Any:
    """What is equal as long as the values are."""
    while hasattr(source, "dataset") and hasattr(source, "prefix"):
        source, name = source.dataset, f"{source.prefix}{name}"
    memory = source if isinstance(source, dict) else getattr(source, "state_dict", None)
    if isinstance(memory, Mapping) and isinstance(memory.get(name), Tensor):
        return version_of(memory[name]), *place_of(memory[name])
    file = _file_of(source, name)
    if file is not None:
        return file
    return None if parameter.is_meta else fingerprint(parameter)  # type: ignore[arg-type]


def _file_of(source: Any, name: str) -> tuple[Any, ...] | None:
    """File of a weight on disk, when it was written, and its size."""
    index, folder = getattr(source, "index", None), getattr(source, "save_folder", None)
    if not isinstance(index, Mapping) or name not in index:
        return None
    info: Any = index[name]
    path = info.get("safetensors_file") or (Path(folder) / f"{name}.dat" if folder is not None else None)
    try:
        status = os.stat(path) if path is not None else None
    except OSError:
        return None
    return (str(path), name, status.st_mtime_ns, status.st_size) if status is not None else None
