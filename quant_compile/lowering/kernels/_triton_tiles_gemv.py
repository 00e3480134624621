"""Triton source of products of a few tokens with 4-bit weights in the orders that humming's GEMMs read.

``humming_4bit`` says what ``w4_flat``, ``w4_wide8`` and ``fp4_tiles`` are; ``triton_tiles_gemv`` launches. A thread reads 16
bytes straight into registers. ``w4_flat`` is multiplied by dp4a. The words of the other two are operands of a tensor core,
lane by lane, and go there (``mma.sync``, as inline assembly) without any exchange between threads: the lane of a tensor's
element [tq, t4, ...] is 4 * t4 + tq, which is how Triton deals threads to axes of such loads. Nothing promises that, so
``triton_tiles_gemv`` tries each kernel before it is chosen. Sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_compile.lowering.kernels._triton_fp4a16 import _scale
from quant_compile.lowering.kernels._triton_w4a8 import _every_other, _four
from quant_compile.lowering.kernels._triton_w4a16 import _halves

# int32 of a token's e4m3 at columns 0, 1, 2, 3 -> f16 of 0 and 2, f16 of 1 and 3.
WIDE_X_ASM = tl.constexpr(
    """{ .reg .b32 t; .reg .b16 l, h; prmt.b32 t, $2, 0, 0x3120; mov.b32 {l, h}, t;
    cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }"""
)
# c0..c3 of m16n8k16 + one word times a token's codes. A nibble is a sign and one's complement; it becomes u = 0..15, then 1024 + u
# or 1024 + 16 u as f16 by its place, then u - 8.
WIDE_ASM = tl.constexpr(
    """{ .reg .b32 t, u, a0, a1, a2, a3, low, part, high;
    shr.u32 t, $4, 3; and.b32 t, t, 0x11111111; mul.lo.u32 t, t, 7; xor.b32 u, $4, t; xor.b32 u, u, 0x88888888;
    mov.b32 low, 0xE408E408; mov.b32 part, 0x2C002C00; mov.b32 high, 0xD480D480;
    and.b32 a0, u, 0x000F000F; or.b32 a0, a0, 0x64006400; add.rn.f16x2 a0, a0, low;
    and.b32 a1, u, 0x00F000F0; or.b32 a1, a1, 0x64006400; fma.rn.f16x2 a1, a1, part, high;
    shr.u32 u, u, 8;
    and.b32 a2, u, 0x000F000F; or.b32 a2, a2, 0x64006400; add.rn.f16x2 a2, a2, low;
    and.b32 a3, u, 0x00F000F0; or.b32 a3, a3, 0x64006400; fma.rn.f16x2 a3, a3, part, high;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {a0, a1, a2, a3}, {$5, $6}, {$7, $8, $9, $10}; }"""
)


def _fp4_asm(kind: str, shifts: tuple[tuple[int, int], ...], code: str, first: str) -> str:
    """c0..c3 of m16n8k16 + one word times two words of a token's inputs, weights times scales ($7, $8: f32 of rows t4, t4 + 8).

    shifts: of each pair of nibbles (p, p + 4), left where positive, of the sign to bit 15 and of the code to where its two
    exponent bits are the lowest of ``kind``. first: what multiplies codes before the scale, or nothing.
    """
    lines = [".reg .b32 s, r, t, a0, a1, a2, a3;", f"cvt.rn.{kind}x2.f32 s, $7, $7; cvt.rn.{kind}x2.f32 r, $8, $8;"]
    for a, (sign, bits) in zip(("a0", "a2", "a1", "a3"), shifts, strict=True):
        lines += [f"shl.b32 t, $4, {sign}; and.b32 t, t, 0x80008000;"]
        lines += [
            f"{'shl' if bits > 0 else 'shr'}.b32 {a}, $4, {abs(bits)}; and.b32 {a}, {a}, {code}; or.b32 {a}, {a}, t;"
        ]
    for factor in [first] if first else []:
        lines += [f"fma.rn.{kind}x2 {a}, {a}, {factor}, z;" for a in ("a0", "a1", "a2", "a3")]
    lines += [f"fma.rn.{kind}x2 {a}, {a}, {s}, z;" for a, s in (("a0", "s"), ("a2", "s"), ("a1", "r"), ("a3", "r"))]
    lines[0] += " .reg .b32 z, f; mov.b32 z, 0x80008000;" + (f" mov.b32 f, {first};" if first else "")
    text = " ".join(lines).replace(f", {first}, z", ", f, z") if first else " ".join(lines)
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    return f"{{ {text} {product} {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {{$5, $6}}, {{$9, $10, $11, $12}}; }}"


# bf16: a code's value times 2**-126; e8m0 scales need all of bf16's range, so there codes become themselves first (2**126).
BF16_SHIFTS = ((12, 6), (8, 2), (4, -2), (0, -6))
FP4_BF16_ASM = tl.constexpr(_fp4_asm("bf16", BF16_SHIFTS, "0x01C001C0", ""))
MX4_BF16_ASM = tl.constexpr(_fp4_asm("bf16", BF16_SHIFTS, "0x01C001C0", "0x7E807E80"))
# f16: a code's value times 2**-14.
FP4_F16_ASM = tl.constexpr(_fp4_asm("f16", ((12, 9), (8, 5), (4, 1), (0, -3)), "0x0E000E00", ""))
TWO_ASM = tl.constexpr(
    """{ .reg .b16 l, h; .reg .b32 a; cvt.u16.u32 l, $2; cvt.rn.f16x2.e4m3x2 a, l;
    mov.b32 {l, h}, a; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"""
)


# --- W4A8: w4_flat ---


@triton.jit(do_not_specialize=["m"])
def flat_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, bias_ptr, y_ptr, m, n, spans, sx_row,
    M: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, GROUPED: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """ROWS rows of w times the M tokens from program_id(1) * M on; x is int64 words of eight int8.

    A span is CHUNKS * 32 columns, under one scale where GROUPED; PARTS spans run side by side.
    """
    # Axes [row, part, word]: Triton deals threads to ties among axes from the first on, so a warp reads neighbouring rows.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_token = tl.program_id(1) * M
    part = tl.arange(0, PARTS)
    inner = tl.arange(0, 4)[None, None, :]
    slot = row // 64 * 64 + row % 8 * 8 + row // 8 % 8
    totals = ()
    for _ in tl.static_range(M):
        totals = totals + (tl.zeros((ROWS, PARTS), tl.float32 if GROUPED else tl.int32),)
    for start in range(0, spans, PARTS):
        span = start + part
        live = span < spans
        words = ()
        for j in tl.static_range(CHUNKS):
            w_at = w_ptr + ((span * CHUNKS + j)[None, :, None] * n + row[:, None, None]) * 4 + inner
            if EVEN:
                words = words + (tl.load(w_at, eviction_policy="evict_first"),)
            else:
                words = words + (tl.load(w_at, mask=live[None, :, None], other=0),)
        scale = 1.0
        if GROUPED:
            s_at = sw_ptr + span[None, :] * n + slot[:, None]
            scale = tl.load(s_at, mask=live[None, :], other=0.0).to(tl.float32)
        new = ()
        for t in tl.static_range(M):
            token = tl.minimum(first_token + t, m - 1)
            sums = tl.zeros((ROWS, PARTS, 4), tl.int32)
            for j in tl.static_range(CHUNKS):
                x_at = x_ptr + (token * spans + span[None, :, None]) * (CHUNKS * 4) + j * 4 + inner
                x_at = tl.broadcast_to(x_at, (ROWS, PARTS, 4))
                if EVEN:
                    x = tl.load(x_at, eviction_policy="evict_last")
                else:
                    x = tl.load(x_at, mask=live[None, :, None], other=0)
                even, odd = _every_other(x.to(tl.uint64, bitcast=True), ASM)
                w = words[j].to(tl.uint32, bitcast=True)
                low, high = (w << 4) & 0xF0F0F0F0, w & 0xF0F0F0F0
                sums = _four(high, odd, _four(low, even, sums, ASM), ASM)
            if GROUPED:
                new = new + (totals[t] + tl.sum(sums, 2).to(tl.float32) * scale,)
            else:
                new = new + (totals[t] + tl.sum(sums, 2),)
        totals = new
    for t in tl.static_range(M):
        token = first_token + t
        y = tl.sum(totals[t], 1).to(tl.float32) * 0.0625
        y = y * tl.load(sx_ptr + tl.minimum(token, m - 1) * sx_row)
        if not GROUPED:
            spot = row // 32 * 32 + (row // 2) % 4 * 8 + (row // 8) % 4 * 2 + row % 2
            y = y * tl.load(sw_ptr + spot).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + row).to(tl.float32)
        tl.store(y_ptr + token.to(tl.int64) * n + row, y.to(y_ptr.dtype.element_ty), mask=(row < n) & (token < m))


# --- W4AFP8: w4_wide8 ---


@triton.jit
def _split_words(w):
    """[..., 4] -> the four words of each thread."""
    even, odd = tl.split(tl.reshape(w, (w.shape[0], w.shape[1], w.shape[2], 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _load(at, live, EVEN: tl.constexpr, POLICY: tl.constexpr):
    if EVEN:
        value = tl.load(at, eviction_policy=POLICY)
    else:
        value = tl.load(at, mask=live, other=0)
    return value


@triton.jit
def _halves_of_e4m3(x):
    """int32 of four e4m3 -> int32 of the first and third as f16, of the second and fourth."""
    return tl.inline_asm_elementwise(WIDE_X_ASM, "=r,=r,r", [x], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def _multiply_wide(w, x, FIRST: tl.constexpr, c):
    """c and four words' products with the inputs x[FIRST] and on."""
    types: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
    for i in tl.static_range(4):
        c = tl.inline_asm_elementwise(
            WIDE_ASM, "=f,=f,=f,=f,r,r,r,f,f,f,f", [w[i], x[FIRST + i][0], x[FIRST + i][1], c[0], c[1], c[2], c[3]],
            dtype=types, is_pure=True, pack=1,
        )  # fmt: skip
    return c


@triton.jit(do_not_specialize=["m"])
def wide_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, bias_ptr, y_ptr, m, n, groups, sx_row,
    SUBS: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Up to eight tokens (x: int32 words of four e4m3) times SUBS * 16 rows of w; each of PARTS warps takes groups of 128."""
    tq = tl.arange(0, 4)[:, None, None]
    t4 = tl.arange(0, 8)[None, :, None]
    part = tl.arange(0, PARTS)[None, None, :]
    lane = tl.expand_dims((t4 * 4 + tq) * 4 + part * 0, 3) + tl.arange(0, 4)[None, None, None, :]
    x_row = tl.minimum(t4, m - 1) * (groups * 32) + tq + part * 0
    first = tl.program_id(0) * SUBS
    acc = ()
    for _ in tl.static_range(4 * SUBS):
        acc = acc + (tl.zeros((4, 8, PARTS), tl.float32),)
    for start in range(0, groups, PARTS):
        group = start + part
        live = group < groups
        words = ()
        inputs = ()
        scales = ()
        for h in tl.static_range(2):
            half = group * 2 + h
            for s in tl.static_range(SUBS):
                w_at = w_ptr + tl.expand_dims(half * (n * 8) + (first + s) * 128, 3) + lane
                words = words + (_load(w_at, tl.expand_dims(live, 3), EVEN, "evict_first"),)
            for i in tl.static_range(4):
                inputs = inputs + (_load(x_ptr + half * 16 + i * 4 + x_row, live, EVEN, "evict_last"),)
        for s in tl.static_range(SUBS):
            sub = first + s
            s_at = sw_ptr + group * (n // 2) + sub // 4 * 32 + sub % 4 + t4 * 4 + tq * 0
            scales = scales + (_load(s_at, live, EVEN, "evict_first"),)
        decoded = ()
        for i in tl.static_range(8):
            decoded = decoded + (_halves_of_e4m3(inputs[i]),)
        new = ()
        for s in tl.static_range(SUBS):
            zero = tl.zeros((4, 8, PARTS), tl.float32)
            c = _multiply_wide(_split_words(words[s]), decoded, 0, (zero, zero, zero, zero))
            c = _multiply_wide(_split_words(words[SUBS + s]), decoded, 4, c)
            s0, s1 = _halves(scales[s], BF16)
            new = new + (acc[4 * s] + c[0] * s0, acc[4 * s + 1] + c[1] * s0)
            new = new + (acc[4 * s + 2] + c[2] * s1, acc[4 * s + 3] + c[3] * s1)
        acc = new
    for i in tl.static_range(4 * SUBS):
        row = first * 16 + i // 4 * 16 + i % 4 // 2 * 8 + tl.arange(0, 8)[None, :]
        token = tl.arange(0, 4)[:, None] * 2 + i % 2
        y = tl.sum(acc[i], 2) * tl.load(sx_ptr + tl.minimum(token, m - 1) * sx_row)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + row).to(tl.float32)
        tl.store(y_ptr + token * n + row, y.to(y_ptr.dtype.element_ty), mask=token < m)


# --- NVFP4A16, MXFP4A16: fp4_tiles ---


@triton.jit
def _two_scales(pair, E8M0: tl.constexpr, HAS_E4M3: tl.constexpr):
    """Bytes 0 and 1 of int32 -> two f32."""
    if E8M0 or not HAS_E4M3:
        s0, s1 = _scale(pair & 255, E8M0), _scale((pair >> 8) & 255, E8M0)
    else:
        s0, s1 = tl.inline_asm_elementwise(
            TWO_ASM, "=f,=f,r", [pair], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    return s0, s1


@triton.jit(do_not_specialize=["m"])
def fp4_kernel(
    x_ptr, w_ptr, s_ptr, global_ptr, bias_ptr, y_ptr, m, n, groups, x_words,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, E8M0: tl.constexpr,
    BF16: tl.constexpr, HAS_E4M3: tl.constexpr,
):  # fmt: skip
    """Up to eight tokens (x: int32 words of two 16-bit floats, ``x_words`` a row) times 64 rows of w.

    A thread takes GROUPS groups of BLOCKS 16-column blocks at a time; each of PARTS warps has such steps of its own.
    """
    tq = tl.arange(0, 4)[:, None, None, None]
    t4 = tl.arange(0, 8)[None, :, None, None]
    part = tl.arange(0, PARTS)[None, None, :, None]
    i3 = tl.arange(0, 4)[None, None, None, :]
    quad = tl.program_id(0) * 8 + t4
    word = tl.broadcast_to(quad * 16 + tq * 4 + i3, (4, 8, PARTS, 4))
    slot = tl.broadcast_to(quad * 4 + i3, (4, 8, PARTS, 4))
    lane = tl.broadcast_to(tl.minimum(t4, m - 1) * x_words + tq, (4, 8, PARTS, 1))
    # A code is its value times 2**-126 (bf16) or 2**-14 (f16); scales bring products to where both formats hold them exactly.
    UP: tl.constexpr = 1.0 if E8M0 else 2.0**100 if BF16 else 2.0**7
    DOWN: tl.constexpr = 1.0 if E8M0 else 2.0**26 if BF16 else 2.0**7
    ASM: tl.constexpr = MX4_BF16_ASM if E8M0 else FP4_BF16_ASM if BF16 else FP4_F16_ASM
    zero = tl.zeros((4, 8, PARTS, 4), tl.float32)
    c = (zero, zero, zero, zero)
    for start in range(0, groups, PARTS * GROUPS):
        words = ()
        scales = ()
        inputs = ()
        for g in tl.static_range(GROUPS):
            group = start + part * GROUPS + g
            live = group < groups
            for j in tl.static_range(BLOCKS):
                block = group * BLOCKS + j
                words = words + (_load(w_ptr + block * (n * 2) + word, live, EVEN, "evict_first"),)
                x_at = x_ptr + block * 8 + lane
                inputs = inputs + (_load(x_at, live, EVEN, "evict_last"), _load(x_at + 4, live, EVEN, "evict_last"))
            scales = scales + (_load(s_ptr + group * (n // 2) + slot, live, EVEN, "evict_first"),)
        for g in tl.static_range(GROUPS):
            s0, s1 = _two_scales(scales[g].to(tl.int32), E8M0, HAS_E4M3)
            for j in tl.static_range(BLOCKS):
                near = tl.broadcast_to(inputs[2 * (g * BLOCKS + j)], zero.shape)
                far = tl.broadcast_to(inputs[2 * (g * BLOCKS + j) + 1], zero.shape)
                c = tl.inline_asm_elementwise(
                    ASM, "=f,=f,=f,=f,r,r,r,f,f,f,f,f,f",
                    [words[g * BLOCKS + j], near, far, s0 * UP, s1 * UP, c[0], c[1], c[2], c[3]],
                    dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
                )  # fmt: skip
    for i in tl.static_range(4):
        row = tl.program_id(0) * 64 + tl.arange(0, 8)[None, :, None] + tl.arange(0, 4)[None, None, :] * 16 + i // 2 * 8
        token = tl.arange(0, 4)[:, None, None] * 2 + i % 2
        y = tl.sum(c[i], 2) * DOWN
        if global_ptr is not None:
            y = y * tl.load(global_ptr + row)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + row).to(tl.float32)
        tl.store(y_ptr + token * n + row, y.to(y_ptr.dtype.element_ty), mask=token < m)
