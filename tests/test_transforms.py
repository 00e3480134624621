"""Gradients and function transforms inside of a forward: their linears stay as they are, with a reason, and the values are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile import GradModeError, PolicyError
from tests.moe_support import TinyMoe, one_thread
from tests.runtime_support import CompileCounter, inner_error, plain_inductor

__all__ = ["one_thread", "plain_inductor"]
pytestmark = pytest.mark.usefixtures("one_thread")
Energy = Callable[[Tensor], Tensor]


def autograd(energy: Energy, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(energy(x).sum(), x)[0]


def backward(energy: Energy, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        energy(x).sum().backward()
        assert x.grad is not None
        return x.grad


def vjp(energy: Energy, x: Tensor) -> Tensor:
    y, pull = torch.func.vjp(energy, x)
    return pull(torch.ones_like(y))[0]


INSIDE: dict[str, Callable[[Energy, Tensor], Tensor]] = {
    "grad": lambda energy, x: torch.func.grad(lambda q: energy(q).sum())(x),
    "vjp": vjp,
    "jvp": lambda energy, x: torch.func.jvp(energy, (x,), (torch.ones_like(x),))[1].expand(-1, 8),
    "jacrev": lambda energy, x: torch.func.jacrev(lambda q: energy(q).sum())(x),
    "jacfwd": lambda energy, x: torch.func.jacfwd(lambda q: energy(q).sum())(x),
    "vmap": lambda energy, x: torch.func.vmap(energy)(x).expand(-1, 8),
    "vmap of grad": lambda energy, x: torch.func.vmap(torch.func.grad(lambda q: energy(q).sum()))(x),
    "autograd": autograd,
    "backward": backward,
}


class Force(nn.Module):
    """Features, a gradient of an energy of them, and a linear of that."""

    def __init__(self, inside: str) -> None:
        super().__init__()
        self.features, self.hidden, self.energy_of = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 1)
        self.out = nn.Linear(8, 4)
        self.inside = INSIDE[inside]

    def energy(self, x: Tensor) -> Tensor:
        return self.energy_of(torch.tanh(self.hidden(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inside(self.energy, self.features(x)))


def rounded(model: nn.Module, *names: str) -> nn.Module:
    """A copy with W8A16's values in some linears."""
    made = copy.deepcopy(model)
    for name in names:
        weight = made.get_submodule(name).weight
        scale = weight.detach().abs().amax(-1, keepdim=True) / 127
        weight.data = (weight.detach() / scale).round().clamp(-127, 127) * scale
    return made


def by_package(model: nn.Module, policy: Any) -> Callable[..., Any]:
    return quant_compile.compile(model, policy)


def by_torch(model: nn.Module, policy: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="sglquant", options={"policy": policy})


# From torch 2.15 a break in a nested call with something on the stack leaves the whole function to Python.
LEFT = {"autograd"} if torch.__version__ >= "2.15" else set[str]()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("inside", [inside for inside in INSIDE if inside not in LEFT])
def test_linears_inside_stay_and_those_outside_are_quantized(inside: str, frozen: bool, request: Any) -> None:
    if not frozen:
        request.getfixturevalue("plain_inductor")  # a minute for both with Inductor
    torch.manual_seed(0)
    model, x = Force(inside).requires_grad_(not frozen), torch.randn(5, 8)
    door = by_package if frozen else by_torch
    with torch.no_grad():
        wanted = rounded(model, "features", "out")(x)
        run = door(model, "W8A16")
        for _ in range(2):
            torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-5)  # f32 sums in another order
    report = quant_compile.report(model)
    assert {line.names[0]: line.scheme for line in report.lines if line.names[0].endswith("weight")} == {
        "features.weight": "W8A16", "out.weight": "W8A16", "hidden.weight": None, "energy_of.weight": None,
    }  # fmt: skip
    assert {name for name, _ in report.skips} == {"hidden.weight", "energy_of.weight"}
    assert all("derivative" in reason or "no rule" in reason for _, reason in report.skips)
    assert 0 < report.coverage < 1


@pytest.mark.parametrize("inside", sorted(LEFT))
def test_functions_that_dynamo_leaves_are_named_and_a_gradient_inside_is_right(inside: str) -> None:
    torch.manual_seed(0)
    model, x = Force(inside).requires_grad_(False), torch.randn(5, 8)
    with torch.no_grad():
        wanted = copy.deepcopy(model)(x)
        run = by_package(model, "W8A16")
        for _ in range(2):
            torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-5)
    reasons = dict(quant_compile.report(model).skips)
    assert all("would not compile Force.forward" in reasons[f"{name}.weight"] for name in ("features", "out"))
    assert all("derivative" in reasons[f"{name}.weight"] for name in ("hidden", "energy_of"))


@pytest.mark.parametrize("inside", sorted(LEFT))
def test_a_gradient_inside_of_a_function_that_dynamo_leaves_needs_frozen_weights(inside: str) -> None:
    model, x = Force(inside), torch.randn(5, 8)
    with torch.no_grad(), pytest.raises(Exception, match=r"model\.requires_grad_\(False\)") as caught:
        by_torch(model, "W8A16")(x)
    assert isinstance(inner_error(caught.value), GradModeError)


@pytest.mark.parametrize("door", [by_package, by_torch])
@pytest.mark.parametrize("inside", ["grad", "jvp", "vmap", "autograd"])
def test_a_strict_policy_names_the_linears_inside(inside: str, door: Any, plain_inductor: CompileCounter) -> None:
    model, x = Force(inside).requires_grad_(False), torch.randn(5, 8)
    run = door(model, {"default": "W8A16", "strict": True})
    with torch.no_grad(), pytest.raises(Exception, match=r"hidden\.weight") as caught:
        run(x)
    assert isinstance(inner_error(caught.value), PolicyError)
    assert "energy_of.weight" in str(caught.value) and "features.weight" not in str(caught.value)


def test_gradients_enabled_over_nothing_that_needs_one(plain_inductor: CompileCounter) -> None:
    class Enabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.linear(x)

    model, x = Enabled().requires_grad_(False), torch.randn(5, 8)
    with torch.no_grad():
        wanted = rounded(model, "linear")(x)
        torch.testing.assert_close(by_package(model, {"default": "W8A16", "strict": True})(x), wanted)
    assert quant_compile.report(model).coverage == 1.0


def test_an_expert_block_inside_stays(plain_inductor: CompileCounter) -> None:
    class Gradient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = TinyMoe()

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda q: self.block(q).float().sum())(x)

    torch.manual_seed(0)
    model = Gradient().requires_grad_(False)
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        wanted = copy.deepcopy(model)(x)
        assert wanted.abs().sum() > 0
        run = by_package(model, "W4A16")
        torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-5)
    report = quant_compile.report(model)
    assert report.coverage == 0.0 and any("gate_up_proj" in name for name, _ in report.skips)


def test_an_input_that_needs_a_gradient_is_told_apart_from_weights(plain_inductor: CompileCounter) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False), torch.randn(5, 8, requires_grad=True)
    run = by_torch(model, "W8A16")
    with pytest.raises(Exception, match=r"the input of shape \(5, 8\)\.requires_grad_") as caught:
        run(x)
    assert isinstance(inner_error(caught.value), GradModeError)
