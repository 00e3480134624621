"""What a rank reads of each format: planes of its part are those of the whole weight, cut, and its bytes a share of the file's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, Part
from quant_compile.checkpoints.fill import Filler, parts_of
from quant_compile.checkpoints.names import Copy, Experts, Linear, Mapped, Slot
from quant_compile.checkpoints.slices import divided
from quant_compile.ir.shards import Shard, take
from quant_compile.lowering.identity import anchor_of
from quant_compile.pretrained import Plan, plan_of
from tests.checkpoints import packers
from tests.checkpoints.support import linears, quantized, quantized_experts, tiny_llama, tiny_moe, write

RANKS = 2
CASES = {
    "pack-quantized": packers.ct_packed(4, 64, True),
    "pack-quantized with zeros": packers.ct_packed(4, 64, False),
    "pack-quantized 8 bits": packers.ct_int8(True, False),
    "int-quantized": packers.ct_int8(False, True),
    "float-quantized channel": packers.ct_fp8("channel"),
    "float-quantized tensor": packers.ct_fp8("tensor"),
    "nvfp4-pack-quantized": packers.ct_nvfp4(True),
    "mxfp4-pack-quantized": packers.ct_mxfp4(),
    "gptq": packers.gptq(4, 64, True),
    "gptq 3 bits with zeros": packers.gptq(3, 64, False),
    "gptq_v2 8 bits": packers.gptq(8, 64, True, "gptq_v2"),
}


def shard(shape: tuple[int, ...], dim: int, rank: int, sections: int = 1) -> Shard:
    """A rank's part of a weight whose one dimension is cut."""
    local = tuple(size // RANKS if i == dim else size for i, size in enumerate(shape))
    mesh = SimpleNamespace(get_local_rank=lambda axis: rank)
    return Shard(shape, local, ((dim, RANKS, 0),), (sections,), f"Shard(dim={dim}) over {RANKS} ranks", 1, mesh)


def part_of(job: Any, made: Shard) -> Any:
    """The job with a slot of which this rank has a part."""
    local = nn.Parameter(torch.empty(made.local, device="meta"), requires_grad=False)
    anchor_of(local).shard = made
    return replace(job, slot=replace(job.slot, tensor=local))


def cut(plan: Plan, job: Any, made: Shard) -> Any:
    (found,) = divided(Mapped((part_of(job, made),), {}), plan.files, plan.description).jobs
    return found


def values(plan: Plan, job: Any) -> Tensor:
    filler = Filler(plan.files, plan.description, plan.dtype, torch.device("cpu"))
    stems = [[job.stem]] if isinstance(job, Linear) else job.stems
    return torch.stack([torch.cat([filler.read(stem, False).dequantized() for stem in own]) for own in stems]).squeeze(
        0
    )


def named(plan: Plan, ending: str) -> Any:
    return next(job for job in plan.mapped.jobs if ending in job.slot.name)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made: dict[str, Plan] = {}

    def plan(name: str, case: packers.Case) -> Plan:
        if name not in made:
            folder = quantized(tmp_path_factory.mktemp("c"), tiny_llama(layers=1), case.pack, case.config)
            made[name] = plan_of(folder, dtype=torch.bfloat16)
        return made[name]

    yield plan


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_part_of_every_format(name: str, dim: int, checkpoints: Any) -> None:
    plan = checkpoints(name, CASES[name])
    job = named(plan, "down_proj")
    whole = values(plan, job)
    for rank in range(RANKS):
        own = cut(plan, job, shard(tuple(whole.shape), dim, rank))
        assert torch.equal(values(plan, own), whole.chunk(RANKS, dim)[rank])
        codes = max(parts_of(own), key=lambda part: plan.files.tensors[part.name].nbytes)
        assert codes.nbytes(plan.files.tensors[codes.name]) * RANKS == plan.files.tensors[codes.name].nbytes


def test_rows_of_an_ordered_input(checkpoints: Any) -> None:
    """desc_act: rows have all inputs, whose order stays; columns have not, and the error says what to do."""
    plan = checkpoints("ordered", packers.gptq(4, 64, True, shuffled=True))
    job = named(plan, "down_proj")
    whole = values(plan, job)
    assert torch.equal(values(plan, cut(plan, job, shard(tuple(whole.shape), 0, 1))), whole.chunk(RANKS, 0)[1])
    with pytest.raises(CheckpointError, match=r"desc_act(.|\n)*Fix: quantize without desc_act"):
        values(plan, cut(plan, job, shard(tuple(whole.shape), 1, 1)))


@pytest.mark.parametrize(
    ("case", "dim", "what"),
    [
        (packers.awq(True), 1, "item for 128 of k, through which the part 0 to 192 of 384"),
        (packers.ct_packed(4, 128, True), 1, "item for 128 of k"),
        (packers.deepseek(), 1, "item for 128 of k"),
        (packers.modelopt_nvfp4(False), 0, "no parts are read"),
    ],
    ids=["awq", "groups", "blocks", "modelopt"],
)
def test_a_cut_through_what_belongs_together(case: packers.Case, dim: int, what: str, tmp_path: Path) -> None:
    plan = plan_of(quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config), dtype=torch.bfloat16)
    job = named(plan, "down_proj")
    with pytest.raises(CheckpointError, match=rf"down_proj.weight(.|\n)*{what}(.|\n)*Fix: "):
        cut(plan, job, shard((256, 384), dim, 0))


@pytest.mark.parametrize("name", ["awq", "deepseek"])
def test_rows_of_blocks_and_of_packed_words(name: str, checkpoints: Any) -> None:
    plan = checkpoints(name, {"awq": packers.awq(False), "deepseek": packers.deepseek()}[name])
    job = named(plan, "down_proj")
    whole = values(plan, job)
    for rank in range(RANKS):
        own = cut(plan, job, shard(tuple(whole.shape), 0, rank))
        assert torch.equal(values(plan, own), whole.chunk(RANKS, 0)[rank])


@pytest.mark.parametrize(("dim", "sections"), [(0, 1), (1, 2), (2, 1)])
def test_experts_in_files_of_their_own(dim: int, sections: int, tmp_path: Path) -> None:
    """Gate and up of each expert become one weight, of which a rank has a part of both."""
    case = packers.ct_packed(4, 64, True)
    plan = plan_of(quantized_experts(tmp_path, tiny_moe(), case.pack, case.config), dtype=torch.bfloat16)
    job = next(job for job in plan.mapped.jobs if isinstance(job, Experts) and "gate_up" in job.slot.name)
    whole = values(plan, job)
    for rank in range(RANKS):
        made = shard(tuple(whole.shape), dim, rank, sections)
        own = cut(plan, job, made)
        assert torch.equal(values(plan, own), made.part_of(whole))
        names = {part.name for part in parts_of(own)}
        assert len(names) == len(parts_of(own)) and (dim or all(f"experts.{2 - 2 * rank}." not in n for n in names))


def test_bytes_of_a_part(tmp_path: Path) -> None:
    """Runs of rows are one run of bytes, which threads read ahead; columns are not."""
    model = tiny_llama(layers=1)
    files = Files.open(write(tmp_path, model, dict(model.state_dict()), None))
    name = "model.layers.0.mlp.up_proj.weight"
    whole, info = files.get(name), files.tensors[name]
    rows, columns = Part(name).cut(0, ((96, 192),)), Part(name).cut(1, ((0, 64), (128, 192)))
    assert rows.span(info).nbytes == rows.nbytes(info) == info.nbytes // 4 and not rows.cuts
    assert columns.nbytes(info) == info.nbytes // 2 and columns.cuts
    assert torch.equal(files.load(rows, "cpu"), whole[96:192])
    assert torch.equal(files.load(columns, "cpu"), take(whole, 1, ((0, 64), (128, 192))))
    assert files.taken == info.nbytes // 4 + info.nbytes // 2


def test_a_weight_in_16_bits(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    plan = plan_of(write(tmp_path, model, dict(model.state_dict()), None), dtype=torch.bfloat16)
    job = named(plan, "down_proj")
    assert isinstance(job, Copy)
    wanted = linears(model)["model.layers.0.mlp.down_proj"].weight
    for dim in (0, 1):
        own = cut(plan, job, shard(tuple(wanted.shape), dim, 1))
        assert torch.equal(plan.files.load(own.part, "cpu"), wanted.chunk(2, dim)[1])


def test_parts_are_those_of_torch() -> None:
    """Runs against DTensor's own chunks, uneven and strided ones too."""
    whole = torch.arange(23 * 3).view(23, 3)
    for rank in range(RANKS):
        chunks = torch.tensor_split(whole, [12])
        assert torch.equal(shard((23, 3), 0, rank).part_of(whole), chunks[rank])
    gates = torch.arange(24).view(12, 2)
    wanted = torch.cat([half.chunk(RANKS)[1] for half in gates.chunk(2)])
    assert torch.equal(shard((12, 2), 0, 1, 2).part_of(gates), wanted)
    assert shard((12, 2), 0, 1, 2).runs(0) == ((3, 6), (9, 12))


def test_slots_of_whole_weights_stay(checkpoints: Any) -> None:
    plan = checkpoints("gptq", CASES["gptq"])
    jobs = divided(plan.mapped, plan.files, plan.description).jobs
    assert jobs == plan.mapped.jobs and all(isinstance(job.slot, Slot) for job in jobs)
