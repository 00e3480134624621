"""share_quant: one quantization of an input for all linears that read it, and never a stale one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from quant_compile.ir import ops
from quant_compile.ir.graph import lines
from quant_compile.passes.insert_quant import insert_quant
from quant_compile.passes.merge_siblings import merge_siblings
from quant_compile.passes.plan import PassReport
from quant_compile.passes.share_quant import share_quant
from tests.ir.tracing import Holder, Traced, eager_linear, plan_for, relative_error, run, trace
from tests.passes.attention import QKV, block, example, traced_block, wanted


def shared(traced: Traced, schemes: Any, **changes: Any) -> tuple[fx.GraphModule, PassReport]:
    """The graph after the pass."""
    plan = plan_for(traced, schemes, **changes)
    gm, _ = insert_quant(traced.gm, plan)
    return share_quant(gm, plan)


def quantizations(gm: fx.GraphModule) -> int:
    """Number of quantize nodes."""
    return len(gm.graph.find_nodes(op="call_function", target=ops.quantize))


def test_graph() -> None:
    gm, report = shared(traced_block(), QKV)
    assert [line for line in lines(gm) if line.startswith("*")] == [
        "* quantize_default = sglq.quantize(l_inputs_0_, 'W8A8')  # input of q",
        "* linear_default: f32[2, 3, 24] = sglq.linear(quantize_default, [q__data, q__scale], l_self_parameters_bias_, 'W8A8', f32)"
        "  # q W8A8",
        "* linear_default_1: f32[2, 3, 8] = sglq.linear(quantize_default, [k__data, k__scale], None, 'W8A8', f32)  # k W8A8",
        "* linear_default_2: f32[2, 3, 8] = sglq.linear(quantize_default, [v__data, v__scale], None, 'W8A8', f32)  # v W8A8",
    ]
    assert report.rewrote == ["input of k", "input of v"] and not report.refused


@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "FP8_BLOCK", "FP8_TENSOR_DYNAMIC", "W8A8"])
def test_equals_eager(spec: str) -> None:
    traced = traced_block()
    gm, _ = shared(traced, spec)
    assert quantizations(gm) == 2
    assert relative_error(run(gm, traced), wanted(block(), example(), dict.fromkeys("qkvo", spec))) < 1e-6


def test_switched_off() -> None:
    gm, report = shared(traced_block(), QKV, share_quant=False)
    assert quantizations(gm) == 3 and not report.rewrote


def test_other_schemes_are_not_shared() -> None:
    traced = traced_block()
    schemes = {"q": "W8A8", "k": "FP8_DYNAMIC", "v": "FP8_E5M2_DYNAMIC", "o": None}
    gm, _ = shared(traced, schemes)
    assert quantizations(gm) == 3
    assert relative_error(run(gm, traced), wanted(block(), example(), schemes)) < 1e-6


@pytest.mark.parametrize("spec", ["FP8", "W8A8_STATIC"])
def test_static_scales_are_shared_only_where_they_are_equal(spec: str) -> None:
    traced = traced_block()
    slots = {name: slot for slot, name in traced.names.items()}
    scales = {"q": 0.02, "k": 0.05, "v": 0.02, "o": 0.01}
    classes = {slots["q"]: slots["q"], slots["k"]: slots["k"], slots["v"]: slots["q"], slots["o"]: slots["o"]}
    gm, report = shared(traced, spec, scale_class=classes)
    assert report.rewrote == ["input of v"] and quantizations(gm) == 3
    left = [node.name for node in gm.graph.find_nodes(op="placeholder") if "input_scale" in node.name]
    assert left == ["q__input_scale", "k__input_scale", "o__input_scale"], "v's scale is not needed any more"
    assert (
        relative_error(run(gm, traced, scales), wanted(block(), example(), dict.fromkeys("qkvo", spec), scales)) < 1e-6
    )


def test_shared_weight_read_twice_from_one_input() -> None:
    module = Holder(lambda m, x: F.linear(x, m.w) + F.linear(x, m.w), w=torch.randn(8, 40))
    x = torch.randn(3, 40)
    traced = trace(module, x)
    gm, _ = shared(traced, "W8A8")
    assert quantizations(gm) == 1
    assert relative_error(run(gm, traced), 2 * eager_linear(x, module.w, None, "W8A8")) < 1e-6


def by_index(h: Tensor) -> None:
    h[:, 0] = 3


def by_view(h: Tensor) -> None:
    h.view(-1).add_(1)


def by_out(h: Tensor) -> None:
    torch.add(h, 1, out=h)


def by_augmented(h: Tensor) -> None:
    h *= 2


def by_relu(h: Tensor) -> None:
    F.relu(h, inplace=True)


def by_copy(h: Tensor) -> None:
    h[1:].copy_(h[:-1] * 2)


WRITES: list[Callable[[Tensor], None]] = [by_index, by_view, by_out, by_augmented, by_relu, by_copy]


@pytest.mark.parametrize("read", ["tensor", "view"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("spec", ["W8A8", "W8A16"])
def test_input_written_in_between_is_refused(spec: str, write: Callable[[Tensor], None], read: str) -> None:
    """Whatever the write looks like, through the tensor or a view of it; the same holds for merging."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1
        seen = h if read == "tensor" else h.view(3, 2, 40)
        a = F.linear(seen, m.a)
        write(h)
        return torch.cat([a, F.linear(seen, m.b)], -1)

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40))
    x = torch.randn(6, 40)
    traced = trace(module, x)
    plan = plan_for(traced, spec)
    gm, _ = insert_quant(traced.gm, plan)
    gm, sharing = share_quant(gm, plan)
    gm, merging = merge_siblings(gm, plan)
    refused = [*sharing.refused, *merging.refused]
    assert len(refused) == 1 and "written by" in refused[0]
    h = x.clone()
    before = h.clone()
    write(h)
    shape = x.shape if read == "tensor" else (3, 2, 40)
    parts = [eager_linear(v.view(shape), w, None, spec) for v, w in ((before, module.a), (h, module.b))]
    assert relative_error(run(gm, traced), torch.cat(parts, -1)) < 1e-6


def test_a_write_before_both_reads_does_not_matter() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1
        h += 1
        return torch.cat([F.linear(h, m.a), F.linear(h, m.b)], -1)

    module = Holder(forward, a=torch.randn(8, 40), b=torch.randn(4, 40))
    x = torch.randn(6, 40)
    traced = trace(module, x)
    gm, report = shared(traced, "W8A8")
    assert quantizations(gm) == 1 and not report.refused
    parts = [eager_linear(x + 1, w, None, "W8A8") for w in (module.a, module.b)]
    assert relative_error(run(gm, traced), torch.cat(parts, -1)) < 1e-6
