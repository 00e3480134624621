"""Measure kernels on this GPU and remember the times on disk, so that selection rests on what was seen.

A problem is measured once per GPU model, library versions and kernel sources; the file is
``<cache>/sglquant/kernels-<key>-<level>.json`` under ``XDG_CACHE_HOME`` (default ``~/.cache``). Each time is of the kernel alone, in a
CUDA graph, over copies of the weight that together exceed the L2 cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.numerics import dtype_name
from quant_compile.lowering.capture import capturing
from quant_compile.lowering.guard import Plain, Quantize
from quant_compile.lowering.registry import Kernel, Problem, kernels, layouts
from quant_compile.lowering.select import BUCKETS, CostOf, Dispatch
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import compiling

POINTS = {"quick": (1, 16, 64, 512, 4096), "full": BUCKETS}
# Only kernels whose estimate is within this factor of the best estimate are measured.
WORTH = {"quick": 2.0, "full": math.inf}
FAILED = 1e12  # not measured: it does not fit, or its estimate is hopeless
RAISED = 2e12  # measured, and it raised
NOT_MEASURED = 10.0  # an estimate counts less than any measurement
CALLS, _REPLAYS = 12, 5
CPU_CACHE = 32 << 20
_LIBRARIES = ("torch", "triton", "sglang-kernel", "sgl-kernel", "humming-kernels", "sgl-deep-gemm")


Measured = Problem | MoeProblem | Plain | Quantize
Measure = Callable[[str, Any, Target, tuple[int, ...], "Timings", float], dict[str, float]]
"""(layout, problem, target, points, known times, worth) -> the missing times of the layout's kernels."""


class Timings:
    """Measured microseconds by problem, kernel and m, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._passing: dict[str, dict[str, float]] = {}
        try:
            self._data: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._data = {}

    def get(self, problem: Measured, name: str, m: int) -> float | None:
        """The time of a kernel at m, or None if it was not measured."""
        key, time = problem_key(problem), f"{name}@{m}"
        return self._data.get(key, {}).get(time, self._passing.get(key, {}).get(time))

    def hold(self, problem: Measured, times: Mapping[str, float]) -> None:
        """Add times that hold for this process only."""
        with self._lock:
            self._passing.setdefault(problem_key(problem), {}).update(times)

    def known(self) -> dict[str, dict[str, float]]:
        """Everything that was measured, by problem."""
        with self._lock:
            return {problem: dict(times) for problem, times in self._data.items()}

    def learn(self, times: Mapping[str, Mapping[str, float]]) -> None:
        """Take what was measured elsewhere for what is not known here; for this process only."""
        with self._lock:
            for problem, own in times.items():
                for name, value in own.items():
                    self._passing.setdefault(problem, {}).setdefault(name, value)

    def put(self, problem: Measured, times: dict[str, float]) -> None:
        """Add the times of a problem and write the file anew, atomically."""
        with self._lock:
            self._data.setdefault(problem_key(problem), {}).update(times)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                    json.dump(self._data, file, indent=0, sort_keys=True)
                os.replace(file.name, self.path)
            except OSError:
                return  # a read-only cache costs a measurement in the next process, nothing else


def problem_key(problem: Measured) -> str:
    """A problem as text: content, never an id."""
    p = problem
    if isinstance(p, Plain | Quantize):
        return p.key
    if isinstance(p, MoeProblem):
        sizes = (p.experts, p.hidden, p.intermediate, p.top_k, p.activation.text, int(p.has_bias), int(p.has_weights))
        return "|".join(map(str, ("moe", p.spec, *sizes, dtype_name(p.dtype))))
    return f"{p.scheme.spec}|{p.n}/{p.siblings}|{p.k}|{str(p.dtype).removeprefix('torch.')}|{int(p.has_bias)}"


@lru_cache(maxsize=None)
def timings(gpu: str, level: str) -> Timings:
    """The timings of a GPU model at one level, with the libraries and kernel sources of this process."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Timings(root / "sglquant" / f"kernels-{_environment_key(gpu)}-{level}.json")


def exported(target: Target) -> dict[str, Any]:
    """All times that this process knows of a GPU, for ``imported``; nothing on other devices."""
    if target.device != "cuda" or target.ops is not None:
        return {}
    levels = {level: known for level in POINTS if (known := timings(target.name, level).known())}
    return {"environment": _environment_key(target.name), "levels": levels} if levels else {}


def imported(target: Target, times: Mapping[str, Any]) -> bool:
    """Use times of another process, if they are of this GPU model, these libraries and these kernels; whether they are."""
    if target.device != "cuda" or not times or times.get("environment") != _environment_key(target.name):
        return False
    for level, found in times.get("levels", {}).items():
        if level in POINTS:
            timings(target.name, level).learn(found)
    return True


def _environment_key(gpu: str) -> str:
    digest = hashlib.sha256(gpu.encode())
    digest.update(_library_versions())
    digest.update(sources(Path(__file__).parent / "kernels"))
    return digest.hexdigest()[:16]


def _library_versions() -> bytes:
    found = b""
    for library in _LIBRARIES:
        try:
            found += f"{library}={importlib.metadata.version(library)}".encode()
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sources(folder: Path) -> bytes:
    """All Python sources below a folder, one after the other."""
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of all that decides what a graph with kernel ops is compiled to: this package's sources, and versions of libraries."""
    return hashlib.sha256(sources(Path(__file__).parents[1]) + _library_versions()).hexdigest()[:16]


def measured(target: Target, level: str) -> CostOf | None:
    """Costs that are measured on first need; None where there is nothing to measure (no GPU, ``off``, or inside a capture)."""
    return measured_by(_measure_layout, target, level)


def measured_by(measure: Measure, target: Target, level: str) -> Callable[[Any, Any, int], float] | None:
    """``measured`` for any kind of kernel: ``measure`` gives the missing times of a layout's kernels."""
    if level not in POINTS or target.device != "cuda" or target.ops is not None:
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    known = timings(target.name, level)
    points = POINTS[level]

    def cost(kernel: Any, problem: Any, m: int) -> float:
        if any(known.get(problem, kernel.name, point) is None for point in points):
            try:
                known.put(problem, measure(kernel.layout, problem, target, points, known, WORTH[level]))
            except torch.OutOfMemoryError:
                return NOT_MEASURED * own_estimate(
                    kernel, problem, m, target
                )  # no room to measure in: estimates decide
        found = {p: t for p in points if (t := known.get(problem, kernel.name, p)) is not None}
        if any(found.get(point, 0.0) >= RAISED for point in around(points, m)):
            return FAILED
        times = {p: t for p, t in found.items() if t < FAILED}
        return interpolate(times, m, lambda at: own_estimate(kernel, problem, at, target))

    return cost


def around(points: Sequence[int], m: int) -> set[int]:
    """m itself where it is a point, else the points below and above it."""
    below, above = [p for p in points if p <= m], [p for p in points if p >= m]
    return ({max(below)} if below else set[int]()) | ({min(above)} if above else set[int]())


def own_estimate(kernel: Any, problem: Any, m: int, target: Target) -> float:
    """The kernel's estimate; FAILED where it refuses."""
    answer = kernel.fit(problem, m, target)
    return FAILED if isinstance(answer, Reject) else answer.cost


def missing_jobs(
    named: Mapping[str, Any],
    layout: str,
    problem: Any,
    target: Target,
    points: Sequence[int],
    known: Timings,
    worth: float,
) -> tuple[dict[str, float], list[tuple[Any, int]]]:
    """FAILED for every time of a layout's kernels that is not known, and the kernels and sizes that are worth measuring.

    Worth it is a kernel that fits and whose estimate is within ``worth`` times the best kernel's of any layout.
    """
    wanted = [kernel for kernel in named.values() if kernel.layout == layout and not kernel.reference]
    missing = [(kernel, m) for kernel in wanted for m in points if known.get(problem, kernel.name, m) is None]
    jobs: list[tuple[Any, int]] = []
    for kernel, m in missing:
        own = own_estimate(kernel, problem, m, target)
        if own < FAILED and own <= worth * min(own_estimate(other, problem, m, target) for other in named.values()):
            jobs.append((kernel, m))
    return {f"{kernel.name}@{m}": FAILED for kernel, m in missing}, jobs


def interpolate(times: Mapping[int, float], m: int, own: Callable[[int], float]) -> float:
    """Time at m: measured, between two measured points (geometrically), or scaled from one by the kernel's own estimate."""
    if m in times:
        return times[m]
    below, above = max((p for p in times if p < m), default=None), min((p for p in times if p > m), default=None)
    if below is not None and above is not None:
        share = math.log(m / below) / math.log(above / below)
        return math.exp(math.log(times[below]) * (1 - share) + math.log(times[above]) * share)
    near = below if below is not None else above
    if near is None or own(m) >= FAILED or own(near) >= FAILED:
        return FAILED
    return times[near] * own(m) / max(own(near), 1e-6)


def begin(problems: Iterable[Problem], target: Target, level: str, device: torch.device) -> None:
    """Compile in the background what measuring these problems will need; nothing where nothing is to be measured."""
    if level not in POINTS or target.device != "cuda" or target.ops is not None:
        return
    known = timings(target.name, level)
    layouts_of = dict.fromkeys(kernel.layout for kernel in kernels().values() if kernel.prepare is not None)
    for problem in problems:
        for layout in layouts_of:
            _, jobs = missing_jobs(kernels(), layout, problem, target, POINTS[level], known, WORTH[level])
            for kernel, m in jobs:
                if kernel.prepare is not None:
                    kernel.prepare.begin(problem, m, device)


def serve(chosen: Dispatch, m: int | None, device: torch.device) -> None:
    """A graph runs this, next with ``m`` rows, if that is known: compile for them in the background."""
    for _, name in chosen.table:
        prepare = kernels()[name].prepare
        if prepare is not None:
            prepare.serve(chosen.problem, device)
            if m and name == chosen.kernel_for(m).name:
                prepare.begin(chosen.problem, m, device)


def _measure_layout(
    layout: str, problem: Problem, target: Target, points: tuple[int, ...], known: Timings, worth: float
) -> dict[str, float]:
    """Times of all kernels of a layout, missing ones only; FAILED for one that does not fit, fails or is not worth it."""
    out, jobs = missing_jobs(kernels(), layout, problem, target, points, known, worth)
    if not jobs:
        return out
    device = torch.device("cuda", torch.cuda.current_device())
    with ThreadPoolExecutor() as pool:
        # An error comes again, and is answered, when the kernel is timed.
        for kernel, m in jobs:
            pool.submit(_prepare, kernel, m, problem, device)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=["cuda"]):
        packed = weights(layout, problem, device)
        compile_together(jobs, lambda kernel, m: _calls(kernel, problem, m, packed, 1))
        take_times(out, known, problem, jobs, lambda kernel, m: timed(_calls(kernel, problem, m, packed), CALLS))
    torch.cuda.empty_cache()
    return out


def compile_together(jobs: Sequence[tuple[Any, int]], calls: Callable[[Any, int], Callable[[], Any]]) -> None:
    """Compile the Triton kernels that ``calls(kernel, m)()`` launches, all at a time: one by one they take longer than to measure.

    An error comes again, and is answered, when the kernel is timed.
    """
    own = [(kernel, m) for kernel, m in jobs if kernel.name.startswith("triton")]
    if len(own) < 2:
        return
    with ThreadPoolExecutor() as pool, compiling(pool):
        for kernel, m in own:
            with suppress(Exception):
                calls(kernel, m)()


def take_times(
    out: dict[str, float],
    known: Timings,
    problem: Problem | MoeProblem,
    jobs: Sequence[tuple[Any, int]],
    time: Callable[[Any, int], float],
) -> None:
    """Fill in the times of ``jobs``; a kernel without room to run counts as one that raised, in this process only."""
    for kernel, m in jobs:
        name = f"{kernel.name}@{m}"
        try:
            out[name] = time(kernel, m)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            del out[name]
            known.hold(problem, {name: RAISED})


def timed(calls: Callable[[], Any], count: int) -> float:
    """Median microseconds of one of ``count`` calls of a kernel; RAISED for one that raises, which selection then never picks.

    Raises:
        OutOfMemoryError: there is no room to run it in.
    """
    try:
        return graph_time(calls) / count
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a library raises, another kernel serves
        torch.cuda.synchronize()
        return RAISED


def _prepare(kernel: Kernel, m: int, problem: Problem, device: torch.device) -> None:
    if kernel.prepare is not None:
        kernel.prepare(problem, m, device)


def weights(layout: str, problem: Problem, device: torch.device) -> list[Planes]:
    """Copies of one random packed weight."""
    family = family_of(problem.scheme)
    weight = torch.randn(problem.n, problem.k, device=device, dtype=problem.dtype) * 0.02
    return copies(layouts()[layout].pack(family.quantize_weight(weight, problem.scheme), problem))


def copies(planes: Planes) -> list[Planes]:
    """Planes and as many copies as exceed the cache three times; at most as many as there are calls in a measurement."""
    size, cache = sum(plane.numel() * plane.element_size() for plane in planes), CPU_CACHE
    if planes[0].is_cuda:
        cache = torch.cuda.get_device_properties(planes[0].device).L2_cache_size
    count = max(1, min(CALLS, -(-3 * cache // max(size, 1))))
    return [planes, *(tuple(plane.clone() for plane in planes) for _ in range(count - 1))]


def inputs(problem: Problem, m: int, column_scales: bool, device: torch.device) -> Planes:
    """Planes of a random input, as a kernel reads them."""
    family = family_of(problem.scheme)
    x = torch.randn(m, problem.k, device=device, dtype=problem.dtype)
    if problem.scheme.input_activations is None:
        return (x,)
    scale = torch.full((1,), 0.02, device=device) if problem.scheme.static else None
    data, scales, *rest = family.quantize_input(x, problem.scheme, scale)
    return data, scales.t().contiguous().t() if column_scales else scales, *rest


def _calls(kernel: Kernel, problem: Problem, m: int, packed: list[Planes], count: int = CALLS) -> Callable[[], None]:
    """What is timed: ``count`` calls of a kernel on m random rows, over one copy of the weight after the other."""
    x = inputs(problem, m, kernel.column_scales, torch.device("cuda"))
    bias = torch.zeros(problem.n, device="cuda", dtype=problem.dtype) if problem.has_bias else None

    def calls() -> None:
        for i in range(count):
            kernel.run(x, packed[i % len(packed)], bias, problem)

    return calls


@lru_cache(maxsize=None)
def _stream(device: int) -> torch.cuda.Stream:
    """The one stream that measures: cuBLAS keeps 33 MiB of workspace for every stream it has ever run on."""
    return torch.cuda.Stream(device)


def graph_time(calls: Callable[[], Any]) -> float:
    """Median microseconds of ``calls`` as a CUDA graph."""
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream):
        calls()
    graph.replay()
    times: list[float] = []
    for _ in range(_REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000)
    return sorted(times)[len(times) // 2]
