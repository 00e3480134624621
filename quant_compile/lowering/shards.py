"""What a scheme asks of a weight that ranks have in parts: groups that no cut goes through, and scales that all parts share.

Every rank quantizes its own part. A scale per row needs nothing more: rows are whole on a rank, or each rank's partial product is
rescaled by its own scales before the sum, which is as right as one scale. A group or a block must lie on one rank. A scale of the
whole tensor must be that of all ranks, so the largest magnitudes are exchanged once, before anything is packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from quant_compile.ir.errors import WeightError
from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.scheme import GROUPED, QuantArgs, Scheme
from quant_compile.lowering.identity import shard_of, signature_of

OF_THE_TENSOR = ("tensor", "tensor_group")


def whole_shape(parameter: Parameter) -> tuple[int, ...]:
    """Shape of a weight; of this rank's part that of the whole, which rules and names are about."""
    shard = shard_of(parameter)
    return tuple(parameter.shape) if shard is None else shard.shape


def refusal(parameter: Tensor, scheme: Scheme, transposed: bool) -> Reject | None:
    """Why a weight cannot have a scheme in the parts that ranks have; the same answer on every rank.

    Args:
        parameter: as ``local_of`` gives it; one that is not distributed has every scheme.
        transposed: stored [k, n], or [E, k, n].
    """
    shard = shard_of(parameter)
    if shard is None or not shard.cuts:
        return None
    rows, columns = (-1, -2) if transposed else (-2, -1)
    last = len(shard.shape)
    sizes: list[list[int]] = []
    for what, dim in (("n", last + rows), ("k", last + columns)):
        pieces = shard.pieces(dim)
        if 0 in pieces:
            return Reject(f"{shard.placements} leaves a rank without any of {what}={shard.shape[dim]}")
        unit = _unit(scheme, what)
        cut = next((size for size in pieces[:-1] if size % unit), None)
        if cut is not None:
            parts = (
                f"{what}_local={shard.shape[dim] // shard.parts(dim)} of {what}={shard.shape[dim]} ({shard.placements})"
            )
            return Reject(
                f"{scheme.spec} has a scale for {unit} of {what}, which the ranks' parts would cut: {parts}.\n"
                f"Fix: a scheme whose groups divide {cut}, or one with a scale per channel."
            )
        sizes.append(pieces)
    takes = family_of(scheme).takes_size
    return next((no for n in sizes[0] for k in sizes[1] if (no := takes(scheme, n, k)) is not None), None)


def _unit(scheme: Scheme, what: str) -> int:
    """How many neighbours of n or k must stay together."""
    return max(_unit_of(args, what) for args in (scheme.weights, scheme.input_activations) if args is not None)


def _unit_of(args: QuantArgs, what: str) -> int:
    if args.block_structure is not None:
        return args.block_structure[0 if what == "n" else 1]
    return args.group_size or 1 if what == "k" and args.strategy in GROUPED else 1


@dataclass(frozen=True, eq=False)
class Agreed:
    """The largest magnitude of a weight over all ranks that have parts of it.

    Attributes:
        signature: of this rank's part when it was measured.
        amax: [1] f32, or [E] of a weight of experts.
    """

    signature: tuple[Any, ...]
    amax: Tensor


def shares_scale(parameter: Tensor, scheme: Scheme) -> bool:
    """Whether a weight's scales depend on other ranks' parts."""
    return scheme.weights.strategy in OF_THE_TENSOR and bool(_reduced(parameter))


def agree(weights: Sequence[tuple[str, Parameter]]) -> list[Agreed]:
    """Measure parts of weights, and take the largest over the ranks; a collective that all of them must call alike.

    Args:
        weights: (name, this rank's part); all distributed.

    Raises:
        WeightError: a weight has NaN or inf on some rank; every rank raises it.
    """
    with torch.no_grad():
        found = [_amax(parameter) for _, parameter in weights]
        for members, groups in _by_groups(parameter for _, parameter in weights):
            _maximize([found[i] for i in members], groups)
    bad = [name for (name, _), amax in zip(weights, found, strict=True) if not bool(amax.isfinite().all())]
    if bad:
        raise WeightError(
            f"{', '.join(bad[:6])} has NaN or inf values, on this rank or on another.\n"
            "Fix: repair the checkpoint, or `keep` this weight in the policy."
        )
    return [Agreed(signature_of(p), amax) for (_, p), amax in zip(weights, found, strict=True)]


def _maximize(amax: list[Tensor], groups: Iterable[Any]) -> None:
    import torch.distributed as dist

    joined = torch.cat(amax)
    for group in groups:
        dist.all_reduce(joined, op=dist.ReduceOp.MAX, group=group)
    for mine, largest in zip(amax, joined.split([part.numel() for part in amax]), strict=True):
        mine.copy_(largest)


def _amax(parameter: Parameter) -> Tensor:
    """[1], or [E] of a weight of experts, f32; NaN counts as inf, which a maximum keeps on every backend."""
    values = parameter.detach()
    values = values.flatten(1) if values.dim() == 3 else values.reshape(1, -1)
    if not values.numel() or not values.is_floating_point():
        return torch.zeros(values.shape[0], device=values.device)
    low, high = torch.aminmax(values, dim=1)
    return torch.maximum(-low, high).to(torch.float32).nan_to_num(nan=float("inf"))


def _reduced(parameter: Tensor) -> list[Any]:
    """The process groups whose ranks have parts of the same matrices; experts that are whole on a rank have none."""
    shard = shard_of(parameter)
    if shard is None:
        return []
    whole = {axis for dim, _, axis in shard.cuts if dim == 0 and len(shard.shape) == 3}
    return [shard.mesh.get_group(axis) for _, _, axis in shard.cuts if axis not in whole]


def _by_groups(weights: Iterable[Parameter]) -> list[tuple[list[int], list[Any]]]:
    """Positions of the weights that one collective serves, in the order in which they come."""
    found: dict[tuple[int, ...], tuple[list[int], list[Any]]] = {}
    for i, parameter in enumerate(weights):
        groups = _reduced(parameter)
        if groups:
            found.setdefault(tuple(map(id, groups)), ([], groups))[0].append(i)
    return list(found.values())


def with_largest(weight: Tensor, amax: Tensor) -> Tensor:
    """[n + 1, k]: a weight and a row that has the largest magnitude of all ranks, so that the tensor's scale is that of the whole.

    Rows are independent but for that scale; the last row's planes are to be dropped.
    """
    row = weight.new_zeros(1, weight.shape[1])
    row[0, 0] = amax.to(weight.dtype)
    return torch.cat((weight, row))
