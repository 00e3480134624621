"""Dynamo, at work around a compiled call or in it, is offered each frame that is run there; those of the call itself are ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import ConvertFrameAssert

import quant_compile
from quant_compile import Policy
from quant_compile.generation.attach import Call, unseen
from quant_compile.runtime.outside import Outside
from tests.runtime_support import plain_inductor

__all__ = ["plain_inductor"]
SIZE = 128
OURS = str(Path(quant_compile.__file__).parent)


class Traceable(nn.Module):
    """A linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, tokens, 128] -> the same."""
        return self.linear(x)


class Untraceable(nn.Module):
    """Its call is one that Dynamo can neither trace nor split; what it calls can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Traceable(), nn.Linear(SIZE, SIZE)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """[rows, tokens, 128] -> the same."""
        with contextlib.suppress(ValueError):
            torch._dynamo.graph_break()
        return self.head(self.inner(inputs_embeds))


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Functions of the product that Dynamo was offered."""
    torch._dynamo.reset()
    found: list[str] = []
    original = ConvertFrameAssert.__call__

    def noting(self: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        code: CodeType = frame.f_code
        if code.co_filename.startswith(OURS):
            found.append(code.co_qualname)
        return original(self, frame, *args, **kwargs)

    monkeypatch.setattr(ConvertFrameAssert, "__call__", noting)
    return found


def called(function: Callable[[], Any]) -> Any:
    """Run a function as it is."""
    return function()


def given_up(function: Callable[[], Any]) -> Any:
    """Run a function within a frame that Dynamo has given up on."""

    def frame() -> Any:
        with contextlib.suppress(ValueError):
            torch._dynamo.graph_break()
        return function()

    return torch.compile(frame, backend="eager")()


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("within", [called, given_up])
def test_dynamo_sees_nothing_of_a_call(within: Callable[..., Any], dynamic: bool, offered: list[str]) -> None:
    """Lengths of inputs are marked, what ran outside of graphs is written down, and graphs are run."""
    torch.manual_seed(0)
    module, x = Untraceable().requires_grad_(False), torch.randn(2, 7, SIZE)
    wanted = module(inputs_embeds=x)
    run = torch.compile(module._call_impl, backend="sglquant", options={"policy": "w8a16"})
    call = Call(module, run, dynamic, Outside(module, Policy.load("w8a16")))
    for _ in range(2):
        found = within(partial(unseen, call.compiled, (), {"inputs_embeds": x}))
        assert 0 < (found - wanted).norm() < 0.02 * wanted.norm()
    assert offered == []
    lines = {line.names[0]: line for line in quant_compile.report(module).lines}
    assert lines["inner.linear.weight"].scheme is not None
    assert "ran outside" in str(lines["head.weight"])
