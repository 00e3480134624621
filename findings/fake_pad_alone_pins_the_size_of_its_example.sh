#!/usr/bin/env bash
# torch 2.11.0 and 2.13.0: under FakeTensorMode alone, which is how a graph pass gives example values to nodes that it has put in,
# torch.nn.functional.pad of the last dimension fixes a symbolic size elsewhere: it adds the guard that the length equals 7, which is what the
# example has, and its result has 7 where a symbol was, without a word. In 2.11.0 scaled_dot_product_attention does so too. A shift of int32
# numbers by a 0-d tensor raises, and in 2.11.0 linear and matmul with plain weights do. Adding, amax, reshape and layer_norm keep the symbol, so
# that this is easily missed. Within torch._dispatch.python.enable_python_dispatcher(), which FakeTensorMode does not turn on, all of them keep
# it and add no guard. No error names it; in 2.15.0, which is not run here, that of the shift does, and all else is as in 2.13.0. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import logging
import sys
from contextlib import nullcontext

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional

logging.disable(logging.CRITICAL)
OPERATIONS = {
    "add": lambda x: x + 1,
    "amax": lambda x: x.amax(-1, keepdim=True),
    "reshape": lambda x: x.reshape(-1),
    "layer_norm": lambda x: functional.layer_norm(x, (4,)),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
    "linear": lambda x: functional.linear(x, torch.ones(4, 4)),
    "matmul": lambda x: x @ torch.ones(4, 4),
    "pad": lambda x: functional.pad(x, (0, 1)),
    "shift": lambda x: x.int() << torch.tensor(1),
}


def outcome(operation, dispatcher):
    """What becomes of the middle size of [3, length, 4]."""
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    x = mode.from_tensor(torch.zeros(3, 7, 4), symbolic_context=sizes)
    try:
        with mode, torch.no_grad(), dispatcher():
            result = operation(x)
    except RuntimeError:
        return "raises"
    if not env.guards:
        return "kept"
    return f"pinned to {result.shape[-2]}"


version = torch.__version__.partition("+")[0]
wanted = dict.fromkeys(OPERATIONS, "kept") | {"pad": "pinned to 7", "shift": "raises"}
if version == "2.11.0":
    wanted |= {"attention": "pinned to 7", "linear": "raises", "matmul": "raises"}
for name, operation in OPERATIONS.items():
    alone, within = outcome(operation, nullcontext), outcome(operation, enable_python_dispatcher)
    print(f"torch {version} {name}: {alone}; with the dispatcher in Python: {within}")
    if (alone, within) != (wanted[name], "kept"):
        sys.exit(f"changed: {name}")
PY
for version in 2.11.0 2.13.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "torch==$version" numpy setuptools
  (cd "$folder" && "$folder/$version/bin/python" -W ignore check.py)
done
