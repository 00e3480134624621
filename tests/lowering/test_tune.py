"""The cache of kernel timings: content decides what is found again. Measuring itself needs a GPU (tests/gpu)."""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.scheme import parse
from quant_compile.lowering import tune
from quant_compile.lowering.registry import Problem, kernels
from quant_compile.lowering.select import BUCKETS
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import enqueue

PROBLEM = Problem(parse("int4.group64+16"), 256, 512, torch.bfloat16)


def test_another_process_finds_the_timings_of_the_same_problem_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels.json"
    tune.Timings(path).put(PROBLEM, {"triton_w4a16@1": 3.5})
    again = tune.Timings(path)
    assert again.get(Problem(parse("int4.group64+16"), 256, 512, torch.bfloat16), "triton_w4a16", 1) == 3.5
    others = [
        replace(PROBLEM, scheme=parse("int4.group32+16")),
        replace(PROBLEM, n=512),
        replace(PROBLEM, k=256),
        replace(PROBLEM, dtype=torch.float16),
        replace(PROBLEM, has_bias=True),
    ]
    assert [again.get(other, "triton_w4a16", 1) for other in others] == [None] * len(others)
    assert again.get(PROBLEM, "triton_w4a16", 2) is None and again.get(PROBLEM, "humming_w4a16", 1) is None


def test_a_broken_file_is_no_timings(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text('{"half": {', encoding="utf-8")
    made = tune.Timings(path)
    assert made.get(PROBLEM, "triton_w4a16", 1) is None
    made.put(PROBLEM, {"triton_w4a16@1": 2.0})
    assert tune.Timings(path).get(PROBLEM, "triton_w4a16", 1) == 2.0


def test_file_name_follows_gpu_level_library_versions_and_kernel_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "lowering"
    shutil.copytree(Path(tune.__file__).parent / "kernels", copy / "kernels")
    monkeypatch.setattr(tune, "__file__", str(copy / "tune.py"))

    def name(gpu: str = "H200", level: str = "quick") -> str:
        tune.timings.cache_clear()
        return tune.timings(gpu, level).path.name

    first = name()
    assert name() == first and tune.timings("H200", "quick").path.is_relative_to(tmp_path / "cache")
    seen = {first, name("H100"), name(level="full")}
    source = copy / "kernels" / "weight_only" / "_triton_w4a16.py"
    source.write_text(source.read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")
    seen.add(name())
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda library: version(library) + "+new")
    seen.add(name())
    assert len(seen) == 5
    tune.timings.cache_clear()


@pytest.fixture
def choosing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tune.Timings:
    """Measured costs of a pretended GPU, from times that a test puts there."""
    known = tune.Timings(tmp_path / "kernels.json")
    monkeypatch.setattr(tune, "timings", lambda gpu, level: known)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return known


def test_a_kernel_that_raised_is_not_chosen_there_nor_beside(choosing: tune.Timings) -> None:
    """Neither a time between two others nor one further out stands in for it."""
    kernel = kernels()["triton_w4a16"]
    times = {1: 8.0, 16: 9.0, 64: tune.RAISED, 512: 40.0, 4096: tune.FAILED}
    choosing.put(PROBLEM, {f"{kernel.name}@{m}": time for m, time in times.items()})
    cost = tune.measured(Target("cuda", 90, 132, "an H200"), "quick")
    assert cost is not None
    assert {m for m in BUCKETS if cost(kernel, PROBLEM, m) >= tune.FAILED} == {32, 64, 128, 256, 1024, 2048, 4096}
    assert (
        cost(kernel, PROBLEM, 1) == 8.0 and 8.0 < cost(kernel, PROBLEM, 4) < 9.0 and cost(kernel, PROBLEM, 512) == 40.0
    )


def test_no_room_to_measure_in_is_not_remembered(choosing: tune.Timings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that found no memory is left out in this process, without being asked again, and is measured in the next."""
    kernel, asked = kernels()["triton_w4a16"], list[int]()

    def time(kernel: Any, m: int) -> float:
        asked.append(m)
        if m == 512:
            raise torch.OutOfMemoryError("no room")
        return float(m)

    def measure(
        layout: str, problem: Any, target: Any, points: Any, known: tune.Timings, worth: float
    ) -> dict[str, float]:
        out = {f"{kernel.name}@{m}": tune.FAILED for m in points}
        tune.take_times(out, known, problem, [(kernel, m) for m in points], time)
        return out

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cost = tune.measured_by(measure, Target("cuda", 90, 132, "an H200"), "quick")
    assert cost is not None
    for _ in range(2):
        assert cost(kernel, PROBLEM, 512) >= tune.FAILED and cost(kernel, PROBLEM, 16) == 16.0
    assert asked == [1, 16, 64, 512, 4096]
    again = tune.Timings(choosing.path)
    assert again.get(PROBLEM, kernel.name, 512) is None and again.get(PROBLEM, kernel.name, 64) == 64.0


class Jit:
    """Stands for a Triton kernel: remembers what was compiled and what was launched."""

    def __init__(self) -> None:
        self.compiled, self.launched = list[int](), list[int]()

    def warmup(self, m: int, *, grid: Any) -> None:
        if m == 64:
            raise RuntimeError("it does not compile")
        self.compiled.append(m)

    def __getitem__(self, grid: Any) -> Any:
        return self.launched.append


def test_triton_kernels_are_compiled_together_before_they_are_timed() -> None:
    pytest.importorskip("triton")
    own, other, jit = kernels()["triton_w4a16"], kernels()["humming_w4a16"], Jit()

    def calls(kernel: Any, m: int) -> Any:
        assert kernel is own, "a library's kernel would be run"
        return lambda: enqueue(jit, (1,), m)

    tune.compile_together([(own, 1), (other, 1), (own, 64), (own, 512)], calls)
    assert jit.compiled == [1, 512] and jit.launched == []
    enqueue(jit, (1,), 16)
    assert jit.launched == [16] and jit.compiled == [1, 512]


def test_a_kernel_that_raises_is_not_picked_and_inputs_that_cannot_be_made_are_an_error(
    choosing: tune.Timings, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernels()["triton_w4a16"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune, "graph_time", lambda calls: calls())

    def broken() -> None:
        raise RuntimeError("no such instruction")

    def no_inputs(kernel: Any, m: int) -> float:
        raise ValueError("our own fault")

    out: dict[str, float] = {}
    tune.take_times(out, choosing, PROBLEM, [(kernel, 1)], lambda kernel, m: tune.timed(broken, 12))
    assert out == {f"{kernel.name}@1": tune.RAISED}
    with pytest.raises(ValueError, match="our own fault"):
        tune.take_times(out, choosing, PROBLEM, [(kernel, 16)], no_inputs)
