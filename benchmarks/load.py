"""How long ``load`` takes and what it holds: a checkpoint in 16 bits quantized as it is read, and the same model in ``packed``.

Each load is a process of its own, with files in the page cache. Times are of ``load`` alone and of the first call after it; memory is the
allocator's on a GPU, and on the host what is not backed by a file, sampled while ``load`` runs.

    python benchmarks/load.py            # on a GPU: Llama-3-8B's shape, 16 layers
    python benchmarks/load.py --smoke    # tiny, on a CPU: does it run?
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import GIB, LLAMA_3_8B, RESULTS, TINY, build_llama, machine, table, write_result
from e2e import synchronize

POLICIES = ("FP8_DYNAMIC", "W4A16")
LAYERS = 16


class HostPeak:
    """Bytes of this process that no file backs, at most, beyond those at the beginning."""

    def __enter__(self) -> HostPeak:
        self.before = self.most = self.now()
        self.on = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.on = False
        self.thread.join()

    def watch(self) -> None:
        """Look every few milliseconds."""
        while self.on:
            self.most = max(self.most, self.now())
            time.sleep(0.005)

    @staticmethod
    def now() -> int:
        """As Linux counts them."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    @property
    def bytes(self) -> int:
        """Since the beginning."""
        return self.most - self.before


def load(folder: Path, policy: str | None, device: torch.device, save_to: Path | None) -> dict[str, Any]:
    """Load, call once, and write the model as packed where asked for."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # imports are no part of loading

    import quant_compile

    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 26):
                pass
    torch.zeros(1, device=device)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with HostPeak() as host:
        started = time.perf_counter()
        model = quant_compile.load(folder, policy, device=device, progress=False)
        synchronize(device)
        seconds = time.perf_counter() - started
    assert not any(p.is_meta for p in model.parameters()), "a weight was not loaded"
    cuda = device.type == "cuda"
    peak, held = (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if cuda else (0, 0)
    ids = torch.arange(16, device=device)[None]
    with torch.no_grad():
        started = time.perf_counter()
        model(ids)
        synchronize(device)
        first = time.perf_counter() - started
    if save_to is not None:
        quant_compile.save(model, save_to, "packed")
    return {
        "seconds": seconds, "gb_per_s": size / seconds / 1e9, "file_gb": size / 1e9, "first_call_s": first, "peak_gib": peak / GIB,
        "held_gib": held / GIB, "host_gib": host.bytes / GIB,
    }  # fmt: skip


def child(folder: Path, policy: str | None, device: str, save_to: Path | None) -> dict[str, Any]:
    """``load`` in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps([str(folder), policy, device, save_to and str(save_to)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["ended"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Write a checkpoint, load it in all ways, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS / "load.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        folder, policy, device, save_to = json.loads(args.child)
        print(json.dumps(load(Path(folder), policy, torch.device(device), save_to and Path(save_to))))
        return
    device = "cpu" if args.smoke else "cuda"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        source = Path(place) / "source"
        made = build_llama(TINY if args.smoke else LLAMA_3_8B, 1 if args.smoke else LAYERS, torch.device(device))
        made.save_pretrained(source)
        del made
        if device == "cuda":
            torch.cuda.empty_cache()
        for policy in ("W8A16", "W4A16") if args.smoke else POLICIES:
            packed = Path(place) / f"packed-{policy}"
            for name, arguments in (
                ("bf16", (source, policy, device, packed)),
                ("packed", (packed, None, device, None)),
            ):
                rows.append({"stored": name, "policy": policy, **child(*arguments)})
                print(rows[-1], flush=True)
    for row in rows[1::2]:
        quantized = rows[rows.index(row) - 1]
        if "seconds" in row and "seconds" in quantized:
            row["times_as_fast"] = quantized["seconds"] / row["seconds"]
            print(f"{row['policy']}: packed loads {row['times_as_fast']:.2f} times as fast as 16 bits are quantized")
    write_result(args.out, rows, {"benchmark": "load", "machine": machine(device), "settings": {"layers": LAYERS}})
    keys = (
        "stored",
        "policy",
        "file_gb",
        "seconds",
        "gb_per_s",
        "times_as_fast",
        "first_call_s",
        "peak_gib",
        "held_gib",
        "host_gib",
    )
    print(table(list(keys), [[row.get(key, "–") for key in keys] for row in rows]))


if __name__ == "__main__":
    main()
