"""merge_siblings: one GEMM for linears of one input, each still with its own numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from quant_compile.ir import ops
from quant_compile.ir.graph import BiasRef, lines
from quant_compile.passes.insert_quant import insert_quant
from quant_compile.passes.merge_siblings import merge_siblings
from quant_compile.passes.plan import PassReport
from quant_compile.passes.share_quant import share_quant
from tests.ir.tracing import Holder, Traced, eager_linear, plan_for, relative_error, run, trace
from tests.passes.attention import QKV, block, example, traced_block, wanted


def merged(traced: Traced, schemes: Any, **changes: Any) -> tuple[fx.GraphModule, PassReport]:
    """The graph after the pass."""
    plan = plan_for(traced, schemes, **changes)
    gm, _ = insert_quant(traced.gm, plan)
    gm, _ = share_quant(gm, plan)
    return merge_siblings(gm, plan)


def linears(gm: fx.GraphModule) -> int:
    """Number of sglq linears."""
    return len(gm.graph.find_nodes(op="call_function", target=ops.linear))


def pair(n1: int, n2: int, k: int = 40, bias: str = "") -> Holder:
    """Two linears of one input; ``bias`` names those that have one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first = F.linear(x, m.a, m.bias_a if "a" in bias else None)
        second = F.linear(x, m.b, m.bias_b if "b" in bias else None)
        return torch.cat([first, second], -1)

    vectors = {f"bias_{name}": torch.randn(n1 if name == "a" else n2) for name in bias}
    return Holder(forward, a=torch.randn(n1, k) / 6, b=torch.randn(n2, k) / 6, **vectors)


def eager(m: Any, x: Tensor, spec: str) -> Tensor:
    """What ``pair`` computes under a scheme."""
    parts = [eager_linear(x, getattr(m, w), getattr(m, f"bias_{w}", None), spec) for w in "ab"]
    return torch.cat(parts, -1)


def test_graph() -> None:
    gm, report = merged(traced_block(), QKV)
    assert lines(gm) == [
        "  l_inputs_0_: f32[2, 3, 40] = input",
        "  l_self_parameters_o_: f32[16, 40] = input",
        "  q__data_joined: i8[40, 40] = plane q + k + v",
        "  q__scale_joined: f32[40, 1] = plane q + k + v",
        "  l_self_parameters_bias__joined: f32[40] = plane q + k + v",
        "* quantize_default = sglq.quantize(l_inputs_0_, 'W8A8')  # input of q",
        "* linear_default_3: f32[2, 3, 40] = sglq.linear(quantize_default, [q__data_joined, q__scale_joined], "
        "l_self_parameters_bias__joined, 'W8A8', f32)  # q + k + v W8A8",
        "  narrow: f32[2, 3, 24] = narrow(linear_default_3, -1, 0, 24)",
        "  narrow_1: f32[2, 3, 8] = narrow(linear_default_3, -1, 24, 8)",
        "  narrow_2: f32[2, 3, 8] = narrow(linear_default_3, -1, 32, 8)",
        "  cat: f32[2, 3, 40] = cat([narrow, narrow_1, narrow_2], -1)",
        "  linear_2: f32[2, 3, 16] = linear(cat, l_self_parameters_o_)",
        "  return [linear_2]",
    ]
    assert report.rewrote == ["q + k + v"] and not report.refused


FOUR_BITS = ("W4A8", "W4AFP8", "NVFP4", "NVFP4A16", "MXFP4", "QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP")
EIGHT_BITS = ("FP8_DYNAMIC", "FP8_TENSOR_DYNAMIC", "W8A8", "W8A16")


@pytest.mark.parametrize("spec", [*EIGHT_BITS, *FOUR_BITS, "W4A16", "W4A16_ASYM", "int4.group32+16", "int4.channel+16"])
def test_equals_eager(spec: str) -> None:
    """Per-tensor scales too, NVFP4's global ones among them: each sibling keeps its own."""
    traced = traced_block()
    gm, report = merged(traced, spec)
    assert report.rewrote == ["q + k + v"]
    assert relative_error(run(gm, traced), wanted(block(), example(), dict.fromkeys("qkvo", spec))) < 1e-6


ROWS = ((24, 8), (1, 33), (7, 7))
PAIRS = [(*rows, bias, "W8A8") for rows in ROWS for bias in ("", "a", "b", "ab")]
PAIRS += [(1, 33, bias, spec) for bias in ("", "b") for spec in ("W4A8", "NVFP4", "QSERVE_W4A8_CHANNEL")]


@pytest.mark.parametrize(("n1", "n2", "bias", "spec"), PAIRS)
def test_unequal_rows_and_mixed_bias(n1: int, n2: int, bias: str, spec: str) -> None:
    module, x = pair(n1, n2, bias=bias), torch.randn(5, 40)
    with torch.no_grad():
        module.a.mul_(100)  # whose scales must not reach b
    traced = trace(module, x)
    gm, _ = merged(traced, spec)
    assert linears(gm) == 1
    refs = [r for node in gm.graph.find_nodes(op="placeholder") if isinstance(r := node.meta.get("plane"), BiasRef)]
    assert [[slot is not None for slot in ref.slots] for ref in refs] == ([["a" in bias, "b" in bias]] if bias else [])
    got, expected = run(gm, traced), eager(module, x, spec)
    for part in (slice(0, n1), slice(n1, None)):
        assert relative_error(got[:, part], expected[:, part]) < 1e-6


def test_switched_off() -> None:
    gm, report = merged(traced_block(), QKV, merge_siblings=False)
    assert linears(gm) == 3 and not report.rewrote and not report.refused


def test_only_one_scheme_is_merged() -> None:
    traced = traced_block()
    schemes = {"q": "W8A8", "k": "FP8_DYNAMIC", "v": "W8A8", "o": None}
    gm, report = merged(traced, schemes)
    assert report.rewrote == ["q + v"]
    assert relative_error(run(gm, traced), wanted(block(), example(), schemes)) < 1e-6


def test_other_inputs_are_not_merged() -> None:
    module = Holder(lambda m, x: F.linear(x, m.a) + F.linear(x.sin(), m.b), a=torch.randn(8, 40), b=torch.randn(8, 40))
    gm, report = merged(trace(module, torch.randn(3, 40)), "W8A8")
    assert linears(gm) == 2 and not report.rewrote


@pytest.mark.parametrize(("n1", "merges"), [(128, True), (256, True), (100, False), (129, False)])
def test_blocks_of_scales_must_start_at_a_sibling(n1: int, merges: bool) -> None:
    """The last sibling may be ragged, no other."""
    module, x = pair(n1, 100, k=200), torch.randn(5, 200)
    traced = trace(module, x)
    gm, report = merged(traced, "FP8_BLOCK")
    assert linears(gm) == (1 if merges else 2)
    if not merges:
        assert report.refused == [f"a + b: a has {n1} rows, not a multiple of the scale block of 128"]
    assert relative_error(run(gm, traced), eager(module, x, "FP8_BLOCK")) < 1e-6


def test_one_weight_twice_is_refused() -> None:
    module = Holder(lambda m, x: F.linear(x, m.w) + F.linear(x, m.w, m.bias), w=torch.randn(8, 40), bias=torch.randn(8))
    x = torch.randn(3, 40)
    traced = trace(module, x)
    gm, report = merged(traced, "W8A8")
    assert report.refused == ["w + w: one weight is used twice"]
    y = eager_linear(x, module.w, None, "W8A8")
    assert relative_error(run(gm, traced), 2 * y + module.bias) < 1e-6


def test_computed_bias_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, m.a, m.bias * 2), F.linear(x, m.b)], -1)

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40), bias=torch.randn(8))
    x = torch.randn(3, 40)
    traced = trace(module, x)
    gm, report = merged(traced, "W8A8")
    assert report.refused == ["a + b: the bias of a is not a Parameter"]
    parts = [eager_linear(x, module.a, module.bias * 2, "W8A8"), eager_linear(x, module.b, None, "W8A8")]
    assert relative_error(run(gm, traced), torch.cat(parts, -1)) < 1e-6


def test_static_siblings_with_other_scales_stay_apart() -> None:
    traced = traced_block()
    slots = {name: slot for slot, name in traced.names.items()}
    scales = {"q": 0.02, "k": 0.05, "v": 0.02, "o": 0.01}
    classes = {slots["q"]: 0, slots["k"]: 1, slots["v"]: 0, slots["o"]: 2}
    gm, report = merged(traced, "W8A8_STATIC", scale_class=classes)
    assert report.rewrote == ["q + v"]
    reference = wanted(block(), example(), dict.fromkeys("qkvo", "W8A8_STATIC"), scales)
    assert relative_error(run(gm, traced, scales), reference) < 1e-6


@pytest.mark.parametrize(
    "look",
    [
        lambda y: y.view(-1),
        lambda y: y.view(y.shape[0] * 2, -1),
        lambda y: y.detach().view(-1),
        lambda y: y.view_as(y.reshape(4, -1)),
    ],
    ids=["flat", "rows split", "through an alias", "view_as"],
)
def test_views_that_need_contiguous_outputs_go_on_working(look: Any) -> None:
    """A sibling's output is a slice of the merged one, which cannot be viewed across its rows."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cat([look(F.linear(x, m.a)).reshape(-1), look(F.linear(x, m.b)).reshape(-1)])

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40))
    x = torch.randn(4, 40)
    traced = trace(module, x)
    gm, report = merged(traced, "W8A8")
    assert report.rewrote == ["a + b"]
    parts = [eager_linear(x, w, None, "W8A8").reshape(-1) for w in (module.a, module.b)]
    assert relative_error(run(gm, traced), torch.cat(parts)) < 1e-6


def test_viewed_output_that_is_written_is_refused() -> None:
    """A view turned reshape may be a copy, so a write through it would be lost."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = F.linear(x, m.a), F.linear(x, m.b)
        a.view(-1).add_(1)
        return torch.cat([a, b], -1)

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40))
    x = torch.randn(3, 40)
    traced = trace(module, x)
    gm, report = merged(traced, "W8A8")
    assert report.refused == ["a + b: a's output is viewed and written by add_"]
    parts = [eager_linear(x, module.a, None, "W8A8") + 1, eager_linear(x, module.b, None, "W8A8")]
    assert relative_error(run(gm, traced), torch.cat(parts, -1)) < 1e-6


def test_plain_writes_into_an_output_do_not_reach_its_siblings() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = F.linear(x, m.a), F.linear(x, m.b)
        a += 1
        b.mul_(2)
        return torch.cat([a, b], -1)

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40))
    x = torch.randn(3, 40)
    traced = trace(module, x)
    gm, report = merged(traced, "W8A8")
    assert report.rewrote == ["a + b"]
    parts = [eager_linear(x, module.a, None, "W8A8") + 1, eager_linear(x, module.b, None, "W8A8") * 2]
    assert relative_error(run(gm, traced), torch.cat(parts, -1)) < 1e-6
