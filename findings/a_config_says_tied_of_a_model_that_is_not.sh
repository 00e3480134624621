#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0 (5.17.0 alike): a checkpoint whose config ties the head to the embeddings, and whose file has a head
# of other values, loads with the two apart, by a warning alone. The loaded model's config says tie_word_embeddings=True all the same, and
# so does the config that save_pretrained writes beside the two tensors. Who asks the config whether the head may be quantized, or whether one
# tensor stands for both, is told wrong. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/check.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

folder, again = Path(sys.argv[1]) / "a", Path(sys.argv[1]) / "b"
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
tensors["lm_head.weight"] = torch.randn(40, 32)
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

model = LlamaForCausalLM.from_pretrained(folder)
apart = model.lm_head.weight is not model.model.embed_tokens.weight
own = torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
model.save_pretrained(again)
written = json.loads((again / "config.json").read_text())["tie_word_embeddings"]
both = {"lm_head.weight", "model.embed_tokens.weight"} <= set(load_file(again / "model.safetensors"))
print(f"apart {apart}, the file's head {own}; config of the model {model.config.tie_word_embeddings}, saved {written}; both saved {both}")
sys.exit(not (apart and own and model.config.tie_word_embeddings and written and both))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
