"""Replace kernel ops by what they run, while Inductor's graph is traced: no Python of ours runs at a call then.

Reads the dispatch of ``sglq_kernels.linear``, and the sizes of ``sglq_kernels.attention`` and ``reach``: attention of many tokens is
recorded for any number of sequences, tokens and keys, other attention where all are known.
For linears: where the number of rows m is known, its kernel is recorded. Where it is a
symbol, one kernel is recorded for all m up to SPLIT or for all above: Dynamo guards on which side m is, and compiles the other
side when a call first has it. A kernel that cannot be recorded stays a call of the op, which looks m up at each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from quant_compile.ir.family import Reject
from quant_compile.lowering import ops
from quant_compile.lowering.attention import MOST_TOKENS, attention_kernels, full_mask, surely_fit
from quant_compile.lowering.registry import Kernel, kernels
from quant_compile.lowering.select import BUCKETS, Dispatch, parse_dispatch
from quant_compile.lowering.sides import SPLIT, beyond, can_ask, loops_over_symbols
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import tracing

_EXPANDING: ContextVar[bool] = ContextVar("sglquant_expanding", default=False)
# Fewer rows do not count there: prompts of a few tokens are rare.
FEWEST = 16
# Stands for all m above the last bucket.
BEYOND = 2 * BUCKETS[-1]


@contextmanager
def expanding() -> Generator[None]:
    """Kernel ops traced inside become what they run."""
    token = _EXPANDING.set(True)
    try:
        with loops_over_symbols():
            yield
    finally:
        _EXPANDING.reset(token)


@dataclass(frozen=True)
class Served:
    """What serves a whole range of m: a kernel, cut up for the ``rows`` of the range's end."""

    kernel: str
    rows: int


def served(chosen: Dispatch, many: bool) -> Served:
    """The kernel of a graph whose m is a symbol: the one that serves most of its range, by the logarithm of m.

    Args:
        many: m is above SPLIT, else up to it. Fewer than FEWEST rows do not count: graphs with a symbol serve prompts.
    """
    buckets = [m for m in (*BUCKETS, BEYOND) if (m > SPLIT if many else FEWEST <= m <= SPLIT)]
    spans: dict[str, float] = {}
    for lower, upper in pairwise((SPLIT if many else FEWEST // 2, *buckets)):
        name = chosen.kernel_for(upper).name
        spans[name] = spans.get(name, 0.0) + math.log(upper / lower)
    longest = max(spans, key=lambda name: spans[name])
    return Served(longest, max(m for m in buckets if chosen.kernel_for(m).name == longest))


def recorded_for(chosen: Dispatch, many: bool, target: Target) -> Served | None:
    """The kernel that is recorded where m is a symbol; None where the op stays, which looks m up at each call."""
    found = served(chosen, many)
    kernel = kernels()[found.kernel]
    if isinstance(kernel.fit(chosen.problem, SPLIT + 1 if many else 2, target), Reject):
        return None
    return None if _plan(kernel, chosen, found.rows, target) is None else found


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
        kernel, rows = chosen.kernel_for(m), None
        if _plan(kernel, chosen, m, target) is None:
            return NotImplemented
    else:
        many = beyond(m)
        found = None if many is None else recorded_for(chosen, many, target)
        if found is None:
            return NotImplemented
        kernel, rows = kernels()[found.kernel], found.rows
    with tracing(rows):
        return ops.run_linear(kernel, chosen.problem, x, w, bias)


def _expand_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, kernel: str,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, codes: str = "", reach: Tensor | None = None,
    blocks: list[int] | None = None,
) -> Any:  # fmt: skip
    """What ``sglq_kernels.attention`` runs, where its launch can be cut up now; else NotImplemented."""
    if Target.of(q.device).device != "cuda" or not attention_kernels()[kernel].recorded:
        return NotImplemented
    if not _known(*(x for x in (q, k, v, mask) if x is not None)):
        # Blocks that were chosen before cut a launch up for any sizes; few tokens are another kernel's.
        if blocks is None or reach is None or not surely_fit(q, k, v, full_mask(mask)):
            return NotImplemented
        if not beyond(q.shape[2], MOST_TOKENS):
            return NotImplemented
    with tracing(None):
        return ops.run_attention(q, k, v, mask, scale, softcap, sinks, kernel, k_scale, v_scale, codes, reach, blocks)


def _expand_reach(mask: Tensor, queries: int, keys: int) -> Any:
    """What ``sglq_kernels.reach`` launches; late graphs with symbols keep the op, whose attention stays one, too."""
    if Target.of(mask.device).device != "cuda" or _is_zero(mask) or not (_known(mask) or can_ask(mask)):
        return NotImplemented
    with tracing(None):
        return ops.run_reach(mask, queries, keys)


def _known(*tensors: Tensor) -> bool:
    """Whether all sizes are numbers, and none is zero."""
    sizes: list[Any] = [size for x in tensors for size in x.shape]
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _expand_latents(q: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None, *more: Any) -> Any:
    """What ``sglq_kernels.sum_latents`` runs, as ``_expand_attention``."""
    tensors = (q, turned, latent, rope, *(() if mask is None else (mask,)))
    if not _known(*tensors) or Target.of(q.device).device != "cuda":
        return NotImplemented
    with tracing(None):
        return ops.run_latents(q, turned, latent, rope, mask, *more)


def _expand_dequantize(w: list[Tensor], dispatch: str) -> Any:
    """What ``sglq_kernels.dequantize`` computes, which Inductor makes one kernel of; a kernel's layout is taken apart by the op."""
    return ops.dequantized(w, dispatch) if parse_dispatch(dispatch).layout == "rows" else NotImplemented


def _is_zero(data: Tensor) -> bool:
    sizes: tuple[Any, ...] = tuple(data.shape)
    return any(isinstance(size, int) and size == 0 for size in sizes)


def _rule(expand: Callable[..., Any]) -> Callable[..., Any]:
    def rule(
        mode: FunctionalTensorMode, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Any:
        if _EXPANDING.get():
            with mode:
                result = expand(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return mode.__torch_dispatch__(op, types, args, kwargs)

    return rule


torch.library.register_torch_dispatch("sglq_kernels::linear", FunctionalTensorMode, _rule(_expand), lib=ops.LIBRARY)
torch.library.register_torch_dispatch(
    "sglq_kernels::reach", FunctionalTensorMode, _rule(_expand_reach), lib=ops.LIBRARY
)
torch.library.register_torch_dispatch(
    "sglq_kernels::sum_latents", FunctionalTensorMode, _rule(_expand_latents), lib=ops.LIBRARY
)
torch.library.register_torch_dispatch(
    "sglq_kernels::dequantize", FunctionalTensorMode, _rule(_expand_dequantize), lib=ops.LIBRARY
)
torch.library.register_torch_dispatch(
    "sglq_kernels::attention", FunctionalTensorMode, _rule(_expand_attention), lib=ops.LIBRARY
)
