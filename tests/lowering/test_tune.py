"""The cache of kernel timings: content decides what is found again. Measuring itself needs a GPU (tests/gpu)."""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.scheme import parse
from quant_compile.lowering import tune
from quant_compile.lowering.registry import Problem

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
    source = copy / "kernels" / "_triton_w4a16.py"
    source.write_text(source.read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")
    seen.add(name())
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda library: version(library) + "+new")
    seen.add(name())
    assert len(seen) == 5
    tune.timings.cache_clear()
