"""Attention as data, and the plain torch truth of ``sglq.attention``: heads in groups read K and V once, none are repeated.

    out[b, h] = softmax(cap(q[b, h] @ k[b, h // g].T * scale) + mask [, sinks[h]]) @ v[b, h // g],   g = Hq / Hkv
    cap(s) = softcap * tanh(s / softcap), or s where softcap is 0

``scaled_dot_product_attention`` keeps scores in f32 and gives a row that sees no key zeros. Attention written as two products
rounds scores to the dtype of q after each step and has its softmax in a dtype of its own (``softmax``); a row whose mask is
finite is never empty there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.kv import decode


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    softmax: torch.dtype | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    codes: str = "",
) -> Tensor:
    """The truth.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, L, D]; Hkv divides Hq.
        v: [B, Hkv, L, Dv].
        mask: broadcasts to [B, Hq, T, L]; bool (True: visible) or a float that is added to the scores.
        scale: factor of the scores.
        is_causal: row t sees keys 0..t (torch's: aligned to the upper left); without a mask.
        softcap: bound of the scores; 0 for none.
        sinks: [Hq], a further score of each row, which takes its share of the softmax and has no value.
        softmax: its dtype where scores are rounded to the dtype of q; None: all in f32 (f64 for f64).
        k_scale: of the codes that k is, as ``ir/kv.py`` has it; v_scale: likewise.
        codes: format of the codes that k and v are; empty: they are values.

    Returns:
        [B, Hq, T, Dv] of q's dtype (v's, with ``softmax``).
    """
    if codes and k_scale is not None and v_scale is not None:
        k, v = decode(k, k_scale, codes, q.dtype), decode(v, v_scale, codes, q.dtype)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    compute = q.dtype if softmax is not None else wide
    scores = _grouped(q.to(compute), k.to(compute).mT) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = _masked(scores, mask, is_causal)
    empty = None if softmax is not None else (scores == float("-inf")).all(-1, keepdim=True)
    if sinks is not None:
        more = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, more), -1)
        scores = scores - scores.amax(-1, keepdim=True)
    weights = torch.softmax(scores, -1, dtype=softmax or wide)
    if sinks is not None:
        weights = weights[..., :-1]
    elif empty is not None:
        weights = weights.masked_fill(empty, 0.0)
    if softmax is not None:
        return _grouped(weights.to(v.dtype), v)
    return _grouped(weights, v.to(wide)).to(q.dtype)


def _grouped(rows: Tensor, matrix: Tensor) -> Tensor:
    """[B, Hq, T, a] times [B, Hkv, a, b], each matrix for the Hq / Hkv heads of its group -> [B, Hq, T, b]."""
    heads, tokens, groups = rows.shape[1], rows.shape[2], matrix.shape[1]
    joined = rows.reshape(rows.shape[0], groups, heads // groups * tokens, rows.shape[3])
    return torch.matmul(joined, matrix).reshape(rows.shape[0], heads, tokens, matrix.shape[3])


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask
