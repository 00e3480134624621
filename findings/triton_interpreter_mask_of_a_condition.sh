#!/usr/bin/env bash
# triton 3.9.0: its interpreter (TRITON_INTERPRET=1) spreads a scalar condition over a block as int32 instead of int1. A block mask and
# such a condition, (rows < n) & (row < m), is an int32 array then, which loads and stores refuse: "mask has unsupported dtype".
# So does a condition that is itself the mask of a block. A condition's array is bool, but keeps the type of what was compared, int32,
# which create_splat takes for the array's. The same kernels compile for sm90, and the interpreter of triton 3.6.0 runs them.
# Expected: what a kernel writes that compiles, here 4 rows. (block & condition) != 0 is a mask for both, and compiles to the same.
# Seen (torch is there for its tensors alone; the same with torch 2.15.0):
#   compiled for sm90: both kernels
#   block and condition: mask has unsupported dtype
#   condition alone: mask has unsupported dtype
#   compared with 0: [1, 1, 1, 1, 0, 0, 0, 0]
# Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet --no-deps triton==3.9.0
cat > "$folder/kernels.py" <<'PY'
import triton
import triton.language as tl


@triton.jit
def block_and_condition(y, n, m, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(y + rows, rows * 0 + 1, mask=(rows < n) & (0 < m))


@triton.jit
def condition_alone(y, n, m, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(y + rows, (rows < n).to(tl.int32), mask=0 < m)


@triton.jit
def compared_with_0(y, n, m, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(y + rows, rows * 0 + 1, mask=((rows < n) & (0 < m)) != 0)
PY
cat > "$folder/compiled.py" <<'PY'
import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

types = {"y": "*i32", "n": "i32", "m": "i32", "BLOCK": "constexpr"}
for kernel in (kernels.block_and_condition, kernels.condition_alone):
    source = ASTSource(fn=kernel, signature=types, constexprs={"BLOCK": 128})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print("compiled for sm90: both kernels")
PY
cat > "$folder/interpreted.py" <<'PY'
import sys

import kernels
import torch


def ran(kernel):
    y = torch.zeros(8, dtype=torch.int32)
    try:
        kernel[(1,)](y, 4, 1, 8)
    except Exception as error:
        return "mask has unsupported dtype" if "mask has unsupported dtype" in str(error) else repr(error)
    return y.tolist()


refused, rows = "mask has unsupported dtype", [1, 1, 1, 1, 0, 0, 0, 0]
wanted = {"block_and_condition": refused, "condition_alone": refused, "compared_with_0": rows}
seen = {name: ran(getattr(kernels, name)) for name in wanted}
for name, result in seen.items():
    print(f"{name.replace('_', ' ')}: {result}")
sys.exit(seen != wanted)
PY
cd "$folder"
TRITON_CACHE_DIR="$folder/cache" venv/bin/python -W ignore compiled.py
TRITON_INTERPRET=1 venv/bin/python -W ignore interpreted.py
