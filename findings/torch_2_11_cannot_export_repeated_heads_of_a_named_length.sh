#!/usr/bin/env bash
# torch 2.11.0: torch.export.export (strict=False, the default) cannot keep a length free, if it is a Dim with a name, where heads of keys are
# repeated by expand and reshape, as models with grouped heads do. Every length from 1 to 512 fits, and it says that not all of them satisfy
# min(64*length, 128*length) == (64*length), which none breaks. While it traces, export makes the builtin `min` a symbolic expression for all
# code of the process, torch's own included, and the view that merges two dimensions computes its stride by `min` of both strides. The
# expression is not simplified, becomes a guard, and a named Dim refuses guards that it cannot solve. Dim.DYNAMIC, Dim.AUTO and
# strict=True export the same module, and 2.13.0 exports it in all of these ways. No transformers needed. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys

import torch
from torch.export import Dim, export


class Heads(torch.nn.Module):
    """[1, 2, length, 64] -> [1, 4, length, 64]."""

    def forward(self, keys):
        rows, heads, length, size = keys.shape
        return keys[:, :, None].expand(rows, heads, 2, length, size).reshape(rows, 2 * heads, length, size)


def outcome(size, strict=False):
    try:
        program = export(Heads(), (torch.zeros(1, 2, 16, 64),), dynamic_shapes=({2: size},), strict=strict).module()
        return "ok" if program(torch.ones(1, 2, 48, 64)).shape[2] == 48 else "fixed"
    except Exception as error:
        guards = [line.partition("generated guard ")[2].replace("L['keys'].size()[2]", "length") for line in str(error).splitlines()]
        return f"{type(error).__name__}: " + next(guard for guard in guards if guard).rstrip(".")


REFUSED = "UserError: min(64*length, 128*length) == (64*length)"
NAMED = REFUSED if torch.__version__.startswith("2.11.") else "ok"
wanted = {
    "Dim('length', min=1, max=512)": (outcome(Dim("length", min=1, max=512)), NAMED),
    "Dim('length', min=3, max=512)": (outcome(Dim("length", min=3, max=512)), NAMED),
    "Dim('length')": (outcome(Dim("length")), NAMED),
    "Dim.DYNAMIC": (outcome(Dim.DYNAMIC), "ok"),
    "Dim.AUTO": (outcome(Dim.AUTO), "ok"),
    "Dim('length', min=1, max=512), strict": (outcome(Dim("length", min=1, max=512), strict=True), "ok"),
}
for name, (found, expected) in wanted.items():
    print(f"torch {torch.__version__.partition('+')[0]} {name}: {found}")
    if found != expected:
        sys.exit(f"changed: {name} was {expected}")
PY
for version in 2.11.0 2.13.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "torch==$version" numpy setuptools
  (cd "$folder" && "$folder/$version/bin/python" -W ignore check.py)
done
