"""A sum over two ranks with the residual add, the RMSNorm and the FP8 codes that follow it: one kernel against NCCL and Inductor.

Hidden sizes are those of Llama-3-70B and Qwen3-30B-A3B, rows those of decoding. Contenders differ in what one step launches:

- ``nccl``: NCCL's all-reduce, by the op that Inductor calls, then what Inductor makes of the rest: one kernel;
- ``alone``: our kernel for the sum alone, then the same of Inductor;
- ``fused``: our one kernel for all of it;
- ``floor``: neither a sum nor what follows. In every contender a step begins with one small kernel that makes the next part of the
  last codes, as a linear would, so that steps depend on each other.

A sample is the wall clock of one CUDA graph of many steps, from an idle device to an idle device, by the slower rank. Contenders
take turns; times are medians over a step, without the floor's. Before anything is timed, results with unlike parts on both ranks are
compared: the sum must be NCCL's to the last bit, and few codes may differ from eager torch's.

    python benchmarks/all_reduce.py                  # two GPUs of one host
    python benchmarks/all_reduce.py --errors         # on a CPU: how far sums are from those in f32, where ranks send codes
    python benchmarks/all_reduce.py --smoke          # tiny, two processes on a CPU over gloo: does it run?
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Deadline, last_line, machine, table, write_result
from torch import Tensor

RANKS = 2
HIDDEN = {"Llama-3-70B": 8192, "Qwen3-30B-A3B": 2048}
ROWS = (1, 4, 16, 64)
STEPS, SAMPLES = 64, 21
SPEC, EPS, WEIGHTING = "FP8_DYNAMIC", 1e-6, "after_cast"
FLOOR, NCCL, ALONE, FUSED = "floor", "nccl", "alone", "fused"
CONTENDERS = (FLOOR, NCCL, ALONE, FUSED)
# Codes that sums of squares in another order move across a tie.
MOST_FLIPPED = 0.002
TIMEOUT = datetime.timedelta(seconds=40)  # a rank that waits for longer ends with an error
KEYS = (
    "model",
    "hidden",
    "rows",
    "nccl_us",
    "alone_us",
    "fused_us",
    "floor_us",
    "speedup",
    "speedup_alone",
    "flipped",
    "reason",
)

State = tuple[Tensor, Tensor]  # codes and the residual stream


@dataclass(frozen=True)
class Setup:
    """What both ranks run."""

    hidden: tuple[tuple[str, int], ...]
    rows: tuple[int, ...]
    steps: int
    samples: int
    smoke: bool


# --- a rank ----------------------------------------------------------------------------------------------------------


class Cell:
    """One hidden size and number of rows on one rank."""

    def __init__(self, hidden: int, rows: int, rank: int, device: torch.device, group: str, smoke: bool) -> None:
        from quant_compile.ir.family import family_of
        from quant_compile.ir.scheme import parse
        from quant_compile.lowering.ops import normed
        from quant_compile.lowering.registry import Norm

        g = torch.Generator(device).manual_seed(rank)
        same = torch.Generator(device).manual_seed(100)
        self.part = torch.randn(rows, hidden, generator=g, device=device).bfloat16()
        self.residual = torch.randn(rows, hidden, generator=same, device=device).bfloat16()
        self.weight = torch.rand(hidden, generator=same, device=device).bfloat16() + 0.5
        self.group = group

        def rest(stream: Tensor, part: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = stream + part
            scheme = parse(SPEC)
            codes, scale = family_of(scheme).quantize_input(normed(h, Norm(weight, EPS, WEIGHTING)), scheme, None)
            return h, codes, scale

        torch._dynamo.reset()  # else it counts the cells as recompilations of one function
        # As this package gives graphs to Inductor.
        patches: Any = {"size_asserts": False, "split_reductions": False}
        self.rest: Callable[..., Any] = rest if smoke else torch.compile(rest, dynamic=False, options=patches)

    def summed(self, part: Tensor) -> Tensor:
        """As Inductor runs a collective."""
        functional = torch.ops._c10d_functional
        return functional.wait_tensor(functional.all_reduce_(part, "sum", self.group))

    def ours(self, part: Tensor, *rest: Any) -> Sequence[Tensor]:
        """Our op."""
        from quant_compile.lowering import collectives

        return collectives.all_reduce(part, *(rest or (None, None, 0.0, "", "", False)), self.group)

    def after(self, contender: str, part: Tensor, stream: Tensor) -> Sequence[Tensor]:
        """The stream, codes and scales; the part may be written over."""
        if contender == NCCL:
            return self.rest(stream, self.summed(part), self.weight)
        if contender == ALONE:
            return self.rest(stream, self.ours(part)[0], self.weight)
        return self.ours(part, stream, self.weight, EPS, WEIGHTING, SPEC, False)

    def step(self, contender: str, state: State) -> State:
        """From codes and stream to the next."""
        codes, stream = state
        part = codes.to(torch.bfloat16)
        if contender == FLOOR:
            return codes, part
        h, codes, _ = self.after(contender, part, stream)
        return codes, h

    def compared(self) -> dict[str, Any]:
        """Sums of ours against NCCL's, and codes against those of torch's eager sequence: a reason if they are others.

        Inductor's own codes differ more: it leaves out roundings to 16 bits between operations.
        """
        from quant_compile.lowering import collectives

        given = (self.part, self.residual, self.weight, EPS, WEIGHTING, SPEC, False, self.group)
        wanted = collectives.reference(*given)
        for contender in (NCCL, ALONE, FUSED):
            found = self.after(contender, self.part.clone(), self.residual)
            if not torch.equal(found[0], wanted[0]):
                return {"reason": f"{contender}: the sum is not NCCL's"}
        flipped = float((found[1].view(torch.uint8) != wanted[1].view(torch.uint8)).float().mean())
        return {"flipped": flipped} | (
            {"reason": f"{flipped:.2%} of the codes differ"} if flipped > MOST_FLIPPED else {}
        )

    def chain(self, contender: str, steps: int) -> Callable[[], object]:
        """Many steps: a CUDA graph's replay, on a CPU a call."""
        state: State = (self.after(NCCL, self.part.clone(), self.residual)[1], self.residual)

        def run() -> State:
            now = state
            for _ in range(steps):
                now = self.step(contender, now)
            return now

        if not self.part.is_cuda:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step(contender, state)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL asks its events meanwhile
            run()
        return graph.replay


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds from an idle device to an idle device, the slower rank's; both begin together."""
    import torch.distributed as dist

    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor([(time.perf_counter() - started) * 1e6], device=device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def measured(cell: Cell, setup: Setup, device: torch.device) -> dict[str, Any]:
    """Microseconds of a step of each contender, in turns."""
    chains = {contender: cell.chain(contender, setup.steps) for contender in CONTENDERS}
    samples: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for turn in range(setup.samples + 1):
        for contender in CONTENDERS if turn % 2 else CONTENDERS[::-1]:
            took = timed(chains[contender], device) / setup.steps
            if turn:  # the first warms up
                samples[contender].append(took)
    found = {contender: statistics.median(times) for contender, times in samples.items()}
    net = {contender: found[contender] - found[FLOOR] for contender in (NCCL, ALONE, FUSED)}
    row: dict[str, Any] = {"floor_us": found[FLOOR]} | {f"{contender}_us": us for contender, us in net.items()}
    if min(net.values()) > 0:
        row |= {"speedup": net[NCCL] / net[FUSED], "speedup_alone": net[NCCL] / net[ALONE]}
    return row


def serve(setup: Setup, rank: int, port: int, pipe: Any) -> None:
    """All cells on one rank; sends each row, then None."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch.distributed as dist

    device = torch.device("cpu") if setup.smoke else torch.device("cuda", rank)
    if setup.smoke:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "gloo" if setup.smoke else "nccl", timeout=TIMEOUT, device_id=None if setup.smoke else device
        )
        from torch.distributed import _functional_collectives  # noqa: F401

        import quant_compile  # noqa: F401
        from quant_compile.lowering import symmetric

        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        refusal = None if setup.smoke else symmetric.unshared(group, device)
        if refusal is not None:
            raise RuntimeError(refusal.reason)
        with torch.no_grad():
            for model, hidden in setup.hidden:
                for rows in setup.rows:
                    cell = Cell(hidden, rows, rank, device, group, setup.smoke)
                    row = {"model": model, "hidden": hidden, "rows": rows} | cell.compared()
                    bad = torch.tensor([float("reason" in row)], device=device)
                    dist.all_reduce(bad)
                    pipe.send(row if float(bad) else row | measured(cell, setup, device))
        pipe.send(None)
    except Exception as error:
        traceback.print_exc()
        pipe.send({"reason": f"rank {rank}: {last_line(error)}"})
    os._exit(0)  # a collective that nobody answers must not keep it


# --- errors ----------------------------------------------------------------------------------------------------------

SENT = ("bfloat16", "FP8", "INT8")
PARTS = {"normal": 1.0, "outliers": 20.0}  # how large one column in 128 is, to the others
WORLDS = (2, 4, 8)
TOKENS = 64


def errors() -> list[dict[str, Any]]:
    """Relative errors, by norms, of sums of which each rank's part is drawn anew, to exact ones; of one process.

    The columns that are larger are left out: their values are the ends of their groups, and would hide what becomes of the others.
    """
    from quant_compile.ir.sums import decode_sum, encode

    rows: list[dict[str, Any]] = []
    for kind, largest in PARTS.items():
        for world in WORLDS:
            row: dict[str, Any] = {"parts": kind, "ranks": world}
            g = torch.Generator().manual_seed(world)
            parts = torch.randn(world, TOKENS, HIDDEN["Llama-3-70B"], generator=g)
            parts[..., ::128] *= largest
            exact = parts.double().sum(0)
            others = torch.arange(parts.shape[-1]) % 128 != 0
            for sent in SENT:
                if sent == "bfloat16":
                    total = parts.bfloat16().float().sum(0).bfloat16()
                else:
                    planes = zip(*(encode(part.bfloat16(), sent) for part in parts), strict=True)
                    total = decode_sum(*map(torch.stack, planes), parts.shape[-1], torch.bfloat16)
                row[sent] = float((total.double() - exact)[:, others].norm() / exact[:, others].norm())
            rows.append(row)
    return rows


# --- the parent ------------------------------------------------------------------------------------------------------


def rows_of(setup: Setup, seconds: float) -> list[dict[str, Any]]:
    """Each cell's row, the slower rank's reason if there is one; the processes are ended whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(setup, rank, port, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    deadline, rows = Deadline(seconds), list[dict[str, Any]]()
    try:
        while True:
            found = [_answer(pipe, deadline) for pipe in pipes]
            if all(answer is None for answer in found):
                return rows
            row = found[0] or {}
            row |= next(({"reason": answer["reason"]} for answer in found if answer and "reason" in answer), {})
            rows.append(row)
            print(table(KEYS, [[row.get(key) for key in KEYS]]), flush=True)
            if "hidden" not in row:
                return rows
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(pipe: Any, deadline: Deadline) -> dict[str, Any] | None:
    try:
        if pipe.poll(max(deadline.seconds - deadline.elapsed, 0.05)):
            return pipe.recv()
    except (EOFError, OSError):
        return {"reason": "a process ended"}
    return {"reason": "the time was up"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cells, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU over gloo")
    parser.add_argument("--errors", action="store_true", help="errors of sums of codes, on a CPU")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=float, default=150.0, help="nothing runs any longer; what there is is kept")
    parser.add_argument("--out", type=Path, help="default: results/all_reduce.json, or all_reduce_error.json")
    args = parser.parse_args(argv)
    if args.errors:
        settings = {"tokens": TOKENS, "hidden": HIDDEN["Llama-3-70B"], "largest": PARTS}
        meta = {"benchmark": "all_reduce --errors", "machine": machine("cpu"), "settings": settings}
        write_result(args.out or RESULTS / "all_reduce_error.json", errors(), meta)
        return
    if not args.smoke and torch.cuda.device_count() < RANKS:
        sys.exit(f"{torch.cuda.device_count()} GPUs are visible and {RANKS} are needed. Fix: --smoke.")
    rows = tuple(map(int, args.rows.split(",")))
    setup = Setup(tuple(HIDDEN.items()), rows, STEPS, SAMPLES, False)
    if args.smoke:
        setup = Setup((("tiny", 64),), (1, 3), 4, 3, True)
    deadline = Deadline(args.seconds)
    found = rows_of(setup, args.seconds)
    meta = {
        "benchmark": "all_reduce",
        "machine": machine("cpu" if args.smoke else "cuda"),
        "settings": {"ranks": RANKS, "steps": setup.steps, "samples": setup.samples, "scheme": SPEC, "least_equal": 1 - MOST_FLIPPED},
        "seconds": deadline.elapsed,
    }  # fmt: skip
    print(table(KEYS, [[row.get(key) for key in KEYS] for row in found]), flush=True)
    write_result(args.out or RESULTS / "all_reduce.json", found, meta)


if __name__ == "__main__":
    main()
