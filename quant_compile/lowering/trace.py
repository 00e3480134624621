"""How kernels behave while Inductor's graph is being traced: they become part of it, so that its code launches them itself.

A kernel that allows it is run once with fake tensors (``tracing``): library ops are recorded as they are, and ``enqueue``
records Triton kernels as user-defined ones, which Inductor inlines into its wrapper. Where the number of rows is a symbol, a
kernel cuts its launch up for the most that it is to serve (``rows_of``). Inside ``compiling`` Triton kernels are compiled, not run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.utils import has_fake_kernel

_ROWS: ContextVar[int | None] = ContextVar("sglquant_rows", default=None)
_ACTIVE: ContextVar[bool] = ContextVar("sglquant_tracing", default=False)
_COMPILING: ContextVar[bool] = ContextVar("sglquant_compiling", default=False)


@contextmanager
def tracing(rows: int | None) -> Generator[None]:
    """Kernels run inside are recorded; ``rows``: the m to cut launches up for where it is a symbol."""
    tokens = _ACTIVE.set(True), _ROWS.set(rows)
    try:
        yield
    finally:
        _ACTIVE.reset(tokens[0])
        _ROWS.reset(tokens[1])


def is_tracing() -> bool:
    """Whether kernels are recorded now, not run."""
    return _ACTIVE.get()


def rows_of(x: Tensor) -> int:
    """The m that a launch over x [m, ...] is cut up for: x's own, or the largest of its range while it is a symbol."""
    rows = _ROWS.get()
    return int(x.shape[0]) if rows is None else rows


@contextmanager
def compiling(executor: Executor) -> Generator[None]:
    """Triton kernels that are run inside are compiled by ``executor``, several at a time, and not launched; done when it ends.

    What does not compile raises when it is launched.
    """
    from triton import AsyncCompileMode

    token = _COMPILING.set(True)
    try:
        with AsyncCompileMode(executor, ignore_errors=True):
            yield
    finally:
        _COMPILING.reset(token)


def enqueue(kernel: Any, grid: tuple[Any, ...], *args: Any, **kwargs: Any) -> None:
    """Launch a Triton kernel over ``grid``; record the launch while a graph is traced; compile alone inside ``compiling``.

    Inductor has no programmatic dependent launch for kernels of others, so a recorded launch leaves it out.
    """
    if not is_tracing():
        if _COMPILING.get():
            kernel.warmup(*args, grid=grid, **kwargs)
        else:
            kernel[grid](*args, **kwargs)
        return
    from torch.library import wrap_triton

    kwargs.pop("launch_pdl", None)
    wrap_triton(kernel)[grid](*args, **kwargs)


@contextmanager
def analysed_once() -> Generator[None]:
    """torch asks of every launch which arguments its kernel writes, by compiling it to Triton's IR: once for each kind is enough.

    A kind is the kernel, its constants, and the types of its other arguments. Without those names in torch, nothing happens.
    """
    from torch._higher_order_ops import triton_kernel_wrap as wrap
    from torch._inductor import ir

    with ExitStack() as stack:
        for name in ("identify_mutated_tensors", "identify_accessed_tensors"):
            original = getattr(wrap, name, None)
            if original is not None:
                remembered = _remembering(original)
                for module in (wrap, ir):
                    if hasattr(module, name):
                        stack.enter_context(patch.object(module, name, remembered))
        yield


def _remembering(analyse: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def remembered(kernel: Any, kwargs: dict[str, Any], *more: Any, **options: Any) -> Any:
        source = kernel
        while hasattr(source, "fn"):  # an autotuner holds a Triton function, which holds a Python function
            source = source.fn
        key = (id(source), tuple((name, _kind(value)) for name, value in kwargs.items()), repr((more, options)))
        if key not in known:
            known[key] = analyse(kernel, kwargs, *more, **options)
        return known[key]

    return remembered


def _kind(value: Any) -> str:
    """What an argument is to the analysis: a tensor's type and size, anything else as it is."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}"
    return f"{value.get_dtype()}{value.get_size()}" if hasattr(value, "get_dtype") else repr(value)


def recordable(op: Any, fake: Callable[..., Any]) -> Any:
    """A library's op that can be recorded: where the library gives it no shapes of results, ``fake`` does.

    Args:
        op: an OpOverload.
        fake: computes empty results from the op's own arguments.
    """
    name = op.name().removesuffix(".default")
    if not has_fake_kernel(op):
        torch.library.register_fake(name, fake)
    return op


def aligned(x: Tensor, size: int) -> bool:
    """Whether x begins at a multiple of ``size`` bytes. Of a traced one its offset tells: Inductor allocates at 64 (GPUs: 16)."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if not is_tracing():
        return x.data_ptr() % size == 0
    return statically_known_true(x.storage_offset() * x.element_size() % size == 0)


def fresh(x: Tensor) -> Tensor:
    """A copy of x [..., k] that a compiler does not leave out, as it does ``clone``: with a row more, which is cut off."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.nn.functional.pad(rows, (0, 0, 0, 1)).narrow(0, 0, rows.shape[0]).view(x.shape)
