"""Which weight a Parameter is, and whether its values are still those that were read.

A weight's identity is an ``Anchor`` in the Parameter's ``__dict__``, not a weak reference to the Parameter: torch refuses to swap
the values of Parameters that have any (``torch.__future__.set_swap_module_params_on_conversion``), and an anchor moves with the
values that it stands for. Versions and addresses are cheap to compare, but an address may be handed out again: that the storage
behind it is still the same is told by torch when a storage dies.

Of a weight that is distributed over ranks this rank's local tensor is the weight: ``local_of`` a DTensor stands for it everywhere.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from quant_compile.ir.shards import Shard, is_distributed
from quant_compile.ir.subclasses import own_operations

ANCHOR = "_sglquant_anchor"
T = TypeVar("T", bound=Tensor)


class Anchor:
    """The identity of one weight; dies with the Parameter, unless someone lends the weight to one Parameter after another.

    Attributes:
        identity: a number that no other living weight has.
        content: for a weight that is lent: Parameter -> what is equal as long as the values are; None where versions and storages tell.
        shard: for this rank's part of a distributed weight: what it is of it.
        whole: for such a part that stands in its module itself: what the distributed Parameter is made of again.
    """

    def __init__(self, identity: int | None = None, content: Callable[[Tensor], Any] | None = None) -> None:
        self.identity = id(self) if identity is None else identity
        self.content = content
        self.shard: Shard | None = None
        self.whole: Any = None

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # a copy or a file has no identity; this loads everywhere, with weights_only too


def anchor_of(parameter: Tensor) -> Anchor:
    """The anchor of a Parameter, made on first sight."""
    found = peek_anchor(parameter)
    if found is None:
        held = local_of(parameter)
        found = vars(held)[ANCHOR] = Anchor(id(held))
    return found


def peek_anchor(parameter: Tensor) -> Anchor | None:
    """The anchor of a Parameter if it has one."""
    found = vars(local_of(parameter)).get(ANCHOR)
    return found if isinstance(found, Anchor) else None


def local_of(parameter: T) -> T:
    """This rank's part of a distributed weight, which is a plain tensor; any other Parameter itself.

    A DTensor whose local values are no part of it (``Partial``) stays what it is.
    """
    # Asked for each weight at each call, so it comes before torch's own answer.
    local = getattr(parameter, "_local_tensor", None)
    if local is None:
        return parameter
    if getattr(vars(local).get(ANCHOR), "shard", None) is None:
        described = Shard.of(parameter) if is_distributed(parameter) else None
        if not isinstance(described, Shard):
            return parameter
        anchor_of(local).shard = described
    return cast(T, local)


def shard_of(parameter: Tensor) -> Shard | None:
    """What of a distributed weight a tensor of ``local_of`` is; None for a weight that this rank has alone."""
    found = peek_anchor(parameter)
    return None if found is None else found.shard


def identity_of(parameter: Tensor) -> int:
    """A number for the weight that a Parameter is."""
    return anchor_of(parameter).identity


def is_lent(parameter: Tensor) -> bool:
    """Whether a Parameter has the weight for one call only."""
    found = peek_anchor(parameter)
    return found is not None and found.content is not None


def signature_of(parameter: Parameter) -> tuple[Any, ...]:
    """What shows that a Parameter's values may have changed: version and place, or what its lender says."""
    anchor = peek_anchor(parameter)
    if anchor is not None and anchor.content is not None:
        return -1, parameter.dtype, parameter.device, anchor.content(parameter)
    return version_of(parameter), *place_of(parameter)


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where and as what values lie: storage, address, dtype, device, strides. Empty for subclasses that say themselves what they are."""
    with torch._C.DisableTorchFunctionSubclass():
        if not (address := address_of(tensor)):
            return ()
        return StorageWeakRef(
            tensor.untyped_storage()
        ), *address  # as long as it is held, no other storage has its number


def address_of(tensor: Tensor) -> tuple[Any, ...]:
    """``place_of`` without the storage, for those who know that all storages live (``Storages``), inside of
    ``DisableTorchFunctionSubclass``.
    """
    if own_operations(type(tensor)) or tensor.layout != torch.strided:
        return ()
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.stride()


def version_of(parameter: Tensor) -> int:
    """``_version``, or -1 for a Parameter made in inference mode, which has none (``refresh`` is then the only way)."""
    return -1 if parameter.is_inference() else parameter._version


class Storages:
    """Whether the storages of some tensors all live; costs nothing to ask, since torch tells when one dies."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.died: list[Any] = []
        with torch._C.DisableTorchFunctionSubclass():
            self._watched = [weakref.ref(tensor.untyped_storage(), self.died.append) for tensor in tensors]
