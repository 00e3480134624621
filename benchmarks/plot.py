"""Draw what ``benchmarks/results/*.json`` hold, as SVG for light and for dark pages: docs/images/NAME-light.svg, NAME-dark.svg.

    python benchmarks/plot.py             # all that have results; needs matplotlib
    python benchmarks/plot.py --only speed --out /tmp/plots

``speed``: ``generate`` by stack and batch, relative to the bf16 that Hugging Face compiles itself (generate.json). ``roofline``: of each
kernel that is chosen, the share of a GPU's memory rate and of its arithmetic, by m (gemm.json, gemm_4bit.json); the rates are those of
``quant_compile/lowering/roofs.py``: what a copy reaches, and the vendor's dense peak. ``quality``: extra perplexity by bits a weight
(quality_cpu.json). The same results give the same files, to the byte, under one version of matplotlib.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from render_readme import RESULTS, ROOT, place, read

from quant_compile.ir.family import bits_per_weight
from quant_compile.ir.scheme import parse
from quant_compile.lowering import schemes  # noqa: F401  # registers the presets
from quant_compile.lowering.roofs import roof
from quant_compile.lowering.target import Target

IMAGES = ROOT / "docs" / "images"
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Theme:
    """Colours of a page, and of series in turn (Okabe and Ito's, which people with any kind of sight can tell apart)."""

    name: str
    ink: str
    faint: str
    series: tuple[str, ...]


_SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c7a00", "#7f7f7f")
THEMES = (
    Theme("light", "#1f2328", "#d8dee4", _SERIES),
    Theme("dark", "#e6edf3", "#3d444d", ("#4aa8e0", "#f0b429", "#2cc295", "#e29bc4", "#f08a4b", "#9bd3f5", "#d1c04a", "#a8a8a8")),
)  # fmt: skip


# Of the first series of each colour, and of the second.
_LINES = ("o-", "s--", "^:")
DECODE = {"FP8_DYNAMIC": "FP8", "W4A16": "W4A16", "W4A8": "W4A8", "hf-eager": "HF bf16, eager"}
"""Stack -> what people call it."""
BATCHES = (1, 8, 32)
MOST = 1.0
"""Extra perplexity that is drawn at most; a model that is worse is of no use."""


def speed(axes: Any, theme: Theme, result: Result) -> str:
    """Bars of one model's decode speed; returns the title."""
    model = "Llama-3-8B"
    rows = {row["stack"]: row["cells"] for row in result["rows"] if row["model"] == model}
    stacks = [stack for stack in DECODE if stack in rows]
    width = 0.8 / len(stacks)
    for i, stack in enumerate(stacks):
        found = [(b, rows[stack].get(f"B={b} P=128", {}).get("speedup")) for b in BATCHES]
        at = [x + (i - (len(stacks) - 1) / 2) * width for x, (_, value) in enumerate(found) if value]
        heights = [value for _, value in found if value]
        bars = axes.bar(at, heights, width * 0.92, color=theme.series[i], label=DECODE[stack])
        axes.bar_label(bars, [f"{height:.2f}×" for height in heights], color=theme.ink, fontsize=8, padding=2)
    axes.axhline(1.0, color=theme.ink, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(BATCHES)), [f"batch {b}" for b in BATCHES])
    axes.set_ylabel("tokens per second, to compiled bf16")
    axes.legend(frameon=False, labelcolor=theme.ink, ncols=2, fontsize=9, loc="upper left")
    axes.set_ylim(
        0,
        1.25
        * max(
            cell["speedup"] for s in stacks for b in BATCHES if (cell := rows[s].get(f"B={b} P=128", {})).get("speedup")
        ),
    )
    return f"generate(), {model} shape, 16 layers, prompt 128; the line is Hugging Face's own compiled bf16"


def roofline(axes: Any, theme: Theme, *results: Result) -> str:
    """Lines of shares by m, one for each scheme: the best share of what bounds it, over all sizes."""
    summaries = [row for result in results for row in result["summary"]]
    kinds = list(dict.fromkeys(row["scheme"] for row in summaries))
    arch = results[0]["machine"]["arch"]
    for i, spec in enumerate(kinds):
        rows = [row for row in summaries if row["scheme"] == spec]
        by_m = {m: [shares(row, arch) for row in rows if row["m"] == m] for m in sorted({row["m"] for row in rows})}
        means = [statistics.fmean(max(pair) for pair in pairs) for pairs in by_m.values()]
        axes.plot(
            list(by_m),
            means,
            _LINES[i // len(theme.series)],
            color=theme.series[i % len(theme.series)],
            label=spec,
            markersize=4,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 16, 64, 512, 4096], ["1", "16", "64", "512", "4096"])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("m, tokens in a product")
    axes.set_ylabel("share of what bounds it")
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, ncols=2)
    return "Chosen kernels: share of the memory rate or of the arithmetic, the larger, mean over sizes of Llama"


def shares(row: Result, arch: str) -> tuple[float, float]:
    """Of a row of gemm.json (share of the memory rate, share of the arithmetic)."""
    scheme, limits = parse(row["scheme"]), roof(Target.fake(arch))
    n, k, m = row["n"], row["k"], row["m"]
    inputs = scheme.input_activations
    moved = n * k * bits_per_weight(scheme) / 8 + m * k * (2 if inputs is None else inputs.num_bits / 8) + 2 * m * n
    rate = limits.math16 if inputs is None else limits.math8
    return moved / row["dispatch_us"] / limits.bandwidth, 2 * m * n * k / row["dispatch_us"] / rate


def quality(axes: Any, theme: Theme, result: Result) -> str:
    """Points of schemes, one colour for each model."""
    for i, model in enumerate(("dense", "moe")):
        rows = [row for row in result["rows"] if row["model"] == model]
        points = [
            (row["bits_per_weight"], row["mean_to_bf16"] or row["product_to_bf16"], row["scheme"]) for row in rows
        ]
        good = [point for point in points if 0 < point[1] <= MOST]
        axes.scatter([p[0] for p in good], [p[1] for p in good], s=18, color=theme.series[i], label=model)
        best: dict[float, tuple[float, float, str]] = {}
        for point in good:
            best[round(point[0])] = min(best.get(round(point[0]), point), point, key=lambda p: p[1])
        for bits, extra, scheme in best.values() if model == "dense" else ():
            axes.annotate(
                scheme, (bits, extra), color=theme.ink, fontsize=7, xytext=(4, -9), textcoords="offset points"
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"+{value * 100:g} %")
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("extra perplexity, to bf16")
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    return "Bundled models by scheme, rounded to nearest; named: the best of each number of bits of the dense one"


PLOTS: dict[str, tuple[Callable[..., str], tuple[str, ...], tuple[float, float]]] = {
    "speed": (speed, ("generate",), (7.5, 3.6)),
    "roofline": (roofline, ("gemm", "gemm_4bit"), (7.5, 4.0)),
    "quality": (quality, ("quality_cpu",), (7.5, 4.2)),
}


def draw(name: str, results: Path, theme: Theme, path: Path) -> bool:
    """One plot; False where a result that it needs is absent."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    run, needs, size = PLOTS[name]
    found = [result for need in needs if (result := read(need, results)) is not None]
    if len(found) < len(needs):
        return False
    style = {
        "svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif", "text.color": theme.ink, "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint, "xtick.color": theme.ink, "ytick.color": theme.ink, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": theme.faint, "axes.axisbelow": True,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        title = run(axes, theme, *found)
        axes.set_title(f"{title}\n{place(found[0])}", fontsize=8, loc="left", color=theme.ink)
        figure.savefig(
            path, transparent=True, metadata={"Date": None, "Creator": None, "Title": f"{title}. {place(found[0])}"}
        )
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and say what was."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=sorted(PLOTS), default=sorted(PLOTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        for theme in THEMES:
            path = args.out / f"{name}-{theme.name}.svg"
            print(path if draw(name, args.results, theme, path) else f"{name}: no results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
