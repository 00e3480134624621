"""The benchmarks run (tiny sizes, CPU) and write valid JSON; their arithmetic says what it claims."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_compile.ir.family import bits_per_weight, family_of
from quant_compile.ir.kv import NAMES, decode, encode, parse_cache
from quant_compile.ir.scheme import PRESETS
from quant_compile.policy import Policy
from tests import textbook
from tests import textbook_gguf as _textbook_gguf  # noqa: F401  adds GGUF types whose scales are searched for

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark script by name, as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = out.read_text()
    assert str(BENCHMARKS.parent) not in text, "a result names a path of this machine"
    return json.loads(text)


def test_gemm_smoke(tmp_path: Path) -> None:
    result = run("gemm.py", tmp_path)
    assert result["machine"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    schemes = {"FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A8", "W4AFP8", "NVFP4A16"}
    assert len(result["summary"]) == len(schemes) * 2 * 2
    assert not [row for row in result["rows"] if row["status"] == "failing"]
    for row in result["summary"]:
        assert row["bf16_us"] > 0 and row["kernel_us"] > 0 and row["dispatch_us"] > 0, row
    assert {verdict["scheme"] for verdict in result["verdicts"]} == schemes


def test_attention_smoke(tmp_path: Path) -> None:
    result = run("attention.py", tmp_path, "--filled", "48")
    assert [row["batch"] for row in result["summary"]] == [1, 2]
    assert not [row for row in result["rows"] if row["status"] != "ok"]
    for row in result["summary"]:
        assert row["bf16_us"] > 0 and row["e4m3_us"] > 0 and row["sdpa_us"] > 0 and row["filled"] == 48
    bf16, codes = (
        next(row for row in result["rows"] if row["contender"] == f"ours {kind}") for kind in ("bf16", "e4m3")
    )
    assert codes["floor_us"] / bf16["floor_us"] == pytest.approx((32 + 4) / (2 * 32), rel=0.05)


def test_attention_prefill_smoke(tmp_path: Path) -> None:
    """Each cache, with keys before the prompt: nothing fails but flash attention, which cannot have them."""
    result = run("attention_prefill.py", tmp_path, "--batches", "2", "--filled", "50")
    assert [row["cache"] for row in result["summary"]] == ["bf16", "e4m3", "int8"]
    failing = {row["contender"] for row in result["rows"] if row["status"] != "ok"}
    assert failing == {"flash, no mask"}
    for row in result["summary"]:
        assert row["ours_us"] > 0 and row["written_us"] > 0 and (row["filled"], row["length"]) == (50, 114)


@pytest.mark.slow
def test_load_smoke(tmp_path: Path) -> None:
    rows = run("load.py", tmp_path)["rows"]
    assert [(row["stored"], row["policy"]) for row in rows] == [
        ("bf16", "W8A16"), ("packed", "W8A16"), ("bf16", "W4A16"), ("packed", "W4A16"),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["file_gb"] > 0 for row in rows)
    assert rows[1]["file_gb"] < rows[0]["file_gb"]


@pytest.mark.slow
def test_first_token_smoke(tmp_path: Path) -> None:
    rows = run("first_token.py", tmp_path, "--stacks", "W8A16")["rows"]
    assert [row["stack"] for row in rows] == ["hf-eager", "inductor", "W8A16"] * 2
    assert [row["lengths"] for row in rows] == ["same"] * 3 + ["new"] * 3
    assert all(row["ms"] >= row["least_ms"] > 0 and row["samples"] == 2 for row in rows)
    assert max(row["speedup"] for row in rows[:2]) == max(row["speedup"] for row in rows[3:5]) == 1.0


@pytest.mark.slow
def test_single_calls_smoke(tmp_path: Path) -> None:
    rows = run("single_calls.py", tmp_path, "--stacks", "inductor,W8A16", "--profile", str(tmp_path))["rows"]
    assert [row["stack"] for row in rows] == ["inductor", "W8A16:default"]
    for row in rows:
        assert set(row["calls"]) == {"decode", "prefill 8"}
        assert all(call["wall_ms"] >= call["host_ms"] > 0 for call in row["calls"].values())
    assert (tmp_path / "W8A16.txt").read_text().startswith("median ")


@pytest.mark.slow
def test_long_context_smoke(tmp_path: Path) -> None:
    rows = run("long_context.py", tmp_path, "--stacks", "hf-auto,W8A16 as written,bf16 + INT8")["rows"]
    assert sorted(row["stack"] for row in rows) == ["W8A16 as written"] * 2 + ["bf16 + INT8"] * 2 + ["hf-auto"] * 2
    assert all(row["token_ms"] > 0 and row["speedup"] > 0 for row in rows)


@pytest.mark.slow
def test_capacity_smoke(tmp_path: Path) -> None:
    rows = run("capacity.py", tmp_path)["rows"]
    assert [(row["cache"], row["context"], row["rows"]) for row in rows] == [
        (cache, context, 3) for cache in ("bf16", "FP8") for context in (16, 32)
    ]


@pytest.mark.parametrize("most", [0, 1, 5, 61, 230])
@pytest.mark.parametrize("guess", [0, 3, 60, 500])
def test_the_largest_batch_is_found(most: int, guess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= most

    assert importlib.import_module("capacity").largest(fits, guess) == most
    assert len(tried) == len(set(tried)) <= 18 and min(tried) >= 1


@pytest.mark.slow
def test_all_reduce_smoke(tmp_path: Path) -> None:
    """Both ways have the same sums on two processes; nothing is missing."""
    rows = run("all_reduce.py", tmp_path)["rows"]
    assert [row["rows"] for row in rows] == [1, 3]
    assert all("reason" not in row and row["flipped"] == 0 and row["floor_us"] > 0 for row in rows)
    (row,) = run("all_reduce.py", tmp_path, "--seconds", "0")["rows"]
    assert row["reason"] == "the time was up"


@pytest.mark.slow
def test_tensor_parallel_smoke(tmp_path: Path) -> None:
    """Two processes have equal logits, near bf16's; a cell that was not reached says so."""
    options = ("--models", "Llama-3-70B", "--stacks", "bf16,W8A16", "--cells", "decode B=1", "--seconds", "500")
    rows = run("tensor_parallel.py", tmp_path, *options)["rows"]
    assert [(row["stack"], row["gpus"]) for row in rows] == [("bf16", 2), ("W8A16", 2)]
    assert all(row["ms"] > 0 and row["cosine"] > 0.99 and row["speedup"] > 0 for row in rows)
    assert rows[1]["coverage"] == 1.0 and rows[0]["speedup"] == 1.0
    for row in run("tensor_parallel.py", tmp_path, *options[:-1], "0")["rows"]:
        assert "the time was up" in row["reason"] and "ms" not in row


def test_wrong_logits_have_no_speedup(module: Any) -> None:
    benchmark = module("tensor_parallel")
    right = torch.linspace(-1, 1, 64)
    cell = {"model": "m", "gpus": 2, "cell": "decode B=1"}
    rows = [
        {**cell, "stack": "bf16", "ms": 2.0, "logits": [right, right]},
        {**cell, "stack": "bf16 batched_mm", "ms": 1.5, "logits": [right, right]},
        {**cell, "stack": "FP8_DYNAMIC", "ms": 1.0, "logits": [right, right]},
        {**cell, "stack": "W8A16", "ms": 1.0, "logits": [right.flip(0), right.flip(0)]},
        {**cell, "stack": "W4A16", "ms": 1.0, "logits": [right, right.flip(0)]},
        {**cell, "stack": "bf16 graphs", "ms": 0.5, "logits": [right, right]},
    ]
    benchmark.compare(rows)
    benchmark.speedups(rows)
    assert [row.get("speedup") for row in rows] == [0.75, 1.0, 1.5, None, None, 1.0]
    assert "not the bf16 model's" in rows[3]["reason"] and "different logits" in rows[4]["reason"]


@pytest.mark.slow
def test_e2e_smoke(tmp_path: Path) -> None:
    result = run("e2e.py", tmp_path, "--stacks", "inductor,W8A16,no-such-policy", "--batches", "1", "--layers", "1")
    bf16, quantized, broken = result["rows"]
    assert bf16["error"] is None and quantized["error"] is None
    for row in (bf16, quantized):
        assert row["decode B=1"]["ms"] > 0 and row["decode B=1"]["compile_s"] > 0
    assert quantized["decode B=1"]["speedup"] == pytest.approx(bf16["decode B=1"]["ms"] / quantized["decode B=1"]["ms"])
    assert quantized["logits_error_to_bf16"] < 0.05, "int8 weights under 16-bit inputs are close to bf16"
    assert quantized["memory"]["coverage"] == 1.0
    assert 0.5 <= quantized["memory"]["ledger_ratio"] < 0.52, "8-bit weights take half of bf16, plus a scale per row"
    assert "no-such-policy" in broken["error"], "a stack that fails is a row with its reason"


@pytest.mark.slow
def test_compile_time_smoke(tmp_path: Path) -> None:
    result = run("compile_time.py", tmp_path)
    assert [row["error"] for row in result["rows"]] == [None, None]
    assert result["rows"][1]["ratio"] > 0 and result["rows"][1]["passes_s"] > 0
    shallow, deep = result["passes"]
    assert (shallow["layers"], deep["layers"]) == (1, 2) and shallow["nodes"] < deep["nodes"]
    assert shallow["passes_s"] > 0 and deep["passes_s"] > 0


@pytest.mark.slow
def test_cpu_decode_smoke(tmp_path: Path) -> None:
    result = run("cpu_decode.py", tmp_path, "--policies", "W8A16,no-such-policy")
    bf16, quantized, broken = result["rows"]
    assert bf16["speedup"] == 1.0 and quantized["speedup"] > 0
    assert 0 < quantized["error_to_bf16"] < 0.05
    assert "no-such-policy" in broken["error"]


@pytest.mark.slow
def test_mla_smoke(tmp_path: Path) -> None:
    result = run("mla.py", tmp_path)
    assert [row["error"] for row in result["rows"]] == [None] * 5
    inductor, written, absorbed, *coded = result["rows"]
    assert written["speedup"] == coded[0]["speedup"] == 1.0 and absorbed["speedup"] > 0
    assert inductor["error_to_inductor"] == 0 and all(row["error_to_inductor"] < 0.05 for row in result["rows"])


def test_results_hold_no_paths_and_no_nan(module: Any, tmp_path: Path) -> None:
    common = module("common")
    common.write_result(
        tmp_path / "r.json", [{"us": float("nan"), "error": "in /root/x.y/z/file.py: 1/2"}], {"a": (1,)}
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["rows"] == [{"us": None, "error": "in file.py: 1/2"}] and result["a"] == [1]


def test_timing_is_median_and_quartile_distance(module: Any) -> None:
    timing = module("common").Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.us, timing.least_us, timing.spread) == (3.0, 1.0, pytest.approx(2.0 / 3.0))


def test_failing_call_is_reported_and_others_are_timed(module: Any) -> None:
    common = module("common")

    def fail(turn: int) -> None:
        raise ValueError("broken")

    out = common.time_calls({"good": lambda turn: sum(range(100)), "bad": fail}, torch.device("cpu"), 1, repeats=3)
    assert out["good"].us > 0 and out["bad"] == "ValueError: broken"


def test_checked_rows_differ_and_reach_the_end(module: Any) -> None:
    rows = module("gemm").checked_rows
    for m in (1, 16, 128, 129, 512, 4096):
        picked = rows(m, torch.device("cpu"))
        assert len(set(picked.tolist())) == min(m, 128) and int(picked.max()) < m
        assert int(picked.max()) >= m - m // 16 - 1


def test_wrong_or_nan_result_fails_the_check(module: Any) -> None:
    gemm = module("gemm")
    expected = torch.randn(4, 8)
    rows = torch.arange(4)
    assert gemm.relative_error(expected.clone(), rows, expected) == 0.0
    assert gemm.relative_error(expected * 1.1, rows, expected) == pytest.approx(0.1, rel=1e-3)
    poisoned = expected.clone()
    poisoned[3, 7] = float("nan")
    assert not gemm.relative_error(poisoned, rows, expected) <= gemm.TOLERANCE


def test_verdict_is_geomean_and_worst_over_rated_rows(module: Any) -> None:
    row = {"scheme": "W8A8", "n": 1, "k": 2, "ratio_to_bf16": 0.5}
    cells = [{**row, "m": m, "ratio_to_peer": ratio} for m, ratio in ((1, 0.8), (16, 1.25), (64, None))]
    (verdict,) = module("gemm").verdicts(cells)
    assert verdict["geomean_to_peer"] == pytest.approx(1.0) and verdict["worst_row"] == "1x2 M=16"
    assert (verdict["rows"], verdict["rated"]) == (3, 2)


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", True),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", True),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", True),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<at::native::x>>", True),
        ("_w4a16_gemm_kernel", True),
        ("void dequant_gemm<128>", True),
        ("triton_red_fused_add_mm_0", False),
        ("triton_per_fused__to_copy_fp8_quant_3", False),
        ("void per_token_quant_fp8_kernel<__nv_bfloat16>", False),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", False),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", False),
        ("void at::native::vectorized_elementwise_kernel<4, gemm>", False),
    ],
)
def test_kernels_are_told_apart_by_name(module: Any, name: str, linear: bool) -> None:
    assert module("e2e").is_linear(name) is linear


def test_kernel_sums_leave_lm_head_out(module: Any) -> None:
    step = [("gemm_a", 10.0), ("gemm_a", 20.0), ("gemm_head", 100.0), ("triton_poi_fused", 5.0)]
    sums = module("e2e").classify(step * 3, 3)
    assert (sums["linears_us"], sums["lm_head_us"], sums["other_us"]) == (30.0, 100.0, 5.0)
    assert sums["top"][0] == {"name": "gemm_head", "us": 100.0, "calls": 1.0, "linear": True}


# --- generate --------------------------------------------------------------------------------------------------------

LLAMA, QWEN = "Llama-3-8B", "Qwen3-30B-A3B"
GENERATE_STACKS = ("hf-auto", "hf-eager", "inductor", "FP8_DYNAMIC", "W4A16", "W4A8", "FP8_DYNAMIC:default", "wrapper")


@pytest.mark.slow
def test_generate_smoke(tmp_path: Path) -> None:
    result = run("generate.py", tmp_path, "--stacks", "hf-auto,W8A16,no-such-policy", "--cells", "acceptance")
    bf16, quantized, broken = result["rows"]
    assert bf16["error"] is None and quantized["error"] is None
    for row in (bf16, quantized):
        assert row["cold"]["seconds"] > 0 and row["warm"]["seconds"] > 0
        for cell in ("B=1 P=8", "B=2 P=8", "B=1 P=16"):
            assert row["cells"][cell]["first_token_ms"] > 0
            assert row["cells"][cell]["cosine_least"] > 0.99, "int8 weights under 16-bit inputs are close to bf16"
        assert row["cells"]["B=2 P=16"] == {"reason": "not run: not asked for"}
    assert all("no-such-policy" in cell["reason"] for cell in broken["cells"].values())
    assert {criterion["point"] for criterion in result["acceptance"]} == {1, 2, 3, 4}


def generated(model: str, stack: str, kind: str, phase: str = "first", **values: Any) -> dict[str, Any]:
    return {"model": model, "stack": stack, "phase": phase, "kind": kind, **values}


def full_run(rows: Any, ms: dict[str, float]) -> list[dict[str, Any]]:
    """Lines of a run in which everything was measured; ``ms`` by stack, for tokens as for first tokens."""
    lines = []
    for model, stacks in ((LLAMA, GENERATE_STACKS), (QWEN, ("hf-auto", "hf-eager", "inductor", "FP8_DYNAMIC"))):
        for stack in stacks:
            if stack == "wrapper":
                lines.append(generated(model, stack, "wrapper", weights=300, us_1=20.0, us_10=20.0))
                continue
            for phase, seconds in (("cold", 60.0), ("first", 24.0), ("rest", 30.0)):
                lines.append(generated(model, stack, "first", phase, seconds=seconds))
            for name in ("decode", "prefill 512", "prefill 2048"):
                lines.append(generated(model, stack, "call", call=name, host_ms=ms[stack], wall_ms=ms[stack]))
            for batch, prompt in rows.Grid().cells(model):
                times = {"ms_per_token": ms[stack], "first_token_ms": ms[stack], "finite": True, "varied": True}
                lines.append(generated(model, stack, "cell", cell=f"B={batch} P={prompt}", **times))
    return lines


FAST = dict.fromkeys(GENERATE_STACKS, 8.0) | {"FP8_DYNAMIC": 4.0, "W4A16": 4.0, "W4A8": 4.0, "FP8_DYNAMIC:default": 6.0}
POLICIES = ("FP8_DYNAMIC", "W4A16", "W4A8")


def accepted(module: Any, lines: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    rows = module("generate_rows")
    keys = list(dict.fromkeys((line["model"], line["stack"]) for line in full_run(rows, FAST)))
    merged = rows.merge(keys, lines, {}, rows.Grid())
    rows.add_ratios(merged)
    return rows.acceptance(merged, rows.Grid(), POLICIES), merged


def test_acceptance_of_a_run_that_is_fast_enough(module: Any) -> None:
    found, merged = accepted(module, full_run(module("generate_rows"), FAST))
    assert [criterion.what for criterion in found if not criterion.passed] == []
    assert {criterion.measured for criterion in found if criterion.point == 1} == {2.0}
    row = next(row for row in merged if row["stack"] == "FP8_DYNAMIC")
    assert (row["cold"]["seconds"], row["warm"]["seconds"]) == (60.0, 24.0), "the third process counts for nothing"


@pytest.mark.parametrize(
    ("stack", "ms", "failing"),
    [
        ("W4A8", 4.8, 1),  # 1.67 instead of 1.7, and everything else holds
        ("W4A8", 8.1, 3),  # every cell of both tables as well
        ("FP8_DYNAMIC:default", 8.5, 5),  # host times over 1.05, decode slower, prefill below 1.2
        ("hf-eager", 5.0, 1),  # the better of two bf16 is what the first token is compared with: 1.25 at prompt 2048
    ],
)
def test_acceptance_of_a_run_that_is_too_slow(stack: str, ms: float, failing: int, module: Any) -> None:
    found, _ = accepted(module, full_run(module("generate_rows"), {**FAST, stack: ms}))
    assert sum(not criterion.passed for criterion in found) == failing


def test_nothing_passes_that_was_not_measured(module: Any) -> None:
    lines = full_run(module("generate_rows"), FAST)
    assert not any(criterion.passed for criterion in accepted(module, [])[0])
    missing = [line for line in lines if not (line["stack"] == "W4A16" and line.get("cell") == "B=32 P=2048")]
    failed = [criterion for criterion in accepted(module, missing)[0] if not criterion.passed]
    assert [criterion.missing for criterion in failed] == ["1 of 12 cells"] * 2
    assert all("W4A16, every cell" in criterion.what and criterion.measured == 2.0 for criterion in failed)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"finite": False}, "its logits are not finite"),
        ({"varied": False}, "its logits are all alike"),
        ({"cosine_least": 0.01}, "its logits have a cosine of 0.01 to bf16's"),
        ({"cosine_least": float("nan")}, "its logits have a cosine of nan to bf16's"),
        ({"cosine_least": 0.6}, None),
    ],
)
def test_a_broken_stack_cannot_win(values: dict[str, Any], reason: str | None, module: Any) -> None:
    assert module("generate_rows").insane(values) == reason


def test_logits_are_compared_step_by_step(module: Any, tmp_path: Path) -> None:
    rows, worker = module("generate_rows"), module("generate_worker")
    names = ("hf-eager", "W4A16", "W4A8")
    bf16 = torch.randn(3, 2, 50)
    broken = torch.cat((bf16[:2], torch.randn(1, 2, 50) * 0.01 + bf16[:1]))  # the last step repeats the first one's
    for stack, logits in zip(names, (bf16, bf16 * 2, broken), strict=True):
        torch.save(logits, worker.logits_file(tmp_path, LLAMA, stack, "B=1 P=128"))
    lines = [
        generated(LLAMA, s, "cell", cell="B=1 P=128", first_token_ms=1.0, ms_per_token=1.0) for s in ("hf-auto", *names)
    ]
    merged = rows.merge([(LLAMA, stack) for stack in ("hf-auto", *names)], lines, {}, rows.Grid())
    rows.compare_logits(merged, tmp_path)
    rows.add_ratios(merged)
    auto, _, good, bad = (row["cells"]["B=1 P=128"] for row in merged)
    assert "cosine_first" not in auto and good["cosine_least"] == pytest.approx(1.0) and good["speedup"] == 1.0
    assert bad["cosine_first"] == pytest.approx(1.0) and "cosine" in bad["reason"] and "speedup" not in bad


def test_cells_that_were_not_run_say_why(module: Any) -> None:
    rows = module("generate_rows")
    lines = [
        generated(LLAMA, "W4A8", "begin", cell="B=1 P=128"),
        generated(LLAMA, "W4A8", "cell", cell="B=1 P=128", first_token_ms=1.0),
        generated(LLAMA, "W4A8", "begin", cell="B=8 P=128"),
    ]
    endings = {(LLAMA, "W4A8", "first"): "it held the device for over 100 s"}
    (row,) = rows.merge([(LLAMA, "W4A8")], lines, endings, rows.Grid())
    assert list(row["cells"]) == [f"B={b} P={p}" for b, p in rows.Grid().cells(LLAMA)]
    assert row["cells"]["B=1 P=128"] == {"first_token_ms": 1.0}
    assert row["cells"]["B=8 P=128"] == {"reason": "not done: it held the device for over 100 s"}
    assert row["cells"]["B=32 P=2048"] == {"reason": "not run: it held the device for over 100 s"}


def test_what_the_acceptance_asks_for_comes_first(module: Any) -> None:
    grid = module("generate_rows").Grid()
    assert grid.cells(LLAMA)[:5] == ((1, 128), (8, 128), (32, 128), (1, 512), (1, 2048))
    assert grid.cells(QWEN)[0] == (1, 128) and len(grid.cells(QWEN)) == len(set(grid.cells(LLAMA))) == 12
    generate = module("generate")
    tasks = generate.plan(generate._arguments([]))
    assert [task.stack for task in tasks[:4]] == ["hf-auto", "FP8_DYNAMIC", "W4A16", "W4A8"]
    begun = next(index for index, task in enumerate(tasks) if task.phases == ("rest",))
    assert all(task.phases == ("rest",) for task in tasks[begun:]) and {QWEN, LLAMA} == {t.model for t in tasks[:begun]}


def test_a_token_is_the_rest_of_a_generate(module: Any) -> None:
    times = module("generate_worker").times([1.0, 1.3, 9.0], [0.3, 0.1, 0.3], tokens=11, batch=8)
    assert times["first_token_ms"] == 300.0 and times["ms_per_token"] == pytest.approx(100.0)
    assert times["tokens_per_s"] == pytest.approx(8 * 11 / 1.3)
    assert "ms_per_token" not in module("generate_worker").times([], [0.1], tokens=1, batch=1)
    noisy = module("generate_worker").times([0.1], [0.2], tokens=4, batch=1)
    assert "ms_per_token" not in noisy and "too noisy" in noisy["reason"]


def test_one_process_at_a_time_holds_a_device(module: Any, tmp_path: Path) -> None:
    common, path = module("common"), tmp_path / "lock"
    settled: list[int] = []
    first, second = common.DeviceLock(path, lambda: settled.append(1)), common.DeviceLock(path)
    assert common.holder(path) is None
    with first.held():
        assert common.holder(path)[0] == os.getpid()
        with first.held(), first.yielded():
            assert common.holder(path) is None and settled == [1]
            with second.held(), second.held():  # waits forever if the first still has it
                assert common.holder(path) is not None
            with first.yielded():
                first.take()
            assert common.holder(path) is None
        assert common.holder(path) is not None and first.waited < 1.0
    assert common.holder(path) is None
    code = f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}]\nfrom common import *\nwith DeviceLock(Path({str(path)!r})).held(): print(1)"
    with first.held():
        waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=8)
    assert waiting.communicate(timeout=60)[0] == b"1\n"


def test_the_device_is_free_while_dynamo_and_inductor_compile(module: Any, tmp_path: Path) -> None:
    worker, common = module("generate_worker"), module("common")
    lock = common.DeviceLock(tmp_path / "lock")
    seen: list[tuple[str, bool]] = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(("backend", common.holder(tmp_path / "lock") is not None))
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs)

    def stub(gm: Any, inputs: Any, **ignored: Any) -> Any:
        seen.append(("inductor", common.holder(tmp_path / "lock") is not None))
        return gm.forward

    setup = worker.Setup(
        LLAMA, "W8A16", "first", (), (), 4, "cpu", True, {}, 0.0, str(tmp_path), str(tmp_path / "lock")
    )
    process = worker.Worker(setup)
    process.lock = lock
    torch._dynamo.reset()
    with worker.patch("torch._inductor.compile_fx.compile_fx", stub), lock.held(), process.compiling_yields():
        out = torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(3))
        assert common.holder(tmp_path / "lock") is not None, "calls have the device"
    assert out.tolist() == [1.0] * 3 and seen == [("backend", True), ("inductor", False)]


WORKER = """
import fcntl, json, os, sys, time
setup = json.loads(sys.argv[1])
path = f"{setup['folder']}/{setup['model']}.{setup['stack'].replace(':', '-')}.{setup['phase']}.jsonl"
def emit(kind, **values):
    line = {"model": setup["model"], "stack": setup["stack"], "phase": setup["phase"], "kind": kind}
    with open(path, "a") as file:
        file.write(json.dumps(line | values) + "\\n")
if setup["stack"] == "hf-eager":
    sys.exit("it is broken")
emit("first", seconds=1.0 if setup["phase"] == "cold" else 0.25)
for batch, prompt in setup["cells"] if setup["phase"] != "cold" else ():
    emit("begin", cell=f"B={batch} P={prompt}")
    if setup["stack"] == "W4A8":
        lock = os.open(setup["lock"], os.O_RDWR | os.O_CREAT)
        os.write(lock, f"{os.getpid()} {time.time() - 50}".encode())
        time.sleep(60)
    if setup["stack"] == "W4A16" and batch == 2:
        time.sleep(60)
    emit("cell", cell=f"B={batch} P={prompt}", ms_per_token=2.0, first_token_ms=3.0)
"""


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("guard=never_slower", {"guard": "never_slower"}),
        ("guard=never_slower,tune=full,release_weights=false", {"guard": "never_slower", "tune": "full", "release_weights": False}),
        ('{"guard": "never_slower", "kernels": {"W8A8": "reference"}}', {"guard": "never_slower", "kernels": {"W8A8": "reference"}}),
    ],
)  # fmt: skip
def test_options_of_generate_are_pairs_or_json(module: Any, text: str, options: dict[str, Any]) -> None:
    generate = module("generate")
    assert generate.options_of(text) == options
    with pytest.raises(SystemExit):
        generate.main(["--tiny", "--options", "guard"])


def test_what_the_guard_kept_is_gathered_over_phases(module: Any) -> None:
    rows = module("generate_rows")
    lines = [
        {"model": "M", "stack": "W8A8", "phase": phase, "kind": "guard", "kept": {f"guard: {phase}": 2}}
        for phase in ("first", "rest")
    ]
    (row,) = rows.merge([("M", "W8A8")], lines, {}, rows.Grid())
    assert row["guard"]["kept"] == {"guard: first": 2, "guard: rest": 2}


def test_a_run_keeps_what_it_has_when_processes_fail_hang_or_meet_the_end(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = module("generate")
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(generate, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(generate, "LAST_CELL_S", 1.0)
    monkeypatch.setattr(generate, "STOP_S", 1.0)
    stacks = "hf-auto,hf-eager,W4A8,W4A16"
    options = [
        "--tiny",
        "--cells",
        "all",
        "--jobs",
        "4",
        "--hold",
        "20",
        "--seconds",
        "8",
        "--acceptance",
        "--stacks",
        stacks,
    ]
    generate.main([*options, "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    auto, broken, holding, slow = result["rows"]
    assert [cell["speedup"] for cell in auto["cells"].values()] == [1.0] * 4 and auto["warm"]["seconds"] == 0.25
    assert {cell["reason"] for cell in broken["cells"].values()} == {"not run: it is broken"}
    assert holding["cells"]["B=1 P=8"] == {"reason": "not done: it held the device for over 20 s"}
    assert holding["cells"]["B=2 P=16"] == {"reason": "not run: it held the device for over 20 s"}
    assert slow["cells"]["B=1 P=8"]["speedup"] == 1.0
    assert slow["cells"]["B=2 P=8"] == {"reason": "not done: the time was up"}
    assert slow["cells"]["B=1 P=16"] == {"reason": "not run: the time was up"}
    assert result["machine"]["source"] and result["acceptance"]


# --- quality ---------------------------------------------------------------------------------------------------------


def test_every_scheme_has_the_quality_of_its_textbook() -> None:
    """The committed table: all schemes, both models, everything that a block takes quantized, within 0.5 % of the textbook.

    Under 4-bit inputs one perplexity is a draw from a distribution wider than that (benchmarks/README.md), so means are
    compared, whose standard error must leave a verdict possible.
    """
    result = json.loads((BENCHMARKS / "results" / "quality_cpu.json").read_text(encoding="utf-8"))
    rows = {(row["model"], row["scheme"]): row for row in result["rows"]}
    assert set(rows) == {(model, scheme) for model in ("dense", "moe") for scheme in textbook.SCHEMES}
    assert {name for name, s in PRESETS.items() if family_of(s).quantizes(s) is None} <= set(textbook.SCHEMES)
    for key, row in rows.items():
        whole = row["model"] == "dense" or textbook.SCHEMES[row["scheme"]].block <= 128  # the experts' hidden layer
        assert row["error"] is None and (row["coverage"] == 1.0) == whole, key
        policy = Policy.load(textbook.POLICIES[row["scheme"]])
        assert policy.default is not None and row["bits_per_weight"] == bits_per_weight(policy.default), key
        inputs = policy.default.input_activations
        if inputs is not None and inputs.num_bits == 4:
            assert row["draws"] >= 8 and row["mean_error"] <= 0.005 / 2, key
            assert abs(row["mean_to_textbook"]) <= 0.005, key
        else:
            assert abs(row["product_to_textbook"]) <= 0.005, key


def test_gguf_types_cost_the_dense_model_little() -> None:
    """Perplexity by the committed table, to bf16."""
    result = json.loads((BENCHMARKS / "results" / "quality_cpu.json").read_text(encoding="utf-8"))
    cost = {row["scheme"]: row["product_to_bf16"] for row in result["rows"] if row["model"] == "dense"}
    for name, most in (("Q8_0", 0.003), ("Q6_K", 0.006), ("Q5_K", 0.02), ("Q4_K", 0.04)):
        assert cost[f"GGUF_{name}"] <= most, name


def test_neighbours_are_one_bf16_away(module: Any) -> None:
    x = torch.randn(400).bfloat16()
    x[:3] = 0
    moved = module("quality").neighbours(x, 1)
    assert torch.equal(moved[:3], x[:3]) and (moved[3:] != x[3:]).all()
    assert (moved.view(torch.int16).int() - x.view(torch.int16).int())[3:].abs().max() == 1
    up = (moved.abs() > x.abs())[3:].float().mean()
    assert 0.4 < up < 0.6 and torch.equal(moved, module("quality").neighbours(x, 1))
    assert not torch.equal(moved, module("quality").neighbours(x, 2))


def test_draws_are_for_inputs_of_four_bits_and_leave_the_model_as_it_was(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = module("quality")
    several = {scheme for scheme in textbook.SCHEMES if quality.draws_of(scheme) > 1}
    assert several == {"NVFP4", "NVFP4_STATIC", "MXFP4"}
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4, dtype=torch.bfloat16))
    model.get_input_embeddings = lambda: model[0]  # type: ignore[assignment]
    before, seen = model[0].weight.detach().clone(), []

    def measured(given: Any, windows: Any) -> float:
        seen.append(given[0].weight.detach().clone())
        return 2.0

    monkeypatch.setattr(quality, "forward_perplexity", measured)
    assert quality.log_perplexities(model, torch.zeros(1), 3) == [pytest.approx(0.6931, rel=1e-3)] * 3
    assert torch.equal(seen[0], before) and len({tuple(w.flatten().tolist()) for w in seen}) == 3
    assert torch.equal(model[0].weight, before)


def test_rows_of_other_files_are_kept_only_where_they_are_comparable(module: Any, tmp_path: Path) -> None:
    quality = module("quality")
    meta = {"machine": {"cpu": "a", "versions": {"torch": "2"}, "source": "new"}, "tokens_dense": 9}
    rows = [{"model": "dense", "scheme": name, "bf16": 5.0} for name in ("W8A8", "MXFP4")]
    old = {**meta, "machine": meta["machine"] | {"source": "old"}, "tokens_moe": 7, "date": "2026-01-02", "rows": rows}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    (kept,) = quality.kept_rows(path, meta, {("dense", "MXFP4")})
    assert kept == {**rows[0], "source": "old", "date": "2026-01-02"}
    path.write_text(json.dumps({**old, "rows": [{**rows[0], "source": "older"}]}))
    assert quality.kept_rows(path, meta, set())[0]["source"] == "older", "a row says itself what it measured"
    for change in ({"tokens_dense": 8}, {"machine": meta["machine"] | {"cpu": "b"}}, {"machine": {"versions": {}}}):
        path.write_text(json.dumps({**old, **change, "machine": {"source": "x", **change.get("machine", {})}}))
        with pytest.raises(ValueError, match="cannot be added to"):
            quality.kept_rows(path, {**meta, "machine": {**meta["machine"]}}, set())
    quality.check_bf16([*rows, {"model": "moe", "bf16": 4.0}])
    with pytest.raises(ValueError, match="Measure all anew"):
        quality.check_bf16([*rows, {"model": "dense", "bf16": 5.001}])


# --- quality of the KV cache -----------------------------------------------------------------------------------------


def test_kv_quality_smoke(tmp_path: Path) -> None:
    result = run("kv_quality.py", tmp_path, "--models", "dense", "--schemes", "FP8", "INT8_HEAD", "--textbook")
    base, fp8, int8 = result["rows"]
    assert [row["scheme"] for row in result["rows"]] == ["16 bits", "FP8", "INT8_HEAD"]
    assert [row["bits"] for row in result["rows"]] == [16.0, 8.5, 8.0]
    assert base["to_base"] == base["error"] == 0.0 and result["tokens"] == 2 * 16
    for row in (fp8, int8):
        assert 0 < abs(row["to_base"]) < 0.2, "another cache, and a perplexity of few tokens"
        assert [cell["distance"] for cell in row["copies"]] == [12]
        assert [cell["distance"] for cell in row["needles"]] == [8, 14]
        assert all(cell["trials"] == 2 and 0 <= cell["first"] <= cell["five"] <= 1 for cell in row["needles"])
    assert [row["scheme"] for row in result["textbook"]] == ["16 bits", "FP8", "INT8_HEAD"]
    for row, plain in zip(result["rows"], result["textbook"], strict=True):
        assert row["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05), (
            "of 32 tokens, through other roundings"
        )
    assert all(cell["first"] == 0 for cell in result["without"]["dense"]["copies"]), (
        "recall is over what is missed there"
    )


def test_what_the_cache_forgets_shows(module: Any) -> None:
    """Through scales that keep a few codes alone, perplexity rises and copies are not found."""
    quality = module("kv_quality")
    at = quality.setting("dense", torch.device("cpu"), quality.Sizes(96, 2, 1, 32, (64,), (16,), 4))
    tasks = (at.windows, at.copies[64][0])
    base, coarse = (
        [quality.scores(at.model, quality.cache_of(at.model, scheme, task, scales), task) for task in tasks]
        for scheme, scales in (("16 bits", None), ("INT8_TENSOR", [(torch.tensor(4.0), torch.tensor(4.0))] * 5))
    )
    assert quality.perplexity(coarse[0]) > 1.1 * quality.perplexity(base[0])
    to_base, error = quality.paired(coarse[1], base[1])
    assert to_base < -0.3 and error > 0


def test_decode_steps_through_a_cache_are_the_whole_window_at_once(module: Any) -> None:
    quality = module("kv_quality")
    at = quality.setting("dense", torch.device("cpu"), quality.Sizes(24, 2, 1, 12, (12,), (8,), 2))
    found = quality.scores(at.model, quality.cache_of(at.model, "16 bits", at.windows), at.windows)
    logits = at.model(input_ids=at.windows.ids[:, :-1], use_cache=False).logits.float().log_softmax(-1)
    wanted = logits.gather(2, at.windows.ids[:, 1:, None])[..., 0][:, quality.PROMPT :]
    assert found.logp.shape == wanted.shape == (2, 16)
    assert torch.allclose(found.logp, wanted, atol=0.3), "bf16 rounds in another order"
    assert torch.allclose(found.logp.mean(), wanted.mean(), atol=0.03)


def test_copies_and_needles_are_where_they_are_said_to_be(module: Any) -> None:
    quality = module("kv_quality")
    at = quality.setting("dense", torch.device("cpu"), quality.SMOKE)
    copy, other = at.copies[12]
    assert torch.equal(copy.ids[:, :12], copy.ids[:, 12:]) and torch.equal(other.ids[:, 12:], copy.ids[:, 12:])
    assert not torch.equal(other.ids[:, :12], copy.ids[:, :12])
    for distance, (needle, without) in at.needles.items():
        pair = needle.ids[:, 8:10]
        assert torch.equal(pair, needle.ids[:, -2:]) and needle.ids.shape[1] == 8 + distance + 2
        assert torch.equal(without.ids[:, -2:], pair)
        assert all(not torch.isin(tokens, row).any() for tokens, row in zip(pair, without.ids[:, :-2], strict=True))


def test_the_textbook_of_the_cache_rounds_to_the_nearest_code(module: Any) -> None:
    """As the product encodes and decodes, but for ties and the last bit of a scale."""
    quality = module("kv_quality")
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1))
    largest = {(0, side): x.abs().amax((0, 2, 3), keepdim=True).double() for side in (0, 1)}
    for name in NAMES:
        scheme, config = parse_cache(name), quality.demo.load("dense").model.config
        got, _ = quality.textbook_cache(config, name, largest).update(x, x, 0)
        amax = {"token": None, "head": largest[0, 0], "tensor": largest[0, 0].amax().reshape(1, 1, 1, 1)}[scheme.scale]
        codes, scale = encode(x, scheme, None if amax is None else (amax / scheme.largest).float())
        wanted = decode(codes, scale, scheme.format, torch.float32)
        assert float((got - wanted).norm() / wanted.norm()) < 2e-3, name
        assert float((got - x).norm() / x.norm()) > 2e-3, name


def test_every_scheme_of_the_cache_has_the_quality_of_its_textbook() -> None:
    """The committed table: all schemes, both models, at least 2048 tokens. e4m3 and int8 are within 0.5 % of 16 bits.

    e5m2 has two bits of mantissa and costs more than that, by the textbook too, which all are near to.
    """
    result = json.loads((BENCHMARKS / "results" / "kv_quality.json").read_text(encoding="utf-8"))
    rows, plain = ({(row["model"], row["scheme"]): row for row in result[key]} for key in ("rows", "textbook"))
    assert set(rows) == set(plain) == {(model, scheme) for model in ("dense", "moe") for scheme in ("16 bits", *NAMES)}
    assert result["tokens"] >= 2048
    for key, row in rows.items():
        assert row["error"] <= 0.005 / 2, key
        assert abs(row["to_base"]) <= (0.01 if "E5M2" in key[1] else 0.005), key
        assert row["perplexity"] == pytest.approx(plain[key]["perplexity"], rel=0.003), key
        assert sum(cell["trials"] for cell in row["needles"]) >= 200, key
    verdicts = {row["model"]: row["within_rounding"] for row in result["compiled"] if "within_rounding" in row}
    assert verdicts == {"dense": True, "moe": True}
