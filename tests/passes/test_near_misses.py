"""Every pass says of which weights it nearly did something, and why it did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile.lowering.target import Target
from quant_compile.passes import PIPELINE
from quant_compile.passes.plan import NearMiss
from tests.ir.tracing import Holder, plan_for, trace
from tests.passes.test_fuse_input import Block, K, LlamaRMSNorm, with_residual
from tests.passes.test_fuse_input import inputs as wide
from tests.runtime_support import CompileCounter, Mlp, plain_inductor

__all__ = ["plain_inductor"]

F = nn.functional


def pair() -> Holder:
    """Two linears of one input."""
    w = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    return Holder(lambda m, x: (F.linear(x, m.a), F.linear(x, m.b)), a=w[0], b=w[1])


def near(module: nn.Module, schemes: Any, *inputs: Tensor, **changes: Any) -> dict[str, list[NearMiss]]:
    traced = trace(module, *inputs)
    if "scale_class" in changes:
        changes["scale_class"] = {slot: changes["scale_class"].get(name, 0) for slot, name in traced.names.items()}
    plan, gm, out = plan_for(traced, schemes, **changes), traced.gm, {}
    for one_pass in PIPELINE:
        gm, report = one_pass(gm, plan)
        out[report.name] = report.near
    return {name: found for name, found in out.items() if found}


def test_nothing_is_said_where_all_was_done() -> None:
    assert near(pair(), "W8A8", torch.randn(3, 32)) == {}


def test_siblings_of_two_schemes() -> None:
    found = near(pair(), {"a": "W8A8", "b": "FP8_DYNAMIC"}, torch.randn(3, 32))
    assert found == {
        "share_quant": [NearMiss(("b",), "its input is quantized on its own: as FP8_DYNAMIC, that of a as W8A8")],
        "merge_siblings": [
            NearMiss(("b",), "not one product with a: its scheme is FP8_DYNAMIC, and theirs is W8A8")
        ],
    }  # fmt: skip


def test_siblings_of_two_calibrated_scales() -> None:
    found = near(pair(), "W8A8_STATIC", torch.randn(3, 32), scale_class={"b": 1})
    assert found == {
        "share_quant": [NearMiss(("b",), "its input is quantized on its own: its calibrated scale is not that of a")],
        "merge_siblings": [NearMiss(("b",), "not one product with a: its input is quantized on its own")],
    }


@pytest.mark.parametrize("switch", ["share_quant", "merge_siblings"])
def test_what_the_policy_turns_off(switch: str) -> None:
    found = near(pair(), "W8A8", torch.randn(3, 32), **{switch: False})
    (said,) = {miss.reason for miss in found[switch]}
    assert said.endswith(f"the policy's `fuse` turns {switch} off")
    assert found["merge_siblings"][0].names == (("b",) if switch == "share_quant" else ("a", "b"))


def test_an_input_that_is_written_is_made_again() -> None:
    def forward(m: Any, x: Tensor, order: Tensor) -> Any:
        first = F.linear(x.index_select(-1, order), m.a)
        x.add_(1)
        return first, F.linear(x.index_select(-1, order), m.b)

    weights = {"a": torch.randn(16, 32), "b": torch.randn(16, 32)}
    found = near(Holder(forward, **weights), "W8A16", torch.randn(3, 32), torch.arange(32))
    (miss,) = found["share_inputs"]
    assert miss.names == ("b",) and miss.reason.startswith("its input is made again, since ")


class MeanNorm(nn.Module):
    """A norm with a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) * self.weight


def test_a_norm_that_no_kernel_takes() -> None:
    found = near(Block(MeanNorm(), with_residual), "MXFP4", *wide(), target=Target.fake("sm100"))
    (miss,) = found["lower"]
    assert miss.names == ("first.weight", "second.weight") and "MeanNorm is no RMSNorm that it knows" in miss.reason
    assert near(Block(LlamaRMSNorm(K), with_residual), "MXFP4", *wide(), target=Target.fake("sm100")) == {}


def test_layers_alike_share_their_near_misses(plain_inductor: CompileCounter) -> None:
    counts = []
    for layers in (4, 6):  # the first ones draw another input
        torch._dynamo.reset()
        model = nn.Sequential(*(Mlp() for _ in range(layers)))
        quant_compile.compile(model, {"default": "W8A8", "fuse": {"share_quant": False}})
        with torch.inference_mode():
            model(torch.ones(3, 32))
        report = quant_compile.report(model)
        assert any("gate_proj" in text for view in report.views for text in view.missed)
        counts.append(len(report.views))
    assert counts[0] == counts[1]
