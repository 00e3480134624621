"""4-bit weights as int8 for many tokens: a Triton kernel decodes them, then sgl-kernel's INT8 GEMM multiplies.

For weights whose levels are integers under one scale of a row: both QServe forms, and symmetric int4 per channel. The copy
[n, k] int8 lives for one call; decoding costs as much for one token as for thousands.
"""

from __future__ import annotations

from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.lowering.kernels._roofline import estimate, roof
from quant_compile.lowering.kernels.scaled import sgl_int8
from quant_compile.lowering.kernels.w4a8 import triton_w4a8
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Integer levels per row with int8 inputs on sm80 to sm90, bf16 or f16; k a multiple of 16, n of 8."""
    family, weights, inputs = family_of(problem.scheme).name, problem.scheme.weights, problem.scheme.input_activations
    if family not in ("w4a8", "qserve") or inputs is None or inputs.type != "int":
        return Reject("decodes 4-bit weights under int8 inputs")
    if family == "w4a8" and weights.strategy != "channel":
        return Reject("scales of groups that are not integers leave no int8 levels of a row")
    refusal = sgl_int8.refuse(problem, target)
    if refusal is not None:
        return refusal
    if not target.has("triton"):
        return Reject("triton is not installed")
    # Nothing of the copy overlaps with the GEMM: codes are read and levels written before it starts.
    copy = problem.n * problem.k * (1.0 + bits_per_weight(problem.scheme) / 8) / (0.85 * roof(target).bandwidth)
    return Rank(copy + estimate(problem, m, target, 0.68, 8, tile_m=64, launches=2))


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """y [m, n] from x codes [m, k] int8 and w nibbles [n, ceil(k/2)] u8, each with its scales.

    Source: the family's ``linear``, with the products summed in int32 across all of k.
    """
    return sgl_int8.run(x[:2], triton_w4a8.decode(w, problem), bias, problem)


KERNELS = (Kernel("sgl_int8_decoded", "rows", fit, run),)
