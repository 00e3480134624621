#!/usr/bin/env bash
# transformers 5.17.0 with torch 2.13.0: tp_plan="auto" gives the norms of queries and keys of a divided Qwen3-MoE a full backward hook, which
# sums gradients over ranks. Nothing of it runs without gradients, and eager inference does not notice. torch.compile ends a graph at every
# module that has such a hook, under torch.no_grad() too: a model of two layers is one graph whole and eleven divided, so that decoding is
# launched in pieces. Dense Llama, whose plan has no such norms, is one graph divided as well.
# transformers 5.24.0 registers no hooks there: one graph. Two processes over gloo. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
}


def graphs_of(model):
    torch._dynamo.reset()
    seen = []

    def backend(gm, _):
        seen.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(input_ids=torch.arange(8)[None], use_cache=False)
    return len(seen)


def main(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in CONFIGS:
        plan = DistributedConfig(tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=plan).eval()
        hooks = sum(bool(module._backward_hooks) for module in model.modules())
        found = f"{name} {graphs_of(model)} {hooks}"
        if rank == 0:
            with open(f"{folder}/found", "a") as file:
                print(found, file=file)


if __name__ == "__main__":
    folder = sys.argv[1]
    whole = []
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(f"{folder}/{name}")
        whole.append(graphs_of(model))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(main, (folder, port), 2)
    found = open(f"{folder}/found").read().split()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}: graphs whole {whole}; divided (graphs, hooks): {found}")
    wanted = {"5.17.0": ["llama", "1", "0", "qwen3_moe", "11", "4"], "5.24.0": ["llama", "1", "0", "qwen3_moe", "1", "0"]}
    sys.exit(whole != [1, 1] or found != wanted[transformers.__version__])
PY
for version in 5.17.0 5.24.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet torch==2.13.0 numpy setuptools transformers==$version accelerate==1.15.0
  mkdir "$folder/models-$version"
  GLOO_SOCKET_IFNAME=lo "$folder/$version/bin/python" "$folder/check.py" "$folder/models-$version" 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
done
