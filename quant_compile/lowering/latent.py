"""Whether an attention over a cache of latents absorbs the linear of its K and V: estimates of what is written and of what it becomes.

As written, K and V of all heads are computed of the whole cache at every step. Absorbed, the linear's weight is multiplied with q and
with the result, and the cache is read as it is. Planes of a weight are turned into values for that at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant_compile.ir.family import bits_per_weight
from quant_compile.ir.latent import LatentSite
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.scores import known, tensor_of
from quant_compile.lowering.attention import MOST_TOKENS, WRITTEN, AttentionChoice
from quant_compile.lowering.kernels._roofline import roof
from quant_compile.lowering.select import Dispatch
from quant_compile.lowering.target import Target

# What stands for a kernel's name where plain torch computes the absorbed form.
ABSORBED = "absorbed"
# Stand for sizes that are symbols.
BATCH, LENGTH = 1, 4096
# Kernels of each form, as Inductor makes them.
WRITTEN_LAUNCHES, ABSORBED_LAUNCHES = 4, 9
# A GPU's f32 products against those of its tensor cores in 16 bits.
F32_SHARE = 1 / 16
# Copies in f32 that taking a kernel's layout apart is counted as: nibbles, orders, padding.
UNPACKING = 16


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
    return LatentProblem(
        known(q.shape[0]), int(q.shape[1]), int(q.shape[3]), int(v.shape[3]), int(latent.shape[3]), int(rope.shape[3]),
        known(q.shape[2]), known(latent.shape[2]), site.linear.n, q.dtype, site.codes, scheme,
    )  # fmt: skip


def choose_latent(problem: LatentProblem, target: Target) -> AttentionChoice:
    """Absorbed for few tokens, where that is estimated to take less time."""
    p = problem
    if p.tokens is None or p.tokens > MOST_TOKENS:
        return AttentionChoice(WRITTEN, f"absorbed are up to {MOST_TOKENS} tokens, known when the graph is compiled")
    written, absorbed = written_cost(p, target), absorbed_cost(p, target)
    if written <= absorbed:
        return AttentionChoice(WRITTEN, f"estimated at {written:.0f} µs, and at {absorbed:.0f} if they were absorbed")
    return AttentionChoice(
        ABSORBED, f"the linear of K and V is absorbed: estimated at {absorbed:.0f} µs instead of {written:.0f}"
    )


def written_cost(p: LatentProblem, target: Target) -> float:
    """Estimated microseconds as written: K and V are computed, K is copied together, and both are attended to."""
    limits, item = roof(target), p.dtype.itemsize
    batch, length, tokens = _sizes(p)
    cached = batch * length
    products = 2 * cached * p.rank * p.rows + 2 * batch * tokens * p.heads * length * (p.size + p.value_size)
    # Each is written once and read once.
    made = 2 * cached * item * (p.rows + p.heads * p.size)
    moved = _weight_bytes(p) + _cache_bytes(p) + made
    return limits.launch * WRITTEN_LAUNCHES + max(products / limits.math16, moved / limits.bandwidth)


def absorbed_cost(p: LatentProblem, target: Target) -> float:
    """Estimated microseconds of the absorbed form in plain torch: scores and sums in f32, the weight in ``dtype``."""
    limits, item = roof(target), p.dtype.itemsize
    batch, length, tokens = _sizes(p)
    f32 = limits.math16 * (F32_SHARE if target.device == "cuda" else 1.0)
    scores = 2 * batch * tokens * p.heads * length * (2 * p.rank + p.rope)
    products = 2 * batch * tokens * p.rows * p.rank / limits.math16 + scores / f32
    weight = _weight_bytes(p)
    if p.scheme is not None:
        weight += 2 * p.rows * p.rank * item + (UNPACKING * 8 * p.rows * p.rank if p.layout != "rows" else 0)
    wide = 0 if p.dtype == torch.float32 and not p.codes else 2 * 4 * batch * length * (p.rank + p.rope)
    moved = weight + _cache_bytes(p) + wide + 4 * batch * length * p.rank + 16 * batch * tokens * p.heads * length
    return limits.launch * ABSORBED_LAUNCHES + max(products, moved / limits.bandwidth)


def _sizes(p: LatentProblem) -> tuple[int, int, int]:
    return p.batch or BATCH, p.length or LENGTH, p.tokens or 1


def _weight_bytes(p: LatentProblem) -> float:
    bits = 8 * p.dtype.itemsize if p.scheme is None else bits_per_weight(p.scheme)
    return p.rows * p.rank * bits / 8


def _cache_bytes(p: LatentProblem) -> float:
    batch, length, _ = _sizes(p)
    return batch * length * (p.rank + p.rope) * (1 if p.codes else p.dtype.itemsize)
