"""Models that two GPUs of one host have in parts, over NCCL: quantized whole, near one process's result, the same tokens on both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import checks, sums
from tests.distributed.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2,
        reason=f"needs 2 GPUs, and {torch.cuda.device_count()} can be seen (run without -n)",
    ),
]
# Of logits in bf16, whose products are added in another order; a part that is counted twice is five times as far off.
CLOSE = 0.08


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World("nccl")
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("policy", ["FP8_DYNAMIC", "W4A16"])
@pytest.mark.parametrize(
    ("family", "experts"), [("wide_llama", False), ("wide_qwen3_moe", False), ("wide_qwen3_moe", True)]
)
def test_two_gpus(world: World, folder: Path, family: str, experts: bool, policy: str) -> None:
    path = checks.make(family, folder)
    first, second = world.run(checks.on_gpus, path, policy, checks.plan(experts))
    assert first["tokens"] == second["tokens"]
    for rank in (first, second):
        found = rank["compared"]
        assert found.coverage == 1.0 and found.total.coverage == 1.0, found.skips
        assert found.total.bytes_total == found.one.bytes_total
        assert found.same
        assert found.parts < CLOSE


def test_a_damaged_part_shows(world: World, folder: Path) -> None:
    path = checks.make("wide_llama", folder)
    damage = ("model.layers.0.mlp.down_proj.weight", 2.0)
    for rank in world.run(checks.on_gpus, path, "FP8_DYNAMIC", checks.plan(False), damage):
        found: Any = rank["compared"]
        assert found.parts > 3 * CLOSE


# --- sums over ranks and what follows them, by one kernel ---

# Sums of squares in another order move some codes and normed values across a tie, and a row's largest value once in a great while.
FLIPPED, RESCALED, STEP = 0.002, 0.01, 2**-7


def check_sums(found: list[dict[str, Any]]) -> None:
    for rank in found:
        apart = rank["apart"]
        assert apart.sums == [], "calls whose sums are not NCCL's"
        assert apart.flipped <= FLIPPED and apart.rescaled <= RESCALED * apart.rows and apart.steps <= STEP, apart
        assert rank["alike"]


@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "W8A8"])
@pytest.mark.parametrize("k", [2048, 8192, 72])
def test_sums_one_after_the_other(world: World, k: int, spec: str) -> None:
    check_sums(world.run(sums.repeated, k, spec, 100))


@pytest.mark.parametrize(("k", "rows"), [(8192, 1), (2048, 64)])
def test_sums_in_a_cuda_graph(world: World, k: int, rows: int) -> None:
    check_sums(world.run(sums.replayed, k, rows, "FP8_DYNAMIC", 100))


@pytest.mark.parametrize("family", ["wide_llama", "wide_qwen3_moe"])
def test_a_model_whose_sums_are_joined(world: World, folder: Path, family: str) -> None:
    first, second = world.run(sums.model, checks.make(family, folder), "FP8_DYNAMIC", True)
    for rank in (first, second):
        assert not rank["written notes"]
        assert any(
            "by one kernel, with the residual add, the RMSNorm and the codes" in note for note in rank["joined notes"]
        )
        written, joined = rank["written"].float(), rank["joined"].float()
        assert float((joined - written).norm() / written.norm()) < CLOSE
    assert torch.equal(first["joined"], second["joined"])
