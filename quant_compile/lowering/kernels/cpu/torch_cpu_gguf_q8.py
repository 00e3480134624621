"""Q8_0 of GGUF for decoding on CPU, from codes beside their scales (``gguf_planes``)."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.cpu.torch_cpu_gguf import by_rows
from quant_compile.lowering.kernels.gguf import triton_gguf as parts
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target

GROUP = 32
# Weights of Q8_0 turned into f32 at a time: 2 MB, and microseconds of one thread for each.
CHUNK_ELEMENTS = 1 << 19
DECODE_US = 4e-4


def fit_q8(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Q8_0, any size and dtype."""
    if target.device != "cpu":
        return Reject("runs on CPU only")
    if family_of(problem.scheme).name != "gguf" or block_of(problem.scheme).name != "q8_0":
        return Reject(f"serves GGUF_Q8_0, not {problem.scheme.spec}")
    conversion = DECODE_US * problem.n * problem.k / max(1, target.sm_count)
    return Rank(estimate(problem, m, target, 1.9, 8.5, math_bits=16, input_bits=32) + conversion)


def run_q8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """[m, k] times Q8_0 in ``gguf_planes``, a few rows scaled in one pass and multiplied while in cache -> [m, n], f32 sums."""
    data, scale = w

    def values(rows: slice) -> Tensor:
        return torch.mul(data[rows].unflatten(-1, (-1, GROUP)), scale[rows].float().unsqueeze(-1)).flatten(1)

    return by_rows(x[0], bias, problem, CHUNK_ELEMENTS, values)


KERNELS = (Kernel("torch_cpu_gguf_q8", parts.PACKED, fit_q8, run_q8),)
