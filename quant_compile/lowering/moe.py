"""MoE kernels: what one is, and the choice of one for every number of tokens.

Several kernels may read one layout; a block is packed once, so prefill and decode share it. A module of
``lowering/kernels`` offers ``MOE_KERNELS`` (and ``MOE_LAYOUTS`` if it brings its own).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.errors import NoKernelError, SchemeError
from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.moe import Activation, MoeProblem, parse_spec
from quant_compile.ir.numerics import dtype_name
from quant_compile.lowering.registry import Problem, Rank, _modules, kernels, layouts
from quant_compile.lowering.select import (
    BUCKETS,
    Request,
    Table,
    answers_of,
    best_layout,
    fallback_fix,
    fits,
    name_for,
    parse_table,
    ranges_text,
    reasons_of,
    table_text,
)
from quant_compile.lowering.target import Target


@dataclass(frozen=True)
class MoeKernel:
    """Something that can run a block.

    Attributes:
        name: provider, then job: ``triton_moe``.
        layout: name of the layout of its weight planes.
        fit: ``(problem, tokens, target) -> Rank | Reject``; costs are estimates of microseconds.
        run: ``(x planes, ids [T, k], weights [T, k] | None, w13, b13 | None, w2, b2 | None, scale2 | None, problem) -> [T, H]``.
            x planes are data [T, H] contiguous, then scale [T, s] or [1]. T is at least 1. ids may be any integer dtype and
            hold values outside of 0..E-1, which add nothing. Must not synchronize with the host on a GPU.
        reference: slow and exact; on a GPU only used when the policy or the options allow it.
        only_pinned: as for a kernel of linears.
        ungated: also runs experts without a gate.
        mixed: also runs blocks whose two weights have different schemes; ``fit`` answers for both.
    """

    name: str
    layout: str
    fit: Callable[[MoeProblem, int, Target], Rank | Reject]
    run: Callable[
        [Planes, Tensor, Tensor | None, Planes, Tensor | None, Planes, Tensor | None, Tensor | None, MoeProblem], Tensor
    ]
    reference: bool = False
    only_pinned: str | None = None
    ungated: bool = False
    mixed: bool = False

    def refuses(self, problem: MoeProblem) -> str | None:
        """Why it runs no block of this form, whatever its sizes and schemes."""
        if not problem.activation.gated and not self.ungated:
            return "multiplies experts with a gate only"
        return None if problem.scheme2 is None or self.mixed else "multiplies weights of one scheme only"


@dataclass(frozen=True)
class MoeLayout:
    """How the stacked planes of one of a block's two weights lie in memory; ``problem`` is that weight's half of the block.

    Attributes:
        planes: ``(problem, n, k) -> specs`` of the packed planes, with the leading E.
        pack: ``(row-form planes of one expert, problem, n, k) -> planes of one expert``.
        unpack: its inverse.
    """

    name: str
    planes: Callable[[MoeProblem, int, int], tuple[PlaneSpec, ...]]
    pack: Callable[[Planes, MoeProblem, int, int], Planes]
    unpack: Callable[[Planes, MoeProblem, int, int], Planes]


def _stacked(problem: MoeProblem, n: int, k: int) -> tuple[PlaneSpec, ...]:
    specs = family_of(problem.scheme).weight_planes(problem.scheme, n, k, problem.dtype)
    return tuple(PlaneSpec(s.name, (problem.experts, *s.shape), s.dtype) for s in specs)


# Row form, expert after expert.
STACKED = MoeLayout("experts", _stacked, lambda planes, p, n, k: planes, lambda planes, p, n, k: planes)


@lru_cache(maxsize=1)
def moe_kernels() -> dict[str, MoeKernel]:
    """All MoE kernels by name."""
    return {kernel.name: kernel for module in _modules() for kernel in getattr(module, "MOE_KERNELS", ())}


@lru_cache(maxsize=1)
def moe_layouts() -> dict[str, MoeLayout]:
    """All layouts by name."""
    own = {layout.name: layout for module in _modules() for layout in getattr(module, "MOE_LAYOUTS", ())}
    return {STACKED.name: STACKED, **own}


@dataclass(frozen=True)
class MoeDispatch:
    """The kernels of one block: all read ``layout``; ``table`` is (most tokens, kernel name), ascending, last is unbounded."""

    problem: MoeProblem
    layout: str
    table: Table

    @property
    def text(self) -> str:
        """Everything about the dispatch as one word: an argument of the kernel op and part of Inductor's cache key."""
        return "|".join((moe_problem_text(self.problem), self.layout, table_text(self.table)))

    @property
    def ranges(self) -> str:
        """The table for people: ``t<=16: a, t>16: b``."""
        return ranges_text(self.table, "t")

    def kernel_for(self, tokens: int) -> MoeKernel:
        """The kernel that serves this many tokens."""
        return moe_kernels()[name_for(self.table, tokens)]


@lru_cache(maxsize=None)
def parse_moe_dispatch(text: str) -> MoeDispatch:
    """Inverse of ``MoeDispatch.text``."""
    problem, layout, table = text.rsplit("|", 2)
    return MoeDispatch(parse_moe_problem(problem), layout, parse_table(table))


def moe_problem_text(problem: MoeProblem) -> str:
    """A block as one word."""
    p = problem
    fields = (p.spec, p.experts, p.hidden, p.intermediate, p.top_k, p.activation.text)
    return "|".join(map(str, (*fields, dtype_name(p.dtype), int(p.has_bias), int(p.has_weights))))


def parse_moe_problem(text: str) -> MoeProblem:
    """Inverse of ``moe_problem_text``."""
    spec, experts, hidden, inner, top_k, activation, dtype, bias, weights = text.split("|")
    scheme, scheme2 = parse_spec(spec)
    return MoeProblem(
        scheme, int(experts), int(hidden), int(inner), int(top_k), Activation.parse(activation),
        getattr(torch, dtype), bias == "1", weights == "1", scheme2,
    )  # fmt: skip


def planes_of(layout: str, problem: MoeProblem) -> tuple[tuple[PlaneSpec, ...], tuple[PlaneSpec, ...]]:
    """The packed planes of a block's two weights."""
    specs, (first, second) = moe_layouts()[layout].planes, problem.halves
    return (
        specs(first, problem.up_rows, problem.hidden),
        specs(second, problem.hidden, problem.intermediate),
    )


CostOf = Callable[[MoeKernel, MoeProblem, int], float]


def moe_fits(
    problem: MoeProblem, target: Target, request: Request, tokens: int, provider: str = ""
) -> dict[str, float | str]:
    """Kernel name -> its estimated cost for this many tokens, or its reason why not; of names that begin with ``provider``."""
    pins = (request.pin_for(scheme.spec, moe_kernels(), "reference_moe") for scheme in problem.schemes)
    pin = next((pin for pin in pins if pin is not None), None)
    named = {name: kernel for name, kernel in moe_kernels().items() if name.startswith(provider)}
    unable = {name: reason for name, kernel in named.items() if (reason := kernel.refuses(problem)) is not None}
    able = {name: kernel for name, kernel in named.items() if name not in unable}
    return {**answers_of(able, pin, problem, target, request, tokens), **unable}


def choose_moe(
    problem: MoeProblem, target: Target, request: Request | None = None, site: str = "", cost: CostOf | None = None
) -> MoeDispatch:
    """The dispatch of a block.

    Raises:
        NoKernelError: some number of tokens has no kernel in any layout; each kernel's reason is given.
    """
    request = request or Request()
    named = moe_kernels()
    answers = {tokens: moe_fits(problem, target, request, tokens) for tokens in BUCKETS}
    best = best_layout(
        answers, named, moe_layouts(), None if cost is None else lambda name, tokens: cost(named[name], problem, tokens)
    )
    if best is None:
        words = (
            f"{site or 'a MoE block'} ({problem.spec}, {problem.experts} experts, hidden {problem.hidden}, "
            f"intermediate {problem.intermediate}, {problem.dtype}, {target.label})"
        )
        fix = "map this block to another scheme in the policy, or to `keep`."
        fix = fallback_fix(problem, target, request, choose_moe) + fix
        raise NoKernelError(words, reasons_of(answers, named), fix)
    return MoeDispatch(problem, *best)


@lru_cache(maxsize=None)
def serves(problem: Problem | MoeProblem, target: Target, request: Request) -> bool:
    """Whether the device has kernels for a linear or a block at every size; by estimates, nothing is measured.

    Libraries are asked only where Triton's kernels do not serve: their answer is an import, and a trial on the GPU.
    """
    try:
        return any(_served(problem, target, request, provider) for provider in ("triton_", ""))
    except SchemeError:
        return False


def _served(problem: Problem | MoeProblem, target: Target, request: Request, provider: str) -> bool:
    if isinstance(problem, MoeProblem):
        blocks = {tokens: moe_fits(problem, target, request, tokens, provider) for tokens in BUCKETS}
        return best_layout(blocks, moe_kernels(), moe_layouts(), None) is not None
    linears = {m: fits(problem, target, request, m, provider) for m in BUCKETS}
    return best_layout(linears, kernels(), layouts(), None) is not None
