"""Weights that are tensor subclasses: those with operations of their own stay, with a reason; plain Parameters by another name do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

import quant_compile
from quant_compile import PolicyError
from tests.moe_support import one_thread
from tests.runtime_support import bf16, inner_error, reference_of, store_planes

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


class Scaled(Tensor):
    """An int8 weight and its scales in a wrapper, as quantization libraries have them."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return "Scaled()"

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Tensor:
        return Scaled(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Scaled(args[0].codes, args[0].scale)

        def plain(value: Any) -> Any:
            return value.codes.to(value.scale.dtype) * value.scale if isinstance(value, Scaled) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class Doubled(nn.Parameter):
    """A Parameter that a linear multiplies by twice."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear:
                return 2 * func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


class Marked(nn.Parameter):
    """A Parameter with a name of its own and nothing else, as loaders make them."""


class MarkedTensor(Tensor):
    """The same of a tensor."""


def two(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)


def scaled(weight: Tensor) -> nn.Parameter:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return nn.Parameter(Scaled((weight / scale).round().to(torch.int8), scale), requires_grad=False)


OWN: dict[str, Callable[[Tensor], nn.Parameter]] = {
    "TwoTensor": two,
    "Scaled": scaled,
    "Doubled": lambda weight: Doubled(weight, requires_grad=False),
}
PLAIN: dict[str, Callable[[Tensor], nn.Parameter]] = {
    "Marked": lambda weight: Marked(weight, requires_grad=False),
    "MarkedTensor": lambda weight: nn.Parameter(weight.as_subclass(MarkedTensor), requires_grad=False),
}


def model_with(make: Callable[[Tensor], nn.Parameter]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)).bfloat16().requires_grad_(False)
    model[0].weight = make(model[0].weight.data)
    return model


def by_package(model: nn.Module, policy: Any) -> Callable[..., Any]:
    return quant_compile.compile(model, policy)


def by_torch(model: nn.Module, policy: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="sglquant", options={"policy": policy})


def plain(value: Any) -> Tensor:
    return value.a if isinstance(value, TwoTensor) else value


@pytest.mark.parametrize("door", [by_package, by_torch])
@pytest.mark.parametrize("kind", OWN)
def test_a_weight_with_operations_of_its_own_stays(kind: str, door: Any) -> None:
    model, x = model_with(OWN[kind]), bf16(3, 32)
    with torch.no_grad():
        wanted = plain(model(x))
        run = door(model, "W8A8")
        for _ in range(2):
            # The second linear is W8A8 where its input is a plain tensor.
            torch.testing.assert_close(plain(run(x)), wanted, rtol=5e-2, atol=2e-2)
    report = quant_compile.report(model)
    line = next(line for line in report.lines if line.names == ("0.weight",))
    assert line.scheme is None and (kind in line.reason or kind == "Doubled")
    assert "0.weight" in dict(report.skips) and report.coverage < 1
    second = next(line for line in report.lines if line.names == ("2.weight",))
    assert (second.scheme is None) == (kind == "TwoTensor")
    assert quant_compile.release(model) == (0 if kind == "TwoTensor" else 32 * 16 * 2)
    assert str(report)


@pytest.mark.parametrize("kind", ["TwoTensor", "Scaled"])
def test_a_strict_policy_names_it(kind: str) -> None:
    model = model_with(OWN[kind])
    run = by_torch(model, {"default": "W8A8", "strict": True})
    with torch.no_grad(), pytest.raises(Exception, match=rf"0\.weight.*{kind}") as caught:
        run(bf16(3, 32))
    assert isinstance(inner_error(caught.value), PolicyError)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_parameter_by_another_name_is_quantized(kind: str) -> None:
    model, x = model_with(PLAIN[kind]), bf16(3, 32)
    usual = model_with(lambda weight: nn.Parameter(weight, requires_grad=False))
    run = by_package(model, {"default": "W8A8", "strict": True})
    with torch.no_grad():
        torch.testing.assert_close(run(x), reference_of(usual, "W8A8")(x), rtol=2e-2, atol=1e-2)
    assert quant_compile.report(model).coverage == 1.0
    assert {type(plane) for plane in store_planes(model)} == {Tensor}
