"""The shared cost model: memory-bound, compute-bound, and its additions."""

from __future__ import annotations

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels._roofline import ROOFS, estimate, roof, shared_memory
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.target import Target

SM90 = Target.fake("sm90")
PROBLEM = Problem(parse("FP8_DYNAMIC"), 28672, 4096, torch.bfloat16)


def test_one_token_costs_the_time_to_read_the_weights() -> None:
    floor = 28672 * 4096 / ROOFS[90].bandwidth
    cost = estimate(PROBLEM, 1, SM90, 0.7, 8.0, bandwidth_efficiency=1.0)
    assert cost == pytest.approx(floor + ROOFS[90].launch, rel=0.01)
    half = estimate(PROBLEM, 1, SM90, 0.7, 4.0, bandwidth_efficiency=1.0)
    assert half - ROOFS[90].launch == pytest.approx(floor / 2, rel=0.01)


def test_many_tokens_cost_the_multiplications() -> None:
    math = 2 * 4096 * 28672 * 4096 / ROOFS[90].math8 / 0.5
    assert estimate(PROBLEM, 4096, SM90, 0.5, 8.0) == pytest.approx(math + ROOFS[90].launch)
    wide = estimate(PROBLEM, 4096, SM90, 0.5, 8.0, math_bits=16)
    assert wide > 1.9 * math


def test_tiles_launches_and_workspaces_add() -> None:
    base = estimate(PROBLEM, 65, SM90, 0.01, 8.0)
    assert estimate(PROBLEM, 65, SM90, 0.01, 8.0, tile_m=128) > 1.9 * base
    assert estimate(PROBLEM, 1, SM90, 1.0, 8.0, launches=2) - estimate(PROBLEM, 1, SM90, 1.0, 8.0) == ROOFS[90].launch
    assert estimate(PROBLEM, 1, SM90, 1.0, 8.0, extra_bytes=1e9) > 200


def test_unlisted_devices_take_the_nearest_older_roof() -> None:
    assert roof(Target("cuda", 103, 160)) == ROOFS[100]
    assert roof(Target("cuda", 75, 40)) == ROOFS[80]
    assert roof(Target("cpu", sm_count=4)).bandwidth == 4 * roof(Target("cpu", sm_count=1)).bandwidth


@pytest.mark.parametrize(
    ("arch", "most"), [(80, 163), (86, 99), (87, 163), (89, 99), (90, 227), (103, 227), (120, 99), (121, 99)]
)
def test_tiles_fit_into_the_shared_memory_of_every_arch(arch: int, most: int) -> None:
    """``most`` KiB is what CUDA's programming guide lets one block have."""
    assert 0.9 * most <= shared_memory(Target("cuda", arch)) / 1024 <= most
