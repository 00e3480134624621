"""Quality of every scheme on the bundled models: perplexity as compiled, by the textbook and in bf16; bits, coverage.

    python benchmarks/quality.py                     # on a GPU if there is one; writes results/quality_<device>.json
    python benchmarks/quality.py --schemes W4A16 FP8_BLOCK --windows 8

The textbook (tests/textbook.py) is eager, in f32, and written apart from the product: a column that differs from it
shows a defect of the product, and the distance of both from bf16 is what the scheme costs this model. A scheme that
fails is a row with its error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Deadline, last_line, machine, table, write_result
from torch import Tensor

import quant_compile
from quant_compile import demo
from tests import textbook

LENGTH = 448
CALIBRATION = 4


@dataclass(frozen=True)
class Setting:
    """What rows share: model, windows [count, length + 1] to measure on, calibration inputs, their textbook amax."""

    name: str
    device: torch.device
    windows: Tensor
    batches: Sequence[Tensor]
    amax: Mapping[str, Tensor]
    bf16: float


@dataclass(frozen=True)
class Row:
    """One scheme; perplexities are None where ``error`` says why.

    Attributes:
        model: dense or moe.
        scheme: its name in tests/textbook.py.
        bits_per_weight: of a quantized weight, group scales included.
        bf16: perplexity of the model as it is.
        textbook: perplexity of the textbook scheme.
        product: perplexity as compiled.
        product_to_textbook: relative difference.
        product_to_bf16: relative difference.
        coverage: quantized bytes over the bytes the policy names.
        share: quantized bytes over all parameter bytes.
        seconds: for the product, compile included.
        error: what went wrong.
    """

    model: str
    scheme: str
    bits_per_weight: float
    bf16: float
    textbook: float | None = None
    product: float | None = None
    product_to_textbook: float | None = None
    product_to_bf16: float | None = None
    coverage: float | None = None
    share: float | None = None
    seconds: float | None = None
    error: str | None = None


def forward_perplexity(model: Any, windows: Tensor) -> float:
    """Perplexity without a KV cache, one window a call."""
    return demo.perplexity(lambda ids: model(input_ids=ids, use_cache=False).logits, windows)


def setting(name: str, device: torch.device, count: int) -> Setting:
    """Load the model once, measure bf16, and watch its inputs on windows that are not measured."""
    lm = demo.load(name, device=device)
    windows = demo.windows_of(lm.heldout, LENGTH, count + CALIBRATION)
    batches = [window[None, :-1] for window in windows[-CALIBRATION:]]
    windows = windows[:-CALIBRATION]
    return Setting(
        name, device, windows, batches, textbook.input_amax(lm.model, batches), forward_perplexity(lm.model, windows)
    )


def measure(scheme: str, at: Setting) -> Row:
    """One row."""
    policy: Any = textbook.POLICIES[scheme]
    loaded = quant_compile.Policy.load(policy).default
    bits = 16.0 if loaded is None else loaded.bits_per_weight
    try:
        fake = textbook.fake_quant_model(demo.load(at.name, device=at.device).model, scheme, amax=at.amax)
        theirs = forward_perplexity(fake, at.windows)
        ours, report, seconds = compiled_perplexity(scheme, policy, at)
    except Exception as error:
        return Row(at.name, scheme, bits, at.bf16, error=last_line(error))
    return Row(
        model=at.name,
        scheme=scheme,
        bits_per_weight=bits,
        bf16=at.bf16,
        textbook=theirs,
        product=ours,
        product_to_textbook=ours / theirs - 1,
        product_to_bf16=ours / at.bf16 - 1,
        coverage=report.coverage,
        share=report.share,
        seconds=seconds,
    )


def compiled_perplexity(scheme: str, policy: Any, at: Setting) -> tuple[float, Any, float]:
    """(perplexity, report, seconds with compiling) of the product."""
    torch.compiler.reset()
    start = time.perf_counter()
    model = demo.load(at.name, device=at.device).model
    with tempfile.TemporaryDirectory() as folder:
        if textbook.SCHEMES[scheme].static:
            path = Path(folder) / "scales.safetensors"
            policy = quant_compile.calibrate(model, at.batches, policy, path=path, progress=False)
        quant_compile.compile(model, policy=policy, tune="off")
        ours = forward_perplexity(model, at.windows)
    return ours, quant_compile.report(model), time.perf_counter() - start


def print_rows(rows: Sequence[Row]) -> None:
    """The table for people."""
    header = ("model scheme", "bits", "bf16", "textbook", "product", "to textbook", "to bf16", "coverage", "share")
    lines: list[list[Any]] = []
    for row in rows:
        head: list[Any] = [f"{row.model} {row.scheme}", f"{row.bits_per_weight:.3f}", f"{row.bf16:.4f}"]
        if row.product is None or row.textbook is None:
            lines.append([*head, row.error, *[None] * 5])
            continue
        lines.append(
            [
                *head,
                f"{row.textbook:.4f}",
                f"{row.product:.4f}",
                f"{row.product_to_textbook:+.3%}",
                f"{row.product_to_bf16:+.3%}",
                f"{row.coverage:.1%}",
                f"{row.share:.1%}",
            ]
        )
    print(table(header, lines), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; the status is 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["dense", "moe"], choices=("dense", "moe"))
    parser.add_argument("--schemes", nargs="+", default=list(textbook.SCHEMES), choices=list(textbook.SCHEMES))
    parser.add_argument("--windows", type=int, default=32, help=f"held-out windows of {LENGTH} tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1800.0, help="start no scheme after this")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    device, deadline = torch.device(args.device), Deadline(args.seconds)
    out = args.out or RESULTS / f"quality_{device.type}.json"
    rows: list[Row] = []
    meta: dict[str, Any] = {"benchmark": "quality", "machine": machine(device)}
    for name in args.models:
        at = setting(name, device, args.windows)
        meta[f"tokens_{name}"] = at.windows.shape[0] * LENGTH
        for scheme in args.schemes:
            if deadline.passed:
                rows.append(Row(name, scheme, 0.0, at.bf16, error="not run: the time was up"))
                continue
            rows.append(measure(scheme, at))
            print_rows(rows[-1:])
            write_result(out, [asdict(row) for row in rows], meta)
    print()
    print_rows(rows)
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
