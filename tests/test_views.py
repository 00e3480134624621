"""What a report draws of each product: the graph before and after, what was joined, what nearly was, the line, and times."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quant_compile
from quant_compile.explain import explain
from quant_compile.ir.report import Report
from quant_compile.ir.scheme import parse
from quant_compile.lowering import kernel_times as times_of
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import BUCKETS, Dispatch
from quant_compile.lowering.target import Target
from quant_compile.lowering.tune import Timings
from quant_compile.page.views import Drawing, KernelTime, SiteView, tail
from quant_compile.runtime import views
from tests.runtime_support import CompileCounter, Mlp, Stack, plain_inductor

__all__ = ["plain_inductor"]


class Block(nn.Module):
    """A norm of two operations, as a module, and a linear behind it."""

    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = Block.Norm(), nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.proj(self.norm(x)))


def planned(model: nn.Module, policy: object = "W8A8") -> Report:
    return explain(model.eval(), {"x": torch.ones(3, 32)}, policy).report


def view_of(report: Report, name: str) -> SiteView:
    line = next(line for line in report.lines if line.names[0] == name)
    (place,) = line.views
    return report.views[place]


def text(drawing: Drawing) -> list[str]:
    """``label -> what reads it`` for each box."""
    labels = [box.label for box in drawing.boxes]
    reads = {i: [labels[end] for start, end in drawing.edges if start == i] for i in range(len(labels))}
    return [f"{box.kind} {box.label} -> {', '.join(reads[i])}".strip() for i, box in enumerate(drawing.boxes)]


@pytest.mark.parametrize("spec", ["FP8_TENSOR_DYNAMIC", "NVFP4", "MXFP4"])
def test_a_drawing_puts_no_condition_on_sizes(spec: str, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    """Dynamo is done with them: later graphs would be refused for it."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"default: {spec}\n")
    model = nn.Sequential(nn.Linear(128, 64)).eval().requires_grad_(False)
    options = {"policy": str(policy), "kernels": "reference"}
    run = torch.compile(model, backend="sglquant", dynamic=True, options=options)
    for tokens in (7, 9):
        run(torch.randn(3, tokens, 128))
    (view,) = quant_compile.report(model).views
    assert view.after is not None and "quantize" in " ".join(text(view.after))
    policy.write_text("default: FP8_DYNAMIC  # from now on\n")
    run(torch.randn(3, 11, 128))
    assert quant_compile.report(model).lines[0].scheme == "FP8_DYNAMIC" and len(plain_inductor.graphs) == 2


def test_a_linear_before_and_after() -> None:
    view = view_of(planned(Block()), "proj.weight")
    assert text(view.before) == [
        "input input -> Norm",
        "weight proj.weight -> linear",
        "module Norm -> linear",
        "op linear -> relu",
        "op relu ->",
    ]
    assert view.after is not None
    assert text(view.after) == [
        "weight proj.weight -> sglq_kernels.linear",
        "module Norm -> quantize",
        "quantize quantize -> sglq_kernels.linear",
        "kernel sglq_kernels.linear -> relu",
        "op relu ->",
    ]
    shapes = {box.label: box.shape for box in view.after.boxes}
    assert shapes["proj.weight"] == "i8[48, 32] f32[48, 1]" and shapes["sglq_kernels.linear"] == "f32[3, 48]"
    assert view.source[
        -1
    ] == f"{Path(__file__).parent.name}/test_views.py:{line_of('self.proj(self.norm')} in forward: " + (
        "return torch.relu(self.proj(self.norm(x)))"
    )


def line_of(code: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if code in line)


def test_siblings_are_drawn_together() -> None:
    report = planned(Mlp())
    view = view_of(report, "gate_proj.weight")
    assert view is view_of(report, "up_proj.weight") and view.weights == ("gate_proj.weight", "up_proj.weight")
    assert sum(line.startswith("op linear") for line in text(view.before)) == 2
    assert view.after is not None and sum(line.startswith("kernel") for line in text(view.after)) == 1
    assert view.joined == (
        "one kernel for gate_proj.weight + up_proj.weight",
        "one product of 2 weights that read one input",
    )


def test_one_quantization_for_several_products_is_told() -> None:
    view = view_of(planned(Mlp(), {"default": "W8A8", "fuse": {"merge_siblings": False}}), "gate_proj.weight")
    assert view.joined == ("its input is quantized once, for 2 products",)


def test_what_was_nearly_merged_has_its_reason() -> None:
    report = planned(Mlp(), "FP8_BLOCK")
    assert view_of(report, "gate_proj.weight").missed == (
        "gate_proj.weight has 48 rows, not a multiple of the scale block of 128",
    )
    assert not view_of(report, "down_proj.weight").missed


def test_what_is_kept_is_drawn_as_it_is() -> None:
    policy = {"default": "W8A8", "rules": [{"match": "down_proj", "scheme": "keep"}]}
    view = view_of(planned(Mlp(), policy), "down_proj.weight")
    assert view.after is None and not view.times and "weight down_proj.weight -> linear" in text(view.before)


def test_layers_alike_are_drawn_once() -> None:
    """Not the first two, whose surroundings differ: they are nearer to the model's input."""
    report = planned(Stack(5))
    ups = [view_of(report, f"layers.{i}.up_proj.weight") for i in range(5)]
    assert ups[2] is ups[3] is ups[4] and len(set(ups)) == 3


def test_every_graph_of_a_weight_has_its_view(plain_inductor: CompileCounter) -> None:
    model = Mlp().eval()
    quant_compile.compile(model, "W8A8", dynamic=False)
    with torch.inference_mode():
        for rows in (1, 5):
            model(torch.ones(rows, 32))
    report = quant_compile.report(model)
    line = next(line for line in report.lines if line.names[0] == "down_proj.weight")
    shapes = [box.shape for i in line.views for box in report.views[i].before.boxes if box.label == "add"]
    assert shapes == ["f32[1, 32]", "f32[5, 32]"]


def test_nothing_is_drawn_until_a_report_is_made(
    plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    right = views._before
    monkeypatch.setattr(views, "_before", lambda *args: drawn.append(args) or right(*args))
    made = quant_compile.compile(nn.Sequential(Mlp()).eval(), "W8A8")
    with torch.inference_mode():
        made(torch.ones(3, 32))
    assert not drawn
    report = quant_compile.report(made)
    assert len(drawn) == len(report.views) == 2  # gate with up, and down
    quant_compile.report(made)
    assert len(drawn) == 2


def test_views_that_were_not_drawn_keep_no_weight_alive(plain_inductor: CompileCounter) -> None:
    made = quant_compile.compile(nn.Sequential(Mlp()).eval(), "W8A8")
    with torch.inference_mode():
        made(torch.ones(3, 32))
    weights = [weakref.ref(parameter) for parameter in made.parameters()]
    del made
    torch._dynamo.reset()
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_a_new_scheme_forgets_the_old_views(plain_inductor: CompileCounter) -> None:
    model = Mlp().eval()
    for policy in ("W8A8", "W8A16"):
        torch._dynamo.reset()
        quant_compile.compile(model, policy)
        with torch.inference_mode():
            model(torch.ones(3, 32))
    (line, *_) = quant_compile.report(model).lines
    assert len(line.views) == 1


def test_names_from_their_layer_on() -> None:
    assert tail("model.layers.3.mlp.up_proj.weight") == "mlp.up_proj.weight"
    assert tail("lm_head.weight") == "lm_head.weight" and tail("0.weight") == "weight" and tail("w.0") == "w.0"


def test_times_are_estimates_where_nothing_is_measured() -> None:
    view = view_of(planned(Mlp()), "down_proj.weight")
    assert [time.m for time in view.times] == list(BUCKETS) and not any(time.measured for time in view.times)
    assert all(time.microseconds and time.share is None for time in view.times)


def test_times_of_the_tuner_are_those_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the share of the floor; what it refused or did not measure is the kernel's estimate."""
    problem = Problem(parse("W8A8"), 4096, 4096, torch.bfloat16)
    dispatch = Dispatch(problem, "rows", ((16, "triton_gemv"), (4096, "triton_scaled_mm")))
    known = Timings(tmp_path / "times.json")
    known.put(problem, {"triton_gemv@1": 8.0, "triton_gemv@16": 1e12, "triton_scaled_mm@512": 40.0})
    monkeypatch.setattr(times_of, "timings", lambda gpu, level: known)
    target = Target("cuda", 90, 132, "a GPU", None)
    found = {time.m: time for time in times_of.kernel_times(dispatch, target, "quick")}
    weight = 4096 * 4096 + 4 * 4096
    assert found[1].measured and found[1].microseconds == 8.0 and found[1].kernel == "triton_gemv"
    assert found[1].floor == pytest.approx((weight + 4096 + 2 * 4096) / 4.3e6)
    assert found[1].share == pytest.approx(found[1].floor / 8.0)
    assert found[512].measured and found[512].kernel == "triton_scaled_mm"
    assert not found[16].measured and not found[2].measured
    assert found[4096].floor == pytest.approx(2 * 4096**3 / 1979e6)  # products take longer than reading
    off = times_of.kernel_times(dispatch, target, "off")
    assert not any(time.measured for time in off)


def test_a_time_without_an_estimate_has_no_share() -> None:
    assert KernelTime(1, "k", None, True, 2.0).share is None and KernelTime(1, "k", 4.0, True, 2.0).share == 0.5
