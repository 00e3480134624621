"""What every benchmark here shares: the machine as data, timing on GPU and CPU, the Llama shape, results as JSON.

Reads nothing but this checkout, the installed packages and the device; writes only the result file it is given. Results
name the device and the versions, and no host name and no path.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Distributions whose version belongs to a result, by the name it is shown under; the first one installed counts.
DISTRIBUTIONS = {
    "torch": ("torch",),
    "triton": ("triton",),
    "transformers": ("transformers",),
    "sgl_kernel": ("sglang-kernel", "sgl-kernel"),
    "torchao": ("torchao",),
    "humming": ("humming-kernels",),
    "deep_gemm": ("sgl-deep-gemm", "deep-gemm"),
    "quant_compile": ("quant-compile",),
}
GIB = float(1 << 30)
# Weights are rotated until this much has been touched between two uses of one copy: three times an H200's L2.
ROTATE_BYTES = 3 * 60 * 1_000_000
# Microseconds that one CUDA graph of repeated calls should take, and the most calls it may hold.
GRAPH_US, GRAPH_CALLS = 5000.0, 120

# The checkout beside these scripts is what is measured, installed or not.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


# --- the machine and the result file ---------------------------------------------------------------------------------


def machine(device: torch.device | str) -> dict[str, Any]:
    """Model name of the device, CPU threads, versions, and a hash of the measured sources."""
    device = torch.device(device)
    out: dict[str, Any] = {"cpu": cpu_model(), "threads": torch.get_num_threads(), "python": sys.version.split()[0]}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        out["gpu"] = properties.name
        out["arch"] = f"sm{properties.major}{properties.minor}"
        out["cuda"] = torch.version.cuda
    return out | {"versions": versions(), "source": source_hash()}


def cpu_model() -> str:
    """The CPU's model name, or ``unknown``."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


def versions() -> dict[str, str | None]:
    """Version of each library that can matter; None where it is absent."""
    return {name: _version(candidates) for name, candidates in DISTRIBUTIONS.items()}


def _version(candidates: Sequence[str]) -> str | None:
    for candidate in candidates:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(candidate)
    return None


def source_hash() -> str:
    """Twelve hex digits over quant_compile's Python sources, so that a result names the code it measured."""
    digest = hashlib.sha256()
    package = ROOT / "quant_compile"
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write_result(
    path: Path, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any], *, quiet: bool = False
) -> None:
    """Write ``{**meta, date, rows}`` as JSON; absolute paths in texts are cut to their last part, NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**meta, "date": time.strftime("%Y-%m-%d", time.gmtime()), "rows": list(rows)}
    path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
    if not quiet:
        print(f"wrote {path.name}: {len(rows)} rows", flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return without_paths(str(value))


def without_paths(text: str) -> str:
    """``text`` with every absolute path cut to its last part."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@~-]+/)+", "", text)


def last_line(error: BaseException | str) -> str:
    """Type and first and last line of an error, or the last line of a log: short enough for a table.

    An error that torch.compile wraps is told as its backend raised it.
    """
    if isinstance(error, str):
        return without_paths((error.strip().splitlines() or ["no output"])[-1])[:400]
    while isinstance(getattr(error, "inner_exception", None), BaseException):
        error = error.inner_exception  # type: ignore[attr-defined]
    lines = str(error).strip().splitlines() or [""]
    return without_paths(f"{type(error).__name__}: {' … '.join(dict.fromkeys((lines[0], lines[-1])))}")[:400]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain text table; floats with three significant digits, the first column to the left."""
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in cells]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def geomean(values: Sequence[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


# --- timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median over repeats, least, and the distance of the quartiles as a share of the median."""

    us: float
    least_us: float
    spread: float

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """From microseconds per call."""
        ordered = sorted(samples)
        median = statistics.median(ordered)
        quartiles = ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]
        return Timing(median, ordered[0], quartiles / median if median else 0.0)

    def fields(self) -> dict[str, float]:
        """For a result row."""
        return {"us": round(self.us, 3), "least_us": round(self.least_us, 3), "spread": round(self.spread, 4)}


class Deadline:
    """A budget in seconds that long loops ask before each cell."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def passed(self) -> bool:
        """Whether the budget is spent."""
        return self.elapsed > self.seconds


class DeviceLock:
    """One process at a time on a device: a file lock that is held for all device work and let go of while compiling.

    ``held`` and ``yielded`` set the state for a block and put the former one back, so either can stand inside the
    other. While it is held the file names the holder and the second it began, for ``holder``. The kernel drops the lock
    of a process that ends, however it ends.

    Attributes:
        waited: seconds this process has waited for the lock in all; they belong to no measurement.
    """

    def __init__(self, path: Path, settle: Callable[[], object] = lambda: None) -> None:
        """``settle`` waits for the device; it is called before the lock is let go of."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)
        self._settle, self._held = settle, False
        self.waited = 0.0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock in this block."""
        yield from self._state(True)

    @contextlib.contextmanager
    def yielded(self) -> Iterator[None]:
        """Let others have the device in this block, which must not use it."""
        yield from self._state(False)

    def take(self) -> None:
        """Hold the lock from here to the end of the block around this."""
        self._set(True)

    def _state(self, wanted: bool) -> Iterator[None]:
        before = self._held
        self._set(wanted)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, wanted: bool) -> None:
        if wanted == self._held:
            return
        if wanted:
            started = time.perf_counter()
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self.waited += time.perf_counter() - started
            os.pwrite(self._file, f"{os.getpid()} {time.time():.0f}\n".encode(), 0)
        else:
            with contextlib.suppress(Exception):  # a device that has failed says so at its next use
                self._settle()
            os.ftruncate(self._file, 0)
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._held = wanted


def holder(path: Path) -> tuple[int, float] | None:
    """(process, seconds so far) of whoever holds a ``DeviceLock``; None where nobody does."""
    fields = path.read_text().split() if path.exists() else []
    return (int(fields[0]), time.time() - float(fields[1])) if len(fields) == 2 else None


def copies_for(nbytes: int) -> int:
    """How many copies of something must take turns so that none is still in the L2 when its turn comes; at least 2."""
    return max(2, math.ceil(ROTATE_BYTES / max(nbytes, 1)))


Call = Callable[[int], object]
"""A measured call; its argument counts calls, so that it can take turns through copies of its operands."""


def time_calls(
    calls: Mapping[str, Call], device: torch.device, copies: int, repeats: int = 15, limit_us: float = math.inf
) -> dict[str, Timing | str]:
    """Time several calls against each other: all take turns in each repeat, in an order drawn anew each time.

    Clocks and heat then hit all alike; in a fixed order, what follows a power-hungry neighbour loses a few percent.
    On a GPU each becomes a CUDA graph of many calls. A call that raises, cannot be captured, or takes longer than
    ``limit_us`` (measured once) gets a text that says so instead of a Timing.
    """
    if device.type != "cuda":
        return _time_cpu(calls, repeats)
    runs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    out: dict[str, Timing | str] = {}
    for name, call in calls.items():
        try:
            estimate = _estimate_us(call, copies)
            if estimate > limit_us:
                out[name] = f"slower than {limit_us:.0f} us: {estimate:.0f} us in one measurement"
                continue
            count = copies * math.ceil(min(max(GRAPH_US / estimate, 4), GRAPH_CALLS) / copies)
            runs[name] = (_capture(call, count), count)
        except Exception as error:
            out[name] = last_line(error)
    samples = _replay(runs, repeats)
    return {name: Timing.of(samples[name]) if name in samples else out[name] for name in calls}


def _estimate_us(call: Call, copies: int) -> float:
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    count = min(copies, 4)
    start.record()
    for i in range(count):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000.0 / count


def _capture(call: Call, count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    return graph


def _replay(runs: Mapping[str, tuple[torch.cuda.CUDAGraph, int]], repeats: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for graph, _ in runs.values():
        graph.replay()
    torch.cuda.synchronize()
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(repeats):
        events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        shuffle(order)
        for name in order:
            graph = runs[name][0]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) * 1000.0 / runs[name][1])
    return samples


def _time_cpu(calls: Mapping[str, Call], repeats: int) -> dict[str, Timing | str]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    order, shuffle = list(calls), random.Random(0).shuffle
    for turn in range(repeats + 1):
        shuffle(order)
        for name in order:
            if name in errors:
                continue
            try:
                start = time.perf_counter()
                calls[name](turn)
                elapsed = (time.perf_counter() - start) * 1e6
            except Exception as error:
                errors[name] = last_line(error)
                continue
            if turn:  # turn 0 warms up
                samples[name].append(elapsed)
    return {name: errors.get(name) or Timing.of(samples[name]) for name in calls}


def collect(device: torch.device) -> None:
    """Free what is unreachable, cached blocks and cuBLAS workspaces included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.empty_cache()


# --- the Llama shape -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama decoder, without its number of layers."""

    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


LLAMA_3_8B = LlamaShape(128256, 4096, 14336, 32, 8)
TINY = LlamaShape(512, 256, 512, 4, 2)


def llama_config(shape: LlamaShape, layers: int) -> Any:
    """transformers' config of ``layers`` layers of ``shape``, SDPA attention, untied head."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    config.use_cache = True
    return config


def build_llama(
    shape: LlamaShape,
    layers: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head: bool = True,
    seed: int = 0,
) -> torch.nn.Module:
    """An eval-mode Hugging Face Llama with seeded random weights made on the device (head=False: the decoder alone).

    Standard deviation 0.02, norms 1: what transformers itself draws, without its slow initialisation.
    """
    from transformers import LlamaForCausalLM, LlamaModel

    config = llama_config(shape, layers)
    with torch.device("meta"):
        model = (LlamaForCausalLM if head else LlamaModel)(config).to(dtype)
    return fill(model, config, device, seed)


def fill(model: torch.nn.Module, config: Any, device: torch.device, seed: int = 0) -> torch.nn.Module:
    """A Hugging Face model made on the meta device gets memory on ``device`` and seeded random weights there."""
    model = model.to_empty(device=device)
    # to_empty leaves the rotary frequencies unset, which live in no state dict.
    decoder = getattr(model, "model", model)
    if hasattr(decoder, "rotary_emb"):
        decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval().requires_grad_(False)


def static_cache(
    config: Any,
    batch: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 1,
    heads: int | None = None,
) -> Any:
    """A StaticCache for ``tokens`` tokens that is initialised before any compiled call and filled with random values.

    ``heads`` are those of K and V that this process has, where that is not all of them. A cache that initialises
    itself inside a compiled call is owned by the CUDA graph and fails at the second step.
    """
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=tokens)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads or config.num_key_value_heads, head_dim, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for layer in cache.layers:
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
    return cache


def set_position(cache: Any, position: int) -> None:
    """Make the cache hold ``position`` tokens; in place, since compiled graphs keep the counters' addresses."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(position)


def cache_bytes(cache: Any) -> int:
    """Bytes of the cache's keys and values."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Print how long a phase took, for someone who watches a run."""
    start = time.perf_counter()
    yield
    print(f"[{name}] {time.perf_counter() - start:.1f} s", flush=True)
