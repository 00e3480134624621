"""Windows of a text, and what a causal language model's logits say of it: likelihood, and divergence from other logits.

Reads token ids and logits; knows neither models nor policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 24
"""Logits that are held in f32 at a time: rows of a window are taken in pieces of so many numbers."""


def windows_of(ids: Tensor, length: int, count: int) -> Tensor:
    """The first ``count`` windows [count, length + 1] of ``ids``; neighbours share one token, so each is predicted.

    Raises:
        ValueError: the text has not even one window.
    """
    count = min(count, (ids.numel() - 1) // length)
    if count < 1:
        raise ValueError(f"{ids.numel()} tokens are fewer than one window of {length + 1}")
    return torch.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])


@torch.inference_mode()
def perplexity(forward: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """exp of the mean negative log-likelihood over ``windows`` [count, length + 1], one window a call.

    Args:
        forward: token ids [1, length] -> logits [1, length, vocabulary].
        windows: token ids.
    """
    total = sum(float(losses(forward(window[None, :-1])[0], window[1:]).mean()) for window in windows)
    return math.exp(total / len(windows))


def losses(logits: Tensor, following: Tensor) -> Tensor:
    """Negative log-likelihoods f32 [length] of ``following`` [length] under ``logits`` [length, vocabulary]."""
    pairs = zip(pieces(logits), pieces(following, logits.shape[-1]), strict=True)
    return torch.cat([F.cross_entropy(rows.float(), ids, reduction="none") for rows, ids in pairs])


@dataclass(frozen=True)
class Divergence:
    """How far logits are from others, token by token.

    Attributes:
        kl: KL(others || logits) in nats, f32 [length].
        same: whether both give the same token the most, bool [length].
    """

    kl: Tensor
    same: Tensor


def divergence(logits: Tensor, reference: Tensor) -> Divergence:
    """Of ``logits`` [length, vocabulary] from ``reference``, of the same shape on any device; on the CPU.

    KL(p || q) = sum p (log p - log q), p of the reference, in f32. It is not negative; what rounding makes so counts as 0.
    """
    kl, same = list[Tensor](), list[Tensor]()
    for ours, theirs in zip(pieces(logits), pieces(reference), strict=True):
        theirs = theirs.to(ours.device)
        kl.append(kl_of(theirs, ours).clamp_min(0).cpu())
        same.append((theirs.argmax(-1) == ours.argmax(-1)).cpu())
    return Divergence(torch.cat(kl), torch.cat(same))


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) of each row of logits, f32 nats; what p rules out counts nothing."""
    wanted = p.float().log_softmax(-1)
    terms = wanted.exp() * (wanted - q.float().log_softmax(-1))
    return torch.where(wanted == float("-inf"), 0.0, terms).sum(-1)


def pieces(x: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """``x`` by rows, as many as have CHUNK numbers in f32 at ``width`` numbers a row."""
    return x.split(max(1, CHUNK // (width or x.shape[-1])))
