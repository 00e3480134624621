"""``generate`` where the KV cache is long: milliseconds a token by the wall clock, with attention's kernel and without, in codes.

A stack is a policy, perhaps `` + `` and a scheme of the KV cache, or `` as written`` (attention without its kernel); ``bf16`` is
``default: keep``. Each is a process of its own. A token is (wall of all tokens - wall of one) / (tokens - 1), medians; HF bf16 compiles
its decode steps itself, over a static cache and with CUDA graphs.

    python benchmarks/long_context.py --gpus 2    # on GPUs: Llama-3-8B's shape, 16 layers
    python benchmarks/long_context.py --model Qwen3-30B-A3B --cells 16x2048    # 8 layers
    python benchmarks/long_context.py --smoke     # tiny, on a CPU: does it run?
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from common import GIB, RESULTS, last_line, machine, table, write_result
from e2e import peak, reset_peak, synchronize
from generate_worker import LAYERS, LLAMA, QWEN, build

HF, WRITTEN, BF16 = "hf-auto", " as written", "bf16"
STACKS = (HF, "FP8_DYNAMIC + FP8", "FP8_DYNAMIC", BF16, "W4A16 + FP8", "FP8_DYNAMIC" + WRITTEN, "W4A16", "bf16 + FP8")
CELLS = "1x2048,16x2048,32x2048,64x2048,16x16384"
TOKENS, SAMPLES = 33, 5
LARGE = 100_000  # tokens of a prompt, all rows together, from which on two samples must do


def measure(stack: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each (batch, prompt)."""
    device = torch.device("cpu" if args.smoke else "cuda")
    cells = [tuple(map(int, cell.split("x"))) for cell in ("1x16,2x24" if args.smoke else args.cells).split(",")]
    model = build(args.model, args.smoke, device)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    extra: dict[str, Any] = {"cache_implementation": "static"} if stack == HF else {}
    if stack != HF:
        import quant_compile

        scheme, _, cache = stack.removesuffix(WRITTEN).partition(" + ")
        policy = {"default": "keep" if scheme == BF16 else scheme} | ({"kv_cache": cache} if cache else {})
        quant_compile.compile(model, policy, attention="keep" if stack.endswith(WRITTEN) else "auto")
    rows: list[dict[str, Any]] = []
    for batch, prompt in cells:
        if stack == HF:
            torch._dynamo.reset()  # static graphs of exactly this cell: its best case
            vars(model).pop("_previous_max_cache_length", None)
        ids = torch.randint(5, model.config.vocab_size, (batch, prompt), device=device)

        def seconds(tokens: int, ids: torch.Tensor = ids) -> float:
            synchronize(device)
            started = time.perf_counter()
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, **extra,
            )  # fmt: skip
            synchronize(device)
            return time.perf_counter() - started

        row: dict[str, Any] = {"model": args.model, "stack": stack, "batch": batch, "prompt": prompt}
        try:
            samples = 2 if batch * prompt >= LARGE else SAMPLES
            row["first_call_s"] = seconds(TOKENS)
            for tokens in (1, TOKENS):
                seconds(tokens)
            reset_peak(device)
            one = statistics.median(seconds(1) for _ in range(samples))
            many = statistics.median(seconds(TOKENS) for _ in range(samples))
            row |= {
                "token_ms": (many - one) / (TOKENS - 1) * 1e3,
                "first_ms": one * 1e3,
                "peak_gib": peak(device) / GIB,
            }
        except Exception as error:
            row["reason"] = last_line(error)
            torch.cuda.empty_cache()
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def child(stack: str, gpus: Queue[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """``measure`` in a process of its own, on the next GPU that is free."""
    gpu = gpus.get()
    try:
        command = [sys.executable, __file__, "--child", stack, "--model", args.model, "--cells", args.cells]
        command += ["--smoke"] if args.smoke else []
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    finally:
        gpus.put(gpu)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        rows.append({"stack": stack, "reason": (done.stderr.strip().splitlines() or ["ended"])[-1]})
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """To HF's bf16, cell by cell."""
    base = {(row["batch"], row["prompt"]): row["token_ms"] for row in rows if row["stack"] == HF and "token_ms" in row}
    for row in rows:
        cell = (row.get("batch"), row.get("prompt"))
        if "token_ms" in row and cell in base:
            row["speedup"] = base[cell] / row["token_ms"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stacks, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--stacks", default=",".join(STACKS))
    parser.add_argument("--model", default=LLAMA, choices=(LLAMA, QWEN))
    parser.add_argument("--cells", default=CELLS, help="batch x prompt, comma-separated")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "long_context.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.smoke else "cuda")
    if args.child:
        measure(args.child, args)
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus: Queue[str] = Queue()
    for gpu in range(args.gpus):
        gpus.put(visible[gpu] if len(visible) > gpu and visible[0] else str(gpu))
    meta = {
        "benchmark": "long_context",
        "machine": machine(device.type),
        "settings": {"model": args.model, "layers": LAYERS[args.model], "new_tokens": TOKENS, "gpus": args.gpus},
    }
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.gpus) as pool:
        for done in as_completed([pool.submit(child, stack, gpus, args) for stack in args.stacks.split(",")]):
            rows += done.result()
            add_ratios(rows)
            write_result(args.out, rows, meta, quiet=True)  # what there is, should the time be up
    keys = ("stack", "batch", "prompt", "token_ms", "speedup", "first_ms", "first_call_s", "peak_gib", "reason")
    print(table(list(keys), [[row.get(key, "–") for key in keys] for row in rows]))


if __name__ == "__main__":
    main()
