"""What must not pass unnoticed: experts that one graph of several does not quantize, modules that torch does not compile, lost NaN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import quant_compile
from quant_compile import NoKernelError, PolicyError
from quant_compile.ir.errors import PolicyWarning
from tests.moe_support import FAMILIES, TinyMoe, moe_reference_of, one_thread, tokens, usual_linears
from tests.runtime_support import CompileCounter, Mlp, bf16, plain_inductor, reference_of

__all__ = ["one_thread", "plain_inductor"]
pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = {"kernels": "reference"}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_of_every_layer_are_quantized_at_every_length(name: str, plain_inductor: CompileCounter) -> None:
    """From the second length on sizes are symbols, which Dynamo computes in the first layer's block for all of them."""
    model = FAMILIES[name].make(layers=3)
    wanted = moe_reference_of(model, "W4A8", linears=usual_linears("W4A8"))
    quant_compile.compile(model, {"default": "W4A8", "strict": True}, release_weights=True, **REFERENCE)
    with torch.inference_mode():
        for batch, length in ((1, 5), (1, 9), (2, 7), (1, 13)):
            ids = tokens(batch, length)
            # Codes of inputs flip where sums in another order differ in their last bits; 16-bit experts are 1e-2 off.
            assert error(model(ids).logits, wanted(ids).logits) <= 1e-3
    report = quant_compile.report(model)
    assert report.coverage == 1.0 and not report.skips
    assert all(line.released for line in report.lines if line.scheme)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_a_weight_that_one_graph_misses_is_not_covered(plain_inductor: CompileCounter) -> None:
    """The ledger, its coverage and a strict policy, for experts that a second graph does not understand."""
    for strict in (False, True):
        torch._dynamo.reset()
        model = TinyMoe()
        quant_compile.compile(model, {"default": "W4A16", "strict": strict}, **REFERENCE)
        x = torch.randn(1, 5, 32)
        with torch.inference_mode():
            model(x)
            assert quant_compile.report(model).coverage == 1.0
            model.experts.activation = lambda hidden: torch.tanh(hidden[..., :24]) * hidden[..., 24:]
            if strict:
                with pytest.raises(
                    Exception, match="the policy is strict, and weights cannot have their schemes"
                ) as caught:
                    model(x)
                assert "gate_up_proj" in str(caught.value) and "keep" in str(caught.value)
                continue
            model(x)
        report = quant_compile.report(model)
        assert report.coverage < 1.0 and any("unquantized in some graph" in reason for _, reason in report.skips)
        with pytest.raises(quant_compile.CoverageError, match="gate_up_proj"):
            report.require(1.0)


def test_a_strict_policy_refuses_a_block_of_two_schemes(plain_inductor: CompileCounter) -> None:
    rules = [{"match": "*gate_up_proj", "scheme": "W4A16"}, {"match": "*down_proj", "scheme": "W8A16"}]
    with torch.inference_mode():
        model = TinyMoe()
        with pytest.warns(PolicyWarning, match="an expert block has one"):
            quant_compile.compile(model, {"default": "keep", "rules": rules}, **REFERENCE)
        model(torch.randn(1, 5, 32))
        torch._dynamo.reset()
        policy = {"default": "keep", "rules": rules, "strict": True}
        with pytest.raises(PolicyError, match="an expert block has one"):
            quant_compile.compile(TinyMoe(), policy, **REFERENCE)
        strict = torch.compile(TinyMoe(), backend="sglquant", options={"policy": policy, **REFERENCE})
        with pytest.raises(Exception, match="an expert block has one") as caught:
            strict(torch.randn(1, 5, 32))
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), PolicyError)


@pytest.mark.parametrize("kind", ["Sequential", "Linear", "a subclass"])
def test_modules_of_torch_are_compiled_too(kind: str, plain_inductor: CompileCounter) -> None:
    """Dynamo does not enter a frame of torch.nn that nothing else is around, so ``Module.compile`` would do nothing."""

    class Stack(nn.Sequential):
        pass

    linear = nn.Linear(64, 32)
    made = {"Sequential": nn.Sequential(linear, nn.ReLU()), "Linear": linear, "a subclass": Stack(linear, nn.ReLU())}
    model = made[kind].requires_grad_(False)
    wanted, x = reference_of(nn.Sequential(model), "W8A8"), torch.randn(4, 64)
    quant_compile.compile(model, {"default": "W8A8", "strict": True}, **REFERENCE)
    with torch.inference_mode():
        y = model(x)
        assert torch.equal(y, wanted(x)) and not torch.equal(y, copy.deepcopy(model).forward(x))
    assert quant_compile.report(model).coverage == 1.0


@pytest.mark.parametrize("spec", ["MXFP4", "W4A8", "W4AFP8"])
def test_nan_of_a_token_survives_inductor(spec: str) -> None:
    """Inductor's vectorized maximum gives a NaN a sign."""
    model = nn.Linear(64, 32).requires_grad_(False)
    quant_compile.compile(model, {"default": spec})
    x = torch.randn(4, 64)
    x[1, 7] = float("nan")
    with torch.inference_mode():
        assert model(x).isnan().sum(-1).tolist() == [0, 32, 0, 0]


def test_a_pin_is_no_reason_to_fall_back(plain_inductor: CompileCounter) -> None:
    """``fallback`` is for what a device cannot multiply; a pin that cannot serve is an error of its own."""
    model = Mlp().bfloat16()
    policy: Any = {"default": "NVFP4", "fallback": "weight_only"}
    quant_compile.compile(model, policy, kernels={"NVFP4": "triton_fp4"})
    with torch.inference_mode(), pytest.raises(Exception, match="triton_fp4") as caught:
        model(bf16(3, 32))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), NoKernelError)
