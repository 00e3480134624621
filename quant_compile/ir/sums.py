"""A sum over ranks of codes: each rank sends its part as FP8 or INT8 codes, with a scale for each GROUP values of a row.

Every rank gets all parts' codes and adds what they stand for in f32, its own part's too, so that all ranks have the same sum. Each part is
rounded once; nothing is rounded again on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_compile.ir.numerics import FLOAT_DTYPES, FLOAT_MAX, safe_amax, to_float8, to_int8

CODES = ("FP8", "INT8")
GROUP = 128
_FORMAT = "e4m3"


def encode(x: Tensor, codes: str) -> tuple[Tensor, Tensor]:
    """[m, k] -> codes [m, g, GROUP], e4m3 or int8, and scales [m, g, 1] f32; a last group is filled with zeros."""
    groups = -(-x.shape[-1] // GROUP)
    wide = F.pad(x.float(), (0, groups * GROUP - x.shape[-1])).unflatten(-1, (groups, GROUP))
    scale = safe_amax(wide, -1) * (1.0 / (FLOAT_MAX[_FORMAT] if codes == "FP8" else 127.0))
    inverse = scale.reciprocal()
    return to_float8(wide, inverse, _FORMAT) if codes == "FP8" else to_int8(wide, inverse), scale


def decode_sum(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Codes [ranks, m, g, GROUP] and scales of all parts -> their sum [m, k], added in f32."""
    return (codes.float() * scales).sum(0).flatten(-2)[..., :k].to(dtype)


def coded_sum(x: Tensor, codes: str, group: str, world: int) -> Tensor:
    """The sum of all ranks' x [..., k], in x's dtype; a collective of torch's for the codes and one for their scales."""
    import torch.distributed._functional_collectives  # pyright: ignore[reportUnusedImport]

    functional = torch.ops._c10d_functional
    k = x.shape[-1]
    sent, scales = encode(x.reshape(-1, k), codes)
    # Collectives know no e4m3.
    waiting = [
        functional.all_gather_into_tensor(part.contiguous(), world, group) for part in (sent.view(torch.uint8), scales)
    ]
    everyone, all_scales = (functional.wait_tensor(part).unflatten(0, (world, -1)) for part in waiting)
    everyone = everyone.view(FLOAT_DTYPES[_FORMAT] if codes == "FP8" else torch.int8)
    return decode_sum(everyone, all_scales, k, x.dtype).view(x.shape)
