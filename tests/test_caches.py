"""Inductor's caches on disk: other policies never get each other's code, and the same policy finds its own again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# One weight of 64 x 128 either way, so that the graphs differ in nothing but what the policy says.
POLICIES: dict[str, Any] = {
    "group 64": {"default": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}}},
    "group 32": {"default": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}},
    "token": "FP8_DYNAMIC",
    "tensor": "FP8_TENSOR_DYNAMIC",  # planes of the same shapes and dtypes as those of the line above
}


def compile_once(policy: Any) -> None:
    """Run in a process of its own: prints the error against the reference and against eager, and the caches' counters."""
    import torch
    from torch import nn
    from torch._dynamo.utils import counters

    import quant_compile
    from tests.runtime_support import bf16, reference_of

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 64), nn.ReLU()).bfloat16().requires_grad_(False), bf16(5, 128)
    run = torch.compile(model, backend="sglquant", options={"policy": policy, "kernels": "reference"}, dynamic=False)
    with torch.no_grad():
        y, eager = run(x).float(), model(x).float()
        (scheme,) = {line.scheme for line in quant_compile.report(model).lines if line.scheme}
        wanted = reference_of(model, scheme)(x).float()
    found = {
        "scheme": scheme,
        "error": float((y - wanted).norm() / wanted.norm()),
        "from eager": float((y - eager).norm() / eager.norm()),
        "hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
    }
    print(json.dumps(found))


def in_new_process(policy: Any, folder: Path) -> dict[str, Any]:
    """What ``compile_once`` prints, with its caches in ``folder``."""
    code = f"from tests.test_caches import compile_once; compile_once({policy!r})"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_processes_that_share_a_cache_folder(tmp_path: Path) -> None:
    first = {name: in_new_process(policy, tmp_path) for name, policy in POLICIES.items()}
    assert len({found["scheme"] for found in first.values()}) == len(POLICIES)
    for name, found in first.items():
        assert found["error"] < 4e-3, f"{name}: not its own numbers"  # one step of bf16
        assert found["from eager"] > 5e-3, f"{name}: nothing was quantized"
        assert found["misses"] == 1 and found["hits"] == 0, f"{name}: code of another policy was taken"
    again = in_new_process(POLICIES["group 64"], tmp_path)
    assert again["hits"] >= 1 and again["misses"] == 0, "the cache is never hit, so nothing was shown"
    assert again["error"] == first["group 64"]["error"]
