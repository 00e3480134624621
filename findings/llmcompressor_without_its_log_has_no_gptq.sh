#!/usr/bin/env bash
# llmcompressor 0.14.0.1 with torch 2.13.0: LLM_COMPRESSOR_LOG_DISABLED=true, its switch for a quiet run, makes GPTQModifier raise a ValueError,
# since GPTQ writes its losses at a level of its own (METRIC) that is made where the log is set up, and the switch returns before that.
# QuantizationModifier, which writes none, runs. Expected: the same result in silence.
# Seen (a random Llama, W4A16, on a CPU):
#   log on: QuantizationModifier ran, GPTQModifier ran
#   log off: QuantizationModifier ran, GPTQModifier ValueError: Level 'METRIC' does not exist
# Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0
cat > "$folder/check.py" <<'PY'
import sys

printed, sys.stdout = sys.stdout, sys.stderr  # the log goes to what is stdout at the import

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, default_data_collator

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
    tie_word_embeddings=False,
)
LlamaForCausalLM(config).save_pretrained("model")
tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
processor = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0")
samples = [{"input_ids": torch.randint(0, 64, (32,)), "attention_mask": torch.ones(32, dtype=torch.long)} for _ in range(4)]
found = []
for kind in (QuantizationModifier, GPTQModifier):
    try:
        oneshot(
            model=LlamaForCausalLM.from_pretrained("model"), processor=processor, recipe=[kind(targets=["Linear"], ignore=["lm_head"], scheme="W4A16")],
            dataset=DataLoader(samples, batch_size=1, collate_fn=default_data_collator), max_seq_length=32, num_calibration_samples=4,
        )
        found.append(f"{kind.__name__} ran")
    except ValueError as error:
        found.append(f"{kind.__name__} ValueError: {error}")
print(", ".join(found), file=printed)
PY
cd "$folder"  # where logs are kept
export CUDA_VISIBLE_DEVICES=""
on=$(venv/bin/python -W ignore check.py 2> log)
off=$(LLM_COMPRESSOR_LOG_DISABLED=true venv/bin/python -W ignore check.py 2> log)
echo "log on: $on"
echo "log off: $off"
[ "$on" = "QuantizationModifier ran, GPTQModifier ran" ] && [[ "$off" = "QuantizationModifier ran, GPTQModifier ValueError: Level 'METRIC' does not exist"* ]]
