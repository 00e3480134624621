"""Replace kernel ops by what they run, while Inductor's graph is traced: no Python of ours runs at a call then.

Reads the dispatch of ``sglq_kernels.linear``. Where the number of rows m is known, its kernel is recorded. Where it is a
symbol, one kernel is recorded, or two with ``torch.cond`` on the symbol between them. A kernel that cannot be recorded
stays a call of the op.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from quant_compile.lowering import ops
from quant_compile.lowering.registry import Kernel, kernels
from quant_compile.lowering.select import BUCKETS, Dispatch, parse_dispatch
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import tracing

_EXPANDING: ContextVar[bool] = ContextVar("sglquant_expanding", default=False)
# Bounds below it do not count where m is a symbol: prompts of a few tokens are rare.
FEWEST = 16
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
    """What runs for m up to ``most`` (None: any): a kernel cut up for ``rows`` rows, recorded or called as an op."""

    most: int | None
    kernel: str
    rows: int
    recorded: bool


def branches(chosen: Dispatch, target: Target) -> tuple[Branch, ...]:
    """What a graph whose m is a symbol runs: one kernel, or two with a bound between them.

    A graph traced with a symbol serves prompts. A branch more for each handful of rows would cost seconds of compilation, so
    the last bound of the dispatch counts, and below it the kernel that serves most of the rest, by the logarithm of m. Graphs
    of a known m, decode steps, have exactly the kernel that was chosen for it.
    """
    bounds = [bound for bound, _ in chosen.table[:-1] if bound >= FEWEST]
    last = chosen.table[-1][1]
    beyond = _branch(None, chosen, last, BEYOND, target)
    if not bounds:
        return (beyond,)
    spans: dict[str, float] = {}
    for lower, upper in pairwise((1, *(bucket for bucket in BUCKETS if bucket <= bounds[-1]))):
        name = chosen.kernel_for(upper).name
        spans[name] = spans.get(name, 0.0) + math.log(upper / lower)
    longest = max(spans, key=lambda name: spans[name])
    served = max(bucket for bucket in BUCKETS if bucket <= bounds[-1] and chosen.kernel_for(bucket).name == longest)
    return _branch(bounds[-1], chosen, longest, served, target), beyond


def _branch(most: int | None, chosen: Dispatch, name: str, rows: int, target: Target) -> Branch:
    return Branch(most, name, rows, _plan(kernels()[name], chosen, rows, target) is not None)


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
    found = branches(chosen, target)
    if not any(branch.recorded for branch in found):
        return NotImplemented
    if len(found) == 1:
        return _run(found[0], chosen, x, w, bias)
    return _cond(found[0], found[1], chosen, m, x, w, bias)


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
        with expanding(False):
            return ops.linear(list(x), list(w), bias, chosen.text)
    return _recorded(kernels()[branch.kernel], branch.rows, chosen, x, w, bias)


def _cond(
    few: Branch, many: Branch, chosen: Dispatch, m: Any, x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None
) -> Tensor:
    """Both branches under ``torch.cond`` on the symbol m."""
    from torch._higher_order_ops.cond import cond_op

    operands = (*x, *w, *(() if bias is None else (bias,)))
    split = len(x), len(x) + len(w)

    def branch(which: Branch, *tensors: Tensor) -> tuple[Tensor]:
        given = tensors[split[1]] if bias is not None else None
        return (_run(which, chosen, tensors[: split[0]], tensors[split[0] : split[1]], given),)

    (y,) = cond_op(m > few.most, partial(branch, many), partial(branch, few), operands)
    return y


def _rule(mode: FunctionalTensorMode, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    if _EXPANDING.get():
        with mode:
            result = _expand(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
    return mode.__torch_dispatch__(op, types, args, kwargs)


torch.library.register_torch_dispatch("sglq_kernels::linear", FunctionalTensorMode, _rule, lib=ops.LIBRARY)
