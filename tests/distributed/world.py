"""Processes of one process group (gloo on the CPU, or NCCL) that run functions of the tests: started once, since imports take their time.

A world that does not answer in time is killed, and so is one in which a rank failed: the others may wait for it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

RANKS = 2
SECONDS = 600.0  # of one job; an idle core needs a tenth of that at most


class RankError(AssertionError):
    """A rank failed; has its traceback."""


class World:
    """Runs one job after another on all ranks."""

    def __init__(self, backend: str = "gloo") -> None:
        self.backend = backend
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``job(*args)`` returns on each rank.

        Raises:
            RankError: it failed on a rank, or took too long; the next job starts another world.
        """
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((job, args))
        answers: list[Any] = []
        for rank, (_, pipe) in enumerate(self._ranks):
            # Where one fails the others may hang: they have failed too, or soon answer, or are of no interest.
            found, value = pipe.recv() if pipe.poll(SECONDS if not _failed(answers) else 20) else (False, "no answer")
            answers.append((found, f"rank {rank}: {value}" if not found else value))
        if _failed(answers):
            for process, _ in self._ranks:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR1)  # it prints where it is
            time.sleep(1)
            self.close()
            raise RankError("\n".join(value for found, value in answers if not found))
        return [value for _, value in answers]

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs, self.backend), daemon=True)
            process.start()
            self._ranks.append((process, ours))

    def close(self) -> None:
        """End the ranks."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []


def _failed(answers: list[Any]) -> bool:
    return any(not found for found, _ in answers)


def _serve(rank: int, port: int, pipe: Connection, backend: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    from quant_compile.lowering.rounding import recipe

    recipe.DEFAULT = recipe.NEAREST
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if backend == "nccl":  # a kernel that waits for ever must not take the machine's time
        dist.init_process_group(backend, device_id=torch.device("cuda", rank), timeout=timedelta(seconds=120))
    else:
        dist.init_process_group(backend)
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            pipe.send((True, job(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
