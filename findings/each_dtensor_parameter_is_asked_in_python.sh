#!/usr/bin/env bash
# torch 2.11.0 and 2.13.0: a call of a compiled model evaluates one guard in Python for each parameter that is a DTensor
# (DTensorSpec._check_equals, behind Dynamo's DTENSOR_SPEC_MATCH), though its forward reads the local tensor alone; of a plain parameter
# no Python runs. With 40 layers of one weight a second call makes 43 Python calls with plain weights, and 283 (2.11.0) or 378 (2.13.0)
# with DTensors, 40 of them that one. So a tensor-parallel model pays for its weights at every decode step, CUDA graphs or not, and the usual
# account of guards, that they are C++, does not show it. 2.15.0, which is not run here, does the same. One process and gloo are
# enough to see it. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import os
import sys

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

LAYERS = 40
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (1,))


class Layer(nn.Module):
    def __init__(self, distributed):
        super().__init__()
        weight = torch.randn(8, 8)
        self.distributed = distributed
        self.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]) if distributed else weight)

    def forward(self, x):
        return x @ (self.weight.to_local() if self.distributed else self.weight)


def counted(distributed):
    """Calls of _check_equals, and of any Python function, in a call whose graph is there."""
    torch._dynamo.reset()
    model = nn.Sequential(*(Layer(distributed) for _ in range(LAYERS)))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 8)
    seen = []
    with torch.no_grad():
        compiled(x), compiled(x)
        sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_name) if event == "call" else None)
        compiled(x)
        sys.setprofile(None)
    return seen.count("_check_equals"), len(seen)


plain, divided = counted(False), counted(True)
version = torch.__version__.partition("+")[0]
print(f"torch {version}: {plain[0]} of {plain[1]} calls with plain weights, {divided[0]} of {divided[1]} with DTensors")
dist.destroy_process_group()
sys.exit(plain[0] != 0 or divided[0] != LAYERS or divided[1] < 4 * plain[1])
PY
for version in 2.11.0 2.13.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "torch==$version" numpy setuptools
  (cd "$folder" && "$folder/$version/bin/python" -W ignore check.py)
done
