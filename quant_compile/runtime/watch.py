"""Which weights a call has, and whether they are still what they were: one comparison each, however many weights there are.

``Looks.best`` looks at all of them in one loop of C++ (``watch.cpp``) where that is compiled, ``LOOPS`` in loops of Python's. Reads
Parameters; holds none of them, and changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor

from quant_compile.lowering.identity import Storages, signature_of
from quant_compile.runtime import native

Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]
Look = Callable[[tuple[Any, ...]], Hashable]

_VERSION = attrgetter("_version")
_ADDRESS = Tensor.data_ptr


@dataclass(frozen=True)
class Looks:
    """How Parameters are looked at.

    Attributes:
        identities: Parameters -> what is equal for the same objects, as long as they live.
        states: (Parameters, positions) -> a function of such Parameters whose result is equal as long as no version (of those that have
            one; Parameters made in inference mode have none) and no address at these positions has changed.
    """

    identities: Look
    states: Callable[[tuple[Any, ...], Sequence[int]], Look]

    @staticmethod
    def best() -> Looks:
        """The fastest that there is by now."""
        made = native.module()
        if made is None:
            return LOOPS
        return Looks(made.identities, lambda parameters, positions: _after(picker(positions), made.states))


def _states(parameters: tuple[Any, ...], positions: Sequence[int]) -> Look:
    pick = picker(positions)
    versioned = picker([position for position in positions if not parameters[position].is_inference()])
    return lambda parameters: (_all(_VERSION, versioned(parameters)), _all(_ADDRESS, pick(parameters)))


def _all(look: Callable[[Any], int], parameters: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(map(look, parameters))


def _after(pick: Pick, look: Look) -> Look:
    return lambda parameters: look(pick(parameters))


LOOPS = Looks(lambda parameters: _all(id, parameters), _states)


@dataclass(frozen=True, eq=False)
class Watched:
    """The Parameters that planes were made of, and what shows a change of them.

    Attributes:
        look: see ``Looks.states``; shows updates in place, and another storage.
        seen: what it said when the planes were made.
        storages: show that an address was given up, and may since have been handed out again.
    """

    look: Look
    seen: Hashable
    storages: Storages

    @staticmethod
    def of(parameters: tuple[Any, ...], positions: Sequence[int], looks: Looks = LOOPS) -> Watched:
        """As they are now."""
        look = looks.states(parameters, positions)
        return Watched(look, look(parameters), Storages(picker(positions)(parameters)))

    def unchanged(self, parameters: tuple[Any, ...]) -> bool:
        """Whether nothing shows a change."""
        return not self.storages.died and self.look(parameters) == self.seen


@dataclass(frozen=True, eq=False)
class Lendings:
    """The same where weights are lent for a call: whatever Parameters have them, what their lenders say of their content."""

    positions: Sequence[int]
    signatures: list[Any]

    @staticmethod
    def of(parameters: tuple[Any, ...], positions: Sequence[int]) -> Lendings:
        """As they are now."""
        return Lendings(positions, [signature_of(parameters[position]) for position in positions])

    def unchanged(self, parameters: tuple[Any, ...]) -> bool:
        """Whether nothing shows a change."""
        return self.signatures == [signature_of(parameters[position]) for position in self.positions]


def picker(positions: Sequence[int]) -> Pick:
    """Tuple of the values at ``positions``, in C: of a tuple's own part where they follow one another."""
    if len(positions) == 0:
        return lambda values: ()
    first, last = positions[0], positions[-1]
    if list(positions) == list(range(first, last + 1)):
        return itemgetter(slice(first, last + 1))
    return itemgetter(*positions)
