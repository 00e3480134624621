#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: without padding and under the default attention (SDPA), the text model of AIMv2 lets tokens see
# those after them, though it asks for a causal mask: the mask is left out in favour of SDPA's own flag, which the model sets to False.
# Under torch.compile (even with backend="eager"), and with attn_implementation="eager", the mask is made and the model is causal. So the
# same model, the same call: two different results, and the uncompiled default is the wrong one. A comparison of compiled with
# uncompiled outputs blames the compiler.
# Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/check.py" <<'PY'
import sys

import torch
from transformers import Aimv2TextConfig, Aimv2TextModel

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, eos_token_id=63
)
first, later = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 63]]), torch.tensor([[1, 2, 3, 4, 9, 9, 9, 63]])


def states(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


moves = {}
for name, attention, compiled in (("sdpa", "sdpa", False), ("eager attention", "eager", False), ("sdpa, compiled", "sdpa", True)):
    torch.manual_seed(0)
    model = Aimv2TextModel(Aimv2TextConfig(**SIZES, attn_implementation=attention)).eval()
    run = torch.compile(model, backend="eager") if compiled else model
    moves[name] = float((states(run, first) - states(run, later))[:, :4].abs().max())
    print(f"{name}: the first four states move by {moves[name]:.2g} when the last four tokens change")
sys.exit(not (moves["sdpa"] > 0.01 and moves["eager attention"] == moves["sdpa, compiled"] == 0))
PY
"$folder/venv/bin/python" "$folder/check.py"
