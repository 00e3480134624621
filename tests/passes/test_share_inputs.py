"""share_inputs: an input is reordered or multiplied once for all linears that read it so, and never a stale one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from quant_compile.ir import ops
from quant_compile.passes.insert_quant import insert_quant
from quant_compile.passes.merge_siblings import merge_siblings
from quant_compile.passes.plan import PassReport
from quant_compile.passes.share_inputs import share_inputs
from quant_compile.passes.share_quant import share_quant
from tests.ir.tracing import Holder, Traced, eager_linear, plan_for, relative_error, run, trace

ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(0))
FACTOR = torch.linspace(0.5, 2, 40)


def ordered(x: Tensor) -> Tensor:
    return x.index_select(-1, ORDER)


def by_function(x: Tensor) -> Tensor:
    return torch.index_select(x, -1, ORDER)


def multiplied(x: Tensor) -> Tensor:
    return x * FACTOR


def passes(traced: Traced, spec: str, **changes: Any) -> tuple[fx.GraphModule, PassReport, PassReport]:
    """The graph after merging, with the reports of sharing and merging."""
    plan = plan_for(traced, spec, **changes)
    gm, _ = insert_quant(traced.gm, plan)
    gm, shared = share_inputs(gm, plan)
    gm, _ = share_quant(gm, plan)
    gm, merged = merge_siblings(gm, plan)
    return gm, shared, merged


def holder(change: Callable[[Tensor], Tensor], between: Callable[[Tensor], Any] = lambda h: None) -> Holder:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1
        a = F.linear(change(h), m.a)
        between(h)
        return torch.cat([a, F.linear(change(h), m.b)], -1)

    torch.manual_seed(0)
    return Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40))


@pytest.mark.parametrize("change", [ordered, by_function, multiplied])
@pytest.mark.parametrize("spec", ["W8A16", "W8A8"])
def test_siblings_merge(spec: str, change: Callable[[Tensor], Tensor]) -> None:
    module, x = holder(change), torch.randn(3, 40)
    traced = trace(module, x)
    gm, shared, merged = passes(traced, spec)
    assert len(shared.rewrote) == len(merged.rewrote) == 1 and not shared.refused
    assert len(gm.graph.find_nodes(op="call_function", target=ops.linear)) == 1
    wanted = torch.cat([eager_linear(change(x), w, None, spec) for w in (module.a, module.b)], -1)
    assert relative_error(run(gm, traced), wanted) < 1e-6


def add_in_place(h: Tensor) -> None:
    h.add_(1)


def by_view(h: Tensor) -> None:
    h[0].mul_(3)


def by_out(h: Tensor) -> None:
    torch.add(h, 1, out=h)


@pytest.mark.parametrize("write", [add_in_place, by_view, by_out])
@pytest.mark.parametrize("change", [ordered, multiplied])
def test_a_write_in_between_is_refused(change: Callable[[Tensor], Tensor], write: Callable[[Tensor], None]) -> None:
    module, x = holder(change, write), torch.randn(3, 40)
    traced = trace(module, x)
    gm, shared, merged = passes(traced, "W8A16")
    assert shared.refused and not shared.rewrote and not merged.rewrote
    h = x.clone()
    a = eager_linear(change(h), module.a, None, "W8A16")
    write(h)
    assert relative_error(run(gm, traced), torch.cat([a, eager_linear(change(h), module.b, None, "W8A16")], -1)) < 1e-6


def test_a_result_that_is_written_is_not_shared() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        one, other = ordered(x), ordered(x)
        one.mul_(2)
        return torch.cat([F.linear(one, m.a), F.linear(other, m.b)], -1)

    module, x = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40)), torch.randn(3, 40)
    traced = trace(module, x)
    gm, shared, _ = passes(traced, "W8A16")
    assert not shared.rewrote
    a, b = eager_linear(2 * ordered(x), module.a, None, "W8A16"), eager_linear(ordered(x), module.b, None, "W8A16")
    assert relative_error(run(gm, traced), torch.cat([a, b], -1)) < 1e-6


def test_other_inputs_and_other_orders_are_left_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = F.linear(ordered(x), m.a), F.linear(x.index_select(-1, ORDER.flip(0)), m.b)
        return torch.cat([a, b, F.linear(multiplied(x), m.b), F.linear(x * 2, m.a)], -1)

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40))
    _, shared, merged = passes(trace(module, torch.randn(3, 40)), "W8A16")
    assert not shared.rewrote and not merged.rewrote


def test_switched_off() -> None:
    traced = trace(holder(ordered), torch.randn(3, 40))
    _, shared, _ = passes(traced, "W8A16", share_quant=False, merge_siblings=False)
    assert not shared.rewrote
