"""The search: what it finds against all choices, budgets, resuming, the policy file, and bad input."""

from __future__ import annotations

import builtins
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quant_compile
from quant_compile import MeasureError, OptionError, Policy, demo
from quant_compile.ir.scheme import parse
from quant_compile.measure import sensitivity
from quant_compile.measure.choose import Option, choose, total
from quant_compile.measure.groups import find_groups
from quant_compile.measure.log import Log
from quant_compile.measure.outputs import Reference
from quant_compile.measure.rules import Decided, rules_of, text_of
from quant_compile.measure.weights import chosen_by
from quant_compile.model.plan import Plan
from quant_compile.model.weights import linear_weights
from quant_compile.simulate import Simulation
from tests.measure.test_attribute import batches, tiny
from tests.test_calibrate_experts import tiny_moe

pytest.importorskip("scipy")

G32 = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}


def search(model: Any, path: Path, **options: Any) -> Any:
    given = {"budget": {"bits": 4.5}, "points": 0, "progress": False} | options
    return quant_compile.search(model, batches(), path=path, **given)


# groups.


def test_siblings_and_experts_are_decided_together() -> None:
    found = find_groups(tiny(2), batches())
    assert [group.name for group in found.groups][:4] == [
        "model.layers.0.self_attn.q_proj + k_proj + v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj + up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert len(found.groups) == 8 and not found.unreached
    with torch.no_grad():
        moe = find_groups(tiny_moe(), batches())
    assert [len(group.weights) for group in moe.groups] == [3, 1, 2] * 2
    assert moe.groups[2].names == ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
    assert not any(name.endswith("mlp.gate") for group in moe.groups for name in group.names)


# the program.


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    """Against every combination."""
    random = torch.Generator().manual_seed(seed)

    def number() -> float:
        return float(torch.rand((), generator=random))

    groups = [[Option(None, number() * 1e-3, int(1e6 * number()), number()) for _ in range(4)] for _ in range(5)]
    limit = 0.5 * sum(max(option.bytes for option in group) for group in groups)
    found = choose(groups, {"bytes": limit, "ms": 3.0})
    able = [c for c in itertools.product(*groups) if total(c, "bytes") <= limit and total(c, "ms") <= 3.0]
    assert total(found, "bytes") <= limit and total(found, "ms") <= 3.0
    assert total(found, "error") == pytest.approx(min(total(c, "error") for c in able), rel=1e-4)
    fewest = choose(groups, {"error": 2e-3}, "bytes")
    assert total(fewest, "bytes") == min(
        total(c, "bytes") for c in itertools.product(*groups) if total(c, "error") <= 2e-3
    )


def test_an_option_without_an_error_is_never_chosen() -> None:
    bad, good = Option(None, float("inf"), 1), Option(None, 1.0, 5)
    assert choose([[bad, good]], {}) == [good]
    with pytest.raises(MeasureError, match="cannot be met"):
        choose([[bad, good]], {"bytes": 2.0})


# the whole.


def test_a_search_meets_its_budget_and_its_policy_says_the_same(tmp_path: Path) -> None:
    model = tiny()
    found = search(model, tmp_path / "found.yaml", points=4)
    policy = Policy.load(tmp_path / "found.yaml")
    assert policy == found.policy and found.point.bits <= 4.5
    decided = {name: choice.scheme for choice in found.choices for name in choice.weights}
    weights = linear_weights(model)
    for weight in weights:
        scheme = policy.decide(weight.site).scheme
        assert (scheme.spec if scheme else "keep") == decided.get(weight.site.names[0], "keep")
    assert policy.decide(weights[-1].site).scheme is None and "lm_head" in weights[-1].site.names
    assert Plan.of(policy, model).bytes_after == found.point.bytes and not Plan.of(policy, model).problems
    by_hand = Reference(model, batches()).divergence(Simulation(chosen_by(policy, model)))
    assert found.point.measured == pytest.approx(by_hand)
    uniform = next(point for point in found.points if point.label == "W4A16")
    assert found.point.predicted < uniform.predicted
    text = (tmp_path / "found.yaml").read_text()
    assert "# KL to the model as it is" in text and "bits 4.5" in text
    assert {"W4A16", "NVFP4A16", "search", "W8A16"} <= {point.label for point in found.points}
    front = sorted((point for point in found.points if point.label == "search"), key=lambda point: point.bytes)
    assert [point.predicted for point in front] == sorted((point.predicted for point in front), reverse=True)
    assert "bits a weight" in str(found) and json.loads(found.to_json())["choices"]


def test_experts_too(tmp_path: Path) -> None:
    with torch.no_grad():
        model = tiny_moe()
    found = search(model, tmp_path / "moe.yaml", budget={"bits": 6}, schemes=[G32, "W8A16"])
    assert found.point.bits <= 6
    assert not Plan.of(found.policy, model).problems
    schemes = {choice.scheme for choice in found.choices}
    assert schemes == {"int4.group32+16", "W8A16"}


def test_the_budgets(tmp_path: Path) -> None:
    model = tiny(2)
    path = tmp_path / "p.yaml"
    whole = search(model, path, budget={"bits": 16})
    assert {choice.scheme for choice in whole.choices} == {"keep"} and whole.point.measured == 0
    size = sum(parameter.nbytes for parameter in model.parameters())
    some = search(model, path, budget={"bytes": 0.5 * size})
    assert some.point.bytes <= 0.5 * size
    error = 0.5 * next(p for p in some.points if p.label == "W4A16").measured
    precise = search(model, path, budget={"error": error})
    assert precise.point.measured <= error and precise.point.bits < 16
    slow = search(model, path, budget={"bits": 16}, m={1: 10, 64: 1}, target="sm90")
    fast = search(model, path, budget={"ms": 0.9 * slow.point.ms}, m={1: 10, 64: 1}, target="sm90")
    assert 0 < fast.point.ms <= 0.9 * slow.point.ms and fast.how == "estimated on sm90, 10 x m=1, 1 x m=64"
    assert "ms" in path.read_text()


def test_a_search_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny(1), tmp_path / "p.yaml"
    real, calls = Reference.divergence, []

    def counted(self: Reference, context: Any = None) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, context)

    monkeypatch.setattr(Reference, "divergence", counted)
    with pytest.raises(KeyboardInterrupt):
        search(model, path, schemes=["W4A16", "W8A16", "keep"])
    log = tmp_path / "p.yaml.jsonl"
    assert len(log.read_text().splitlines()) == 4
    log.write_text(log.read_text() + '{"key": "cut')
    first = search(model, path, schemes=["W4A16", "W8A16", "keep"])
    done = len(calls)
    assert done == 5 + 4 + 2  # the other four sensitivities, then W4A16 for all, which is the choice, and W8A16
    again = search(model, path, schemes=["W4A16", "W8A16", "keep"])
    assert len(calls) == done and again.choices == first.choices and again.points == first.points
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    search(model, path, schemes=["W4A16", "W8A16", "keep"])
    assert len(calls) > done  # another model


def test_fisher_orders_as_the_divergence_does(tmp_path: Path) -> None:
    """Rank correlation over all cells; labels are drawn, so single numbers scatter."""
    model = tiny(2).float()
    given = [torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    reference = Reference(model, given)
    groups = find_groups(model, given).groups
    cells = [(index, parse(spec)) for index in range(len(groups)) for spec in ("W4A16", "NVFP4A16", "W8A16")]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    by = [sensitivity.measure(method, reference, groups, cells, Log(None, ""), False) for method in ("kl", "fisher")]
    exact, estimated = (torch.tensor([one[cell] for cell in cells]).log() for one in by)
    assert torch.corrcoef(torch.stack([exact, estimated]))[0, 1] > 0.95
    assert float((exact - estimated).abs().median()) < 0.7  # within a factor of two
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_front_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(tiny(1), tmp_path / "p.yaml", points=3)
    page = found.plot(tmp_path / "front.html").read_text()
    assert "<svg" in page and "<table>" in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert found.plot(tmp_path / "front.svg").read_text().count("<circle") >= 4
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(quant_compile.QuantError, match=r"quant-compile\[plot\]\"?, or a path that ends in \.html"):
            found.plot(tmp_path / "a.png")
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "a.png").stat().st_size > 1000


# the file.


def decided(names: dict[str, str | None]) -> list[Decided]:
    """An MLP's weights are four times as large."""
    return [
        Decided(name, "", parse(spec) if spec else None, elements=4 if "mlp" in name else 1)
        for name, spec in names.items()
    ]


def policy_text(names: dict[str, str | None]) -> str:
    return text_of(rules_of(decided(names)), "p", [], lambda members: f"{len(members)} weights")


def test_rules_are_few_where_layers_agree() -> None:
    names: dict[str, str | None] = {}
    for layer in range(4):
        for part in ("q_proj", "k_proj", "v_proj"):
            names[f"model.layers.{layer}.self_attn.{part}"] = "W8A16"
        names[f"model.layers.{layer}.self_attn.o_proj"] = "W4A16"
        names[f"model.layers.{layer}.mlp.up_proj"] = "W4A16"
        names[f"model.layers.{layer}.mlp.down_proj"] = {0: "W8A16", 3: None}.get(layer, "W4A16")
    assert policy_text(names) == (
        "version: 1\nname: p\n# 10 weights\ndefault: W4A16\nrules:\n"
        "  # 1 weights\n  - match: model.layers.3.mlp.down_proj\n    scheme: keep\n"
        "  # 1 weights\n  - match: model.layers.0.mlp.down_proj\n    scheme: W8A16\n"
        "  # 12 weights\n  - match: 're:model\\.layers\\.\\d+\\.self_attn\\.(q|k|v)_proj'\n    scheme: W8A16\n"
    )


NAMES = [
    f"{prefix}layers.{layer}.{part}"
    for prefix in ("model.", "")
    for layer in (0, 1, 10, 11)
    for part in ("attn.q_proj", "attn.k", "mlp.0.up", "mlp.2.up", "mlp.experts.0.w1", "mlp.experts.1.w1")
] + ["head", "pooler.dense", "0", "12"]


@pytest.mark.parametrize("seed", range(20))
def test_a_file_decides_what_was_chosen(seed: int, tmp_path: Path) -> None:
    """Any choice, of names with several numbers or none."""
    random = torch.Generator().manual_seed(seed)
    specs = ["W4A16", "W8A16", None, "int4.group32+16"]
    many = int(torch.randint(1, 5, (), generator=random))
    names = {name: specs[int(torch.randint(0, many, (), generator=random))] for name in NAMES}
    for name in NAMES:  # experts of a block agree
        if "experts.1" in name:
            names[name] = names[name.replace("experts.1", "experts.0")]
    path = tmp_path / "p.yaml"
    path.write_text(policy_text(names))
    policy = Policy.load(path)
    for name, spec in names.items():
        found = policy._decide(quant_compile.policy.SiteInfo((name,), "linear", None, 256, 256)).scheme
        assert (found.spec if found else None) == spec, name


# bad input.


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny(1), tmp_path / "p.yaml"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"budget": {}}, "budget must be a mapping"),
        ({"budget": {"bit": 4}}, "unknown budget 'bit'. Fix: one of bits, bytes, ms, error"),
        ({"budget": {"bits": -1}}, "must be a number above 0"),
        ({"budget": {"ms": 1}}, "needs m. Fix: m={1: 128, 512: 1}"),
        ({"m": {0: 1}}, "m must say how often"),
        ({"schemes": ["W4A17"]}, "unknown scheme 'W4A17'. Did you mean W4A16"),
        ({"schemes": "W4A16"}, "schemes must be a list"),
        ({"schemes": []}, "no schemes were given"),
        ({"schemes": ["W8A8_STATIC"]}, "needs calibrated input scales"),
        ({"schemes": ["GGUF_IQ1_S"]}, "nothing here quantizes to GGUF_IQ1_S"),
        ({"sensitivity": "hessian"}, "sensitivity must be kl or fisher"),
        ({"path": tmp_path / "none" / "p.yaml"}, "does not exist"),
    ]
    for options, words in cases:
        with pytest.raises(OptionError) as error:
            search(model, options.pop("path", path), **options)
        assert words in str(error.value)
    with pytest.raises(OptionError, match="no batches"):
        quant_compile.search(model, [], budget={"bits": 4.5}, path=path)
    with pytest.raises(
        MeasureError, match=r"budget of 3 bits cannot be met: .* at least 4\.125 bits\.\nFix: a budget of 4\.125"
    ):
        search(model, path, budget={"bits": 3}, schemes=["W4A16", "W8A16"])
    with pytest.raises(MeasureError, match="budget of 10 bytes cannot be met"):
        search(model, path, budget={"bytes": 10}, schemes=["W4A16"])
    with pytest.raises(MeasureError, match=r"Fix: add .keep."):
        search(model, path, schemes=["GGUF_Q4_K"])
    assert not path.exists()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(MeasureError, match="NaN or inf in batch 0"):
        search(model, path)


def test_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(quant_compile.QuantError, match=r"pip install .quant-compile\[search\]"):
        search(tiny(1), tmp_path / "p.yaml")


# acceptance.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_4_5_bits_beat_single_schemes(name: str, tmp_path: Path) -> None:
    """In divergence on text that was not measured with, at no more bytes than NVFP4."""
    lm = demo.load(name)
    windows = demo.windows_of(lm.heldout, 128, 16)[:, :-1]
    measured_with, other = windows[:4], windows[4:]
    found = quant_compile.search(
        lm.model, [measured_with], budget={"bits": 4.5}, path=tmp_path / "p.yaml", points=0, progress=False
    )
    reference = Reference(lm.model, list(other.split(4)))

    def kl(policy: Any) -> float:
        return reference.divergence(Simulation(chosen_by(Policy.load(policy), lm.model)))

    ours = kl(found.policy)
    sizes = {spec: Plan.of(Policy.load(spec), lm.model).bytes_after for spec in ("W4A16", "NVFP4", "NVFP4A16")}
    assert found.point.bytes <= sizes["NVFP4"]
    for spec in sizes:
        assert ours < kl(spec), spec
