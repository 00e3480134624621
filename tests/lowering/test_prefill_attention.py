"""Prefill attention: kernels against the reference, bounds of blocks, refusals, plans, cubins."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_compile.ir.attend import attend
from quant_compile.ir.family import Reject
from quant_compile.ir.kv import decode
from quant_compile.lowering.kernels._roofline import shared_memory
from quant_compile.lowering.kernels.attention import triton_prefill
from quant_compile.lowering.kernels.attention.triton_decode import HEAD_SIZES, Attention
from quant_compile.lowering.kernels.attention.triton_prefill import Plan
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.test_attention import BF16, E4M3, E5M2, F16, TOLERANCE, Case, additive, error, filled, mend_dot
from tests.lowering.triton_support import compile_cubin, mend_bfloat16, needs_triton, run_interpreted, stack_bytes

VALUES, REGISTERS = Plan(32, 16, 4, 2), Plan(32, 16, 4, 2, values=False)


class Prompt(Case):
    """Seeded tensors of one attention, which the prefill kernel computes.

    Values that are made of codes are rounded to the dtype of q once more than the reference has it, as ``ir/attend.py`` rounds them:
    within the same tolerance.
    """

    def found(self, mask: Tensor | None = None, *, plan: Plan | None = None, **more: Any) -> Tensor:  # type: ignore[override]
        return triton_prefill.prefill(self.q, self.k, self.v, mask, self.scale, plan=plan, **self.scales, **more)

    def check(self, mask: Tensor | None = None, *, plan: Plan | None = None, **more: Any) -> None:  # type: ignore[override]
        """Codes are tried both ways where both take them, unless a plan is given."""
        sizes = (self.k.shape[3], self.v.shape[3])
        both = bool(self.scales) and all(size & (size - 1) == 0 for size in sizes)
        for one in (plan,) if plan else (VALUES, REGISTERS) if both else (VALUES,):
            super().check(mask, plan=one, **more)  # type: ignore[arg-type]


# --- interpreted ---


def check_groups() -> None:
    """Groups of 1, 4 and 8 heads, queries and keys that fill no block, fewer queries than filled keys; no mask; causal without one."""
    for heads, kv, t in ((2, 2, 33), (4, 1, 70), (8, 1, 17)):
        case = Prompt(2, heads, kv, t, 32, 75)
        case.check()
        case.check(filled(2, t, 75, t, left=(0, 7)))
        case.check(filled(2, t, 75, 72))
    case = Prompt(1, 2, 1, 70, 32, 70)
    found = case.found(None, plan=VALUES, is_causal=True)
    assert error(found, case.wanted(filled(1, 70, 70, 70))) <= TOLERANCE[F16]
    case = Prompt(1, 2, 1, 20, 32, 75, cache=E4M3)
    for one in (VALUES, REGISTERS):
        wanted = case.wanted(filled(1, 20, 75, 20))
        assert error(case.found(None, plan=one, is_causal=True), wanted) <= TOLERANCE[F16]
    Prompt(1, 2, 1, 130, 64, 128).check(plan=triton_prefill.plan_of(LLAMA, SM90))


def check_caches() -> None:
    """All codes, with scales for each token, each head, and all; e4m3 as bytes, as sm80 reads it; bf16, as codes' q too."""
    mend_dot()
    mend_bfloat16()
    for cache in (E4M3, E5M2, torch.int8):
        for scales in ("token", "head", "tensor"):
            case = Prompt(2, 4, 2, 34, 32, 64, cache=cache, scales=scales)
            mask = filled(2, 34, 64, 50, left=(3, 0))
            case.check(mask)
            if cache == E4M3:
                case.k, case.v = case.k.view(torch.uint8), case.v.view(torch.uint8)
                case.check(mask)
    for cache in (None, E4M3, torch.int8):
        Prompt(1, 4, 2, 34, 32, 64, dtype=BF16, cache=cache).check(filled(1, 34, 64, 50))


def check_masks() -> None:
    """Left padding, windows, unfilled tails, gaps and biases, bool and additive, for all heads and for each, spread by stride 0."""
    case = Prompt(2, 4, 2, 40, 32, 130)
    gaps = filled(2, 40, 130, 128)
    gaps[..., 34:66] = False  # two blocks and more in the middle
    masks = [
        filled(2, 40, 130, 40, left=(0, 20)),
        filled(2, 40, 130, 130),
        filled(2, 40, 130, 90, window=20),
        filled(1, 40, 130, 50),
        filled(2, 40, 130, 64).expand(2, 4, 40, 130),
        filled(1, 40, 130, 64).expand(2, 4, 40, 130),
        torch.rand(2, 4, 40, 130) > 0.6,
        gaps,
    ]
    for i, mask in enumerate(masks):
        case.check(mask)
        case.check(additive(mask, torch.float32 if i % 3 else F16))
    case.check(torch.randn(2, 4, 40, 130) * 3)  # a position bias
    case.check(additive(masks[0], BF16) + torch.randn(40, 130).to(BF16))
    case.check(masks[0].transpose(2, 3).contiguous().transpose(2, 3))
    coded = Prompt(2, 4, 2, 40, 32, 130, cache=E4M3)
    for mask in (masks[2], masks[6], gaps, additive(gaps, F16)):
        coded.check(mask)


def check_variants() -> None:
    """Sinks, softcap, every head size, K wider than V, a cache whose heads lie beside one another, negative scales, far scores."""
    for more in ({"sinks": torch.randn(4)}, {"softcap": 0.5}, {"sinks": torch.randn(4).half() + 9, "softcap": 30.0}):
        for cache in (None, E4M3):
            case = Prompt(2, 4, 2, 36, 32, 64, cache=cache)
            case.check(filled(2, 36, 64, 50), **more)
            case.check(**more)
    for d, dv, cache in (
        (64, 0, E4M3),
        (80, 0, None),
        (96, 32, E4M3),
        (128, 0, None),
        (192, 128, torch.int8),
        (256, 0, E4M3),
    ):
        case = Prompt(1, 2, 1, 20, d, 40, dv=dv, cache=cache)
        case.check(filled(1, 20, 40, 33))
    case = Prompt(2, 4, 2, 36, 32, 64)
    case.k, case.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.k, case.v))
    case.check(filled(2, 36, 64, 50))
    for scale in (40.0, -1.0):
        case.scale = scale
        case.check(filled(2, 36, 64, 50))


def check_odd_numbers() -> None:
    """Rows that see nothing are zeros; what nobody sees has no influence; NaN that is seen is NaN."""
    for cache, one in ((None, VALUES), (E4M3, VALUES), (E4M3, REGISTERS)):
        case = Prompt(2, 4, 2, 36, 32, 64, cache=cache)
        mask = filled(2, 36, 64, 40, left=(0, 100))
        mask[0, :, :3] = False
        for form in (mask, additive(mask, F16), torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
            found = case.found(form, plan=one)
            assert not found[1].any() and not found[0, :, :3].any() and found[0, :, 3:].any(-1).all()
            assert not case.found(form, plan=one, sinks=torch.zeros(4))[1].any()
        mask = filled(2, 36, 64, 40, left=(0, 20))
        before = case.found(mask, plan=one)
        hidden = ~mask.any(2)[:, 0]
        for plane in (case.k, case.v, *(case.scales.values())):
            spread = hidden[:, None].expand(plane.shape[:3])
            if plane.dtype == E4M3:
                plane.view(torch.uint8)[spread] = 0x7F
            else:
                plane[spread] = float("nan")
        assert torch.equal(case.found(mask, plan=one), before)
        (case.scales["v_scale"] if cache else case.v)[0, 0, 3] = float("nan")
        found = case.found(mask, plan=one)
        assert found[0, :2, 4:].isnan().all() and not found[0, 2:].isnan().any() and not found[1].isnan().any()


def check_unread() -> None:
    """Memory past the filled keys, and before the window, may not be read at all: touching it ends the process."""
    import ctypes
    import mmap

    d, length, page = 32, 1024, mmap.PAGESIZE
    row = d * 2
    first, end = 2 * page // row, 4 * page // row  # readable keys; all else is protected
    case = Prompt(1, 2, 1, 34, d, length)
    mask = torch.zeros(1, 1, 34, length, dtype=torch.bool)
    mask[..., first + 3 : end - 5] = filled(1, 34, end - first - 8, end - first - 8)[0, 0]
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
    for form in (mask, additive(mask, F16)):
        assert error(case.found(form, plan=VALUES), wanted) <= TOLERANCE[F16]


def check_reach() -> None:
    """Words of blocks: first and end of what anyone sees, and whether all see all; of masks that are spread, too."""
    mask = filled(1, 40, 75, 60, window=30)
    for form in (mask, additive(mask, F16)):
        words = triton_prefill.reach_of(form, 32, 16)
        assert words.shape == (1, 1, 2 * 5)
        for tile in range(2):
            for block in range(5):
                part = mask[0, 0, tile * 32 : tile * 32 + 32, block * 16 : block * 16 + 16]
                some = part.any(0).nonzero().flatten()
                word = int(words[0, 0, tile * 5 + block])
                assert (word >> 18) == (part.shape[1] == 16 and bool(part.all())), (tile, block)
                wanted = (int(some[0]), int(some[-1]) + 1) if len(some) else (0, 0)
                assert (word & 511, word >> 9 & 511) == wanted, (tile, block)
    assert triton_prefill.reach_of(mask.expand(3, 4, 40, 75), 32, 16).shape == (3, 4, 10)
    assert triton_prefill.reach_of(mask.repeat(3, 4, 1, 1), 32, 16).shape == (3, 4, 10)
    case = Prompt(3, 4, 2, 40, 32, 75, cache=E4M3)
    for form in (mask.expand(3, 4, 40, 75), mask.repeat(3, 4, 1, 1)):
        words = triton_prefill.reach_of(form, 32, 16)
        assert torch.equal(triton_prefill.reach_of(mask, 32, 16).expand(3, 4, 10), words)
        blocks, other = (VALUES.block_m, VALUES.block_n), triton_prefill.reach_of(form, 16, 16)
        wanted = case.found(form, plan=VALUES)
        assert blocks == (32, 16) and torch.equal(case.found(form, plan=VALUES, reach=words, blocks=blocks), wanted)
        # By other blocks, or by nobody knows which: made anew.
        assert torch.equal(case.found(form, plan=VALUES, reach=other, blocks=(16, 16)), wanted)
        assert torch.equal(case.found(form, plan=VALUES, reach=other), wanted)
        for wrong in (other, words[:2].contiguous()):
            with pytest.raises(ValueError, match="words of a mask"):
                case.found(form, plan=VALUES, reach=wrong, blocks=blocks)


def check_against_the_truth_of_graphs() -> None:
    """``ir/attend.py``, which rounds values of codes as the kernel does, in bf16 too."""
    mend_dot()
    mend_bfloat16()
    for dtype in (F16, BF16):
        case = Prompt(2, 4, 2, 36, 64, 64, dtype=dtype, cache=E4M3)
        mask = filled(2, 36, 64, 50, left=(0, 9))
        scales = [scale[..., None] for scale in case.scales.values()]
        codes = [x.view(torch.uint8) for x in (case.k, case.v)]
        more = {"softcap": 5.0, "sinks": torch.randn(4)}
        wanted = attend(case.q, *codes, mask, case.scale, False, 5.0, more["sinks"], None, *scales, "e4m3")  # type: ignore[arg-type]
        assert error(case.found(mask, plan=VALUES, **more), wanted) <= TOLERANCE[dtype]
        values = [decode(x, scale, "e4m3", dtype) for x, scale in zip(codes, scales, strict=True)]
        found = triton_prefill.prefill(case.q, *values, mask, case.scale, plan=VALUES, **more)  # type: ignore[arg-type]
        assert torch.equal(found, case.found(mask, plan=VALUES, **more)), "the values are the same, bit for bit"


CHECKS = (
    check_groups,
    check_caches,
    check_masks,
    check_variants,
    check_odd_numbers,
    check_unread,
    check_reach,
    check_against_the_truth_of_graphs,
)


@needs_triton
@pytest.mark.parametrize("function", [check.__name__ for check in CHECKS])
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


# --- fit and plans ---

LLAMA = Attention(4, 32, 8, 2048, 128, 128, 4096, BF16, BF16, BF16, "bool")
CODED = {"k_dtype": E4M3, "v_dtype": E4M3, "k_scale": "token", "v_scale": "token"}
SM90 = Target.fake("sm90")


@pytest.mark.parametrize(
    ("change", "target", "reason"),
    [
        ({}, Target.fake("cpu"), "needs a CUDA GPU"),
        ({}, Target.fake("sm90", FAKE_OPS - {"triton"}), "triton is not installed"),
        ({"tokens": 0}, SM90, "there is no query"),
        ({"batch": 0}, SM90, "there is no query"),
        ({"kv_heads": 5}, SM90, "32 query heads are no multiple of 5"),
        ({"head_size": 48}, SM90, "heads must be of 32, 64, 80, 96, 128, 192, 256, not 48"),
        ({"length": 0}, SM90, "needs 1 to"),
        ({"dtype": torch.float32}, SM90, "q must be bfloat16 or float16"),
        ({"k_dtype": E4M3}, SM90, "must both be codes"),
    ],
)
def test_refusals(change: dict[str, Any], target: Target, reason: str) -> None:
    answer = triton_prefill.fit(replace(LLAMA, **change), target)
    assert isinstance(answer, Reject) and reason in answer.reason


def test_it_serves_the_rest() -> None:
    for size in HEAD_SIZES:
        for change in ({}, CODED, {**CODED, "dtype": F16}):
            problem = replace(LLAMA, head_size=size, value_size=size, **change)
            assert not isinstance(triton_prefill.fit(problem, SM90), Reject), problem


def test_the_plan_is_one_for_all_tokens_lengths_and_batches() -> None:
    """Layers share the words of a mask, which are for its blocks."""
    plans = {
        triton_prefill.plan_of(replace(LLAMA, tokens=t, length=n, batch=b, **more), SM90)
        for t, n, b in ((17, 64, 1), (8192, 9000, 16))
        for more in ({}, CODED)
    }
    assert len(plans) == 1


def test_few_tiles_are_smaller() -> None:
    """Where sizes are known: as many programs as there are SMs, codes without a launch before, and what fits every GPU."""
    few, many = replace(LLAMA, batch=1, tokens=100, length=200), replace(LLAMA, batch=16, tokens=100, length=200)
    assert triton_prefill.plan_for(many, SM90) == triton_prefill.plan_of(many, SM90)
    assert triton_prefill.blocks_of(few, SM90) == (64, 64) != triton_prefill.blocks_of(many, SM90)
    assert not triton_prefill.plan_for(replace(few, **CODED), SM90).values
    for size in HEAD_SIZES:
        for arch in (80, 89, 90, 100, 120):
            target = Target.fake(f"sm{arch}")
            for change in ({}, CODED):
                problem = replace(few, head_size=size, value_size=size, **change)
                plan = triton_prefill.plan_for(problem, target)
                assert triton_prefill.unsafe(problem, plan, target) is None
                assert triton_prefill._shared(problem, plan) <= shared_memory(target)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_plans_to_compare_are_safe_and_fit(arch: int, size: int) -> None:
    target = Target.fake(f"sm{arch}")
    for change in ({}, CODED):
        problem = replace(LLAMA, head_size=size, value_size=size, **change)
        plans = triton_prefill.plans_of(problem, target)
        assert plans[0] == triton_prefill.plan_of(problem, target) and len(plans) == len(set(plans)) > 1
        assert all(triton_prefill.unsafe(problem, plan, target) is None for plan in plans)
        split = bool(change) and size & (size - 1) == 0
        assert split == any(not plan.values for plan in plans)


def test_unsafe_plans_are_refused() -> None:
    """Before anything is launched: on sm90 such products were wrong, and read other memory."""
    case = Prompt(1, 2, 1, 20, 64, 40, cache=E4M3)
    with pytest.raises(ValueError, match="wgmma"):
        case.found(plan=Plan(64, 64, 4, 2, values=False))
    problem = replace(LLAMA, **CODED, head_size=96, value_size=96)
    assert "two parts" in str(triton_prefill.unsafe(problem, REGISTERS, SM90))
    with pytest.raises(ValueError, match="causal as well"):
        case.found(filled(1, 20, 40, 20), is_causal=True)


# --- cubins ---

MATRIX_UNITS = r"wgmma\.mma_async|tcgen05\.mma"
TYPES = {BF16: "*bf16", F16: "*fp16", E4M3: "*fp8e4nv", E5M2: "*fp8e5", torch.int8: "*i8", torch.uint8: "*u8"}


def types_of(kernel: Any, problem: Attention) -> dict[str, str]:
    p = problem
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {"q_ptr": TYPES[p.dtype], "k_ptr": TYPES[p.k_dtype], "v_ptr": TYPES[p.v_dtype], "out_ptr": TYPES[p.dtype]}
    types |= {"mask_ptr": "*i1" if p.mask == "bool" else "*bf16", "reach_ptr": "*i32", "sinks_ptr": TYPES[p.dtype]}
    types |= {"ks_ptr": "*fp32", "vs_ptr": "*fp32", "k_out_ptr": TYPES[p.dtype], "v_out_ptr": TYPES[p.dtype]}
    return types | {"scale": "fp32", "softcap": "fp32"}


def build(kernel: Any, problem: Attention, constants: dict[str, Any], target: Target, **options: int) -> Any:
    p = problem
    missing = {"mask_ptr": p.mask == "none", "reach_ptr": p.mask == "none", "sinks_ptr": not p.sinks}
    missing |= {"ks_ptr": p.k_scale == "none", "vs_ptr": p.v_scale == "none"}
    none: dict[str, Any] = {name: None for name, absent in missing.items() if absent and name in kernel.arg_names}
    none |= {name: 1 for name in ("m_n", "ks_n", "vs_n") if name in kernel.arg_names}
    types = {n: kind for n, kind in types_of(kernel, p).items() if n not in none and n not in constants}
    return compile_cubin(kernel, target.arch, types, constants | none, **options)


def build_plan(problem: Attention, plan: Plan, target: Target) -> Any:
    from quant_compile.lowering.kernels.attention import _triton_prefill as source

    coded = problem.k_dtype not in (BF16, F16) and not plan.values
    if not coded:
        problem = replace(problem, k_dtype=problem.dtype, v_dtype=problem.dtype, k_scale="none", v_scale="none")
    constants = triton_prefill.constants_of(problem, plan, target)
    kernel = source.codes_kernel if coded else source.prefill_kernel
    return build(kernel, problem, constants, target, num_warps=plan.warps, num_stages=plan.stages)


BUILDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt-oss": {"head_size": 64, "value_size": 64, "sinks": True},
    "gemma 2": {"head_size": 256, "value_size": 256, "softcap": True, "mask": "additive", "dtype": F16},
    "deepseek": {"kv_heads": 32, "head_size": 192, "mask_heads": True},
    "phi": {"head_size": 80, "value_size": 80, "mask": "none"},
    "phi 3": {"head_size": 96, "value_size": 96},
}


@needs_triton
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_cubins(arch: int, name: str, tmp_path: Path) -> None:
    """Products on tensor cores, K and V loaded ahead into shared memory that there is, and no spilling to speak of."""
    target = Target.fake(f"sm{arch}")
    problem = replace(LLAMA, **BUILDS[name])
    problem = replace(problem, k_dtype=problem.dtype, v_dtype=problem.dtype)
    built = build_plan(problem, triton_prefill.plan_of(problem, target), target)
    ptx = built.asm["ptx"]
    assert "cp.async.cg" in ptx
    assert re.search(MATRIX_UNITS if arch in (90, 100) else r"mma\.sync", ptx)
    assert built.metadata.shared <= shared_memory(target)
    assert stack_bytes(built, tmp_path) <= 64


@needs_triton
@pytest.mark.parametrize("kind", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_codes_are_operands_in_registers(arch: int, kind: torch.dtype) -> None:
    """No wgmma and no tcgen05 in any plan that converts in registers."""
    target = Target.fake(f"sm{arch}")
    kind = torch.uint8 if arch == 80 and kind == E4M3 else kind
    problem = replace(LLAMA, **CODED | {"k_dtype": kind, "v_dtype": kind})
    plans = [plan for plan in triton_prefill.plans_of(problem, target) if not plan.values]
    wide = [plan for plan in plans if plan.block_m == 64][-1:]
    assert wide
    for plan in (plans[0], *wide):
        ptx = build_plan(problem, plan, target).asm["ptx"]
        assert "mma.sync" in ptx and not re.search(MATRIX_UNITS, ptx), plan


@needs_triton
@pytest.mark.parametrize("kind", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_what_comes_before_compiles(arch: int, kind: torch.dtype) -> None:
    """Words of masks, and values of codes."""
    from quant_compile.lowering.kernels.attention import _triton_prefill as source

    kind = torch.uint8 if arch == 80 and kind == E4M3 else kind
    target, plan = Target.fake(f"sm{arch}"), Plan(128, 64, 8, 3)
    for change in ({}, {"mask": "additive", "head_size": 80, "value_size": 96, "k_scale": "head"}):
        problem = replace(LLAMA, **CODED | {"k_dtype": kind, "v_dtype": kind} | change)
        mask = triton_prefill.MASKS.index(problem.mask)
        assert build(source.reach_kernel, problem, {"MASK": mask, "BM": 128, "BN": 64}, target, num_warps=4).asm[
            "cubin"
        ]
        constants = triton_prefill.values_constants(problem, plan, mask)
        assert build(source.values_kernel, problem, constants, target, num_warps=4).asm["cubin"]
