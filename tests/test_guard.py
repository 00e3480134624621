"""``guard: never_slower`` end to end on a CPU, with times that a test gives: what stays in 16 bits where, and what the ledger says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import quant_compile
from quant_compile import backend
from quant_compile.ir.errors import OptionError, PolicyError
from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.guard import Job, Plain, Product
from tests.moe_support import TinyMoe

GUARD: dict[str, Any] = {"guard": "never_slower"}
Compiled = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def pretend(monkeypatch: pytest.MonkeyPatch, time_of: Callable[[Job, int], float | Reject]) -> None:
    monkeypatch.setattr(backend, "guard_times", lambda target, level, device: time_of)


def bf16_wins_from(m: int) -> Callable[[Job, int], float]:
    """Quantized products take 1 µs, linears in 16 bits 5 below m and 0.2 above; quantizing is free."""

    def time_of(job: Job, at: int) -> float:
        if isinstance(job, Product):
            return 1.0
        return (5.0 if at < m else 0.2) if isinstance(job, Plain) else 0.0

    return time_of


class Mlp(nn.Module):
    """Two linears of one input and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def reference(model: Mlp, x: Tensor, spec: str) -> Tensor:
    """The model with each linear as its scheme's truth computes it."""
    scheme, family = parse(spec), family_of(parse(spec))

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        planes = family.quantize_input(x, scheme, None) if scheme.input_activations else (x,)
        return family.linear(planes, family.quantize_weight(layer.weight, scheme), layer.bias, scheme, x.dtype)

    return linear(F.silu(linear(x, model.gate)) * linear(x, model.up), model.down)


def by_compile(model: nn.Module, policy: Any, **options: Any) -> nn.Module:
    return quant_compile.compile(model, policy, **options)


def by_torch(model: nn.Module, policy: Any, **options: Any) -> nn.Module:
    return torch.compile(model, backend="sglquant", options={"policy": policy, **options})  # type: ignore[return-value]


DOORS = pytest.mark.parametrize("door", [by_compile, by_torch])


@DOORS
@pytest.mark.parametrize("spec", ["W8A8", "W8A16", "FP8_DYNAMIC", "W4A16"])
def test_decode_is_quantized_and_the_prompt_stays_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, spec: str, door: Callable[..., nn.Module]
) -> None:
    pretend(monkeypatch, bf16_wins_from(8))
    model = Mlp()
    compiled = door(model, {"default": spec, "strict": True}, **GUARD)
    for _ in range(2):
        one, many = torch.randn(1, 64), torch.randn(16, 64)
        torch.testing.assert_close(compiled(one), reference(model, one, spec), rtol=0, atol=1e-4)
        torch.testing.assert_close(compiled(many), model.forward(many), rtol=1e-6, atol=1e-6)
        # Both results are far enough apart for the tolerances to tell them.
        assert (reference(model, one, spec) - model.forward(one)).abs().max() > 5e-4
    report = quant_compile.report(model)
    assert [name for name, _ in report.guarded] == ["gate.weight", "up.weight", "down.weight"]
    assert report.coverage == 1.0 and not report.misses and not report.skips
    gate = report.lines[0]
    assert gate.scheme == spec and gate.kernels
    assert f"guard: f32 0.4 µs, {spec} 1.0 µs" in gate.reason and "2 linears of one input" in gate.reason
    down = next(line for line in report.lines if line.names[0] == "down.weight")
    assert f"guard: f32 0.2 µs, {spec} 1.0 µs at m <= 1024" in down.guarded
    assert down.bytes_after > down.bytes_before, "planes and the original"


class Wide(nn.Module):
    """One linear that only one input reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


@DOORS
def test_a_weight_that_16_bits_win_everywhere_is_never_packed(
    monkeypatch: pytest.MonkeyPatch, door: Callable[..., nn.Module]
) -> None:
    pretend(monkeypatch, bf16_wins_from(0))
    model = Wide()
    compiled, x = door(model, {"default": "W8A8", "strict": True}, **GUARD), torch.randn(5, 64)
    torch.testing.assert_close(compiled(x), model.forward(x))
    (line,) = (report := quant_compile.report(model)).lines
    assert line.scheme is None and line.named and line.bytes_after == line.bytes_before
    assert "guard: f32 0.2 µs, W8A8 1.0 µs at m = 5" in line.reason and "default of the policy" in line.reason
    assert report.require().coverage == 1.0 and report.share == 0.0 and report.skips == ()
    assert type(report).from_json(report.to_json()) == report and "guard: f32 0.2" in report.to_json()


def test_a_graph_of_every_m_is_split_where_the_answers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo guards on which side of 1024 m is, in whichever order the sides come."""
    for first, second in ((200, 3000), (3000, 200)):
        torch._dynamo.reset()
        pretend(monkeypatch, bf16_wins_from(1025))
        model = Wide()
        compiled = quant_compile.compile(model, "W8A8", dynamic=True, **GUARD)
        for m in (first, second, first + 7):
            x = torch.randn(m, 64)
            exact = torch.allclose(compiled(x), model.forward(x), rtol=1e-6, atol=1e-6)
            assert exact == (m > 1024), m
        (line,) = quant_compile.report(model).lines
        assert line.scheme == "W8A8" and "W8A8 1.0 µs at m > 1024" in line.guarded and "<=" not in line.guarded


def test_equal_answers_split_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_graphs: list[Any] = []
    real = backend.GraphRunner

    def counted(*args: Any) -> Any:
        compiled_graphs.append(args[0])
        return real(*args)

    monkeypatch.setattr(backend, "GraphRunner", counted)
    pretend(monkeypatch, bf16_wins_from(0))
    model = quant_compile.compile(Wide(), "W8A8", dynamic=True, **GUARD)
    for m in (200, 3000):
        model(torch.randn(m, 64))
    assert len(compiled_graphs) == 1


def test_layers_that_share_a_graph_decide_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later layer has another scheme, so that another variant of the same graph asks the guard again."""

    def time_of(job: Job, m: int) -> float:
        if isinstance(job, Product):
            return 9.0 if job.problem.scheme.spec == "W8A16" else 1.0
        return 3.0 if isinstance(job, Plain) else 0.0

    pretend(monkeypatch, time_of)
    model = nn.Sequential(Wide(), nn.Linear(48, 64), Wide())
    for layer in (model[0], model[2]):
        layer.compile(
            backend="sglquant",
            options={"policy": {"default": "W8A8", "rules": [{"match": "2.one", "scheme": "W8A16"}]}, **GUARD},
        )
    quant_compile.model.names.register(model)
    x = torch.randn(4, 64)
    assert not torch.equal(model[0](x), model[0].forward(x)) and torch.allclose(model[2](x), model[2].forward(x))
    lines = {line.names[0]: line for line in quant_compile.report(model).lines}
    assert lines["0.one.weight"].scheme == "W8A8" and not lines["0.one.weight"].guarded
    assert lines["2.one.weight"].scheme is None and "W8A16 9.0 µs at m = 4" in lines["2.one.weight"].guarded


@DOORS
@pytest.mark.parametrize("by", ["option", "policy"])
def test_released_originals_leave_nothing_to_keep(
    monkeypatch: pytest.MonkeyPatch, door: Callable[..., nn.Module], by: str
) -> None:
    pretend(monkeypatch, bf16_wins_from(0))
    model, x = Wide(), torch.randn(5, 64)
    expected = reference_of(model, x)
    options = {"release_weights": True} if by == "option" else {}
    compiled = door(model, {"default": "W8A8", "release_weights": by == "policy"}, **GUARD, **options)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-4)
    report = quant_compile.report(model)
    assert report.lines[0].released and not report.guarded
    assert any("never_slower is not applied: originals are released" in note for note in report.notes)


def reference_of(model: Wide, x: Tensor) -> Tensor:
    scheme, family = parse("W8A8"), family_of(parse("W8A8"))
    weight = family.quantize_weight(model.one.weight, scheme)
    return family.linear(family.quantize_input(x, scheme, None), weight, None, scheme, x.dtype)


def test_release_spares_what_the_guard_reads_and_takes_what_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, bf16_wins_from(8))
    model = quant_compile.compile(Wide(), "W8A8", **GUARD)
    one, many = torch.randn(1, 64), torch.randn(16, 64)
    model(one), model(many)
    assert quant_compile.release(model) == 0
    torch.testing.assert_close(model(many), F.linear(many, model.one.weight))

    torch._dynamo.reset()
    model = quant_compile.compile(Wide(), "W8A8", **GUARD)
    expected, quantized = reference_of(model, many), model(one)
    assert quant_compile.release(model) > 0
    torch.testing.assert_close(model(one), quantized)
    torch.testing.assert_close(model(many), expected, rtol=0, atol=1e-4)
    (line,) = quant_compile.report(model).lines
    assert line.released and not line.guarded and "guard: not applied, its original" in line.reason


def test_without_the_guard_what_it_kept_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, bf16_wins_from(0))
    model, x = Wide(), torch.randn(5, 64)
    quant_compile.compile(model, {"default": "W8A8", "guard": "never_slower"})
    model(x)
    assert quant_compile.report(model).guarded
    quant_compile.compile(model, {"default": "W8A8", "guard": "never_slower"}, guard=False, release_weights=True)
    torch.testing.assert_close(model(x), model(x))
    (line,) = quant_compile.report(model).lines
    assert line.scheme == "W8A8" and line.released and not line.guarded
    quant_compile.restore(model, {"one.weight": torch.randn(48, 64)})
    quant_compile.compile(model, "W8A8", **GUARD)
    model(x)
    (line,) = quant_compile.report(model).lines
    assert line.guarded and not line.kernels and line.scheme is None


@pytest.mark.parametrize(
    ("tune", "answer", "words"),
    [
        ("off", None, "tune is off, so nothing is measured"),
        ("quick", Reject("x could not be measured at m = 5"), "x could not be measured at m = 5"),
    ],
)
def test_no_times_no_guard_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch, tune: str, answer: Reject | None, words: str
) -> None:
    if answer is not None:
        pretend(monkeypatch, lambda job, m: answer)
    model = quant_compile.compile(Wide(), "W8A8", tune=tune, **GUARD)
    model(torch.randn(5, 64))
    report = quant_compile.report(model)
    assert report.lines[0].scheme == "W8A8" and words in report.lines[0].reason
    assert any(words in note for note in report.notes)


@pytest.mark.parametrize("value", ["always", True, 0, 1, ["never_slower"]])
def test_any_other_value_is_an_error_that_names_the_right_one(value: Any) -> None:
    with pytest.raises(OptionError, match="guard must be never_slower"):
        quant_compile.compile(Wide(), "W8A8", guard=value)
    with pytest.raises(PolicyError, match="guard must be never_slower"):
        quant_compile.Policy.load({"default": "W8A8", "guard": value})


def test_the_key_of_a_policy_is_part_of_what_it_decides(tmp_path: Any) -> None:
    plain = quant_compile.Policy.load({"default": "W8A8"})
    policy = quant_compile.Policy.load({"default": "W8A8", "guard": "never_slower"})
    assert policy.content_hash != plain.content_hash
    assert quant_compile.Policy.load(policy.save(tmp_path / "guarded.yaml")) == policy
    (tmp_path / "off.yaml").write_text("default: W8A8\nguard: off\n")
    assert quant_compile.Policy.load(tmp_path / "off.yaml") == plain


def tiny() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1)).eval()


def test_generate_with_a_prompt_in_16_bits_and_quantized_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token is that of the plain model, and steps run the quantized kernels."""
    pretend(monkeypatch, bf16_wins_from(8))
    model = tiny()
    prompt = torch.randint(3, 60, (1, 20))
    plain = model.generate(prompt, max_new_tokens=1, do_sample=False)
    quant_compile.compile(model, {"default": "W8A8", "strict": True}, **GUARD)
    made = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert made.shape == (1, 26) and torch.equal(made[:, :21], plain)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), made)
    report = quant_compile.report(model)
    linears = [line for line in report.lines if line.named]
    assert len(report.guarded) == len(linears) == 14 and all(line.scheme == "W8A8" for line in linears)
    assert report.coverage == 1.0 and "guard: f32" in str(report)


@DOORS
def test_the_ledger_says_that_experts_are_not_covered(
    monkeypatch: pytest.MonkeyPatch, door: Callable[..., nn.Module]
) -> None:
    """Experts are quantized whatever a linear would do, and their lines say why the guard left them."""
    pretend(monkeypatch, bf16_wins_from(0))
    model = TinyMoe()
    door(model, {"default": "W8A8", "strict": True}, **GUARD)(torch.randn(1, 5, 32))
    report = quant_compile.report(model)
    experts = [line for line in report.lines if ".experts." in f".{line.names[0]}"]
    assert len(experts) == 2 and not report.guarded
    for line in experts:
        assert line.scheme == "W8A8" and line.reason.endswith("guard: experts are not covered")
