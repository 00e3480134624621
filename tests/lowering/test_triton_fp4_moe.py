"""triton_fp4_moe: every step against the torch truth in Triton's interpreter, and compiled for every arch it claims."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels import triton_fp4_moe as kernel
from quant_compile.lowering.kernels import triton_moe
from quant_compile.lowering.schemes.fp4 import decode_e2m1, decode_e8m0
from quant_compile.lowering.target import Target
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

    semantic.TritonSemantic.dot_scaled = dot_scaled


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
    pairs = triton_moe.align(case.ids, p.experts, SMALL.block_m)
    legal = pairs.order[: int(pairs.blocks[2].sum())].tolist()
    truth, experts = plain_first(case, legal)
    found = kernel.first(case.x, pairs, case.w13, case.b13, p, SMALL)
    assert relative(found[0][: len(legal)], truth) <= TOLERANCE
    assert (len(found) > 1) == (spec == "NVFP4")
    if len(found) > 1:
        largest = [float(found[0][: len(legal)][torch.tensor(experts) == e].abs().max()) for e in sorted(set(experts))]
        assert found[1].view(torch.float32)[sorted(set(experts))].tolist() == largest
    exact = found[0][: len(legal)]
    inner_planes = kernel.quantize(found, pairs, case.scale2, p, SMALL)
    for got, wanted in zip(inner_planes, quantized(case, exact, experts), strict=True):
        assert torch.equal(got.view(torch.uint8)[: len(legal)], wanted)
    y = kernel.launch(*case.arguments, SMALL)
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
        check(spec, 20, 72, 40, {"bias": False, "weights": False})
    check("NVFP4", 1, 80, 48, {"activation": "silu(1.702,7.0,1.0)"})
    check("MXFP4", 40, 96, 32, {"activation": "gelu_tanh"})


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
        pairs = triton_moe.align(ids, 2, 16)
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
    from quant_compile.lowering.kernels import _triton_fp4_moe as source

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
        "BLOCK_K": chosen.block_k, "BAND": chosen.band, "EVEN_K": even, "OUT": kernel._type(torch.bfloat16),
        **kernel._activation(problem.activation),
    }  # fmt: skip
    return compile_cubin(
        source.fp4_grouped_kernel, arch, types | pointers, constants, num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("tokens", [1, 512, 4096])
@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("spec", SPECS)
def test_cubins_use_the_block_scaled_instruction(spec: str, arch: int, tokens: int) -> None:
    for gated in (True, False):
        built = compile_grouped(spec, arch, gated, tokens, even=gated)
        assert built.asm["cubin"] and re.search(r"mma\S*block_scale", built.asm["ptx"])
        assert built.metadata.shared <= {100: 227, 120: 99}[arch] * 1024
