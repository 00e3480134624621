"""Decode on CPU: two layers of the Llama-3-8B shape at B=1, Inductor bf16 against sglquant policies, lm_head left out.

All variants live in one process and take turns step by step, so that whatever else the machine does hits all alike.
They start from the same seeded weights; the relative error of the hidden state to bf16's is a check of sanity.

    python benchmarks/cpu_decode.py --out benchmarks/results/cpu_decode.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    LLAMA_3_8B,
    RESULTS,
    TINY,
    Timing,
    build_llama,
    last_line,
    machine,
    phase,
    set_position,
    static_cache,
    table,
    time_calls,
    write_result,
)

POLICIES = ("W8A16", "W4A16", "W8A8")
DEVICE = torch.device("cpu")
# The embedding is one lookup whatever its size; a small one saves memory.
VOCAB = 1024


@dataclass
class Variant:
    """One compiled decoder.

    Attributes:
        step: one decode step at a fixed position -> hidden state [1, 1, hidden].
        compile_s: seconds of the first call, quantization and packing included.
        error: why there is no measurement.
    """

    name: str
    step: Callable[[], torch.Tensor] | None = None
    compile_s: float | None = None
    hidden: torch.Tensor | None = None
    error: str | None = None


def compiled(model: torch.nn.Module, policy: str | None, args: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """A decode step of the model, compiled in place with Inductor alone (None) or with a policy."""
    if policy is None:
        model.compile(dynamic=False)
    else:
        model.compile(backend="sglquant", options={"policy": policy}, dynamic=False)
    cache = static_cache(model.config, 1, args.tokens, DEVICE, torch.bfloat16)
    ids = torch.ones(1, 1, dtype=torch.long)

    def step() -> torch.Tensor:
        set_position(cache, args.tokens // 2)
        return model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state

    return step


def make_variant(policy: str | None, args: argparse.Namespace) -> Variant:
    """Build, compile and run once."""
    variant = Variant(policy or "inductor bf16")
    try:
        model = build_llama(replace(args.shape, vocab=VOCAB), args.layers, DEVICE, head=False)
        step = compiled(model, policy, args)
        started = time.perf_counter()
        hidden = step()
        variant.compile_s = time.perf_counter() - started
        variant.step, variant.hidden = step, hidden.float().clone()
    except Exception as error:
        variant.error = last_line(error)
    return variant


def rows_of(variants: Sequence[Variant], repeats: int) -> list[dict[str, Any]]:
    """Time all variants in turns; one row each, with the speed relative to bf16 (above 1: faster)."""
    calls = {v.name: (lambda _, step=v.step: step()) for v in variants if v.step is not None}
    timings = time_calls(calls, DEVICE, 1, repeats)
    base, rows = timings.get(variants[0].name), list[dict[str, Any]]()
    for variant in variants:
        timing = timings.get(variant.name)
        row: dict[str, Any] = {"variant": variant.name, "compile_s": variant.compile_s, "error": variant.error}
        if isinstance(timing, Timing):
            row |= timing.fields() | {"speedup": base.us / timing.us if isinstance(base, Timing) else None}
        elif timing is not None:
            row["error"] = timing
        if variant.hidden is not None and variants[0].hidden is not None:
            difference = variant.hidden - variants[0].hidden
            row["error_to_bf16"] = float(difference.norm() / variants[0].hidden.norm())
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    variants: list[Variant] = []
    with torch.no_grad():
        for policy in (None, *args.policies):
            with phase(policy or "inductor bf16"):
                variants.append(make_variant(policy, args))
        rows = rows_of(variants, args.repeats)
    settings = {
        "shape": "tiny" if args.smoke else "Llama-3-8B without lm_head",
        "layers": args.layers,
        "batch": 1,
        "cache_tokens": args.tokens,
        "repeats": args.repeats,
        "timing": "steps of all variants in turns, median",
    }
    fields = ("variant", "us", "least_us", "spread", "speedup", "compile_s", "error_to_bf16", "error")
    print(table(fields, [[row.get(field) for field in fields] for row in rows]))
    write_result(args.out, rows, {"benchmark": "cpu_decode", "machine": machine("cpu"), "settings": settings})


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated; empty for bf16 alone")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="size of the static cache, half of it filled")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_decode.json")
    args = parser.parse_args(argv)
    args.shape = TINY if args.smoke else LLAMA_3_8B
    if args.smoke:
        args.layers, args.tokens, args.repeats = 1, 32, 2
    args.policies = [policy for policy in args.policies.split(",") if policy]
    return args


if __name__ == "__main__":
    main()
