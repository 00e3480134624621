"""What MoE kernels share: which expert has which rows, the sum over a token's experts, and the cost of a block.

Reads routed ids as the model gives them. Nothing here waits for a GPU, and no shape depends on what ids hold, so all of it
can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.kernels._roofline import roof
from quant_compile.lowering.target import Target


@dataclass(frozen=True)
class Groups:
    """The T * k chosen pairs (token, expert) in the order of their experts, dropped pairs last.

    Attributes:
        pairs: [T * k] int64: row r of the sorted order is pair ``pairs[r]``, which is token ``pairs[r] // k``.
        ends: [E] int32: rows of expert e end before row ``ends[e]``; the last is the number of pairs that count.
        experts: [T * k] integers: the expert of each row; E for dropped pairs.
    """

    pairs: Tensor
    ends: Tensor
    experts: Tensor


def group_pairs(ids: Tensor, experts: int) -> Groups:
    """Sort pairs by expert, in order of tokens within one; ids outside of 0..E-1 are dropped."""
    # Short keys sort in few passes. -1 modulo E + 1 is E, so that everything unknown becomes E.
    keys = torch.int16 if experts < 2**15 - 1 else torch.int64
    known = ids.reshape(-1).long().clamp(-1, experts).to(keys).remainder(experts + 1)
    ordered, pairs = known.sort(stable=True)
    every = torch.arange(experts, device=ids.device, dtype=keys)
    return Groups(pairs, torch.searchsorted(ordered, every, right=True, out_int32=True), ordered)


def weigh_and_sum(rows: Tensor, groups: Groups, weights: Tensor | None, shape: tuple[int, int], experts: int) -> Tensor:
    """Outputs in sorted order [T * k, n] -> [T, n] of the same dtype: times their weights, summed over k in f32.

    Args:
        shape: (T, k).
        weights: [T, k] or None. Rows of dropped pairs may hold anything, NaN included.
    """
    by_pair = torch.empty_like(rows, dtype=torch.float32)
    out = rows.float()
    if weights is not None:
        out = out * weights.reshape(-1)[groups.pairs].unsqueeze(-1).float()
    by_pair[groups.pairs] = torch.where((groups.experts < experts).unsqueeze(-1), out, 0.0)
    return by_pair.view(*shape, -1).sum(1).to(rows.dtype)


def chosen_experts(problem: MoeProblem, tokens: int) -> float:
    """Expected number of different experts of so many tokens that choose evenly; at least 1."""
    left_out = 1.0 - min(1.0, problem.top_k / problem.experts)
    return max(1.0, problem.experts * (1.0 - left_out**tokens))


def estimate_moe(
    problem: MoeProblem,
    tokens: int,
    target: Target,
    efficiency: float,
    *,
    math_bits: int = 8,
    bandwidth_efficiency: float = 0.85,
    tile_m: int = 1,
    launches: int = 4,
    extra_bytes: float = 0.0,
) -> float:
    """Estimated microseconds of a block, in the terms of ``_roofline.estimate``; routing is taken to be even.

    Args:
        tile_m: rows of one expert that the kernel computes at a time; a partly filled tile costs a whole one.
        extra_bytes: traffic besides weights, tokens, the hidden layer and the result (copies of gathered rows, say).
    """
    limits = roof(target)
    chosen, pairs = chosen_experts(problem, tokens), tokens * problem.top_k
    elements = 3.0 * problem.hidden * problem.intermediate
    activations = tokens * problem.hidden * 4 + pairs * (2 * problem.intermediate * 2 + problem.hidden * 2)
    moved = chosen * elements * problem.bits_per_weight / 8 + activations + extra_bytes
    tiles = max(1.0, pairs / chosen / tile_m)
    rows = chosen * tile_m * (tiles if tiles > 8 else -(-tiles // 1))
    peak = limits.math8 if math_bits <= 8 else limits.math16
    math = 2.0 * rows * elements / (peak * efficiency)
    return limits.launch * launches + max(moved / (limits.bandwidth * bandwidth_efficiency), math)
