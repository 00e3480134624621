"""The ledger: bytes add up, every weight has a reason, the report survives JSON, and CI gates can use it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile import CoverageError, Report
from quant_compile.ir.errors import OptionError
from quant_compile.ir.report import WeightLine, _summed
from tests.runtime_support import EXACT, CompileCounter, Mlp, bf16, plain_inductor, store_bytes

__all__ = ["plain_inductor"]


class Model(nn.Module):
    """Something of everything: an embedding, a norm, siblings, a kept linear, a computed weight, an unused linear, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.norm = nn.LayerNorm(32)
        self.layers = nn.ModuleList(Mlp() for _ in range(2))
        self.kept = nn.Linear(32, 32)
        self.scaled = nn.Linear(32, 32, bias=False)
        self.unused = nn.Linear(32, 16, bias=False)
        self.lm_head = nn.Linear(32, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        for layer in self.layers:
            x = layer(x)
        x = nn.functional.linear(self.kept(x), self.scaled.weight * 2)
        return self.lm_head(x)


POLICY = {"default": EXACT, "rules": [{"match": "kept", "scheme": "keep", "reason": "it is small"}]}


@pytest.fixture
def made(plain_inductor: CompileCounter) -> tuple[nn.Module, Report]:
    model = Model().bfloat16()
    quant_compile.compile(model, POLICY, kernels="reference")
    with torch.no_grad():
        model(torch.arange(6).view(1, 6))
    return model, quant_compile.report(model)


def line_of(report: Report, name: str) -> WeightLine:
    return next(line for line in report.lines if name in line.names)


def test_bytes_add_up_to_the_models_own_total(made: tuple[nn.Module, Report]) -> None:
    model, report = made
    assert report.bytes_total == sum(p.numel() * p.element_size() for p in model.parameters())
    assert len(report.lines) == len(list(model.parameters()))
    quantized = [line for line in report.lines if line.scheme]
    assert sum(line.bytes_after for line in quantized) == store_bytes(model)
    kept = sum(line.bytes_before for line in report.lines if not line.scheme)
    assert report.bytes_after == kept + store_bytes(model)
    assert all(line.bytes_after == line.bytes_before for line in report.lines if not line.scheme)


def test_every_weight_has_its_reason(made: tuple[nn.Module, Report]) -> None:
    _, report = made
    reasons = {
        name: line_of(report, f"{name}.weight").reason
        for name in ("embed", "norm", "kept", "scaled", "unused", "lm_head")
    }
    assert "embedding" in reasons["embed"] and "norm" in reasons["norm"]
    assert "rule 1" in reasons["kept"] and "it is small" in reasons["kept"]
    assert "computed by mul" in reasons["scaled"]
    assert "no compiled graph has read it" in reasons["unused"]
    assert "convention" in reasons["lm_head"]
    for line in report.lines:
        assert line.reason, line.names
    assert all(line.layout == "rows" and line.kernels == "reference" for line in report.lines if line.scheme)


def test_coverage_counts_what_the_policy_names(made: tuple[nn.Module, Report]) -> None:
    _, report = made
    done = sum(line.bytes_before for line in report.lines if line.names[0].startswith("layers."))
    named = done + line_of(report, "scaled.weight").bytes_before + line_of(report, "unused.weight").bytes_before
    assert report.coverage == pytest.approx(done / named)
    assert report.share == pytest.approx(done / report.bytes_total)
    assert {name for name, _ in report.skips} == {"scaled.weight", "unused.weight"}


def test_require_is_a_gate_with_reasons(made: tuple[nn.Module, Report]) -> None:
    _, report = made
    assert report.require(0.5) is report
    assert report.require(coverage=report.coverage) is report
    with pytest.raises(CoverageError) as caught:
        report.require(coverage=0.95)
    text = str(caught.value)
    assert "required 0.95" in text and "scaled.weight: " in text and "computed by mul" in text and "Fix:" in text
    assert isinstance(caught.value, AssertionError), "so that test runners show it as a failed check"


def test_json_round_trip(made: tuple[nn.Module, Report], tmp_path: Any) -> None:
    _, report = made
    file = tmp_path / "report.json"
    file.write_text(report.to_json(), encoding="utf-8")
    again = Report.from_json(file.read_text(encoding="utf-8"))
    assert again == report
    assert (again.coverage, again.share, again.skips) == (report.coverage, report.share, report.skips)
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["coverage"] == report.coverage and data["bytes_total"] == report.bytes_total
    with pytest.raises(CoverageError):
        again.require(1.0)


def test_text_shows_schemes_kernels_bytes_and_joins_layers(made: tuple[nn.Module, Report]) -> None:
    _, report = made
    text = str(report)
    for part in (
        "layers.*.up_proj.weight (2)",
        EXACT,
        "reference",
        "rows",
        "coverage",
        "kept",
        "lm_head.weight",
        "policy",
    ):
        assert part in text, part
    assert report.table(full=True).row_count == len(report.lines) + len(report.notes)
    assert report.table().row_count < report.table(full=True).row_count


def test_report_of_the_wrapper_and_of_a_part(made: tuple[nn.Module, Report]) -> None:
    model, report = made
    assert quant_compile.report(torch.compile(model, backend="sglquant")).lines == report.lines
    part = quant_compile.report(model.layers[1])
    assert part.policy == report.policy and part.coverage == 1.0
    assert {line.names[0] for line in part.lines} == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


def test_timings_name_stages(made: tuple[nn.Module, Report]) -> None:
    _, report = made
    assert {"inductor", "packing", "selection", "passes.insert_quant", "passes.lower"} <= report.timings.keys()
    assert all(seconds >= 0 for seconds in report.timings.values())


def test_merging_that_was_refused_is_noted(plain_inductor: CompileCounter) -> None:
    model = Mlp(hidden=128, wide=100).bfloat16()
    quant_compile.compile(model, "fp8_block", kernels="reference")
    with torch.no_grad():
        model(bf16(5, 128))
    notes = " ".join(quant_compile.report(model).notes)
    assert "not merged" in notes and "gate_proj" in notes and "128" in notes


def test_one_report_for_shared_weights(plain_inductor: CompileCounter) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Shared().bfloat16()
    quant_compile.compile(model, EXACT, kernels="reference")
    with torch.no_grad():
        model(bf16(5, 32))
    report = quant_compile.report(model)
    assert len(report.lines) == 1 and report.lines[0].names == ("a.weight", "b.weight")
    assert report.bytes_total == 32 * 32 * 2 and report.lines[0].bytes_after == 32 * 32 + 4 * 32


@pytest.mark.parametrize("name", ["[/bold]", "[bold]red", "[link=x]"])
def test_names_are_no_markup(name: str, plain_inductor: CompileCounter) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(32, 32))
    quant_compile.compile(model, "W8A16")
    with torch.inference_mode():
        model(torch.ones(2, 32))
    assert f"{name}.weight" in str(quant_compile.report(model))


def test_a_summed_report_keeps_its_graphs(made: tuple[nn.Module, Report], tmp_path: Any) -> None:
    _, one = made
    half = [replace(line, shard="Shard(0)", copies=1) for line in one.lines]
    other = replace(one, lines=tuple(reversed(half)), views=one.views[::-1])  # graphs in another order
    other = replace(
        other, lines=tuple(replace(x, views=tuple(len(one.views) - 1 - i for i in x.views)) for x in other.lines)
    )
    whole = _summed([replace(one, lines=tuple(half)), other])
    assert whole.views == one.views
    assert [set(line.views) for line in whole.lines] == [set(line.views) for line in one.lines]
    assert whole.html(tmp_path / "all.html").stat().st_size > 10_000
    assert Report.from_json(whole.to_json()).cells() == whole.cells()


def test_a_comparison_with_no_report_is_refused(made: tuple[nn.Module, Report], tmp_path: Any) -> None:
    model, one = made
    with pytest.raises(OptionError, match="other must be a report, got a"):
        one.html(tmp_path / "a.html", other=model)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "a.html").exists()


def test_after_uncompile_nothing_is_said_of_quantization(plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    model, alone = nn.Sequential(nn.Linear(32, 32)), nn.Linear(32, 32)
    for one in (model, alone):
        quant_compile.compile(one, "W8A16")
        with torch.inference_mode():
            one(torch.ones(2, 32))
    quant_compile.uncompile(model)
    report = quant_compile.report(model)
    assert report.policy == "none" and {line.reason for line in report.lines} == {
        "not compiled yet",
        "not a linear weight: vector (norm, bias)",
    }
    assert report.notes == ("no compiled graph has read this model yet",) and not report.views
    assert quant_compile.report(alone).coverage == 1
    quant_compile.compile(model, "W8A16")
    with torch.inference_mode():
        model(torch.ones(2, 32))
    assert quant_compile.report(model).coverage == 1


def test_uncompile_ends_the_ledger_of_what_a_wrapper_is_around(plain_inductor: CompileCounter) -> None:
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    inner = nn.Sequential(nn.Linear(32, 32))
    outer = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["0"]))
    quant_compile.compile(outer, "W8A16")
    with torch.inference_mode():
        outer(torch.ones(2, 32))
    assert quant_compile.report(outer).coverage == 1
    quant_compile.uncompile(outer)
    assert quant_compile.report(outer).policy == quant_compile.report(inner).policy == "none"


def test_a_shared_weight_brings_no_other_models_policy(plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    a, b = (nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2))
    a[0].weight = b[0].weight
    quant_compile.compile(b, "W8A16")
    with torch.inference_mode():
        b(torch.ones(2, 32))
    report = quant_compile.report(a)
    assert report.policy == "none" and "no compiled graph has read this model yet" in report.notes
    assert quant_compile.report(b[1]).policy == "W8A16"  # a part of it
