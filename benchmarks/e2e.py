"""End to end: an unmodified Hugging Face Llama under torch.compile: bf16, torchao and sglquant policies.

The model has the Llama-3-8B shape with ``--layers`` layers and seeded random weights. Each stack runs in a process of
its own (fresh allocator, fresh Dynamo, empty caches) and measures: decode steps with CUDA graphs at several batch sizes
over a static cache that holds 2048 of 2112 tokens, prefill of 1 x 2048 (logits of the last token, as ``generate`` asks
for), both in an unbroken stream and by the wall clock with a sync after each step, seconds of each compilation, bytes
held and peak bytes by the allocator, and the kernels of a decode step. Ratios are to Inductor bf16 of the same run. A
stack that fails or runs out of time is a row with its error.

    python benchmarks/e2e.py --out benchmarks/results/e2e.json
    python benchmarks/e2e.py --stacks inductor,FP8_DYNAMIC,torchao-fp8 --batches 1,16
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    collect,
    last_line,
    machine,
    phase,
    set_position,
    static_cache,
    table,
    write_result,
)

STACKS = ("inductor", "FP8_DYNAMIC", "W4A16", "W8A8", "FP8_BLOCK", "torchao-fp8", "torchao-int4")
CACHE_TOKENS, FILLED, PROMPT = 2112, 2048, 2048
SMOKE_TOKENS, SMOKE_FILLED, SMOKE_PROMPT = 64, 32, 16
WARM_STEPS = 6
PROFILED_STEPS = 3

# How a decode step's kernels are told apart by name: a linear is whatever names a matrix product or a weight scheme and
# does not name attention, quantization of an input, or Inductor's own pointwise and reduction kernels. Each stack's
# longest kernels are in the result with this verdict, for checking.
GEMM_NAMES = re.compile(
    r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|scaled_mm|_mm_|int4pack|tinygemm|humming|w4a16|w8a16|w8a8|fp8_|int8_|fp4_|tile_kernel|slices_kernel|flat_kernel|sum_parts",
    re.IGNORECASE,
)
NOT_GEMM_NAMES = re.compile(
    r"fmha|flash|sdpa|attention|attn|triton_(?:poi|red|per)_|(?<!de)quant|^void at::native::\w*elementwise|memcpy",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Setup:
    """What a worker measures, from its command line."""

    stack: str
    layers: int
    device: torch.device
    batches: tuple[int, ...]
    steps: int
    prefill: bool
    smoke: bool
    work: Path

    @property
    def tokens(self) -> tuple[int, int, int]:
        """(cache size, tokens in it before a decode step, prompt length)."""
        return (SMOKE_TOKENS, SMOKE_FILLED, SMOKE_PROMPT) if self.smoke else (CACHE_TOKENS, FILLED, PROMPT)

    @property
    def mode(self) -> str:
        """Inductor's mode: CUDA graphs on a GPU."""
        return "reduce-overhead" if self.device.type == "cuda" else "default"

    @property
    def policy(self) -> str | None:
        """The sglquant policy, None for the other stacks."""
        return None if self.stack == "inductor" or self.stack.startswith("torchao") else self.stack


# --- a worker: one stack in its own process --------------------------------------------------------------------------


class Worker:
    """Runs one stack and appends one JSON line per result to ``<work>/<stack>.jsonl`` as soon as it is known."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.path = setup.work / f"{setup.stack}.jsonl"
        self.model: Any = None
        self.model_bytes = 0

    def emit(self, kind: str, **values: Any) -> None:
        """Append a result."""
        with self.path.open("a") as file:
            file.write(json.dumps({"stack": self.setup.stack, "kind": kind, **values}) + "\n")

    def run(self) -> None:
        """Everything, in the order of what matters most if time runs out; an error is a result too."""
        for step, action in self.phases():
            try:
                with phase(step):
                    action()
            except Exception as error:
                self.emit("error", phase=step, message=last_line(error))
                raise

    def phases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is done, by name."""
        yield "build", self.build
        for index, batch in enumerate(self.setup.batches):
            yield f"decode B={batch}", partial(self.decode, batch, first=index == 0)
            if index == 0 and self.setup.prefill:
                yield "prefill", self.prefill
        yield "memory", self.memory

    def new_model(self) -> Any:
        """The eager bf16 model."""
        return build_llama(TINY if self.setup.smoke else LLAMA_3_8B, self.setup.layers, self.setup.device)

    def build(self) -> None:
        """The model, quantized for torchao, with its forward compiled in place."""
        setup = self.setup
        self.model = self.new_model()
        self.model_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        collect(setup.device)
        reset_peak(setup.device)
        started = time.perf_counter()
        if setup.stack.startswith("torchao"):
            quantize_torchao(self.model, setup.stack)
            synchronize(setup.device)
            self.emit("quantize", seconds=time.perf_counter() - started, peak_gib=peak(setup.device) / GIB)
        if setup.policy is None:
            self.model.compile(mode=setup.mode, dynamic=False)
        else:
            options = {"policy": setup.policy, "mode": setup.mode}
            self.model.compile(backend="sglquant", options=options, dynamic=False)

    def decode(self, batch: int, first: bool) -> None:
        """Compile and time decode steps at one batch size."""
        setup = self.setup
        tokens, filled, _ = setup.tokens
        cache = static_cache(self.model.config, batch, tokens, setup.device, torch.bfloat16)
        ids = torch.arange(batch, device=setup.device).reshape(batch, 1) % self.model.config.vocab_size

        def step() -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits

        set_position(cache, filled)
        reset_peak(setup.device)
        seconds = timed_seconds(step, setup.device)
        if first:
            set_position(cache, filled)
            logits = step().float().cpu().clone()
            torch.save(logits, setup.work / f"{setup.stack}.logits.pt")
            self.first_memory(cache_bytes(cache))
        for _ in range(WARM_STEPS):
            step()
        set_position(cache, filled)
        count = min(setup.steps, tokens - filled - 2)
        samples = stream_samples(step, count, setup.device)
        set_position(cache, filled)
        times = milliseconds(samples, wall_samples(step, count, setup.device))
        self.emit("cell", cell=f"decode B={batch}", compile_s=seconds, **graph_counters(), **times)
        if setup.device.type == "cuda" and batch in (1, 16):
            set_position(cache, filled)
            try:
                self.emit("kernels", cell=f"decode B={batch}", **self.kernels(step))
            except Exception as error:  # the profiler is the one part that machines forbid; the rest must go on
                self.emit("no_profile", message=last_line(error))

    def kernels(self, step: Callable[[], object]) -> dict[str, Any]:
        """The kernels of a step."""
        return profile(step)

    def first_memory(self, cache: int) -> None:
        """Bytes after the first compilation, without the KV cache: what is held, and the peak on the way there."""
        device = self.setup.device
        if device.type == "cuda":
            top, before = peak(device), allocated(device)
            torch._C._cuda_clearCublasWorkspaces()
            workspaces = (before - allocated(device)) / GIB  # part of the peak, and not of quantization
            collect(device)
            held = (allocated(device) - cache) / GIB
            peaks = {"peak_gib": (top - cache) / GIB, "workspaces_gib": workspaces}
            self.emit("first", held_gib=held, model_gib=self.model_bytes / GIB, **peaks)

    def prefill(self) -> None:
        """Compile and time one prompt."""
        setup = self.setup
        tokens, _, prompt = setup.tokens
        cache = static_cache(self.model.config, 1, tokens, setup.device, torch.bfloat16)
        ids = torch.arange(prompt, device=setup.device).reshape(1, prompt) % self.model.config.vocab_size

        def step() -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

        set_position(cache, 0)
        seconds = timed_seconds(step, setup.device)
        # The first calls of a CUDA graph warm up and record it.
        count = max(3, setup.steps // 3)
        samples = stream_samples(step, 3 + count, setup.device, lambda: set_position(cache, 0))[3:]
        times = milliseconds(samples, wall_samples(step, count, setup.device, lambda: set_position(cache, 0)))
        self.emit("cell", cell=f"prefill 1x{prompt}", compile_s=seconds, **graph_counters(), **times)

    def memory(self) -> None:
        """Bytes held after everything, the policy's weights alone, and the product's own account of its work."""
        setup = self.setup
        collect(setup.device)
        if setup.policy is None:
            self.emit("memory", model_gib=self.model_bytes / GIB, end_gib=allocated(setup.device) / GIB)
            return
        import quant_compile

        report = quant_compile.report(self.model)
        named, stored = named_bytes(report)
        before = allocated(setup.device)
        quant_compile.release(self.model)
        collect(setup.device)
        released = allocated(setup.device)
        self.emit("released", freed_gib=(before - released) / GIB, timings=dict(report.timings))
        # Without graphs and their pools, all that is left are the kept Parameters and the planes of the named weights.
        torch._dynamo.reset()
        collect(setup.device)
        left = allocated(setup.device)
        held = left - (self.model_bytes - named)
        self.emit(
            "memory",
            model_gib=self.model_bytes / GIB,
            end_gib=before / GIB,
            end_released_gib=released / GIB,
            weights_gib=left / GIB,
            named_bf16_gib=named / GIB,
            named_held_gib=held / GIB,
            named_ratio=held / named if named and setup.device.type == "cuda" else None,
            ledger_ratio=stored / named if named else None,
            coverage=report.coverage,
        )


def named_bytes(report: Any) -> tuple[int, int]:
    """(bf16 bytes of the weights that are quantized, bytes of their planes), from the ledger."""
    lines = [line for line in report.lines if line.scheme is not None]
    return sum(line.bytes_before for line in lines), sum(line.bytes_after for line in lines)


def quantize_torchao(model: Any, stack: str) -> None:
    """torchao's FP8 per row or int4 tile-packed, on every linear but lm_head, with Inductor's settings left alone."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int4WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    if stack == "torchao-fp8":
        config: Any = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    else:
        config = Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name)


# --- measuring -------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated(device: torch.device) -> int:
    """Bytes the CUDA allocator has given out (0 on CPU)."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak(device: torch.device) -> int:
    """Most bytes given out since ``reset_peak`` (0 on CPU)."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Start a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def timed_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of a first call, which compiles."""
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started


def stream_samples(
    step: Callable[[], object], count: int, device: torch.device, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Milliseconds of each of ``count`` steps in an unbroken stream; ``before`` runs ahead of each and is not counted.

    The stream never drains, so launch costs that the GPU hides are hidden, and those that it waits for are counted: a
    step lasts from the end of what came before it to its own end.
    """
    if device.type != "cuda":
        return wall_samples(step, count, device, before)
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    torch.cuda.synchronize()
    for _ in range(count):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def wall_samples(
    step: Callable[[], object], count: int, device: torch.device, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Milliseconds by the wall clock of each of ``count`` steps that begin with an idle device and end with a sync.

    What a loop sees that looks at each result, as ``generate`` does: the host's time is hidden by nothing.
    """
    samples: list[float] = []
    for _ in range(count):
        before()
        samples.append(timed_seconds(step, device) * 1e3)
    return samples


def milliseconds(samples: Sequence[float], wall: Sequence[float]) -> dict[str, Any]:
    """Medians, least and number of samples for a result row."""
    return {
        "ms": statistics.median(samples),
        "least_ms": min(samples),
        "samples": len(samples),
        "wall_ms": statistics.median(wall),
    }


def graph_counters() -> dict[str, int]:
    """Why a decode might be slow without anyone noticing: skipped CUDA graphs, graphs compiled so far."""
    counters = torch._dynamo.utils.counters
    return {
        "cudagraph_skips": int(counters["inductor"]["cudagraph_skips"]),
        "graphs": int(counters["stats"]["unique_graphs"]),
    }


def profile(step: Callable[[], object]) -> dict[str, Any]:
    """Kernel microseconds of one decode step by class, and the names behind the sums.

    lm_head is the longest matrix product of a step (its weight is several times any layer's); ``linears_us`` leaves it
    out.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    kernels = [(e.name, e.time_range.elapsed_us()) for e in trace.events() if _on_gpu(e)]
    return classify(kernels, PROFILED_STEPS)


def _on_gpu(event: Any) -> bool:
    """Kernels only: no copies, no ranges that annotate the timeline."""
    annotation = getattr(event, "is_user_annotation", False) or event.name.startswith(("Mem", "ProfilerStep"))
    return str(event.device_type).endswith("CUDA") and not annotation


def is_linear(name: str) -> bool:
    """Whether a kernel's name says that it multiplies by a weight."""
    return bool(GEMM_NAMES.search(name)) and not NOT_GEMM_NAMES.search(name)


def classify(kernels: Sequence[tuple[str, float]], steps: int) -> dict[str, Any]:
    """Sums per step over (name, microseconds): linears without lm_head, lm_head, the rest; the twelve longest names."""
    products = sorted((us for name, us in kernels if is_linear(name)), reverse=True)
    head = sum(products[:steps]) / steps
    totals: dict[str, list[float]] = {}
    for name, us in kernels:
        totals.setdefault(name, []).append(us)
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:12]
    total = sum(us for _, us in kernels) / steps
    return {
        "linears_us": sum(products) / steps - head,
        "lm_head_us": head,
        "other_us": total - sum(products) / steps,
        "kernels_per_step": len(kernels) / steps,
        "top": [
            {"name": name[:160], "us": sum(us) / steps, "calls": len(us) / steps, "linear": is_linear(name)}
            for name, us in longest
        ],
    }


# --- the parent: stacks in turn, ratios, output ----------------------------------------------------------------------


def run_stack(
    stack: str, args: argparse.Namespace, work: Path, script: str = __file__, extra: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run one stack in its own process under the time limit; its lines, with an error line if it did not end well.

    ``script`` with ``extra`` arguments is what runs as the worker.
    """
    command = [sys.executable, str(Path(script).resolve()), "--worker", stack, "--work", str(work), *extra]
    command += ["--layers", str(args.layers), "--device", args.device, "--steps", str(args.steps)]
    command += ["--batches", ",".join(map(str, args.batches))]
    command += ["--smoke"] * args.smoke + ["--no-prefill"] * (not args.prefill)
    caches = work / f"{stack}-caches"
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "XDG_CACHE_HOME": str(caches / "xdg"),
        "PYTHONUNBUFFERED": "1",
    }
    started = time.perf_counter()
    log = work / f"{stack}.log"
    with log.open("w") as file:
        worker = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = worker.wait(timeout=args.limit)
        except subprocess.TimeoutExpired:
            # Its own session holds the worker and its compile processes, and nothing else.
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            code = None
    path = work / f"{stack}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if code is None:
        lines.append(
            {"stack": stack, "kind": "error", "phase": "time", "message": f"over its limit of {args.limit:.0f} s"}
        )
    elif code and not any(line["kind"] == "error" for line in lines):
        lines.append({"stack": stack, "kind": "error", "phase": "process", "message": last_line(log.read_text())})
    if code != 0 and args.verbose:
        print(log.read_text()[-6000:])
    print(f"{stack}: {time.perf_counter() - started:.0f} s, {len(lines)} results", flush=True)
    return lines


def summarize(stack: str, lines: Sequence[Mapping[str, Any]], bf16: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One row a stack, with the speed of each cell relative to bf16 (above 1: faster)."""
    row: dict[str, Any] = {"stack": stack, "error": None}
    for line in lines:
        if line["kind"] == "cell":
            cell = {key: value for key, value in line.items() if key not in ("stack", "kind", "cell")}
            base = bf16.get(line["cell"])
            cell["speedup"] = base["ms"] / line["ms"] if base else None
            cell["wall_speedup"] = base["wall_ms"] / line["wall_ms"] if base else None
            row[line["cell"]] = cell
        elif line["kind"] == "kernels":
            kernels = {key: value for key, value in line.items() if key not in ("stack", "kind", "cell")}
            base = bf16.get(f"{line['cell']} kernels")
            ratio = base["linears_us"] / line["linears_us"] if base and line["linears_us"] else None
            row[f"{line['cell']} kernels"] = kernels | {"linears_speedup": ratio}
        elif line["kind"] == "error":
            row["error"] = f"{line['phase']}: {line['message']}"
        else:
            row[line["kind"]] = {key: value for key, value in line.items() if key not in ("stack", "kind")}
    return row


def logits_error(stack: str, work: Path, bf16: str = "inductor") -> float | None:
    """Relative error of a stack's first decode logits to Inductor bf16's: random weights, so a check of sanity only."""
    ours, theirs = work / f"{stack}.logits.pt", work / f"{bf16}.logits.pt"
    if not (ours.exists() and theirs.exists()):
        return None
    y, expected = torch.load(ours), torch.load(theirs)
    return float((y - expected).norm() / expected.norm())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of parent and worker."""
    args = _arguments(argv)
    if args.worker:
        work(args)
        return
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    settings = {
        "shape": "tiny" if args.smoke else "Llama-3-8B",
        "layers": args.layers,
        "batches": args.batches,
        "cache_tokens": CACHE_TOKENS,
        "filled": FILLED,
        "steps": args.steps,
        "timing": "ms: CUDA events around steps of an unbroken stream; wall_ms: wall clock with a sync after each step; "
        "medians. compile_s is the first call, all included",
    }
    meta = {"benchmark": "e2e", "machine": machine(args.device), "settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        bf16: dict[str, Any] = {}
        for stack in args.stacks:
            if time.perf_counter() - started > args.seconds:
                rows.append({"stack": stack, "error": "not run: time budget spent"})
                continue
            row = summarize(stack, run_stack(stack, args, Path(folder)), bf16)
            row["logits_error_to_bf16"] = logits_error(stack, Path(folder))
            if stack == "inductor":
                bf16 = {key: value for key, value in row.items() if isinstance(value, dict)}
            rows.append(row)
            write_result(args.out, rows, meta)  # what is known so far, should the run be cut off
    show(rows, args)
    write_result(args.out, rows, meta)


def work(args: argparse.Namespace) -> None:
    """Run as a worker. No gradients, as in ``generate``; TF32 stays off, as torch's default is."""
    device = torch.device(args.device)
    setup = Setup(
        args.worker, args.layers, device, tuple(args.batches), args.steps, args.prefill, args.smoke, args.work
    )
    with torch.no_grad():
        Worker(setup).run()


def show(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Top kernels, then speed, then memory, then errors."""
    for row in rows:
        for name in [key for key in row if key.endswith("kernels")]:
            _show_kernels(f"{row['stack']}, {name}", row[name])
        timings = row.get("released", {}).get("timings", {})
        if timings:
            print(f"{row['stack']} seconds by stage:", ", ".join(f"{key} {s:.2f}" for key, s in timings.items()))
    cells = [f"decode B={b}" for b in args.batches]
    cells += [name for row in rows for name in row if name.startswith("prefill")][:1]
    header = ["stack"] + [part for cell in cells for part in (f"{cell} ms", "x", "wall", "compile s")]
    header += ["linears x", "logits err"]
    print(table(header, [_speed_row(row, cells) for row in rows]))
    names = ("held_gib", "peak_gib", "end_gib", "end_released_gib", "weights_gib", "named_ratio", "ledger_ratio")
    memory = [{**row.get("first", {}), **row.get("memory", {})} for row in rows]
    print(table(["stack", *names], [[row["stack"], *(m.get(n) for n in names)] for row, m in zip(rows, memory)]))
    for row in rows:
        if row["error"]:
            print(f"ERROR {row['stack']}: {row['error']}")


def _show_kernels(title: str, sums: Mapping[str, Any]) -> None:
    parts = ", ".join(f"{key} {sums[key]:.0f}" for key in ("linears_us", "lm_head_us", "other_us"))
    print(f"{title}: {parts}")
    for top in sums["top"]:
        mark = "linear" if top["linear"] else "other "
        print(f"   {mark} {top['us']:8.1f} us {top['calls']:6.1f} calls  {top['name'][:90]}")


def _speed_row(row: Mapping[str, Any], cells: Sequence[str]) -> list[Any]:
    out: list[Any] = [row["stack"]]
    for cell in cells:
        values = row.get(cell, {})
        out += [values.get(name) for name in ("ms", "speedup", "wall_ms", "compile_s")]
    return [*out, row.get("decode B=1 kernels", {}).get("linears_speedup"), row.get("logits_error_to_bf16")]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stacks", default=",".join(STACKS), help="inductor, torchao-fp8, torchao-int4, any policy")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batches", default="1,16,64", help="decode batch sizes; the first also measures memory")
    parser.add_argument("--no-prefill", dest="prefill", action="store_false")
    parser.add_argument("--steps", type=int, default=30, help="timed decode steps")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a stack may take")
    parser.add_argument("--seconds", type=float, default=480.0, help="no new stack is started after this")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on CPU: does it run?")
    parser.add_argument("--verbose", action="store_true", help="print the log of a stack that fails")
    parser.add_argument("--out", type=Path, default=RESULTS / "e2e.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        args.device, args.layers, args.steps, args.limit = "cpu", min(args.layers, 2), 2, 300.0
    args.stacks = args.stacks.split(",")
    args.batches = [int(b) for b in args.batches.split(",")]
    return args


if __name__ == "__main__":
    main()
