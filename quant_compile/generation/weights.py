"""Notice that a model's weights are no longer those that a CUDA graph was recorded with.

A recorded graph reads planes and parameters where they lay. ``Weights`` counts the changes: an update in place is seen at each
token; a Parameter that is replaced, or moved to other memory, when a call of ``generate`` begins. So are numbers and hooks of modules
that no compiled graph stands for, since no guard of Dynamo's looks at these.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from quant_compile.lowering.identity import Storages, address_of
from quant_compile.lowering.weights import STORE

_VERSION = attrgetter("_version")
LIBRARIES = {"torch", "transformers"}  # whose code around compiled blocks depends on its inputs alone


class Weights:
    """The Parameters and buffers of a model, and how often they have changed.

    Args:
        model: held weakly.
        around: its modules that run as they were written, around compiled blocks.
    """

    def __init__(self, model: nn.Module, around: Iterable[nn.Module] = ()) -> None:
        self._model = weakref.ref(model)
        self._around = [weakref.ref(module) for module in around]
        self._python: list[Any] = []
        self._places: list[tuple[int, tuple[Any, ...]]] = []
        self._storages = Storages(())
        self._watched: list[Tensor] = []
        self._versions: list[int] = []
        self._changes = 0

    def look(self) -> None:
        """Compare all that a graph may read; when a call begins. Dynamo guards neither Parameters nor which modules hold them."""
        model = self._model()
        held = list(_tensors(model)) if model is not None else []
        python = [_python_state(module) for reference in self._around if (module := reference()) is not None]
        if python != self._python:
            self._python = python
            self._changes += 1
        with torch._C.DisableTorchFunctionSubclass():
            places = [(id(tensor), () if _released(tensor) else address_of(tensor)) for tensor in held]
            if places == self._places and not self._storages.died:
                return
            self._places = places
            self._changes += 1
            self._storages = Storages(tensor for tensor, (_, place) in zip(held, places, strict=True) if place)
            self._watched = [t for t in held if isinstance(t, Parameter) and not t.is_inference() and not _released(t)]
            self._versions = list(map(_VERSION, self._watched))

    def gone(self) -> bool:
        """Whether memory that a graph may read has been given up since the last look; costs nothing to ask."""
        return bool(self._storages.died)

    def foreign(self) -> str | None:
        """Code of a user's that a call runs where no compiled graph stands for it, so that nothing may stand in for a call; None: none."""
        model = self._model()
        if torch.nn.modules.module._has_any_global_hook():
            return "all modules have hooks"
        for module in model.modules() if model is not None else ():
            if has_hooks(module) or "forward" in vars(module):
                return f"a module has hooks, or a forward of its own ({type(module).__name__})"
        around = [module for reference in self._around if (module := reference()) is not None]
        own = next((m for m in around if type(m).__module__.partition(".")[0] not in LIBRARIES), None)
        return None if own is None else f"{type(own).__name__} runs code of its own around compiled graphs"

    def versions(self) -> list[int]:
        """Counts that move when a call writes to a Parameter or a buffer."""
        model = self._model()
        with torch._C.DisableTorchFunctionSubclass():
            held = list(_tensors(model)) if model is not None else []
            return [-1 if tensor.is_inference() else tensor._version for tensor in held]

    def state(self) -> tuple[int, int]:
        """Counts that move when a weight is updated in place or planes are packed anew; cheap."""
        with torch._C.DisableTorchFunctionSubclass():
            versions = list(map(_VERSION, self._watched))
        if versions != self._versions:
            self._versions = versions
            self._changes += 1
        return self._changes, STORE.epoch


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """As ``parameters`` and ``buffers`` do, with repetitions and several times faster."""
    stack = [module]
    while stack:
        held = vars(stack.pop())
        for values in (held["_parameters"], held["_buffers"]):
            yield from (value for value in values.values() if value is not None)
        stack += [child for child in held["_modules"].values() if child is not None]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of others than transformers, whose own collect outputs that a call asks for and do nothing else."""
    held = vars(module)
    if not held["_forward_hooks"] and not held["_forward_pre_hooks"]:
        return False  # nearly always; each call asks this of every block
    hooks = (*held["_forward_hooks"].values(), *held["_forward_pre_hooks"].values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _python_state(module: nn.Module) -> tuple[Any, ...]:
    """What decides how a module runs, but for its weights: numbers, texts, children, hooks, a ``forward`` of its own."""
    held = vars(module)
    plain = [(name, value) for name, value in held.items() if isinstance(value, bool | int | float | str)]
    parts = (held["_modules"], held["_forward_hooks"], held["_forward_pre_hooks"])
    return plain, [list(map(id, part.values())) for part in parts], id(held.get("forward"))


def _released(tensor: Tensor) -> bool:
    return type(tensor) is not Parameter and getattr(tensor, "released_by_sglquant", False)
