"""Quality of every scheme on the bundled models: perplexity as compiled, by the textbook and in bf16; bits, coverage.

    python benchmarks/quality.py                     # on a GPU if there is one; writes results/quality_<device>.json
    python benchmarks/quality.py --schemes W4A16 FP8_BLOCK --windows 8
    python benchmarks/quality.py --schemes NVFP4 --add benchmarks/results/quality_cpu.json   # keeps that file's other rows

The textbook (tests/textbook.py) is eager, in f32, and written apart from the product: a column that differs from it
shows a defect of the product, and the distance of both from bf16 is what the scheme costs this model. A scheme that
fails is a row with its error.

Under 4-bit inputs one perplexity is a draw from a wide distribution: a code that flips is a third of its value away, and
flips more codes behind it. Such schemes are measured on several models that are equally right: each number of the
embedding moved to the next bf16, up or down, at random. Both sides get the same models.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Deadline, last_line, machine, source_hash, table, write_result
from torch import Tensor

import quant_compile
from quant_compile import demo
from quant_compile.ir.family import bits_per_weight
from quant_compile.measure.windows import perplexity, windows_of
from tests import textbook
from tests import textbook_gguf as _textbook_gguf  # noqa: F401  adds GGUF types whose scales are searched for

# Taken before anything is measured: files may change while a process goes on with what it has imported.
SOURCE = source_hash()
LENGTH = 448
CALIBRATION = 4
DRAWS = 8
"""Models that a scheme with 4-bit inputs is measured on, the bundled one first."""
SAME = 1e-6
"""bf16 perplexities of machines that compute alike differ by less, relatively."""


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
        draws: models measured; the columns above are of the first, the bundled one.
        mean_to_textbook: relative difference of the geometric means over all draws; None for a single one.
        mean_error: its standard error, from the differences of the draws.
        mean_to_bf16: geometric mean of the product over all draws to the bundled model in bf16.
        source: hash of the measured sources.
        date: of the measurement.
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
    draws: int = 1
    mean_to_textbook: float | None = None
    mean_error: float | None = None
    mean_to_bf16: float | None = None
    source: str = SOURCE
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d", time.gmtime()))
    error: str | None = None


def forward_perplexity(model: Any, windows: Tensor) -> float:
    """Perplexity without a KV cache, one window a call."""
    return perplexity(lambda ids: model(input_ids=ids, use_cache=False).logits, windows)


def setting(name: str, device: torch.device, count: int) -> Setting:
    """Load the model once, measure bf16, and watch its inputs on windows that are not measured."""
    lm = demo.load(name, device=device)
    windows = windows_of(lm.heldout, LENGTH, count + CALIBRATION)
    batches = [window[None, :-1] for window in windows[-CALIBRATION:]]
    windows = windows[:-CALIBRATION]
    return Setting(
        name, device, windows, batches, textbook.input_amax(lm.model, batches), forward_perplexity(lm.model, windows)
    )


def draws_of(scheme: str) -> int:
    """How many models a scheme is measured on."""
    default = quant_compile.Policy.load(textbook.POLICIES[scheme]).default
    inputs = None if default is None else default.input_activations
    return DRAWS if inputs is not None and inputs.num_bits == 4 else 1


@torch.no_grad()
def log_perplexities(model: Any, windows: Tensor, draws: int) -> list[float]:
    """Logarithms for ``draws`` models: the one given, then others with another bf16 beside each number of the embedding."""
    weight = model.get_input_embeddings().weight
    original = weight.detach().clone()
    out: list[float] = []
    for seed in range(draws):
        if seed:
            weight.copy_(neighbours(original, seed))
        out.append(math.log(forward_perplexity(model, windows)))
    weight.copy_(original)
    return out


def neighbours(x: Tensor, seed: int) -> Tensor:
    """Each bf16 number's next one, up or down at random; zeros stay."""
    steps = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1)
    moved = (x.view(torch.int16) + steps.to(torch.int16).to(x.device)).view(torch.bfloat16)
    return torch.where(x == 0, x, moved)


def measure(scheme: str, at: Setting) -> Row:
    """One row."""
    policy: Any = textbook.POLICIES[scheme]
    loaded = quant_compile.Policy.load(policy).default
    bits = 16.0 if loaded is None else bits_per_weight(loaded)
    draws = draws_of(scheme)
    try:
        fake = textbook.fake_quant_model(demo.load(at.name, device=at.device).model, scheme, amax=at.amax)
        theirs = log_perplexities(fake, at.windows, draws)
        ours, report, seconds = compiled_perplexities(scheme, policy, at, draws)
    except Exception as error:
        return Row(at.name, scheme, bits, at.bf16, error=last_line(error))
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Row(
        model=at.name,
        scheme=scheme,
        bits_per_weight=bits,
        bf16=at.bf16,
        textbook=math.exp(theirs[0]),
        product=math.exp(ours[0]),
        product_to_textbook=math.expm1(apart[0]),
        product_to_bf16=math.exp(ours[0]) / at.bf16 - 1,
        coverage=report.coverage,
        share=report.share,
        seconds=seconds,
        draws=draws,
        mean_to_textbook=math.expm1(statistics.fmean(apart)) if draws > 1 else None,
        mean_error=statistics.stdev(apart) / math.sqrt(draws) if draws > 1 else None,
        mean_to_bf16=math.exp(statistics.fmean(ours)) / at.bf16 - 1 if draws > 1 else None,
    )


def compiled_perplexities(scheme: str, policy: Any, at: Setting, draws: int) -> tuple[list[float], Any, float]:
    """(logarithms of perplexities, report, seconds with compiling) of the product."""
    torch.compiler.reset()
    start = time.perf_counter()
    model = demo.load(at.name, device=at.device).model
    with tempfile.TemporaryDirectory() as folder:
        if textbook.SCHEMES[scheme].static:
            path = Path(folder) / "scales.safetensors"
            policy = quant_compile.calibrate(model, at.batches, policy, path=path, progress=False)
        # The textbook rounds to nearest; what other roundings cost measures rounding.py.
        quant_compile.compile(model, policy=replace(quant_compile.Policy.load(policy), rounding="nearest"), tune="off")
        ours = log_perplexities(model, at.windows, draws)
    return ours, quant_compile.report(model), time.perf_counter() - start


def kept_rows(path: Path, meta: Mapping[str, Any], measured: Collection[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of an earlier result that this run does not measure; each says which sources it measured, and when.

    Raises:
        ValueError: another machine, other versions or other tokens, so that its rows cannot stand beside this run's.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    for key, wanted in comparable(meta).items():
        if (found := comparable(result).get(key)) is not None and found != wanted:
            raise ValueError(f"{path.name} cannot be added to: its {key} is {found}, here {wanted}. Measure all anew.")
    old = {"source": result["machine"]["source"], "date": result["date"]}
    return [old | row for row in result["rows"] if (row["model"], row["scheme"]) not in measured]


def comparable(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What results must have in common: machine, versions, and each model's tokens."""
    machine = {key: value for key, value in meta["machine"].items() if key != "source"}
    return machine | {key: value for key, value in meta.items() if key.startswith("tokens_")}


def check_bf16(rows: Sequence[Mapping[str, Any]]) -> None:
    """One model has one bf16 perplexity.

    Raises:
        ValueError: it has two, so the rows were measured on machines that compute differently, whatever they are called.
    """
    first: dict[str, float] = {}
    for row in rows:
        value = first.setdefault(row["model"], row["bf16"])
        if abs(row["bf16"] / value - 1) > SAME:
            raise ValueError(f"{row['model']} bf16: {value} and {row['bf16']}. Measure all anew on one machine.")


def print_rows(rows: Sequence[Row]) -> None:
    """The table for people."""
    header = (
        "model scheme",
        "bits",
        "bf16",
        "textbook",
        "product",
        "to textbook",
        "mean of draws",
        "to bf16",
        "coverage",
        "share",
    )
    lines: list[list[Any]] = []
    for row in rows:
        head: list[Any] = [f"{row.model} {row.scheme}", f"{row.bits_per_weight:.3f}", f"{row.bf16:.4f}"]
        if row.product is None or row.textbook is None:
            lines.append([*head, row.error, *[None] * 6])
            continue
        mean = f"{row.mean_to_textbook:+.3%} +- {row.mean_error:.3%} ({row.draws})" if row.draws > 1 else None
        lines.append(
            [
                *head,
                f"{row.textbook:.4f}",
                f"{row.product:.4f}",
                f"{row.product_to_textbook:+.3%}",
                mean,
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
    parser.add_argument(
        "--schemes", nargs="*", default=list(textbook.SCHEMES), metavar="SCHEME", help="none: only --add"
    )
    parser.add_argument("--windows", type=int, default=32, help=f"held-out windows of {LENGTH} tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1800.0, help="start no scheme after this")
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="FILE", help="keep rows of other schemes")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.schemes) - set(textbook.SCHEMES))
    if unknown:
        parser.error(f"unknown schemes {', '.join(unknown)}; there are {', '.join(textbook.SCHEMES)}")
    device, deadline = torch.device(args.device), Deadline(args.seconds)
    out = args.out or RESULTS / f"quality_{device.type}.json"
    settings = [setting(name, device, args.windows) for name in args.models]
    meta: dict[str, Any] = {"benchmark": "quality", "machine": machine(device) | {"source": SOURCE}}
    meta |= {f"tokens_{at.name}": at.windows.shape[0] * LENGTH for at in settings}
    cells = [(at, scheme) for at in settings for scheme in args.schemes]
    try:
        measured = {(at.name, scheme) for at, scheme in cells}
        kept = [row for path in args.add for row in kept_rows(path, meta, measured)]
        check_bf16([*kept, *({"model": at.name, "bf16": at.bf16} for at in settings)])
    except ValueError as error:
        parser.error(str(error))
    rows: list[Row] = []
    for at, scheme in cells:
        if deadline.passed:
            rows.append(Row(at.name, scheme, 0.0, at.bf16, error="not run: the time was up"))
            continue
        rows.append(measure(scheme, at))
        print_rows(rows[-1:])
        write_result(out, in_order([*kept, *(asdict(row) for row in rows)]), meta)
    write_result(out, in_order([*kept, *(asdict(row) for row in rows)]), meta)
    print()
    print_rows(rows)
    return int(any(row.error for row in rows))


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense first, then the textbook's order."""
    order = list(textbook.SCHEMES)
    return sorted(rows, key=lambda row: (row["model"], order.index(row["scheme"])))


if __name__ == "__main__":
    sys.exit(main())
