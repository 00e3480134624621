"""insert_quant: linears become sglq ops over planes, and the graph still runs as plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quant_compile.ir import ops
from quant_compile.ir.family import family_of
from quant_compile.ir.graph import lines
from quant_compile.ir.scheme import PRESETS
from quant_compile.passes.insert_quant import insert_quant
from quant_compile.passes.share_quant import share_quant
from tests.ir.tracing import Holder, eager_linear, plan_for, relative_error, run, trace
from tests.passes.attention import QKV, block, example, traced_block, wanted

STATIC = {"q": 0.02, "k": 0.02, "v": 0.03, "o": 0.01}


def test_graph() -> None:
    traced = traced_block()
    gm, report = insert_quant(traced.gm, plan_for(traced, QKV))
    assert lines(gm) == [
        "  l_self_parameters_bias_: f32[24] = input",
        "  l_inputs_0_: f32[2, 3, 40] = input",
        "  l_self_parameters_o_: f32[16, 40] = input",
        "  q__data: i8[24, 40] = plane q",
        "  q__scale: f32[24, 1] = plane q",
        "  k__data: i8[8, 40] = plane k",
        "  k__scale: f32[8, 1] = plane k",
        "  v__data: i8[8, 40] = plane v",
        "  v__scale: f32[8, 1] = plane v",
        "* quantize_default = sglq.quantize(l_inputs_0_, 'W8A8')  # input of q",
        "* linear_default: f32[2, 3, 24] = sglq.linear(quantize_default, [q__data, q__scale], l_self_parameters_bias_, 'W8A8', f32)"
        "  # q W8A8",
        "* quantize_default_1 = sglq.quantize(l_inputs_0_, 'W8A8')  # input of k",
        "* linear_default_1: f32[2, 3, 8] = sglq.linear(quantize_default_1, [k__data, k__scale], None, 'W8A8', f32)  # k W8A8",
        "* quantize_default_2 = sglq.quantize(l_inputs_0_, 'W8A8')  # input of v",
        "* linear_default_2: f32[2, 3, 8] = sglq.linear(quantize_default_2, [v__data, v__scale], None, 'W8A8', f32)  # v W8A8",
        "  cat: f32[2, 3, 40] = cat([linear_default, linear_default_1, linear_default_2], -1)",
        "  linear_2: f32[2, 3, 16] = linear(cat, l_self_parameters_o_)",
        "  return [linear_2]",
    ]
    assert report.rewrote == ["q", "k", "v"]


def test_refusal_carries_the_decisions_reason() -> None:
    traced = traced_block()
    _, report = insert_quant(traced.gm, plan_for(traced, QKV))
    assert report.refused == ["o: as the test says"]


FITTING = [name for name, s in PRESETS.items() if family_of(s).takes_size(s, 24, 40) is None]


@pytest.mark.parametrize("spec", [*FITTING, "int4.group32+16", "int4.channel+16"])
def test_equals_eager(spec: str) -> None:
    traced = traced_block()
    gm, _ = insert_quant(traced.gm, plan_for(traced, spec))
    scales = STATIC if PRESETS.get(spec) is not None and PRESETS[spec].static else None
    reference = wanted(block(), example(), dict.fromkeys("qkvo", spec), scales)
    assert relative_error(run(gm, traced, scales), reference) < 1e-6
    assert relative_error(reference, block()(example())) > 1e-3, "the comparison could not fail"


def test_16_bit_inputs_have_no_quantize_node() -> None:
    traced = traced_block()
    gm, _ = insert_quant(traced.gm, plan_for(traced, "W4A16"))
    assert not gm.graph.find_nodes(op="call_function", target=ops.quantize)
    assert "sglq.linear([l_inputs_0_], [q__data, q__scale]" in "\n".join(lines(gm))


def factors(traced: Any, **classes: str) -> dict[int, int]:
    """Slots of weights -> the slot whose factors theirs equal."""
    slot = {name: slot for slot, name in traced.names.items()}
    return {slot[name]: slot[first] for name, first in classes.items()}


def test_one_multiplication_for_equal_factors_of_an_input() -> None:
    """q and k share theirs and are quantized once; v has its own; o has none."""
    traced = traced_block()
    plan = plan_for(traced, "W8A8", factor_class=factors(traced, q="q", k="q", v="v"))
    gm, _ = insert_quant(traced.gm, plan)
    gm, _ = share_quant(gm, plan)
    text = [line for line in lines(gm) if "factor" in line or "sglq.quantize" in line or "sglq.linear" in line]
    assert text == [
        "  q__input_factor: f32[40] = plane q",
        "  v__input_factor: f32[40] = plane v",
        "* mul: f32[2, 3, 40] = mul(l_inputs_0_, q__input_factor)  # factors of the input of q",
        "* quantize_default = sglq.quantize(mul, 'W8A8')  # input of q",
        "* linear_default: f32[2, 3, 24] = sglq.linear(quantize_default, [q__data, q__scale], l_self_parameters_bias_, 'W8A8', f32)"
        "  # q W8A8",
        "* linear_default_1: f32[2, 3, 8] = sglq.linear(quantize_default, [k__data, k__scale], None, 'W8A8', f32)  # k W8A8",
        "* mul_1: f32[2, 3, 40] = mul(l_inputs_0_, v__input_factor)  # factors of the input of v",
        "* quantize_default_2 = sglq.quantize(mul_1, 'W8A8')  # input of v",
        "* linear_default_2: f32[2, 3, 8] = sglq.linear(quantize_default_2, [v__data, v__scale], None, 'W8A8', f32)  # v W8A8",
        "* quantize_default_3 = sglq.quantize(cat, 'W8A8')  # input of o",
        "* linear_default_3: f32[2, 3, 16] = sglq.linear(quantize_default_3, [o__data, o__scale], None, 'W8A8', f32)  # o W8A8",
    ]


def test_an_input_that_is_written_to_is_multiplied_again() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1
        a = F.linear(h, m.a)
        h.add_(1)
        return torch.cat([a, F.linear(h, m.b)], -1)

    traced = trace(Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40)), torch.randn(3, 40))
    gm, _ = insert_quant(traced.gm, plan_for(traced, "W8A8", factor_class=factors(traced, a="a", b="a")))
    assert sum("factors of the input" in line for line in lines(gm)) == 2


def test_shared_weight_keeps_its_planes_apart_and_its_original_for_other_readers() -> None:
    """A tied embedding reads the Parameter as it is; two linears over one weight read the same planes."""

    def forward(m: Any, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, m.w)
        return F.linear(F.linear(x, m.w).sin(), m.w)

    module = Holder(forward, w=torch.randn(40, 40) / 6)
    traced = trace(module, torch.arange(9))
    gm, _ = insert_quant(traced.gm, plan_for(traced, "W8A8"))
    text = lines(gm)
    assert "  l_self_parameters_w_: f32[40, 40] = input" in text
    refs = [node.meta["plane"] for node in gm.graph.find_nodes(op="placeholder") if "plane" in node.meta]
    assert len(refs) == 4 and refs[0] == refs[2], "both uses stand for the same planes"
    inner = eager_linear(module.w[:9], module.w, None, "W8A8").sin()
    assert relative_error(run(gm, traced), eager_linear(inner, module.w, None, "W8A8")) < 1e-6


def test_original_weight_leaves_the_arguments() -> None:
    """Else Inductor keeps it as an input, and it could never be released."""
    traced = traced_block()
    gm, _ = insert_quant(traced.gm, plan_for(traced, QKV))
    names = {node.name for node in gm.graph.find_nodes(op="placeholder")}
    assert not names & {"l_self_parameters_q_", "l_self_parameters_k_", "l_self_parameters_v_"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_cast_for_all_under_autocast(dtype: torch.dtype) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return torch.cat([F.linear(x, m.a, m.bias), F.linear(x, m.b)], -1)

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40), bias=torch.randn(8))
    x = torch.randn(3, 40)
    traced = trace(module, x)
    gm, _ = insert_quant(traced.gm, plan_for(traced, "W8A8"))
    casts = [node for node in gm.graph.find_nodes(op="call_method", target="to") if node.args[0].name == "l_inputs_0_"]
    assert len(casts) == 1
    small = x.to(dtype)
    a = eager_linear(small, module.a.to(dtype), module.bias.to(dtype), "W8A8")
    b = eager_linear(small, module.b.to(dtype), None, "W8A8")
    assert torch.equal(run(gm, traced), torch.cat([a, b], -1))


def test_one_row_for_an_input_of_one_dimension() -> None:
    """Kernels and scale layouts want rows: the vector is made one once for all its readers, and each output undone."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.a) + F.linear(x, m.b)

    traced = trace(Holder(forward, a=torch.randn(8, 40), b=torch.randn(8, 40)), torch.randn(40))
    gm, _ = insert_quant(traced.gm, plan_for(traced, "W8A8"))
    assert [line.strip() for line in lines(gm) if "plane" not in line] == [
        "l_inputs_0_: f32[40] = input",
        "unsqueeze: f32[1, 40] = unsqueeze(l_inputs_0_, 0)",
        "* quantize_default = sglq.quantize(unsqueeze, 'W8A8')  # input of a",
        "* linear_default: f32[1, 8] = sglq.linear(quantize_default, [a__data, a__scale], None, 'W8A8', f32)  # a W8A8",
        "squeeze: f32[8] = squeeze(linear_default, 0)",
        "* quantize_default_1 = sglq.quantize(unsqueeze, 'W8A8')  # input of b",
        "* linear_default_1: f32[1, 8] = sglq.linear(quantize_default_1, [b__data, b__scale], None, 'W8A8', f32)  # b W8A8",
        "squeeze_1: f32[8] = squeeze(linear_default_1, 0)",
        "add: f32[8] = add(squeeze, squeeze_1)",
        "return [add]",
    ]


def test_cast_is_not_shared_across_a_write() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a = F.linear(h, m.w)
            h.view(-1).add_(1)
            return torch.cat([a, F.linear(h, m.w)], -1)

    module = Holder(forward, w=torch.randn(8, 40))
    x = torch.randn(3, 40)
    traced = trace(module, x)
    gm, _ = insert_quant(traced.gm, plan_for(traced, "W8A8"))
    w = module.w.bfloat16()
    parts = [eager_linear(value.bfloat16(), w, None, "W8A8") for value in (x, x + 1)]
    assert torch.equal(run(gm, traced), torch.cat(parts, -1))


def test_dynamos_graph_is_untouched() -> None:
    from quant_compile.ir.graph import copy_graph

    traced = traced_block()
    before = lines(traced.gm)
    copy = copy_graph(traced.gm)
    plan = plan_for(traced, QKV)
    sites = type(traced)(copy, traced.arguments, traced.names)
    from quant_compile.ir.sites import find_sites

    sites.sites, sites.misses = find_sites(copy, traced.parameters)
    plan = plan_for(sites, QKV)
    insert_quant(copy, plan)
    assert lines(traced.gm) == before
