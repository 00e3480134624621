"""Triton source of a one-shot sum over ranks and what follows it: residual add, RMSNorm, and FP8 or INT8 codes of each token.

Every rank has a buffer that all ranks can read and write: ``[rows, 2, k]`` values, then ``[rows, world]`` flags (int32). A program serves
a row, alone with its counterparts on the other ranks: it puts the row into its rank's buffer, raises its flag in every other rank's
buffer, waits for their flags in its own, and adds all ranks' rows in the order of ranks, so that every rank has the same bits.

The n-th call that has a row uses slot n % 2 of it and raises its flags to n. A slot is written again two calls later. A rank gets there
only after it has waited, one call later, for flags that every other rank raises once its own kernel of the first call has ended: nobody
reads the slot any more. The count of calls is in memory, so that a replayed CUDA graph goes on counting.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from quant_compile.lowering.kernels._triton_pieces import _amax, _codes, _scale_of


@triton.jit
def _values(base, ELEMENT: tl.constexpr):
    """A buffer's values, by its address; buffers begin at pages."""
    return tl.multiple_of(base.to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def _flag(base, flags_at, row, rank: tl.constexpr, WORLD: tl.constexpr):
    """Where rank ``rank`` says in a buffer that its row is there."""
    return (base + flags_at).to(tl.pointer_type(tl.int32)) + row * WORLD + rank


@triton.jit
def _trap_if(late):
    """End the kernel with an error of CUDA: a rank that waits for ever would be found by nobody."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p trap; mov.b32 $0, $1; }", "=r,r", [late], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def _wait_for(flag, count, limit_ns, LIMITED: tl.constexpr):
    """Until a flag is raised to ``count``; differences, since counts wrap around."""
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if LIMITED:
        began = cuda.globaltimer()
        while seen - count < 0:
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            _trap_if((cuda.globaltimer() - began > limit_ns).to(tl.int32))
    else:
        while seen - count < 0:
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit
def _weighted(x, inverse, w, WEIGHTING: tl.constexpr, OUT: tl.constexpr):
    """A normed row in OUT, as f32."""
    y = x * inverse
    if WEIGHTING == "after_cast":
        y = y.to(OUT).to(tl.float32)
    if WEIGHTING == "one_plus":
        w = 1.0 + w
    return (y * w).to(OUT).to(tl.float32)


@triton.jit(do_not_specialize=["limit_ns"])
def all_reduce_kernel(
    x_ptr,
    residual_ptr,
    w_ptr,
    bases,
    counts_ptr,
    h_ptr,
    y_ptr,
    q_ptr,
    s_ptr,
    k,
    eps,
    flags_at,
    limit_ns,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTING: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows x [m, k] of all ranks, added (+ residual) -> h; RMSNorm of h by w -> y and codes q with scales s [m, 1].

    bases, a tuple of WORLD, are the addresses of the ranks' buffers, counts [m] int32 this rank's calls of each row. residual, w, y, q
    are None where there are none. Sums are rounded to x's dtype before the residual is added, as when a collective of their own gives them.
    """
    row = tl.program_id(0)
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    inside = cols < k
    at = row.to(tl.int64) * k + cols
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    count = tl.load(counts_ptr + row) + 1
    slot = (row.to(tl.int64) * 2 + (count & 1)) * k + cols
    own = bases[RANK]
    tl.store(_values(own, ELEMENT) + slot, x, mask=inside)
    tl.debug_barrier()  # one thread raises the flags, of what all threads have written
    for other in tl.static_range(WORLD):
        if other != RANK:
            tl.atomic_xchg(_flag(bases[other], flags_at, row, RANK, WORLD), count, sem="release", scope="sys")
    # Read while the others' rows are on their way.
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
    if w_ptr is not None:
        w = tl.load(w_ptr + cols, mask=inside, other=0.0)
    for other in tl.static_range(WORLD):
        if other != RANK:
            _wait_for(_flag(own, flags_at, row, other, WORLD), count, limit_ns, LIMITED)
    tl.debug_barrier()
    total = tl.zeros((BLOCK,), tl.float32)
    for other in tl.static_range(WORLD):
        if other == RANK:
            total += x.to(tl.float32)
        else:
            their = _values(bases[other], ELEMENT) + slot
            total += tl.load(their, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(counts_ptr + row, count)
    h = total.to(ELEMENT).to(tl.float32)
    if residual_ptr is not None:
        h += residual.to(tl.float32)
        h = h.to(ELEMENT).to(tl.float32)
    tl.store(h_ptr + at, h.to(ELEMENT), mask=inside)
    if w_ptr is not None:
        mean = tl.math.div_rn(tl.sum(h * h, 0), tl.full((), 0.0, tl.float32) + k)
        y = tl.where(inside, _weighted(h, tl.math.rsqrt(mean + eps), w.to(tl.float32), WEIGHTING, ELEMENT), 0.0)
        if y_ptr is not None:
            tl.store(y_ptr + at, y.to(ELEMENT), mask=inside)
        if q_ptr is not None:
            scale, inverse = _scale_of(_amax(y[None, :], 1), LIMIT)
            tl.store(s_ptr + row + tl.arange(0, 1), scale)
            tl.store(q_ptr + at, _codes(y, inverse, LIMIT, q_ptr.dtype.element_ty), mask=inside)
