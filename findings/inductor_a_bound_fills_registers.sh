#!/usr/bin/env bash
# torch 2.13.0 with triton 3.6.0: telling torch.compile that a dynamic size has an upper bound makes Inductor's kernel for a GPU worse, not
# better. A softmax over s keys, traced with 30 of them: without a bound it is a loop. After torch._check(s <= 512), or any guard from
# which that follows, it is a "persistent" reduction whose block holds 512 keys, the bound, while rows a program and its warps are chosen
# for the traced 30 (in the kernel's text r0_ is 32 beside R0_BLOCK 512): of the candidates that it is to be tuned among one holds 32 rows by
# two warps, 256 numbers a thread. Every candidate is compiled, and one like that took Triton 38 seconds where T5's position bias is computed
# before its softmax (seen apart from this script). No GPU is needed to see it: the code is generated for an sm90 that a stand-in for the driver claims,
# and nothing is compiled or run here. Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.6.0 numpy setuptools
cat > "$folder/check.py" <<'PY'
import ast
import re
import sys
import types

import torch
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

GPU = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
                       max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32)
DeviceProperties.create = lambda device: GPU
driver._active = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
                                       get_active_torch_device=lambda: torch.device("cpu"), is_active=lambda: True)
codes = []


class Enough(Exception):
    pass


def stop(code):
    codes.append(code)
    raise Enough


GraphLowering.save_output_code = staticmethod(stop)


def kernel(bound):
    def attend(x):
        if bound:
            torch._check(x.shape[0] <= bound)
        return torch.softmax(x @ x.mT, -1)

    torch._dynamo.reset()
    x = torch.randn(30, 64)
    torch._dynamo.mark_dynamic(x, 0)
    options = {"cpu_backend": "triton", "fx_graph_cache": False}
    try:
        torch.compile(attend, options=options)(x)
    except Exception as error:
        if "Enough" not in type(error).__name__ + str(error) + repr(error.__cause__):
            raise
    found = re.findall(r"async_compile\.triton\('(\w*softmax\w*)', '''(.*?)'''", codes[-1], re.S)
    return found[-1][0], ast.literal_eval(f"'''{found[-1][1]}'''")


def candidates(name, text):
    """(rows, warps) of the configurations that Inductor would compile."""
    file = sys.argv[1] + "/kernel.py"
    space = {"__file__": file, "__name__": "kernel"}
    with open(file, "w") as opened:
        opened.write(re.sub(r"triton_helpers\.set_driver_to_\w+\(\)", "", text))
    exec(compile(open(file).read(), file, "exec"), space)
    return sorted({(c.kwargs["XBLOCK"], c.num_warps) for c in space[name].configs})


plain, bounded = kernel(None), kernel(512)
hint = re.search(r"'r0_': (\d+)", bounded[1]).group(1)
block = int(re.search(r"R0_BLOCK: tl.constexpr = (\d+)", bounded[1]).group(1))
tried = candidates(*bounded)
most = max(rows * block // (32 * warps) for rows, warps in tried)
print(f"torch {torch.__version__}, no bound: {plain[0].split('_fused')[0]}")
print(f"at most 512 keys: {bounded[0].split('_fused')[0]}, hint {hint}, R0_BLOCK {block}, (rows, warps) {tried}: {most} numbers a thread")
sys.exit(not (plain[0].startswith("triton_red") and bounded[0].startswith("triton_per") and hint == "32" and block == 512 and most == 256))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
