"""What the fused expert blocks of Triton share, whatever their scheme: plans as data, the steps around the two products, launches.

A block runs in one of two forms. The *grouped* form serves any number of tokens: pairs (token, expert) are sorted by expert and cut
into blocks (``align``), multiplied twice, and added (``add``). The *decode* form serves few pairs, in two kernels that stream the
chosen experts' rows. A kernel file brings its plans and its products; ``grouped`` and ``decode`` make runs of them. Steps can be
called apart. Triton sources are imported at the first launch, so that kernels can be read and asked on machines without triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.numerics import FLOAT_DTYPES, FLOAT_MAX
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._launch import ceil, pow2, target_of, triton_type
from quant_compile.lowering.kernels._roofline import roof
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target

DTYPES = (torch.bfloat16, torch.float16)
# Pairs up to which align counts experts in the kernel that places them.
COUNT_PAIRS = 256
# Pairs up to which the decode form serves: each of them reads its expert again, from L2 at best.
DECODE_PAIRS = 64
MAGIC = 0x4B000000  # 2**23 as f32 bits


# --- plans ---


@dataclass(frozen=True)
class Tiles:
    """How one of the two products is cut up.

    Attributes:
        block_m: pairs per program, a power of two from 16 up; the same in both products.
        block_n: rows of the weight per program (gated: as many gate and as many up rows).
        block_k: inputs per step; at most the size of a group of scales.
        warps: warps per program.
        stages: depth of the load pipeline.
        band: blocks of pairs that are walked together, tile by tile.
        tma: load weights through tensor descriptors (sm90 and newer), where their rows are a multiple of 16 bytes.
        joined: FP4 (``triton_moe4``): one product over all columns of a step instead of one for each place in a word, the same
            in both products.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    band: int = 8
    tma: bool = False
    joined: bool = False


@dataclass(frozen=True)
class Plan:
    """Both products of the grouped form."""

    first: Tiles
    second: Tiles

    @property
    def block_m(self) -> int:
        """Pairs per program."""
        return self.first.block_m


@dataclass(frozen=True)
class Rows:
    """How one of the two products of the decode form is cut up.

    Attributes:
        block_n: rows of the weight per program (gated: as many gate and as many up rows), a power of two up to 16.
        block_k: inputs per step, for each expert of the program; a multiple of the group of scales.
        warps: warps per program.
    """

    block_n: int
    block_k: int
    warps: int


@dataclass(frozen=True)
class DecodePlan:
    """Both products of the decode form.

    Attributes:
        early: the second kernel starts while the first runs and fetches its first weights (programmatic dependent launch,
            sm90 and newer).
    """

    first: Rows
    second: Rows
    early: bool = False


@dataclass(frozen=True)
class Pairs:
    """(token, expert) pairs sorted by expert and cut into blocks of one expert each.

    Attributes:
        order: [T * k] i32; pair numbers t * k + j, expert by expert. Pairs with an illegal id are left out, at the end.
        blocks: [3, most] i32: expert, first place in ``order``, number of pairs; unused blocks have 0 pairs.
    """

    order: Tensor
    blocks: Tensor


# --- launches ---


@lru_cache(maxsize=None)
def source(name: str) -> Any:
    """A file of Triton source of this folder."""
    return import_module(f"{__package__}.{name}")


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether Triton interprets its kernels."""
    return "Interpreted" in type(source("_triton_frame").sum_kernel).__name__


def scale_strides(x: Planes) -> tuple[int, int]:
    """Strides of an input's scales along rows and groups; 0 where all share one, or there is none."""
    if len(x) == 1 or x[1].numel() == 1:
        return 0, 0
    return x[1].stride(0), x[1].stride(1)


def activation_constants(activation: Activation) -> dict[str, Any]:
    """What ``_activate`` of the Triton source takes."""
    limit = None if activation.limit == float("inf") else float(activation.limit)
    return {"KIND": activation.kind, "ALPHA": activation.alpha, "LIMIT": limit, "SHIFT": activation.shift}


def code_of(scheme: Scheme) -> tuple[float, torch.dtype]:
    """(largest code, dtype of codes) of a scheme's inputs."""
    a = scheme.input_activations
    if a is None or a.type == "int":
        return 127.0, torch.int8
    return FLOAT_MAX[a.format or "e4m3"], FLOAT_DTYPES[a.format or "e4m3"]


# --- steps of the grouped form ---


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Blocks that any distribution of pairs over experts can need."""
    return min(pairs, pairs // block_m + min(experts, pairs))


def align(ids: Tensor, experts: int, block_m: int) -> Pairs:
    """ids [T, k], any integers, contiguous -> pairs by expert. Ids outside of 0..experts-1 are dropped."""
    pairs = ids.numel()
    most = most_blocks(pairs, experts, block_m)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    blocks = torch.empty((3, most), dtype=torch.int32, device=ids.device)
    chunk = min(4096, max(128, pow2(pairs)))
    warps = 8 if pairs > COUNT_PAIRS else 4
    counts = None
    if pairs > COUNT_PAIRS:
        counts = torch.empty(experts, dtype=torch.int32, device=ids.device)
        source("_triton_frame").count_kernel[(experts,)](ids, counts, pairs, CHUNK=chunk, num_warps=warps)
    columns = max(16, pow2(experts))
    source("_triton_frame").align_kernel[(experts,)](
        ids, counts, order, blocks, pairs, most, experts,
        EXPERTS=columns, BLOCK_M=block_m, CHUNK=chunk, ROWS=max(1, 8192 // columns), num_warps=warps,
    )  # fmt: skip
    return Pairs(order, blocks)


def add(parts: Tensor, ids: Tensor, weights: Tensor | None, problem: MoeProblem) -> Tensor:
    """y[t] = sum_j weights[t, j] * parts[t k + j] over legal ids, in f32 -> [T, H] of the problem's dtype."""
    tokens, top_k = ids.shape
    y = torch.empty((tokens, problem.hidden), dtype=problem.dtype, device=parts.device)
    block = min(1024, pow2(problem.hidden))
    source("_triton_frame").sum_kernel[(tokens, ceil(problem.hidden, block))](
        parts, ids, weights, y, problem.hidden, top_k, problem.experts, TOP_K=pow2(top_k), BLOCK=block, num_warps=4
    )
    return y


class HasBlocks(Protocol):
    """A plan of the grouped form."""

    @property
    def block_m(self) -> int:
        """Pairs per program of both products."""
        ...


Choose = Callable[[MoeProblem, int, Target], Any]
Products = Callable[
    [Planes, Pairs, Planes, Tensor | None, Planes, Tensor | None, Tensor | None, MoeProblem, Any], Tensor
]
"""(x, pairs, w13, b13, w2, b2, scale2, problem, plan) -> parts for ``add``."""


def grouped(plan: Choose, products: Products) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``run`` and ``launch`` of the grouped form, from its plan for so many tokens and its two products.

    ``run`` is that of ``MoeKernel``; ``launch`` takes the plan as a last argument, ``chosen``.
    """

    def launch(
        x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
        scale2: Tensor | None, problem: MoeProblem, chosen: HasBlocks,
    ) -> Tensor:  # fmt: skip
        """One plan over any number of tokens [T, H] -> [T, H]."""
        ids = ids.contiguous()
        pairs = align(ids, problem.experts, chosen.block_m)
        parts = products(x, pairs, w13, b13, w2, b2, scale2, problem, chosen)
        return add(parts, ids, weights if weights is None else weights.contiguous(), problem)

    def run(
        x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
        scale2: Tensor | None, problem: MoeProblem,
    ) -> Tensor:  # fmt: skip
        """The block for any number of tokens [T, H] -> [T, H]; arguments as for ``MoeKernel.run``."""
        chosen = plan(problem, ids.shape[0], target_of(ids.device))
        return launch(x, ids, weights, w13, b13, w2, b2, scale2, problem, chosen)

    return run, launch


# --- steps of the decode form ---


def hidden_rows(ids: Tensor, problem: MoeProblem, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Room for what the first kernel writes: the hidden layer [T k, I], and the largest magnitudes [T k, I / block_n] of its parts
    where the scheme needs one scale per row."""
    pairs, p = ids.numel(), problem
    y = torch.empty((pairs, p.intermediate), dtype=p.dtype, device=ids.device)
    if not _needs_amax(p.scheme):
        return y, None
    return y, torch.empty((pairs, p.intermediate // rows.block_n), dtype=torch.float32, device=ids.device)


def _needs_amax(scheme: Scheme) -> bool:
    a = scheme.input_activations
    return a is not None and a.dynamic and a.group_size is None


def down_arguments(hidden: Planes, problem: MoeProblem) -> tuple[Tensor | None, int, dict[str, Any]]:
    """(largest magnitudes of the hidden layer, their number for each row, constants) for the second kernel."""
    amax = hidden[1] if len(hidden) > 1 else None
    parts = amax.shape[1] if amax is not None else 1
    limit, code = code_of(problem.scheme)
    constants = {
        "TOP_K": pow2(problem.top_k),
        "PARTS": pow2(parts),
        "QUANTIZE": limit if problem.scheme.input_activations is not None else 0.0,
        "CODE": triton_type(code),
        "OUT": triton_type(problem.dtype),
    }
    return amax, parts, constants


def decode(
    plan: Callable[[MoeProblem, Target], DecodePlan],
    gated_rows: Callable[..., Planes],
    down_rows: Callable[..., Tensor],
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``run_decode`` and ``launch_decode`` of the decode form, from its plan and its two kernels; as ``grouped`` for the other."""

    def launch_decode(
        x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
        scale2: Tensor | None, problem: MoeProblem, chosen: DecodePlan,
    ) -> Tensor:  # fmt: skip
        """One plan over few tokens [T, H] -> [T, H]."""
        ids = ids.contiguous()
        weights = weights if weights is None else weights.contiguous()
        early = chosen.early and not interpreted()
        hidden = gated_rows(x, ids, w13, b13, problem, chosen.first, early)
        return down_rows(hidden, ids, weights, w2, b2, scale2, problem, chosen.second, early)

    def run_decode(
        x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
        scale2: Tensor | None, problem: MoeProblem,
    ) -> Tensor:  # fmt: skip
        """The block for few tokens [T, H] -> [T, H]; arguments as for ``MoeKernel.run``."""
        chosen = plan(problem, target_of(ids.device))
        return launch_decode(x, ids, weights, w13, b13, w2, b2, scale2, problem, chosen)

    return run_decode, launch_decode


# --- choice ---


def warps_of(bits: int) -> int:
    """Warps whose threads hold 16 bytes of a step each, at most 8."""
    return max(1, min(8, bits // (32 * 128)))


def reject_block(problem: MoeProblem, target: Target, oldest: int) -> Reject | None:
    """What Triton's blocks refuse of any scheme; ``oldest`` is the first arch that multiplies it."""
    if target.device != "cuda":
        return Reject("needs a CUDA GPU")
    if not target.has("triton"):
        return Reject("triton is not installed")
    if target.arch < oldest:
        return Reject(f"{family_of(problem.scheme).name} needs sm{oldest} or newer, this is {target.label}")
    if problem.dtype not in DTYPES:
        return Reject(f"dtype must be bfloat16 or float16, got {problem.dtype}")
    for name, size in (("hidden", problem.hidden), ("intermediate", problem.intermediate)):
        if size % 16:
            return Reject(f"{name} size must be a multiple of 16, got {size}")
    return None


def active_experts(problem: MoeProblem, tokens: int) -> float:
    """Experts that some token chooses, on average over uniform choices."""
    return problem.experts * (1.0 - (1.0 - 1.0 / problem.experts) ** (tokens * problem.top_k))


def grouped_rank(
    problem: MoeProblem, tokens: int, target: Target, block_m: int, *,
    between: float, launches: int, efficiency: float, bandwidth_efficiency: float,
) -> Rank:  # fmt: skip
    """Estimated cost of the grouped form.

    Args:
        between: bytes written and read besides weights.
        efficiency: of tensor cores; partly filled blocks count as whole ones.
    """
    limits, p = roof(target), problem
    pairs, cells = tokens * p.top_k, 3.0 * p.hidden * p.intermediate
    active = active_experts(p, tokens)
    weights = active * cells * p.bits_per_weight / 8
    peak = limits.math8 if p.scheme.input_activations is not None else limits.math16
    rows = max(pairs + active * block_m / 2, active * block_m)
    math = 2.0 * rows * cells / (peak * efficiency)
    launches += pairs > COUNT_PAIRS
    return Rank(limits.launch * launches + max((weights + between) / (limits.bandwidth * bandwidth_efficiency), math))


def few_pairs(problem: MoeProblem, tokens: int) -> Reject | None:
    """Refusal of more pairs than the decode form serves."""
    pairs = tokens * problem.top_k
    if pairs > DECODE_PAIRS:
        return Reject(f"serves at most {DECODE_PAIRS} pairs of a token and an expert, got {pairs}")
    return None


def decode_bytes(problem: MoeProblem, tokens: int) -> float:
    """Bytes of weights that the decode form reads. Pairs that share an expert read it anew: measured, 16 tokens on 8 experts take
    as long as 32 experts would."""
    cells = 3.0 * problem.hidden * problem.intermediate
    return tokens * problem.top_k * cells * problem.bits_per_weight / 8
