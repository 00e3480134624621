"""What runs an attention: a kernel, torch's own grouped form, or what the model wrote, and why.

A kernel replaces what was written on a GPU over a static cache, where what is written copies K and V for every head of a group and
reads a cache to its end; of many tokens, any attention under a mask that does the one or the other. Everything else stays as it was
written unless another form is known to be faster.
Modules under ``lowering/kernels`` offer kernels as ``ATTENTION_KERNELS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.attention import AttentionSite
from quant_compile.ir.family import Reject
from quant_compile.ir.kv import HEAD, TOKEN
from quant_compile.ir.operands import op_of
from quant_compile.ir.scores import agrees, known, tensor_of
from quant_compile.lowering.registry import Rank, _modules
from quant_compile.lowering.sides import beyond, equal
from quant_compile.lowering.target import Target

MOST_TOKENS = 16
# What stands for a kernel's name where torch's own attention runs on unrepeated K and V, and where the model's own code runs.
GROUPED, WRITTEN = "sdpa_grouped", "as written"
# Why a kernel runs.
FEW = "the cache is read once, to its filled length"
MANY = "K and V are not repeated in memory, and what the mask hides is not read"
# The largest head that torch's flash kernels take.
LARGEST_HEAD = 256


@dataclass(frozen=True)
class AttentionProblem:
    """One attention as kernels see it.

    Attributes:
        batch: sequences; None while it is a symbol, as are tokens and length.
        heads, kv_heads: Hq and Hkv.
        size, value_size: of q and k, and of v.
        tokens: T.
        length: L, filled or not.
        dtype: of q, k and v.
        mask: ``none``, ``bool``, ``additive``, or ``other`` where it does not broadcast to [B, Hq, T, L] by batch and heads alone.
        mask_heads: the mask has heads.
        is_causal, softcap, sinks: whether there is one.
        repeated: as written, K and V are repeated in memory.
        cached: they are a static cache that the graph has written to.
        products: written as products around a softmax, not as ``scaled_dot_product_attention``.
        many: while batch or tokens is a symbol, whether they are more than SPLIT tokens together; None where nobody knows.
        codes: format of the codes of K and V in ``ir/kv.py``; empty: they are in ``dtype``.
        scale: ``token`` or ``head``: what has a scale of its own; ``none`` without codes.
    """

    batch: int | None
    heads: int
    kv_heads: int
    size: int
    value_size: int
    tokens: int | None
    length: int | None
    dtype: torch.dtype
    mask: str = "none"
    mask_heads: bool = False
    is_causal: bool = False
    softcap: bool = False
    sinks: bool = False
    repeated: bool = False
    cached: bool = False
    products: bool = False
    codes: str = ""
    scale: str = "none"
    many: bool | None = None

    @property
    def text(self) -> str:
        """For people; sites of one kind have one text."""
        heads = f"{self.heads} heads" + (f" over {self.kv_heads}" if self.heads != self.kv_heads else "")
        size = f"{self.size}" + (f" and {self.value_size}" if self.size != self.value_size else "")
        tokens = f"{self.tokens} token{'s' * (self.tokens != 1)}" if _is_few(self) else "many tokens"
        cache = f", static cache{' of ' + self.codes if self.codes else ''}" if self.cached else ""
        return f"{heads} of {size}, {tokens}{cache}"


@dataclass(frozen=True)
class AttentionKernel:
    """Something that runs attention over K and V that are not repeated.

    Attributes:
        name: provider, then job.
        fit: ``(problem, target) -> Rank | Reject``.
        run: ``(q, k, v, mask [B|1, 1|Hq, T, L] | None, scale, softcap, sinks [Hq] | None) -> y``: [B, Hq, T, Dv], contiguous as
            [B, T, Hq, Dv]; after sinks come ``k_scale, v_scale [B, Hkv, L, 1] or [1, Hkv or 1, 1, 1] | None, codes``, and as
            keywords ``reach`` and the ``blocks`` that it is of, where the kernel has ``blocks``.
        blocks: ``(problem, target) -> (queries, keys)`` of the blocks of a mask that the kernel wants read beforehand, by
            ``sglq_kernels.reach``: once for all attention of a graph under one mask; None: it reads masks itself.
        recorded: ``run`` may be recorded in Inductor's graph, which launches it itself then: where all sizes are known, or its
            blocks of a mask are given.
    """

    name: str
    fit: Callable[[AttentionProblem, Target], Rank | Reject]
    run: Callable[..., Tensor]
    recorded: bool = True
    blocks: Callable[[AttentionProblem, Target], tuple[int, int]] | None = None


@lru_cache(maxsize=1)
def attention_kernels() -> dict[str, AttentionKernel]:
    """All attention kernels by name."""
    return {kernel.name: kernel for module in _modules() for kernel in getattr(module, "ATTENTION_KERNELS", ())}


@dataclass(frozen=True)
class AttentionChoice:
    """What runs an attention: a kernel's name, GROUPED or WRITTEN, why it is that, and the kernel's blocks of a mask, if it has some."""

    runs: str
    reason: str
    blocks: tuple[int, int] | None = None


def problem_of(site: AttentionSite) -> AttentionProblem:
    """The problem that a site poses."""
    q, k, v = (tensor_of(node) for node in (site.q, site.k, site.v))
    assert q is not None and k is not None and v is not None
    return AttentionProblem(
        known(q.shape[0]), int(q.shape[1]), int(k.shape[1]), int(q.shape[3]), int(v.shape[3]), known(q.shape[2]),
        known(k.shape[2]), q.dtype, _mask_kind(site, q, k), _mask_heads(site), site.is_causal, bool(site.softcap),
        site.sinks is not None, site.repeated, site.cached, site.softmax is not None, site.codes, _scale_kind(site),
    )  # fmt: skip


def _scale_kind(site: AttentionSite) -> str:
    if site.k_scale is None or site.v_scale is None:
        return "none"
    scale = tensor_of(site.k_scale)
    return TOKEN if scale is not None and known(scale.shape[2]) != 1 else HEAD


def _mask_kind(site: AttentionSite, q: Tensor, k: Tensor) -> str:
    mask = tensor_of(site.mask)
    if mask is None:
        return "none"
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    spread = [i < 2 and known(size) == 1 for i, size in enumerate(sizes)]
    if not all(given or agrees(a, b) for given, a, b in zip(spread, sizes, full, strict=True)):
        return "other"
    return "bool" if mask.dtype == torch.bool else "additive"


def _mask_heads(site: AttentionSite) -> bool:
    mask = tensor_of(site.mask)
    return mask is not None and mask.dim() >= 3 and mask.shape[-3] != 1


def choose_attention(problem: AttentionProblem, target: Target, rows: Any = None) -> AttentionChoice:
    """What runs a problem on a target.

    Args:
        problem: what is asked.
        target: where.
        rows: batch times tokens; of a symbol, Dynamo checks from now on whether it is more than SPLIT.
    """
    if target.device != "cuda":
        return AttentionChoice(WRITTEN, "attention kernels run on a GPU")
    unfit = _unfit(problem)
    if unfit is not None:
        if _grouped(problem):
            return AttentionChoice(GROUPED, f"K and V are not repeated in memory; no kernel: {unfit}")
        return AttentionChoice(WRITTEN, unfit)
    reasons: list[str] = []
    best: tuple[float, str] | None = None
    for name, kernel in attention_kernels().items():
        answer = kernel.fit(problem, target)
        if isinstance(answer, Reject):
            reasons.append(f"{name}: {answer.reason}")
        elif best is None or answer.cost < best[0]:
            best = answer.cost, name
    if best is None:
        return AttentionChoice(WRITTEN, "; ".join(reasons) or "no attention kernel is installed")
    blocks, sizes = attention_kernels()[best[1]].blocks, None
    if blocks is not None and problem.mask != "none":
        symbol = rows is not None and (problem.batch is None or problem.tokens is None)
        sizes = blocks(replace(problem, many=beyond(rows)) if symbol else problem, target)
    return AttentionChoice(best[1], FEW if _is_few(problem) else MANY, sizes)


def _is_few(p: AttentionProblem) -> bool:
    return p.tokens is not None and p.tokens <= MOST_TOKENS


def _unfit(p: AttentionProblem) -> str | None:
    """Why no kernel is asked: it would not be known to be faster.

    Of many tokens without a mask torch's flash attention reads K and V as ours does, and without repeating them.
    """
    if p.is_causal:
        return "it is causal without a mask"
    if p.mask == "other":
        return "its mask is not one of every token and key"
    if _is_few(p):
        return None if p.cached else "its keys are no static cache that the graph writes to"
    if p.mask == "none":
        return f"more than {MOST_TOKENS} tokens, without a mask"
    if p.cached or p.codes or p.repeated:
        return None
    return "its keys are no static cache that the graph writes to, and not repeated in memory"


def _grouped(p: AttentionProblem) -> bool:
    """Whether torch's flash attention takes the heads in groups, as no other of its kernels does: without a mask, and with one size.

    Nor does it take a causal one of fewer queries than keys.
    """
    square = p.tokens is not None and p.tokens == p.length
    plain = p.repeated and not p.products and p.mask == "none" and not p.cached and (square or not p.is_causal)
    half = p.dtype in (torch.bfloat16, torch.float16)
    return plain and half and p.size == p.value_size <= LARGEST_HEAD


def layout_matters(site: AttentionSite) -> bool:
    """Whether what reads a result relies on how it lies in memory: kernels return it as [B, T, Hq, Dv]."""
    value = tensor_of(site.node)
    return value is not None and known(value.shape[2]) != 1 and any(op_of(user) == "view" for user in site.node.users)


def check_sizes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Sizes that were symbols when the graph was compiled are what the kernel reads: outside of them lies other memory.

    Raises:
        ValueError: they differ, as torch's own attention would say.
    """
    if not all(a == b for a, b in _same_sizes(q, k, v, mask)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, mask) if x is not None)
        raise ValueError(f"q, k, v and mask of attention do not fit each other: {shapes}")


def surely_fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether ``check_sizes`` holds whatever the symbols among the sizes are, or because Dynamo checks it from now on."""
    return all(equal(a, b) for a, b in _same_sizes(q, k, v, mask))


def _same_sizes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[tuple[Any, Any]]:
    """Sizes that must be equal; a mask is spread over sequences or heads where it has one."""
    same = [(q.shape[0], k.shape[0]), (k.shape[0], v.shape[0]), (v.shape[2], k.shape[2]), (v.shape[1], k.shape[1])]
    if mask is not None:
        same += [(mask.shape[2], q.shape[2]), (mask.shape[3], k.shape[2])]
        same += [(mask.shape[i], q.shape[i]) for i in (0, 1) if known(mask.shape[i]) != 1]
    return same


def flat_scale(scale: Tensor | None) -> Tensor | None:
    """A scale as ``ir/kv.py`` has it -> [B, Hkv, L] of tokens, or [Hkv] or [1] where it is fixed."""
    if scale is None or scale.shape[2] != 1 or scale.shape[0] != 1:
        return scale if scale is None else scale.squeeze(-1)
    return scale.flatten()


def full_mask(mask: Tensor | None) -> Tensor | None:
    """A mask with all four dimensions."""
    return mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
