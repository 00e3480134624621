"""Packages of the bundled models against the compiled models: speed, and logits in a process of their own.

A package is made from one export with dynamic batch and length. It and the compiled model (``dynamic=True``) take turns call by call
in one process; logits are those of a fresh process that imports neither transformers nor, where the package is self-contained,
quant_compile. Both are also held to the eager model whose weights and inputs are quantized one by one: on a GPU they may have other
kernels than each other. Times are from an idle device to an idle device; packages are built before, ``--jobs`` at a time.

    python benchmarks/export.py                 # on a CPU
    python benchmarks/export.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, Timing, last_line, machine, phase, table, time_calls, write_result
from e2e import synchronize
from torch import Tensor
from torch.export import Dim

import quant_compile
from quant_compile.demo import load
from quant_compile.measure.weights import chosen_by
from quant_compile.policy import Policy
from quant_compile.simulate import Simulation

POLICIES = ("FP8_DYNAMIC", "W8A16", "W4A16")
MODELS = ("dense", "moe")
SIZES = ((2, 1), (2, 16), (4, 64))
# Both are rounded where eager torch rounds: else a value that one of them keeps in f32 flips codes of inputs, and these spread.
# A compiler that CXX names may link libstdc++ into packages, which then cannot be loaded.
EXACT = {"emulate_precision_casts": True, "cpp.cxx": (None, "g++")}

ALONE = """
import sys
import torch

package, inputs, results, own = sys.argv[1:]
if own:
    sys.path.insert(0, own)
    import quant_compile
run = torch._inductor.aoti_load_package(package)
torch.save([run(input_ids=ids, use_cache=False)["logits"] for ids in torch.load(inputs)], results)
assert "transformers" not in sys.modules
assert bool(own) == ("quant_compile" in sys.modules)
"""


def build(model_name: str, policy: str, device: str, path: Path) -> dict[str, Any]:
    """Write the package; what is known of it then."""
    model = load(model_name).model.eval().to(device)
    example = torch.randint(0, model.config.vocab_size, SIZES[1]).to(device)
    sizes = {"input_ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=512)}, "use_cache": None}
    started = time.perf_counter()
    exported = quant_compile.export(
        model, (), {"input_ids": example, "use_cache": False}, policy, dynamic_shapes=sizes, inductor=EXACT
    )
    export_s = time.perf_counter() - started
    exported.report.require(coverage=1.0)
    exported.package(path)
    return {
        "model": model_name,
        "policy": policy,
        "self_contained": exported.self_contained,
        "export_s": export_s,
        "package_s": time.perf_counter() - started - export_s,
        "bytes": path.stat().st_size,
    }


def measure(model_name: str, policy: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        return compared(build(model_name, policy, args.device, path), path, args)


def compared(common: dict[str, Any], path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each size, of a package that is there."""
    policy = common["policy"]
    model = load(common["model"]).model.eval().to(args.device)
    ids = [torch.randint(0, model.config.vocab_size, size).to(args.device) for size in SIZES]
    with Simulation(chosen_by(Policy.load(policy), model)):
        wanted = [model(input_ids=one, use_cache=False).logits for one in ids]
    alone = run_alone(path, ids, common["self_contained"])
    package = torch._inductor.aoti_load_package(str(path))
    quant_compile.compile(model, policy, dynamic=True, inductor=EXACT)
    return [
        common | row(model, package, one, logits, truth, args)
        for one, logits, truth in zip(ids, alone, wanted, strict=True)
    ]


def run_alone(path: Path, ids: Sequence[Tensor], self_contained: bool) -> list[Tensor]:
    """Logits of a package in a fresh process."""
    given, results = path.with_name("inputs.pt"), path.with_name("results.pt")
    torch.save(list(ids), given)
    command = [sys.executable, "-c", ALONE, str(path), str(given), str(results), "" if self_contained else str(ROOT)]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in paths if path and not (Path(path) / "quant_compile").is_dir()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(others), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the package does not run ({done.returncode}): {done.stderr[-2000:].strip()}")
    return torch.load(results)


def row(
    model: Callable[..., Any],
    package: Callable[..., Any],
    ids: Tensor,
    logits: Tensor,
    wanted: Tensor,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Distances of the logits, and times in turns."""

    def timed(run: Callable[..., Any]) -> Callable[[int], Any]:
        def call(_: int) -> Any:
            found = run(input_ids=ids, use_cache=False)
            synchronize(ids.device)
            return found

        return call

    compiled, packaged = timed(model), timed(package)
    own_logits = compiled(0).logits
    wall = torch.device("cpu")  # each call by the clock, and not in a CUDA graph
    timings = time_calls({"compiled": compiled, "package": packaged}, wall, 1, args.repeats)
    own, other = timings["package"], timings["compiled"]
    assert isinstance(own, Timing) and isinstance(other, Timing)
    return {
        "batch": ids.shape[0],
        "length": ids.shape[1],
        "error": distance(logits, own_logits),
        "package_error": distance(logits, wanted),
        "compiled_error": distance(own_logits, wanted),
        "compiled_us": other.us,
        "package_us": own.us,
        "speed": other.us / own.us,
    }


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, of the whole."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def build_all(cases: Sequence[tuple[str, str]], device: str, folder: Path, jobs: int) -> dict[tuple[str, str], Path]:
    """All packages, ``jobs`` at a time and each by a process of its own; what is known of each lies beside it."""

    def one(numbered: tuple[int, tuple[str, str]]) -> Path:
        number, case = numbered
        path = folder / f"{number}.pt2"
        command = [sys.executable, __file__, "--device", device, "--models", case[0], "--policies", case[1]]
        done = subprocess.run([*command, "--build", str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            path.with_suffix(".txt").write_text(f"not built ({done.returncode}): {done.stderr[-2000:].strip()}")
        return path

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(cases, pool.map(one, enumerate(cases)), strict=True))


def rows_of(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a package that ``build_all`` has built, or has not."""
    problem = path.with_suffix(".txt")
    if problem.exists():
        raise RuntimeError(problem.read_text())
    return compared(json.loads(path.with_suffix(".json").read_text()), path, args)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: export_cpu.json or export_cuda.json among the results")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="packages that are built at a time")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.build is not None:
        with torch.no_grad():
            known = build(args.models[0], args.policies[0], args.device, args.build)
        args.build.with_suffix(".json").write_text(json.dumps(known))
        return
    out = args.out or RESULTS / f"export_{args.device}.json"
    rows: list[dict[str, Any]] = []
    cases = [(name, policy) for name in args.models for policy in args.policies]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with phase("building"):
            paths = build_all(cases, args.device, Path(folder), args.jobs)
        for (name, policy), path in paths.items():
            with phase(f"{name} {policy}"), torch.no_grad():
                try:
                    rows += rows_of(path, args)
                except Exception as error:
                    rows.append({"model": name, "policy": policy, "problem": last_line(error)})
            torch._dynamo.reset()
            settings = {
                "dtype": "bfloat16",
                "sizes": SIZES,
                "repeats": args.repeats,
                "inductor": EXACT,
                "jobs": args.jobs,
            }
            write_result(out, rows, {"benchmark": "export", "machine": machine(args.device), "settings": settings})
    header = (
        "model",
        "policy",
        "batch",
        "length",
        "self_contained",
        "error",
        "package_error",
        "compiled_error",
        "speed",
    )
    print(table(header, [[found.get(key) for key in header] for found in rows]))


if __name__ == "__main__":
    main()
