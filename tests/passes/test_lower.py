"""lower: sglq ops become ATen and kernel calls, none is left, and the numbers stay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from quant_compile.ir.errors import GraphError, NoKernelError
from quant_compile.ir.graph import PlaneRef, lines, verify
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.registry import Problem, layouts
from quant_compile.lowering.select import Dispatch, Request, choose
from quant_compile.lowering.target import Target
from quant_compile.passes import PIPELINE
from quant_compile.passes.insert_quant import insert_quant
from quant_compile.passes.lower import lower
from quant_compile.passes.plan import PassReport, Plan
from tests.ir.tracing import Holder, Traced, eager_linear, plan_for, relative_error, run, trace
from tests.passes.attention import QKV, block, example, traced_block, wanted

SPECS = [
    "FP8_DYNAMIC",
    "FP8_TENSOR_DYNAMIC",
    "FP8_E5M2_DYNAMIC",
    "FP8_BLOCK",
    "W8A8",
    "W8A16",
    "W4A16",
    "W4A16_ASYM",
    "int4.group32+16",
]
STATIC = {"q": 0.02, "k": 0.02, "v": 0.02, "o": 0.01}


def lowered(traced: Traced, schemes: Any, **changes: Any) -> tuple[fx.GraphModule, PassReport, Plan]:
    """The graph after all passes."""
    plan = plan_for(traced, schemes, **changes)
    gm, report = traced.gm, PassReport("none")
    for one_pass in PIPELINE:
        gm, report = one_pass(gm, plan)
    return gm, report, plan


def test_graph() -> None:
    gm, report, _ = lowered(traced_block(), QKV)
    assert lines(gm) == [
        "  l_inputs_0_: f32[2, 3, 40] = input",
        "  l_self_parameters_o_: f32[16, 40] = input",
        "  q__data_joined: i8[40, 40] = plane q + k + v",
        "  q__scale_joined: f32[40, 1] = plane q + k + v",
        "  l_self_parameters_bias__joined: f32[40] = plane q + k + v",
        "  abs_1 = abs(l_inputs_0_)",
        "  amax = amax(abs_1, -1, keepdim=True)",
        "  to = aten.to(amax, f32)",
        "  clamp_min = clamp_min(to, 7.888609052210118e-31)",
        "  mul = mul(clamp_min, 0.007874015748031496)",
        "  float_1 = aten.to(l_inputs_0_, f32)",
        "  reciprocal = reciprocal(mul)",
        "  mul_1 = mul(float_1, reciprocal)",
        "  round_1 = round(mul_1)",
        "  clamp = clamp(round_1, -127.0, 127.0)",
        "  to_1 = aten.to(clamp, i8)",
        "* linear_default_4: f32[2, 3, 40] = sglq_kernels.linear([to_1, mul], [q__data_joined, q__scale_joined], "
        "l_self_parameters_bias__joined, 'W8A8|40/3|40|float32|1|rows|0|4096=reference')  # q + k + v W8A8",
        "  narrow: f32[2, 3, 24] = narrow(linear_default_4, -1, 0, 24)",
        "  narrow_1: f32[2, 3, 8] = narrow(linear_default_4, -1, 24, 8)",
        "  narrow_2: f32[2, 3, 8] = narrow(linear_default_4, -1, 32, 8)",
        "  cat: f32[2, 3, 40] = cat([narrow, narrow_1, narrow_2], -1)",
        "  linear_2: f32[2, 3, 16] = linear(cat, l_self_parameters_o_)",
        "  return [linear_2]",
    ]
    assert report.rewrote == ["q + k + v: rows, reference"]
    (slots,) = report.dispatches
    assert len(slots) == 3 and report.dispatches[slots].ranges == "reference"


@pytest.mark.parametrize("spec", SPECS)
def test_equals_eager(spec: str) -> None:
    traced = traced_block()
    gm, _, _ = lowered(traced, spec)
    assert relative_error(run(gm, traced), wanted(block(), example(), dict.fromkeys("qkvo", spec))) < 1e-6


@pytest.mark.parametrize("spec", ["FP8", "W8A8_STATIC"])
def test_static_equals_eager(spec: str) -> None:
    traced = traced_block()
    slots = {slot: 0 if name != "o" else 1 for slot, name in traced.names.items()}
    gm, _, _ = lowered(traced, spec, scale_class=slots)
    reference = wanted(block(), example(), dict.fromkeys("qkvo", spec), STATIC)
    assert relative_error(run(gm, traced, STATIC), reference) < 1e-6


def on_cpu(problem: Problem, name: str) -> Dispatch:
    """The choice of this machine's kernels."""
    return choose(problem, Target.fake("cpu"), Request(), name)


@pytest.mark.parametrize("spec", SPECS)
def test_cpu_kernels_over_their_own_layouts(spec: str) -> None:
    """Sizes that fit the packed CPU layouts; planes are declared and named after the layout."""
    module = Holder(lambda m, x: F.linear(x, m.w, m.bias), w=torch.randn(64, 128) / 11, bias=torch.randn(64))
    module = module.to(torch.bfloat16)
    x = torch.randn(5, 128).bfloat16()
    traced = trace(module, x)
    gm, report, _ = lowered(traced, spec, choose=on_cpu)
    dispatch = next(iter(report.dispatches.values()))
    refs = [r for node in gm.graph.find_nodes(op="placeholder") if isinstance(r := node.meta.get("plane"), PlaneRef)]
    assert {ref.layout for ref in refs} == {dispatch.layout}
    assert len(refs) == len(layouts()[dispatch.layout].planes(dispatch.problem)), "planes of another layout are gone"
    # A kernel against its scheme's reference, bf16 output.
    assert relative_error(run(gm, traced), eager_linear(x, module.w, module.bias, spec)) < 5e-3


def test_no_kernel_is_an_error_that_names_the_weight() -> None:
    def choose_a100(problem: Problem, name: str) -> Dispatch:
        return choose(problem, Target.fake("sm80"), Request(), name)

    with pytest.raises(NoKernelError, match=r"no kernel for q \+ k \+ v \(FP8_DYNAMIC, n=40 k=40"):
        lowered(traced_block(), {"q": "FP8_DYNAMIC", "k": "FP8_DYNAMIC", "v": "FP8_DYNAMIC"}, choose=choose_a100)


def test_sglq_ops_left_over_are_an_error() -> None:
    traced = traced_block()
    gm, _ = insert_quant(traced.gm, plan_for(traced, QKV))
    with pytest.raises(GraphError, match="is left after lowering"):
        verify(gm, "lowered")


def test_lowering_keeps_none() -> None:
    gm, _, _ = lowered(traced_block(), QKV)
    assert not [node for node in gm.graph.nodes if getattr(node.target, "namespace", None) == "sglq"]
    verify(gm, "lowered")


def test_shared_weight_in_two_linears() -> None:
    """The same planes reach both calls; names of arguments do not clash."""
    module = Holder(lambda m, x: F.linear(F.linear(x, m.w).sin(), m.w), w=torch.randn(64, 64) / 8)
    x = torch.randn(3, 64)
    traced = trace(module, x)
    for choice in (None, on_cpu):
        traced = trace(module, x)
        gm, _, _ = lowered(traced, "W4A16", **({"choose": choice} if choice else {}))
        assert len(gm.graph.find_nodes(op="call_function", target=kernel_ops.linear)) == 2
        inner = eager_linear(x, module.w, None, "W4A16").sin()
        assert relative_error(run(gm, traced), eager_linear(inner, module.w, None, "W4A16")) < 1e-5


@pytest.mark.parametrize("lead", [(2, 3), ()], ids=["six rows", "1-D"])
def test_column_major_scales_for_kernels_that_need_them(lead: tuple[int, ...]) -> None:
    """The layout of activation scales is fixed before M is known: one kernel of the table that needs columns decides."""

    def columns(problem: Problem, name: str) -> Dispatch:
        return Dispatch(problem, "rows", ((4096, "reference"),), column_scales=True)

    module = Holder(lambda m, x: F.linear(x, m.w), w=torch.randn(8, 300))
    x = torch.randn(*lead, 300)
    traced = trace(module, x)
    gm, _, _ = lowered(traced, "FP8_BLOCK", choose=columns)
    seen: list[Tensor] = []

    class Watch(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is kernel_ops.linear:
                seen.append(args[0][1])
            return super().call_function(target, args, kwargs)

    plain = run(lowered(trace(module, x), "FP8_BLOCK")[0], traced)
    watched = Watch(gm)
    gm.forward = watched.run  # type: ignore[method-assign]
    assert torch.equal(run(gm, traced), plain)
    rows = math.prod(lead)
    assert seen[0].shape == (rows, 3)
    assert rows == 1 or seen[0].stride() == (1, rows), "one row is in both orders"


@pytest.mark.parametrize("spec", SPECS)
def test_no_rows(spec: str) -> None:
    module = Holder(lambda m, x: F.linear(x, m.w), w=torch.randn(8, 40))
    traced = trace(module, torch.randn(2, 0, 40))
    gm, _, _ = lowered(traced, spec)
    assert run(gm, traced).shape == (2, 0, 8)


def test_inplace_guard_is_kept_through_the_pipeline() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1
        a = F.linear(h, m.a)
        h.mul_(3)
        return torch.cat([a, F.linear(h, m.b)], -1)

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40))
    x = torch.randn(3, 40)
    traced = trace(module, x)
    gm, _, _ = lowered(traced, "W8A8")
    parts = [eager_linear(x, module.a, None, "W8A8"), eager_linear(x * 3, module.b, None, "W8A8")]
    assert relative_error(run(gm, traced), torch.cat(parts, -1)) < 1e-6
    assert lower.__name__ == PIPELINE[-1].__name__
