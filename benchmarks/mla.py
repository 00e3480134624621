"""A decode step over DeepSeek's latents: K and V computed of the whole static cache, against the linear absorbed by attention.

Decoder layers of DeepSeek-V3's kind, dense, without lm_head; half of the cache is filled. Variants are Inductor alone, this backend
with ``attention: keep``, and as it is, over a cache in the model's dtype and in FP8; the linears under one policy. All variants of
a cell take turns step by step (on a GPU as CUDA graphs). The relative error of the hidden state to Inductor's is a check of sanity.

    python benchmarks/mla.py --out benchmarks/results/mla_cpu.json                            # a small model on a CPU, minutes
    python benchmarks/mla.py --device cuda --out benchmarks/results/mla.json                  # DeepSeek-V3's sizes, minutes
    python benchmarks/mla.py --device cuda --policy FP8_DYNAMIC --out benchmarks/results/mla_fp8.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    Timing,
    collect,
    fill,
    last_line,
    machine,
    phase,
    set_position,
    table,
    time_calls,
    write_result,
)

import quant_compile
from quant_compile.model.ledger import LEDGER

SHARED = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 1024}
SIZES: Mapping[str, dict[str, Any]] = {
    "DeepSeek-V3": {"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "q_lora_rank": 1536},
    "16 heads": {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "q_lora_rank": 768},
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
}  # fmt: skip
# Name -> policy's key ``attention`` and scheme of the cache; None: Inductor alone.
VARIANTS: Mapping[str, tuple[str | None, str | None]] = {
    "inductor": (None, None),
    "as written": ("keep", None),
    "absorbed": ("auto", None),
    "as written, FP8 cache": ("keep", "FP8"),
    "absorbed, FP8 cache": ("auto", "FP8"),
}
# Tokens of the prompt that the filled part of a cache repeats.
PROMPT = 8


def build(args: argparse.Namespace) -> Any:
    """The decoder with seeded weights."""
    from transformers import DeepseekV3Config, DeepseekV3Model

    sizes = SHARED | SIZES[args.model]
    config = DeepseekV3Config(
        **sizes, num_hidden_layers=args.layers, first_k_dense_replace=args.layers, n_routed_experts=8, head_dim=sizes["qk_rope_head_dim"],
        num_key_value_heads=sizes["num_attention_heads"], max_position_embeddings=1 << 16,
    )  # fmt: skip
    config.use_cache = True
    with torch.device("meta"):
        model = DeepseekV3Model(config).to(torch.bfloat16)
    return fill(model, config, args.device)


def cache_of(model: Any, batch: int, tokens: int, scheme: str | None) -> Any:
    """A static cache, half of it filled with the latents of one prompt again and again."""
    from transformers import StaticCache

    device = next(model.parameters()).device
    if scheme is None:
        cache = StaticCache(config=model.config, max_cache_len=tokens)
    else:
        cache = quant_compile.QuantizedStaticCache(model.config, tokens, scheme)
    ids = torch.randint(3, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        scales = getattr(layer, "scales", None)
        for plane in (layer.keys, layer.values, *((scales.keys, scales.values) if scales is not None else ())):
            times = -(-plane.shape[2] // PROMPT)
            plane.copy_(plane[:, :, :PROMPT].repeat(1, 1, times, 1)[:, :, : plane.shape[2]])
    return cache


class Step:
    """One variant's decode step at a fixed position -> hidden state [batch, 1, hidden]."""

    def __init__(self, variant: str, batch: int, tokens: int, args: argparse.Namespace) -> None:
        attention, scheme = VARIANTS[variant]
        self.model, self.tokens = build(args), tokens
        self.cache = cache_of(self.model, batch, tokens, scheme)
        self.ids = torch.ones(batch, 1, dtype=torch.long, device=args.device)
        if attention is None:
            self.model.compile(dynamic=False)
        else:
            policy = {"default": args.policy, "attention": attention}
            self.model.compile(backend="sglquant", options={"policy": policy}, dynamic=False)

    def __call__(self, turn: int = 0) -> torch.Tensor:
        set_position(self.cache, self.tokens // 2)
        return self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True).last_hidden_state

    @property
    def runs(self) -> str:
        """What the report says of its attention."""
        return "; ".join(sorted({line.runs for line in LEDGER.report(self.model).attention}))


def cell(batch: int, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each variant, with its speed relative to what is written over the same cache (above 1: faster)."""
    torch._dynamo.reset()
    steps, hidden, rows = dict[str, Step](), dict[str, torch.Tensor](), list[dict[str, Any]]()
    errors: dict[str, str] = {}
    for name in VARIANTS:
        try:
            step = Step(name, batch, tokens, args)
            hidden[name] = step().float().cpu()
            steps[name] = step
        except Exception as error:
            errors[name] = last_line(error)
    calls: dict[str, Callable[[int], object]] = dict(steps)
    timings = time_calls(calls, args.device, 1, args.repeats)
    for name, (attention, scheme) in VARIANTS.items():
        timing, base = timings.get(name), timings.get("as written" + (", FP8 cache" if scheme else ""))
        row: dict[str, Any] = {"batch": batch, "tokens": tokens, "variant": name, "error": errors.get(name)}
        if attention is not None and name in steps:
            row["attention"] = steps[name].runs
        if isinstance(timing, Timing):
            row |= timing.fields() | {"speedup": base.us / timing.us if isinstance(base, Timing) else None}
        elif timing is not None:
            row["error"] = timing
        if name in hidden and "inductor" in hidden:
            row["error_to_inductor"] = float((hidden[name] - hidden["inductor"]).norm() / hidden["inductor"].norm())
        rows.append(row)
    steps.clear()
    calls.clear()
    collect(args.device)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch, tokens in itertools.product(args.batches, args.contexts):
            with phase(f"batch {batch}, {tokens} tokens"):
                rows += cell(batch, tokens, args)
    settings = {
        "model": args.model,
        "sizes": SHARED | SIZES[args.model],
        "layers": args.layers,
        "dtype": "bfloat16",
        "policy": args.policy,
        "repeats": args.repeats,
        "timing": "steps of all variants in turns, median; half of the cache is filled",
    }
    fields = (
        "batch",
        "tokens",
        "variant",
        "us",
        "least_us",
        "spread",
        "speedup",
        "attention",
        "error_to_inductor",
        "error",
    )
    print(table(fields, [[row.get(field) for field in fields] for row in rows]))
    write_result(args.out, rows, {"benchmark": "mla", "machine": machine(args.device), "settings": settings})


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", choices=SIZES, help="default: DeepSeek-V3 on a GPU, 16 heads on a CPU")
    parser.add_argument("--policy", default="keep", help="of all linears: a scheme's name, or keep")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", help="comma-separated")
    parser.add_argument("--contexts", help="comma-separated: tokens that a cache has room for")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    gpu = args.device.type == "cuda"
    args.model = args.model or ("DeepSeek-V3" if gpu else "16 heads")
    if args.smoke:
        args.model, args.layers, args.repeats = "tiny", 1, 2
    for name, default in (("batches", "1,16" if gpu else "1"), ("contexts", "4096,16384" if gpu else "512,2048")):
        given = getattr(args, name) or ({"batches": "1", "contexts": "64"}[name] if args.smoke else default)
        setattr(args, name, [int(value) for value in given.split(",")])
    return args


if __name__ == "__main__":
    main()
