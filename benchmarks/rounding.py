"""What each way of rounding costs the bundled models, beside rounding to nearest; how long it takes, and what it holds.

    python benchmarks/rounding.py                                  # on a GPU if there is one; writes results/rounding_<device>.json
    python benchmarks/rounding.py --models dense --schemes W4A16 --methods gptq --seeds 1
    python benchmarks/rounding.py --models --large                 # the Llama-3-8B shape alone: seconds and peak memory
    python benchmarks/rounding.py --roundings --methods --own gptq --out benchmarks/results/rounding_own_cpu.json

Quantization is simulated in the eager model (``quant_compile/simulate.py``), so that all schemes are measured alike and no
kernel plays a part. Measured is held-out text; calibrated is with windows of what the models were trained on, drawn anew by each seed, or
(``own text``) with what the model writes itself, by its seed, the writing counted.
Extra perplexity is relative to 16 bits, and a method's ratio is its extra to nearest's. KL to 16 bits is beside it, since a perplexity
is one draw: of two roundings alike one may happen to please this text.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import LLAMA_3_8B, RESULTS, Deadline, build_llama, machine, source_hash, table, write_result
from torch import Tensor

import quant_compile
from quant_compile import demo
from quant_compile.ir.scheme import parse
from quant_compile.lowering.rounding.recipe import COMPENSATE, METHODS, NEAREST, SEARCH, Rounding, planes_of
from quant_compile.measure.weights import chosen_by
from quant_compile.measure.windows import divergence, losses, windows_of
from quant_compile.model.weights import linear_weights
from quant_compile.policy import Policy
from quant_compile.simulate import Simulation, Values

SOURCE = source_hash()
LENGTH, WINDOWS, CALIBRATION = 448, 32, 128
SCHEMES = ("W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4A16", "W4A8", "NVFP4", "MXFP4", "W8A8")
WITHOUT_DATA = (SEARCH, COMPENSATE)
DATA, OWN_TEXT = "data", "own text"
TRAINED_ON = 6_000_000
"""Bytes of the standard library that calibration windows are drawn from."""


@dataclass(frozen=True)
class Row:
    """One rounding.

    Attributes:
        method: nearest, search, compensate (no data), or one of calibrate's, with ``, data`` or ``, own text`` behind it.
        extra: perplexity to that of 16 bits, less one.
        kl: mean divergence of the logits from 16 bits', nats.
        to_nearest: ``extra`` over nearest's.
        kl_to_nearest: ``kl`` over nearest's.
        seconds: of the rounding, calibration included; None: other work ran beside it.
    """

    model: str
    scheme: str
    method: str
    seed: int
    extra: float
    kl: float
    to_nearest: float
    kl_to_nearest: float
    seconds: float | None
    source: str = SOURCE
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d", time.gmtime()))


@dataclass(frozen=True)
class Setting:
    """A model, what it is measured on, its logits in 16 bits, and where calibration windows come from."""

    name: str
    model: Any
    windows: Tensor
    reference: list[Tensor]
    loss: float
    trained_on: Tensor


@torch.inference_mode()
def logits_of(model: Any, window: Tensor) -> Tensor:
    """[length, vocabulary]."""
    return model(input_ids=window[None, :-1], use_cache=False).logits[0]


def setting(name: str, device: torch.device, count: int, dtype: torch.dtype | None = None) -> Setting:
    """Load the model, in its own dtype if there is no other, and its logits."""
    lm = demo.load(name, device=device)
    model = lm.model if dtype is None else lm.model.to(dtype)
    windows = windows_of(lm.heldout, LENGTH, count)
    reference = [logits_of(model, window) for window in windows]
    loss = statistics.fmean(float(losses(logits, w[1:]).mean()) for logits, w in zip(reference, windows, strict=True))
    return Setting(name, model, windows, reference, loss, trained_on(device))


def trained_on(device: torch.device) -> Tensor:
    """Token ids of the standard library's files that are not held out."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tiny_lm"))
    import tokenizers
    from corpus import encode, read_corpus

    tokenizer = tokenizers.Tokenizer.from_file(str(demo.find_weights() / "tokenizer.json"))
    files = read_corpus(TRAINED_ON).train
    return torch.tensor(encode(tokenizer, files[:: max(1, len(files) // 300)]), device=device)


def batches_of(ids: Tensor, seed: int, count: int) -> list[Tensor]:
    """Windows drawn at random, eight to a batch."""
    starts = torch.randint(0, ids.numel() - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return list(torch.stack([ids[s : s + LENGTH] for s in starts.tolist()]).split(8))


def evaluate(at: Setting, policy: Policy) -> tuple[float, float]:
    """(extra perplexity, KL)."""
    with torch.inference_mode(), Simulation(chosen_by(policy, at.model), Values(kept_bytes=1 << 34)):
        found = [logits_of(at.model, window) for window in at.windows]
    return judged(at, found)


def judged(at: Setting, found: Iterable[Tensor]) -> tuple[float, float]:
    """(extra perplexity, KL) of logits, one for each window."""
    kl, loss = list[float](), list[float]()
    for logits, window, reference in zip(found, at.windows, at.reference, strict=True):
        loss.append(float(losses(logits, window[1:]).mean()))
        kl.append(float(divergence(logits, reference).kl.mean()))
    return math.expm1(statistics.fmean(loss) - at.loss), statistics.fmean(kl)


def measure(
    at: Setting,
    spec: str,
    roundings: Iterable[str],
    methods: Sequence[str],
    own: Sequence[str],
    seeds: int,
    count: int,
    deadline: Deadline,
) -> Iterator[Row]:
    """Rows of one scheme, nearest first, as they are measured."""
    base: Row | None = None

    def row(method: str, seed: int, policy: Policy, seconds: float) -> Row:
        extra, kl = evaluate(at, policy)
        ratios = (1.0, 1.0) if base is None else (extra / base.extra, kl / base.kl)
        print(
            f"{at.name} {spec} {method} {seed}: {extra:+.3%} KL {kl:.5f}, of nearest's {ratios[0]:.3f} {ratios[1]:.3f}",
            flush=True,
        )
        return Row(at.name, spec, method, seed, extra, kl, *ratios, seconds)

    for method in (NEAREST, *roundings):
        start = time.perf_counter()
        round_all(at.model, spec, Rounding(method))
        found = row(method, 0, Policy.load({"default": spec, "rounding": method}), time.perf_counter() - start)
        base = base or found
        yield found
    with tempfile.TemporaryDirectory() as folder:
        for method, data in [(method, DATA) for method in methods] + [(method, OWN_TEXT) for method in own]:
            for seed in range(seeds):
                if deadline.passed:
                    return
                start, policy = time.perf_counter(), {"default": spec, "method": method}
                path = Path(folder) / f"{method}{data}{seed}.safetensors"
                batches = (
                    batches_of(at.trained_on, seed, count)
                    if data == DATA
                    else quant_compile.own_text(at.model, seed=seed)
                )
                made = quant_compile.calibrate(at.model, batches, policy, path=path, progress=False)
                yield row(f"{method}, {data}", seed, made, time.perf_counter() - start)


def round_all(model: Any, spec: str, how: Rounding) -> None:
    """For the time that it takes."""
    scheme, policy = parse(spec), Policy.load({"default": spec})
    for weight in linear_weights(model):
        if policy.decide(weight.site).scheme is None:
            continue
        values = weight.parameter.detach()
        for each in values if values.dim() == 3 else (values,):
            planes_of(each.contiguous() if each.shape[1] == weight.site.k else each.t().contiguous(), scheme, how)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def large(device: torch.device, roundings: Iterable[str], methods: Iterable[str], count: int) -> list[dict[str, Any]]:
    """The Llama-3-8B shape, 16 layers of random weights, random tokens: seconds and peak memory."""
    model: Any = build_llama(LLAMA_3_8B, 16, device)
    held = torch.cuda.memory_allocated()
    rows: list[dict[str, Any]] = []
    ids = torch.randint(0, model.config.vocab_size, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    for how in roundings:
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        round_all(model, "W4A16", Rounding(how))
        rows.append(_large_row("W4A16", how, start, held))
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            path = Path(folder) / "planes.safetensors"
            batches = [{"input_ids": part.to(device), "use_cache": False, "logits_to_keep": 1} for part in ids.split(8)]
            quant_compile.calibrate(model, batches, {"default": "W4A16", "method": method}, path=path, progress=False)
            rows.append(_large_row("W4A16", f"{method}, data", start, held))
    return rows


def _large_row(scheme: str, method: str, start: float, held: int) -> dict[str, Any]:
    torch.cuda.synchronize()
    row = {
        "scheme": scheme,
        "method": method,
        "seconds": time.perf_counter() - start,
        "held_gib": held / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    print(row, flush=True)
    return row


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Means over seeds."""
    cells: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["scheme"], row["method"]), []).append(row)
    lines = [
        [
            *key,
            len(found),
            *(
                f"{statistics.fmean(r[name] for r in found):.4f}"
                for name in ("extra", "kl", "to_nearest", "kl_to_nearest")
            ),
        ]
        for key, found in cells.items()
    ]
    print(table(("model", "scheme", "method", "seeds", "extra", "kl", "to nearest", "kl to nearest"), lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", default=["dense", "moe"], choices=("dense", "moe"))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--roundings", nargs="*", default=list(WITHOUT_DATA), choices=WITHOUT_DATA, help="without data")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="with data")
    parser.add_argument("--own", nargs="*", default=(), choices=METHODS, help="with text that the model writes itself")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"held-out windows of {LENGTH} tokens")
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--large", action="store_true", help="the Llama-3-8B shape too; needs a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--busy", action="store_true", help="other work runs beside it: seconds are not written")
    parser.add_argument("--seconds", type=float, default=1800.0, help="begin nothing after this")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    device, deadline = torch.device(args.device), Deadline(args.seconds)
    out = args.out or RESULTS / f"rounding_{device.type}.json"
    meta: dict[str, Any] = {"benchmark": "rounding", "machine": machine(device) | {"source": SOURCE}}
    meta["settings"] = {"length": LENGTH, "windows": args.windows, "calibration": args.calibration}
    rows: list[dict[str, Any]] = []
    if args.large:
        meta["large"] = large(device, args.roundings, args.methods, args.calibration)
        write_result(out, rows, meta)
    for name in args.models:
        at = setting(name, device, args.windows)
        for spec in args.schemes:
            if deadline.passed:
                print(f"{name} {spec}: not run, the time was up")
                continue
            for row in measure(
                at, spec, args.roundings, args.methods, args.own, args.seeds, args.calibration, deadline
            ):
                rows.append(asdict(row) | ({"seconds": None} if args.busy else {}))
                write_result(out, rows, meta)
    print_rows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
