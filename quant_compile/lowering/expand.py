"""Replace kernel ops by what they run, while Inductor's graph is traced: no Python of ours runs at a call then.

Reads the dispatch of ``sglq_kernels.linear``. Where the number of rows m is known, its kernel is recorded. Where it is a
symbol, ``torch.cond`` on it chooses among the few ranges whose launches differ, the largest first, since prompts are long.
A kernel that cannot be recorded stays a call of the op, for its own range of m alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from quant_compile.lowering import ops
from quant_compile.lowering.registry import Kernel
from quant_compile.lowering.select import BUCKETS, Dispatch, parse_dispatch
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import tracing

_EXPANDING: ContextVar[bool] = ContextVar("sglquant_expanding", default=False)
# Stands for all m above the last bucket.
BEYOND = 2 * BUCKETS[-1]


@contextmanager
def expanding(on: bool = True) -> Generator[None]:
    """Kernel ops traced inside become what they run, or stay as they are."""
    token = _EXPANDING.set(on)
    try:
        yield
    finally:
        _EXPANDING.reset(token)


@dataclass(frozen=True)
class Branch:
    """What runs for m up to ``most`` (None: any): a kernel, recorded as for ``rows`` rows, or called as an op."""

    most: int | None
    kernel: str
    rows: int
    recorded: bool


def branches(chosen: Dispatch, target: Target, least: int = 1) -> tuple[Branch, ...]:
    """The ranges of m, from ``least`` up, in which a dispatch's launches differ, ascending; the last has no end."""
    found: list[tuple[Any, Branch]] = []
    for bucket in (*BUCKETS, None):
        if bucket is not None and bucket < least:
            continue
        rows = BEYOND if bucket is None else bucket
        kernel = chosen.kernel_for(rows)
        plan = _plan(kernel, chosen, rows, target)
        key = (kernel.name, plan)
        branch = Branch(bucket, kernel.name, rows, plan is not None)
        if found and found[-1][0] == key:
            found.pop()
        found.append((key, branch))
    return tuple(branch for _, branch in found)


def _plan(kernel: Kernel, chosen: Dispatch, rows: int, target: Target) -> Any:
    return None if kernel.recorded is None else kernel.recorded(chosen.problem, rows, target)


def _expand(x: list[Tensor], w: list[Tensor], bias: Tensor | None, dispatch: str) -> Any:
    """What ``sglq_kernels.linear`` computes, in ops that Inductor knows; NotImplemented where the op itself is best."""
    chosen = parse_dispatch(dispatch)
    if chosen.problem.n == 0 or _is_zero(x[0]):
        return NotImplemented
    target = Target.of(x[0].device)
    m: Any = math.prod(x[0].shape[:-1])
    if isinstance(m, int):
        kernel = chosen.kernel_for(m)
        if _plan(kernel, chosen, m, target) is None:
            return NotImplemented
        return _recorded(kernel, None, chosen, x, w, bias)
    found = branches(chosen, target, least=2)
    if not any(branch.recorded for branch in found):
        return NotImplemented
    if len(found) == 1:
        return _run(found[0], chosen, x, w, bias)
    return _cond(found, chosen, m, x, w, bias)


def _is_zero(data: Tensor) -> bool:
    sizes: tuple[Any, ...] = tuple(data.shape)
    return any(isinstance(size, int) and size == 0 for size in sizes)


def _recorded(
    kernel: Kernel, rows: int | None, chosen: Dispatch, x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None
) -> Tensor:
    with tracing(rows):
        return ops.run_linear(kernel, chosen.problem, x, w, bias)


def _run(branch: Branch, chosen: Dispatch, x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    if not branch.recorded:
        alone = replace(chosen, table=((BUCKETS[-1], branch.kernel),))
        with expanding(False):
            return ops.linear(list(x), list(w), bias, alone.text)
    return _recorded(chosen.kernel_for(branch.rows), branch.rows, chosen, x, w, bias)


def _cond(
    found: Sequence[Branch], chosen: Dispatch, m: Any, x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None
) -> Tensor:
    """A chain of two-way branches, the unbounded range first."""
    from torch._higher_order_ops.cond import cond_op

    *smaller, last = found
    operands = (*x, *w, *(() if bias is None else (bias,)))
    split = len(x), len(x) + len(w)

    def unpacked(run: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor]:
        given = tensors[split[1]] if bias is not None else None
        return (run(tensors[: split[0]], tensors[split[0] : split[1]], given),)

    def few(x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if len(smaller) == 1:
            return _run(smaller[0], chosen, x, w, bias)
        return _cond(smaller, chosen, math.prod(x[0].shape[:-1]), x, w, bias)

    many = partial(_run, last, chosen)
    bound = smaller[-1].most
    (y,) = cond_op(m > bound, partial(unpacked, many), partial(unpacked, few), operands)
    return y


def _rule(mode: FunctionalTensorMode, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    if _EXPANDING.get():
        with mode:
            result = _expand(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
    return mode.__torch_dispatch__(op, types, args, kwargs)


torch.library.register_torch_dispatch("sglq_kernels::linear", FunctionalTensorMode, _rule, lib=ops.LIBRARY)
