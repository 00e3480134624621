"""4-bit weights under 8-bit inputs in Triton: W4A8 (int8, sm80), W4AFP8 (e4m3, sm89) and both QServe forms; any n and k.

``triton_w4a8`` runs any number of tokens on 8-bit tensor cores, ``triton_w4a8_gemv`` a few on dp4a (int8 inputs). Both
read row-form planes as they are ("rows"). The Triton source, in ``_triton_w4a8``, is imported at the
first launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._launch import ceil, pow2, target_of, triton_type
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import aligned, enqueue, rows_of

GEMV_ROWS = 8
GEMV_TOKENS = 4  # tokens of one program
LEAST_GROUP = 64  # tensor cores take 32 codes at a time, and a step is half a group: its first or its second codes
STEP_PAIRS = 64
LARGEST_K = 131072  # 16 * 8 * 127 * k must stay within int32 where one sum runs over all of k
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Config:
    """How ``triton_w4a8`` cuts a launch up.

    Attributes:
        block_m: tokens per program, 8 to 128.
        block_n: rows of w per program.
        warps: warps per program.
        stages: depth of the load pipeline.
        split: programs that share one tile's k; above 1 a second kernel adds their parts.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    split: int = 1


def float8(scheme: Scheme) -> bool:
    """Whether inputs are e4m3."""
    return scheme.input_activations is not None and scheme.input_activations.type == "float"


def step_pairs(scheme: Scheme) -> int:
    """Pairs of k that one step multiplies: never beyond a group."""
    return min(STEP_PAIRS, (scheme.weights.group_size or 2 * STEP_PAIRS) // 2)


def config(problem: Problem, m: int, target: Target) -> Config:
    """How ``triton_w4a8`` runs m tokens on ``target``, without measurement; tiles as measured on an H200."""
    if m > 64:
        warps = 8 if target.arch >= 90 else 4
        wide = m > 128 and target.arch >= 90 and float8(problem.scheme)
        return Config(128 if wide else 64, 128, warps, 3)
    # Below 16 columns sm90 and sm100 would multiply e4m3 as f16 on the older tensor core instruction.
    block_m = max(16 if float8(problem.scheme) else 8, pow2(m))
    # Scales and zero points of QServe's groups are loads of single bytes, fewer in wide tiles.
    few = block_m <= 32 and problem.scheme.weights.strategy != "channel_group"
    block_n = 64 if few else 128
    tiles, steps = ceil(problem.n, block_n), ceil(problem.k, 2 * step_pairs(problem.scheme))
    split = 1
    while tiles * split < (2.0 if few else 1.5) * target.sm_count and steps >= 16 * split:
        split *= 2
    return Config(block_m, block_n, 4, 4 if block_m <= 32 else 3, split)


# --- fit ---


def _reject(problem: Problem, target: Target) -> Reject | None:
    if target.device != "cuda":
        return Reject("needs a CUDA GPU")
    if not target.has("triton"):
        return Reject("triton is not installed")
    if family_of(problem.scheme).name not in ("w4a8", "qserve"):
        return Reject(f"multiplies 8-bit inputs by 4-bit weights, not {problem.scheme.spec}")
    oldest = 89 if float8(problem.scheme) else 80
    if target.arch < oldest:
        return Reject(f"{'e4m3' if oldest == 89 else 'int8'} inputs need sm{oldest} or newer, this is {target.label}")
    if problem.dtype not in DTYPES:
        return Reject(f"output dtype must be bfloat16, float16 or float32, got {problem.dtype}")
    if problem.k > LARGEST_K:
        return Reject(f"k must be at most {LARGEST_K} for sums in int32, got {problem.k}")
    return None


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m, n and k; int8 inputs from sm80, e4m3 from sm89; groups of at least 64."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    group = problem.scheme.weights.group_size
    if group is not None and group < LEAST_GROUP:
        return Reject(f"groups must have at least {LEAST_GROUP} columns, got {group}")
    plan = config(problem, m, target)
    extra = 8.0 * plan.split * m * problem.n if plan.split > 1 else 0.0
    bits = bits_per_weight(problem.scheme)
    return Rank(
        estimate(
            problem, m, target, 0.3, bits, bandwidth_efficiency=0.55, tile_m=plan.block_m,
            launches=2 if plan.split > 1 else 1, extra_bytes=extra,
        )
    )  # fmt: skip


def fit_gemv(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Up to eight tokens of int8, k a multiple of 8."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    if float8(problem.scheme):
        return Reject("dp4a multiplies int8 inputs only")
    if m > GEMV_ROWS:
        return Reject(f"serves at most {GEMV_ROWS} tokens, got {m}")
    if problem.k % 8:
        return Reject(f"k must be a multiple of 8, got {problem.k}")
    # Bound by ordinary cores: about an instruction a weight, four codes multiplied by one more for each token.
    cost = estimate(problem, m, target, 1 / 50, bits_per_weight(problem.scheme), bandwidth_efficiency=0.85)
    return Rank(cost)


# --- run ---


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.w4a8._triton_w4a8")


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    return "Interpreted" in type(_source().gemv_kernel).__name__


def _whole_words(x: Tensor, size: int) -> Tensor:
    """8-bit codes [m, k], k padded with zeros to whole words of ``size`` bytes, which lie where words may."""
    spare = -x.shape[1] % size
    codes = pad(x.view(torch.int8), (0, spare)) if spare else x.contiguous()
    return codes if aligned(codes, size) else codes.clone()


def _sx_row(x: Planes) -> int:
    return 0 if x[1].numel() == 1 else x[1].stride(0)


@dataclass(frozen=True)
class _Weight:
    """What scales and offsets the sums of a weight's codes; None where a scheme has no such plane.

    Attributes:
        scale: of rows, [n, 1].
        group_scale: [n, groups].
        zero: zero points [n, groups] under an integer group_scale, else [n, 1] beside the tokens' ``total``.
        total: each token's sum of codes [m, 1].
    """

    scale: Tensor | None
    group_scale: Tensor | None
    zero: Tensor | None = None
    total: Tensor | None = None

    @property
    def groups(self) -> int:
        return 1 if self.group_scale is None else self.group_scale.shape[1]


def _weight(x: Planes, w: Planes, scheme: Scheme) -> _Weight:
    if scheme.weights.strategy == "channel_group":
        return _Weight(w[1], w[2], w[3])
    if family_of(scheme).name == "qserve":
        return _Weight(w[1], None, w[2], x[2] if x else None)
    return _Weight(w[1], None) if scheme.weights.group_size is None else _Weight(None, w[1])


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """y [m, n] of ``problem.dtype`` from x codes [m, k] int8 or e4m3 and w nibbles [n, ceil(k/2)] u8.

    Formula: sums of codes per group times the group's scale (QServe: integers across all of k), times x scale, plus
    bias. Source: the family's ``linear``.
    """
    return launch(x, w, bias, problem, config(problem, rows_of(x[0]), target_of(x[0].device)))


def launch(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: Config) -> Tensor:
    """Run one plan; arguments and result as for ``run``."""
    scheme, m, n = problem.scheme, x[0].shape[0], problem.n
    words, step = _whole_words(x[0], 2), step_pairs(problem.scheme)
    pairs = words.shape[1] // 2
    planes = _weight(x, w, scheme)
    steps = ceil(ceil(pairs, step), plan.split)
    split = ceil(ceil(pairs, step), steps)
    y = torch.empty((m, n), dtype=problem.dtype, device=words.device)
    out = y if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=words.device)
    enqueue(
        _source().tile_kernel, (ceil(n, plan.block_n) * ceil(m, plan.block_m), split),
        words, w[0], x[1], planes.scale, planes.group_scale, planes.zero, planes.total, bias if split == 1 else None, out,
        m, n, pairs, planes.groups, _sx_row(x), steps,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, STEP=step, PAIRS_PER_GROUP=(scheme.weights.group_size or 0) // 2,
        FLOAT8=float8(scheme), PROGRESSIVE=scheme.weights.strategy == "channel_group", SPLIT=min(split, 2),
        EVEN=pairs % step == 0, ASM=not _interpreted(),
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return y if split == 1 else _sum_parts(out, bias, y)


def _sum_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """f32 parts [split, m, n] added in order, plus bias -> y [m, n]."""
    kernel = import_module("quant_compile.lowering.kernels.weight_only._triton_w4a16").sum_parts_kernel
    enqueue(
        kernel,
        (ceil(y.numel(), 1024),),
        parts,
        None,
        bias,
        y,
        y.numel(),
        y.shape[1],
        parts.shape[0],
        BLOCK=1024,
        OUT=triton_type(y.dtype),
        num_warps=4,
    )
    return y


def gemv_tokens(problem: Problem, m: int, target: Target | None = None) -> int:
    """Rows of x of a program of ``triton_w4a8_gemv``."""
    return min(GEMV_TOKENS, pow2(m))


def gemv_config(problem: Problem, tokens: int) -> tuple[int, int, int]:
    """(rows of w, words of eight codes, warps) of a program of ``triton_w4a8_gemv``, as measured on an H200."""
    words = problem.k // 8
    block = 256 if words % 256 == 0 or words > 1024 else 128
    return 4, block, block // 128 if tokens == 1 else 1


def run_gemv(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """As ``run``, for at most eight tokens of int8 and k in whole words."""
    scheme, m, n = problem.scheme, x[0].shape[0], problem.n
    codes, weights = _whole_words(x[0], 8), w[0]
    words = weights.shape[1] // 4
    planes = _weight(x, w, scheme)
    y = torch.empty((m, n), dtype=problem.dtype, device=codes.device)
    tokens = gemv_tokens(problem, rows_of(x[0]))
    block_n, block_k, warps = gemv_config(problem, tokens)
    enqueue(
        _source().gemv_kernel, (ceil(n, block_n), ceil(m, tokens)),
        codes, weights, x[1], planes.scale, planes.group_scale, planes.zero, planes.total, bias, y,
        m, n, words, planes.groups, _sx_row(x),
        M=tokens, BLOCK_N=block_n, BLOCK_K=block_k, WORDS_PER_GROUP=(scheme.weights.group_size or 0) // 8,
        PROGRESSIVE=scheme.weights.strategy == "channel_group", EVEN=words % block_k == 0, ASM=not _interpreted(), num_warps=warps,
    )  # fmt: skip
    return y


def decode(w: Planes, problem: Problem) -> tuple[Tensor, Tensor]:
    """A weight whose levels are integers under a row's scale -> (levels [n, k] int8, scale [n, 1] f32), exactly."""
    planes = _weight((), w, problem.scheme)
    levels = torch.empty((problem.n, problem.k), dtype=torch.int8, device=w[0].device)
    scale = torch.empty((problem.n, 1), dtype=torch.float32, device=w[0].device)
    groups = 1 if planes.zero is None else planes.zero.shape[1]
    _decode(w[0], planes.scale, planes.group_scale, planes.zero, levels, scale, groups, problem)
    return levels, scale


def dequantize(w: Planes, problem: Problem) -> Tensor:
    """Row-form int4 weights, symmetric or not -> [n, k] in the problem's dtype, each weight rounded once."""
    out = torch.empty((problem.n, problem.k), dtype=problem.dtype, device=w[0].device)
    _decode(w[0], None, w[1], w[2] if len(w) > 2 else None, out, None, w[1].shape[1], problem)
    return out


def _decode(
    data: Tensor, row_scale: Tensor | None, group_scale: Tensor | None, zero: Tensor | None,
    out: Tensor, scale: Tensor | None, groups: int, problem: Problem,
) -> None:  # fmt: skip
    group, width = (problem.scheme.weights.group_size or 0) // 2, data.shape[1]
    block_n, bytes_ = 8, max(256, pow2(group))
    enqueue(
        _source().decode_kernel, (ceil(problem.n, block_n), ceil(width, bytes_)),
        data, row_scale, group_scale, zero, out, scale, problem.n, problem.k, width, groups,
        BLOCK_N=block_n, BYTES=bytes_, BYTES_PER_GROUP=group, NIBBLES=scale is None, num_warps=4,
    )  # fmt: skip


KERNELS = (
    Kernel("triton_w4a8", "rows", fit, run, recorded=config),
    Kernel("triton_w4a8_gemv", "rows", fit_gemv, run_gemv, recorded=gemv_tokens),
)
