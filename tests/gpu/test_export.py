"""Packages for a GPU: the compiled model's logits, in a process without transformers, for any batch and length."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "policy"), [("dense", "FP8_DYNAMIC"), ("dense", "W8A16"), ("dense", "W4A16"), ("moe", "FP8_DYNAMIC")]
)
def test_a_package_has_the_logits_of_the_compiled_model(
    name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    export = importlib.import_module("export")
    with torch.no_grad():
        rows = export.measure(name, policy, Namespace(repeats=1, device="cuda"))
    assert [(row["batch"], row["length"]) for row in rows] == list(export.SIZES)
    assert all(row["error"] <= 1e-3 for row in rows), rows
    assert not any(row["self_contained"] for row in rows)  # its kernels are Triton's and libraries'
