"""Measure what ``guard: never_slower`` compares: linears in 16 bits, quantizations of inputs, and the kernels that were chosen.

Times are kept in the same files as those of ``tune``, and a kernel's time that ``tune`` has taken is used again. On a GPU everything
is timed as a CUDA graph, on a CPU by the wall clock. Only the sizes around the m that is asked for are measured.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.graph import inline, trace
from quant_compile.lowering import tune
from quant_compile.lowering.guard import Job, Plain, Product, Quantize, TimeOf
from quant_compile.lowering.registry import InputKernel, input_kernel, kernels
from quant_compile.lowering.target import Target

CPU_POINTS = (1, 16, 128, 1024)
CPU_CALLS, CPU_SECONDS = 5, 0.2
EPS = 1e-6
# Of a difference of two times, in microseconds; times are interpolated by their logarithms.
LEAST = 0.01


def guard_times(target: Target, level: str, device: torch.device) -> TimeOf | Reject:
    """Times that are measured on first need, or why there are none."""
    if level not in tune.POINTS:
        return Reject(f"tune is {level}, so nothing is measured")
    if target.ops is not None or device.type != target.device:
        return Reject(f"nothing can be measured for {target.label}, which is not here")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Reject("nothing can be measured while a CUDA graph is captured")
    known = tune.timings(_name(target), level)
    points = tune.POINTS[level] if device.type == "cuda" else CPU_POINTS

    def time_of(job: Job, m: int) -> float | Reject:
        wanted = sorted(tune.around(points, m))
        times = {point: _known(job, point, known) for point in wanted}
        missing = [point for point, found in times.items() if found is None]
        if missing:
            _measure(job, missing, known, device)
            times = {point: _known(job, point, known) for point in wanted}
        good = {point: found for point, found in times.items() if found is not None and found < tune.FAILED}
        if len(good) < len(times):
            return Reject(f"{_words(job)} could not be measured at m = {m}")
        return tune.interpolate(good, m, float)

    return time_of


def _name(target: Target) -> str:
    if target.device == "cuda":
        return target.name
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {target.sm_count}"


def _stored(job: Job) -> tuple[tune.Measured, str]:
    """Where the file has the time of a job."""
    if isinstance(job, Product):
        # Not under the name that selection reads: a kernel that was not worth measuring must not be chosen the next time.
        return job.problem, f"guard.{job.kernel}"
    return job, "guard"


def _known(job: Job, m: int, known: tune.Timings) -> float | None:
    if isinstance(job, Product):
        chosen = known.get(job.problem, job.kernel, m)
        if chosen is not None and chosen < tune.FAILED:
            return chosen
    return known.get(*_stored(job), m)


def _words(job: Job) -> str:
    if isinstance(job, Product):
        return f"{job.kernel} for {job.problem.scheme.spec}, n={job.problem.n} k={job.problem.k},"
    what = "the linear in 16 bits" if isinstance(job, Plain) else f"the quantization of inputs to {job.scheme.spec}"
    return f"{what}, k={job.k},"


def _measure(job: Job, points: list[int], known: tune.Timings, device: torch.device) -> None:
    """Put the times at ``points`` into the file; what raises has RAISED there, without room in this process only."""
    problem, name = _stored(job)
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            timed = _timed(job, device)
            known.put(problem, {f"{name}@{point}": timed(point) for point in points})
        except torch.OutOfMemoryError:
            known.hold(problem, {f"{name}@{point}": tune.RAISED for point in points})
        except Exception:  # whatever a library raises: the guard does not cover it then
            known.put(problem, {f"{name}@{point}": tune.RAISED for point in points})
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(job: Job, device: torch.device) -> Callable[[int], float]:
    """``m -> microseconds`` of a job."""
    if isinstance(job, Plain):
        return _linear(job, device)
    return _product(job, device) if isinstance(job, Product) else _quantization(job, device)


def _linear(job: Plain, device: torch.device) -> Callable[[int], float]:
    weights = tune.copies((torch.randn(job.n, job.k, device=device, dtype=job.dtype) * 0.02,))
    bias = torch.zeros(job.n, device=device, dtype=job.dtype) if job.has_bias else None

    def timed(m: int) -> float:
        x = torch.randn(m, job.k, device=device, dtype=job.dtype)
        return clock(lambda i: F.linear(x, weights[i % len(weights)][0], bias), device)

    return timed


def _product(job: Product, device: torch.device) -> Callable[[int], float]:
    problem, kernel = job.problem, kernels()[job.kernel]
    weights = tune.weights(kernel.layout, problem, device)
    bias = torch.zeros(problem.n, device=device, dtype=problem.dtype) if problem.has_bias else None

    def timed(m: int) -> float:
        x = tune.inputs(problem, m, kernel.column_scales, device)
        return clock(lambda i: kernel.run(x, weights[i % len(weights)], bias, problem), device)

    return timed


@lru_cache(maxsize=64)
def _quantization(job: Quantize, device: torch.device) -> Callable[[int], float]:
    """What quantizing adds to the norm that makes the input, or a launch of its own; by the kernel that graphs get.

    Compiled once for all sizes: compiling takes a hundred times as long as measuring.
    """
    own = input_kernel("maxima", job.scheme, job.dtype, Target.of(device)) if device.type == "cuda" else None
    if own is not None:
        return _by_kernel(own, job, device)
    scale = (torch.full((1,), 0.02, device=device),) if job.scheme.static else ()

    def quantize(x: Tensor, scale: Tensor | None = None) -> Planes:
        return family_of(job.scheme).quantize_input(x, job.scheme, scale)

    alone = trace(quantize, job.k, 1 + len(scale))
    whole = _compiled(_after_norm(alone, job) if job.fused else alone, job.k, job.dtype, device, *scale)
    norm = _compiled_norm(job.k, job.dtype, device) if job.fused else None

    def timed(m: int) -> float:
        x = torch.randn(m, job.k, device=device, dtype=job.dtype)
        took = clock(lambda _: whole(x, *scale), device)
        return took if norm is None else max(LEAST, took - clock(lambda _, norm=norm: norm(x), device))

    return timed


def _by_kernel(kernel: InputKernel, job: Quantize, device: torch.device) -> Callable[[int], float]:
    def timed(m: int) -> float:
        x = torch.randn(m, job.k, device=device, dtype=job.dtype)
        maxima = x.abs().amax(-1)
        return clock(lambda _: kernel.run(x, maxima, job.scheme), device)

    return timed


def _norm(k: int, dtype: torch.dtype) -> fx.Graph:
    """An RMSNorm without a weight."""

    def normed(x: Any) -> Any:
        wide = x.float()
        return ((wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + EPS)).to(dtype),)

    return trace(normed, k, 1)


@lru_cache(maxsize=64)
def _compiled_norm(k: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    return _compiled(_norm(k, dtype), k, dtype, device)


def _after_norm(quantize: fx.Graph, job: Quantize) -> fx.Graph:
    """The graph of a quantization with a norm before it."""
    graph = _norm(job.k, job.dtype)
    x, *_ = graph.find_nodes(op="placeholder")
    output = graph.output_node()
    normed: Any = output.args[0]
    with graph.inserting_after(x):
        scale = [graph.placeholder(node.name) for node in quantize.find_nodes(op="placeholder")[1:]]
    output.args = (inline(graph, quantize, [*normed, *scale], output),)
    return graph


def _compiled(graph: fx.Graph, k: int, dtype: torch.dtype, device: torch.device, *scale: Tensor) -> Callable[..., Any]:
    """A graph over rows [m, k] as Inductor compiles it where m is a symbol; apart from the graph that Dynamo is tracing."""
    from torch._inductor.compile_fx import compile_fx

    gm = fx.GraphModule(torch.nn.Module(), graph)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.empty(64, k, device=device, dtype=dtype), symbolic_context=sizes)
    inputs = [x, *(mode.from_tensor(value) for value in scale)]
    patches: dict[str, Any] = {"split_reductions": False} if device.type == "cuda" else {}
    with tracing(TracingContext(mode)):
        return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[arg-type, return-value]


def clock(call: Callable[[int], Any], device: torch.device) -> float:
    """Median microseconds of ``call(i)``: as CUDA graphs of several, or by the wall clock."""
    if device.type == "cuda":
        return tune.graph_time(lambda: [call(i) for i in range(tune.CALLS)]) / tune.CALLS
    call(0)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (len(times) < CPU_CALLS and time.perf_counter() - begin < CPU_SECONDS):
        started = time.perf_counter()
        call(len(times))
        times.append((time.perf_counter() - started) * 1e6)
    return sorted(times)[len(times) // 2]
