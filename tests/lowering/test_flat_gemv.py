"""``triton_flat_gemv`` without a GPU: numbers in Triton's interpreter, refusals, and cubins."""

from __future__ import annotations

import pytest
import torch

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.w4a8 import humming_4bit
from quant_compile.lowering.kernels.w4a8 import triton_flat_gemv as gemv
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import choose
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

SPECS = ("W4A8", "int4.group64+int8.tensor", "int4.channel+int8.token.dynamic")
H200 = Target.fake("sm90")


def check(spec: str) -> None:
    """Tokens, plans whose stretches do and don't divide k, with bias; f32 reference, one rounding to f16."""
    scheme = parse(spec)
    for n, k, tokens in ((128, 256, (1, 2, 3)), (128, 384, (3,))):
        problem = Problem(scheme, n, k, torch.float16, has_bias=True)
        family = family_of(scheme)
        rows = family.quantize_weight((torch.randn(n, k) * 0.05).half(), scheme)
        packed, bias = humming_4bit.pack_flat(rows, problem), torch.randn(n).half()
        for m in tokens:
            x = family.quantize_input(torch.randn(m, k).half(), scheme, torch.tensor([0.03]) if scheme.static else None)
            wanted = family.linear(x, rows, bias, scheme, torch.float32)
            for plan in (gemv.Plan(16, 2, 1), gemv.Plan(64, 4, 4)):
                got = gemv.launch(x, packed, bias, problem, plan).float()
                assert ((got - wanted).norm() / wanted.norm()).item() <= 5e-4, (spec, n, k, m, plan)


@needs_triton
@pytest.mark.parametrize("spec", SPECS)
def test_numbers(spec: str) -> None:
    run_interpreted(__name__, "check", spec)


@needs_triton
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_cubins(arch: int) -> None:
    """dp4a, and 16 bytes of weights in a load."""
    from quant_compile.lowering.kernels.w4a8 import _triton_flat_gemv as source

    types = {
        "x_ptr": "*i64",
        "w_ptr": "*i32",
        "sx_ptr": "*fp32",
        "sw_ptr": "*bf16",
        "y_ptr": "*bf16",
        "bias_ptr": "*bf16",
    }
    types |= {name: "i32" for name in ("m", "n", "spans", "sx_row")}
    constants = {"M": 2, "ROWS": 16, "PARTS": 16, "CHUNKS": 4, "GROUPED": True, "EVEN": True, "ASM": True}
    ptx = compile_cubin(source.flat_kernel, arch, types, constants, num_warps=8).asm["ptx"]
    assert "dp4a.s32.s32" in ptx and "v4.b32" in ptx


def test_refusals_and_choice() -> None:
    problem = Problem(parse("W4A8"), 4096, 4096, torch.bfloat16)
    answer = gemv.fit(problem, 3, H200)
    assert isinstance(answer, Reject) and "at most 2 rows" in answer.reason
    without = Target.fake("sm90", FAKE_OPS - {"humming"})
    answer = gemv.fit(problem, 1, without)
    assert isinstance(answer, Reject) and "humming" in answer.reason
    wrong = gemv.fit(Problem(parse("W4AFP8"), 4096, 4096, torch.bfloat16), 1, H200)
    assert isinstance(wrong, Reject)
    chosen = choose(problem, H200)
    if chosen.layout == "w4_flat":
        assert chosen.kernel_for(1).name == "triton_flat_gemv"
