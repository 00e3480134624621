"""The truth of attention over 16 bits and over codes, in plain torch in f32: what every attention kernel is tested against.

Attention equals ``scaled_dot_product_attention(..., enable_gqa=True)``, with these results where its backends differ or leave
it open:

* A row that sees no key gives zeros, as SDPA does for bool masks and for -inf (under sinks, too). An additive mask hides a key from
  HIDDEN down; SDPA takes finite values for numbers, so such a row would be the mean of all values, unfilled ones included.
* Before the first and after the last key that any row of a sequence and KV head sees, K and V have no influence, be they NaN or inf:
  left padding, what a window has left behind, and the unfilled end. SDPA's backends let such values through (0 * NaN).
* Between those, a NaN or inf of V that some row sees, or none, may make NaN in all rows of the sequence and KV head, as in SDPA; one
  of K does so only in rows that see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.kv import CacheScheme, encode

# An additive mask of at most this hides a key: -inf, and the least numbers of f16 (-65504), bf16 and f32 with a bias on top.
HIDDEN = -3e4
SCHEMES = {scheme.codes: scheme for scheme in map(CacheScheme, ("e4m3", "e5m2", "int8"))}


def values_of(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Cache [b, h, l, d] -> f32: floats as they are, bytes as e4m3; scale: None, one number, [h] or [b, h, l]."""
    x = (codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes).float()
    if scale is None:
        return x
    return x * (scale[..., None] if scale.dim() == 3 else scale.reshape(1, -1, 1, 1))


def visible(mask: Tensor) -> Tensor:
    """Which keys a mask lets through: True of a bool one, above HIDDEN (or NaN) of an additive one."""
    return mask if mask.dtype == torch.bool else ~(mask <= HIDDEN)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """softmax(softcap(scale * q k^T) + mask) v -> [b, hq, t, dv] in q's dtype.

    Args:
        q: [b, hq, t, d].
        k: [b, hkv, l, d] in 16 bits (or f32), or as codes: e4m3 (also as uint8), e5m2, int8. hkv divides hq.
        v: [b, hkv, l, dv], likewise.
        mask: None, or [b or 1, hq or 1, t, l], bool (True: visible) or additive.
        softcap: s becomes softcap * tanh(s / softcap) before the mask (Gemma 2); 0: none.
        sinks: [hq], one more logit in each row's denominator (GPT-OSS).
        k_scale: None, f32 of one element, [hkv] or [b, hkv, l]; multiplies the codes of k.
        v_scale: the same for v.
    """
    (b, heads, t, d), kv_heads = q.shape, k.shape[1]
    rows = (heads // kv_heads) * t
    grouped = q.float().reshape(b, kv_heads, rows, d)
    s = scale * grouped @ values_of(k, k_scale).transpose(-1, -2)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    values = values_of(v, v_scale)
    if mask is not None:
        full = mask.expand(b, heads, t, -1).reshape(b, kv_heads, rows, -1)
        seen = visible(full)
        s = torch.where(seen, s if mask.dtype == torch.bool else s + full.float(), float("-inf"))
        some = seen.any(2).long()
        reached = (some.cumsum(-1) > 0) & (some.flip(-1).cumsum(-1).flip(-1) > 0)
        values = torch.where(reached[..., None], values, 0.0)
    sink = torch.full_like(s[..., :1], float("-inf"))
    if sinks is not None:
        sink = sinks.float().repeat_interleave(t).reshape(1, kv_heads, rows, 1).expand_as(sink)
    s = torch.cat((s, sink), -1)
    top = s.amax(-1, keepdim=True)
    p = torch.exp(s - torch.where(top == float("-inf"), 0.0, top))
    total = p.sum(-1, keepdim=True)
    y = torch.where(total == 0, 0.0, p[..., :-1] @ values / total)
    return y.reshape(b, heads, t, -1).to(q.dtype)


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[b, h, t, d] -> codes of ``dtype`` and the scale of each token and head [b, h, t] f32, or codes under a fixed ``scale``."""
    codes, made = encode(x, SCHEMES[dtype], None if scale is None else scale.reshape(1, -1, 1, 1))
    return codes.view(dtype), made.squeeze(-1) if scale is None else scale
