#!/usr/bin/env bash
# auto-round 0.16.1 with torch 2.13.0 and transformers 5.24.0: asymmetric 4 bits, quantize() and then save_quantized() in the format
# "auto_round", which is the default, raises a TypeError once all the quantizing is done. Expected: what quantize_and_save() writes.
# For this scheme the format takes AWQ's packing. quantize_and_save() packs each layer as it is done, with AWQ's own function.
# save_quantized() packs with a general one, which hands a `weight_dtype` to AWQ's layer, WQLinear_GEMM, that knows none. Symmetric
# 4 bits is packed otherwise and saves both ways, and "auto_awq" takes asymmetric 4 bits in two steps. But only if asked for first: the
# object keeps the format of the first save, and a second one with "auto_awq" raises the same.
# Seen (a random Llama, on a CPU):
#   asymmetric, quantize_and_save, auto_round: saved with auto_round:auto_awq
#   symmetric, quantize and save_quantized, auto_round: saved with auto_round:auto_gptq
#   asymmetric, quantize and save_quantized, auto_awq: saved with awq
#   asymmetric, quantize and save_quantized, auto_round: TypeError: WQLinear_GEMM.__init__() got an unexpected keyword argument 'weight_dtype'
#   the same object after that, auto_awq: TypeError: WQLinear_GEMM.__init__() got an unexpected keyword argument 'weight_dtype'
# Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 auto-round==0.16.1 transformers==5.24.0 numpy
cat > "$folder/check.py" <<'PY'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder, words = Path(sys.argv[1]), [f"w{i}" for i in range(64)]
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(words),
    tie_word_embeddings=False,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
split = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=split, unk_token="w0", pad_token="w0", eos_token="w0").save_pretrained(folder / "model")


def prepared(sym):
    return AutoRound(
        str(folder / "model"), bits=4, group_size=32, sym=sym, iters=0, dataset=[" ".join(words)] * 4, seqlen=32, nsamples=4
    )


def saved(name, save, **options):
    """Run it, and say how it went."""
    target = folder / name.replace(" ", "-")
    try:
        save(str(target), **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert list(target.rglob("*.safetensors"))
    words = json.loads(next(target.rglob("config.json")).read_text())["quantization_config"]
    return "saved with " + words.get("packing_format", words["quant_method"])


seen = {"asymmetric, quantize_and_save, auto_round": saved("one step", prepared(False).quantize_and_save, format="auto_round")}
for number, (sym, kind) in enumerate([(True, "auto_round"), (False, "auto_awq"), (False, "auto_round")]):
    made = prepared(sym)
    made.quantize()
    name = f"{'symmetric' if sym else 'asymmetric'}, quantize and save_quantized, {kind}"
    seen[name] = saved(f"two steps {number}", made.save_quantized, format=kind)
seen["the same object after that, auto_awq"] = saved("after", made.save_quantized, format="auto_awq")
print(", ".join(f"{p} {version(p)}" for p in ("auto-round", "torch", "transformers")))
for name, result in seen.items():
    print(f"{name}: {result}")
refused = "TypeError: WQLinear_GEMM.__init__() got an unexpected keyword argument 'weight_dtype'"
wanted = ["saved with auto_round:auto_awq", "saved with auto_round:auto_gptq", "saved with awq", refused, refused]
sys.exit(list(seen.values()) != wanted)
PY
cd "$folder"  # where auto-round keeps its working files
CUDA_VISIBLE_DEVICES="" venv/bin/python -W ignore check.py "$folder" 2> "$folder/log" || { tail -5 "$folder/log" >&2; exit 1; }
