"""MoE kernels against their peers: every kernel of the registry, and Hugging Face's bf16 experts compiled by Inductor.

For each shape, scheme, routing and number of tokens T every contender computes the whole block after the router (gather,
both products, activation, weighted sum). It is first compared with the plain torch truth over up to 64 tokens (relative
Frobenius error at most 3e-2, and no NaN or inf anywhere); one that fails is reported and not timed. Then all contenders
of a cell are timed in turns as CUDA graphs. Routings take turns too, over experts that together exceed the L2 three times.
Tokens are quantized beforehand, which a compiled model fuses into the norm before. The floor is what must be read at the
vendor's bandwidth, or multiplied at the vendor's dense peak, whichever takes longer.

    python benchmarks/moe.py --out benchmarks/results/moe.json           # three models' shapes, some 8 minutes
    python benchmarks/moe.py --shapes Qwen3-30B-A3B --schemes GGUF_Q4_K,GGUF_Q8_0 --ts 1,16,64
    python benchmarks/moe.py --shapes Qwen3-30B-A3B --schemes NVFP4A16,W4A8,W4AFP8 --ts 1,16 --no-peers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from common import (
    GIB,
    RESULTS,
    ROTATE_BYTES,
    Deadline,
    Timing,
    geomean,
    last_line,
    machine,
    table,
    time_calls,
    write_result,
)
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401  (registers the scheme families)
from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.ir.moe import Activation, MoeProblem, moe_reference
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.experts import library_moe
from quant_compile.lowering.moe import MoeKernel, moe_kernels, moe_layouts
from quant_compile.lowering.target import Target

TS = (1, 16, 64, 512, 4096)
SKEWED_TS = (64, 512)
# Where a sum of the first product differs in its last bits, the hidden layer's code may be the next one, 6 % away in e4m3:
# 2e-3 of error before it leaves up to 1.5e-2 behind it. Tests compare stage by stage, within 5e-3.
TOLERANCE = 3e-2
CHECKED_TOKENS = 64
MOST_SAMPLES = 24
# batched_mm copies the weights of every chosen expert of every token.
MOST_GATHERED = 16 * GIB
# Vendor's dense peaks in operations a microsecond (H100 and H200 SXM): 16-bit, 8-bit. Vendor's bandwidth in bytes a
# microsecond, by a part of the name; a copy is no yardstick, kernels that only read are faster.
PEAKS = {90: (989e6, 1979e6)}
BANDWIDTHS = {"H200": 4.8e6, "H100": 3.35e6}
HOPELESS = 8.0


@dataclass(frozen=True)
class Shape:
    """The experts of a model: E, k, hidden size, intermediate size, and the schemes measured on them."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    schemes: tuple[str, ...] = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16")

    def problem(self, scheme: str) -> MoeProblem:
        """The block under a scheme."""
        return MoeProblem(
            parse(scheme), self.experts, self.hidden, self.intermediate, self.top_k, Activation("silu"), torch.bfloat16
        )

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(n, k) of both products."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)


SHAPES = (
    Shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Shape("Mixtral-8x7B", 8, 2, 4096, 14336),
    Shape("DeepSeek-V3", 256, 8, 7168, 2048, ("FP8_BLOCK",)),
)
SMOKE_SHAPES = (Shape("tiny", 8, 2, 128, 256, ("FP8_DYNAMIC", "W8A8", "W8A16", "W4A16", "NVFP4A16", "W4A8")),)
SMOKE_TS = (1, 20)


# --- routings --------------------------------------------------------------------------------------------------------


def even(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
    """ids [T, k]: experts dealt like cards, so that all are chosen equally often and neighbours choose different ones."""
    hands = shape.experts // shape.top_k
    decks = -(-tokens // hands)
    cards = [torch.randperm(shape.experts, generator=generator)[: hands * shape.top_k] for _ in range(decks)]
    return torch.cat(cards).reshape(-1, shape.top_k)[:tokens]


def skewed(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
    """ids [T, k]: each token draws k different experts, expert r with a weight of 1 / (r + 1)."""
    odds = 1.0 / torch.arange(1, shape.experts + 1)
    return torch.multinomial(odds.expand(tokens, -1), shape.top_k, generator=generator)


ROUTINGS: Mapping[str, Callable[[Shape, int, torch.Generator], Tensor]] = {"even": even, "skewed": skewed}


@dataclass(frozen=True)
class Sample:
    """One call's tokens [T, H] bf16, ids [T, k] i64 and weights [T, k] bf16."""

    x: Tensor
    ids: Tensor
    weights: Tensor


def samples_of(shape: Shape, routing: str, tokens: int, device: torch.device) -> list[Sample]:
    """As many calls as must take turns so that no expert is still in the L2 when it is chosen again; at least two."""
    generator = torch.Generator().manual_seed(tokens * 31 + shape.experts)
    touched = min(shape.experts, tokens * shape.top_k) * shape.expert_elements // 2
    count = min(MOST_SAMPLES, max(2, -(-ROTATE_BYTES // touched))) if device.type == "cuda" else 2
    ids = ROUTINGS[routing](shape, tokens * count, generator).reshape(count, tokens, shape.top_k)
    out: list[Sample] = []
    for own in ids:
        x = torch.randn(tokens, shape.hidden, generator=generator).to(device, torch.bfloat16)
        scores = torch.rand(tokens, shape.top_k, generator=generator).softmax(-1)
        out.append(Sample(x, own.to(device), scores.to(device, torch.bfloat16)))
    return out


# --- weights ---------------------------------------------------------------------------------------------------------


class Experts:
    """bf16 weights of a shape, and their planes under one scheme at a time."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator(device).manual_seed(shape.hidden)
        self.dense: list[Tensor] = []
        for n, k in shape.sizes:
            w = torch.empty((shape.experts, n, k), dtype=torch.bfloat16, device=device)
            self.dense.append(w.normal_(0.0, k**-0.5, generator=generator))
        self.scheme = ""
        self._planes: dict[str, tuple[Planes, Planes]] = {}

    def planes(self, scheme: str, layout: str = "experts") -> tuple[Planes, Planes]:
        """Both weights in a layout; another scheme frees those of the last one."""
        if scheme != self.scheme:
            self._planes.clear()
            self.scheme = scheme
        if layout not in self._planes:
            w13, w2 = (self._pack(w, scheme, layout) for w in self.dense)
            self._planes[layout] = w13, w2
        return self._planes[layout]

    def _pack(self, dense: Tensor, scheme: str, layout: str) -> Planes:
        """Quantize and pack expert by expert, into planes made once."""
        problem, (n, k) = self.shape.problem(scheme), dense.shape[1:]
        lay = moe_layouts()[layout]
        planes = tuple(torch.empty(s.shape, dtype=s.dtype, device=self.device) for s in lay.planes(problem, n, k))
        for expert in range(self.shape.experts):
            rows = family_of(problem.scheme).quantize_weight(dense[expert], problem.scheme)
            for plane, own in zip(planes, lay.pack(rows, problem, n, k), strict=True):
                plane[expert].copy_(own)
        return planes

    def inputs(self, sample: Sample, scheme: str) -> Planes:
        """Planes of the tokens."""
        parsed = parse(scheme)
        return (
            (sample.x,)
            if parsed.input_activations is None
            else family_of(parsed).quantize_input(sample.x, parsed, None)
        )

    def truth(self, sample: Sample, scheme: str | None) -> tuple[Tensor, Tensor]:
        """(checked tokens, what they become by the scheme's own arithmetic, or in bf16)."""
        tokens = sample.x.shape[0]
        rows = torch.arange(min(tokens, CHECKED_TOKENS), device=self.device)
        rows = rows * 61 % tokens if tokens > CHECKED_TOKENS else rows
        ids, weights, act = sample.ids[rows], sample.weights[rows], Activation("silu")
        if scheme is None:
            w13, w2 = ((w,) for w in self.dense)
            return rows, moe_reference((sample.x[rows],), ids, weights, w13, None, w2, None, None, act, torch.bfloat16)
        w13, w2 = self.planes(scheme)
        x = tuple(plane[rows] for plane in self.inputs(sample, scheme))
        return rows, moe_reference(x, ids, weights, w13, None, w2, None, parse(scheme), act, torch.bfloat16)


# --- contenders ------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One contender in one cell. kind: ``bf16``, ``triton``, ``library`` or ``cpu``."""

    name: str
    kind: str
    call: Callable[[int], Tensor]
    status: str = "ok"
    reason: str | None = None
    error: float | None = None
    timing: Timing | None = None

    def row(self, where: Mapping[str, Any], floor: float | None) -> dict[str, Any]:
        """The JSON row."""
        row: dict[str, Any] = {**where, "contender": self.name, "kind": self.kind, "status": self.status}
        if self.error is not None:
            row["relative_error"] = round(self.error, 7)
        if self.reason is not None:
            row["reason"] = self.reason
        if self.timing is not None:
            row |= self.timing.fields()
            row["times_floor"] = round(self.timing.us / floor, 3) if floor else None
        return row


def kind_of(name: str) -> str:
    """What a kernel of the registry is built on."""
    if name.startswith("triton"):
        return "triton"
    return "cpu" if name.startswith("torch_cpu") else "library"


def kernel_entry(
    kernel: MoeKernel, experts: Experts, scheme: str, samples: Sequence[Sample], xs: Sequence[Planes]
) -> Entry:
    """A kernel of the registry over its own layout."""
    problem = experts.shape.problem(scheme)

    def call(i: int) -> Tensor:
        w13, w2 = experts.planes(scheme, kernel.layout)
        s = samples[i % len(samples)]
        return kernel.run(xs[i % len(xs)], s.ids, s.weights, w13, None, w2, None, None, problem)

    return Entry(kernel.name, kind_of(kernel.name), call)


class Hf:
    """What Hugging Face's experts functions ask of the module they are methods of."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    _is_expert_parallel = has_post_expert_norm = False  # newer versions of transformers ask

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        self.num_experts = gate_up_proj.shape[0]
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


@lru_cache(maxsize=None)
def hf_experts(implementation: str, compiled: bool) -> Callable[..., Tensor]:
    """Hugging Face's ``grouped_mm`` or ``batched_mm`` experts as a function of tensors, compiled by Inductor."""
    from transformers.integrations import moe

    forward = getattr(moe, f"{implementation}_experts_forward")

    def run(x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        return forward(Hf(w13, w2), x, ids, weights)

    return torch.compile(run, dynamic=False, fullgraph=True) if compiled else run


def hf_entry(implementation: str, experts: Experts, samples: Sequence[Sample], compiled: bool) -> Entry:
    """One of Hugging Face's bf16 implementations."""

    def call(i: int) -> Tensor:
        s = samples[i % len(samples)]
        return hf_experts(implementation, compiled)(s.x, s.ids, s.weights, *experts.dense)

    entry = Entry(f"HF {implementation}", "bf16", call)
    gathered = 2 * samples[0].ids.numel() * experts.shape.expert_elements
    if implementation == "batched_mm" and gathered > MOST_GATHERED:
        entry.status, entry.reason = "rejected", f"would copy {gathered / GIB:.0f} GiB of weights"
    return entry


def relative_error(y: Tensor, rows: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error of ``y[rows]``; inf when anything in ``y`` is not finite."""
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    return float((y[rows].float() - expected.float()).norm() / expected.float().norm())


def check(entry: Entry, rows: Tensor, expected: Tensor) -> None:
    """Fill in the entry's error, and its status if it is wrong or breaks."""
    try:
        entry.error = relative_error(entry.call(0), rows, expected)
    except Exception as error:  # a peer or kernel that breaks is a result, not the end of the run
        entry.status, entry.reason = "failing", last_line(error)
        return
    if not entry.error <= TOLERANCE:
        entry.status, entry.reason = "failing", f"relative error {entry.error:.2e} over {TOLERANCE:.0e}"


# --- cells -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The results as they grow; ``rejected`` is a set in order of refusals, each told once."""

    args: argparse.Namespace
    deadline: Deadline
    bandwidth: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rejected: dict[str, None] = field(default_factory=dict)

    def write(self) -> None:
        """What is known so far."""
        meta = {
            "benchmark": "moe",
            "machine": machine(self.args.device),
            "settings": {
                "repeats": self.args.repeats,
                "tolerance": TOLERANCE,
                "bandwidth_bytes_per_us": self.bandwidth,
                "timing": "CUDA graphs in turns of random order, routings rotated past the L2, median"
                if self.args.device != "cpu"
                else "calls in turns, median",
                "seconds": round(self.deadline.elapsed, 1),
            },
            "verdicts": verdicts(self.summary),
            "summary": self.summary,
            "notes": self.notes,
            "rejected": list(self.rejected),
        }
        write_result(self.args.out, self.rows, meta)


def floor_us(shape: Shape, scheme: str | None, sample: Sample, bandwidth: float | None, target: Target) -> float | None:
    """Least microseconds of a call: chosen experts, tokens and results moved once, or multiplied at the dense peak."""
    if bandwidth is None:
        return None
    parsed = parse(scheme) if scheme else None
    chosen = int(sample.ids.unique().numel())
    bits = bits_per_weight(parsed) if parsed else 16.0
    moved = chosen * shape.expert_elements * bits / 8 + 4 * sample.x.numel()
    wide, narrow = PEAKS.get(target.arch, (float("inf"), float("inf")))
    peak = narrow if parsed and parsed.input_activations else wide
    return max(moved / bandwidth, 2.0 * sample.ids.numel() * shape.expert_elements / peak)


def bandwidth_of(target: Target) -> float | None:
    """The vendor's bytes a microsecond; None for a device that is not listed."""
    return next((value for part, value in BANDWIDTHS.items() if part in target.name), None)


def time_entries(entries: Sequence[Entry], device: torch.device, samples: int, repeats: int, limit: float) -> None:
    """Time what is still ok."""
    good = {f"{entry.kind} {entry.name}": entry for entry in entries if entry.status == "ok"}
    calls = {name: entry.call for name, entry in good.items()}
    for name, timing in time_calls(calls, device, samples, repeats, limit).items():
        entry = good[name]
        if isinstance(timing, Timing):
            entry.timing = timing
        else:
            entry.status, entry.reason = "slow" if timing.startswith("slower") else "failing", timing


@dataclass(frozen=True)
class Cell:
    """One routing and number of tokens over the experts of a shape."""

    experts: Experts
    routing: str
    samples: list[Sample]

    @property
    def tokens(self) -> int:
        """T."""
        return self.samples[0].x.shape[0]


def measure_bf16(run: Run, cell: Cell, target: Target) -> dict[str, Any]:
    """Both of Hugging Face's implementations; gives the fields of every scheme's summary of this cell."""
    args, experts = run.args, cell.experts
    names = ("grouped_mm", "batched_mm") if args.peers else ()
    entries = [hf_entry(name, experts, cell.samples, args.compile) for name in names]
    rows, expected = experts.truth(cell.samples[0], None)
    for entry in entries:
        if entry.status == "ok":
            check(entry, rows, expected)
    floor = floor_us(experts.shape, None, cell.samples[0], run.bandwidth, target)
    time_entries(entries, experts.device, len(cell.samples), args.repeats, float("inf"))
    where = {"shape": experts.shape.name, "scheme": "bf16", "routing": cell.routing, "t": cell.tokens}
    run.rows += [entry.row(where | {"floor_us": floor}, floor) for entry in entries]
    us, name = min(((e.timing.us, e.name) for e in entries if e.timing is not None), default=(None, None))
    return {"bf16": name, "bf16_us": us and round(us, 3)}


def measure_scheme(run: Run, cell: Cell, scheme: str, target: Target, bf16: Mapping[str, Any], dispatch: Any) -> None:
    """Every kernel of the registry on one cell."""
    experts, args = cell.experts, run.args
    problem = experts.shape.problem(scheme)
    xs = [experts.inputs(sample, scheme) for sample in cell.samples]
    rows, expected = experts.truth(cell.samples[0], scheme)
    entries: list[Entry] = []
    for kernel in (*moe_kernels().values(), *(library_moe.PEERS if args.peers else ())):
        if kernel.reference:
            continue
        entry = kernel_entry(kernel, experts, scheme, cell.samples, xs)
        answer = kernel.fit(problem, cell.tokens, target)
        if isinstance(answer, Reject):
            run.rejected[f"{experts.shape.name} {scheme} {kernel.name}: {answer.reason}"] = None
            continue
        check(entry, rows, expected)
        entries.append(entry)
    floor = floor_us(experts.shape, scheme, cell.samples[0], run.bandwidth, target)
    limit = max(2000.0, HOPELESS * (bf16["bf16_us"] or float("inf"))) if experts.device.type == "cuda" else float("inf")
    time_entries(entries, experts.device, len(cell.samples), args.repeats, limit)
    where = {"shape": experts.shape.name, "scheme": scheme, "routing": cell.routing, "t": cell.tokens}
    run.rows += [entry.row(where | {"floor_us": floor}, floor) for entry in entries]
    run.summary.append(summarize(where, entries, bf16, floor, dispatch))


def summarize(
    where: Mapping[str, Any], entries: Sequence[Entry], bf16: Mapping[str, Any], floor: float | None, dispatch: Any
) -> dict[str, Any]:
    """One line a cell: bf16, the best of each kind, what the selection picks, and speeds over bf16 (above 1: faster)."""
    out: dict[str, Any] = {**where, "floor_us": floor and round(floor, 3), **bf16}
    timed = [entry for entry in entries if entry.timing is not None]
    for kind in ("triton", "library", "cpu"):
        us, name = min(((e.timing.us, e.name) for e in timed if e.kind == kind and e.timing), default=(None, None))
        out[kind], out[f"{kind}_us"] = name, us and round(us, 3)
    chosen = None if isinstance(dispatch, str) else dispatch.kernel_for(where["t"]).name
    picked = next((e.timing.us for e in timed if e.name == chosen and e.timing), None)
    best = min((e.timing.us for e in timed if e.timing), default=None)
    out |= {"dispatch": chosen, "dispatch_us": picked and round(picked, 3), "best_us": best and round(best, 3)}
    out["speedup"] = round(bf16["bf16_us"] / picked, 4) if picked and bf16["bf16_us"] else None
    out["dispatch_over_best"] = round(picked / best, 4) if picked and best else None
    out["times_floor"] = round(picked / floor, 3) if picked and floor else None
    return out


def verdicts(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per shape and scheme: geometric means over T of speed over bf16 and of the distance to the floor."""
    out: list[dict[str, Any]] = []
    for shape, scheme in dict.fromkeys((row["shape"], row["scheme"]) for row in summary):
        rows = [row for row in summary if (row["shape"], row["scheme"]) == (shape, scheme)]
        speeds = [(row["speedup"], f"{row['routing']} T={row['t']}") for row in rows if row["speedup"]]
        worst = min(speeds, default=(None, None))
        out.append(
            {
                "shape": shape,
                "scheme": scheme,
                "rows": len(rows),
                "geomean_speedup": geomean([speed for speed, _ in speeds]),
                "worst_speedup": worst[0],
                "worst_row": worst[1],
                "geomean_times_floor": geomean([row["times_floor"] for row in rows if row["times_floor"]]),
                "worst_over_best": max(
                    (row["dispatch_over_best"] for row in rows if row["dispatch_over_best"]), default=None
                ),
            }
        )
    return out


def choose_dispatch(problem: MoeProblem, target: Target, tune: str) -> Any:
    """What the backend chooses for the block under its preset as policy; a text when it cannot answer."""
    try:
        from quant_compile.backend import _moe_chooser
        from quant_compile.options import Options, PolicySource

        source = PolicySource(problem.scheme.spec, problem.scheme.spec)
        return _moe_chooser(Options.of({"tune": tune}), source, target, torch.device(target.device))(
            problem, "a benchmark's block"
        )
    except Exception as error:
        return last_line(error)


def measure_shape(run: Run, shape: Shape) -> None:
    """All cells of a shape; schemes outermost, since only one scheme's planes are kept beside bf16."""
    args, device = run.args, torch.device(run.args.device)
    target, experts = Target.of(device), Experts(shape, device)
    plan = [("even", tokens) for tokens in args.ts] + [
        ("skewed", tokens) for tokens in args.ts if tokens in args.skewed_ts
    ]
    cells = [Cell(experts, routing, samples_of(shape, routing, tokens, device)) for routing, tokens in plan]
    bf16: dict[int, dict[str, Any]] = {}
    for scheme in args.schemes or shape.schemes:
        late = run.deadline.passed
        dispatch = "time budget spent" if late else choose_dispatch(shape.problem(scheme), target, args.tune)
        if isinstance(dispatch, str):
            run.notes.append(f"{shape.name} {scheme}: no dispatch ({dispatch})")
        for index, cell in enumerate(cells):
            if run.deadline.passed:
                run.notes.append(
                    f"{shape.name} {scheme} {cell.routing} T={cell.tokens}: not measured, time budget spent"
                )
                continue
            if index not in bf16:
                bf16[index] = measure_bf16(run, cell, target)
            measure_scheme(run, cell, scheme, target, bf16[index], dispatch)
        run.write()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_grad_enabled(False)
    run = Run(args, Deadline(args.seconds))
    run.bandwidth = bandwidth_of(Target.of(args.device))
    run.notes.append(
        "torchao has no MoE inference kernel that takes stacked experts without mslk; sgl-kernel has no fused MoE"
    )
    for shape in args.shapes:
        measure_shape(run, shape)
        if args.device != "cpu":
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    show(run)
    run.write()


def show(run: Run) -> None:
    """Print notes, failing contenders, every time, the table and the verdicts; the most needed last."""
    for note in run.notes:
        print("note:", note)
    for row in run.rows:
        if row["status"] == "failing":
            print(
                f"FAILING {row['shape']} {row['scheme']} {row['routing']} T={row['t']} {row['contender']}: {row['reason']}"
            )
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in run.rows:
        if "us" in row:
            key = (row["shape"], row["scheme"], row["routing"], row["t"])
            lines.setdefault(key, []).append(f"{row['contender']} {row['us']:.1f}")
    for (shape, scheme, routing, tokens), values in lines.items():
        print(f"{shape} {scheme} {routing} T={tokens}: " + ", ".join(values))
    fields = ["shape", "scheme", "routing", "t", "floor_us", "bf16_us", "triton_us", "library_us", "cpu_us", "dispatch"]
    fields += ["dispatch_us", "speedup", "times_floor", "dispatch_over_best"]
    print(table(fields, [[row[name] for name in fields] for row in run.summary]))
    per_scheme = verdicts(run.summary)
    if per_scheme:
        print(table(list(per_scheme[0]), [list(row.values()) for row in per_scheme]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default=None, help=f"comma-separated, of {', '.join(s.name for s in SHAPES)}")
    parser.add_argument("--schemes", default=None, help="comma-separated presets, instead of each shape's own")
    parser.add_argument("--ts", default=None, help="comma-separated numbers of tokens")
    parser.add_argument("--skewed-ts", default=",".join(map(str, SKEWED_TS)), help="those of them routed unevenly too")
    parser.add_argument("--tune", default="quick", choices=["off", "quick", "full"], help="how dispatch is chosen")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=480.0, help="no new cell is started after this")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave Hugging Face's bf16 experts out")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the peers eagerly")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPU, peers uncompiled: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "moe.json")
    args = parser.parse_args(argv)
    if args.smoke:
        args.device, args.repeats, args.tune, args.compile = "cpu", 2, "off", False
    known = {shape.name: shape for shape in (SMOKE_SHAPES if args.smoke else SHAPES)}
    args.shapes = [known[name] for name in args.shapes.split(",")] if args.shapes else list(known.values())
    args.schemes = args.schemes.split(",") if args.schemes else None
    args.ts = [int(t) for t in args.ts.split(",")] if args.ts else list(SMOKE_TS if args.smoke else TS)
    args.skewed_ts = [args.ts[-1]] if args.smoke else [int(t) for t in args.skewed_ts.split(",") if t]
    return args


if __name__ == "__main__":
    main()
