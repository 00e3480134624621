"""Measure launch plans of the Triton scaled-mm kernels on this GPU and print the best one of every case.

Reads nothing; writes a JSON file (--out). Each candidate is first compared with the scheme's reference, then timed
inside a CUDA graph that walks over enough copies of the weight that none is still in L2. Stops by itself after
--seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import quant_compile.lowering.schemes  # noqa: F401
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels._roofline import roof
from quant_compile.lowering.kernels.scaled import triton_scaled_mm as kernel
from quant_compile.lowering.kernels.scaled.triton_scaled_mm import Config
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.target import Target

SHAPES = ((6144, 4096), (28672, 4096), (4096, 4096), (4096, 14336), (8192, 28672))
TOKENS = (1, 4, 16, 64, 512, 4096)
SCHEMES = ("FP8_DYNAMIC", "W8A8", "FP8_BLOCK")
TOLERANCE = 5e-3
ROTATED_BYTES = 200e6


@dataclass
class Case:
    """One problem and m, and what was measured for it: (microseconds, relative error, plan)."""

    spec: str
    n: int
    k: int
    m: int
    default: str = ""
    results: list[tuple[float, float, Config]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def short(plan: Config) -> str:
    """A plan in one word."""
    text = f"{plan.kind} m{plan.block_m} n{plan.block_n} k{plan.block_k} w{plan.warps} s{plan.stages}"
    text += f" x{plan.split}" if plan.split > 1 else ""
    marks = {"tma": plan.tma, "promote": plan.promote, "pdl": plan.pdl}
    return " ".join([text, *(name for name, is_set in marks.items() if is_set)])


def candidates(problem: Problem, m: int, target: Target) -> list[Config]:
    """The plan used without measurement first, then neighbours worth trying."""
    plans = [kernel.config(problem, m, target)]
    if m <= kernel.GEMV_ROWS:
        plans += _gemv_candidates(problem, m, target)
    if m <= kernel.SLICES_ROWS:
        plans += _slices_candidates(problem, m)
    if 4 < m <= kernel.TALL_ROWS:
        plans += _tall_candidates(problem, m, target)
    if m >= 64:
        plans += _wide_candidates(problem, target)
    if target.arch >= 90 and m <= 64:
        overlapped = [plan for plan in plans if plan.kind != "wide" and not plan.tma]
        plans += [replace(plan, pdl=True) for plan in overlapped if m <= 4 or plan.stages != 3][:12]
    return list(dict.fromkeys(plans))


def _gemv_candidates(problem: Problem, m: int, target: Target) -> Iterator[Config]:
    base = kernel.gemv_config(problem, m, target)
    yield base
    for rows, block_k, warps, stages in (
        (2, 2048, 4, 1),
        (8, 2048, 4, 1),
        (4, 1024, 2, 1),
        (8, 1024, 2, 1),
        (16, 512, 1, 1),
        (2, 4096, 4, 1),
        (4, 4096, 8, 1),
        (1, 4096, 8, 1),
        (4, 2048, 4, 3),
        (8, 1024, 2, 4),
    ):
        yield replace(base, block_n=rows, block_k=block_k, warps=warps, stages=stages)


def _slices_candidates(problem: Problem, m: int) -> Iterator[Config]:
    block_m = 8 if m <= 8 else 16
    for rows, block_k, warps, stages in (
        (16, 128, 4, 3),
        (16, 128, 4, 6),
        (16, 128, 8, 3),
        (32, 128, 4, 3),
        (32, 128, 4, 4),
        (32, 128, 8, 3),
        (16, 256, 4, 3),
        (16, 128, 2, 6),
    ):
        if not kernel.groups(problem)[1] or block_k <= 128:
            yield Config("slices", block_m, rows, block_k, warps, stages)


def _tall_candidates(problem: Problem, m: int, target: Target) -> Iterator[Config]:
    base = kernel._tall_config(problem, m, target)
    descriptors = target.arch >= 90
    yield base
    yield replace(base, tma=descriptors)
    for rows, stages, split in ((64, 4, 1), (64, 8, 1), (128, 4, 1), (128, 6, 1), (64, 4, 2), (64, 6, 4), (128, 4, 4)):
        yield replace(base, block_n=rows, stages=stages, split=split)
        if split == 1 or rows == 64:
            yield replace(base, block_n=rows, stages=stages, split=split, tma=descriptors)
    if not kernel.groups(problem)[1]:
        yield replace(base, block_k=256, stages=4, split=1, tma=descriptors)


def _wide_candidates(problem: Problem, target: Target) -> Iterator[Config]:
    base = kernel._wide_config(problem, 512, target)
    descriptors = target.arch >= 90
    for block_m, block_n, warps, stages in (
        (128, 256, 8, 3),
        (128, 256, 8, 4),
        (256, 128, 8, 4),
        (128, 128, 4, 3),
        (128, 128, 8, 4),
        (128, 128, 8, 5),
        (64, 256, 4, 4),
        (64, 128, 4, 4),
        (64, 64, 4, 6),
    ):
        yield replace(base, block_m=block_m, block_n=block_n, warps=warps, stages=stages, tma=descriptors)
    yield replace(base, block_m=128, block_n=128, warps=8, stages=4, tma=False)
    if problem.scheme.weights.type == "float" and not kernel.groups(problem)[1]:
        yield replace(base, block_m=128, block_n=128, warps=8, stages=4, tma=descriptors, promote=not base.promote)


class Data:
    """Planes of one problem: rotated weights, and inputs and references by m."""

    def __init__(self, spec: str, n: int, k: int) -> None:
        self.scheme = parse(spec)
        self.family = family_of(self.scheme)
        self.problem = Problem(self.scheme, n, k, torch.bfloat16)
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        first = self.family.quantize_weight(weight, self.scheme)
        copies = max(2, int(ROTATED_BYTES / (n * k)) + 1)
        self.weights = [first, *(tuple(plane.clone() for plane in first) for _ in range(copies - 1))]

    def inputs(self, m: int) -> tuple[torch.Tensor, ...]:
        """Quantized random x [m, k]."""
        x = torch.randn(m, self.problem.k, device="cuda", dtype=torch.bfloat16)
        scale = torch.tensor([0.02], device="cuda") if self.scheme.static else None
        return tuple(plane.contiguous() for plane in self.family.quantize_input(x, self.scheme, scale))

    def reference(self, x: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What the scheme says y is, bf16."""
        return self.family.linear(x, self.weights[0], None, self.scheme, torch.bfloat16)


def microseconds(data: Data, x: tuple[torch.Tensor, ...], plan: Config) -> float:
    """Time of one launch: median over replays of a graph that launches on every copy of the weight."""
    rounds = max(1, 12 // len(data.weights))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for weight in data.weights:
                kernel.launch(x, weight, None, data.problem, plan)
    graph.replay()
    times: list[float] = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (rounds * len(data.weights)))
    return sorted(times)[2]


def measure(case: Case, data: Data, target: Target, deadline: float) -> None:
    """Fill ``case``: each candidate is checked, then timed; one that fails is noted and skipped."""
    x = data.inputs(case.m)
    expected = data.reference(x).float()
    norm = expected.norm()
    case.default = short(kernel.config(data.problem, case.m, target))
    for plan in candidates(data.problem, case.m, target):
        if time.monotonic() > deadline:
            return
        try:
            y = kernel.launch(x, data.weights[0], None, data.problem, plan)
            error = float((y.float() - expected).norm() / norm)
            if not error <= TOLERANCE:
                case.failures.append(f"{short(plan)}: relative error {error:.1e}")
                continue
            case.results.append((microseconds(data, x, plan), error, plan))
        except Exception as failure:  # a plan that does not compile or fit this GPU is a result, not the end
            case.failures.append(f"{short(plan)}: {type(failure).__name__}: {str(failure).splitlines()[0][:120]}")
            torch.cuda.synchronize()
    case.results.sort(key=lambda result: result[0])


def compile_ahead(specs: Iterable[str], depths: Iterable[int], tokens: Iterable[int], target: Target) -> None:
    """Compile all candidates in threads, on small weights with the same k (what code depends on)."""
    jobs = []
    for spec in specs:
        for k in depths:
            data = Data(spec, 256, k)
            data.weights = data.weights[:1]
            # Plans are those of a large n; n itself does not enter the code.
            plans = {
                (plan, m) for m in tokens for n in (4096, 28672) for plan in candidates(_sized(data, n), m, target)
            }
            unique = {plan: m for plan, m in sorted(plans, key=lambda pair: -pair[1])}
            jobs += [(data, plan, data.inputs(min(m, 64))) for plan, m in unique.items()]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda job: _compile(*job), jobs))
    torch.cuda.synchronize()


def _sized(data: Data, n: int) -> Problem:
    return replace(data.problem, n=n)


def _compile(data: Data, plan: Config, x: tuple[torch.Tensor, ...]) -> None:
    try:
        kernel.launch(x, data.weights[0], None, data.problem, plan)
    except Exception:  # reported when the case is measured
        return


def line(case: Case, bandwidth: float) -> str:
    """One row: the best plan, the default's time, the share of the memory floor, the two runners-up."""
    head = f"{case.spec:12s} {case.n}x{case.k} m={case.m:<5d}"
    if not case.results:
        return f"{head} nothing ran: {case.failures[:1]}"
    us, error, plan = case.results[0]
    default = next((f"{t:.1f}" for t, _, p in case.results if short(p) == case.default), "failed")
    floor = case.n * case.k / bandwidth
    others = "; ".join(f"{t:.1f} {short(p)}" for t, _, p in case.results[1:3])
    failed = f" | {len(case.failures)} failed" if case.failures else ""
    best = f"{us:7.1f} us ({floor / us:4.0%} of copy) {short(plan)} err {error:.1e}"
    return f"{head} {best} | default {default} | {others}{failed}"


def write(path: Path, cases: list[Case], target: Target) -> None:
    """All measurements as JSON, with the machine and versions they came from."""
    import triton

    rows: list[dict[str, Any]] = []
    for case in cases:
        results = [{"us": round(us, 2), "error": error, **asdict(plan)} for us, error, plan in case.results]
        row = {"scheme": case.spec, "n": case.n, "k": case.k, "m": case.m, "default": case.default}
        rows.append({**row, "results": results, "failures": case.failures})
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": target.name, "arch": target.arch, **versions, "cases": rows}, indent=1))


def numbers(text: str) -> tuple[int, ...]:
    """``1,16`` -> (1, 16)."""
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=150, help="stop starting new measurements after this long")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--m", type=numbers, default=TOKENS)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    target = Target.of("cuda")
    specs = options.schemes.split(",")
    shapes = [numbers(shape.replace("x", ",")) for shape in options.shapes.split(",")]
    started = time.monotonic()
    compile_ahead(specs, sorted({k for _, k in shapes}), options.m, target)
    print(f"{target.name}: candidates compiled in {time.monotonic() - started:.0f} s", flush=True)
    cases: list[Case] = []
    for spec in specs:
        for n, k in shapes:
            if time.monotonic() > deadline:
                break
            data = Data(spec, n, k)
            for m in options.m:
                case = Case(spec, n, k, m)
                measure(case, data, target, deadline)
                cases.append(case)
                print(line(case, roof(target).bandwidth), flush=True)
            write(options.out, cases, target)
    late = " (stopped by --seconds)" if time.monotonic() > deadline else ""
    print(f"{len(cases)} cases in {time.monotonic() - started:.0f} s{late} -> {options.out}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
