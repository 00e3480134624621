"""What a user of ``generate`` gets, by the wall clock: milliseconds a token, time to the first token, first call, memory.

Models have the shapes of Llama-3-8B (16 layers) and Qwen3-30B-A3B (8 layers) and seeded random weights; generation is greedy,
64 new tokens. Stacks: ``hf-auto`` (bf16, ``cache_implementation="static"``: transformers compiles decode itself, with CUDA
graphs), ``hf-eager`` (bf16, dynamic cache, nothing compiled), ``inductor`` (bf16, ``model.compile(dynamic=True)`` over a
static cache: first token and single calls only), ``torchao-fp8`` and ``torchao-int4`` like ``hf-auto``, and policies:
``quant_compile.compile(model, policy=...)``, then plain ``model.generate(**inputs)``. ``<policy>:default`` is without CUDA
graphs, ``wrapper`` is ``wrapper_cost.py``. Ratios are to ``hf-auto`` of the same run.

A token costs (wall of a generate of N tokens - wall of a generate of one) / (N - 1), each a median with a sync at both ends.
transformers makes a static cache as long as the longest one before, so every stack forgets that length before a cell;
stacks that transformers compiles also start each cell with ``torch._dynamo.reset()``, hence with static graphs of exactly
that cell: their best case. sglquant is not reset; it meets all cells in one session.

Each stack has three processes, one after the other: ``cold`` (empty caches, first call, memory), ``first`` (caches of the
former: what the acceptance asks for) and ``rest`` (all other cells). Several stacks run at the same time, each on cores of
its own, but a device does one thing at a time: whoever uses it holds its lock, and lets go of it only while Dynamo and
Inductor compile. Waiting for it is not counted. What time does not suffice for is in the result with the reason.

    python benchmarks/generate.py --gpus 2 --acceptance --options guard=never_slower
    python benchmarks/generate.py --cpu     # the bundled tiny model: W8A16 against Hugging Face's bf16
    python benchmarks/generate.py --tiny    # CPU, tiny sizes: does it run?
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, holder, last_line, machine, table, write_result
from generate_rows import Criterion, Grid, Key, Row, acceptance, add_ratios, compare_logits, merge
from generate_worker import AUTO, BUNDLED, DEFAULT, LAYERS, LLAMA, QWEN, Setup

POLICIES = ("FP8_DYNAMIC", "W4A16", "W4A8")
WORKER = Path(__file__).resolve().with_name("generate_worker.py")
TINY_GRID = Grid(batches=(1, 2), prompts=(8, 16), main=8, long=(16,), new_tokens=4)
CPU_GRID = Grid(batches=(1,), prompts=(128,), main=128, long=(), new_tokens=64)
# A process starts no cell in the last seconds of a run, and is ended in the very last ones.
LAST_CELL_S, STOP_S = 20.0, 6.0


@dataclass(frozen=True)
class Task:
    """Processes of one stack that follow each other."""

    model: str
    stack: str
    phases: tuple[str, ...]


def tasks_of(model: str, stacks: Sequence[str], rest: bool) -> tuple[list[Task], list[Task]]:
    """What is run first, and what is run when all of that has been begun."""
    first, later = list[Task](), list[Task]()
    for stack in stacks:
        once = stack in ("hf-eager", "inductor", "wrapper") or stack.endswith(DEFAULT)
        first.append(Task(model, stack, ("first",) if once else ("cold", "first")))
        if rest and stack != "wrapper" and not stack.endswith(DEFAULT):
            later.append(Task(model, stack, ("rest",)))
    return first, later


def plan(args: argparse.Namespace) -> list[Task]:
    """All tasks, the acceptance's first; torchao's last within each half."""
    if args.cpu:
        return [Task(BUNDLED, stack, ("first",)) for stack in args.stacks]
    rest = args.cells in ("all", "rest")
    peers = [stack for stack in args.stacks if stack.startswith("torchao")]
    own = [stack for stack in args.stacks if stack not in peers]
    groups = [tasks_of(LLAMA, own, rest), tasks_of(QWEN, args.moe_stacks, rest), tasks_of(LLAMA, peers, rest)]
    halves = list(zip(*groups))[1 if args.cells == "rest" else 0 :]
    return [task for half in halves for group in half for task in group]


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Tasks, whoever works on them, and how the processes ended."""

    args: argparse.Namespace
    grid: Grid
    folder: Path
    tasks: list[Task]
    endings: dict[tuple[str, str, str], str] = field(default_factory=dict)
    gpu_of: dict[Key, int] = field(default_factory=dict)
    done: set[Key] = field(default_factory=set)
    started: float = field(default_factory=time.time)
    mutex: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stop(self) -> float:
        """The second at which all processes are ended."""
        return self.started + self.args.seconds - STOP_S

    def work(self, slot: int) -> None:
        """Take tasks until none is left; children inherit this thread's cores."""
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setaffinity(0, self.cores(slot))
        while (task := self.next()) is not None:
            try:
                for phase in task.phases:
                    self.step((task.model, task.stack, phase), slot % self.args.gpus)
            finally:
                self.done.add((task.model, task.stack))

    def step(self, key: tuple[str, str, str], gpu: int) -> None:
        """Run one process, unless the stack has failed before and would again, or the time is up."""
        if any(key[:2] == known[:2] for known in self.endings):
            return
        if time.time() > self.stop - LAST_CELL_S:
            self.endings[key] = "the time was up"
            return
        self.gpu_of.setdefault(key[:2], gpu)
        ending = self.process(key, gpu)
        if ending is not None:
            self.endings[key] = ending

    def next(self) -> Task | None:
        """The first task that nobody has taken; other cells of a stack wait for its first ones, whose caches are empty."""
        while True:
            with self.mutex:
                for task in self.tasks:
                    alone = task.phases != ("rest",) or self.args.cells == "rest"
                    if alone or (task.model, task.stack) in self.done:
                        self.tasks.remove(task)
                        return task
                if not self.tasks or time.time() > self.stop:
                    return None
            time.sleep(0.2)

    def cores(self, slot: int) -> set[int]:
        """This slot's share of the cores; all of them where stacks take turns."""
        every = sorted(os.sched_getaffinity(os.getpid()))
        count = max(1, len(every) // (self.args.gpus * self.args.jobs))
        share = every[slot * count : (slot + 1) * count]
        return set(every if self.args.cpu or not share else share)

    def setup(self, key: tuple[str, str, str], gpu: int) -> Setup:
        """What a process is told."""
        model, stack, phase = key
        args, grid = self.args, self.grid
        first, every = grid.first_cells(model), grid.cells(model)
        cells = {"cold": first[:1], "first": first, "rest": every[len(first) :]}[phase]
        if stack.endswith(DEFAULT) or args.cells == "first":
            cells = first[:1]
        single = model == LLAMA and phase == "first" and (stack in ("hf-eager", "inductor") or stack.endswith(DEFAULT))
        return Setup(
            model, stack, phase, cells or first[:1], grid.long if single else (), grid.new_tokens, args.device,
            args.tiny, args.options, self.stop - LAST_CELL_S, str(self.folder), str(self.lock(gpu)),
            tuple(args.stacks) if args.cpu else (),
        )  # fmt: skip

    def lock(self, gpu: int) -> Path:
        """The lock file of a device."""
        return self.folder / f"device{gpu}.lock"

    def process(self, key: tuple[str, str, str], gpu: int) -> str | None:
        """Run one process; how it ended unless it ended well."""
        setup, started = self.setup(key, gpu), time.time()
        log = setup.file("log")
        with log.open("w") as file:
            worker = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(asdict(setup))],
                env=os.environ | self.environment(setup, gpu), stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            ending = self.watch(worker, gpu)
        if ending is None and worker.returncode:
            ending = last_line(log.read_text())
        print(f"[{time.time() - self.started:4.0f} s] {' '.join(key)}: {time.time() - started:.0f} s", end="")
        print(f", {ending}" if ending else "", flush=True)
        return ending

    def environment(self, setup: Setup, gpu: int) -> dict[str, str]:
        """Caches of the stack's own, which its processes share, and the one GPU."""
        caches = setup.file("caches", "all")
        names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "xdg"}
        out = {name: str(caches / folder) for name, folder in names.items()} | {"PYTHONUNBUFFERED": "1"}
        if self.args.device == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            out["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        return out

    def watch(self, worker: subprocess.Popen[bytes], gpu: int) -> str | None:
        """Wait for a process; end it when the time is up or when it holds its device for too long, and say so."""
        while worker.poll() is None:
            held, reason = holder(self.lock(gpu)), None
            if time.time() > self.stop:
                reason = "the time was up"
            elif held and held[0] == worker.pid and held[1] > self.args.hold:
                reason = f"it held the device for over {self.args.hold:.0f} s"
            if reason is not None:
                # Its own session holds the worker and its compile processes, and nothing else.
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
                return reason
            time.sleep(0.2)
        return None

    def lines(self) -> list[dict[str, Any]]:
        """What all processes have written so far, a stack's in their order."""
        out: list[dict[str, Any]] = []
        for phase in ("cold", "first", "rest"):
            for path in sorted(self.folder.glob(f"*.{phase}.jsonl")):
                for text in path.read_text().splitlines():
                    with contextlib.suppress(ValueError):  # a process was ended while it wrote
                        out.append(json.loads(text))
        return out


def run_all(run: Run, publish: Any) -> None:
    """Work on all tasks; publish what is known every few seconds, should this process be ended."""
    slots = run.args.gpus * run.args.jobs
    threads = [threading.Thread(target=run.work, args=(slot,), daemon=True) for slot in range(slots)]
    for thread in threads:
        thread.start()
    known = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5 if run.args.tiny else 5.0)
        if len(lines := run.lines()) > known:
            known = len(lines)
            publish(quiet=True)


# --- the parent ------------------------------------------------------------------------------------------------------


def rows_of(run: Run, keys: Sequence[Key]) -> list[Row]:
    """All rows with their ratios, from what is known so far."""
    waiting = {(task.model, task.stack, phase): "the time was up" for task in run.tasks for phase in task.phases}
    rows = merge(keys, run.lines(), {**waiting, **run.endings}, run.grid)
    for row in rows:
        row["gpu"] = run.gpu_of.get((row["model"], row["stack"]))
    compare_logits(rows, run.folder)
    add_ratios(rows)
    return rows


def criteria(rows: Sequence[Row], args: argparse.Namespace, grid: Grid) -> list[Criterion]:
    """The acceptance of this kind of run."""
    if not args.cpu:
        return acceptance(rows, grid, args.policies)
    cells = next((row["cells"] for row in rows if row["stack"] == "W8A16"), {})
    speedups = [cell.get("speedup") for cell in cells.values()] or [None]
    return [Criterion(5, "W8A16 on the bundled model: a token", speedups[0], least=1.0)]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    grid = CPU_GRID if args.cpu else TINY_GRID if args.tiny else Grid()
    tasks = plan(args)
    keys = list(dict.fromkeys((task.model, task.stack) for task in tasks))
    meta = {"benchmark": "generate", "machine": machine(args.device), "settings": settings_of(args, grid)}
    with work_folder(args.keep) as folder:
        run = Run(args, grid, folder, tasks)

        def publish(quiet: bool = False) -> list[Row]:
            rows = rows_of(run, keys)
            checks = [criterion.fields() for criterion in criteria(rows, args, grid)]
            write_result(args.out, rows, {**meta, "acceptance": checks}, quiet=quiet)
            return rows

        run_all(run, publish)
        rows = publish(quiet=True)
    show(rows, grid)
    if args.acceptance:
        show_acceptance(criteria(rows, args, grid))
    print(f"{time.time() - run.started:.0f} s, result in {args.out.name}")


@contextlib.contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """A temporary folder, or one that stays."""
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep


def settings_of(args: argparse.Namespace, grid: Grid) -> dict[str, Any]:
    """What a reader of the result must know."""
    layers = {name: 1 if args.tiny else count for name, count in LAYERS.items()}
    return {
        "layers": {} if args.cpu else layers,
        "tiny": args.tiny,
        "options": args.options,
        "new_tokens": grid.new_tokens,
        "gpus": args.gpus,
        "processes_per_gpu": args.jobs,
        "timing": "wall clock around generate with a sync at both ends, medians; nothing else uses the device meanwhile",
        "token": "(wall of all tokens - wall of one) / (tokens - 1)",
    }


def show(rows: Sequence[Row], grid: Grid) -> None:
    """Tokens, first tokens, starts, single calls, and what failed."""
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and row["stack"] != "wrapper"]
        cells = list(dict.fromkeys(cell for row in mine for cell in row["cells"]))
        for title, name, ratio in (
            ("ms a token", "ms_per_token", "speedup"),
            ("ms to the first token, to hf-auto", "first_token_ms", "first_token_speedup"),
        ):
            print(f"\n{model}: {title}")
            print(
                table(
                    ["stack", *cells],
                    [[row["stack"], *(_shown(row["cells"][c], name, ratio) for c in cells)] for row in mine],
                )
            )
        print(f"\n{model}: first call, memory, least cosine of logits to bf16's")
        header = ("stack", "cold_s", "warm_s", "peak_gib", "held_gib", "cosine")
        print(table(header, [_start_row(row) for row in mine]))
    for row in rows:
        for name, call in row.get("calls", {}).items():
            print(f"{row['model']} {row['stack']} {name}: host {call['host_ms']:.3f} ms, wall {call['wall_ms']:.3f} ms")
        if "wrapper" in row:
            print("wrapper:", ", ".join(f"{key} {value}" for key, value in row["wrapper"].items()))
        for text, count in row.get("guard", {}).get("kept", {}).items():
            print(f"{row['model']} {row['stack']}: {count} weights: {text}")
        for reason, names in _reasons(row).items():
            print(f"{row['model']} {row['stack']} {', '.join(names)}: {reason}")


def _shown(cell: Mapping[str, Any], name: str, ratio: str) -> str | None:
    if cell.get(name) is None:
        return None
    return f"{cell[name]:.2f}" + (f" {cell[ratio]:.2f}x" if cell.get(ratio) else "")


def _start_row(row: Row) -> list[Any]:
    seconds = [row.get(name, {}).get("seconds") for name in ("cold", "warm")]
    memory = [row.get("memory", {}).get(name) for name in ("peak_gib", "held_gib")]
    cosines = [cell["cosine_least"] for cell in row["cells"].values() if "cosine_least" in cell]
    return [row["stack"], *seconds, *memory, min(cosines, default=None)]


def _reasons(row: Row) -> dict[str, list[str]]:
    """Cells without a figure by their reason."""
    out: dict[str, list[str]] = {}
    for name, cell in row["cells"].items():
        if "reason" in cell and cell["reason"] != "not run: not asked for":
            out.setdefault(cell["reason"], []).append(name)
    if "calls_error" in row:
        out.setdefault(row["calls_error"]["reason"], []).append("single calls")
    if row["error"] and not out:
        out[row["error"]] = ["error"]
    return out


def show_acceptance(found: Sequence[Criterion]) -> None:
    """Required, measured, yes or no."""
    lines = []
    for criterion in found:
        verdict = "yes" if criterion.passed else "no" if criterion.measured is not None else "not measured"
        verdict += (
            f" ({criterion.missing} not measured)" if criterion.missing and criterion.measured is not None else ""
        )
        lines.append([f"{criterion.point}", criterion.what, criterion.required, criterion.measured, verdict])
    print("\n" + table(["point", "what", "required", "measured", "passed"], lines))


# --- the command line ------------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--policies", default=",".join(POLICIES), help="policies of the Llama, the first also elsewhere"
    )
    parser.add_argument("--stacks", help="stacks of the Llama, in order of importance; default: all")
    parser.add_argument("--moe-stacks", help="stacks of the Qwen; empty: none")
    parser.add_argument(
        "--cells",
        choices=("first", "acceptance", "rest", "all"),
        help="first: one prompt of the main length alone; rest: what acceptance leaves out; default: all; acceptance if tiny",
    )
    parser.add_argument(
        "--options",
        type=options_of,
        default={},
        help="passed on to quant_compile.compile: guard=never_slower,tune=full or JSON",
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--jobs", type=int, help="stacks at a time on a GPU; default: one for each four cores, at most 4"
    )
    parser.add_argument("--seconds", type=float, help="everything ends after this; default: 570, on a CPU 1800")
    parser.add_argument("--hold", type=float, default=100.0, help="seconds a process may keep its GPU to itself")
    parser.add_argument(
        "--acceptance", action="store_true", help="print what is required, what was measured, yes or no"
    )
    parser.add_argument("--cpu", action="store_true", help="the bundled tiny model on CPU instead")
    parser.add_argument("--tiny", "--smoke", action="store_true", help="tiny sizes on CPU: does it run?")
    parser.add_argument("--keep", type=Path, help="keep logs, lines and caches in this folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.device = "cpu" if args.cpu or args.tiny else "cuda"
    if args.cpu or args.tiny:
        args.policies = args.policies if args.policies != ",".join(POLICIES) else "W8A16"
        args.gpus = 1
    args.cells = args.cells or ("acceptance" if args.tiny else "all")
    args.seconds = args.seconds or (1800.0 if args.cpu else 570.0)
    if args.cpu:  # stacks compile with the device in hand there
        args.hold = args.seconds
    args.policies = _listed(args.policies)
    _stacks(args)
    cores = len(os.sched_getaffinity(0)) // args.gpus
    args.jobs = len(args.stacks) if args.cpu else args.jobs or (2 if args.tiny else max(1, min(4, cores // 4)))
    args.out = args.out or RESULTS / ("generate_cpu.json" if args.cpu else "generate.json")
    return args


def _stacks(args: argparse.Namespace) -> None:
    first = args.policies[0]
    if args.stacks is None:
        peers = [] if args.tiny else list(AUTO[1:])
        args.stacks = ["hf-auto", *args.policies, "hf-eager", "inductor", first + DEFAULT, "wrapper", *peers]
        if args.cpu:
            args.stacks = ["hf-auto", "hf-eager", *args.policies]
    else:
        args.stacks = _listed(args.stacks)
    default = [] if args.tiny or args.cpu else ["hf-auto", first, "hf-eager", "inductor"]
    args.moe_stacks = default if args.moe_stacks is None else _listed(args.moe_stacks)


def options_of(text: str) -> dict[str, Any]:
    """``guard=never_slower,tune=full``, or a JSON object."""
    if text.lstrip().startswith("{"):
        return json.loads(text)
    pairs = [pair.partition("=") for pair in _listed(text)]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no key=value")
    return {key: {"true": True, "false": False}.get(value, value) for key, _, value in pairs}


def _listed(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    main()
