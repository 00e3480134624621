"""Decode attention: the reference against SDPA, kernels against the reference, refusals, cubins."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quant_compile.ir.family import Reject
from quant_compile.lowering.kernels._roofline import shared_memory
from quant_compile.lowering.kernels.attention import reference, triton_decode
from quant_compile.lowering.kernels.attention.triton_decode import Attention, Plan
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.triton_support import compile_cubin, mend_bfloat16, needs_triton, run_interpreted, stack_bytes

E4M3, E5M2, F16, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16
# Relative Frobenius error: p and the result are rounded once to f16 (2**-12 each on average over a row) or bf16 (2**-9).
TOLERANCE = {F16: 1e-3, BF16: 5e-3}


def mend_dot() -> None:
    """Let Triton 3.6's interpreter multiply bf16: it takes the bits for integers."""
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    builder.create_dot = lambda self, a, b, *more: original(self, wide(a), wide(b), *more)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def filled(b: int, t: int, length: int, filled: int, left: tuple[int, ...] = (), window: int = 0) -> Tensor:
    """[b, 1, t, length]: the t last of ``filled`` tokens look back, to ``left`` padding, or over ``window`` tokens."""
    keys, query = torch.arange(length), torch.arange(filled - t, filled)[:, None]
    seen = (keys <= query) & ((keys > query - window) if window else torch.tensor(True))
    start = torch.tensor(left or (0,) * b).reshape(b, 1, 1, 1)
    return seen & (keys >= start)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


class Case:
    """Seeded tensors of one attention: q and caches as dtype, codes with scales where ``cache`` is a dtype of codes."""

    def __init__(
        self, b: int, heads: int, kv: int, t: int, d: int, length: int, *, dv: int = 0, dtype: torch.dtype = F16,
        cache: torch.dtype | None = None, scales: str = "token", device: str = "cpu",
    ) -> None:  # fmt: skip
        g = torch.Generator(device).manual_seed(heads * 100 + t + length)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device)

        self.q, self.scale = random(b, t, heads, d).transpose(1, 2).to(dtype), 1 / math.sqrt(d)
        k, v = random(b, kv, length, d).to(dtype), random(b, kv, length, dv or d).to(dtype)
        # Tokens of unlike sizes, so that a scale at the wrong token shows.
        v = v * torch.logspace(-2, 1, length, device=device)[torch.randperm(length, generator=g, device=device), None]
        self.k, self.v = k, v.to(dtype)
        self.scales: dict[str, Tensor] = {}
        if cache is not None:
            self.k, self.scales["k_scale"] = self.coded(self.k, cache, scales)
            self.v, self.scales["v_scale"] = self.coded(self.v, cache, scales)

    def coded(self, x: Tensor, cache: torch.dtype, scales: str) -> tuple[Tensor, Tensor]:
        fixed = None
        if scales != "token":
            fixed = x.float().abs().amax((0, 2, 3)) / reference.SCHEMES[cache].largest
            fixed = fixed.amax() if scales == "tensor" else fixed
        return reference.quantize(x, cache, fixed)

    def wanted(self, mask: Tensor | None = None, **more: Any) -> Tensor:
        return reference.attention(self.q, self.k, self.v, mask, self.scale, **self.scales, **more)

    def found(self, mask: Tensor | None = None, *, plan: Plan | None = None, **more: Any) -> Tensor:
        return triton_decode.decode(self.q, self.k, self.v, mask, self.scale, plan=plan, **self.scales, **more)

    def check(self, mask: Tensor | None = None, *, plan: Plan | None = None, **more: Any) -> None:
        found = self.found(mask, plan=plan, **more)
        assert found.transpose(1, 2).is_contiguous()
        wrong = error(found, self.wanted(mask, **more))
        assert wrong <= TOLERANCE[self.q.dtype], (wrong, self.q.shape, self.k.shape, self.k.dtype, plan)


def plan(splits: int, block_n: int = 16, block_m: int = 16) -> Plan:
    return Plan(block_m, block_n, splits, 4, 2)


# --- interpreted ---


def check_groups() -> None:
    """Groups of 1, 4 and 8 heads, 1 and 3 queries, one split and several, several blocks of rows; keys that fill no block."""
    for heads, kv, t, splits in ((2, 2, 1, 1), (4, 1, 3, 3), (8, 1, 1, 2), (8, 1, 3, 2)):
        case = Case(2, heads, kv, t, 32, 75)
        case.check(plan=plan(splits))
        case.check(filled(2, t, 75, 40, left=(0, 7)), plan=plan(splits))
    Case(1, 2, 1, 1, 64, 64).check()  # the plan of ``plan_of``, whole blocks


def check_caches() -> None:
    """All codes, with scales for each token, each head, and all; e4m3 as bytes, as sm80 reads it; bf16, as codes' q too."""
    mend_dot()
    mend_bfloat16()
    for cache in (E4M3, E5M2, torch.int8):
        for scales in ("token", "head", "tensor"):
            case = Case(2, 4, 2, 2, 32, 48, cache=cache, scales=scales)
            case.check(filled(2, 2, 48, 33), plan=plan(2))
            case.check(plan=plan(1))
            if cache == E4M3:
                case.k, case.v = case.k.view(torch.uint8), case.v.view(torch.uint8)
                case.check(filled(2, 2, 48, 33), plan=plan(2))
    case = Case(1, 4, 1, 1, 32, 40, dtype=BF16)
    case.check(filled(1, 1, 40, 21), plan=plan(2))
    Case(1, 4, 1, 1, 32, 40, dtype=BF16, cache=E4M3).check(filled(1, 1, 40, 21), plan=plan(2))


def check_every_e4m3_byte() -> None:
    """Bytes decode to what torch makes of them, through a softmax with one key; NaN stays NaN (in the interpreter, of bytes only)."""
    for byte in range(0, 256, 32):
        codes = torch.arange(byte, byte + 32, dtype=torch.uint8).reshape(1, 1, 1, 32)
        q, k = torch.zeros(1, 1, 1, 32, dtype=F16), torch.zeros(1, 1, 1, 32, dtype=torch.uint8)
        one = torch.ones(1)
        wanted = codes.view(E4M3).half()
        for v in (codes, codes.view(E4M3)):
            found = triton_decode.decode(q, k, v, None, 1.0, k_scale=one, v_scale=one, plan=plan(1))
            assert torch.equal(found[~wanted.isnan()], wanted[~wanted.isnan()]), byte
            assert v is not codes or torch.equal(found.isnan(), wanted.isnan()), byte


def check_masks() -> None:
    """Left padding, sliding windows and unfilled tails, bool and additive, for all heads and for each, and spread by stride 0."""
    case = Case(2, 4, 2, 3, 32, 100)
    masks = [
        filled(2, 3, 100, 64, left=(0, 20)),
        filled(2, 3, 100, 100),
        filled(2, 3, 100, 90, window=20),
        filled(1, 3, 100, 50),
        filled(2, 3, 100, 64).expand(2, 4, 3, 100),
        torch.rand(2, 4, 3, 100) > 0.6,
    ]
    for i, mask in enumerate(masks):
        case.check(mask, plan=plan(3 if i % 2 else 1))
        case.check(additive(mask, torch.float32 if i % 3 else F16), plan=plan(2))
    case.check(torch.randn(2, 4, 3, 100) * 3, plan=plan(2))  # a position bias
    case.check(additive(masks[0], BF16) + torch.randn(3, 100).to(BF16), plan=plan(2))
    case.check(masks[0].transpose(2, 3).contiguous().transpose(2, 3), plan=plan(2))
    single = Case(2, 4, 2, 1, 32, 100)
    for mask in (filled(2, 1, 100, 64, left=(0, 20)), torch.rand(2, 4, 1, 100) > 0.6):
        single.check(mask, plan=plan(3, 32))
        single.check(additive(mask, F16), plan=plan(3, 32))
    single.check(torch.rand(2, 1, 1, 100) > 0.5, plan=plan(3, 32))
    single.check(torch.randn(2, 1, 1, 100), plan=plan(3, 32))


def check_variants() -> None:
    """Sinks, softcap, heads that are no power of two, K wider than V, a cache whose heads lie beside one another."""
    for more in ({"sinks": torch.randn(4)}, {"softcap": 0.5}, {"sinks": torch.randn(4).half() + 9, "softcap": 30.0}):
        for splits in (1, 2):
            case = Case(2, 4, 2, 2, 32, 48)
            case.check(filled(2, 2, 48, 40), plan=plan(splits), **more)
    for d, dv, cache in ((80, 0, None), (96, 32, E4M3), (192, 128, E4M3)):
        case = Case(1, 2, 1, 2, d, 40, dv=dv, cache=cache)
        case.check(filled(1, 2, 40, 33), plan=plan(2))
    case = Case(2, 4, 2, 1, 32, 48)
    case.k, case.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.k, case.v))
    case.check(filled(2, 1, 48, 40), plan=plan(2))
    case.scale = 40.0  # scores far apart: the maximum moves from block to block
    case.check(filled(2, 1, 48, 40), plan=plan(2))


def check_odd_numbers() -> None:
    """Rows that see nothing are zeros; what nobody sees has no influence; a visible NaN is NaN; q and v of any size."""
    for cache, splits in ((None, 1), (None, 2), (E4M3, 2)):
        case = Case(2, 4, 2, 2, 32, 64, cache=cache)
        wide = plan(splits, 32)
        mask = filled(2, 2, 64, 40, left=(0, 100))
        mask[0, :, 0] = False
        for form in (mask, additive(mask, F16), torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
            found = case.found(form, plan=wide)
            assert not found[1].any() and not found[0, :, 0].any() and found[0, :, 1].all()
            assert not case.found(form, plan=wide, sinks=torch.zeros(4))[1].any()
        mask = filled(2, 2, 64, 40, left=(0, 9))
        before = case.found(mask, plan=wide)
        hidden = ~mask.any(2)[:, 0]
        for plane in (case.k, case.v, *(case.scales.values())):
            spread = hidden[:, None].expand(plane.shape[:3])
            if plane.dtype == E4M3:
                plane.view(torch.uint8)[spread] = 0x7F
            else:
                plane[spread] = float("nan")
        assert torch.equal(case.found(mask, plan=wide), before)
        (case.scales["v_scale"] if cache else case.v)[0, 0, 20] = float("nan")
        found = case.found(mask, plan=wide)
        assert found[0, :2].isnan().all() and not found[0, 2:].isnan().any() and not found[1].isnan().any()
    for size in (2.0**-20, 2.0**12):
        case = Case(1, 2, 1, 1, 32, 48, cache=E5M2)
        case.q, case.scales["v_scale"] = (case.q * size).half(), case.scales["v_scale"] * size
        case.scale /= size
        case.check(plan=plan(2))


def check_unread() -> None:
    """Memory past the filled keys, and before the window, may not be read at all: touching it ends the process."""
    import ctypes
    import mmap

    d, length, page = 32, 1024, mmap.PAGESIZE
    row = d * 2
    first, end = 2 * page // row, 4 * page // row  # readable keys; all else is protected
    case = Case(1, 2, 1, 1, d, length)
    mask = torch.zeros(1, 1, 1, length, dtype=torch.bool)
    mask[..., first + 3 : end - 5] = True
    wanted = case.wanted(mask)
    libc, kept = ctypes.CDLL(None, use_errno=True), []
    for name in ("k", "v"):
        memory = mmap.mmap(-1, length * row)
        plane = torch.frombuffer(memory, dtype=F16).reshape(1, 1, length, d)
        plane.copy_(getattr(case, name))
        setattr(case, name, plane)
        kept.append(memory)
        for start, stop in ((0, 2 * page), (4 * page, length * row)):
            assert libc.mprotect(ctypes.c_void_p(plane.data_ptr() + start), ctypes.c_size_t(stop - start), 0) == 0
    for splits in (1, 3):
        for form in (mask, additive(mask, F16)):
            assert error(case.found(form, plan=plan(splits, 32)), wanted) <= TOLERANCE[F16]


def check_same_bits() -> None:
    """A plan with other splits agrees within rounding, the same plan bit for bit."""
    case = Case(1, 4, 1, 1, 32, 160)
    first = case.found(plan=plan(5))
    assert torch.equal(first, case.found(plan=plan(5)))
    assert error(case.found(plan=plan(1)), first) <= TOLERANCE[F16]


CHECKS = (
    check_groups,
    check_caches,
    check_every_e4m3_byte,
    check_masks,
    check_variants,
    check_odd_numbers,
    check_unread,
    check_same_bits,
)


@needs_triton
@pytest.mark.parametrize("function", [check.__name__ for check in CHECKS])
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


# --- the reference ---


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "infinite"])
@pytest.mark.parametrize(("heads", "kv", "t", "dv"), [(4, 4, 3, 32), (8, 2, 1, 32), (6, 3, 5, 64)])
def test_reference_is_sdpa(kind: str, heads: int, kv: int, t: int, dv: int) -> None:
    q, k, v = torch.randn(2, heads, t, 32), torch.randn(2, kv, 40, 32), torch.randn(2, kv, 40, dv)
    mask = filled(2, t, 40, 30, left=(0, 11))
    if kind in ("bool", "infinite"):
        mask[1, :, 0] = False
    forms = {"none": None, "bool": mask, "additive": additive(mask, torch.float32)}
    form = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if kind == "infinite" else forms[kind]
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=form, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(reference.attention(q, k, v, form, 0.3), wanted, rtol=1e-5, atol=1e-6)


def test_reference_is_eager_gpt_oss_and_gemma2() -> None:
    """As transformers writes them: sinks are one more column of the softmax, a softcap comes before the mask."""
    q, k, v, sinks = torch.randn(2, 4, 3, 32), torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 32), torch.randn(4)
    mask = filled(2, 3, 40, 30, left=(0, 11))
    scores = 0.3 * q @ k.repeat_interleave(2, 1).transpose(2, 3)
    values = v.repeat_interleave(2, 1)
    joined = torch.cat((scores + additive(mask, torch.float32), sinks.reshape(1, 4, 1, 1).expand(2, 4, 3, 1)), -1)
    wanted = joined.softmax(-1)[..., :-1] @ values
    torch.testing.assert_close(reference.attention(q, k, v, mask, 0.3, sinks=sinks), wanted, rtol=1e-5, atol=1e-6)
    wanted = (5.0 * torch.tanh(scores / 5.0) + additive(mask, torch.float32)).softmax(-1) @ values
    torch.testing.assert_close(reference.attention(q, k, v, mask, 0.3, softcap=5.0), wanted, rtol=1e-5, atol=1e-6)


# --- fit and plan ---

LLAMA = Attention(16, 32, 8, 1, 128, 128, 2048, BF16, BF16, BF16, "bool")
SM90 = Target.fake("sm90")


@pytest.mark.parametrize(
    ("change", "target", "reason"),
    [
        ({}, Target.fake("cpu"), "needs a CUDA GPU"),
        ({}, Target.fake("sm90", FAKE_OPS - {"triton"}), "triton is not installed"),
        ({"tokens": 17}, SM90, "1 to 16 queries a sequence, not 17"),
        ({"tokens": 0}, SM90, "1 to 16 queries a sequence, not 0"),
        ({"kv_heads": 5}, SM90, "32 query heads are no multiple of 5 KV heads"),
        ({"head_size": 100}, SM90, "not 100"),
        ({"value_size": 512}, SM90, "not 512"),
        ({"length": 0}, SM90, "keys, not 0"),
        ({"dtype": torch.float32}, SM90, "q must be bfloat16 or float16, not float32"),
        ({"k_dtype": F16}, SM90, "K and V must be bfloat16 as q is, or codes, not float16 and bfloat16"),
        ({"v_dtype": E4M3}, SM90, "must both be codes or both bfloat16"),
    ],
)
def test_refusals(change: dict[str, Any], target: Target, reason: str) -> None:
    answer = triton_decode.fit(replace(LLAMA, **change), target)
    assert isinstance(answer, Reject) and reason in answer.reason


def test_codes_cost_about_half() -> None:
    codes = replace(LLAMA, length=8192, k_dtype=E4M3, v_dtype=E4M3, k_scale="token", v_scale="token")
    whole, half = (triton_decode.fit(p, SM90) for p in (replace(LLAMA, length=8192), codes))
    assert not isinstance(whole, Reject) and not isinstance(half, Reject)
    assert 0.5 < half.cost / whole.cost < 0.6


@pytest.mark.parametrize(
    ("batch", "length", "splits", "splits_of_codes"),
    [
        (1, 512, 8, 8),  # a block for each program
        (1, 2048, 32, 32),
        (1, 32768, 32, 64),  # one round of at most 264 programs, two for each of 132 SMs; 528 of codes
        (
            7,
            32768,
            14,
            9,
        ),  # 56 * 14 programs fill 2.97 rounds, where 56 * 4 fill 0.85 of one; 56 * 9 of codes fill 0.95
        (16, 2048, 2, 4),
        (64, 2048, 1, 1),
        (300, 64, 1, 1),
    ],
)
def test_plans_fill_the_device(batch: int, length: int, splits: int, splits_of_codes: int) -> None:
    problem = replace(LLAMA, batch=batch, length=length)
    assert triton_decode.plan_of(problem, SM90) == Plan(16, 64, splits, 4, 3, 2)
    codes = replace(problem, k_dtype=E4M3, v_dtype=E4M3)
    assert triton_decode.plan_of(codes, SM90) == Plan(16, 64, splits_of_codes, 4, 3, 4)


def test_plans_of_other_heads_and_devices() -> None:
    many = replace(LLAMA, tokens=16, head_size=192)
    assert triton_decode.plan_of(many, SM90) == Plan(64, 32, 2, 8, 3)
    assert triton_decode.plan_of(LLAMA, Target.fake("sm120")).stages == 2


def test_problem_of_a_call() -> None:
    case = Case(2, 4, 2, 3, 64, 40, dv=32, cache=E4M3)
    mask = filled(2, 3, 40, 30)
    found = triton_decode.problem_of(case.q, case.k, case.v, mask, sinks=torch.zeros(4), **case.scales)
    wanted = Attention(2, 4, 2, 3, 64, 32, 40, F16, E4M3, E4M3, "bool", False, "token", "token", sinks=True)
    assert found == wanted
    spread = triton_decode.problem_of(case.q, case.k, case.v, additive(mask, F16).expand(2, 4, 3, 40), softcap=3.0)
    assert (spread.mask, spread.mask_heads, spread.softcap, spread.k_scale) == ("additive", False, True, "none")


def test_layouts_that_cannot_be_read() -> None:
    q, k = torch.zeros(1, 2, 1, 32, dtype=F16), torch.zeros(1, 2, 8, 32, dtype=torch.int8)
    one = torch.ones(1)
    turned, loose = (
        torch.zeros(1, 2, 32, 8, dtype=torch.int8).transpose(2, 3),
        torch.zeros(1, 2, 8, 40, dtype=torch.int8)[..., :32],
    )
    for keys, values, mask, reason in (
        (k, turned, None, "last dimension of v must be contiguous"),
        (k, loose, None, "strides of v's codes must be multiples of 16"),
        (loose, k, None, "strides of k's codes must be multiples of 16"),
        (k, k, torch.ones(1, 1, 1, 7, dtype=torch.bool), "over 7 keys cannot serve a cache of 8"),
    ):
        with pytest.raises(ValueError, match=reason):
            triton_decode.decode(q, keys, values, mask, 1.0, k_scale=one, v_scale=one)


# --- compiled ---

POINTERS = {
    torch.bfloat16: "*bf16",
    F16: "*fp16",
    E4M3: "*fp8e4nv",
    E5M2: "*fp8e5",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
MASKS = {"none": None, "bool": "*i1", "additive": "*bf16"}
MATRIX_UNITS = r"wgmma\.mma|tcgen05\.mma"


def build(problem: Attention, target: Target) -> Any:
    """The cubin of ``decode_kernel`` as it is launched, with its plan."""
    from quant_compile.lowering.kernels.attention import _triton_decode as source

    plan, kernel = triton_decode.plan_of(problem, target), source.decode_kernel
    types = {name: "i32" for name in kernel.arg_names if name.endswith(("_b", "_h", "_t", "_n"))}
    types |= {"q_ptr": POINTERS[problem.dtype], "k_ptr": POINTERS[problem.k_dtype], "v_ptr": POINTERS[problem.v_dtype]}
    types |= {"scale": "fp32", "softcap": "fp32", "length": "i32", "kv_heads": "i32"}
    types |= {name: "*fp32" for name in ("ks_ptr", "vs_ptr", "sinks_ptr", "parts_ptr", "stats_ptr")}
    types |= {"out_ptr": POINTERS[problem.dtype], "mask_ptr": MASKS[problem.mask]}
    none: dict[str, Any] = {"m_n": 1, "ks_n": 1, "vs_n": 1}
    absent = {"mask_ptr": problem.mask, "ks_ptr": problem.k_scale, "vs_ptr": problem.v_scale}
    none |= {name: None for name, kind in absent.items() if kind == "none"}
    none |= {} if problem.sinks else {"sinks_ptr": None}
    none |= {"parts_ptr": None, "stats_ptr": None} if plan.splits == 1 else {}
    types = {name: kind for name, kind in types.items() if name not in none}
    constants = triton_decode.constants_of(problem, plan, target) | none
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return compile_cubin(kernel, target.arch, types, constants, **options)


def resources(built: Any, folder: Path) -> dict[str, int]:
    """What ptxas gave a kernel, as cuobjdump names it: REG for each thread, SHARED ..."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in re.findall(r"(\w+):(\d+)", text)}


CODED = {"k_dtype": E4M3, "v_dtype": E4M3, "k_scale": "token", "v_scale": "token"}
BUILDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama e4m3": CODED,
    "gpt-oss": {"head_size": 64, "value_size": 64, "sinks": True, "tokens": 3, "batch": 64},
    "gemma 2": {"head_size": 256, "value_size": 256, "softcap": True, "mask": "additive", **CODED, "dtype": F16},
    "deepseek": {"kv_heads": 32, "head_size": 192, "mask_heads": True, "tokens": 16, **CODED, "k_scale": "head"},
    "phi int8": {
        "head_size": 96,
        "value_size": 96,
        "mask": "none",
        **CODED,
        "k_dtype": torch.int8,
        "v_dtype": torch.int8,
    },
}


@needs_triton
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_cubins(arch: int, name: str, tmp_path: Path) -> None:
    """Products on tensor cores, K and V loaded ahead into shared memory that two programs find room for, and no spilling to speak of."""
    target = Target.fake(f"sm{arch}")
    problem = replace(LLAMA, **BUILDS[name])
    if arch == 80 and problem.k_dtype == E4M3:
        problem = replace(problem, k_dtype=torch.uint8, v_dtype=torch.uint8)
    built = build(problem, target)
    ptx = built.asm["ptx"]
    assert "mma" in ptx and "cp.async.cg" in ptx
    assert ".trans.shared.b16" in ptx and "ld.shared.b8" not in ptx, "V is turned byte by byte"
    assert built.metadata.shared <= shared_memory(target) // 2
    assert stack_bytes(built, tmp_path) <= 16


@pytest.mark.parametrize("kind", [E4M3, E5M2, torch.int8, torch.uint8])
def test_few_rows_of_codes(kind: torch.dtype) -> None:
    """A program has at most 32 rows over codes, whatever the heads and queries; under more, Triton's products go wrong (``_most_rows``)."""
    for group, tokens, size in itertools.product((1, 2, 5, 8, 16, 71), range(1, 17), triton_decode.HEAD_SIZES):
        codes = {"k_dtype": kind, "v_dtype": kind, "head_size": size, "value_size": size}
        problem = replace(LLAMA, heads=group * 8, tokens=tokens, **codes)
        for arch in (80, 90, 100, 120):
            assert triton_decode.plan_of(problem, Target.fake(f"sm{arch}")).block_m <= 32


@needs_triton
@pytest.mark.parametrize("tokens", [1, 3, 5, 16])  # 8, 24, 40 and 128 rows
@pytest.mark.parametrize("kind", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("arch", [90, 100])
def test_codes_are_operands_in_registers(arch: int, kind: torch.dtype, tokens: int) -> None:
    """No wgmma and no tcgen05 for codes, at any number of rows."""
    codes = {**CODED, "k_dtype": kind, "v_dtype": kind}
    problem = replace(LLAMA, heads=64, head_size=64, value_size=64, tokens=tokens, **codes)
    ptx = build(problem, Target.fake(f"sm{arch}")).asm["ptx"]
    assert "mma.sync" in ptx and not re.search(MATRIX_UNITS, ptx)


@needs_triton
@pytest.mark.parametrize("arch", [90, 100])
def test_sixteen_bits_use_the_newer_products(arch: int) -> None:
    """What ``test_codes_are_operands_in_registers`` looks for is there where a program has 64 rows."""
    ptx = build(replace(LLAMA, heads=64, tokens=5), Target.fake(f"sm{arch}")).asm["ptx"]
    assert re.search(MATRIX_UNITS, ptx)


ROOM: dict[str, dict[str, Any]] = {
    "one query": {},
    "no mask": {"mask": "none"},
    "additive mask": {"mask": "additive"},
    "three queries": {"tokens": 3},
    "ragged length": {"length": 2047},
    "padded heads": {"head_size": 96, "value_size": 96},
    "heads of 64": {"head_size": 64, "value_size": 64},
    "wide heads": {"head_size": 256, "value_size": 256},
    "32 rows": {"tokens": 8},
    "32 rows, wide": {"tokens": 8, "head_size": 256, "value_size": 256},
}


@needs_triton
@pytest.mark.parametrize("name", ROOM)
@pytest.mark.parametrize("kind", [E4M3, torch.int8])
@pytest.mark.parametrize("arch", [90, 100])
def test_an_sm_holds_what_plans_count_on(arch: int, kind: torch.dtype, name: str, tmp_path: Path) -> None:
    """Registers (65536) and shared memory of an SM suffice for ``per_sm`` programs over codes."""
    target = Target.fake(f"sm{arch}")
    problem = replace(LLAMA, **{**CODED, "k_dtype": kind, "v_dtype": kind, **ROOM[name]})
    plan, built = triton_decode.plan_of(problem, target), build(problem, target)
    registers = -(-resources(built, tmp_path)["REG"] // 8) * 8
    assert plan.per_sm * plan.warps * 32 * registers <= 65536
    assert plan.per_sm * built.metadata.shared <= shared_memory(target)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_combining_compiles(arch: int) -> None:
    from quant_compile.lowering.kernels.attention import _triton_decode as source

    types = {"parts_ptr": "*fp32", "stats_ptr": "*fp32", "sinks_ptr": "*bf16", "out_ptr": "*bf16", "kv_heads": "i32"}
    constants = triton_decode.combine_constants(LLAMA, 33)
    assert compile_cubin(source.combine_kernel, arch, types, constants, num_warps=4).asm["cubin"]
