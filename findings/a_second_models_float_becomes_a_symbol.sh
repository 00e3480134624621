#!/usr/bin/env bash
# torch 2.13.0: what torch.compile makes of a model depends on which other model the process has compiled before. Two models of one
# class, each compiled by a torch.compile of its own, differ in a float that forward reads from self (the scale of attention, say). In the
# first one's graph the scale is the number. In the second one's it is an input, an f64 tensor and its item(), though that model's never
# changes: Dynamo keeps "seen another value here" for the code that it entered, Module._call_impl, which all modules share, and not for
# the compiled object; so a backend that matches a number finds none. The same second model, first in a process, has the number,
# and so it has behind a function with code of its own. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools
cat > "$folder/check.py" <<'PY'
import sys

import torch


class Attention(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scaling = size**-0.5

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=self.scaling)


def kind_of_scale(module, call=None):
    """What the graph of a fresh torch.compile gives to attention: a number, or a node."""
    seen = []

    def backend(gm, _):
        (node,) = [n for n in gm.graph.nodes if "scaled_dot" in str(n.target)]
        seen.append(type(node.kwargs["scale"]).__name__)
        return gm

    torch.compile(call or module, backend=backend)(torch.randn(1, 1, 4, 8))
    return seen[-1]


def own_code(module):
    def call(x):
        return module(x)

    return call


torch._dynamo.reset()
alone = kind_of_scale(Attention(8))
torch._dynamo.reset()
first, second = kind_of_scale(Attention(16)), kind_of_scale(Attention(8))
third = Attention(4)
apart = kind_of_scale(third, own_code(third))
print(f"torch {torch.__version__}: alone {alone}; first {first}, second {second}; then with code of its own {apart}")
sys.exit(not (alone == first == apart == "float" and second == "Node"))
PY
"$folder/venv/bin/python" "$folder/check.py"
