#!/usr/bin/env bash
# transformers 5.24.0 with compressed-tensors 0.20.0: of a checkpoint in nvfp4-pack-quantized the dequantized linears (attention) are
# right, while experts, which the file holds one by one, come out without their global scale: every value is too large by a factor of
# that scale, which is in the hundreds or thousands. Nothing is said beyond a report of unexpected keys at most, and the loaded model
# runs. Whoever compares a runtime with `from_pretrained(..., CompressedTensorsConfig(dequantize=True))` on NVFP4 experts compares
# with another model. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate numpy
cat > "$folder/check.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(0)
folder = Path(sys.argv[1])
folder.mkdir()
config = Qwen3MoeConfig(
    hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=32, decoder_sparse_step=1, mlp_only_layers=[], dtype="bfloat16",
    tie_word_embeddings=False,
)
source = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def pack(weight):
    """[n, k] -> the tensors of nvfp4-pack-quantized, and what they stand for."""
    rows = weight.float().unflatten(1, (-1, 16))
    whole = 448 * 6 / rows.abs().max()
    scale = (rows.abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
    step = (scale.float() / whole)[..., None]
    code = ((rows.abs() / step)[..., None] - levels).abs().argmin(-1)
    values = (levels[code] * rows.sign() * step).flatten(1)
    code = (code + 8 * (rows < 0)).flatten(1).to(torch.uint8)
    packed = code[:, 0::2] | code[:, 1::2] << 4
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole[None]}, values


tensors, wanted = {}, {}


def add(name, weight):
    parts, wanted[name] = pack(weight)
    tensors.update({f"{name}.{part}": value.contiguous() for part, value in parts.items()})


for name, value in source.state_dict().items():
    stem = name.removesuffix(".weight")
    if "experts.gate_up_proj" in name:
        for i, both in enumerate(value):
            for part, half in zip(("gate_proj", "up_proj"), both.chunk(2)):
                add(f"{stem.removesuffix('.gate_up_proj')}.{i}.{part}", half)
    elif "experts.down_proj" in name:
        for i, one in enumerate(value):
            add(f"{stem.removesuffix('.down_proj')}.{i}.down_proj", one)
    elif "self_attn" in name and "proj" in name:
        add(stem, value)
    else:
        tensors[name] = value.clone()
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
group = {"targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False}}
words = json.loads(config.to_json_string()) | {"architectures": ["Qwen3MoeForCausalLM"], "quantization_config": {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*mlp.gate$"]}}
(folder / "config.json").write_text(json.dumps(words))

loaded = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
)
found = dict(loaded.named_parameters())
query = "model.layers.0.self_attn.q_proj"
linear = float((found[f"{query}.weight"].detach().float() - wanted[query]).norm() / wanted[query].norm())
first = "model.layers.0.mlp.experts.0.down_proj"
own = found["model.layers.0.mlp.experts.down_proj"][0].detach().float()
ratio = float((own * wanted[first]).sum() / (wanted[first] ** 2).sum())
whole = float(tensors[f"{first}.weight_global_scale"])
print(f"attention: relative error {linear:.1e}; expert: {ratio:.4g} times what the file says, whose global scale is {whole:.4g}")
sys.exit(not (linear < 1e-2 and abs(ratio / whole - 1) < 1e-2))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/model"
