#!/usr/bin/env bash
# torch 2.11.0, on a CPU: a causal mask joined with a padding mask that is looked up by position (mask[:, keys], as models that keep
# a growing cache write it) does not compile under torch.compile(dynamic=True). The C++ that Inductor makes begins the vectorised loop
# with the check that the index lies inside of the mask, and computes the index behind it: "tmp2 was not declared in this scope". With
# sizes that are known (dynamic=False) the same function compiles and is right. Plain torch, no transformers needed; 2.13.0 compiles it.
# Needs a C++ compiler, as torch.compile does on a CPU. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy setuptools
cat > "$folder/check.py" <<'PY'
import sys

import torch


def visible(x, padding, past):
    """Scores to add: 0 where a query sees a key, else -inf."""
    new, old = x.shape[0], past.shape[0]
    keys, queries = torch.arange(old + new), old + torch.arange(new)
    seen = (keys[None, :] <= queries[:, None]) & padding[:, keys][0][None]
    return torch.where(seen, 0.0, float("-inf"))


ends = {}
for dynamic in (False, True):
    torch._dynamo.reset()
    given = torch.randn(3), torch.ones(1, 23, dtype=torch.bool), torch.zeros(20)
    try:
        ends[dynamic] = "right" if torch.equal(torch.compile(visible, dynamic=dynamic)(*given), visible(*given)) else "wrong"
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "error:" in line]
        ends[dynamic] = lines[0].partition("error:")[2].strip() if lines else type(error).__name__
    print(f"torch {torch.__version__}, dynamic={dynamic}: {ends[dynamic]}")
sys.exit(not (ends[False] == "right" and "was not declared in this scope" in ends[True]))
PY
"$folder/venv/bin/python" "$folder/check.py"
