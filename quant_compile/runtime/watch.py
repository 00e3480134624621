"""Whether the weights that planes were made of are still what they were: one comparison a call, however many weights there are.

Reads Parameters; holds none of them, and changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor

from quant_compile.lowering.identity import Storages, signature_of

Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]

_VERSION = attrgetter("_version")
_ADDRESS = Tensor.data_ptr


@dataclass(frozen=True, eq=False)
class Watched:
    """The Parameters that planes were made of, and what shows a change of them.

    Attributes:
        pick: those Parameters, of all that the graph has.
        pick_versioned: those of them that have a version; one made in inference mode has none.
        versions: show updates in place.
        addresses: show another storage.
        storages: show that an address was given up, and may since have been handed out again.
    """

    pick: Pick
    pick_versioned: Pick
    versions: tuple[int, ...]
    addresses: tuple[int, ...]
    storages: Storages

    @staticmethod
    def of(parameters: tuple[Any, ...], positions: Sequence[int]) -> Watched:
        """As they are now."""
        pick = picker(positions)
        pick_versioned = picker([position for position in positions if not parameters[position].is_inference()])
        watched = pick(parameters)
        return Watched(
            pick, pick_versioned, _all(_VERSION, pick_versioned(parameters)), _all(_ADDRESS, watched), Storages(watched)
        )

    def unchanged(self, parameters: tuple[Any, ...]) -> bool:
        """Whether nothing shows a change; two passes over the Parameters in C."""
        return (
            not self.storages.died
            and self.versions == _all(_VERSION, self.pick_versioned(parameters))
            and self.addresses == _all(_ADDRESS, self.pick(parameters))
        )


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


def _all(look: Callable[[Any], int], parameters: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(map(look, parameters))
