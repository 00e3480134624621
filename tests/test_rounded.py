"""Weights rounded by example batches: what calibrate writes, what compile takes, what it says where it cannot."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import quant_compile
from quant_compile import MissingScalesError, OptionError, Policy, PolicyError, WeightError, rounded
from quant_compile.ir.errors import PolicyWarning
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.rounding.gptq import gptq
from quant_compile.lowering.rounding.recipe import plane_key
from quant_compile.lowering.weights import STORE
from quant_compile.measure.weights import chosen_by
from quant_compile.model import moments
from quant_compile.rounded import FEWER
from quant_compile.simulate import Simulation
from tests.moe_support import FAMILIES
from tests.runtime_support import CompileCounter, Stack, plain_inductor

__all__ = ["plain_inductor"]

REFERENCE = {"kernels": "reference"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield


def data(count: int = 4, rows: int = 100, k: int = 32, seed: int = 0) -> list[Tensor]:
    """Inputs that hang together, some columns larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * 0.5 + torch.eye(k)
    size = torch.logspace(-1, 1, k)
    return [((torch.randn(rows, k, generator=generator) @ mix) * size).bfloat16() for _ in range(count)]


def made(method: str, spec: str = "int4.group16+16", **more: Any) -> tuple[nn.Module, Policy]:
    torch.manual_seed(0)
    model = Stack(2).bfloat16()
    custom = parse(spec).to_fields() if "." in spec else spec
    return model, quant_compile.calibrate(model, data(), {"default": custom, "method": method, **more}, progress=False)


@pytest.mark.parametrize("spec", ["int4.group16+16", "W4A16", "NVFP4A16", "MXFP4A16", "W8A8", "W4A8"])
def test_gptq_end_to_end(spec: str, plain_inductor: CompileCounter) -> None:
    """The planes are GPTQ's over the inputs that the weight met, the compiled model computes with them, and nothing else changes."""
    model, policy = made("gptq", spec)
    scheme, before = parse(spec), copy.deepcopy(model.state_dict())
    name, x = "layers.0.gate_proj", torch.cat(data()).float()
    weight = before[f"{name}.weight"]
    expected = gptq(weight, scheme, x.t() @ x / len(x))
    assert expected is not None and policy.planes is not None
    with safe_open(str(policy.planes), "pt") as file:
        found = tuple(file.get_tensor(plane_key(name, i)) for i in range(len(expected)))
    ours, theirs = (family_of(scheme).dequantize_weight(planes, scheme, 32) for planes in (found, expected))
    # Sums in another order move a code now and then.
    assert float(torch.isclose(ours, theirs, rtol=1e-4, atol=1e-6).double().mean()) > 0.95
    input_of = data(1, seed=9)[0]
    plain = model(input_of).float()
    quant_compile.compile(model, policy=policy, **REFERENCE)
    assert 0 < float((model(input_of).float() - plain).norm() / plain.norm()) < 0.2
    served = STORE.served(model.get_parameter(f"{name}.weight"), scheme.spec)
    assert served is not None and all(torch.equal(a, b) for a, b in zip(served[1], found, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    lines = [line for line in quant_compile.report(model).lines if line.scheme]
    assert lines and all("rounding: gptq" in line.reason for line in lines)


def test_a_file_names_what_it_holds() -> None:
    model, policy = made("gptq")
    assert policy.planes is not None and policy.scales is None
    with safe_open(str(policy.planes), "pt") as file:
        name = next(n for n, _ in model.named_parameters() if n.endswith("weight")).removesuffix(".weight")
        assert file.get_tensor(plane_key(name, 0)).dtype == torch.uint8
        assert file.metadata()["method"] == "gptq"


def test_a_policy_file_gets_its_planes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\ndefault: W4A16\nmethod: search  # by inputs\n")
    model = Stack(2).bfloat16()
    with pytest.raises(PolicyError, match="needs planes that example batches make"):
        quant_compile.compile(copy.deepcopy(model), policy=path, **REFERENCE)(data(1)[0])
    policy = quant_compile.calibrate(model, data(), path, progress=False)
    assert path.read_text().endswith("planes: mine.planes.safetensors\n") and "# by inputs" in path.read_text()
    again = Policy.load(path)
    assert again == policy and again.content_hash == policy.content_hash
    quant_compile.compile(model, policy=path, **REFERENCE)
    model(data(1)[0])
    assert "rounding: search by inputs" in quant_compile.report(model).lines[0].reason
    saved = policy.save(tmp_path / "other.yaml")
    assert Policy.load(saved).planes == policy.planes


def test_static_scales_and_planes_together(plain_inductor: CompileCounter) -> None:
    model, policy = made("gptq", "W8A8_STATIC")
    assert policy.scales is not None and policy.planes is not None and policy.scales != policy.planes
    quant_compile.compile(model, policy=policy, **REFERENCE)
    assert torch.isfinite(model(data(1)[0])).all()


def test_other_weights_or_schemes_are_refused() -> None:
    model, policy = made("gptq")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.copy_(torch.randn_like(parameter))
    with pytest.raises(WeightError, match="not those of this weight"):
        quant_compile.compile(other, policy=policy, **REFERENCE)(data(1)[0])
    changed = Policy.load({"default": "W4A16", "planes": str(policy.planes)})
    with pytest.raises(PolicyError, match=r"the policy says int4\.group128"):
        quant_compile.compile(copy.deepcopy(model), policy=changed, **REFERENCE)(data(1)[0])
    gone = Policy.load({"default": "W4A16", "planes": "nowhere.safetensors"})
    with pytest.raises(PolicyError, match="not readable"):
        quant_compile.compile(copy.deepcopy(model), policy=gone, **REFERENCE)(data(1)[0])


def test_a_shape_that_changed_is_refused() -> None:
    _, policy = made("gptq")
    with pytest.raises(WeightError, match="not those of this weight"):
        quant_compile.compile(Stack(2, 64).bfloat16(), policy=policy, **REFERENCE)(data(1, k=64)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers(bad: float) -> None:
    batches = data()
    batches[1][3, 5] = bad
    with pytest.raises(MissingScalesError, match="NaN or inf"):
        quant_compile.calibrate(Stack(2).bfloat16(), batches, {"default": "W4A16", "method": "gptq"}, progress=False)
    assert not list(Path().glob("*.safetensors*"))


def test_nothing_to_do() -> None:
    model = Stack(2).bfloat16()
    with pytest.raises(OptionError, match="no batches"):
        quant_compile.calibrate(model, [], {"default": "W4A16", "method": "gptq"}, progress=False)
    with pytest.raises(OptionError, match="no weight of this model has a scheme whose codes can be chosen"):
        quant_compile.calibrate(model, data(), {"default": "FP8_DYNAMIC", "method": "gptq"}, progress=False)
    with pytest.raises(PolicyError, match="method must be search or gptq"):
        Policy.load({"default": "W4A16", "method": "magic"})
    with pytest.raises(PolicyError, match="rounding must be auto or nearest or search or compensate"):
        Policy.load({"default": "W4A16", "rounding": "up"})


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts(implementation: str, plain_inductor: CompileCounter) -> None:
    """Each expert by its own tokens, whatever computes them; one that met few has its scales searched for, and is named."""
    model = FAMILIES["mixtral"].make(implementation)
    ids = torch.randint(0, model.config.vocab_size, (16, 60), generator=torch.Generator().manual_seed(2))
    policy = quant_compile.calibrate(
        model,
        [{"input_ids": ids, "use_cache": False}],
        {"default": "int4.group16+16", "method": "gptq"},
        progress=False,
    )
    assert policy.planes is not None
    with safe_open(str(policy.planes), "pt") as file:
        told = [name for name in file.keys() if "experts" in name]  # noqa: SIM118  a safetensors file is no dict
        assert told and all(file.get_tensor(name).shape[0] == model.config.num_local_experts for name in told)
    plain = model(input_ids=ids, use_cache=False).logits
    model.set_experts_implementation("grouped_mm")  # what graphs are matched for
    other = copy.deepcopy(model)
    quant_compile.compile(model, policy=policy, **REFERENCE)
    quant_compile.compile(other, policy={"default": "int4.group16+16"}, **REFERENCE)
    ours, nearest = (m(input_ids=ids, use_cache=False).logits - plain for m in (model, other))
    assert ours.norm() < nearest.norm()
    reasons = [line.reason for line in quant_compile.report(model).lines if "experts" in line.names[0]]
    assert all("gptq" in reason for reason in reasons)


# --- weights that make good what those before them lost ---


def error_of(model: nn.Module, policy: Policy) -> float:
    """Of the outputs for new inputs, to the model's own."""
    apart, whole = 0.0, 0.0
    for x in data(4, seed=9):
        plain = model(x).float()
        with torch.inference_mode(), Simulation(chosen_by(policy, model)):
            apart += float((model(x).float() - plain).square().sum())
        whole += float(plain.square().sum())
    return (apart / whole) ** 0.5


@pytest.mark.parametrize(("before", "spec"), [("", "int4.group16+16"), ("", "NVFP4A16"), ("awq+", "int4.group16+16")])
def test_later_weights_make_good_what_earlier_ones_lost(before: str, spec: str) -> None:
    """The output is nearer to the model's, for inputs that were not calibrated with."""
    torch.manual_seed(0)
    model = Stack(4).bfloat16()
    kept = copy.deepcopy(model.state_dict())
    custom = parse(spec).to_fields() if "." in spec else spec
    policies = [
        quant_compile.calibrate(
            model,
            data(8, rows=200),
            {"default": custom, "method": f"{before}{method}"},
            path=f"{method}.safetensors",
            progress=False,
        )
        for method in ("gptq", "gptaq")
    ]
    unpaired, paired = (error_of(model, policy) for policy in policies)
    assert paired < unpaired
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    quant_compile.compile(model, policy=policies[1], **REFERENCE)
    model(data(1)[0])
    lines = [line for line in quant_compile.report(model).lines if line.scheme]
    # The first weights' inputs are the model's own.
    assert [line.names[0] for line in lines if "gptaq" not in line.reason] == [
        f"layers.0.{name}_proj.weight" for name in ("gate", "up")
    ]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_rounded_by_what_the_quantized_model_gives_them(implementation: str) -> None:
    """Other tokens may reach an expert there: those that reach it in both are its pairs."""
    model = FAMILIES["mixtral"].make(implementation)
    ids = torch.randint(0, model.config.vocab_size, (16, 60), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": ids, "use_cache": False}]
    policy = quant_compile.calibrate(model, batches, {"default": "int4.group16+16", "method": "gptaq"}, progress=False)
    assert policy.planes is not None
    with safe_open(str(policy.planes), "pt") as file:
        told = {name: made["method"] for name, made in json.loads(file.metadata()["planes_of"]).items()}
    experts, others = ([method for name, method in told.items() if ("experts" in name) == of] for of in (True, False))
    assert experts and all(method == "gptaq" for method in experts) and "gptaq" in others


@pytest.mark.parametrize(("noise", "room"), [(0.0, 2048), (0.2, 2048), (0.2, 100)])
def test_rows_of_experts_are_paired_by_what_they_are(noise: float, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, with some in one run alone; what is no row of the other run has no partner."""
    monkeypatch.setattr(moments, "PARTNERS", room)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 64, generator=generator)
    order = torch.randperm(500, generator=generator)
    plain, quantized = order[:400].sort().values, order[150:]
    moved = rows[quantized] + noise * torch.randn(350, 64, generator=generator)
    ours, theirs = moments._partners(rows[plain].bfloat16(), moved.bfloat16())
    assert torch.equal(plain[ours], quantized[theirs])
    assert len(ours) == 250, "all that both have"
    several = rows[:50].repeat(4, 1)
    assert len(moments._partners(several, several)[0]) == 200, "rows that are there several times"
    far = rows.double() + 1e4  # what all share
    ours, theirs = moments._partners(far.float(), far.float())
    assert len(ours) == 500 and torch.equal(ours, theirs)
    assert not len(moments._partners(rows[:200], -rows[:200])[0]) and not len(moments._partners(rows[:0], rows)[0])
    assert not len(moments._partners(rows, rows * float("nan"))[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_experts_that_are_no_numbers_are_no_fewer_rows(bad: float) -> None:
    model = FAMILIES["mixtral"].make("eager")
    ids = torch.randint(0, model.config.vocab_size, (4, 60), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": ids, "use_cache": False}]

    def spoil(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x.view(-1, x.shape[-1])[3] = bad
        return (x, *args[1:])

    model.model.layers[-1].mlp.experts.register_forward_pre_hook(spoil)
    with pytest.raises(MissingScalesError, match="NaN or inf"):
        quant_compile.calibrate(model, batches, {"default": "int4.group16+16", "method": "gptaq"}, progress=False)
    assert not list(Path().glob("*.safetensors"))


class Chosen(nn.Module):
    """A weight that meets those rows alone which another one chose: those above zero, or the largest, in order."""

    def __init__(self, count: int | None) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """[t, 32] -> [fewer, 32]."""
        y = self.first(x)
        return self.second(y[y[:, 0] > 0] if self.count is None else y[y[:, 0].topk(self.count).indices])


@pytest.mark.parametrize("count", [None, 60])
def test_rows_that_the_quantized_model_chooses_otherwise_have_no_pairs(count: int | None) -> None:
    torch.manual_seed(0)
    model = Chosen(count).bfloat16()
    policy = quant_compile.calibrate(
        model, data(), {"default": parse("int4.group16+16").to_fields(), "method": "gptaq"}, progress=False
    )
    assert policy.planes is not None
    with safe_open(str(policy.planes), "pt") as file:
        told = json.loads(file.metadata()["planes_of"])
    assert told["first"]["method"] == told["second"]["method"] == "gptq"


class Backwards(nn.Module):
    """Runs its parts in another order than it has them in; drops some of what they make while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.third, self.second, self.first = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        """[t, 32] -> [t, 32]."""
        y = torch.dropout(self.first(x), 0.5, self.training)
        for _ in range(times):
            y = self.second(torch.tanh(y))
        return self.third(y)


def planes_by(model: nn.Module, batches: list[Any]) -> dict[str, Any]:
    policy = quant_compile.calibrate(
        model, batches, {"default": parse("int4.group16+16").to_fields(), "method": "gptaq"}, progress=False
    )
    assert policy.planes is not None
    with safe_open(str(policy.planes), "pt") as file:
        told = json.loads(file.metadata()["planes_of"])
        return {name: (told[name]["method"], file.get_tensor(plane_key(name, 0))) for name in told}


def test_stages_are_in_the_order_of_the_run_and_without_dropout() -> None:
    torch.manual_seed(0)
    model = Backwards().bfloat16()
    found = planes_by(model, data())
    assert model.training and all(module.training for module in model.modules())
    assert {name: method for name, (method, _) in found.items()} == {
        "first": "gptq",
        "second": "gptaq",
        "third": "gptaq",
    }
    again = planes_by(model.eval(), data())
    assert all(torch.equal(found[name][1], again[name][1]) for name in found), "it was calibrated as it is served"
    assert not any(module.training for module in model.modules())


def test_what_a_later_batch_meets_more_often_is_seen_in_any_order() -> None:
    torch.manual_seed(0)
    model = Backwards().bfloat16().eval()
    batches = [(x, times) for x, times in zip(data(), (1, 3, 2, 1), strict=True)]
    found, reverse = planes_by(model, batches), planes_by(model, batches[::-1])
    alike = (
        (found["second"][1] == reverse["second"][1]).float().mean()
    )  # sums in another order move a code now and then
    assert found["second"][0] == "gptaq" and float(alike) > 0.98


@pytest.mark.parametrize(("room", "passes"), [(1 << 30, 2), (20_000, 3), (0, 3)])
def test_a_pass_ends_behind_the_last_weight_of_its_stage(
    room: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two weights of each layer read one input: eight stages, of which the last alone reaches the last weight, quantized, and in 16 bits
    where its rows were not kept from the first pass, which shows what reads what.
    """
    monkeypatch.setattr(rounded, "ROWS_BYTES", room)
    model, calls = Stack(4).bfloat16(), list[int]()
    model.layers[3].down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    custom = parse("int4.group16+16").to_fields()
    quant_compile.calibrate(model, data(), {"default": custom, "method": "gptaq"}, progress=False)
    assert len(calls) == passes * len(data())


def test_rows_that_are_kept_are_those_that_are_met_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Backwards().bfloat16().eval()
    batches = [(x, times) for x, times in zip(data(), (1, 3, 2, 1), strict=True)]
    kept = planes_by(model, batches)
    monkeypatch.setattr(rounded, "ROWS_BYTES", 0)
    for name, (method, codes) in planes_by(model, batches).items():
        assert method == kept[name][0] and torch.equal(codes, kept[name][1])


class Reused(nn.Module):
    """Writes over what a weight has read."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        """[t, 32] -> [t, 32]."""
        h = self.first(x)
        y = self.second(h)
        return y + h.zero_() if self.again else y


def test_an_input_that_is_written_over_after_it_was_read(plain_inductor: CompileCounter) -> None:
    planes = list[Tensor]()
    for again in (False, True):
        policy = quant_compile.calibrate(
            Reused(again).bfloat16(), data(), {"default": parse("int4.group16+16").to_fields(), "method": "gptaq"},
            path=f"{again}.safetensors", progress=False,
        )  # fmt: skip
        assert policy.planes is not None
        with safe_open(str(policy.planes), "pt") as file:
            planes.append(file.get_tensor(plane_key("second", 0)))
    assert torch.equal(*planes)


def test_static_inputs_under_pairs(plain_inductor: CompileCounter) -> None:
    """Their scales are calibrated after the weights: later weights see them as they are in 16 bits, and have nothing to make good."""
    model, policy = made("gptaq", "W8A8_STATIC")
    assert policy.scales is not None and policy.planes is not None
    quant_compile.compile(model, policy=policy, **REFERENCE)
    model(data(1, seed=4)[0])
    assert all("rounding: gptq" in line.reason for line in quant_compile.report(model).lines if line.scheme)


@pytest.mark.parametrize("method", ["search", "gptq", "awq"])
def test_experts_whose_gates_and_ups_alternate(method: str, plain_inductor: CompileCounter) -> None:
    """GPT-OSS: planes are of the rows as the model has them, and graphs read all gates first."""
    model = FAMILIES["gpt_oss"].make("eager")
    ids = torch.randint(0, model.config.vocab_size, (16, 60), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "use_cache": False}
    policy = quant_compile.calibrate(model, [batch], {"default": "int4.group16+16", "method": method}, progress=False)
    plain = model(**batch).logits
    with Simulation(chosen_by(policy, model)):
        simulated = model(**batch).logits
    model.set_experts_implementation("grouped_mm")
    quant_compile.compile(model, policy=policy, **REFERENCE)
    ours = model(**batch).logits
    assert quant_compile.report(model).coverage == 1.0
    assert (ours - simulated).norm() < 0.05 * (simulated - plain).norm()


@pytest.mark.parametrize("stored", ["16 bits", "MXFP4A16"])
def test_a_checkpoint_of_alternating_gates_takes_its_planes(
    stored: str, tmp_path: Path, plain_inductor: CompileCounter
) -> None:
    """GPT-OSS from its own values, and from codes whose values a policy quantizes again: as the model itself under the policy."""
    model = FAMILIES["gpt_oss"].make("grouped_mm")
    ids = torch.randint(0, model.config.vocab_size, (16, 60), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "use_cache": False}
    if stored == "16 bits":
        model.save_pretrained(tmp_path / "model")
    else:
        coded = copy.deepcopy(model)
        quant_compile.compile(
            coded, policy={"default": "keep", "rules": [{"match": "*experts*", "scheme": stored}]}, **REFERENCE
        )
        coded(**batch)
        quant_compile.save(coded, tmp_path / "model")
        plain = quant_compile.load(
            tmp_path / "model", {"default": "keep", "requantize": True}, device="cpu", **REFERENCE
        )
        model.load_state_dict(plain.state_dict())
    rule = {"match": "*experts*", "scheme": "int4.group16+16", "requantize": True}
    policy = {"default": "keep", "rules": [rule], "method": "gptq"}
    made = quant_compile.calibrate(model, [batch], policy, progress=False)
    loaded = quant_compile.load(tmp_path / "model", made, device="cpu", dtype=torch.float32, **REFERENCE)
    loaded.set_experts_implementation("grouped_mm")
    quant_compile.compile(model, policy=made, **REFERENCE)
    wanted = model(**batch).logits
    assert quant_compile.report(model).coverage == 1.0
    assert (loaded(**batch).logits - wanted).norm() < 1e-5 * wanted.norm()


def test_an_expert_that_met_few_tokens() -> None:
    model = FAMILIES["mixtral"].make("eager")
    ids = torch.randint(0, model.config.vocab_size, (1, 8))
    policy = quant_compile.calibrate(
        model,
        [{"input_ids": ids, "use_cache": False}],
        {"default": "int4.group16+16", "method": "gptq"},
        progress=False,
    )
    model.set_experts_implementation("grouped_mm")
    quant_compile.compile(model, policy=policy, **REFERENCE)
    assert torch.isfinite(model(input_ids=ids, use_cache=False).logits).all()
    reasons = [line.reason for line in quant_compile.report(model).lines if "experts" in line.names[0]]
    assert reasons and all(FEWER in reason for reason in reasons)


def test_search_without_data_is_a_policys_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_compile.lowering.rounding.recipe.DEFAULT", "auto")
    torch.manual_seed(0)
    model, scheme = Stack(2).bfloat16(), parse("W4A16")
    quant_compile.compile(model, policy="w4a16", **REFERENCE)
    x = data(1)[0]
    first = model(x)
    assert "rounding: compensate" in quant_compile.report(model).lines[0].reason
    quant_compile.uncompile(model)
    quant_compile.compile(model, policy={"default": "W4A16", "rounding": "nearest"}, **REFERENCE)
    second = model(x)
    assert not torch.equal(first, second)
    assert "rounding" not in quant_compile.report(model).lines[0].reason
    assert family_of(scheme).grid(torch.zeros(1, 32), scheme) is not None


@pytest.mark.parametrize("change", ["a little", "one number", "scaled", "after compiling"])
def test_planes_are_of_one_weight_alone(change: str) -> None:
    """Any other value, however near, is another weight: a merged adapter would be ignored."""
    model, policy = made("gptq")
    weight = model.get_parameter("layers.1.up_proj.weight")
    if change == "after compiling":
        quant_compile.compile(model, policy=policy, **REFERENCE)
        model(data(1)[0])
    if change == "one number":
        weight[-1, -1] += 1
    else:
        weight.mul_(1.02 if change == "a little" else 0.7)
    if change != "after compiling":
        quant_compile.compile(model, policy=policy, **REFERENCE)
    with pytest.raises(WeightError, match="not those of this weight"):
        model(data(1)[0])


@pytest.mark.parametrize("size", [32, 48])
def test_weights_that_are_stored_the_other_way(size: int, plain_inductor: CompileCounter) -> None:
    """Conv1D's [k, n], square ones too, where the shape does not tell."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(size, 32)).bfloat16()
    policy = quant_compile.calibrate(model, data(), {"default": "W4A16", "method": "gptq"}, progress=False)
    x = data(1, seed=4)[0]
    plain = model(x).float()
    quant_compile.compile(model, policy=policy, **REFERENCE)
    assert float((model(x).float() - plain).norm()) < 0.2 * float(plain.norm())


def test_too_few_tokens_for_gptq() -> None:
    model = Stack(2).bfloat16()
    policy = quant_compile.calibrate(model, data(1, rows=8), {"default": "W4A16", "method": "gptq"}, progress=False)
    quant_compile.compile(model, policy=policy, **REFERENCE)
    model(data(1)[0])
    assert FEWER in quant_compile.report(model).lines[0].reason


@pytest.mark.parametrize("text", ["{default: W4A16, method: search}\n", "default: W4A16\nmethod: search\n...\n"])
def test_a_policy_file_that_no_line_can_be_added_to(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.warns(PolicyWarning, match="by hand"):
        policy = quant_compile.calibrate(Stack(2).bfloat16(), data(), path, progress=False)
    assert path.read_text() == text and policy.planes is not None and policy.planes.is_file()
    assert [file.name for file in tmp_path.iterdir() if ".part" in file.name] == []


def test_where_planes_go(tmp_path: Path) -> None:
    model, shipped = Stack(2).bfloat16(), Policy.load("nvfp4a16")
    policy = quant_compile.calibrate(model, data(), replace(shipped, method="search"), progress=False)
    assert policy.planes is not None and policy.planes.parent == tmp_path
    with pytest.raises(OptionError, match="is no folder"):
        quant_compile.calibrate(
            model, data(), {"default": "W4A16", "method": "gptq"}, path="none/x.safetensors", progress=False
        )
    with pytest.raises(OptionError, match="must be an iterable of batches"):
        quant_compile.calibrate(model, data(1)[0], {"default": "W4A16", "method": "gptq"}, progress=False)


def test_planes_of_another_model_are_no_silent_search() -> None:
    _, policy = made("gptq")
    with pytest.raises(PolicyError, match="are of no weight of this model"):
        quant_compile.compile(nn.Sequential(nn.Linear(32, 32)).bfloat16(), policy=policy)


def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are measured after weights are rounded; where they cannot be, there are no planes either."""
    path = tmp_path / "both.yaml"
    path.write_text("default: W8A8_STATIC\nmethod: search\n")

    def useless(*given: Any) -> None:
        raise MissingScalesError("no scale follows")

    monkeypatch.setattr(sys.modules["quant_compile.calibrating"], "_refuse_useless", useless)
    with pytest.raises(MissingScalesError):
        quant_compile.calibrate(Stack(2).bfloat16(), data(), path, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["both.yaml"] and "planes" not in path.read_text()


def test_attribute_measures_the_policys_rounding() -> None:
    model, policy = made("gptq")
    totals = {
        how: quant_compile.attribute(model, data(2, seed=5), given, progress=False).total
        for how, given in (("gptq", policy), ("nearest", {"default": policy.default, "rounding": "nearest"}))
    }
    assert totals["gptq"] != totals["nearest"]


def test_static_scales_are_of_the_model_without_dropout() -> None:
    """As weights are: a model that trains gets its mode back."""
    torch.manual_seed(0)
    model, scales = Backwards().bfloat16(), list[Tensor]()
    for name in ("train", "eval"):
        policy = quant_compile.calibrate(
            getattr(model, name)(), data(), "W8A8_STATIC", path=f"{name}.safetensors", progress=False
        )
        assert policy.scales is not None and model.training == (name == "train")
        with safe_open(str(policy.scales), "pt") as file:
            scales.append(torch.cat([file.get_tensor(key).reshape(-1) for key in sorted(file.keys())]))
    assert torch.equal(*scales)
