"""Decode and prefill of models divided over GPUs: FP8_DYNAMIC against Inductor's bf16 under the same ``tp_plan``, in one run.

Models have the shape of Llama-3-70B cut to 16 layers and of Qwen3-30B-A3B cut to 12. No checkpoint is written:
``from_pretrained`` is given a config, no weights and ``DistributedConfig(tp_plan="auto")``, so that transformers itself divides the
model and gives each rank its DTensors and hooks; then each rank fills its own parts with seeded random values on its device.

A stack is a group of processes, one for each GPU; both stacks of a model have the same weights. All groups compile a cell at the
same time, one kernel measurement at a time on each GPU, and are then timed in turns, nobody else being at work. ``bf16`` is
``model.compile(dynamic=False)``; of a mixture of experts it is the faster of Hugging Face's two implementations. ``joined`` is
the policy with ``fuse: {all_reduce: true}``; the ledger's notes on sums are in its rows. ``released`` is with ``release_weights: true``.
``graphs`` is ``mode="reduce-overhead"`` on both sides. A step is one call of the model over a filled static cache, by the wall
clock from an idle device to an idle device, the slowest rank's; medians. Putting the cache's length back is not timed. Logits of both
stacks are compared at each cell, and a stack whose logits are not the bf16 model's has no speed-up.

    python benchmarks/tensor_parallel.py --gpus 2 --seconds 240     # both models, without CUDA graphs and with
    python benchmarks/tensor_parallel.py --gpus 1,2,4 --models Llama-3-70B --stacks bf16,FP8_DYNAMIC    # scaling
    python benchmarks/tensor_parallel.py --gpus 2 --check           # logits only
    python benchmarks/tensor_parallel.py --smoke                    # tiny, two processes on a CPU over gloo: does it run?
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import (
    GIB,
    RESULTS,
    TINY,
    Deadline,
    DeviceLock,
    LlamaShape,
    last_line,
    llama_config,
    machine,
    set_position,
    static_cache,
    table,
    write_result,
)
from common import fill as on_device
from e2e import CACHE_TOKENS, FILLED, PROMPT, SMOKE_FILLED, SMOKE_PROMPT, SMOKE_TOKENS, peak, reset_peak, synchronize
from moe_e2e import MODELS, SMOKE_MODELS, config_of

LLAMA, QWEN = "Llama-3-70B", "Qwen3-30B-A3B"
LLAMA_3_70B = LlamaShape(128256, 8192, 28672, 64, 8)
LAYERS = {LLAMA: 16, QWEN: 12}
BF16, BATCHED, GRAPHS, JOINED, RELEASED = "bf16", "bf16 batched_mm", " graphs", " joined", " released"
STACKS = (BF16, BATCHED, "FP8_DYNAMIC", "FP8_DYNAMIC" + JOINED, "FP8_DYNAMIC" + RELEASED)
MODES = {"both": ("", GRAPHS), "without": ("",), "with": (GRAPHS,)}
DECODE = {"decode B=1": 1, "decode B=16": 16}
PREFILL = f"prefill {PROMPT}"
CELLS = (*DECODE, PREFILL)
ROUNDS, STEPS, PREFILLS = 4, 10, 4
WARM = 2  # calls at the start of each turn that do not count
# Of logits against the bf16 model's. Weights are drawn so that FP8's own error stays far below; a part that is lost or counted twice
# gives less.
COSINE = 0.97
PROMPT_COSINE = 0.94  # FP8's own error on one GPU is larger at the last of 2048 tokens: 0.953 of the Llama
ALIKE = 0.9999  # of the logits of two ranks


@dataclass(frozen=True)
class Setup:
    """What a group of processes runs.

    Attributes:
        lock: a file for each GPU is made of this name; kernels are measured under it.
    """

    model: str
    stack: str
    gpus: int
    smoke: bool
    lock: str

    @property
    def graphs(self) -> bool:
        """Whether it is compiled with ``mode="reduce-overhead"``."""
        return self.stack.endswith(GRAPHS)

    @property
    def policy(self) -> str | dict[str, Any] | None:
        """The policy, None for bf16.

        ``joined``: small sums over ranks are one kernel with what follows them. ``released``: ranks give up their 16-bit values,
        and with them the DTensors, for each of which Dynamo asks Python at every call.
        """
        name = self.stack.removesuffix(GRAPHS)
        if name in (BF16, BATCHED):
            return None
        released = name.endswith(RELEASED)
        name = name.removesuffix(RELEASED)
        joined = name.endswith(JOINED)
        return {"default": name.removesuffix(JOINED), "fuse": {"all_reduce": joined}, "release_weights": released}

    def runs(self, cell: str) -> bool:
        """Prompts are not launch bound, and batched_mm would copy every token's experts."""
        return cell != PREFILL or not (self.graphs or self.stack.startswith(BATCHED))


# --- a rank ----------------------------------------------------------------------------------------------------------


class Rank:
    """One process of a group: builds its part of the model, compiles cells, times steps."""

    def __init__(self, setup: Setup, rank: int) -> None:
        self.setup, self.rank = setup, rank
        self.device = torch.device("cpu") if setup.smoke else torch.device("cuda", rank)
        # Cell -> what puts the cache back to where it was, and a step.
        self.steps: dict[str, tuple[Callable[[], None], Callable[[], torch.Tensor]]] = {}

    def build(self) -> dict[str, Any]:
        """The divided model, compiled in place; nothing is traced yet."""
        setup = self.setup
        torch.set_num_threads(1 if setup.smoke else 4)
        if not setup.smoke:
            torch.cuda.set_device(self.device)
        if setup.gpus > 1:
            torch.distributed.init_process_group(
                "gloo" if setup.smoke else "nccl", device_id=None if setup.smoke else self.device
            )
        self.model = fill(divided(setup, self.device), LAYERS[setup.model], self.rank)
        if setup.policy is None:
            self.model.compile(mode="reduce-overhead" if setup.graphs else None, dynamic=False)
        else:
            import quant_compile

            mode = {"mode": "reduce-overhead"} if setup.graphs else {}
            quant_compile.compile(self.model, policy=setup.policy, dynamic=False, **mode)
        reset_peak(self.device)
        return {}

    def compile(self, cell: str) -> dict[str, Any]:
        """First call of a cell: seconds, its logits, and what was quantized."""
        batch = DECODE.get(cell, 1)
        tokens, filled, prompt = (
            (SMOKE_TOKENS, SMOKE_FILLED, SMOKE_PROMPT) if self.setup.smoke else (CACHE_TOKENS, FILLED, PROMPT)
        )
        length, position = (prompt, 0) if cell == PREFILL else (1, filled)
        ids = torch.arange(batch * length, device=self.device).reshape(batch, length) % self.model.config.vocab_size
        cache = local_cache(self.model.config, self.setup.gpus, batch, tokens, self.device)

        def again() -> None:
            set_position(cache, position)

        def step() -> torch.Tensor:
            if self.setup.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

        started = time.perf_counter()
        with torch.no_grad(), alone(f"{self.setup.lock}.{self.rank}"):
            again()
            logits = step()[0, -1].float().cpu()
        self.steps[cell] = again, step
        return {"compile_s": time.perf_counter() - started, "logits": logits, "peak_gib": peak(self.device) / GIB} | (
            {"coverage": coverage(self.model), "sums": sums(self.model)} if self.setup.policy else {}
        )

    def time(self, cell: str, count: int) -> dict[str, Any]:
        """Milliseconds of each step, from an idle device to an idle device."""
        samples: list[float] = []
        with torch.no_grad():
            for turn in range(WARM + count):
                started = self._timed(*self.steps[cell])
                if turn >= WARM:
                    samples.append(started * 1e3)
        return {"samples": samples}

    def _timed(self, again: Callable[[], None], step: Callable[[], torch.Tensor]) -> float:
        again()
        synchronize(self.device)
        started = time.perf_counter()
        step()
        synchronize(self.device)
        return time.perf_counter() - started


def coverage(model: Any) -> float:
    """Quantized bytes over bytes that the policy names."""
    import quant_compile

    return quant_compile.report(model).coverage


def sums(model: Any) -> list[str]:
    """What the ledger says of sums over ranks; nothing where they were left as they were written."""
    import quant_compile

    return [note for note in quant_compile.report(model).notes if note.startswith("sums over ranks")]


def divided(setup: Setup, device: torch.device) -> Any:
    """The model as ``from_pretrained(..., tp_plan="auto")`` gives it to this rank; whole where there is one."""
    from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM, logging

    layers = 2 if setup.smoke else LAYERS[setup.model]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if setup.model == LLAMA:
        config, kind = llama_config(TINY if setup.smoke else LLAMA_3_70B, layers), LlamaForCausalLM
    else:
        shape = (SMOKE_MODELS if setup.smoke else MODELS)[setup.model]
        experts = "batched_mm" if setup.stack.startswith(BATCHED) else "grouped_mm"
        config, kind = config_of(shape, layers, experts), Qwen3MoeForCausalLM
    if setup.gpus == 1:
        with torch.device("meta"):
            whole = kind(config).to(torch.bfloat16)
        return on_device(whole, config, device)
    from transformers.distributed import DistributedConfig

    # Weights that a checkpoint lacks are made where loaded ones would be, and as they would be.
    return kind.from_pretrained(
        None, config=config, state_dict={}, dtype=torch.bfloat16, distributed_config=DistributedConfig(tp_plan="auto")
    )


def fill(model: Any, layers: int, rank: int) -> Any:
    """Seeded random values for this rank's parts: its own where a weight is divided, every rank's same where it is not.

    Embeddings have a deviation of 1 and what is added to the residual stream one that falls with depth, so that the stream is not made
    of rounding errors: logits of FP8 can then be compared with bf16's.
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        own = local.shape != parameter.shape
        seed = sum((i + 1) * byte for i, byte in enumerate(name.encode())) * 64 + (rank + 1 if own else 0)
        deviation = 1.0 if "embed" in name else 0.02
        if any(part in name for part in ("o_proj", "down_proj")):
            deviation /= math.sqrt(2 * layers)
        with torch.no_grad():
            if "norm" in name:
                local.fill_(1.0)
            else:
                local.normal_(0.0, deviation, generator=torch.Generator(local.device).manual_seed(seed))
    return model.eval().requires_grad_(False)


def local_cache(config: Any, gpus: int, batch: int, tokens: int, device: torch.device) -> Any:
    """A filled static cache of this rank's heads."""

    return static_cache(config, batch, tokens, device, torch.bfloat16, heads=config.num_key_value_heads // gpus)


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    """While a kernel is measured in this block, no other process measures one on this GPU."""
    from unittest.mock import patch

    from quant_compile.lowering import tune, tune_moe

    lock, original = DeviceLock(Path(path)), tune.take_times

    def locked(*args: Any, **kwargs: Any) -> None:
        with lock.held():
            original(*args, **kwargs)

    with patch.object(tune, "take_times", locked), patch.object(tune_moe, "take_times", locked):
        yield


def serve(setup: Setup, rank: int, port: int, pipe: Connection) -> None:
    """Answer one command after another: (True, result) or (False, why it failed)."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setup.gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if setup.smoke:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    worker = Rank(setup, rank)
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            os._exit(0)  # a collective that nobody answers must not keep it
        try:
            pipe.send((True, getattr(worker, name)(*args)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, last_line(error)))


# --- the parent ------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The processes of one stack, seen from the parent.

    Attributes:
        reason: why it runs nothing any more.
    """

    setup: Setup
    reason: str = ""
    ranks: list[tuple[Any, Connection]] = field(default_factory=list)

    def start(self) -> None:
        """Start the processes and let them build."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.setup.gpus):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(self.setup, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))
        self.ask("build")

    def ask(self, name: str, *args: Any) -> None:
        """Send a command to all ranks."""
        with self.lost():
            for _, pipe in self.ranks:
                pipe.send((name, args))

    def answers(self, seconds: float) -> list[dict[str, Any]]:
        """Each rank's answer; none, and the group is ended, where one failed, is gone, or takes longer."""
        until, found = time.perf_counter() + seconds, list[dict[str, Any]]()
        for rank, (_, pipe) in enumerate(self.ranks):
            with self.lost():
                if not pipe.poll(max(until - time.perf_counter(), 0.05)):
                    self.end("the time was up")
                    return []
                good, value = pipe.recv()
                if not good:
                    self.end(f"rank {rank}: {value}")
                    return []
                found.append(value)
        return found

    @contextlib.contextmanager
    def lost(self) -> Iterator[None]:
        """A process that is gone ends the group."""
        try:
            yield
        except (EOFError, OSError):
            self.end("a process ended")

    def end(self, reason: str = "") -> None:
        """Kill the processes: others may wait for one that failed."""
        self.reason = self.reason or reason
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
        for process, _ in self.ranks:
            process.join()
        self.ranks = []


@dataclass
class Bench:
    """Runs stages of groups cell by cell, and keeps the rows."""

    args: argparse.Namespace
    deadline: Deadline
    folder: Path
    meta: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def stage(self, setups: Sequence[Setup]) -> None:
        """All cells of groups that are at work together."""
        groups = [Group(setup) for setup in setups]
        if self.left <= 0:
            for group in groups:
                group.reason = "not run: the time was up"
        try:
            for group in groups:
                if not group.reason:
                    group.start()
            for group in groups:
                group.answers(self.left)
            for cell in self.args.cells.split(","):
                self.cell(cell, [group for group in groups if group.setup.runs(cell)])
                self.write()
        finally:
            for group in groups:
                group.end()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.args.seconds - self.deadline.elapsed

    def cell(self, cell: str, groups: Sequence[Group]) -> None:
        """Compile it everywhere, compare logits, then take turns."""
        rows = [self.row(cell, group) for group in groups]
        self.rows += rows
        for group in groups:
            group.ask("compile", cell)
        for group, row in zip(groups, rows, strict=True):
            answers = group.answers(self.left)
            if answers:
                row |= {"compile_s": max(answer["compile_s"] for answer in answers)}
                row |= {key: max(answer[key] for answer in answers) for key in ("peak_gib",)}
                row |= {"coverage": min(answer["coverage"] for answer in answers)} if group.setup.policy else {}
                row |= {"sums": found} if (found := answers[0].get("sums")) else {}
                row["logits"] = [answer["logits"] for answer in answers]
        compare(rows)
        samples: dict[int, list[float]] = {index: [] for index in range(len(groups))}
        for turn in range(0 if self.args.check else 1 if self.args.smoke else ROUNDS):
            order = list(range(len(groups)))
            for index in order if turn % 2 == 0 else order[::-1]:
                groups[index].ask("time", cell, self.count(cell))
                times = [answer["samples"] for answer in groups[index].answers(self.left)]
                samples[index] += [max(step) for step in zip(*times, strict=True)]
        for index, row in enumerate(rows):
            row.pop("logits", None)
            if samples[index]:
                row |= {"ms": statistics.median(samples[index]), "least_ms": min(samples[index])}
                row["samples"] = len(samples[index])
            if groups[index].reason:
                row["reason"] = groups[index].reason
        speedups(self.rows)
        print(table(KEYS, [[row.get(key) for key in KEYS] for row in rows]), flush=True)

    def count(self, cell: str) -> int:
        """Steps of a turn."""
        return 2 if self.args.smoke else PREFILLS if cell == PREFILL else STEPS

    def row(self, cell: str, group: Group) -> dict[str, Any]:
        """What identifies a row."""
        setup = group.setup
        row = {"model": setup.model, "gpus": setup.gpus, "stack": setup.stack, "cell": cell}
        return row | {"source": self.meta["machine"]["source"]}

    def write(self) -> None:
        """What there is, should the process be killed."""
        mine = [{key: row[key] for key in CELL} for row in self.rows]
        others = [row for row in self.args.known if {key: row[key] for key in CELL} not in mine]
        write_result(self.args.out, [*others, *self.rows], self.meta | {"seconds": self.deadline.elapsed}, quiet=True)


CELL = ("model", "gpus", "stack", "cell")
KEYS = (
    "model", "gpus", "stack", "cell", "ms", "least_ms", "speedup", "scaling", "cosine", "coverage", "compile_s", "peak_gib", "reason",
)  # fmt: skip


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Logits of each stack against bf16's of the same model, and of its ranks against each other."""
    for row in rows:
        base = next((other["logits"][0] for other in rows if same(row, other, BF16) and "logits" in other), None)
        if "logits" not in row:
            continue
        apart = min(float(torch.cosine_similarity(each, row["logits"][0], dim=0)) for each in row["logits"])
        if not apart >= ALIKE:
            row["wrong"] = f"its ranks have different logits: cosine {apart:.6f}"
        elif base is not None:
            row["cosine"] = float(torch.cosine_similarity(row["logits"][0], base, dim=0))
            least = PROMPT_COSINE if row["cell"] == PREFILL else COSINE
            if not row["cosine"] >= least:
                row["wrong"] = f"its logits are not the bf16 model's: cosine {row['cosine']:.4f} < {least}"
    for row in rows:
        if "wrong" in row:
            row["reason"] = row.pop("wrong")


def same(row: dict[str, Any], other: dict[str, Any], *stacks: str) -> bool:
    """Whether ``other`` is the same cell of one of these stacks, with CUDA graphs where ``row`` has them."""
    suffix = GRAPHS if row["stack"].endswith(GRAPHS) else ""
    named = other["stack"] in {stack + suffix for stack in stacks}
    return named and all(row[key] == other[key] for key in ("model", "gpus", "cell"))


def speedups(rows: Sequence[dict[str, Any]]) -> None:
    """To the faster bf16 of the same mode, and to the stack itself on the fewest GPUs; not of what is wrong."""
    for row in rows:
        if "ms" not in row or "reason" in row:
            continue
        base = [other["ms"] for other in rows if same(row, other, BF16, BATCHED) and "ms" in other]
        if base:
            row["speedup"] = min(base) / row["ms"]
        alike = [
            other
            for other in rows
            if "ms" in other and all(row[key] == other[key] for key in ("model", "stack", "cell"))
        ]
        first = min(alike, key=lambda other: other["gpus"])
        if first["gpus"] < row["gpus"]:
            row["scaling"] = first["ms"] / row["ms"]


def stages(args: argparse.Namespace, folder: Path) -> list[list[Setup]]:
    """Which groups are at work together: all models without CUDA graphs, then with, for each number of GPUs."""
    models, stacks = args.models.split(","), args.stacks.split(",")
    out: list[list[Setup]] = []
    for gpus in map(int, args.gpus.split(",")):
        for suffix in [""] if args.check or args.smoke else MODES[args.graphs]:
            out.append(
                [
                    Setup(model, stack + suffix, gpus, args.smoke, str(folder / "gpu"))
                    for model in models
                    for stack in stacks
                    if stack != BATCHED or model == QWEN
                ]
            )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU over gloo")
    parser.add_argument("--gpus", default="2", help="how many, comma-separated; one is no tensor parallelism")
    parser.add_argument("--models", default=f"{LLAMA},{QWEN}")
    parser.add_argument("--stacks", default=",".join(STACKS))
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument(
        "--graphs", choices=MODES, default="both", help="mode='reduce-overhead', the default mode, or both"
    )
    parser.add_argument("--add", action="store_true", help="keep rows of the file that this run does not measure")
    parser.add_argument("--check", action="store_true", help="compare logits, time nothing")
    parser.add_argument("--seconds", type=float, default=240.0, help="nothing runs any longer; what there is is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "tensor_parallel.json")
    args = parser.parse_args(argv)
    most = max(map(int, args.gpus.split(",")))
    if not args.smoke and torch.cuda.device_count() < most:
        sys.exit(f"{torch.cuda.device_count()} GPUs are visible and --gpus wants {most}. Fix: --gpus, or --smoke.")
    processes = max(len(stage) * stage[0].gpus for stage in stages(args, Path()))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    args.known = json.loads(args.out.read_text())["rows"] if args.add and args.out.exists() else []
    deadline = Deadline(args.seconds)
    meta = {
        "benchmark": "tensor_parallel",
        "machine": machine("cpu" if args.smoke else "cuda"),
        "settings": {
            "layers": LAYERS,
            "filled": FILLED,
            "least_cosine": [COSINE, PROMPT_COSINE],
            "limit_s": args.seconds,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, deadline, Path(folder), meta)
        for setups in stages(args, Path(folder)):
            bench.stage(setups)
        bench.write()
    print(f"wrote {args.out.name}: {len(bench.rows)} rows in {deadline.elapsed:.0f} s")


if __name__ == "__main__":
    main()
