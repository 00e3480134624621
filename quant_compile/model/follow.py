"""Products of a model that runs eagerly, and which of its weights each multiplies by; a weight is known by its address.

What is made of a weight (one expert, those that tokens chose, a transpose) is followed from call to call, since it has an address or a
storage of its own. Reads the calls; what becomes of a product says the class that derives from ``Following``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from quant_compile.ir.errors import OptionError
from quant_compile.ir.operands import Operands, called, operands
from quant_compile.ir.products import PRODUCTS, Product, product
from quant_compile.ir.stored import CASTS, VIEWS

# By name of the op: what grouped products of a block are called; how slices of weights are taken.
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_HERE = object()


@dataclass(frozen=True)
class Made:
    """What was made of a weight.

    Attributes:
        weight: its name.
        steps: what makes the same of other values of the weight, one call after the other.
    """

    weight: str
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def of(self, values: Tensor) -> Tensor:
        """The same of ``values``, which lie as the weight does."""
        for step in self.steps:
            values = step(values)
        return values


@dataclass(frozen=True, eq=False)
class Meeting:
    """A product of something with a known weight.

    Attributes:
        made: which weight, and what was made of it.
        x: what it is multiplied by.
        weight: the operand that is, or was made of, the weight.
        product: its letters; None for rows in groups, one expert each.
        rows: of a product in groups: ends of the groups, [experts]; None: all rows meet all experts.
        swapped: the weight is the left operand.
        func, args, kwargs: the call.
    """

    made: Made
    x: Tensor
    weight: Tensor
    product: Product | None
    rows: Tensor | None
    swapped: bool
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def call(self) -> Any:
        """What the model computes."""
        return self.func(*self.args, **self.kwargs)


class Following(TorchFunctionMode):
    """Finds the products with some weights, by address, and hands each to ``meet``."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self._made_of: Any = WeakTensorKeyDictionary()

    def meet(self, meetings: list[Meeting]) -> Any:
        """The result of a call in which weights were met; one for each side that is a weight."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = called(func)
        if name.rpartition(".")[2].rpartition("::")[2].rstrip(">") in _GROUPED:
            meetings = self._in_groups(func, args, kwargs)
        elif name in PRODUCTS:
            found = product(name, operands(func, args, kwargs))
            meetings = self._sides(found, func, args, kwargs) if isinstance(found, Product) else []
        else:
            made = func(*args, **kwargs)
            self._follow(name, func, args, kwargs, made)
            return made
        return self.meet(meetings) if meetings else func(*args, **kwargs)

    def _known(self, tensor: Tensor) -> Made | None:
        made = self._made_of.get(tensor)
        if made is not None:
            return made
        name = self.weights.get(tensor.data_ptr())
        return None if name is None else Made(name)

    def _may_be_known(self, value: Any) -> bool:
        return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value in self._made_of)

    def _follow(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not any(map(self._may_be_known, (*args, *kwargs.values()))):
            return  # most calls; to bind their operands takes longer
        given: Operands | None = operands(func, args, kwargs)
        source = None if given is None else given.get("self")
        if not isinstance(source, Tensor):
            return
        known = self._made_of.get(source)
        if known is None and isinstance(source, nn.Parameter) and _is_taken_apart(name, source):
            known = self._known(source)
        if known is None:
            return
        several = isinstance(result, tuple | list)
        for index, part in enumerate(result if several else (result,)):
            if isinstance(part, Tensor) and part.is_floating_point():
                step = None if name in CASTS else _again(func, args, kwargs, source, index if several else None)
                self._made_of[part] = known if step is None else Made(known.weight, (*known.steps, step))

    def _sides(self, found: Product, func: Any, args: Any, kwargs: Any) -> list[Meeting]:
        sides = [(found.left, found.right), (found.right, found.left)]
        out: list[Meeting] = []
        for x, weight in sides[: 1 if found.op == "linear" else 2]:
            known = self._known(weight)
            if known is not None:
                out.append(Meeting(known, x, weight, found, None, weight is found.left, func, args, kwargs))
        return out

    def _in_groups(self, func: Any, args: Any, kwargs: Any) -> list[Meeting]:
        def bound(x: Tensor, weight: Tensor, offs: Tensor | None = None, **ignored: Any) -> list[Meeting]:
            known = self._known(weight)
            return [] if known is None else [Meeting(known, x, weight, None, offs, False, func, args, kwargs)]

        return bound(*args, **kwargs)


def _is_taken_apart(name: str, parameter: nn.Parameter) -> bool:
    """Whether an op makes of a weight what has another address: any of one with experts; views of a matrix, but not rows of a table."""
    return parameter.dim() == 3 or (name in VIEWS and name not in ("getitem", "index_select"))


def _again(func: Any, args: Any, kwargs: Any, source: Tensor, index: int | None) -> Callable[[Tensor], Tensor]:
    """The call for another tensor in the place of ``source``, which is not kept alive."""
    left = tuple(_HERE if arg is source else arg for arg in args)
    named = {key: _HERE if value is source else value for key, value in kwargs.items()}

    def step(values: Tensor) -> Tensor:
        result: Any = func(
            *(values if arg is _HERE else arg for arg in left),
            **{key: values if value is _HERE else value for key, value in named.items()},
        )
        return result if index is None else result[index]

    return step


def weights_by_address(parameters: Mapping[str, nn.Parameter]) -> dict[int, str]:
    """Address of each weight -> its name."""
    return {parameter.data_ptr(): name for name, parameter in parameters.items()}


def listed(batches: Any) -> list[Any]:
    """Batches as a list.

    Raises:
        OptionError: none, or one batch in place of a list of them.
    """
    if isinstance(batches, Mapping | str | Tensor) or not isinstance(batches, Iterable):
        kind = type(batches).__name__  # pyright: ignore[reportUnknownArgumentType]
        raise OptionError(f"batches must be an iterable of batches, got {kind}. Fix: [batch] for a single one.")
    found: list[Any] = list(cast(Iterable[Any], batches))
    if not found:
        raise OptionError("no batches were given. Fix: a list of some, e.g. token ids [sequences, tokens].")
    return found


def run_batch(model: nn.Module, batch: Any, more: Mapping[str, Any] | None = None) -> Any:
    """Call a model: with keyword arguments for a mapping, positional ones for a tuple, or one tensor.

    Args:
        more: further keyword arguments.
    """
    more = more or {}
    if isinstance(batch, Mapping):
        return model(**{**batch, **more})
    return model(*batch, **more) if isinstance(batch, tuple) else model(batch, **more)


def eagerly() -> Any:
    """A context in which a model's compiled code is not used."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Without dropout and the like, as the model is served; each module's mode comes back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
