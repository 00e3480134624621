"""Inductor's code launches decode attention itself, as it does the kernels of linears (``test_expand``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.graph import GraphLowering
from torch._subclasses.functional_tensor import FunctionalTensorMode

pytest.importorskip("triton")

from quant_compile.lowering.kernels.attention import triton_decode
from quant_compile.lowering.trace import tracing
from tests.lowering import test_expand
from tests.lowering.test_expand import Stop, cubins
from tests.passes import test_fusion

on_sm90, sm90 = test_expand.on_sm90, test_fusion.sm90
LIBRARY = torch.library.Library("sglq_test_attention", "DEF")
LIBRARY.define("plain(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor sinks) -> Tensor")


def record(name: str, function: Callable[..., Any]) -> None:
    """An op that becomes what ``function`` launches where Inductor's graph is traced, as kernel ops of the product do."""

    def rule(mode: FunctionalTensorMode, op: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        with mode, tracing(None):
            return function(*args)

    LIBRARY.impl(name, lambda *args: torch.empty_like(args[0]), "Meta")
    torch.library.register_torch_dispatch(f"sglq_test_attention::{name}", FunctionalTensorMode, rule, lib=LIBRARY)


record("plain", lambda q, k, v, mask, sinks: triton_decode.decode(q, k, v, mask, 0.1, softcap=5.0, sinks=sinks))


def code_of(step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *inputs: Tensor) -> str:
    """Inductor's code for a function of ops of ours."""
    codes: list[str] = []

    def save(code: str) -> None:
        codes.append(code)
        raise Stop

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, list(inputs), config_patches={"cpu_backend": "triton", "force_disable_caches": True})

    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(save))
    with torch.no_grad(), pytest.raises(Exception, match=r"Stop|code is there"):
        torch.compile(step, backend=backend)(*inputs)
    return codes[-1]


def call_of(code: str) -> str:
    """What a call runs, without comments."""
    lines = code[code.index("def call") : code.index("runner =")].splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def launched(code: str) -> list[str]:
    """Our kernels in the order of their launches; no op of ours is called, and nothing copied."""
    call = call_of(code)
    assert "sglq" not in call and ".copy_(" not in call and "aten.copy" not in call
    return re.findall(r"(decode|combine)_kernel\w*\.run\(", call)


def test_a_cache_in_16_bits(on_sm90: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a softcap, sinks and an additive mask; a batch that needs no splits."""

    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        return torch.ops.sglq_test_attention.plain(q + 1, k, v, mask, sinks)

    q, k = torch.randn(40, 8, 3, 64).bfloat16(), torch.randn(40, 8, 64, 64).bfloat16()
    code = code_of(step, monkeypatch, q, k, k + 1, torch.zeros(40, 1, 3, 64).bfloat16(), torch.randn(8).bfloat16())
    assert launched(code) == ["decode"]
    assert len(cubins(code, tmp_path)) >= 1
