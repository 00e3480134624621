"""Simulated quantization: against the textbook's fake quantization, in every form of a product, and the model stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_compile import simulate
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import PRESETS, parse
from quant_compile.measure.weights import all_weights, chosen_by
from quant_compile.policy import Policy
from quant_compile.simulate import Chosen, Simulation, Values, quantized_input, quantized_values
from tests import textbook
from tests.runtime_support import reference_of
from tests.test_calibrate_experts import FORMS, tiny_moe, tokens

WITH_INPUTS = sorted(name for name, scheme in PRESETS.items() if scheme.input_activations is not None)
# f32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", WITH_INPUTS)
@pytest.mark.parametrize("k", [256, 160])
def test_inputs_are_what_the_families_product_reads(name: str, k: int) -> None:
    """A product with quantized inputs is that of their values, under any weight."""
    scheme, x, w = PRESETS[name], torch.randn(2, 5, k).bfloat16(), torch.randn(24, k).bfloat16()
    family = family_of(scheme)
    if family.takes_size(scheme, 24, k) is not None or (k % 128 and "128" in scheme.spec + scheme.weights.spec):
        pytest.skip("the scheme does not take this size")
    scale = x.abs().amax().float().view(1) / family.largest_input(scheme) if scheme.static else None
    values = quantized_input(x, scheme, scale)
    planes = family.quantize_input(x, scheme, scale)
    wanted = family.linear(planes, family.quantize_weight(w, scheme), None, scheme, torch.float32)
    torch.testing.assert_close(values @ quantized_values(w, scheme).T, wanted, **CLOSE)
    assert 0 < float((values - x.float()).norm() / x.float().norm()) < 0.2


def test_a_long_input_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scheme = torch.randn(3, 512).bfloat16(), parse("NVFP4")
    whole = quantized_input(x, scheme)
    monkeypatch.setattr(simulate, "_EYE_ROWS", 128)
    torch.testing.assert_close(quantized_input(x, scheme), whole, rtol=0, atol=0)


@pytest.mark.parametrize("spec", ["W4A16", "W8A8", "NVFP4"])
def test_a_model_is_the_reference_of_its_scheme(spec: str) -> None:
    """Linears of all families, and their biases, as an eager quantized copy computes them."""
    model = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 64, bias=False))
    x = torch.randn(4, 7, 128)
    wanted = reference_of(model, lambda name: spec)(x)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with Simulation(chosen_by(Policy.load(spec), model)):
        found = model(x)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(model(x), nn.Sequential.forward(model, x), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm", "eager"])
def test_experts_in_every_form(form: str) -> None:
    """As the textbook's model, which computes blocks by itself; its lm_head is kept as the policy keeps it."""
    model = tiny_moe(torch.float32)
    model.set_experts_implementation(form)
    wanted = textbook.fake_quant_model(tiny_moe(torch.float32), "W8A16", amax={})(tokens()[0], use_cache=False).logits
    plain = model(tokens()[0], use_cache=False).logits
    with Simulation(chosen_by(Policy.load("W8A16"), model)):
        found = model(tokens()[0], use_cache=False).logits
    assert float((plain - wanted).norm() / wanted.norm()) > 1e-3
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_products_with_stacked_weights(form: str) -> None:
    """Whatever is made of a weight on the way to a product is made of its quantized values."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return FORMS[form](x, self.experts, torch.tensor([0, 3, 1, 1, 2, 0]))

    model, x = Block(), torch.randn(6, 8)
    quantized = Block()
    quantized.experts.copy_(quantized_values(model.experts.detach(), parse("W8A16")))
    with Simulation(chosen_by(Policy.load("W8A16"), model)):
        found = model(x)
    torch.testing.assert_close(found, quantized(x), **CLOSE)
    assert not torch.allclose(found, model(x), **CLOSE)


@pytest.mark.parametrize("n", [128, 64])
def test_a_weight_that_is_stored_by_columns(n: int) -> None:
    """The product says which dimension is summed, of a square matrix too."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(128, n))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model, x = Columns(), torch.randn(3, 128)
    (weight,) = all_weights(model)
    with Simulation([Chosen(weight, parse("W4A16"))]):
        found = model(x)
    torch.testing.assert_close(
        found, F.linear(x, quantized_values(model.weight.T.contiguous(), parse("W4A16"))), **CLOSE
    )


def test_parts_of_one_weight() -> None:
    """A packed projection is read by rows: each part has its own address."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(128, 96, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.qkv.weight[:32]) + F.linear(x, self.qkv.weight[32:64])

    model, x = Packed(), torch.randn(3, 128)
    values = quantized_values(model.qkv.weight, parse("W4A16"))
    with Simulation(chosen_by(Policy.load("W4A16"), model)):
        torch.testing.assert_close(model(x), x @ values[:32].T + x @ values[32:64].T, **CLOSE)


def test_few_values_are_kept() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    values = Values(kept_bytes=0)
    chosen = chosen_by(Policy.load("W8A16"), model)
    made = [values.of(each, False) for each in chosen]
    assert len(values._kept) == simulate.FEW
    assert values.of(chosen[-1], False) is made[-1]
    assert values.of(chosen[0], False) is not made[0]


class Siblings(nn.Module):
    """Three weights that read one input, which ``between`` may write over after the first."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 32, bias=False) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """[t, 64] -> [t, 32]."""
        x = x * 1.0
        q = self.q(x)
        if self.between == "written":
            x.mul_(-3.0)
        elif self.between == "another":
            x = x + 1.0
        return q + self.k(x) + self.v(x)


@pytest.mark.parametrize(("between", "inputs"), [("", 1), ("written", 2), ("another", 2)])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_weights_that_read_one_input_have_it_quantized_once(
    context: Any, between: str, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, policy, x = Siblings(between).bfloat16(), Policy.load("NVFP4"), torch.randn(5, 64).bfloat16()
    made: list[Tensor] = []
    real = simulate.quantized_input
    monkeypatch.setattr(simulate, "quantized_input", lambda x, *more: made.append(x.clone()) or real(x, *more))
    with context():
        with Simulation(chosen_by(policy, model)):
            found = model(x)
        assert len(made) == inputs
        monkeypatch.setattr(simulate._MadeInput, "serves", lambda *given: False)
        with Simulation(chosen_by(policy, model)):
            assert torch.equal(model(x), found)
    assert len(made) == inputs + 3


def test_an_input_of_one_autocast_is_not_that_of_another() -> None:
    torch.manual_seed(0)
    model, x = Siblings("").bfloat16(), torch.randn(5, 64).bfloat16()
    chosen = {each.name: each for each in chosen_by(Policy.load("NVFP4"), model)}

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            first = model.q(x)
        return first, model.k(x)

    with Simulation(chosen.values()):
        both = run()
    for index, name in enumerate(("q", "k")):
        with Simulation([chosen[name]]):
            assert torch.equal(run()[index], both[index])


def test_gradients_pass_twice() -> None:
    """Nothing that is kept holds a graph."""
    model, x = Siblings("").float(), torch.randn(5, 64, requires_grad=True)
    with torch.enable_grad(), Simulation(chosen_by(Policy.load("W8A8"), model)):
        for weight in (model.q, model.k):
            weight(x).sum().backward()
