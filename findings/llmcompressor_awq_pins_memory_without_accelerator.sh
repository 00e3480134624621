#!/usr/bin/env bash
# llmcompressor 0.14.0.1 with torch 2.13.0 (its own transformers 5.17.0 and compressed-tensors 0.19.0): on a machine without an accelerator
# oneshot with AWQModifier raises a RuntimeError after calibration, at the first smoothing. Expected: what QuantizationModifier and
# GPTQModifier do, which take the same model and data through on the CPU: oneshot finds no accelerator, warns that it goes on without,
# and does.
# AWQ pins what it has kept of every batch on the CPU, for faster copies to a GPU, and does not ask. Pinning needs an accelerator's runtime.
# `offload_device`, its only option about places, changes nothing: kept where they are or sent to the CPU, the tensors are on the CPU.
# With a pin_memory() that hands its tensor back, AWQ runs to its end on the CPU and changes the norms, so nothing else of it needs one.
# Seen (a random Llama, W4A16; the message is that of torch's CPU build):
#   QuantizationModifier: ran
#   GPTQModifier: ran
#   AWQModifier: RuntimeError in _pin_intermediate: Cannot access accelerator device when none is available.
#   AWQModifier, offload_device cpu: RuntimeError in _pin_intermediate: Cannot access accelerator device when none is available.
#   AWQModifier, pin_memory() without effect: ran, norms changed
# Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0
cat > "$folder/check.py" <<'PY'
import sys
import traceback
from importlib.metadata import version

printed, sys.stdout = sys.stdout, sys.stderr  # llmcompressor logs to what is stdout when it is imported

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, default_data_collator

folder, words = f"{sys.argv[1]}/model", {f"w{i}": i for i in range(64)}
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(words),
    tie_word_embeddings=False,
)
LlamaForCausalLM(config).save_pretrained(folder)
processor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", pad_token="w0")
rows = [{"input_ids": torch.randint(0, 64, (32,)), "attention_mask": torch.ones(32, dtype=torch.long)} for _ in range(4)]
data = DataLoader(rows, batch_size=1, collate_fn=default_data_collator)
W4A16 = dict(targets=["Linear"], ignore=["lm_head"], scheme="W4A16")


def end(*recipe):
    """Run it, and say how it went."""
    model = LlamaForCausalLM.from_pretrained(folder)
    try:
        oneshot(model=model, processor=processor, dataset=data, recipe=list(recipe), max_seq_length=32, num_calibration_samples=4)
    except Exception as error:
        print(error, file=sys.stderr)
        said = str(error).splitlines()[0]
        return f"{type(error).__name__} in {traceback.extract_tb(error.__traceback__)[-1].name}", said
    norm = model.model.layers[0].input_layernorm.weight
    return ("ran, norms changed" if bool((norm != 1).any()) else "ran"), ""


found = {
    "QuantizationModifier": end(QuantizationModifier(**W4A16)),
    "GPTQModifier": end(GPTQModifier(**W4A16)),
    "AWQModifier": end(AWQModifier(), QuantizationModifier(**W4A16)),
    "AWQModifier, offload_device cpu": end(AWQModifier(offload_device=torch.device("cpu")), QuantizationModifier(**W4A16)),
}
torch.Tensor.pin_memory = lambda tensor, *_: tensor
found["AWQModifier, pin_memory() without effect"] = end(AWQModifier(), QuantizationModifier(**W4A16))
print(", ".join(f"{p} {version(p)}" for p in ("llmcompressor", "torch", "transformers", "compressed-tensors")), file=printed)
for name, (result, said) in found.items():
    print(f"{name}: {result}{said and ': '}{said}", file=printed)
refused = "RuntimeError in _pin_intermediate"
sys.exit([result for result, _ in found.values()] != ["ran", "ran", refused, refused, "ran, norms changed"])
PY
cd "$folder"  # where llmcompressor keeps its logs
CUDA_VISIBLE_DEVICES="" venv/bin/python -W ignore check.py "$folder" 2> "$folder/log" || { tail -5 "$folder/log" >&2; exit 1; }
