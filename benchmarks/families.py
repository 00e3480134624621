"""Every model family of the installed transformers, tiny, under one policy: does it compile, is it right, how much is covered?

    python benchmarks/families.py                          # all, two processes, results/families.json
    python benchmarks/families.py --only llama,bert --out /tmp/some.json
    python benchmarks/families.py --resume                 # what the result file does not have yet
    python benchmarks/families.py --inductor               # with the real Inductor; hours

Families come from transformers' auto mappings and configs from general rules (``family_models.py``); a family is checked in a process
forked from one that has imported everything (``family_check.py``). Writes the result file after each family.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, machine, table, write_result
from family_check import EAGER, LATE, NEW_TOKENS, POLICY, TOLERANCE, Row, check
from family_models import families

OUT = RESULTS / "families.json"
LIMIT = 90.0


def forked() -> ForkServerContext:
    """Processes forked from one that has everything; it finds these scripts by the environment's path, as it is told no other."""
    context = multiprocessing.get_context("forkserver")
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep)))
    context.set_forkserver_preload(["family_warm"])
    return context


class Worker:
    """One family in a process of its own.

    Attributes:
        row: the latest that the process has told.
    """

    def __init__(self, family: str, limit: float, inductor: bool, generate: bool) -> None:
        context = forked()
        self.pipe, theirs = context.Pipe(duplex=False)
        self.row: Row = {"family": family, "status": EAGER, "stage": "starting"}
        self.started, self.limit = time.monotonic(), limit
        self.process: ForkServerProcess = context.Process(
            target=serve, args=(family, theirs, inductor, generate), daemon=False
        )
        self.process.start()
        theirs.close()

    @property
    def left(self) -> float:
        """Seconds until the limit, which holds from the first step on; to start may take ten times as long."""
        limit = 10 * self.limit if self.row.get("stage") == "starting" else self.limit
        return limit - (time.monotonic() - self.started)

    def listen(self) -> bool:
        """Take what the process has told; False at its end."""
        try:
            told = self.pipe.recv()
        except EOFError:
            return False
        if self.row.get("stage") == "starting":  # the first process waits until the one it is forked from is warm
            self.started = time.monotonic()
        self.row = told
        return True

    def end(self) -> Row:
        """The row as it is now, with what ended the process; kills it if it still runs."""
        late = self.process.is_alive() and self.left <= 0
        if late:
            self.process.kill()
        self.process.join()
        self.pipe.close()
        stage = self.row.pop("stage", "")
        self.row["seconds"] = round(time.monotonic() - self.started, 1)
        if self.row.pop("final", False):
            return self.row
        why = f"{self.limit:.0f} s were over" if late else f"the process ended with {self.process.exitcode}"
        if stage == "generating":
            return self.row | {"generate": f"{why} while generating"}
        compiled = stage == "compiling"  # else it is the eager model that does not come to an end
        return self.row | {"status": LATE if late and compiled else EAGER, "reason": f"{why} while {stage}"}


def serve(family: str, pipe: Connection, inductor: bool, generate: bool) -> None:
    """The work of a process: check one family and tell."""
    import logging
    import warnings

    import torch
    import transformers

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    row = check(family, pipe.send, inductor, generate)
    pipe.send(row | {"final": True, "cpu_s": round(time.process_time(), 1)})


def run(names: Sequence[str], processes: int, limit: float, inductor: bool, generate: bool) -> Iterator[Row]:
    """Rows of these families as they come, so many processes at a time."""
    waiting, working = list(reversed(names)), list[Worker]()
    while waiting or working:
        while waiting and len(working) < processes:
            working.append(Worker(waiting.pop(), limit, inductor, generate))
        ready = wait([worker.pipe for worker in working], max(0.0, min(worker.left for worker in working)))
        for worker in list(working):
            over = worker.left <= 0
            if (worker.pipe in ready and not worker.listen()) or over:
                working.remove(worker)
                yield worker.end()


def main(arguments: Sequence[str]) -> int:
    """Check the families that are asked for and print what is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one family")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no family after this many seconds")
    parser.add_argument("--forward-only", action="store_true", help="without generate, which takes most of the time")
    parser.add_argument("--inductor", action="store_true", help="compile graphs instead of running them as they are")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--smoke", action="store_true", help="three families")
    given = parser.parse_args(arguments)
    names = [name for name in given.only.split(",") if name] or list(families())
    names = ["llama", "bert", "t5"] if given.smoke else names
    rows = (
        {row["family"]: row for row in json.loads(given.out.read_text())["rows"]}
        if given.resume and given.out.is_file()
        else {}
    )
    meta = {"benchmark": "families", "machine": machine("cpu") | {"threads": 1}, "settings": settings(given)}
    start = time.monotonic()
    for row in run(
        [name for name in names if name not in rows],
        given.processes,
        given.limit,
        given.inductor,
        not given.forward_only,
    ):
        rows[row["family"]] = row
        print(f"{row['family']:32} {row['status']:10} {row.get('reason', '')[:110]}", flush=True)
        ordered = [rows[name] for name in families() if name in rows]
        write_result(given.out, ordered, meta, quiet=True)
        if time.monotonic() - start > given.seconds:
            break
    print(summary(list(rows.values())))
    return 0


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What a result was made with."""
    return {
        "policy": POLICY,
        "tolerance": TOLERANCE,
        "new_tokens": NEW_TOKENS,
        "limit_s": given.limit,
        "inductor": given.inductor,
        "families": len(families()),
    }


def summary(rows: Sequence[Row]) -> str:
    """How many of each status."""
    counts = {
        status: sum(row["status"] == status for row in rows) for status in dict.fromkeys(r["status"] for r in rows)
    }
    return table(["status", "families"], list(counts.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
