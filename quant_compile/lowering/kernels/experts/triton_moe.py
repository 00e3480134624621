"""Fused mixture-of-experts blocks in Triton, from planes in row form with a leading expert ("experts").

Two kernels of the registry: ``triton_moe_decode`` for few (token, expert) pairs, which streams the chosen experts' rows,
and ``triton_moe`` for any number of tokens, which sorts pairs by expert and multiplies blocks of them. The steps of a
block can be called apart: ``align``, ``first``, ``quantize``, ``second``, ``add``. The Triton source, in ``_triton_moe``,
is imported at the first launch, so that this file can be read and asked on machines without triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import gcd
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.numerics import FLOAT_DTYPES, FLOAT_MAX
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._roofline import roof, shared_memory
from quant_compile.lowering.moe import MoeKernel
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target

OLDEST = {"fp8": 89, "fp8_block": 89, "int8": 80, "weight_only": 80}
DTYPES = (torch.bfloat16, torch.float16)
# sm90's fp8 sum keeps about 14 bits; its error grows like sqrt(k) and passes bf16's own rounding near this k.
IMPRECISE_K = 8192
# Pairs up to which align counts experts in the kernel that places them.
COUNT_PAIRS = 256
# Pairs up to which the decode form serves: each of them reads its expert again, from L2 at best.
DECODE_PAIRS = 64
MAGIC = 0x4B000000  # 2**23 as f32 bits


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


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.experts._triton_moe")


def _ceil(size: int, block: int) -> int:
    return (size + block - 1) // block


def _pow2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _target(device: torch.device) -> Target:
    """The launch's device; the interpreter, which runs on CPU tensors, plays an sm90."""
    return Target.of(device) if device.type == "cuda" else Target.fake("sm90")


def groups(scheme: Scheme) -> tuple[int, int]:
    """(rows, columns) of a weight that share a scale inside of a sum; (0, 0) when scales are per row."""
    if scheme.weights.group_size is not None:
        return 1, scheme.weights.group_size
    return scheme.weights.block_structure or (0, 0)


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Blocks that any distribution of pairs over experts can need."""
    return min(pairs, pairs // block_m + min(experts, pairs))


# --- steps of the grouped form ---


def align(ids: Tensor, experts: int, block_m: int) -> Pairs:
    """ids [T, k], any integers, contiguous -> pairs by expert. Ids outside of 0..experts-1 are dropped."""
    pairs = ids.numel()
    most = most_blocks(pairs, experts, block_m)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    blocks = torch.empty((3, most), dtype=torch.int32, device=ids.device)
    chunk = min(4096, max(128, _pow2(pairs)))
    warps = 8 if pairs > COUNT_PAIRS else 4
    counts = None
    if pairs > COUNT_PAIRS:
        counts = torch.empty(experts, dtype=torch.int32, device=ids.device)
        _source().count_kernel[(experts,)](ids, counts, pairs, CHUNK=chunk, num_warps=warps)
    columns = max(16, _pow2(experts))
    _source().align_kernel[(experts,)](
        ids, counts, order, blocks, pairs, most, experts,
        EXPERTS=columns, BLOCK_M=block_m, CHUNK=chunk, ROWS=max(1, 8192 // columns), num_warps=warps,
    )  # fmt: skip
    return Pairs(order, blocks)


def first(
    x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, scale2: Tensor | None, problem: MoeProblem, tiles: Tiles
) -> Planes:
    """Hidden layer act(x[token] @ w13[e].T + b13[e]) in the order of ``pairs``.

    Returns:
        ([T k, I] of the problem's dtype,), or its codes and scale where they come at no cost (static scales; groups of
        ``tiles.block_n``).
    """
    p = problem
    device, size = x[0].device, pairs.order.numel()
    limit, code, group = 0.0, p.dtype, 0
    if fuses(p.scheme, tiles.block_n):
        limit, code = code_of(p.scheme)
        group = 0 if p.scheme.static else tiles.block_n
    y = torch.empty((size, p.intermediate), dtype=code, device=device)
    sy = torch.empty((size, _ceil(p.intermediate, group)), dtype=torch.float32, device=device) if group else None
    static = scale2 if limit and p.scheme.static else None
    _launch(x, pairs, w13, b13, static, y, sy, limit, p, tiles, gated=True)
    if not limit:
        return (y,)
    return (y, sy) if sy is not None else (y, static if static is not None else x[1])


def quantize(hidden: Tensor, problem: MoeProblem) -> Planes:
    """[rows, I] -> codes and scale [rows, 1 or groups], as the scheme's ``quantize_input`` without a calibrated scale."""
    limit, code = code_of(problem.scheme)
    a = problem.scheme.input_activations
    group = (a.group_size if a is not None else None) or 0
    rows, n = hidden.shape
    codes = torch.empty((rows, n), dtype=code, device=hidden.device)
    scale = torch.empty((rows, _ceil(n, group) if group else 1), dtype=torch.float32, device=hidden.device)
    block = max(_pow2(n), group, 16)
    _source().quantize_kernel[(rows,)](
        hidden, codes, scale, n, BLOCK=block, GROUP=group, LIMIT=limit, num_warps=min(8, max(1, block // 512))
    )
    return codes, scale


def second(hidden: Planes, pairs: Pairs, w2: Planes, b2: Tensor | None, problem: MoeProblem, tiles: Tiles) -> Tensor:
    """hidden @ w2[e].T + b2[e] as [T k, H] of the problem's dtype, in the order of the pairs; illegal pairs stay unset."""
    y = torch.empty((pairs.order.numel(), problem.hidden), dtype=problem.dtype, device=hidden[0].device)
    _launch(hidden, pairs, w2, b2, None, y, None, 0.0, problem, tiles, gated=False)
    return y


def add(parts: Tensor, ids: Tensor, weights: Tensor | None, problem: MoeProblem) -> Tensor:
    """y[t] = sum_j weights[t, j] * parts[t k + j] over legal ids, in f32 -> [T, H] of the problem's dtype."""
    tokens, top_k = ids.shape
    y = torch.empty((tokens, problem.hidden), dtype=problem.dtype, device=parts.device)
    block = min(1024, _pow2(problem.hidden))
    _source().sum_kernel[(tokens, _ceil(problem.hidden, block))](
        parts, ids, weights, y, problem.hidden, top_k, problem.experts, TOP_K=_pow2(top_k), BLOCK=block, num_warps=4
    )
    return y


def code_of(scheme: Scheme) -> tuple[float, torch.dtype]:
    """(largest code, dtype of codes) of a scheme's inputs."""
    a = scheme.input_activations
    if a is None or a.type == "int":
        return 127.0, torch.int8
    return FLOAT_MAX[a.format or "e4m3"], FLOAT_DTYPES[a.format or "e4m3"]


def fuses(scheme: Scheme, block_n: int) -> bool:
    """Whether the first product can quantize its own tile."""
    a = scheme.input_activations
    return a is not None and (scheme.static or a.group_size == block_n)


def _scale_strides(x: Planes) -> tuple[int, int]:
    if len(x) == 1 or x[1].numel() == 1:
        return 0, 0
    return x[1].stride(0), x[1].stride(1)


def _activation(activation: Activation) -> dict[str, Any]:
    limit = None if activation.limit == float("inf") else float(activation.limit)
    return {"KIND": activation.kind, "ALPHA": activation.alpha, "LIMIT": limit, "SHIFT": activation.shift}


def _type(dtype: torch.dtype) -> Any:
    language = import_module("triton.language")
    return getattr(language, _TYPES[dtype])


_TYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8e4nv",
    torch.float8_e5m2: "float8e5",
}


def _launch(
    x: Planes, pairs: Pairs, w: Planes, bias: Tensor | None, scale2: Tensor | None, y: Tensor, sy: Tensor | None,
    limit: float, problem: MoeProblem, tiles: Tiles, gated: bool,
) -> None:  # fmt: skip
    """One product of the grouped form."""
    scheme = problem.scheme
    n, k = (problem.intermediate, problem.hidden) if gated else (problem.hidden, problem.intermediate)
    group_n, group_k = groups(scheme)
    w4 = scheme.weights.num_bits == 4
    zero = w[2] if w4 and not scheme.weights.symmetric else None
    most = pairs.blocks.shape[1]
    promote = scheme.weights.type == "float" and not group_k and k > IMPRECISE_K
    tma = tiles.tma and w[0].shape[-1] % 16 == 0  # one byte per element, rows must begin at 16 bytes
    _source().grouped_kernel[(most * _ceil(n, tiles.block_n),)](
        x[0], _descriptor(w[0], tiles) if tma else w[0], x[1] if len(x) > 1 else None, w[1], zero, bias, scale2, y, sy,
        pairs.order, pairs.blocks, most, n, k, w[0].shape[-1], problem.top_k, *_scale_strides(x), w[1].stride(0), w[1].stride(1),
        zero.stride(0) if zero is not None else 0, zero.stride(1) if zero is not None else 0,
        GATED=gated, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BAND=tiles.band,
        EVEN_K=k % tiles.block_k == 0, TMA=tma, W4=w4, GROUP_K=group_k, GROUP_N=group_n, PROMOTE=promote,
        QUANTIZE=limit, **_activation(problem.activation), OUT=_type(problem.dtype),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _descriptor(data: Tensor, tiles: Tiles) -> Any:
    """Tensor descriptor of all experts' rows; two 4-bit codes are one element."""
    descriptor = import_module("triton.tools.tensor_descriptor").TensorDescriptor
    block = [tiles.block_n, tiles.block_k // (2 if data.dtype == torch.uint8 else 1)]
    return descriptor.from_tensor(data.view(-1, data.shape[-1]), block)


# --- steps of the decode form ---


def gated_rows(
    x: Planes, ids: Tensor, w13: Planes, b13: Tensor | None, problem: MoeProblem, rows: Rows, early: bool = False
) -> Planes:
    """Hidden layer of each pair, unsorted: ([T k, I],), then the largest magnitude of each ``rows.block_n`` values
    [T k, I / block_n] f32 where the scheme needs one scale per row. ``early``: the next kernel may start at once."""
    p, early = problem, early and not _interpreted()
    pairs, parts = ids.numel(), p.intermediate // rows.block_n
    y = torch.empty((pairs, p.intermediate), dtype=p.dtype, device=ids.device)
    amax = torch.empty((pairs, parts), dtype=torch.float32, device=ids.device) if _needs_amax(p.scheme) else None
    unit, constants, zero, strides = _rows_arguments(w13, p, p.hidden, rows)
    data = x[0].view(torch.int32) if unit == 4 else x[0]
    _source().gated_rows_kernel[(parts, pairs)](
        data, _units(w13[0], unit), x[1] if len(x) > 1 else None, w13[1], zero, b13, ids, y, amax,
        p.intermediate, p.hidden, p.hidden // unit, p.top_k, p.experts, *_scale_strides(x), *strides, MAGIC,
        **constants, **_activation(p.activation), OUT=_type(p.dtype), EARLY=early, num_warps=rows.warps,
    )  # fmt: skip
    return (y,) if amax is None else (y, amax)


def down_rows(
    hidden: Planes, ids: Tensor, weights: Tensor | None, w2: Planes, b2: Tensor | None, scale2: Tensor | None,
    problem: MoeProblem, rows: Rows, early: bool = False,
) -> Tensor:  # fmt: skip
    """Quantizes the result of ``gated_rows`` and multiplies, weights and adds it -> [T, H] of the problem's dtype.

    ``early``: only straight after ``gated_rows`` with the same; anything older than that is complete, hidden rows are waited for.
    """
    p, early = problem, early and not _interpreted()
    y = torch.empty((ids.shape[0], p.hidden), dtype=p.dtype, device=ids.device)
    amax = hidden[1] if len(hidden) > 1 else None
    parts = amax.shape[1] if amax is not None else 1
    unit, constants, zero, strides = _rows_arguments(w2, p, p.intermediate, rows)
    quantized = p.scheme.input_activations is not None
    limit, code = code_of(p.scheme)
    _source().down_rows_kernel[(p.hidden // rows.block_n, ids.shape[0])](
        hidden[0], amax, scale2 if p.scheme.static else None, _units(w2[0], unit), w2[1], zero, b2, ids, weights, y,
        p.hidden, p.intermediate, p.intermediate // unit, p.top_k, p.experts, parts, *strides, MAGIC,
        TOP_K=_pow2(p.top_k), PARTS=_pow2(parts), QUANTIZE=limit if quantized else 0.0, CODE=_type(code), **constants,
        OUT=_type(p.dtype), EARLY=early, num_warps=rows.warps, launch_pdl=early,
    )  # fmt: skip
    return y


def _needs_amax(scheme: Scheme) -> bool:
    a = scheme.input_activations
    return a is not None and a.dynamic and a.group_size is None


def _interpreted() -> bool:
    return "Interpreted" in type(_source().sum_kernel).__name__


def _unit(scheme: Scheme) -> int:
    """Weights per loaded unit: 32-bit words of 4-bit codes, and of int8 where dp4a multiplies them."""
    if scheme.weights.num_bits == 4:
        return 8
    return 4 if scheme.input_activations is not None and scheme.weights.type == "int" and not _interpreted() else 1


def _units(data: Tensor, unit: int) -> Tensor:
    return data if unit == 1 else data.view(torch.int32)


def _rows_arguments(
    w: Planes, problem: MoeProblem, k: int, rows: Rows
) -> tuple[int, dict[str, Any], Tensor | None, tuple[int, int, int, int]]:
    """(unit, constants, zero points, strides of scales and zero points) of one product of the decode form."""
    scheme = problem.scheme
    unit = _unit(scheme)
    group_n, group_k = groups(scheme)
    zero = w[2] if unit == 8 and not scheme.weights.symmetric else None
    constants = {
        "BLOCK_N": rows.block_n,
        "BLOCK": rows.block_k // unit,
        "UNIT": unit,
        "VECTOR": min(4, (group_k or 32) // 8) if unit == 8 else 16 // unit,
        "EVEN": k % rows.block_k == 0,
        "GROUP_K": group_k,
        "GROUP_N": group_n,
    }
    moves = (zero.stride(0), zero.stride(1)) if zero is not None else (0, 0)
    return unit, constants, zero, (w[1].stride(0), w[1].stride(1), *moves)


# --- choice ---


def plan(problem: MoeProblem, tokens: int, target: Target) -> Plan:
    """How ``triton_moe`` runs this many tokens on ``target``, without measurement."""
    # An expert with more pairs than a block is read again: leave room above the mean, less where weights are decoded.
    few = _form(problem.scheme) == "weights"
    mean = (0.75 if few else 1.25) * tokens * problem.top_k / problem.experts
    most = 64 if few or groups(problem.scheme)[1] else 128
    block_m = min(most, max(16, _pow2(int(mean))))
    return Plan(_tiles(problem, block_m, True, target), _tiles(problem, block_m, False, target))


# Measured on a H200 (benchmarks/tune_moe.py): block_m -> block_n, warps, stages, descriptors; by form and whether gated.
HOPPER: dict[tuple[str, bool], dict[int, tuple[int, int, int, bool]]] = {
    ("rows", True): {16: (64, 4, 5, False), 32: (64, 4, 5, False), 64: (64, 4, 3, True), 128: (128, 8, 4, True)},
    ("rows", False): {16: (64, 4, 5, False), 32: (128, 8, 4, False), 64: (128, 4, 3, True), 128: (128, 4, 3, True)},
    ("groups", True): {16: (128, 4, 3, True), 32: (128, 4, 3, True), 64: (128, 8, 4, True)},
    ("groups", False): {16: (64, 4, 5, False), 32: (128, 4, 3, True), 64: (128, 4, 3, True)},
    ("weights", True): {16: (64, 4, 3, True), 32: (64, 4, 3, True), 64: (64, 4, 3, True)},
    ("weights", False): {16: (128, 4, 3, True), 32: (128, 4, 3, True), 64: (128, 4, 3, True)},
}


def _form(scheme: Scheme) -> str:
    """Quantized inputs with scales of whole rows, or of groups; or 16-bit inputs."""
    a = scheme.input_activations
    if a is None:
        return "weights"
    return "rows" if a.group_size is None else "groups"


def _tiles(problem: MoeProblem, block_m: int, gated: bool, target: Target) -> Tiles:
    scheme, form = problem.scheme, _form(problem.scheme)
    block_k = min(128, groups(scheme)[1] or 128)
    tma = False
    if 90 <= target.arch < 120:
        block_n, warps, deepest, tma = HOPPER[form, gated][block_m]
        if form == "rows" and not gated and problem.intermediate > IMPRECISE_K:
            warps, deepest = 8, 4  # sums that are promoted need the registers of 8 warps
    else:
        block_n = 64
        warps, deepest = 0, 5
    group = scheme.input_activations.group_size if scheme.input_activations is not None else None
    if gated and group in (64, 128):
        block_n = group
    rows = (2 if gated else 1) * block_n
    step = block_k * (rows * scheme.weights.num_bits + block_m * (16 if form == "weights" else 8)) // 8
    memory = shared_memory(target)
    stages = max(2, min(deepest, memory // step))
    return Tiles(block_m, block_n, block_k, warps or (8 if rows * block_m >= 128 * 64 else 4), stages, tma=tma)


def decode_plan(problem: MoeProblem, target: Target) -> DecodePlan:
    """How ``triton_moe_decode`` runs, without measurement: 16 bytes per thread and row."""
    group_n, group_k = groups(problem.scheme)
    bits, experts = problem.scheme.weights.num_bits, _pow2(problem.top_k)
    least = max(128, group_k)
    first = _step(problem.hidden, 4 * 32 * 128 // bits, least)
    second = _step(problem.intermediate, 4 * 32 * 128 // bits // experts, least)
    # Eight bits: two loads of a row per thread before the first multiplication; more rows where that is the whole sum.
    wide = bits == 8
    one_step = wide and first >= problem.hidden
    return DecodePlan(
        Rows(_rows(8 if one_step else 4, group_n), first, _warps(first * bits // (2 if wide else 1))),
        Rows(
            _rows(8 if wide and not group_k else 4, group_n),
            second,
            _warps(second * bits * experts * (2 if wide else 1)),
        ),
        early=target.arch >= 90,
    )


def _rows(most: int, group_n: int) -> int:
    """``most`` rows of a weight, or as many as share a scale."""
    return gcd(most, group_n) if group_n > 1 else most


def _step(k: int, most: int, least: int) -> int:
    """A step of at most ``most`` inputs that divides k, or ``most`` where only steps below ``least`` do."""
    most = max(least, min(most, _pow2(k)))
    step = gcd(k, most)
    return step if step >= min(512, most) else most


def _warps(bits: int) -> int:
    """Warps whose threads hold 16 bytes of a step each, at most 8."""
    return max(1, min(8, bits // (32 * 128)))


def run_decode(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem,
) -> Tensor:  # fmt: skip
    """The block for few tokens [T, H] -> [T, H]; arguments as for ``MoeKernel.run``."""
    chosen = decode_plan(problem, _target(ids.device))
    return launch_decode(x, ids, weights, w13, b13, w2, b2, scale2, problem, chosen)


def launch_decode(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem, chosen: DecodePlan,
) -> Tensor:  # fmt: skip
    """Run one plan of the decode form; arguments and result as for ``run_decode``."""
    ids = ids.contiguous()
    weights = weights if weights is None else weights.contiguous()
    hidden = gated_rows(x, ids, w13, b13, problem, chosen.first, chosen.early)
    return down_rows(hidden, ids, weights, w2, b2, scale2, problem, chosen.second, chosen.early)


def run(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem,
) -> Tensor:  # fmt: skip
    """The block for any number of tokens [T, H] -> [T, H]; arguments as for ``MoeKernel.run``."""
    chosen = plan(problem, ids.shape[0], _target(ids.device))
    return launch(x, ids, weights, w13, b13, w2, b2, scale2, problem, chosen)


def launch(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem, chosen: Plan,
) -> Tensor:  # fmt: skip
    """Run one plan; arguments and result as for ``run``."""
    ids = ids.contiguous()
    pairs = align(ids, problem.experts, chosen.first.block_m)
    hidden = first(x, pairs, w13, b13, scale2, problem, chosen.first)
    if len(hidden) == 1 and problem.scheme.input_activations is not None:
        hidden = quantize(hidden[0], problem)
    parts = second(hidden, pairs, w2, b2, problem, chosen.second)
    return add(parts, ids, weights if weights is None else weights.contiguous(), problem)


def serves(scheme: Scheme) -> bool:
    """Whether a scheme's family is one of this file's."""
    return family_of(scheme).name in OLDEST


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


def _reject(problem: MoeProblem, target: Target) -> Reject | None:
    family = family_of(problem.scheme).name
    if not serves(problem.scheme):
        return Reject(f"multiplies 8-bit weights, or int4 weights under 16-bit inputs, not {problem.scheme.spec}")
    return reject_block(problem, target, OLDEST[family]) or _reject_scheme(problem.scheme, family)


def _reject_scheme(scheme: Scheme, family: str) -> Reject | None:
    a = scheme.input_activations
    if a is None and family != "weight_only":
        return Reject("16-bit inputs are not multiplied by 8-bit floats here")
    if a is not None and a.strategy == "tensor" and a.dynamic:
        return Reject("one dynamic scale for all tokens of an expert is not computed here")
    columns = groups(scheme)[1]
    least = 32 if family == "fp8_block" else 16
    if (columns % 128 and columns not in (16, 32, 64)) or 0 < columns < least:
        return Reject(f"groups must have 32, 64 or a multiple of 128 columns, got {columns}")
    return None


def active_experts(problem: MoeProblem, tokens: int) -> float:
    """Experts that some token chooses, on average over uniform choices."""
    return problem.experts * (1.0 - (1.0 - 1.0 / problem.experts) ** (tokens * problem.top_k))


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Any number of tokens; FP8 from sm89, INT8 and 16-bit inputs from sm80."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    limits, p = roof(target), problem
    pairs, cells = tokens * p.top_k, 3.0 * p.hidden * p.intermediate
    chosen = plan(p, tokens, target)
    active = active_experts(p, tokens)
    weights = active * cells * bits_per_weight(p.scheme) / 8
    between = pairs * (p.hidden + 2.0 * p.intermediate) * p.dtype.itemsize * 2
    peak = limits.math8 if p.scheme.input_activations is not None else limits.math16
    rows = max(pairs + active * chosen.first.block_m / 2, active * chosen.first.block_m)
    math = 2.0 * rows * cells / (peak * 0.4)
    fused = p.scheme.input_activations is None or fuses(p.scheme, chosen.first.block_n)
    launches = 4 + (not fused) + (pairs > COUNT_PAIRS)
    return Rank(limits.launch * launches + max((weights + between) / (limits.bandwidth * 0.8), math))


def fit_decode(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Few tokens: at most DECODE_PAIRS pairs."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    p, pairs = problem, tokens * problem.top_k
    if pairs > DECODE_PAIRS:
        return Reject(f"serves at most {DECODE_PAIRS} pairs of a token and an expert, got {pairs}")
    limits, cells = roof(target), 3.0 * p.hidden * p.intermediate
    # Scales of groups in the second product cost it half of the bandwidth (measured).
    efficiency = 0.6 if groups(p.scheme)[1] and p.scheme.input_activations is not None else 0.85
    # Pairs that share an expert read it anew: measured, 16 tokens on 8 experts take as long as 32 experts would.
    memory = pairs * cells * bits_per_weight(p.scheme) / 8 / (limits.bandwidth * efficiency)
    # Bound by converting and multiplying on ordinary cores: about a sixtieth of the tensor cores' 8-bit rate.
    math = 2.0 * pairs * cells / (limits.math8 / 60)
    return Rank(limits.launch * 2 + max(memory, math))


MOE_KERNELS = (
    MoeKernel("triton_moe_decode", "experts", fit_decode, run_decode),
    MoeKernel("triton_moe", "experts", fit, run),
)
