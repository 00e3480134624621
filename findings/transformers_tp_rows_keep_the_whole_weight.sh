#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: two processes on a CPU (gloo) load one model with
# from_pretrained(..., distributed_config=DistributedConfig(tp_plan="auto")). Expected: each holds half of every weight that the plan cuts,
# and what can be done with the model of one rank can be done with that of the other.
# Weights that are cut along columns (o_proj, down_proj: Shard(1)) are tensors of their own, half as large. Those that are cut along rows
# (q, k, v, gate, up, lm_head, the embedding: Shard(0)), the larger part of a model, are views: their storage has the bytes of the
# whole weight on both ranks, on rank 1 behind an offset of half of it. So in memory, by storage, nothing is saved by them.
# And copy.deepcopy(model) works on rank 0, whose copy holds the whole weights again, and raises on rank 1:
#   RuntimeError: Attempted to call copy_() on an invalid python storage.
# state_dict() and forward work on both.
# Seen:
#   rank 0: Shard(0) parts hold 2.0 times their bytes, Shard(1) parts 1.0; deepcopy ran
#   rank 1: Shard(0) parts hold 2.0 times their bytes, Shard(1) parts 1.0; deepcopy RuntimeError
# Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/check.py" <<'PY'
import copy
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig


def held(model, dim):
    """Bytes of the storages of all parts that are cut along a dimension, over their own."""
    parts = [p.to_local() for p in model.parameters() if hasattr(p, "placements") and p.placements[0].is_shard(dim)]
    return sum(x.untyped_storage().nbytes() for x in parts) / sum(x.nbytes for x in parts)


def run(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    with torch.no_grad():
        assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    assert model.state_dict()
    try:
        copy.deepcopy(model)
        copied = "ran"
    except RuntimeError as error:
        print(error, file=sys.stderr)
        copied = type(error).__name__
    for turn in range(2):
        dist.barrier()
        if turn == rank:
            print(f"rank {rank}: Shard(0) parts hold {held(model, 0):.1f} times their bytes, Shard(1) parts {held(model, 1):.1f}; "
                  f"deepcopy {copied}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=128, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(f"{sys.argv[1]}/model")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(run, (f"{sys.argv[1]}/model", port), 2)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2> "$folder/log" | tee "$folder/seen" || { tail -5 "$folder/log"; exit 1; }
diff "$folder/seen" - <<'SEEN'
rank 0: Shard(0) parts hold 2.0 times their bytes, Shard(1) parts 1.0; deepcopy ran
rank 1: Shard(0) parts hold 2.0 times their bytes, Shard(1) parts 1.0; deepcopy RuntimeError
SEEN
grep -q 'invalid python storage' "$folder/log"
