"""Attention as data, and the plain torch truth of ``sglq.attention``: heads in groups read K and V once, none are repeated.

    out[b, h] = softmax(cap(q[b, h] @ k[b, h // g].T * scale) + mask [, sinks[h]]) @ v[b, h // g],   g = Hq / Hkv
    cap(s) = softcap * tanh(s / softcap), or s where softcap is 0

``scaled_dot_product_attention`` keeps scores in f32 and gives a row that sees no key zeros. Attention written as two products
rounds scores to the dtype of q after each step and has its softmax in a dtype of its own (``softmax``); a row whose mask is
finite is never empty there.

Over a cache of latents that one head's keys and values are computed of for all heads (``ir/latent.py``), ``attend_latent`` is the
absorbed form of the same attention, in which nothing is computed of the cache but scores and sums:

    out[b, h] = (softmax((q[b, h, K] @ w_k[h]) @ latent[b].T + q[b, h, R] @ rope[b].T) * scale + mask) @ latent[b]) @ w_v[h].T
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


def attend_latent(
    q: Tensor,
    w: Tensor,
    latent: Tensor,
    rope: Tensor,
    mask: Tensor | None,
    scale: float,
    rope_at: int,
    key_row: int,
    value_row: int,
    value_size: int,
    latent_scale: Tensor | None = None,
    rope_scale: Tensor | None = None,
    codes: str = "",
) -> Tensor:
    """The truth of ``sglq.latent_attention``: scores, weights and their sums in f32 (f64 for f64).

    q in latents and the sums of latents are rounded to q's dtype, where the model's own form rounds k and v.

    Args:
        q: [B, Hq, T, D]; columns from ``rope_at`` on, as many as ``rope`` has, belong to it, the others, N of them, to K's rows.
        w: [Hq * per, r]; of the rows of a head N from ``key_row`` on make K, ``value_size`` from ``value_row`` on V.
        latent: [B, 1, L, r].
        rope: [B, 1, L, p].
        mask: as in ``attend``.
        scale: factor of the scores.
        latent_scale, rope_scale, codes: as ``k_scale``, ``v_scale`` and ``codes`` of ``attend``.

    Returns:
        [B, Hq, T, value_size] of q's dtype.
    """
    own, turned = split_query(q, w, latent.shape[3], rope.shape[3], rope_at, key_row)
    sums = sum_latents(own, turned, latent, rope, mask, scale, latent_scale, rope_scale, codes)
    return from_latents(sums, w, value_row, value_size)


def sum_latents(
    own: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None, scale: float,
    latent_scale: Tensor | None = None, rope_scale: Tensor | None = None, codes: str = "",
) -> Tensor:  # fmt: skip
    """What is between ``split_query`` and ``from_latents``: sums of latents [B, Hq, T, r] of q's dtype."""
    dtype = own.dtype
    if codes and latent_scale is not None and rope_scale is not None:
        latent, rope = decode(latent, latent_scale, codes, dtype), decode(rope, rope_scale, codes, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    latent = latent.to(wide)
    scores = (_grouped(own.to(wide), latent.mT) + _grouped(turned.to(wide), rope.to(wide).mT)) * scale
    scores = _masked(scores, mask, False)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    return _grouped(weights, latent).to(dtype)


def split_query(q: Tensor, w: Tensor, rank: int, size: int, rope_at: int, key_row: int) -> tuple[Tensor, Tensor]:
    """q [B, Hq, T, D] -> its parts that are multiplied with latents [B, Hq, T, rank] and with ropes [B, Hq, T, size]."""
    count, heads = q.shape[3] - size, q.shape[1]
    at = 0 if rope_at else size
    rows = w.reshape(heads, -1, rank)[:, key_row : key_row + count]
    return _by_head(q[..., at : at + count], rows), q[..., rope_at : rope_at + size]


def from_latents(sums: Tensor, w: Tensor, value_row: int, value_size: int) -> Tensor:
    """Sums of latents [B, Hq, T, r] -> of values [B, Hq, T, value_size], contiguous as [B, T, Hq, value_size]."""
    rows = w.reshape(sums.shape[1], -1, sums.shape[3])[:, value_row : value_row + value_size]
    return _by_head(sums, rows.mT).transpose(1, 2).contiguous().transpose(1, 2)


def _by_head(rows: Tensor, matrices: Tensor) -> Tensor:
    """[B, Hq, T, a] times a matrix [Hq, a, b] of each head -> [B, Hq, T, b]."""
    batch, heads, tokens, size = rows.shape
    joined = rows.transpose(0, 1).reshape(heads, batch * tokens, size)
    return torch.bmm(joined, matrices).reshape(heads, batch, tokens, matrices.shape[2]).transpose(0, 1)


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
