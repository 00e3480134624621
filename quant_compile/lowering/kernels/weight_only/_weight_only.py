"""What all GPU kernels for integer weights under 16-bit (or f32) inputs ask of a problem and a target, sizes aside."""

from __future__ import annotations

from collections.abc import Collection

import torch

from quant_compile.ir.family import Reject
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.schemes.weight_only import accepts
from quant_compile.lowering.target import Target


def refuse(
    problem: Problem, target: Target, bits: int, dtypes: Collection[torch.dtype], library: str | None = None
) -> Reject | None:
    """Why no kernel for weights of ``bits`` bits and x of ``dtypes`` can run the problem; None when one may."""
    weights = problem.scheme.weights
    if problem.scheme.input_activations is not None or weights.type != "int" or weights.num_bits != bits:
        return Reject(f"serves {bits}-bit integer weights with 16-bit inputs")
    answer = accepts(problem.scheme)
    if answer is not None:
        return answer
    if target.device != "cuda":
        return Reject("needs a GPU")
    if target.arch < 80:
        return Reject(f"needs sm80 or newer, this is {target.label}")
    if library is not None and not target.has(library):
        return Reject(f"{library} is not installed")
    if problem.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return Reject(f"x must be {names}, got {str(problem.dtype).removeprefix('torch.')}")
    return None
