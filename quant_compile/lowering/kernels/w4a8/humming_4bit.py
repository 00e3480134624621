"""4-bit weights under int8, e4m3 or 16-bit inputs (W4A8, W4AFP8, NVFP4A16, MXFP4A16) by humming's just-in-time GEMMs.

Reads humming_kernels (optional), as ``_humming`` describes. Its GEMMs read codes in the order in which tensor cores take them,
which depends on the inputs; each order is a layout. Rows are padded to 64, columns to 64; within 64 rows a lane is
4 * t4 + tq (t4 = row % 8). c below is a code, g the number of groups, ``locks`` [2048] int32 zeros as in ``w4_tiles``.

* ``w4_flat`` (int8 inputs): ``data`` [n, k/8] int32, c - 8 in two's complement; 16 bytes of a row (32 columns) at a time,
  in the order [columns/32][row]. ``scale`` as in ``w4_tiles``.
* ``w4_tiles8`` (e4m3 inputs): ``data`` [k/32, 4n] int32; 64 rows x 32 columns are 256 words [i2 2][lane 32][i3 2][i4 2].
  Nibble ``2*i6 + i5`` holds the code of row 32*i2 + 16*i3 + 8*i4 + t4, column 16*i5 + 4*tq + i6: c - 8 if that is at
  least 0, else 15 - c (sign and one's complement). ``scale`` as in ``w4_tiles``; ``whole`` [1] f32, 1.0.
* ``w4_wide8`` (e4m3 inputs, sm90, groups of 128): as ``w4_tiles8``, but ``data`` [k/64, 8n]; 64 rows x 64 columns are 512
  words [i2 2][i3 2][lane 32][i1 2][i5 2], nibble ``2*i6 + i4``; i1 is the half of the 64 columns.
* ``fp4_tiles`` (16-bit inputs): ``data`` [k/16, 2n] int32, e2m1 codes in the order of ``w4_tiles``. ``scale`` [g, n] likewise
  in the order of its scales, e4m3 (NVFP4) or u8 (MXFP4). NVFP4 has three f32 planes more: ``whole`` [1], the least positive
  finite global scale of all rows, by which humming multiplies sums in f32; ``ratio`` [n] = global / whole, which is one
  unless w is several siblings, whose results it then multiplies; and ``global`` [n, 1] as it was.
* ``fp4_folded`` (siblings of NVFP4, bf16 inputs): as ``fp4_tiles``, but ``scale`` [g, n] bf16 = scale * global, rounded once, and
  ``global`` [n, 1] f32 alone after it: half a bit more per weight, and no launch after the GEMM.

humming multiplies a scale per row into sums already rounded to the output's dtype: float16 would overflow, so it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Planes, PlaneSpec, Reject, bits_per_weight, family_of
from quant_compile.lowering.ahead import Prepared
from quant_compile.lowering.kernels import _humming
from quant_compile.lowering.kernels._humming import DTYPES, range_of
from quant_compile.lowering.kernels._library import arch_from, multiple
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.fp4._fp4 import common_scale
from quant_compile.lowering.kernels.weight_only.triton_w4a16 import (
    CHUNK_ROWS,
    LOCKS,
    channel_order,
    channel_order_inv,
    group_order,
    group_order_inv,
    padded,
)
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank
from quant_compile.lowering.schemes.weight_only import group_of, pack_nibbles, unpack_nibbles
from quant_compile.lowering.target import Target

GROUPS = (None, 32, 64, 128)

# --- orders of codes ---


@dataclass(frozen=True)
class Order:
    """How codes of 64 rows x ``columns`` columns lie in int32 words.

    Attributes:
        rows: sizes into which 64 rows are cut, outermost first.
        cuts: sizes into which the columns of a block are cut.
        places: dimensions (blocks of rows, *rows, blocks of columns, *cuts) in the order of memory; the last has size two
            and shares a byte, its first code in the low nibble.
    """

    columns: int
    rows: tuple[int, ...]
    cuts: tuple[int, ...]
    places: tuple[int, ...]

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """Codes [n, k] cut up."""
        return n // 64, *self.rows, k // self.columns, *self.cuts

    def pack(self, codes: Tensor) -> Tensor:
        """[n, k] of 0..15 -> [k / columns, n * columns / 8] int32."""
        n, k = codes.shape
        cut = codes.reshape(self.shape(n, k)).permute(self.places)
        return (cut[..., 0] | (cut[..., 1] << 4)).reshape(k // self.columns, -1).view(torch.int32)

    def unpack(self, data: Tensor, n: int, k: int) -> Tensor:
        """Inverse of ``pack``."""
        sizes = self.shape(n, k)
        packed = data.contiguous().view(torch.uint8).reshape([sizes[d] for d in self.places[:-1]])
        codes = torch.stack((packed & 15, packed >> 4), -1)
        back = [self.places.index(d) for d in range(len(sizes))]
        return codes.permute(back).reshape(n, k)


# dims: block of rows, i3, i4, t4, block of columns, i5, tq, i6
TILES16 = Order(16, (4, 2, 8), (2, 4, 2), (4, 0, 3, 6, 1, 7, 2, 5))
# dims: block of rows, i2, i3, i4, t4, block of columns, i5, tq, i6
TILES8 = Order(32, (2, 2, 2, 8), (2, 4, 4), (5, 0, 1, 4, 7, 2, 3, 8, 6))
# dims: block of rows, i2, i3, i4, t4, block of columns, i1, i5, tq, i6
WIDE8 = Order(64, (2, 2, 2, 8), (2, 2, 4, 4), (5, 0, 1, 2, 4, 8, 6, 7, 9, 3))


def pack_codes(order: Order, packed: Tensor, size: tuple[int, int], signed: bool) -> Tensor:
    """Row-form nibbles of some rows -> an order padded to ``size`` [n, k], rows in chunks; ``signed``: sign and one's
    complement of c - 8."""
    n, k = size
    data = torch.empty((k // order.columns, n * order.columns // 8), dtype=torch.int32, device=packed.device)
    for start in range(0, n, CHUNK_ROWS):
        rows = packed[start : start + CHUNK_ROWS]
        codes = unpack_nibbles(rows, 2 * rows.shape[1])
        if signed:
            codes = torch.where(codes >= 8, codes - 8, 15 - codes)
        size_now = min(CHUNK_ROWS, n - start)
        codes = pad(codes, (0, k - codes.shape[1], 0, size_now - codes.shape[0]))
        words = order.columns // 8
        data[:, words * start : words * (start + size_now)] = order.pack(codes)
    return data


def unpack_codes(order: Order, data: Tensor, problem: Problem, signed: bool) -> Tensor:
    """Inverse of ``pack_codes``: [n, k] of 0..15, without padding."""
    codes = order.unpack(data, *padded(problem))[: problem.n, : problem.k]
    return torch.where(codes < 8, codes + 8, 15 - codes) if signed else codes


def _flat(packed: Tensor, n: int, k: int) -> Tensor:
    """Row-form nibbles -> [n, k/8] int32 of ``w4_flat``."""
    bytes_ = pad(packed ^ 0x88, (0, k // 2 - packed.shape[1], 0, n - packed.shape[0]))
    return bytes_.reshape(n // 64, 64, k // 32, 16).permute(2, 0, 1, 3).reshape(n, k // 2).view(torch.int32)


def _flat_inv(data: Tensor, problem: Problem) -> Tensor:
    n, k = padded(problem)
    bytes_ = data.contiguous().view(torch.uint8).reshape(k // 32, n // 64, 64, 16).permute(1, 2, 0, 3)
    return unpack_nibbles(bytes_.reshape(n, k // 2)[: problem.n] ^ 0x88, problem.k)


# --- layouts of int4 weights ---


def _pack_scale(scale: Tensor, problem: Problem) -> Tensor:
    n = padded(problem)[0]
    by_group = pad(scale, (0, 0, 0, n - problem.n)).t()
    return channel_order(by_group) if problem.scheme.weights.group_size is None else group_order(by_group)


def _unpack_scale(scale: Tensor, problem: Problem) -> Tensor:
    order = channel_order_inv if problem.scheme.weights.group_size is None else group_order_inv
    return order(scale).t()[: problem.n].contiguous()


def _int4_planes(problem: Problem, data: tuple[int, int]) -> tuple[PlaneSpec, PlaneSpec]:
    groups = -(-problem.k // group_of(problem.scheme, problem.k))
    return PlaneSpec("data", data, torch.int32), PlaneSpec("scale", (groups, padded(problem)[0]), problem.dtype)


_LOCKS = PlaneSpec("locks", (LOCKS,), torch.int32)


def _locks(like: Tensor) -> Tensor:
    return torch.zeros(LOCKS, dtype=torch.int32, device=like.device)


def flat_planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """Specs of ``data``, ``scale`` and ``locks``."""
    n, k = padded(problem)
    return *_int4_planes(problem, (n, k // 8)), _LOCKS


def pack_flat(planes: Planes, problem: Problem) -> Planes:
    """Row form -> ``w4_flat``."""
    return _flat(planes[0], *padded(problem)), _pack_scale(planes[1], problem), _locks(planes[0])


def unpack_flat(planes: Planes, problem: Problem) -> Planes:
    """``w4_flat`` -> row form, exactly."""
    return pack_nibbles(_flat_inv(planes[0], problem)), _unpack_scale(planes[1], problem)


def _layout8(name: str, order: Order) -> Layout:
    def planes(problem: Problem) -> tuple[PlaneSpec, ...]:
        n, k = padded(problem)
        data = _int4_planes(problem, (k // order.columns, n * order.columns // 8))
        return *data, PlaneSpec("whole", (1,), torch.float32), _LOCKS

    def pack(rows: Planes, problem: Problem) -> Planes:
        data = pack_codes(order, rows[0], padded(problem), signed=True)
        whole = torch.ones(1, dtype=torch.float32, device=data.device)
        return data, _pack_scale(rows[1], problem), whole, _locks(data)

    def unpack(packed: Planes, problem: Problem) -> Planes:
        codes = unpack_codes(order, packed[0], problem, signed=True)
        return pack_nibbles(codes), _unpack_scale(packed[1], problem)

    return Layout(name, pack, unpack, planes, row_block=_no_cut)


def _no_cut(problem: Problem) -> int:
    return 0  # blocks of columns lie along dimension 0


# --- layout fp4_tiles ---


def _nv(problem: Problem) -> bool:
    return family_of(problem.scheme).name == "nvfp4"


def fp4_planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """Specs of ``data``, ``scale``, ``ratio``, ``global`` and ``whole`` (NVFP4), and ``locks``."""
    n, k = padded(problem)
    groups = -(-problem.k // group_of(problem.scheme, problem.k))
    data = PlaneSpec("data", (k // 16, 2 * n), torch.int32)
    if not _nv(problem):
        return data, PlaneSpec("scale", (groups, n), torch.uint8), _LOCKS
    return (
        data,
        PlaneSpec("scale", (groups, n), torch.float8_e4m3fn),
        PlaneSpec("ratio", (problem.n,), torch.float32),
        PlaneSpec("global", (problem.n, 1), torch.float32),
        PlaneSpec("whole", (1,), torch.float32),
        _LOCKS,
    )


def pack_fp4(planes: Planes, problem: Problem) -> Planes:
    """Row form -> ``fp4_tiles``."""
    n, k = padded(problem)
    data = pack_codes(TILES16, planes[0], (n, k), signed=False)
    scale = group_order(pad(planes[1].view(torch.uint8), (0, 0, 0, n - problem.n)).t()).view(planes[1].dtype)
    if not _nv(problem):
        return data, scale, _locks(data)
    whole, ratio = common_scale(planes[2])
    return data, scale, ratio, planes[2].clone(), whole, _locks(data)


def _unpack_e2m1(data: Tensor, groups: int, problem: Problem) -> Tensor:
    columns = groups * group_of(problem.scheme, problem.k)
    return pack_nibbles(TILES16.unpack(data, *padded(problem))[: problem.n, :columns])


def unpack_fp4(planes: Planes, problem: Problem) -> Planes:
    """``fp4_tiles`` -> row form, exactly."""
    scale = group_order_inv(planes[1].view(torch.uint8)).t()[: problem.n].contiguous().view(planes[1].dtype)
    rows = _unpack_e2m1(planes[0], planes[1].shape[0], problem), scale
    return (*rows, planes[3]) if _nv(problem) else rows


def folded_planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """Specs of ``data``, ``scale``, ``global`` and ``locks``."""
    data, scale = fp4_planes(problem)[:2]
    whole = PlaneSpec("global", (problem.n, 1), torch.float32)
    return data, PlaneSpec("scale", scale.shape, torch.bfloat16), whole, _LOCKS


def pack_folded(planes: Planes, problem: Problem) -> Planes:
    """Row form -> ``fp4_folded``."""
    data, _, _, whole, _, locks = pack_fp4(planes, problem)
    scale = (planes[1].float() * planes[2]).to(torch.bfloat16)
    n = padded(problem)[0]
    return data, group_order(pad(scale, (0, 0, 0, n - problem.n)).t()), whole, locks


def unpack_folded(planes: Planes, problem: Problem) -> Planes:
    """``fp4_folded`` -> row form; exact, since bf16 has four bits more than e4m3 has."""
    scale = group_order_inv(planes[1]).t()[: problem.n].float() / planes[2]
    return _unpack_e2m1(planes[0], planes[1].shape[0], problem), scale.to(torch.float8_e4m3fn), planes[2]


LAYOUTS = (
    Layout("w4_flat", pack_flat, unpack_flat, flat_planes, row_block=_no_cut),
    _layout8("w4_tiles8", TILES8),
    _layout8("w4_wide8", WIDE8),
    Layout("fp4_tiles", pack_fp4, unpack_fp4, fp4_planes, row_block=_no_cut),
    Layout("fp4_folded", pack_folded, unpack_folded, folded_planes, row_block=_no_cut),
)

# --- fit ---


def _sizes(problem: Problem, target: Target) -> Reject | None:
    group = problem.scheme.weights.group_size
    if not target.has("humming"):
        return Reject("humming is not installed")
    if problem.dtype not in DTYPES:
        return Reject(f"output must be bfloat16 or float16, got {str(problem.dtype).removeprefix('torch.')}")
    if group is None and problem.dtype == torch.float16:
        return Reject("sums are rounded before a scale per row multiplies them, which overflows float16")
    return multiple("n", problem.n, 128) or multiple("k", problem.k, 128)


def _refuse_int4(problem: Problem, target: Target, inputs: str, arch: int) -> Reject | None:
    scheme = problem.scheme
    if family_of(scheme).name != "w4a8" or scheme.input_activations is None or scheme.input_activations.type != inputs:
        return Reject(f"serves symmetric 4-bit integer weights with 8-bit {inputs} inputs")
    if scheme.weights.group_size not in GROUPS:
        return Reject(f"group_size must be 32, 64, 128 or none, got {scheme.weights.group_size}")
    return arch_from(target, arch) or _sizes(problem, target)


def _rank(problem: Problem, m: int, target: Target, math_bits: int, launches: int = 1, more_bits: float = 0.0) -> Rank:
    # On an H200 humming's GEMMs of 28672 x 4096 reach 0.6 of the bandwidth at one row.
    bits = bits_per_weight(problem.scheme) + more_bits
    extra = 2.0 * (launches - 1) * m * problem.n * problem.dtype.itemsize
    cost = estimate(
        problem, m, target, 0.6, bits, math_bits=math_bits, bandwidth_efficiency=0.6, tile_m=8, launches=launches,
        extra_bytes=extra,
    )  # fmt: skip
    return Rank(cost)


def _is_wide(problem: Problem, target: Target) -> bool:
    return target.arch == 90 and problem.scheme.weights.group_size == 128


def fit_int8(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """W4A8 on sm80 and newer: groups of 32, 64, 128 or (bf16) a scale per row; n and k multiples of 128."""
    return _refuse_int4(problem, target, "int", 80) or _rank(problem, m, target, 8)


def fit_fp8(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """W4AFP8 on sm89 and newer, except for groups of 128 on sm90; else as ``fit_int8``."""
    refusal = _refuse_int4(problem, target, "float", 89)
    if refusal is None and _is_wide(problem, target):
        refusal = Reject("groups of 128 have an order of their own on sm90")
    return refusal or _rank(problem, m, target, 8)


def fit_fp8_wide(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """W4AFP8 on sm90 with groups of 128; n and k multiples of 128."""
    refusal = _refuse_int4(problem, target, "float", 90)
    if refusal is None and not _is_wide(problem, target):
        refusal = Reject("serves groups of 128 on sm90")
    return refusal or _rank(problem, m, target, 8)


def _refuse_fp4(problem: Problem, target: Target) -> Reject | None:
    family = family_of(problem.scheme).name
    if family not in ("nvfp4", "mxfp4") or problem.scheme.input_activations is not None:
        return Reject(f"serves FP4 weights with 16-bit inputs, not {problem.scheme.spec}")
    refusal = arch_from(target, 80, 99) or _sizes(problem, target)
    if refusal is None and family == "mxfp4" and problem.dtype == torch.float16:
        return Reject("float16 cannot hold the range of e8m0 scales")
    return refusal


def fit_fp4(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """NVFP4A16 (bf16, f16) and MXFP4A16 (bf16) from sm80 to sm90; n and k multiples of 128."""
    launches = 2 if _scales_result(problem) else 1
    return _refuse_fp4(problem, target) or _rank(problem, m, target, 16, launches)


def fit_folded(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Siblings of NVFP4A16, bf16; else as ``fit_fp4``."""
    refusal = _refuse_fp4(problem, target)
    if refusal is None and not _scales_result(problem):
        refusal = Reject("serves siblings of NVFP4, each with a global scale of its own")
    if refusal is None and problem.dtype != torch.bfloat16:
        refusal = Reject("float16 cannot hold the range of scales")
    return refusal or _rank(problem, m, target, 16, more_bits=0.5)


def _scales_result(problem: Problem) -> bool:
    return _nv(problem) and problem.siblings > 1


# --- run ---


def layer_config(problem: Problem, folded: bool = False) -> dict[str, Any]:
    """humming's LayerConfig fields of a problem, of weights in ``fp4_folded`` or not; the order of codes is left out."""
    scheme, dtype = problem.scheme, DTYPES[problem.dtype]
    x = scheme.input_activations
    group = scheme.weights.group_size or 0
    fields = {"shape_n": problem.n, "shape_k": problem.k, "c_dtype": dtype, "weight_scale_group_size": group}
    if x is None:
        fields |= {"a_dtype": dtype, "b_dtype": "float4e2m1", "bs_dtype": "float8e8m0"}
        if _nv(problem):
            tensor = {"bs_dtype": "float8e4m3", "weight_scale_2_type": "tensor"}
            fields |= {"bs_dtype": "bfloat16"} if folded else tensor
        return fields
    fields |= {
        "a_dtype": "int8" if x.type == "int" else "float8e4m3",
        "b_dtype": "uint4",
        "bs_dtype": dtype,
        "input_quant_mode": "static_tensor" if x.strategy == "tensor" else "dynamic_token",
        "use_int_weight_scale": False,  # humming would round scales to 1/1024 of the largest
    }
    if x.type == "float":
        # With a scale of all, exponents of decoded codes are corrected in f32 and not in the output's dtype.
        fields["weight_scale_2_type"] = "tensor"
    return fields


def _gemm(order: str, folded: bool, problem: Problem, top: int, device: torch.device) -> Tensor:
    fields = layer_config(problem, folded) | {"use_packed_k_layout": order == "wide"}
    return _humming.compile_gemm(fields, device, _humming.heuristic_tuning(fields, top, device), order)


@lru_cache(maxsize=None)
def _alone(problem: Problem) -> Problem:
    """What a GEMM is compiled for: neither the bias nor the number of siblings matters to it."""
    return replace(problem, has_bias=False, siblings=1)


def _prepared(order: str, folded: bool = False) -> Prepared[Tensor]:
    return Prepared(partial(_gemm, order, folded), range_of, _alone)


PREPARE = {order: _prepared(order) for order in ("flat", "tiles", "wide")} | {"folded": _prepared("tiles", folded=True)}


def run_int8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] int8 with scale [m, 1] or [1] f32 times 4-bit weights in ``w4_flat`` -> [m, n].

    Each group's exact integer sum is scaled and added in f32. Split-K programs meet at the plane ``locks``, so one weight
    must not run on two streams at once, and they add in the order in which they finish, so two calls may differ in bits.
    Source: humming_kernels' dense GEMM.
    """
    gemm = PREPARE["flat"](problem, x[0].shape[0], x[0].device)
    y = _humming.launch(gemm, x[0], w[0], w[1], w[2], x_scale=x[1])
    return y if bias is None else y.add_(bias)


def run_fp8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] e4m3 with scale [m, 1] or [1] f32 times 4-bit weights in ``w4_tiles8`` -> [m, n].

    As ``run_int8``, with sums of a group as the tensor cores make them. Source: humming_kernels' dense GEMM.
    """
    return _run_fp8(x, w, bias, problem, "tiles")


def run_fp8_wide(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """``run_fp8`` on weights in ``w4_wide8``."""
    return _run_fp8(x, w, bias, problem, "wide")


def _run_fp8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, order: str) -> Tensor:
    gemm = PREPARE[order](problem, x[0].shape[0], x[0].device)
    y = _humming.launch(gemm, x[0], w[0], w[1], w[3], whole=w[2], x_scale=x[1])
    return y if bias is None else y.add_(bias)


def run_fp4(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] bf16 or f16 times FP4 weights in ``fp4_tiles`` -> [m, n]; products of codes and scales are exact.

    As for ``run_int8``, two calls may differ in bits. Source: humming_kernels' dense GEMM.
    """
    gemm = PREPARE["tiles"](problem, x[0].shape[0], x[0].device)
    if not _nv(problem):
        y = _humming.launch(gemm, x[0], w[0], w[1].view(torch.float8_e8m0fnu), w[2])
        return y if bias is None else y.add_(bias)
    y = _humming.launch(gemm, x[0], w[0], w[1], w[5], whole=w[4])
    if _scales_result(problem):
        return y.mul_(w[2]) if bias is None else torch.addcmul(bias, y, w[2]).to(problem.dtype)
    return y if bias is None else y.add_(bias)


def run_folded(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """``run_fp4`` on weights in ``fp4_folded``: each group's scale is rounded to bf16 once."""
    gemm = PREPARE["folded"](problem, x[0].shape[0], x[0].device)
    y = _humming.launch(gemm, x[0], w[0], w[1], w[3])
    return y if bias is None else y.add_(bias)


KERNELS = (
    Kernel("humming_w4a8", "w4_flat", fit_int8, run_int8, prepare=PREPARE["flat"]),
    Kernel("humming_w4afp8", "w4_tiles8", fit_fp8, run_fp8, prepare=PREPARE["tiles"]),
    Kernel("humming_w4afp8_wide", "w4_wide8", fit_fp8_wide, run_fp8_wide, prepare=PREPARE["wide"]),
    Kernel("humming_fp4a16", "fp4_tiles", fit_fp4, run_fp4, prepare=PREPARE["tiles"]),
    Kernel("humming_fp4a16_folded", "fp4_folded", fit_folded, run_folded, prepare=PREPARE["folded"]),
)
