"""What all uses of humming's just-in-time GEMMs share: ranges of m, compilation, and the launch op.

Reads humming_kernels (optional). A GEMM is compiled once for a layer and range of m, which takes seconds in a process of its
own; humming's own heuristics pick the tiles. A layer is given as the fields of humming's LayerConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Largest m of each range that gets a GEMM of its own; beyond the last, humming's choice no longer changes.
RANGES = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
GROUPED = "grouped_contiguous"


def range_of(m: int) -> int:
    """The m that stands for all m that share one compiled GEMM."""
    return next((top for top in RANGES if m <= top), RANGES[-1])


def order_of(layer: Any) -> str:
    """How a LayerConfig's GEMM reads codes: ``tiles``, ``flat``, ``wide``, or an order that no layout here has."""
    if layer.use_raw_weight or layer.use_native_dequant:
        return "raw" if layer.use_raw_weight else "native"
    return "flat" if layer.use_flat_weight else "wide" if layer.use_packed_k_layout else "tiles"


def heuristic_tuning(
    fields: Mapping[str, Any], m: int, device: torch.device, gemm_type: str | None = None
) -> dict[str, Any]:
    """humming's own choice of tiles for m rows."""
    from humming.config import LayerConfig
    from humming.tune import get_heuristics_config

    with torch.cuda.device(device):
        layer = LayerConfig(**fields)
        return dict(get_heuristics_config(layer, shape_m=m, gemm_type=gemm_type or "dense", device=device))


def compile_gemm(
    fields: Mapping[str, Any],
    device: torch.device,
    tuning: Mapping[str, Any],
    order: str = "tiles",
    gemm_type: str | None = None,
) -> Tensor:
    """Compile one GEMM with these tiles; the answer [4] int64 on CPU is what the launch op takes.

    Raises:
        RuntimeError: on this device, or as humming is set up, the GEMM reads codes in another order than ``order``.
    """
    from humming.config import LayerConfig
    from humming.kernel.humming import HummingKernel

    with torch.cuda.device(device):
        layer = LayerConfig(**fields)
        if order_of(layer) != order:
            raise RuntimeError(
                f"humming reads codes in the order '{order_of(layer)}' here, they are packed as '{order}'"
            )
        compute = None if gemm_type is None else {"gemm_type": gemm_type}
        return HummingKernel.prepare_kernels(layer.to_str(), compute, dict(tuning), device)


def launch(
    gemm: Tensor,
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    locks: Tensor,
    *,
    whole: Tensor | None = None,
    x_scale: Tensor | None = None,
    zero: Tensor | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    """Run a compiled GEMM over x [m, k]: codes, their scales, one scale of all (f32), the input's scale, zero points,
    bounds [E + 1] of the experts' rows, and locks -> [m, n]."""
    x = x.clone() if x.data_ptr() % 16 else x  # rows are loaded by 16 bytes
    return torch.ops.humming.launch_kernel.default(
        gemm, x, data, scale, whole, x_scale, None, zero, None, None, None, None, None, bounds, locks, 1, 0
    )
