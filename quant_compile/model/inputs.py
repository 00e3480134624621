"""What a model's weights are multiplied by: which of them read one input, how large it is, and some of its rows.

Reads the calls of a model that runs eagerly; changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quant_compile.model.follow import Following, Meeting
from quant_compile.model.moments import ROWS, Seeing, Size

# Rows of inputs that are kept of each weight.
KEPT = 512


class Readers(Following):
    """Which weights read the very same input, and which weight of a block of experts is met first.

    Attributes:
        leader: by name, the first weight that reads what this one reads.
        first: by the name of a block, the first of its weights that was met: its input is the block's own.
        met: by name, how often.
    """

    def __init__(self, weights: Mapping[int, str], experts: set[str]) -> None:
        super().__init__(weights)
        self.experts = experts
        self.leader: dict[str, str] = {}
        self.first: dict[str, str] = {}
        self.met: Counter[str] = Counter()
        self._read_by: Any = WeakTensorKeyDictionary()

    def meet(self, meetings: list[Meeting]) -> Any:
        for found in meetings:
            name = found.made.weight
            self.met[name] += 1
            if name in self.experts:
                self.first.setdefault(name.rpartition(".")[0], name)
            self._join(name, self._read_by.setdefault(found.x, name))
        return meetings[0].call()

    def _join(self, name: str, other: str) -> None:
        own, theirs = self.leader.get(name, name), self.leader.get(other, other)
        for known in (name, other, *self.leader):
            if self.leader.get(known, known) == own:
                self.leader[known] = theirs

    def inside(self, name: str) -> bool:
        """Whether a weight of experts reads what another one of its block computes."""
        first = self.first.get(name.rpartition(".")[0], name) if name in self.experts else name
        return self.leader.get(name, name) != self.leader.get(first, first)


class Samples(Seeing):
    """Sizes of inputs, and some of their rows.

    Attributes:
        squares, largest: by name, [k] f32: sums of x^2 and max |x| over all rows.
        tokens: by name, how many.
        rows: by name and expert (0 of a matrix), parts [t, k].
    """

    def __init__(self, weights: Mapping[int, str], sizes: Mapping[str, Size], batches: int) -> None:
        super().__init__(weights, sizes)
        self.quota = -(-KEPT // max(1, batches))
        self.squares: dict[str, Tensor] = {}
        self.largest: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.rows: dict[tuple[str, int], list[Tensor]] = {}

    def see(self, name: str, size: Size, expert: int, x: Tensor) -> None:
        if name not in self.squares:
            self.squares[name] = torch.zeros(size.k, dtype=torch.float32, device=x.device)
            self.largest[name] = torch.zeros(size.k, dtype=torch.float32, device=x.device)
            self.tokens[name] = 0
        for part in x.split(ROWS):
            rows = part.float()
            self.squares[name].add_(rows.square().sum(0))
            self.largest[name] = torch.maximum(self.largest[name], rows.abs().amax(0))
        self.tokens[name] += x.shape[0]
        quota = max(1, self.quota // max(1, size.experts))
        self.rows.setdefault((name, expert), []).append(x[:: max(1, x.shape[0] // quota)][:quota].clone())

    def sample(self, name: str, expert: int) -> Tensor | None:
        """[t, k], spread over all batches; None where nothing was met."""
        parts = self.rows.get((name, expert))
        if parts is None:
            return None
        rows = torch.cat(parts)
        return rows[:: max(1, rows.shape[0] // KEPT)][:KEPT]
