"""Quality of every scheme of the KV cache on the bundled models: perplexity, copying and a needle, beside a cache in 16 bits.

    python benchmarks/kv_quality.py                       # writes results/kv_quality.json
    python benchmarks/kv_quality.py --schemes FP8 INT8_HEAD --compiled FP8 --textbook
    python benchmarks/kv_quality.py --schemes --textbook --add dense.json moe.json   # joins files of one machine

Weights stay in bf16 and models eager, so that the cache alone differs. Every scored prediction is that of a decode step of
one token over the cache; what stands before is read in one call.

- *Perplexity* over held-out windows as long as the model's positions, behind a prompt of ``PROMPT`` tokens.
- *Copying*: a passage of held-out text, other text, the passage again. Scored is the second time, from its token ``CUE`` on.
  Recall counts those tokens alone that the 16-bit cache does not put first where the first passage is another one.
- *Needle*: a pair of tokens A B that the held-out text has nowhere, held-out text, A again. Does B come?

Text is the same for all schemes; differences to 16 bits are paired, and their standard errors are over windows or trials.
Fixed scales are calibrated on windows that nothing else reads. ``--compiled`` compares compiled models with eager ones.
``--textbook`` measures perplexity under plain round-to-nearest in f64, written apart from the product: a scheme that is far from
16 bits there too costs that much, and one that differs from it shows a defect.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, phase, source_hash, table, write_result
from safetensors.torch import load_file
from torch import Tensor

import quant_compile
from quant_compile import demo
from quant_compile.generation.blocks import layer_names
from quant_compile.generation.quantized import Scales, types
from quant_compile.ir.kv import NAMES, parse_cache
from quant_compile.measure.windows import windows_of
from quant_compile.rules import cache_scale_key

SOURCE = source_hash()
BASE = "16 bits"
MADE = tuple(name for name in NAMES if not parse_cache(name).fixed)
"""Schemes whose scales are made as tokens come."""
WITHIN = 0.005
"""Most that a scheme's perplexity may differ from that of 16 bits, relatively."""
PROMPT = 8
CUE = 8
PLACE = 8
"""Where the needle is."""
ALPHABET = 257
"""Tokens before this one are the tokenizer's end mark and single bytes."""
SEED = 0
COMPILED_WINDOWS = 8
"""Windows for the comparison of compiled with eager."""
EXACT = 0.1
"""Most that compiling may change in f32, of what a scheme changes: a code in ten thousand that flips makes 0.04 of it."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        length: tokens that a window reads, and the most that any cache holds.
        windows: for perplexity.
        calibration: windows of the same length, for fixed scales.
        passage: tokens of a copied passage.
        copies: tokens from a passage to its copy.
        needles: tokens from a needle to the question.
        trials: at each distance.
    """

    length: int = 512
    windows: int = 32
    calibration: int = 4
    passage: int = 64
    copies: tuple[int, ...] = (64, 128, 256, 448)
    needles: tuple[int, ...] = (16, 64, 256, 500)
    trials: int = 64


SMOKE = Sizes(24, windows=2, calibration=1, passage=12, copies=(12,), needles=(8, 14), trials=2)


@dataclass(frozen=True)
class Task:
    """Tokens [rows, length + 1] that are read, the last one to be predicted only.

    Attributes:
        ids: all tokens.
        prompt: those that are read in one call.
        skipped: decode steps that are not scored.
    """

    ids: Tensor
    prompt: int
    skipped: int = 0


@dataclass(frozen=True)
class Scores:
    """Of each scored token [rows, tokens]: f32 log-probability, and how many tokens have a greater logit."""

    logp: Tensor
    rank: Tensor


@dataclass(frozen=True)
class Setting:
    """What rows of one model share; the second task of a distance lacks what is to be found."""

    name: str
    model: Any
    batches: Sequence[Tensor]
    windows: Task
    copies: Mapping[int, tuple[Task, Task]]
    needles: Mapping[int, tuple[Task, Task]]


# --- tasks -----------------------------------------------------------------------------------------------------------


def setting(name: str, device: torch.device, sizes: Sizes) -> Setting:
    """Load the model and cut its held-out text."""
    lm = demo.load(name, device=device)
    windows = windows_of(lm.heldout, sizes.length, sizes.windows + sizes.calibration)
    batches = [window[None, :-1] for window in windows[-sizes.calibration :]]
    measured = windows[: -sizes.calibration]
    text = lm.heldout[: measured.shape[0] * sizes.length + 1]
    unseen = (torch.bincount(lm.heldout, minlength=lm.model.config.vocab_size) == 0).nonzero()[:, 0]
    return Setting(
        name,
        lm.model,
        batches,
        Task(measured, PROMPT),
        {distance: copy_tasks(text, distance, sizes) for distance in sizes.copies},
        {distance: needle_tasks(text, unseen[unseen >= ALPHABET], distance, sizes) for distance in sizes.needles},
    )


def spread(text: Tensor, length: int, sizes: Sizes) -> Tensor:
    """Pieces of ``text`` [trials, length], evenly spread; those of one trial begin alike at any length."""
    starts = torch.linspace(0, text.numel() - sizes.length - 1, sizes.trials).long()
    return torch.stack([text[start : start + length] for start in starts])


def copy_tasks(text: Tensor, distance: int, sizes: Sizes) -> tuple[Task, Task]:
    """A passage, what follows it in the text, the passage again; and with another trial's passage in the first place."""
    ids = spread(text, distance + sizes.passage, sizes)
    passage = ids[:, : sizes.passage].clone()
    ids[:, distance:] = passage
    other = ids.clone()
    other[:, : sizes.passage] = passage.roll(sizes.trials // 2, 0)
    return Task(ids, distance, CUE - 1), Task(other, distance, CUE - 1)


def needle_tasks(text: Tensor, unseen: Tensor, distance: int, sizes: Sizes) -> tuple[Task, Task]:
    """A B at ``PLACE``, A again ``distance`` later; and the same without the pair."""
    draw = torch.Generator().manual_seed(SEED + distance)
    without = spread(text, PLACE + distance + 2, sizes)
    pairs = torch.stack([unseen[torch.randperm(unseen.numel(), generator=draw)[:2]] for _ in without])
    without[:, -2:] = pairs
    ids = without.clone()
    ids[:, PLACE : PLACE + 2] = pairs
    return Task(ids, ids.shape[1] - 2), Task(without, ids.shape[1] - 2)


# --- reading through a cache -----------------------------------------------------------------------------------------


@torch.inference_mode()
def scores(model: Any, cache: Any, task: Task) -> Scores:
    """Read a prompt in one call and the rest token by token."""
    more = {"past_key_values": cache, "use_cache": True}
    model(input_ids=task.ids[:, : task.prompt].contiguous(), logits_to_keep=1, **more)
    logp: list[Tensor] = []
    rank: list[Tensor] = []
    for i in range(task.prompt, task.ids.shape[1] - 1):
        logits = model(input_ids=task.ids[:, i : i + 1].contiguous(), **more).logits[:, -1].float()
        wanted = task.ids[:, i + 1 : i + 2]
        logp.append(logits.log_softmax(-1).gather(1, wanted))
        rank.append((logits > logits.gather(1, wanted)).sum(-1, keepdim=True))
    return Scores(torch.cat(logp, 1)[:, task.skipped :], torch.cat(rank, 1)[:, task.skipped :])


def cache_of(model: Any, scheme: str, task: Task, scales: Sequence[Scales] | None = None) -> Any:
    """An empty cache that just holds a task."""
    from transformers import StaticCache

    length = task.ids.shape[1] - 1
    if scheme == BASE:
        return StaticCache(config=model.config, max_cache_len=length)
    return types().cache(model.config, length, scheme, scales=scales)


def fixed_scales(at: Setting, scheme: str) -> list[Scales] | None:
    """As ``calibrate`` writes them; None where tokens have their own."""
    if scheme == BASE or not parse_cache(scheme).fixed:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scales.safetensors"
        policy = {"default": "keep", "kv_cache": scheme}
        quant_compile.calibrate(at.model, at.batches, policy, path=path, progress=False)
        found = load_file(path)
    return [(found[cache_scale_key(name, "k")], found[cache_scale_key(name, "v")]) for name in layer_names(at.model)]


@dataclass(frozen=True)
class Measured:
    """All scores of one cache; copies and needles by distance."""

    windows: Scores
    copies: Mapping[int, Scores]
    needles: Mapping[int, Scores]


def measure(at: Setting, scheme: str, base: Measured | None = None) -> Measured:
    """Read every task through a cache; beside ``base`` those that lack what is to be found, and the same windows not again."""
    scales = fixed_scales(at, scheme)

    def read(task: Task) -> Scores:
        return scores(at.model, cache_of(at.model, scheme, task, scales), task)

    lacking = base is not None
    return Measured(
        read(at.windows) if base is None else base.windows,
        {distance: read(tasks[lacking]) for distance, tasks in at.copies.items()},
        {distance: read(tasks[lacking]) for distance, tasks in at.needles.items()},
    )


# --- the textbook ----------------------------------------------------------------------------------------------------


def grid(scheme: str) -> Tensor:
    """All codes of a format in f64, in order."""
    if scheme.startswith("INT8"):
        return torch.arange(-127, 128, dtype=torch.float64)
    dtype = torch.float8_e5m2 if scheme.startswith("FP8_E5M2") else torch.float8_e4m3fn
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).double()
    return every[every.isfinite()].unique()


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """The code next to each number."""
    above = torch.searchsorted(codes, x).clamp(1, len(codes) - 1)
    low, high = codes[above - 1], codes[above]
    return torch.where(x - low <= high - x, low, high)


def textbook_cache(config: Any, scheme: str, largest: dict[tuple[int, int], Tensor], watch: bool = False) -> Any:
    """A growing cache that rounds what it gets; ``watch``: that notes the largest magnitudes of heads instead."""
    from transformers import DynamicCache

    codes = None if scheme == BASE else grid(scheme)

    def rounded(x: Tensor, key: tuple[int, int]) -> Tensor:
        amax = x.abs().amax((0, 2, 3), keepdim=True).double()
        if watch:
            largest[key] = torch.maximum(largest[key], amax) if key in largest else amax
        if watch or codes is None:
            return x
        if scheme.endswith("_HEAD"):
            amax = largest[key]
        elif scheme.endswith("_TENSOR"):
            amax = largest[key].amax()
        else:
            amax = x.abs().amax(-1, keepdim=True).double()
        scale = amax / codes[-1]
        return (nearest(x.double() / scale, codes) * scale).to(x.dtype)

    class Rounding(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            k, v = (rounded(x, (layer_idx, side)) for side, x in enumerate((key_states, value_states)))
            return super().update(k, v, layer_idx, *args, **kwargs)

    return Rounding(config=config)


@torch.inference_mode()
def textbook_scores(at: Setting, scheme: str, largest: dict[tuple[int, int], Tensor]) -> Scores:
    """Whole windows at once, and scored where decode steps score them."""
    out: list[Tensor] = []
    for ids in at.windows.ids.split(8):
        cache = textbook_cache(at.model.config, scheme, largest)
        logits = at.model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
        out.append(logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][:, at.windows.prompt :])
    return Scores(torch.cat(out), torch.empty(0))


def textbook_rows(at: Setting, schemes: Sequence[str]) -> list[dict[str, Any]]:
    """Perplexity, its relative difference to 16 bits measured in the same way, and the standard error of that."""
    largest: dict[tuple[int, int], Tensor] = {}
    with torch.inference_mode():
        for batch in at.batches:
            cache = textbook_cache(at.model.config, BASE, largest, watch=True)
            at.model(input_ids=batch, past_key_values=cache, use_cache=True)
    base = textbook_scores(at, BASE, largest)
    out: list[dict[str, Any]] = []
    for scheme in (BASE, *schemes):
        found = base if scheme == BASE else textbook_scores(at, scheme, largest)
        apart, error = paired(found, base)
        out.append({"model": at.name, "scheme": scheme, "perplexity": perplexity(found)})
        out[-1] |= {"to_base": math.expm1(0.0 - apart), "error": error, "rms": rms(found, base)}
    return out


# --- rows ------------------------------------------------------------------------------------------------------------


def paired(found: Scores, base: Scores) -> tuple[float, float]:
    """Mean difference of log-probabilities, and its standard error over rows."""
    apart = (found.logp - base.logp).mean(1)
    return float(apart.mean()), float(apart.std() / math.sqrt(apart.numel()))


def perplexity(found: Scores) -> float:
    """exp of the mean negative log-likelihood."""
    return math.exp(-float(found.logp.mean()))


def bits(scheme: str, head: int) -> float:
    """Of a number of K or V, scales of tokens included."""
    if scheme == BASE:
        return 16.0
    return 8.0 if parse_cache(scheme).fixed else 8.0 + 32.0 / head


def shares(rank: Tensor) -> dict[str, float]:
    """How often the right token is first, and among the first five."""
    return {"first": float((rank == 0).float().mean()), "five": float((rank < 5).float().mean())}


def copy_row(distance: int, found: Scores, base: Scores, control: Scores) -> dict[str, Any]:
    """Copying at one distance; recall is over the tokens that are not first without the first passage."""
    hard = control.rank > 0
    to_base, error = paired(found, base)
    out = {"distance": distance, "logp": float(found.logp.mean()), "to_base": to_base, "error": error}
    return out | shares(found.rank[hard]) | {"tokens": found.rank.numel(), "recallable": int(hard.sum())}


def needle_row(distance: int, found: Scores, base: Scores) -> dict[str, Any]:
    """The needle at one distance."""
    to_base, error = paired(found, base)
    out = {"distance": distance, "logp": float(found.logp.mean()), "to_base": to_base, "error": error}
    return out | shares(found.rank) | {"median_rank": float(found.rank.float().median()), "trials": len(found.rank)}


def details(found: Measured, base: Measured, control: Measured) -> dict[str, Any]:
    """Copies and needles of a row."""
    return {
        "copies": [copy_row(at, found.copies[at], base.copies[at], control.copies[at]) for at in found.copies],
        "needles": [needle_row(at, found.needles[at], base.needles[at]) for at in found.needles],
    }


def row(at: Setting, scheme: str, found: Measured, base: Measured, control: Measured) -> dict[str, Any]:
    """One scheme of one model.

    ``perplexity``, ``to_base`` (relative) with ``error`` (standard, of ``to_base``) and ``within`` (the tolerance); ``bits`` of a
    number of K or V; ``copies`` and ``needles`` by distance, where ``logp`` is the mean log-probability of the right token,
    ``to_base`` its difference to 16 bits with its standard error.
    """
    apart, error = paired(found.windows, base.windows)
    out = {"model": at.name, "scheme": scheme, "bits": bits(scheme, at.model.config.head_dim)}
    out |= {"perplexity": perplexity(found.windows), "to_base": math.expm1(0.0 - apart), "error": error}
    return out | {"within": abs(math.expm1(0.0 - apart)) <= WITHIN} | details(found, base, control)


def compiled_rows(at: Setting, scheme: str) -> list[dict[str, Any]]:
    """Compiled models with caches made by hand against eager ones, over the first windows: 16 bits and a scheme, bf16 and f32.

    In bf16 sums of another order change last bits, and these change codes; in f32 hardly any, so that what is left there is a
    difference of what is computed. ``rms`` is the root mean square of the differences of tokens' log-probabilities between compiled
    and eager, ``eager_rms_to_base`` of those that the scheme makes. ``within_rounding``: in f32 ``rms`` is at most ``EXACT`` of it.
    """
    task = Task(at.windows.ids[:COMPILED_WINDOWS], at.windows.prompt)
    out: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        eager: dict[str, Scores] = {}
        for name in (BASE, scheme):
            model = demo.load(at.name, device=task.ids.device).model.to(dtype)
            eager[name] = scores(model, cache_of(model, name, task), task)
            torch.compiler.reset()
            quant_compile.compile(model, {"default": "keep", "kv_cache": "keep" if name == BASE else name})
            found = scores(model, cache_of(model, name, task), task)
            out.append({"model": at.name, "scheme": name, "dtype": str(dtype).removeprefix("torch.")})
            out[-1] |= compared(found, eager[name], eager[BASE])
        if dtype == torch.float32:
            out[-1]["within_rounding"] = out[-1]["rms"] <= EXACT * out[-1]["eager_rms_to_base"]
    return out


def compared(found: Scores, eager: Scores, base: Scores) -> dict[str, Any]:
    """Numbers of a row of ``compiled_rows``."""
    apart, error = paired(found, eager)
    out = {
        "tokens": found.logp.numel(),
        "perplexity": perplexity(found),
        "to_eager": math.expm1(0.0 - apart),
        "error": error,
    }
    return out | {"rms": rms(found, eager), "eager_rms_to_base": rms(eager, base)}


def rms(a: Scores, b: Scores) -> float:
    """Root mean square of the difference of log-probabilities."""
    return float((a.logp - b.logp).square().mean().sqrt())


def add(path: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Take over an earlier file.

    Raises:
        ValueError: of another machine, other sources or settings, so that its rows cannot stand beside others.
    """
    old = json.loads(path.read_text(encoding="utf-8"))
    for key in ("machine", "settings"):
        if old[key] != json.loads(json.dumps(result[key])):
            raise ValueError(
                f"{path.name} cannot be added: its {key} is {old[key]}, here {result[key]}. Measure all anew."
            )
    rows += old["rows"]
    result["without"] |= old["without"]
    for key in ("compiled", "textbook"):
        result[key] += old.get(key, [])


def measure_all(at: Setting, args: argparse.Namespace, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """What is asked for of one model, into ``rows`` and ``result``."""
    if args.textbook:
        with phase(f"{at.name} textbook"):
            result["textbook"] += textbook_rows(at, args.schemes or NAMES)
    if args.schemes:
        measure_caches(at, args, result, rows)
    if args.compiled:
        with phase(f"{at.name} compiled"):
            result["compiled"] += compiled_rows(at, args.compiled)
    write_result(args.out, rows, result, quiet=True)


def measure_caches(at: Setting, args: argparse.Namespace, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Every scheme of one model through its cache."""
    with phase(f"{at.name} {BASE}"):
        base = measure(at, BASE)
        control = measure(at, BASE, base)
    result["without"][at.name] = details(control, base, control)
    rows.append(row(at, BASE, base, base, control))
    for scheme in args.schemes:
        with phase(f"{at.name} {scheme}"):
            found = measure(at, scheme)
        rows.append(row(at, scheme, found, base, control))
        write_result(args.out, rows, result, quiet=True)


# --- command line ----------------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """The table for people: the mean over distances, then each."""
    head = ("model scheme", "bits", "perplexity", "to 16 bits", "within", "copy, dlogp", "copy, first", "needle, dlogp")
    lines = [
        [
            f"{r['model']} {r['scheme']}", r["bits"], f"{r['perplexity']:.4f}", f"{r['to_base']:+.3%} +- {r['error']:.3%}",
            r["within"], " ".join(f"{c['to_base']:+.3f}" for c in r["copies"]),
            " ".join(f"{c['first']:.1%}" for c in r["copies"]), " ".join(f"{n['to_base']:+.2f}" for n in r["needles"]),
        ]
        for r in rows
    ]  # fmt: skip
    print(table(head, lines), flush=True)
    for r in (*result["compiled"], *result["textbook"]):
        print(r, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; the status is 1 if a perplexity is too far from that of 16 bits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["dense", "moe"], choices=("dense", "moe"))
    parser.add_argument(
        "--schemes", nargs="*", default=list(NAMES), metavar="SCHEME", help="none: only what else is asked"
    )
    parser.add_argument(
        "--compiled", choices=MADE, metavar="SCHEME", help="compare compiled models with eager ones too"
    )
    parser.add_argument("--textbook", action="store_true", help="perplexity under plain rounding too")
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="FILE", help="join earlier files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny")
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_quality.json")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.schemes) - set(NAMES))
    if unknown:
        parser.error(f"unknown schemes {', '.join(unknown)}; there are {', '.join(NAMES)}")
    sizes = SMOKE if args.smoke else Sizes()
    device = torch.device(args.device)
    torch.set_num_threads(1)  # these products are too small to share
    result: dict[str, Any] = {"benchmark": "kv_quality", "machine": machine(device) | {"source": SOURCE}}
    result |= {
        "settings": asdict(sizes) | {"prompt": PROMPT, "cue": CUE, "place": PLACE, "seed": SEED, "within": WITHIN}
    }
    result |= {"tokens": sizes.windows * (sizes.length - PROMPT), "without": {}, "compiled": [], "textbook": []}
    rows: list[dict[str, Any]] = []
    for path in args.add:
        add(path, result, rows)
    for name in args.models:
        measure_all(setting(name, device, sizes), args, result, rows)
    write_result(args.out, rows, result)
    print_rows(rows, result)
    return int(not args.smoke and not all(row["within"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
