"""Attention over latents in plain torch: what it is estimated to cost as written, and absorbed into products with q and with the result.

Both run where they are Inductor's; nothing here runs. Sizes that are symbols count as one sequence and a cache of LENGTH.
"""

from __future__ import annotations

import torch

from quant_compile.ir.family import bits_per_weight
from quant_compile.lowering.attention import WRITTEN
from quant_compile.lowering.kernels._roofline import roof
from quant_compile.lowering.latent import ABSORBED, LatentForm, LatentProblem
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target

BATCH, LENGTH = 1, 4096
# Kernels of each form, as Inductor makes them.
WRITTEN_LAUNCHES, ABSORBED_LAUNCHES = 4, 9
# A GPU's f32 products against those of its tensor cores in 16 bits.
F32_SHARE = 1 / 16
# Copies in f32 that taking a kernel's layout apart is counted as: nibbles, orders, padding.
UNPACKING = 16


def written(p: LatentProblem, target: Target) -> Rank:
    """Estimated microseconds as written: K and V are computed, K is copied together, and both are attended to."""
    limits, item = roof(target), p.dtype.itemsize
    batch, length, tokens = sizes(p)
    cached = batch * length
    products = 2 * cached * p.rank * p.rows + 2 * batch * tokens * p.heads * length * (p.size + p.value_size)
    # Each is written once and read once.
    made = 2 * cached * item * (p.rows + p.heads * p.size)
    moved = _weight_bytes(p) + _cache_bytes(p) + made
    return Rank(limits.launch * WRITTEN_LAUNCHES + max(products / limits.math16, moved / limits.bandwidth))


def absorbed(p: LatentProblem, target: Target) -> Rank:
    """Estimated microseconds of the absorbed form in plain torch: scores and sums in f32, of a copy of the cache."""
    limits = roof(target)
    batch, length, tokens = sizes(p)
    f32 = limits.math16 * (F32_SHARE if target.device == "cuda" else 1.0)
    products = 2 * batch * tokens * p.heads * length * (2 * p.rank + p.rope) / f32
    wide = 0 if p.dtype == torch.float32 and not p.codes else 2 * 4 * batch * length * (p.rank + p.rope)
    moved = _cache_bytes(p) + wide + 4 * batch * length * p.rank + 16 * batch * tokens * p.heads * length
    return Rank(limits.launch * ABSORBED_LAUNCHES + around(p, target) + max(products, moved / limits.bandwidth))


def around(p: LatentProblem, target: Target) -> float:
    """Estimated microseconds of the products with q and with the sums, and of the weight in ``dtype`` where it is in planes."""
    limits = roof(target)
    batch, _, tokens = sizes(p)
    weight = _weight_bytes(p)
    if p.scheme is not None:
        weight += 2 * p.rows * p.rank * p.dtype.itemsize + (
            UNPACKING * 8 * p.rows * p.rank if p.layout != "rows" else 0
        )
    return max(2 * batch * tokens * p.rows * p.rank / limits.math16, weight / limits.bandwidth)


def sizes(p: LatentProblem) -> tuple[int, int, int]:
    """B, L and T of an estimate."""
    return p.batch or BATCH, p.length or LENGTH, p.tokens or 1


def _weight_bytes(p: LatentProblem) -> float:
    bits = 8 * p.dtype.itemsize if p.scheme is None else bits_per_weight(p.scheme)
    return p.rows * p.rank * bits / 8


def _cache_bytes(p: LatentProblem) -> float:
    batch, length, _ = sizes(p)
    return batch * length * (p.rank + p.rope) * (1 if p.codes else p.dtype.itemsize)


LATENT_FORMS = (LatentForm(WRITTEN, written), LatentForm(ABSORBED, absorbed))
