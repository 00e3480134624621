"""Sites become the op that was chosen for them, and what stays is said; nothing of a replaced site is left over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from quant_compile.ir import ops
from quant_compile.ir.attention import find_attention
from quant_compile.ir.graph import lines
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.attention import GROUPED, WRITTEN, AttentionChoice
from quant_compile.passes.insert_attention import insert_attention
from quant_compile.passes.lower import lower
from quant_compile.passes.plan import PassReport
from tests.ir.test_attention import eager, repeat_kv, sdpa, tensors, with_sinks
from tests.ir.tracing import Holder, Traced, plan_for, trace


def given(mask: str = "seen") -> tuple[Tensor, ...]:
    t = tensors()
    return t["q"], t["k"], t["v"], t[mask]


def inserted(
    function: Any, inputs: tuple[Tensor, ...], runs: str | None, blocks: tuple[int, int] | None = None
) -> tuple[Traced, Any, fx.GraphModule, PassReport]:
    """A function's graph after the pass, under a chooser that always says the same; None: no chooser."""
    traced = trace(Holder(lambda m, *x: function(*x)), *inputs)
    sites, misses = find_attention(traced.gm)
    choose = None if runs is None else (lambda problem, rows: AttentionChoice(runs, "a test", blocks))
    plan = plan_for(traced, {}, attention=tuple(sites), attention_misses=tuple(misses), choose_attention=choose)
    gm, report = insert_attention(traced.gm, plan)
    return traced, plan, gm, report


def run(gm: fx.GraphModule, traced: Traced) -> Tensor:
    (y,) = gm(*traced.arguments)
    return y


def test_a_kernel_takes_the_place_of_all_that_only_the_attention_needed() -> None:
    traced, plan, gm, report = inserted(eager, given("added"), "triton_decode")
    wanted = eager(*given("added"))
    called = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    assert [n.target for n in called] == [ops.attention, "transpose", "contiguous"]
    assert torch.allclose(run(gm, traced), wanted, atol=1e-5)
    assert report.rewrote and not report.refused
    gm, _ = lower(gm, plan)
    (node,) = gm.graph.find_nodes(op="call_function", target=kernel_ops.attention)
    assert node.args[-1] == "triton_decode" and torch.allclose(run(gm, traced), wanted, atol=1e-5)
    assert any("sglq_kernels.attention" in line and "# attention triton_decode" in line for line in lines(gm))


def test_sinks_of_any_shape_become_one_dimension() -> None:
    q, k, v, mask = given("added")
    sinks = tensors()["sinks"].reshape(1, -1, 1, 1)
    traced, plan, gm, _ = inserted(with_sinks, (q, k, v, mask, sinks), "triton_decode")
    gm, _ = lower(gm, plan)
    assert torch.allclose(run(gm, traced), with_sinks(q, k, v, mask, sinks), atol=1e-5)
    (node,) = gm.graph.find_nodes(op="call_function", target=kernel_ops.attention)
    assert node.args[6].meta["example_value"].dim() == 1  # type: ignore[union-attr]


def test_torchs_grouped_form() -> None:
    traced, plan, gm, _ = inserted(sdpa(repeat_kv), given(), GROUPED)
    gm, _ = lower(gm, plan)
    (node,) = [n for n in gm.graph.nodes if n.target is F.scaled_dot_product_attention]
    assert node.kwargs["enable_gqa"] is True
    assert torch.allclose(run(gm, traced), sdpa(repeat_kv)(*given()), atol=1e-5)


@pytest.mark.parametrize(("runs", "reason"), [(WRITTEN, "a test"), (None, "the policy keeps it (attention: keep)")])
def test_what_stays_is_not_touched(runs: str | None, reason: str) -> None:
    untouched = trace(Holder(lambda m, *x: eager(*x)), *given("added"))
    before = [n.format_node() for n in untouched.gm.graph.nodes]
    _, _, gm, report = inserted(eager, given("added"), runs)
    assert [n.format_node() for n in gm.graph.nodes] == before
    assert [(line.runs, line.reason) for line in report.attention] == [(WRITTEN, reason)]


def test_a_miss_is_a_line_of_the_report() -> None:
    def fills(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ repeat_kv(k).mT).masked_fill(~mask, -1e9)
        return torch.softmax(scores, -1) @ repeat_kv(v)

    _, _, _, report = inserted(fills, given(), "triton_decode")
    (line,) = report.attention
    assert line.missed and line.runs == WRITTEN and "masked_fill" in line.reason and not report.rewrote


def test_a_result_that_is_viewed_as_it_lies_is_left() -> None:
    """Kernels return [B, Hq, T, Dv] as it lies in [B, T, Hq, Dv]: a view over heads and tokens is not possible there."""

    def viewed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return eager_scores(q, k, v, mask).view(q.shape[0], -1)

    _, _, gm, report = inserted(viewed, given("added"), "triton_decode")
    assert report.attention[0].runs == WRITTEN and "viewed" in report.attention[0].reason
    assert not gm.graph.find_nodes(op="call_function", target=ops.attention)


def eager_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ repeat_kv(k).mT + mask, -1) @ repeat_kv(v)


def test_two_attentions_of_one_graph_follow_each_other() -> None:
    """The second reads the first's result."""

    def twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        first = eager_scores(q, k, k, mask)
        return eager_scores(first, k, v, mask)

    traced, plan, gm, report = inserted(twice, given("added"), "triton_decode")
    assert len(report.rewrote) == 2
    gm, _ = lower(gm, plan)
    assert torch.allclose(run(gm, traced), twice(*given("added")), atol=1e-5)


@pytest.mark.parametrize(("written", "times"), [(False, 1), (True, 2)])
def test_a_mask_is_read_once_for_all_attention_under_it(written: bool, times: int) -> None:
    """Unless it is written to in between."""

    def twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        first = eager_scores(q, k, k, mask)
        if written:
            mask.mul_(0.5)
        return eager_scores(first, k, v, mask)

    traced, plan, gm, _ = inserted(twice, given("added"), "triton_prefill", (32, 16))
    gm, _ = lower(gm, plan)
    reached = gm.graph.find_nodes(op="call_function", target=kernel_ops.reach)
    users = gm.graph.find_nodes(op="call_function", target=kernel_ops.attention)
    assert len(reached) == times and [node.kwargs["reach"] for node in users] == [reached[0], reached[-1]]
    assert torch.allclose(run(gm, traced), twice(*given("added")), atol=1e-5)
