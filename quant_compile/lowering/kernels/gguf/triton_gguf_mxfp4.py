"""GGUF's MXFP4 blocks by the Triton kernels of MXFP4A16, in the row form of that family: the same numbers in another order.

Layout ``gguf_mxfp4``: ``data`` u8 [n, k/2], two codes a byte, the even column low; ``scale`` u8 [n, k/32]. A scale of 255, which
OCP's format has for NaN and no file should hold, is 2**128 in GGUF; the layout keeps it, and kernels give NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.ggml import decode as ggml
from quant_compile.ir.ggml import encode as to_bytes
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels._launch import ceil
from quant_compile.lowering.kernels.fp4 import triton_fp4a16
from quant_compile.lowering.registry import Fit, Kernel, Layout, Problem, Rank, Run
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target


def same_numbers(problem: Problem) -> Problem:
    """The problem as one of MXFP4A16."""
    return Problem(parse("MXFP4A16"), problem.n, problem.k, problem.dtype, problem.has_bias, problem.siblings)


def planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """``data`` and ``scale``."""
    groups = ceil(problem.k, 32)
    data = PlaneSpec("data", (problem.n, groups * 16), torch.uint8)
    return data, PlaneSpec("scale", (problem.n, groups), torch.uint8)


def pack(row_form: Planes, problem: Problem) -> Planes:
    """``blocks`` -> ``gguf_mxfp4``."""
    blocks = row_form[0].unflatten(-1, (-1, 17))
    codes = ggml.fields(blocks[..., 1:], 16, 4)
    return to_bytes.fields(codes, 1, 4).flatten(1), blocks[..., 0].contiguous()


def unpack(packed: Planes, problem: Problem) -> Planes:
    """Its inverse."""
    codes = ggml.fields(packed[0].unflatten(-1, (-1, 16)), 1, 4)
    return (torch.cat((packed[1].unsqueeze(-1), to_bytes.fields(codes, 16, 4)), -1).flatten(1),)


def _fit(fit: Fit, problem: Problem, m: int, target: Target) -> Rank | Reject:
    if family_of(problem.scheme).name != "gguf" or block_of(problem.scheme).name != "mxfp4":
        return Reject("serves GGUF's MXFP4 blocks")
    return fit(same_numbers(problem), m, target)


def _run(run: Run, x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    return run(x, w, bias, same_numbers(problem))


def _recorded(
    plan: Callable[[Problem, int, Target], object | None], problem: Problem, m: int, target: Target
) -> object:
    return plan(same_numbers(problem), m, target)


def _kernel(name: str, kernel: Kernel) -> Kernel:
    assert kernel.recorded is not None
    return Kernel(
        name,
        "gguf_mxfp4",
        partial(_fit, kernel.fit),
        partial(_run, kernel.run),
        recorded=partial(_recorded, kernel.recorded),
    )


LAYOUTS = (Layout("gguf_mxfp4", pack, unpack, planes, row_block=lambda problem: 1),)
KERNELS = tuple(_kernel(kernel.name.replace("fp4a16", "gguf_mxfp4"), kernel) for kernel in triton_fp4a16.KERNELS)
