"""Models of transformers that two ranks have in parts: quantized as one process would, each rank its own part.

One world of two processes serves all tests. Inductor is left out, as in most tests of run-time behaviour, but for the slow one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import checks, sums
from tests.distributed.world import World

TP = {"tp_plan": "auto"}
EP = {"tp_plan": "auto", "ep_size": 2}
# Of logits in f32: the ranks add the same numbers as one process does, in another order at most. A code that falls on the other side
# of a step would show as 1e-3 or more.
CLOSE = 1e-5
DOWN = "model.layers.1.mlp.down_proj.weight"


def check(found: list[checks.Compared]) -> None:
    """What holds of every model under every scheme; see the issue of tensor parallelism for each."""
    for rank in found:
        assert rank.coverage == 1.0, rank.skips
        assert rank.parts < CLOSE
        assert rank.same
        assert (
            rank.whole < 1.2 * rank.error
        )  # rowwise inputs have scales of their own on each rank: other codes, no worse ones
        assert rank.total.coverage == 1.0
        assert rank.total.bytes_total == rank.one.bytes_total
        assert {line.names for line in rank.total.lines} == {line.names for line in rank.one.lines}
        assert {(line.names, line.scheme) for line in rank.total.lines} == {
            (line.names, line.scheme) for line in rank.one.lines
        }
    assert found[0].total == found[1].total


def test_llama(world: World, folder: Path) -> None:
    found = world.run(checks.compare, checks.make("llama", folder), "FP8_DYNAMIC", TP)
    check(found)
    assert sum(rank.bytes_before for rank in found) > found[0].total.bytes_total  # norms are whole on both


def test_a_damaged_part_shows(world: World, folder: Path) -> None:
    found = world.run(checks.compare, checks.make("llama", folder), "FP8_DYNAMIC", TP, DOWN)
    with pytest.raises(AssertionError):
        check(found)
    assert all(rank.parts > 100 * CLOSE for rank in found)


def test_tensor_parallel_experts(world: World, folder: Path) -> None:
    check(world.run(checks.compare, checks.make("qwen3_moe", folder), "FP8_DYNAMIC", TP))


@pytest.mark.parametrize(("family", "spec"), [("llama", "FP8_DYNAMIC"), ("qwen3_moe", "W8A8")])
def test_sums_joined_with_what_follows(world: World, folder: Path, family: str, spec: str) -> None:
    """One op for each sum, the same bits as without: two ranks' sum has one rounding, whoever adds."""
    first, second = world.run(sums.model, checks.make(family, folder), spec)
    for rank in (first, second):
        assert torch.equal(rank["joined"], rank["written"])
        assert not rank["written notes"]
        after = f"by one kernel, with the residual add, the RMSNorm and the codes of {spec}"
        assert rank["joined notes"] == [
            f"sums over ranks: 3 {after}",
            "sums over ranks: 1 by one kernel, with the residual add, the RMSNorm",
        ]
    assert torch.equal(first["joined"], second["joined"])


# Of e4m3, which has three bits behind the point, and of 127 steps to the largest of 128 normally distributed values.
@pytest.mark.parametrize(("codes", "error"), [("FP8", 0.035), ("INT8", 0.01)])
def test_sums_of_codes(world: World, folder: Path, codes: str, error: float) -> None:
    for rank in world.run(sums.coded, checks.make("llama", folder), codes):
        assert rank["as encoded"] and rank["alike"]
        assert error / 3 < rank["error"] < error
        assert 0 < rank["logits"] < 3 * error
        assert rank["notes"] == [f"sums over ranks: 4 by {codes} codes with a scale for each 128 values"]


def test_ranks_agree_on_why_they_share_no_memory(world: World) -> None:
    for rank in world.run(sums.agreed):
        assert rank == [
            None,
            "rank 1 of the group: no reason but this",
            "its ranks are on 2 hosts",
            "the group's backend is gloo, not NCCL",
        ]


def test_sums_without_shared_memory_stay(world: World, folder: Path) -> None:
    for rank in world.run(sums.plain, checks.make("one_layer", folder)):
        assert rank == ["sums over ranks: 2 by torch's collective: a CPU has no symmetric memory"]


def test_expert_parallel_with_biases(world: World, folder: Path) -> None:
    check(world.run(checks.compare, checks.make("gpt_oss", folder), "FP8_DYNAMIC", EP))


def test_latent_attention_and_shared_experts(world: World, folder: Path) -> None:
    check(world.run(checks.compare, checks.make("deepseek_v3", folder), "FP8_DYNAMIC", TP))


@pytest.mark.slow
def test_compiled_by_inductor(world: World, folder: Path) -> None:
    check(world.run(checks.compare, checks.make("one_layer", folder), "W8A16", TP, "", True))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["W8A8", "W8A16", "NVFP4", checks.TENSOR, checks.GROUP32], ids=str)
@pytest.mark.parametrize(("family", "plan"), [("llama", TP), ("tied", TP), ("qwen3_moe", TP), ("qwen3_moe", EP)])
def test_every_scheme(world: World, folder: Path, family: str, plan: dict[str, Any], policy: Any) -> None:
    check(world.run(checks.compare, checks.make(family, folder), policy, plan))


@pytest.mark.parametrize("policy", ["NVFP4", checks.TENSOR, checks.GROUP32], ids=["nvfp4", "tensor", "group32"])
def test_codes_are_those_of_the_whole_weight(world: World, folder: Path, policy: Any) -> None:
    assert world.run(checks.codes, checks.make("llama", folder), policy) == [[], []]


def test_codes_of_channels(world: World, folder: Path) -> None:
    """Rows are whole under a colwise cut; a rowwise one gives each rank scales of its own."""
    for wrong in world.run(checks.codes, checks.make("llama", folder), "FP8_DYNAMIC"):
        names = {name.rpartition(".")[2] for name, _ in wrong}
        assert names == {"o_proj", "down_proj"}


def test_from_compile_to_uncompile(world: World, folder: Path) -> None:
    first, second = world.run(checks.lifecycle, checks.make("one_layer", folder))
    assert first == second
    assert first["generated"] == first["alone"]
    assert first["coverage"] == 1.0
    assert first["again"] and not first["edited"]
    assert first["untouched"] == (True, {"Tensor", "Parameter"})


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["compiled", "later"])
def test_each_rank_releases_its_parts(world: World, folder: Path, early: bool) -> None:
    for rank in world.run(checks.released, checks.make("one_layer", folder), early):
        assert rank["first"] and rank["again"] and rank["shorter"]
        assert rank["ledger"][0] == rank["ledger"][1] and rank["ledger"][0][0] == 1.0
        assert rank["compiled_again"] == (0 if early else 1)
        assert rank["bytes"] == 0 and (early or rank["freed"] > 0)
        assert rank["generated"][0] == rank["generated"][1]
        for said in rank["read"]:
            assert said.startswith("ReleasedWeightError") and "restore" in said
        assert rank["uncompile"].startswith("StaleWeightError")
        assert rank["restored"] == 7 and rank["after"] and rank["state"]
        assert rank["untouched"] and rank["classes"]


def check_saved(found: list[dict[str, Any]]) -> None:
    assert [rank["said"] for rank in found] == ["", ""]
    first = found[0]
    assert first["names"] and first["config"] and first["differ"] == []
    assert first["off"] < CLOSE
    for rank in found:
        assert rank["again"] and "convert" in rank["packed"] and rank["packed"].startswith("SaveError")


def test_one_checkpoint_is_saved(world: World, folder: Path, tmp_path: Path) -> None:
    """The files are those of one process, bit by bit, gates and ups of experts in their places."""
    check_saved(world.run(checks.saved, checks.make("one_block", folder), tmp_path, "FP8_DYNAMIC", TP))


def test_released_parts_are_joined(world: World, folder: Path, tmp_path: Path) -> None:
    path = checks.make("one_layer", folder)
    check_saved(world.run(checks.saved, path, tmp_path, checks.GROUP32, TP, True))
    for rank in world.run(checks.saved, path, tmp_path / "other", "W8A16", TP, True):
        assert rank["said"].startswith("SaveError") and "o_proj" in rank["said"] and "scales of its own" in rank["said"]
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize(("family", "plan"), [("one_block", TP), ("one_block", EP), ("gpt_oss", EP), ("tied", TP)])
def test_every_family_is_saved(
    world: World, folder: Path, tmp_path: Path, family: str, plan: dict[str, Any], release: bool
) -> None:
    check_saved(world.run(checks.saved, checks.make(family, folder), tmp_path, checks.GROUP32, plan, release))


def test_refusals(world: World, folder: Path) -> None:
    for rank in world.run(checks.refusals, checks.make("one_layer", folder), folder):
        assert rank["kept"] == {"model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"}
        assert any("k_local=64 of k=128" in reason and "group" in reason for _, reason in rank["cut"])
        assert "needs whole weights" in rank["calibrate"] and "Shard(dim=0) over 2 ranks" in rank["calibrate"]
        assert "model.layers.0.mlp.up_proj" in rank["nan"] and "NaN" in rank["nan"]
        assert "FSDP2" in rank["fsdp"]


def test_products_of_dtensors_stay(world: World) -> None:
    for rank in world.run(checks.by_torch, "W8A16"):
        assert rank["error"] < 1e-6
        assert len(rank["skips"]) >= 2 and all("DTensor" in reason for _, reason in rank["skips"])


@pytest.mark.slow  # a world of its own, which it breaks
def test_ranks_hear_which_one_failed_and_why(folder: Path) -> None:
    world, started = World(), time.monotonic()
    try:
        first, second = world.run(checks.one_rank_fails, checks.make("one_layer", folder), 20.0)
    finally:
        world.close()
    assert "up_proj" in second and "This is rank 1 of 2" in second
    assert "Rank 1 of 2 had failed before" in first and "up_proj" in first
    assert time.monotonic() - started < 200  # the timeout, and not torch's half an hour
