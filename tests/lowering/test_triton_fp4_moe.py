"""triton_fp4_moe: every step against the torch truth in Triton's interpreter, and compiled for every arch it claims."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels import _launch
from quant_compile.lowering.kernels.experts import _frame
from quant_compile.lowering.kernels.experts import triton_fp4_moe as kernel
from quant_compile.lowering.moe import choose_moe
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.schemes.fp4 import decode_e2m1, decode_e8m0
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.test_triton_moe import Case, mend_float8, relative
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

SPECS = ("NVFP4", "NVFP4_STATIC", "MXFP4")
SMALL = kernel.Tiles(16, 32, 64, 4, 2)
# f16 rounds by 2**-11 of a value, 2.8e-4 of a norm.
TOLERANCE = 1e-3
F16 = torch.float16


def mend_dot_scaled() -> None:
    """Give Triton 3.6's interpreter the block-scaled product of e2m1 operands, which it lacks: exact products, f32 sums."""
    from triton.language import semantic
    from triton.runtime import interpreter

    def side(handle: Any, scale: Any) -> Tensor:
        """Bytes [rows, k / 2] and scales [rows, groups] -> [rows, k]."""
        values = decode_e2m1(torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint8)))
        bits = torch.from_numpy(np.ascontiguousarray(scale.data).view(np.uint8))
        fp8 = scale.dtype.scalar.name == "fp8e4nv"
        factors = bits.view(torch.float8_e4m3fn).float() if fp8 else decode_e8m0(bits)
        return values * factors.repeat_interleave(values.shape[1] // factors.shape[1], 1)

    def dot_scaled(self: Any, a: Any, sa: Any, fa: str, b: Any, sb: Any, fb: str, acc: Any, *rest: Any) -> Any:
        assert fa == fb == "e2m1"
        turned = interpreter.TensorHandle(b.handle.data.T, b.handle.dtype)
        total = acc.handle.data + (side(a.handle, sa.handle) @ side(turned, sb.handle).t()).numpy()
        return self.tensor(interpreter.TensorHandle(total, acc.handle.dtype), acc.type)

    setattr(semantic.TritonSemantic, "dot_scaled", dot_scaled)  # noqa: B010


def plain_first(case: Case, order: list[int]) -> tuple[Tensor, list[int]]:
    """The truth of the hidden layer in the order of pairs, and each row's expert."""
    p, family = case.problem, family_of(case.problem.scheme)
    rows, experts = [], []
    for pair in order:
        token, expert = pair // p.top_k, int(case.ids.flatten()[pair])
        x = tuple(q if q.dim() == 1 else q[token : token + 1] for q in case.x)
        bias = None if case.b13 is None else case.b13[expert]
        hidden = family.linear(x, tuple(q[expert] for q in case.w13), bias, p.scheme, p.dtype)
        rows.append(p.activation(hidden))
        experts.append(expert)
    return torch.cat(rows), experts


def quantized(case: Case, hidden: Tensor, experts: list[int]) -> Planes:
    """Codes and scales of the hidden layer, expert by expert."""
    p, family, of = case.problem, family_of(case.problem.scheme), torch.tensor(experts)
    parts = []
    for expert in sorted(set(experts)):
        parts.append(family.quantize_input(hidden[of == expert], p.scheme, case.scale2)[:2])
    return tuple(torch.cat([q.view(torch.uint8) for q in planes]) for planes in zip(*parts, strict=True))


def check(spec: str, tokens: int, hidden: int, inner: int, options: dict[str, Any]) -> None:
    """Every step alone, fed with the truth of the step before, then the whole."""
    case = Case(spec, tokens, 5, 2, hidden, inner, dtype=F16, **options)
    if tokens > 2:
        case.ids[0, 0], case.ids[-1, -1] = -1, 9
    p = case.problem
    pairs = _frame.align(case.ids, p.experts, SMALL.block_m)
    legal = pairs.order[: int(pairs.blocks[2].sum())].tolist()
    truth, experts = plain_first(case, legal)
    found = kernel.first(case.x, pairs, case.w13, case.b13, p, SMALL)
    exact, of = found[0][: len(legal)], torch.tensor(experts)
    assert relative(exact, truth) <= TOLERANCE
    assert len(found) == (2 if spec == "NVFP4" else 1)
    for amax in found[1:]:
        chosen = sorted(set(experts))
        assert amax.view(torch.float32)[chosen].tolist() == [float(exact[of == e].abs().max()) for e in chosen]
    inner_planes = kernel.quantize(found, pairs, case.scale2, p, SMALL)
    for got, wanted in zip(inner_planes, quantized(case, exact, experts), strict=True):
        assert torch.equal(got.view(torch.uint8)[: len(legal)], wanted)
    y = kernel.launch(*case.arguments, chosen=SMALL)
    # A hidden value near a tie may become the next code: the truth is recomputed from the kernel's own hidden layer.
    assert relative(y, expected(case, exact, experts, legal)) <= TOLERANCE


def expected(case: Case, hidden: Tensor, experts: list[int], legal: list[int]) -> Tensor:
    p, family, of = case.problem, family_of(case.problem.scheme), torch.tensor(experts)
    total = torch.zeros(case.ids.shape[0], p.hidden)
    weights = torch.ones(case.ids.numel()) if case.weights is None else case.weights.flatten().float()
    for expert in sorted(set(experts)):
        rows = (of == expert).nonzero().flatten()
        planes = family.quantize_input(hidden[rows], p.scheme, case.scale2)
        bias = None if case.b2 is None else case.b2[expert]
        out = family.linear(planes, tuple(q[expert] for q in case.w2), bias, p.scheme, p.dtype).float()
        chosen = torch.tensor(legal)[rows]
        total.index_add_(0, chosen // p.top_k, out * weights[chosen, None])
    return total.to(p.dtype)


def check_specs() -> None:
    """Each scheme, even and ragged sizes, with and without bias and weights, other activations."""
    mend_dot_scaled()
    mend_float8()
    for spec in SPECS:
        check(spec, 9, 64, 64, {})
    check("NVFP4", 20, 72, 24, {"bias": False, "weights": False})
    check("NVFP4_STATIC", 1, 80, 48, {"activation": "silu(1.702,7.0,1.0)"})
    check("MXFP4", 20, 72, 24, {"activation": "gelu_tanh", "bias": False})


def check_quantizer() -> None:
    """Bit equality on what is awkward: ties, zeros, tiny groups, huge ones, NaN and inf."""
    mend_dot_scaled()
    mend_float8()
    for spec in SPECS:
        family, p = family_of(parse(spec)), MoeProblem(parse(spec), 2, 64, 96, 1, Activation("silu"), torch.float32)
        g = torch.Generator().manual_seed(1)
        rows = torch.randn(40, 96, generator=g) * torch.logspace(-8, 3, 40)[:, None]
        rows[3] = 0
        rows[4, :16] = torch.tensor(
            [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6]
        )
        ids = (torch.arange(40) >= 30).long()[:, None]
        if spec != "NVFP4_STATIC":
            rows[35, 50], rows[36, 3] = float("nan"), float("inf")
        scale2 = torch.tensor([0.02]) if spec == "NVFP4_STATIC" else None
        pairs = _frame.align(ids, 2, 16)
        amax = torch.stack([rows[:30].abs().max(), rows[30:].abs().max()]).view(torch.int32)
        hidden = (rows, amax) if spec == "NVFP4" else (rows,)
        found = kernel.quantize(hidden, pairs, scale2, p, SMALL)
        for start, stop in ((0, 30), (30, 40)):
            wanted = family.quantize_input(rows[start:stop], p.scheme, scale2)
            got = tuple(q[start:stop] for q in found)
            bad = family_bad(wanted)
            assert torch.equal(family_bad(got), bad)
            for a, b in zip(got, wanted[:2], strict=True):
                share = b.shape[1] // bad.shape[1]
                fine = ~bad.repeat_interleave(share, 1)
                assert torch.equal(a.view(torch.uint8)[fine], b.view(torch.uint8)[fine]), (spec, start)


def family_bad(planes: Planes) -> Tensor:
    """Groups whose scale is NaN, whatever their codes."""
    scale = planes[1]
    return scale.float().isnan() if scale.dtype == torch.float8_e4m3fn else scale == 255


@needs_triton
def test_steps_and_blocks() -> None:
    run_interpreted(__name__, "check_specs")


@needs_triton
def test_quantizer_is_that_of_the_family() -> None:
    run_interpreted(__name__, "check_quantizer")


# --- compiled ---


def compile_grouped(spec: str, arch: int, gated: bool, tokens: int, even: bool) -> Any:
    from quant_compile.lowering.kernels.experts import _triton_fp4_moe as source

    problem = MoeProblem(parse(spec), 128, 2048, 768, 8, Activation("silu"), torch.bfloat16)
    chosen = kernel.tiles(problem, tokens, Target.fake(f"sm{arch}"))
    nv = spec != "MXFP4"
    scale = "*fp8e4nv" if nv else "*u8"
    types = dict.fromkeys(("x_ptr", "w_ptr"), "*u8") | dict.fromkeys(("sx_ptr", "sw_ptr"), scale)
    types |= {"y_ptr": "*bf16", "sorted_ptr": "*i32", "blocks_ptr": "*i32"}
    types |= dict.fromkeys(("most_blocks", "n", "k", "top_k"), "i32")
    constants: dict[str, Any] = dict.fromkeys(("gx_ptr", "gw_ptr", "scale2_ptr", "amax_ptr", "bias_ptr"))
    pointers = {"gw_ptr": "*fp32"} if nv else {}
    if nv and gated:
        pointers["gx_ptr"] = "*fp32"
    if spec == "NVFP4":
        pointers["amax_ptr"] = "*i32"
    if spec == "NVFP4_STATIC" and not gated:
        pointers["scale2_ptr"] = "*fp32"
    constants = {name: None for name in constants if name not in pointers}
    constants |= {
        "GATED": gated, "GROUP": kernel.group_of(problem), "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k, "BAND": chosen.band, "EVEN_K": even, "OUT": _launch.triton_type(torch.bfloat16),
        **_frame.activation_constants(problem.activation),
    }  # fmt: skip
    return compile_cubin(
        source.fp4_grouped_kernel, arch, types | pointers, constants, num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("spec", ["NVFP4", "MXFP4"])
def test_cubins_use_the_block_scaled_instruction(spec: str, arch: int, tokens: int) -> None:
    for gated in (True, False):
        built = compile_grouped(spec, arch, gated, tokens, even=gated)
        assert built.asm["cubin"] and re.search(r"mma\S*block_scale", built.asm["ptx"])
        assert built.metadata.shared <= {100: 227, 120: 99}[arch] * 1024


@needs_triton
@pytest.mark.parametrize("spec", SPECS)
def test_quantizer_compiles(spec: str) -> None:
    from quant_compile.lowering.kernels.experts import _triton_fp4_moe as source

    nv, constants = spec != "MXFP4", dict[str, Any]()
    types = {"h_ptr": "*bf16", "q_ptr": "*u8", "s_ptr": "*fp8e4nv" if nv else "*u8", "blocks_ptr": "*i32"}
    types |= dict.fromkeys(("most_blocks", "n", "groups_n"), "i32")
    pointers = {"NVFP4": {"amax_ptr": "*i32"}, "NVFP4_STATIC": {"scale2_ptr": "*fp32"}, "MXFP4": {}}[spec]
    constants = {name: None for name in ("amax_ptr", "scale2_ptr") if name not in pointers}
    constants |= {"GROUP": 16 if nv else 32, "NV": nv, "BLOCK_M": 128, "BLOCK_N": 32}
    for arch in (100, 120):
        assert compile_cubin(source.fp4_quantize_kernel, arch, types | pointers, constants, num_warps=4).asm["cubin"]


# --- selection ---


REFUSALS = [
    ("NVFP4", {}, Target.fake("cpu"), "needs a CUDA GPU"),
    ("NVFP4", {}, Target.fake("sm90"), "needs sm100 or newer, this is sm90"),
    ("NVFP4", {}, replace(Target.fake("sm120"), arch=121), "sm100, sm103 and sm120, this is sm121"),
    ("MXFP4", {}, replace(Target.fake("sm100"), arch=110), "sm100, sm103 and sm120, this is sm110"),
    ("MXFP4", {}, Target.fake("sm100", FAKE_OPS - {"triton"}), "triton is not installed"),
    ("NVFP4", {"dtype": torch.float32}, Target.fake("sm100"), "bfloat16 or float16"),
    ("NVFP4A16", {}, Target.fake("sm100"), "multiplies FP4 weights by FP4 inputs"),
    ("FP8_DYNAMIC", {}, Target.fake("sm100"), "multiplies FP4 weights by FP4 inputs"),
]


def qwen(spec: str) -> MoeProblem:
    """The shape of Qwen3-30B-A3B."""
    return MoeProblem(parse(spec), 128, 2048, 768, 8, Activation("silu"), torch.bfloat16)


@pytest.mark.parametrize(("spec", "changes", "target", "reason"), REFUSALS)
def test_refusals(spec: str, changes: dict[str, Any], target: Target, reason: str) -> None:
    answer = kernel.fit(replace(qwen(spec), **changes), 16, target)
    assert isinstance(answer, Reject) and reason in answer.reason


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("target", ["sm100", "sm120"])
def test_it_serves_any_sizes_and_numbers_of_tokens(spec: str, target: str) -> None:
    odd = replace(qwen(spec), hidden=1000, intermediate=333, has_bias=True, dtype=F16)
    for problem in (qwen(spec), odd):
        answers = [kernel.fit(problem, tokens, Target.fake(target)) for tokens in (1, 64, 4096)]
        assert all(isinstance(answer, Rank) for answer in answers)
    only = frozenset({"triton"})
    assert {name for _, name in choose_moe(odd, Target.fake(target, only)).table} == {"triton_fp4_moe"}
