"""Parts of weights: how they are described, which schemes they can have, and that they make the codes of the whole.

The process group is torch's fake one: this process is rank 1 of 2, and collectives do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.report import Report, WeightLine
from quant_compile.ir.scheme import parse
from quant_compile.ir.shards import Shard as Part
from quant_compile.lowering.identity import identity_of, local_of, shard_of
from quant_compile.lowering.shards import refusal, shares_scale, whole_shape, with_largest
from quant_compile.lowering.weights import STORE
from quant_compile.model.ledger import LEDGER
from quant_compile.model.names import names_in


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def weight(mesh: DeviceMesh, whole: torch.Tensor, placement: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(whole, mesh, [placement], src_data_rank=None), requires_grad=False)


def test_a_part_is_described(mesh: DeviceMesh) -> None:
    whole = torch.arange(48.0).view(8, 6)
    for placement, wanted, pieces in (
        (Shard(0), whole[4:], [4, 4]),
        (Shard(1), whole[:, 3:], [3, 3]),
        (_StridedShard(0, split_factor=2), whole[[2, 3, 6, 7]], [2, 2, 2, 2]),
    ):
        parameter = weight(mesh, whole, placement)
        local = local_of(parameter)
        part = shard_of(local)
        assert part is not None
        assert torch.equal(local, wanted)
        assert (part.shape, part.local, part.copies) == ((8, 6), tuple(wanted.shape), 1)
        assert part.pieces(part.cuts[0][0]) == pieces
        assert part.placements.endswith("over 2 ranks")


def test_a_copy_on_every_rank_is_whole(mesh: DeviceMesh) -> None:
    part = shard_of(local_of(weight(mesh, torch.ones(4, 4), Replicate())))
    assert part is not None
    assert (part.cuts, part.copies) == ((), 2)


def test_partial_values_are_no_part(mesh: DeviceMesh) -> None:
    whole = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]), requires_grad=False)
    assert local_of(whole) is whole
    described = Part.of(whole)
    assert isinstance(described, Reject)
    assert "Partial" in described.reason


def test_a_dtensor_and_its_part_are_one_weight(mesh: DeviceMesh) -> None:
    model = nn.Linear(6, 8, bias=False)
    model.weight = weight(mesh, torch.ones(8, 6), Shard(0))
    local = local_of(model.weight)
    assert identity_of(model.weight) == identity_of(local)
    assert STORE.entry(model.weight) is STORE.entry(local)
    assert LEDGER.record(model.weight) is LEDGER.record(local)
    assert names_in(model)[id(local)].full == ("weight",)
    assert whole_shape(local) == (8, 6)


@pytest.mark.parametrize(
    ("spec", "shape", "dim", "transposed", "reason"),
    [
        ("FP8_DYNAMIC", (64, 96), 1, False, None),
        ("W4A16", (64, 512), 1, False, None),
        ("W4A16", (64, 384), 1, False, "k_local=192 of k=384"),
        ("W4A16", (64, 384), 0, False, None),
        ("W4A16", (384, 64), 0, True, "k_local=192 of k=384"),
        ("FP8_BLOCK", (384, 128), 0, False, "n_local=192 of n=384"),
        ("FP8_BLOCK", (512, 128), 0, False, None),
        ("NVFP4", (64, 48), 1, False, "16 of k"),
        ("W8A16", (1, 64), 0, False, "without any of n=1"),
    ],
)
def test_cuts_through_groups_are_refused(
    mesh: DeviceMesh, spec: str, shape: tuple[int, int], dim: int, transposed: bool, reason: str | None
) -> None:
    part = local_of(weight(mesh, torch.ones(shape), Shard(dim)))
    found = refusal(part, parse(spec), transposed)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert reason in found.reason


def test_gate_and_up_are_cut_each(mesh: DeviceMesh) -> None:
    """256 rows on this rank are 128 of gate and 128 of up, of 192 in all they are 96 each, which cuts a block."""
    for rows, refused in ((512, False), (384, True)):
        part = local_of(weight(mesh, torch.ones(2, rows, 128), _StridedShard(1, split_factor=2)))
        assert (refusal(part, parse("FP8_BLOCK"), False) is not None) == refused


def test_whose_scales_are_of_all_ranks(mesh: DeviceMesh) -> None:
    matrix = local_of(weight(mesh, torch.ones(8, 32), Shard(0)))
    experts = local_of(weight(mesh, torch.ones(4, 8, 32), Shard(0)))  # each is whole on one rank
    assert shares_scale(matrix, parse("NVFP4"))
    assert not shares_scale(matrix, parse("W8A16"))
    assert not shares_scale(experts, parse("NVFP4"))


@pytest.mark.parametrize("spec", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_make_the_codes_of_the_whole(spec: str, dim: int) -> None:
    scheme, whole = parse(spec), torch.randn(16, 64)
    whole[1, 1] = 9.0  # on the first part alone
    planes = family_of(scheme).quantize_weight(whole, scheme)
    for rank, part in enumerate(whole.chunk(2, dim)):
        made = family_of(scheme).quantize_weight(with_largest(part, whole.abs().amax()), scheme)
        for mine, all_ in zip(made, planes, strict=True):
            wanted = all_.chunk(2, dim)[rank] if all_.shape[dim] > 1 else all_
            assert torch.equal(mine[:-1], wanted)


def test_ledgers_are_summed() -> None:
    from quant_compile.ir.report import _summed

    def report(rank: int, scheme: str | None = "W8A16") -> Report:
        part = WeightLine(("w",), 100, 50 + rank, scheme, "rows", "a", "r", True, shard="Shard(dim=0) over 2 ranks")
        norm = WeightLine(("norm",), 8, 8, None, "", "", "no linear", False)
        return Report("p", "cpu", (part, norm), timings={"packing": 1.0 + rank})

    both = _summed([report(0), report(1)])
    assert (both.bytes_total, both.bytes_after, both.coverage) == (208, 109, 1.0)
    assert both.timings == {"packing": 2.0}
    unlike = _summed([report(0), report(1, None)])
    assert unlike.coverage == 0.0
    assert Report.from_json(both.to_json()) == both
