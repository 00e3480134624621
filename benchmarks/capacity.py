"""How many conversations fit: the largest batch that decodes on one GPU, K and V in 16 bits and in codes.

The model has the Llama-3-8B shape with 16 layers under FP8_DYNAMIC, its 16-bit values released, so that both have the same weights. A
batch fits if two compiled decode steps run over a static cache of that many rows that is full but for them, and the last row's logits
are the first one's, whose K and V are the same; the search ends at one row. Each cache is a process of its own, on a GPU of its own where
there are two. Prompts are not part of it: they come a few at a time, and need more memory than a step.

    python benchmarks/capacity.py
    python benchmarks/capacity.py --smoke    # tiny, on a CPU, where nothing runs out: does it run?
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    GIB,
    LLAMA_3_8B,
    RESULTS,
    TINY,
    build_llama,
    cache_bytes,
    machine,
    set_position,
    table,
    write_result,
)
from e2e import peak, reset_peak, synchronize

CACHES = ("bf16", "FP8")
LAYERS, CONTEXTS = 16, "8192"
SMOKE_MOST = 3
STEPS = 2
ALIKE = 0.02  # of two equal rows' logits in bf16, whose products may be added in another order


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The most rows that fit, 0 if none does: from a guess in steps that double until it is enclosed, then by halves."""
    low, high = 0, -1  # of what is known to fit, and not to
    at, step = max(guess, 1), max(guess // 64, 1)
    while high < 0 or high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        if high < 0:
            at = low + step
        else:
            at = (low + high) // 2 if low else max(high - step, 1)
        step *= 2
    return low


def fill(cache: Any) -> None:
    """Every row alike, so that the last one's logits must be the first one's however far into the memory it lies."""
    generator = torch.Generator(cache.layers[0].keys.device).manual_seed(0)
    for layer in cache.layers:
        scales = getattr(layer, "scales", None)
        for plane in (layer.keys, layer.values, *((scales.keys, scales.values) if scales is not None else ())):
            held = plane.view(torch.uint8) if plane.element_size() == 1 else plane
            row = torch.empty_like(held[:1])
            if held is plane:
                row.normal_(generator=generator).abs_() if plane.dtype == torch.float32 else row.normal_(
                    generator=generator
                )
            else:
                row.random_(0, 0x7F, generator=generator)  # e4m3 without NaN
            held.copy_(row.expand_as(held))


class Decoder:
    """A compiled model, and a kind of cache to run it over."""

    def __init__(self, cache: str, smoke: bool) -> None:
        import quant_compile

        self.cache, self.smoke = cache, smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        self.model: Any = build_llama(TINY if smoke else LLAMA_3_8B, 2 if smoke else LAYERS, self.device)
        quant_compile.compile(self.model, "FP8_DYNAMIC", release_weights=True)

    def made(self, batch: int, context: int) -> Any:
        """A cache of its own memory."""
        from transformers import StaticCache

        import quant_compile

        config = self.model.config
        if self.cache == "bf16":
            held = StaticCache(config=config, max_cache_len=context)
        else:
            held = quant_compile.QuantizedStaticCache(config, context, self.cache)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        held.early_initialization(batch, config.num_key_value_heads, head_dim, torch.bfloat16, self.device)
        return held

    def run(self, batch: int, context: int) -> int:
        """Bytes of codes or values, once the steps have run over them."""
        held = self.made(batch, context)
        fill(held)
        set_position(held, context - STEPS)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            for _ in range(STEPS):
                logits = self.model(input_ids=ids, past_key_values=held, use_cache=True).logits
        synchronize(self.device)
        first, last = logits[0].float(), logits[-1].float()
        assert bool(torch.isfinite(last).all())
        assert float((first - last).abs().max()) <= ALIKE * float(first.abs().max())
        return cache_bytes(held)

    def free(self) -> int:
        """Bytes of the GPU that nothing holds."""
        gc.collect()
        if self.smoke:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def attempt(self, batch: int, context: int) -> float | None:
        """GiB at the peak; None where it does not fit."""
        self.free()
        reset_peak(self.device)
        started = time.perf_counter()
        try:
            if self.smoke and batch > SMOKE_MOST:
                raise torch.OutOfMemoryError
            self.run(batch, context)
            used = peak(self.device) / GIB
        except torch.OutOfMemoryError:
            used = None
        seconds, found = time.perf_counter() - started, "does not fit" if used is None else "fits"
        print(f"{self.cache}, {batch} x {context}: {found}, {seconds:.1f} s", file=sys.stderr, flush=True)
        return used


def measure(cache: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each context."""
    decoder, rows = Decoder(cache, args.smoke), []
    for context in map(int, ("16,32" if args.smoke else args.contexts).split(",")):
        row_bytes = decoder.run(2, context) // 2  # weights are released now
        tried: dict[int, float | None] = {}

        def fits(batch: int, context: int = context, tried: dict[int, float | None] = tried) -> bool:
            tried[batch] = decoder.attempt(batch, context)
            return tried[batch] is not None

        best = largest(fits, int(0.97 * decoder.free() // row_bytes))
        row = {"cache": cache, "context": context, "rows": best, "tokens": best * context}
        rows.append(row | {"peak_gib": tried.get(best), "tried": sorted(tried)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def child(cache: str, gpu: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--child", cache, "--contexts", args.contexts]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": visible[gpu] if len(visible) > gpu and visible[0] else str(gpu)
    }  # fmt: skip
    done = subprocess.run(
        command + (["--smoke"] if args.smoke else []), stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [*rows, {"cache": cache, "reason": "ended early; its error is above"}] if done.returncode else rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run both, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--caches", default=",".join(CACHES))
    parser.add_argument("--contexts", default=CONTEXTS, help="tokens of a row, comma-separated")
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        measure(args.child, args)
        return
    rows: list[dict[str, Any]] = []
    gpus = max(1, torch.cuda.device_count())
    with ThreadPoolExecutor(gpus) as pool:
        for found in pool.map(partial(child, args=args), args.caches.split(","), itertools.cycle(range(gpus))):
            rows += found
    base = {row["context"]: row["rows"] for row in rows if row["cache"] == "bf16" and row.get("rows")}
    for row in rows:
        if row.get("context") in base:
            row["times"] = row["rows"] / base[row["context"]]
    meta = {
        "benchmark": "capacity",
        "machine": machine("cpu" if args.smoke else "cuda"),
        "settings": {"shape": "Llama-3-8B", "layers": LAYERS, "policy": "FP8_DYNAMIC, released", "steps": STEPS},
    }
    write_result(args.out, rows, meta)
    keys = ("cache", "context", "rows", "times", "peak_gib", "reason")
    print(table(list(keys), [[row.get(key, "–") for key in keys] for row in rows]))


if __name__ == "__main__":
    main()
