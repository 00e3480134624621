"""Whether an attention over a cache of latents absorbs the linear of its K and V: the form with the least estimated cost runs.

As written, K and V of all heads are computed of the whole cache at every step. Absorbed, the linear's weight is multiplied with q and
with the result, and the cache is read as it is. Modules under ``lowering/kernels`` offer forms as ``LATENT_FORMS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Reject
from quant_compile.ir.kv import HEAD, TOKEN
from quant_compile.ir.latent import LatentSite
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.scores import known, tensor_of
from quant_compile.lowering.attention import MOST_TOKENS, WRITTEN, AttentionChoice
from quant_compile.lowering.attention import problem_of as attention_problem_of
from quant_compile.lowering.registry import Rank, _modules
from quant_compile.lowering.select import Dispatch
from quant_compile.lowering.target import Target

# What stands for a kernel's name where plain torch computes the absorbed form.
ABSORBED = "absorbed"


@dataclass(frozen=True)
class LatentProblem:
    """One attention over latents.

    Attributes:
        batch, tokens, length: B, T and L; None while they are symbols.
        heads: Hq.
        size, value_size: of q and k, and of v.
        rank, rope: of what is cached of a token.
        rows: of the linear's weight.
        dtype: of q.
        codes: format of the cache; empty: it is in ``dtype``.
        scheme: of the weight; None: it is in 16 bits (or f32).
        layout: of its planes.
        mask, mask_heads, scale: as in ``AttentionProblem``; scale: of the cache's codes.
    """

    batch: int | None
    heads: int
    size: int
    value_size: int
    rank: int
    rope: int
    tokens: int | None
    length: int | None
    rows: int
    dtype: torch.dtype
    codes: str = ""
    scheme: Scheme | None = None
    layout: str = "rows"
    mask: str = "none"
    mask_heads: bool = False
    scale: str = "none"

    @property
    def text(self) -> str:
        """For people, as ``AttentionProblem.text``."""
        tokens = "many tokens" if self.tokens is None else f"{self.tokens} token{'s' * (self.tokens != 1)}"
        cache = f"static cache{' of ' + self.codes if self.codes else ''}"
        return f"{self.heads} heads of {self.size} and {self.value_size}, {tokens}, {cache} of latents ({self.rank} + {self.rope})"


class AbsorbedDispatch(Dispatch):
    """The dispatch of a linear that attention has absorbed: its layout counts, and none of its kernels runs."""

    @property
    def ranges(self) -> str:
        """For people."""
        return f"absorbed by attention, in {dtype_name(self.problem.dtype)} made of its planes at each step"


def problem_of(site: LatentSite, scheme: Scheme | None) -> LatentProblem:
    """The problem that a site poses."""
    q, v, latent, rope = (tensor_of(x) for x in (site.attention.q, site.attention.node, site.latent, site.rope))
    assert q is not None and v is not None and latent is not None and rope is not None
    plain, scales = attention_problem_of(site.attention), tensor_of(site.latent_scale)
    kind = "none" if scales is None else HEAD if known(scales.shape[2]) == 1 else TOKEN
    return LatentProblem(
        known(q.shape[0]), int(q.shape[1]), int(q.shape[3]), int(v.shape[3]), int(latent.shape[3]), int(rope.shape[3]),
        known(q.shape[2]), known(latent.shape[2]), site.linear.n, q.dtype, site.codes, scheme,
        mask=plain.mask, mask_heads=plain.mask_heads, scale=kind,
    )  # fmt: skip


@dataclass(frozen=True)
class LatentForm:
    """A way to run attention over latents.

    Attributes:
        name: WRITTEN, or what it is called in reports.
        fit: ``(problem, target) -> Rank | Reject``: estimated microseconds, to compare forms of one problem.
        run: ``(q in latents [B, Hq, T, r], q [B, Hq, T, p], latent [B, 1, L, r], rope [B, 1, L, p], mask [B|1, 1, T, L] | None,
            scale, latent_scale | None, rope_scale | None, codes) -> sums of latents [B, Hq, T, r]``; None: plain torch.
    """

    name: str
    fit: Callable[[LatentProblem, Target], Rank | Reject]
    run: Callable[..., Tensor] | None = None


@lru_cache(maxsize=1)
def latent_forms() -> dict[str, LatentForm]:
    """All forms by name."""
    return {form.name: form for module in _modules() for form in getattr(module, "LATENT_FORMS", ())}


def choose_latent(problem: LatentProblem, target: Target) -> AttentionChoice:
    """Absorbed for few tokens, where that is estimated to take less time than what is written."""
    if problem.tokens is None or problem.tokens > MOST_TOKENS:
        return AttentionChoice(WRITTEN, f"absorbed are up to {MOST_TOKENS} tokens, known when the graph is compiled")
    answers = {name: form.fit(problem, target) for name, form in latent_forms().items()}
    costs = {name: answer.cost for name, answer in answers.items() if isinstance(answer, Rank)}
    written = costs.pop(WRITTEN)
    best = min(costs, key=lambda name: costs[name])
    if written <= costs[best]:
        return AttentionChoice(
            WRITTEN, f"estimated at {written:.0f} µs, and at {costs[best]:.0f} if they were absorbed"
        )
    reason = f"the linear of K and V is absorbed: estimated at {costs[best]:.0f} µs instead of {written:.0f}"
    return AttentionChoice(best, reason)
