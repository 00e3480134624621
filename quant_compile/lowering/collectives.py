"""Sums over ranks as ops of ours: ``sglq_kernels.all_reduce``, with what follows a sum in a model, and what it is on any device.

    sglq_kernels.all_reduce(x, residual?, weight?, eps, weighting, spec, keep, group) -> sum, normed rows?, codes?, scales?

The sum is that of all ranks' x, rounded to x's dtype, plus the residual. With a weight its RMSNorm follows: the normed rows where ``keep``
says so, and the input planes of the scheme ``spec`` (none where it is empty). On a CPU, and as the truth of the kernel, it is the
sequence that a model writes: torch's collective, the addition, the norm, the family's own quantization.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.ops import LIBRARY, normed
from quant_compile.lowering.registry import Norm
from quant_compile.lowering.symmetric import GROUPS, MOST_ROWS, buffers, group_of

# Of the other ranks' parts, which every rank reads in one shot: the most that was measured. Far above, a sum takes as long as its bytes.
MOST_BYTES = 1 << 20

LIBRARY.define(
    "all_reduce(Tensor x, Tensor? residual, Tensor? weight, float eps, str weighting, str spec, bool keep, str group) -> Tensor[]"
)


def _kernel() -> Any:
    return import_module("quant_compile.lowering.kernels.collectives.triton_all_reduce")


def makes_codes(scheme: Scheme) -> bool:
    """Whether the kernel quantizes inputs as this scheme wants them."""
    return _kernel().codes_of(scheme) is not None


def plane_dtypes(spec: str) -> tuple[torch.dtype, torch.dtype]:
    """Of the codes and scales that the kernel makes under a scheme."""
    codes, _ = _kernel().codes_of(parse(spec))
    return codes, torch.float32


def fits(x: Tensor, group: str) -> Reject | None:
    """Why a sum over a group is not one of these; the same answer on every rank.

    Args:
        x: a rank's part as it is traced, [..., k].

    A collective where a group, or rows of a size, are asked about for the first time: the ranks then make their buffers.
    """
    sizes: tuple[Any, ...] = tuple(x.shape)
    if not sizes:
        return Reject("it is a sum of one number")
    if not all(isinstance(size, int) for size in sizes):
        return Reject("the number of its rows is a symbol (compile with dynamic=False for graphs of one size)")
    rows, size = math.prod(sizes[:-1]), math.prod(sizes) * x.dtype.itemsize * (group_of(group).size() - 1)
    if rows > MOST_ROWS or size > MOST_BYTES:
        return Reject(
            f"it has {rows} rows, and a rank would read {size} bytes of others; NCCL's serves more than {MOST_ROWS} or {MOST_BYTES}"
        )
    return _kernel().fit(sizes[-1], x.dtype) or buffers(group, sizes[-1], x.dtype, x.device)


def all_reduced(x: Tensor, group: str) -> Tensor:
    """torch's own sum over the ranks, in x's dtype."""
    import torch.distributed._functional_collectives  # pyright: ignore[reportUnusedImport]

    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, weighting: str, spec: str, keep: bool, group: str
) -> list[Tensor]:  # fmt: skip
    """One step after the other."""
    h = all_reduced(x, group)
    h = h if residual is None else h + residual
    if weight is None:
        return [h]
    y = normed(h, Norm(weight, eps, weighting))
    scheme = parse(spec) if spec else None
    planes = () if scheme is None else family_of(scheme).quantize_input(y, scheme, None)
    return [h, *([y] if keep else []), *planes]


def _all_reduce(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, weighting: str, spec: str, keep: bool, group: str
) -> list[Tensor]:  # fmt: skip
    if not x.is_cuda:
        return reference(x, residual, weight, eps, weighting, spec, keep, group)
    k = x.shape[-1]
    space = GROUPS.workspace(group, k, x.dtype, x.device)
    norm = None if weight is None else Norm(weight, eps, weighting)
    rows = [None if tensor is None else tensor.reshape(-1, k).contiguous() for tensor in (x, residual)]
    found = _kernel().run(*rows, norm, parse(spec) if spec else None, keep, space)
    return [plane.view(*x.shape[:-1], plane.shape[-1]) for plane in found]


def _all_reduce_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, weighting: str, spec: str, keep: bool, group: str
) -> list[Tensor]:  # fmt: skip
    out = [x.new_empty(x.shape)]
    if weight is None:
        return out
    if keep:
        out.append(x.new_empty(x.shape))
    for last, dtype in zip((x.shape[-1], 1), plane_dtypes(spec) if spec else (), strict=False):
        out.append(x.new_empty((*x.shape[:-1], last), dtype=dtype))
    return out


LIBRARY.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::all_reduce", _all_reduce_fake, lib=LIBRARY)

all_reduce = torch.ops.sglq_kernels.all_reduce.default
