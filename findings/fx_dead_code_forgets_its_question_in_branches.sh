#!/usr/bin/env bash
# torch 2.13.0: Graph.eliminate_dead_code(is_impure_node) asks its function about the nodes of the graph itself only. In the graph modules
# below it (the branches of torch.cond, bodies of loops and checkpoints) it goes by its own rule, which takes a method call whose result
# nobody uses for dead, `mul_` included. So even with a function that keeps every node, a branch loses its writes, and the rewritten graph
# computes something else.
# Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/check.py" <<'PY'
import sys

import torch

graphs = []


def keep(gm, inputs):
    graphs.append(gm)
    return gm


def forward(x):
    z = x.clone()
    total = torch.cond(x.sum() > 0, lambda q: (q.mul_(3), q.sum())[1], lambda q: q.sum() * 1.0, (z,))
    return z + total * 0


def writers(gm):
    return [name for name, child in gm.named_children() if any(node.target == "mul_" for node in child.graph.nodes)]


x = torch.ones(3)
with torch.no_grad():
    torch.compile(forward, backend=keep)(x)
    gm = graphs[0]
    before, had = gm(x)[0].tolist(), writers(gm)
    gm.graph.eliminate_dead_code(lambda node: True)
    for module in (gm, *gm.children()):
        module.recompile()
    after, has = gm(x)[0].tolist(), writers(gm)
print(f"branches that write: {had}, then {has}; the graph's result: {before}, then {after}")
sys.exit(not (had and not has and before != after))
PY
"$folder/venv/bin/python" "$folder/check.py"
