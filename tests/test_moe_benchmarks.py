"""The MoE benchmarks run (tiny sizes, CPU) and write valid JSON; their routings, floors and ratios are what they claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quant_compile.lowering.target import Target
from tests.test_benchmarks import module, run  # noqa: F401  (a fixture)


def test_moe_smoke(tmp_path: Path) -> None:
    result = run("moe.py", tmp_path, "--schemes", "W8A8,W4A16")
    assert len(result["summary"]) == 2 * 3
    assert not [row for row in result["rows"] if row["status"] == "failing"]
    for row in result["summary"]:
        assert row["bf16_us"] > 0 and row["cpu_us"] > 0 and row["dispatch_us"] > 0, row
    errors = {row["contender"]: row["relative_error"] for row in result["rows"]}
    assert set(errors) == {"HF grouped_mm", "HF batched_mm", "torch_cpu_moe", "torch_cpu_moe_int4"}
    assert {(v["shape"], v["scheme"]) for v in result["verdicts"]} == {("tiny", "W8A8"), ("tiny", "W4A16")}


@pytest.mark.slow
def test_moe_e2e_smoke(tmp_path: Path) -> None:
    arguments = ("--models", "Qwen3-30B-A3B", "--batches", "1", "--block-ts", "1", "--no-prefill")
    result = run("moe_e2e.py", tmp_path, *arguments, "--stacks", "inductor-grouped_mm,W8A16,no-such-policy")
    bf16, quantized, broken = result["rows"]
    assert bf16["error"] is None and quantized["error"] is None
    assert quantized["decode B=1"]["speedup"] == pytest.approx(bf16["decode B=1"]["ms"] / quantized["decode B=1"]["ms"])
    assert 0 < quantized["block T=1"]["error_to_bf16"] < 0.05, "int8 weights under 16-bit inputs are close to bf16"
    assert quantized["block_memory"]["experts_ledger_ratio"] < 0.52
    assert quantized["memory"]["coverage"] == 1.0
    assert "no-such-policy" in broken["block T=1"]["reason"] and "no-such-policy" in broken["error"]


def test_even_routing_deals_all_experts(module: Any) -> None:  # noqa: F811
    moe = module("moe")
    shape = moe.SHAPES[0]
    ids = moe.even(shape, 160, torch.Generator().manual_seed(0))
    assert ids.shape == (160, 8)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert ids.flatten().bincount(minlength=128).tolist() == [10] * 128
    assert len(set(ids[:16].flatten().tolist())) == 128, "neighbours choose different experts"


def test_skewed_routing_is_skewed(module: Any) -> None:  # noqa: F811
    moe = module("moe")
    ids = moe.skewed(moe.SHAPES[0], 400, torch.Generator().manual_seed(0))
    counts = ids.flatten().bincount(minlength=128)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert counts[0] > 5 * counts[64:].float().mean()


def test_samples_exceed_the_cache(module: Any) -> None:  # noqa: F811
    """On a GPU enough calls take turns; on a CPU two do."""
    moe = module("moe")
    assert len(moe.samples_of(moe.SMOKE_SHAPES[0], "even", 3, torch.device("cpu"))) == 2


def test_floor_is_bytes_or_operations(module: Any) -> None:  # noqa: F811
    moe = module("moe")
    shape, target = moe.SHAPES[0], Target.fake("sm90")
    cells = {}
    for tokens in (1, 8192):
        ids = moe.even(shape, tokens, torch.Generator().manual_seed(0))
        cells[tokens] = moe.Sample(torch.empty(tokens, shape.hidden), ids, torch.empty(tokens, 8))
    one = moe.floor_us(shape, "FP8_DYNAMIC", cells[1], 4e6, target)
    assert one == pytest.approx((8 * 3 * 2048 * 768 + 4 * 2048) / 4e6)
    many = moe.floor_us(shape, "FP8_DYNAMIC", cells[8192], 4e6, target)
    assert many == pytest.approx(2 * 8192 * 8 * 3 * 2048 * 768 / 1979e6)
    assert moe.floor_us(shape, None, cells[1], 4e6, target) == pytest.approx((16 * 3 * 2048 * 768 + 4 * 2048) / 4e6)
    assert moe.floor_us(shape, None, cells[1], None, target) is None


def test_speedups_are_to_the_faster_inductor_stack(module: Any) -> None:  # noqa: F811
    def row(stack: str, **cells: float) -> dict[str, Any]:
        return {"model": "m", "stack": stack, "error": None, **{name: {"us": us} for name, us in cells.items()}}

    rows = [
        row("inductor-grouped_mm", a=8.0, b=4.0),
        row("inductor-batched_mm", a=6.0),
        row("FP8_DYNAMIC", a=3.0, b=2.0),
    ]
    rows[1]["b"] = {"reason": "too large"}
    module("moe_e2e").add_speedups(rows)
    assert (rows[2]["a"]["speedup"], rows[2]["b"]["speedup"]) == (2.0, 2.0)
    assert rows[0]["a"]["speedup"] == 0.75 and "speedup" not in rows[1]["b"]


def test_batched_mm_is_not_asked_for_prompts(module: Any) -> None:  # noqa: F811
    e2e = module("moe_e2e")

    def setup(stack: str, model: str) -> Any:
        return e2e.MoeSetup(stack, 8, torch.device("cpu"), (1,), 3, True, False, Path(), model)

    assert "GiB" in setup("inductor-batched_mm", "Qwen3-30B-A3B").gathers_too_much(2048)
    assert setup("inductor-batched_mm", "Mixtral-8x7B").gathers_too_much(16) is None
    assert setup("inductor-grouped_mm", "Qwen3-30B-A3B").gathers_too_much(2048) is None
    assert setup("FP8_DYNAMIC", "Qwen3-30B-A3B").policy == "FP8_DYNAMIC"
    assert setup("inductor-batched_mm", "Mixtral-8x7B").implementation == "batched_mm"
