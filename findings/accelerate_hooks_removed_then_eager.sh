#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: a compiled module that was offloaded with cpu_offload and gets its hooks removed again runs
# eagerly from then on. torch.compile neither recompiles nor says so; the compiled graphs stay unused until torch._dynamo.reset().
# Expected by most: either the first graph, whose weights are back, or a new compilation.
# Seen: the graphs compiled before are not run once in two calls, and none is compiled. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy
cat > "$folder/check.py" <<'PY'
import sys

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

graphs, ran = 0, 0


def counting(gm, _inputs):
    global graphs
    graphs += 1

    def call(*values):
        global ran
        ran += 1
        return gm.forward(*values)

    return call


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        return self.inner(x)


model, x, seen = Outer().eval().requires_grad_(False), torch.randn(2, 8), []
compiled = torch.compile(model, backend=counting)


def calls(name, times):
    global ran
    ran = 0
    with torch.no_grad():
        for _ in range(times):
            compiled(x)
    seen.append((name, graphs, ran > 0))
    print(name, graphs, "graphs compiled so far; ran one:", ran > 0)


calls("compiled", 1)
cpu_offload(model, execution_device="cpu")
calls("offloaded", 2)
remove_hook_from_submodules(model)
calls("hooks removed", 2)
torch._dynamo.reset()
calls("after reset", 2)
expected = [("compiled", 1, True), ("offloaded", 2, True), ("hooks removed", 2, False), ("after reset", 3, True)]
sys.exit(seen != expected)
PY
"$folder/venv/bin/python" "$folder/check.py"
