"""What kernels of libraries for GPUs share: refusals of schemes, sizes, devices and dtypes, and input planes as libraries take them."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.target import Target


def fp8_rows(scheme: Scheme) -> Reject | None:
    """None when the scheme is e4m3 weights per row or tensor with e4m3 inputs per token or tensor."""
    w, a = scheme.weights, scheme.input_activations
    if a is None or w.format is None or a.format is None or w.num_bits != 8 or a.num_bits != 8:
        return Reject("serves 8-bit float weights with 8-bit float inputs")
    if w.strategy not in ("channel", "tensor") or a.strategy not in ("token", "tensor"):
        return Reject("serves scales per row or tensor")
    if (w.format, a.format) != ("e4m3", "e4m3"):
        return Reject(f"multiplies e4m3 by e4m3 only, got {w.format} weights and {a.format} inputs")
    return None


def fp8_blocks(scheme: Scheme) -> Reject | None:
    """None when the scheme is e4m3 weights in 128x128 blocks with e4m3 inputs in groups of 128."""
    w, a = scheme.weights, scheme.input_activations
    if w.block_structure is None or a is None or a.strategy != "group" or w.type != "float":
        return Reject("serves 8-bit floats with block scales")
    if w.block_structure != (128, 128):
        return Reject(f"blocks must be 128x128, got {w.block_structure[0]}x{w.block_structure[1]}")
    if (w.format, a.format) != ("e4m3", "e4m3"):
        return Reject(f"multiplies e4m3 by e4m3 only, got {w.format} weights and {a.format} inputs")
    return None


def int8_rows(scheme: Scheme) -> Reject | None:
    """None when the scheme is int8 weights per row or tensor with int8 inputs per token or tensor."""
    w, a = scheme.weights, scheme.input_activations
    if a is None or (w.type, w.num_bits) != ("int", 8) or (a.type, a.num_bits) != ("int", 8):
        return Reject("serves 8-bit integer weights with 8-bit integer inputs")
    if w.strategy not in ("channel", "tensor") or a.strategy not in ("token", "tensor"):
        return Reject("serves scales per row or tensor")
    return None


def multiple(name: str, value: int, of: int) -> Reject | None:
    """Refusal of a size that is not a multiple of ``of``."""
    return Reject(f"{name} must be a multiple of {of}, got {value}") if value % of else None


def arch_from(target: Target, low: int, high: int = 999) -> Reject | None:
    """Refusal of a device outside sm``low`` .. sm``high``."""
    if target.device != "cuda":
        return Reject("needs a CUDA GPU")
    if target.arch < low:
        return Reject(f"needs sm{low} or newer, this is sm{target.arch}")
    return Reject(f"made for up to sm{high}, this is sm{target.arch}") if target.arch > high else None


def output_dtype(problem: Problem, *allowed: torch.dtype) -> Reject | None:
    """Refusal of an output dtype the library cannot write."""
    if problem.dtype in allowed:
        return None
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return Reject(f"writes {names}, not {str(problem.dtype).removeprefix('torch.')}")


def row_scale(scale: Tensor, m: int) -> Tensor:
    """Input scale as contiguous [m, 1] f32: per-token scales as they are, one scale per tensor repeated."""
    return scale.reshape(-1, 1).expand(m, 1).contiguous()


def pad_rows(x: Planes, alignment: int) -> Planes:
    """Codes [m, k] and group scales [m, g] with m rounded up, scales in column-major order; new rows are undefined."""
    data, scale = x
    m, groups = scale.shape
    rows = -(-m // alignment) * alignment
    if rows != m:
        padded = data.new_empty((rows, data.shape[1]))
        padded[:m] = data
        columns = scale.new_empty((groups, rows)).t()
        columns[:m] = scale
        return padded, columns
    # The strides of a dimension of size 1 mean nothing, so the comparison is with what a fresh one would have.
    return data, scale if scale.stride() == (1, m) else scale.t().contiguous().t()


def scaled_mm_result(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """An empty result of sgl-kernel's scaled products, which a recorded graph needs: a [m, k] times b [k, n] -> [m, n]."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)
