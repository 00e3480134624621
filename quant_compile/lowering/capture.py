"""What a CUDA graph records, and a default generator that works again where recording fails."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Generator[None]:
    """Record what is launched within; other threads may go on using the GPU meanwhile.

    After a capture that failed, torch takes the default generator for captured, and no one gets a random number until one ends
    well: one does here.
    """
    try:
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        spare = torch.empty(1, device=stream.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            spare.zero_()
        raise
