"""Weights that torch.distributed divides among ranks: what of one this rank has, and the graphs that read it.

A rank's local tensor is the weight for everything else: its sizes are those of the site, its values those of the planes. Reads
DTensors and copied Dynamo graphs; ``localize`` edits such a graph. torch.distributed is imported by whoever made a DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from quant_compile.ir.family import Reject
from quant_compile.ir.graph import STATIC_INPUT
from quant_compile.ir.operands import op_of

TO_LOCAL = {"to_local", "prim_to_local"}
Runs = tuple[tuple[int, int], ...]
"""Parts of a dimension: (first, last) of each, as slices have them."""
_HELD = ("Shard", "_StridedShard", "Replicate")


@dataclass(frozen=True, eq=False)
class Shard:
    """What a rank's tensor is of a weight.

    Attributes:
        shape: of the whole weight.
        local: of this rank's part.
        cuts: for each mesh dimension that divides it, (dimension of the weight, number of parts, dimension of the mesh).
        sections: for each of them, how many sections of the dimension are cut each: gate and up, which lie in one weight.
        placements: as torch writes them, with the ranks of each mesh dimension: ``Shard(dim=0) over 2 ranks``.
        copies: how many ranks have the same part.
        mesh: torch's DeviceMesh.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    cuts: tuple[tuple[int, int, int], ...]
    sections: tuple[int, ...]
    placements: str
    copies: int
    mesh: Any

    @staticmethod
    def of(tensor: Any) -> Shard | Reject:
        """How a DTensor is divided, or why its local tensor is no part of it."""
        cuts, sections = list[tuple[int, int, int]](), list[int]()
        mesh, copies, texts = tensor.device_mesh, 1, list[str]()
        for axis, placement in enumerate(tensor.placements):
            kind, ranks = type(placement).__name__, int(mesh.size(axis))
            if kind not in _HELD:
                return Reject(f"this rank's values are no part of the weight: its placement is {placement!r}")
            if kind == "Replicate":
                copies *= ranks
            elif ranks > 1:
                cuts.append((placement.dim % tensor.dim(), ranks, axis))
                sections.append(int(getattr(placement, "split_factor", 1)))
            texts.append(
                f"{placement!r} over {ranks} ranks" if kind != "Replicate" else f"Replicate() on {ranks} ranks"
            )
        local = tuple(map(int, tensor._local_tensor.shape))
        shape = tuple(map(int, tensor.shape))
        return Shard(shape, local, tuple(cuts), tuple(sections), ", ".join(texts), copies, mesh)

    def parts(self, dim: int) -> int:
        """How many parts a dimension of the weight has."""
        return prod(count for cut, count, _ in self.cuts if cut == dim)

    @property
    def uneven(self) -> bool:
        """Whether ranks have parts of different sizes."""
        return any(self.shape[dim] % self.parts(dim) for dim in range(len(self.shape)))

    def pieces(self, dim: int) -> list[int]:
        """Sizes of the runs of neighbours into which a dimension is cut, in order: of ``_StridedShard`` several on each rank."""
        runs = [self.shape[dim]]
        for (cut, count, _), sections in zip(self.cuts, self.sections, strict=True):
            if cut == dim:
                runs = [piece for run in runs for part in _chunks(run, sections) for piece in _chunks(part, count)]
        return runs

    def runs(self, dim: int) -> Runs:
        """Where this rank's part of a dimension lies in the whole, (first, last) of each run of neighbours, in the part's order.

        Chunks are those of ``torch.chunk``, but for empty ones, which it leaves out.
        """
        runs: Runs = ((0, self.shape[dim]),)
        for (cut, count, axis), sections in zip(self.cuts, self.sections, strict=True):
            if cut != dim:
                continue
            rank, found, start = self.mesh.get_local_rank(axis), list[tuple[int, int]](), 0
            for size in _chunks(sum(last - first for first, last in runs), sections):
                parts = _chunks(size, count)
                first = start + sum(parts[:rank])
                found += within(runs, first, first + parts[rank])
                start += size
            runs = tuple(found)
        return runs

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole weight's shape; a view where nothing is joined."""
        part = whole
        for dim in dict.fromkeys(cut for cut, _, _ in self.cuts):
            part = take(part, dim, self.runs(dim))
        return part


def within(runs: Runs, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Of what some runs hold, one after the other, that from ``first`` to ``last``."""
    at = 0
    for start, stop in runs:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            yield start + low, start + high
        at += stop - start


def take(tensor: Tensor, dim: int, runs: Runs) -> Tensor:
    """Runs of one dimension of a tensor, joined; a view of one."""
    if not runs:
        return tensor.narrow(dim, 0, 0)
    parts = [tensor.narrow(dim, first, last - first) for first, last in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _chunks(size: int, count: int) -> list[int]:
    """Sizes of ``torch.chunk``'s parts; the last may be smaller, or nothing."""
    step = -(-size // count)
    return [max(0, min(step, size - i * step)) for i in range(count)]


def is_distributed(value: Any) -> bool:
    """Whether a value is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def unheld(value: Any) -> str | None:
    """Why a DTensor's local tensor cannot stand for it; None where it can, and for any other value."""
    described = Shard.of(value) if is_distributed(value) else None
    return described.reason if isinstance(described, Reject) else None


def localize(gm: fx.GraphModule, positions: Mapping[int, int]) -> None:
    """Let all that reads the local tensor of a distributed weight read an argument of its own.

    A DTensor that nothing reads otherwise is no argument any more, which saves its unwrapping at each call.

    Args:
        gm: of ``copy_graph``; edited.
        positions: position of a distributed weight among the arguments -> that of its local tensor, which has none yet.
    """
    for node in gm.graph.find_nodes(op="placeholder"):
        position = positions.get(node.meta.get("argument", -1))
        readers = [user for user in node.users if op_of(user) in TO_LOCAL] if position is not None else []
        if not readers or position is None:
            continue
        local = _placeholder(gm.graph, node, readers[0].meta["example_value"], position)
        for reader in readers:
            reader.replace_all_uses_with(local)
            gm.graph.erase_node(reader)
        if not node.users:
            gm.graph.erase_node(node)


def _placeholder(graph: fx.Graph, whole: fx.Node, value: Tensor, position: int) -> fx.Node:
    last = graph.find_nodes(op="placeholder", sort=False)[-1]
    with graph.inserting_after(last):
        local = graph.placeholder(f"{whole.name}_local")
    local.target = local.name
    local.meta |= {"argument": position, "example_value": value, "tensor_dict": dict(STATIC_INPUT)}
    local._dynamo_source = getattr(whole, "_dynamo_source", None)  # type: ignore[attr-defined]
    return local


def local_tensor(value: Any) -> Tensor:
    """The tensor that this rank has of a DTensor; the very object, which lives as long as the DTensor."""
    assert isinstance(value._local_tensor, torch.Tensor)
    return value._local_tensor
