"""fuse_input: norms as models write them are found, everything else keeps its graph, and the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import quant_compile
from quant_compile.ir.graph import lines
from quant_compile.lowering import ops
from quant_compile.lowering.target import Target
from quant_compile.passes.plan import PassReport
from tests.ir.tracing import Traced, run, trace
from tests.passes.test_lower import lowered

BF16 = torch.bfloat16
SM100 = Target.fake("sm100")
SCALES = {"first.weight": 0.01, "second.weight": 0.01}
K = 72  # no multiple of 32


class FunctionalNorm(nn.Module):
    """The function, without an eps."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight)


class Spelled(nn.Module):
    """Sides of products and sums swapped, keywords, the weight multiplied in f32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        root = torch.rsqrt(1e-6 + (wide * wide).mean(dim=-1, keepdim=True))
        return (self.weight * (root * wide)).to(x.dtype)


NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: LlamaRMSNorm(K), "after_cast"),
    "qwen3": (lambda: Qwen3RMSNorm(K), "after_cast"),
    "gemma2": (lambda: Gemma2RMSNorm(K), "one_plus"),
    "gemma3": (lambda: Gemma3RMSNorm(K), "one_plus"),
    "torch": (lambda: nn.RMSNorm(K, eps=1e-5), "before_cast"),
    "torch_default_eps": (lambda: nn.RMSNorm(K), "before_cast"),
    "functional": (lambda: FunctionalNorm(K), "before_cast"),
    "spelled": (lambda: Spelled(K), "before_cast"),
}
Use = Callable[["Block", Tensor, Tensor], Any]


class Block(nn.Module):
    """A norm, two linears, and how they are used."""

    def __init__(self, norm: nn.Module, use: Use, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.use = norm, use
        self.first, self.second = nn.Linear(K, 32, bias=False), nn.Linear(K, 16)
        self.to(dtype).requires_grad_(False)
        norm.weight.normal_()

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        return self.use(self, x, residual)


def with_residual(m: Block, x: Tensor, residual: Tensor) -> Any:
    h = residual + x
    y = m.norm(h)
    return m.first(y), m.second(y), h


def alone(m: Block, x: Tensor, residual: Tensor) -> Any:
    y = m.norm(x)
    return m.first(y), m.second(y), x * 2


def inputs(dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, K).to(dtype), torch.randn(2, 3, K).to(dtype)


def both(
    block: Block, spec: Any, *arguments: Tensor, dynamic: bool = False
) -> tuple[fx.GraphModule, PassReport, Traced]:
    """The graph for a GPU, its report, and what was traced; its numbers are those of the graph without our kernels."""
    results = []
    for target in (None, SM100):
        traced = trace(block, *arguments, dynamic=dynamic)
        slots = dict.fromkeys(traced.parameters, 0)  # one scale for all: a quantization may be shared
        gm, report, _ = lowered(traced, spec, target=target, scale_class=slots)
        results.append((gm, report, traced, run(gm, traced, SCALES)))
    for mine, torchs in zip(results[1][3], results[0][3], strict=True):
        assert torch.equal(mine, torchs)
    return results[1][:3]


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target in (ops.norm_quantize, ops.quantize_rows)]


def names(gm: fx.GraphModule) -> set[str]:
    """What is called in a graph."""
    return {
        n.target if isinstance(n.target, str) else n.target.__name__ for n in gm.graph.nodes if n.op.startswith("call")
    }


def test_graph() -> None:
    gm, report, _ = both(Block(LlamaRMSNorm(K), with_residual), "MXFP4", *inputs())
    assert [line for line in lines(gm) if "= plane" not in line] == [
        "  l_residual_: bf16[2, 3, 72] = input",
        "  l_x_: bf16[2, 3, 72] = input",
        "  l_self_modules_norm_parameters_weight_: bf16[72] = input",
        "  norm_quantize_default = sglq_kernels.norm_quantize(l_residual_, l_x_, l_self_modules_norm_parameters_weight_, 1e-06, "
        "'after_cast', 'MXFP4', None, 'triton_fp4_norm')",
        "  getitem = getitem(norm_quantize_default, 1)",
        "  getitem_1 = getitem(norm_quantize_default, 2)",
        "  getitem_2: bf16[2, 3, 72] = getitem(norm_quantize_default, 0)",
        "* linear_default_3: bf16[2, 3, 48] = sglq_kernels.linear([getitem, getitem_1], [first__data_joined, first__scale_joined], "
        "l_self_modules_second_parameters_bias__joined, 'MXFP4|48/2|72|bfloat16|1|rows|0|4096=reference')  "
        "# first.weight + second.weight MXFP4",
        "  narrow: bf16[2, 3, 32] = narrow(linear_default_3, -1, 0, 32)",
        "  narrow_1: bf16[2, 3, 16] = narrow(linear_default_3, -1, 32, 16)",
        "  return [narrow, narrow_1, getitem_2]",
    ]
    assert report.rewrote[-1] == "input of first.weight: triton_fp4_norm, with the residual add and RMSNorm before it"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("spec", "use", "dynamic"), [("MXFP4", with_residual, True), ("NVFP4_STATIC", alone, False)])
def test_norms_of_models(spec: str, norm: str, use: Use, dynamic: bool) -> None:
    make, weighting = NORMS[norm]
    gm, report, _ = both(Block(make(), use), spec, *inputs(), dynamic=dynamic)
    (call,) = calls(gm)
    assert call.args[4] == weighting and (call.args[1] is None) == (use is alone)
    left = names(gm) - {"item"}
    assert left <= {"norm_quantize.default", "getitem", "linear.default", "narrow", "mul"}, left
    assert "triton_fp4_norm" in report.rewrote[-1] and not report.refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for make, _ in NORMS.values():
        gm, _, _ = both(Block(make(), with_residual, dtype), "MXFP4", *inputs(dtype))
        assert len(calls(gm)) == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("use", [with_residual, alone, lambda m, x, r: (m.first(F.silu(x) * r), m.second(x[0]))])
def test_dynamic_global_scale_takes_maxima_of_rows(use: Use, dynamic: bool) -> None:
    gm, report, _ = both(Block(LlamaRMSNorm(K), use), "NVFP4", *inputs(), dynamic=dynamic)
    assert {call.target for call in calls(gm)} == {ops.quantize_rows}
    assert "after the maxima of rows" in report.rewrote[-1]


def test_two_layers_pass_the_sum_on() -> None:
    """The second norm adds to the first one's sum; a third reads the same sum as the second."""

    def use(m: Block, x: Tensor, residual: Tensor) -> Any:
        h = x + residual
        h2 = h + F.pad(m.first(m.norm(h)), (0, K - 32))
        return m.first(m.norm(h2)), m.second(FunctionalNorm.forward(m.norm, h2)), h2

    gm, _, _ = both(Block(LlamaRMSNorm(K), use), "MXFP4", *inputs())
    first, second, third = calls(gm)
    assert second.args[0].args == (first, 0) and third.args[0].args == (second, 0) and third.args[1] is None
    assert "rsqrt" not in names(gm) and "add" not in names(gm)


# --- left alone ---


def others_read_it(m: Block, x: Tensor, residual: Tensor) -> Any:
    y = m.norm(x + residual)
    return m.first(y), y.sum(-1)


def written_meanwhile(m: Block, x: Tensor, residual: Tensor) -> Any:
    h = x + residual
    y = m.norm(h)
    h.mul_(2)
    return m.first(y), h


@pytest.mark.parametrize(
    ("use", "reason"), [(others_read_it, "others read its result too"), (written_meanwhile, "written by mul_")]
)
def test_refusals_tell_the_reason(use: Use, reason: str) -> None:
    gm, report, _ = both(Block(LlamaRMSNorm(K), use), "MXFP4", *inputs())
    assert not calls(gm) and reason in report.refused[0]


def over_tokens(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 1e-6)).to(x.dtype)


def of_another(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.flip(0).pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def cubed(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(4).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def in_16_bits(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def plus_one_in_16_bits(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return ((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1 + w)).to(x.dtype)


def plus_two(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return ((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)) * (2 + w.float())).to(x.dtype)


def computed_weight(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (K,), w * 2)


def over_two_dimensions(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (3, K), w.expand(3, K))


def no_weight(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (K,))


def layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (K,), w)


UNLIKE = (over_tokens, of_another, cubed, in_16_bits, plus_one_in_16_bits, plus_two, computed_weight, over_two_dimensions,
          no_weight, layer_norm)  # fmt: skip


@pytest.mark.parametrize("norm", UNLIKE)
def test_what_only_looks_like_one_stays(norm: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Each differs from an RMSNorm in one thing."""
    gm, _, _ = both(
        Block(LlamaRMSNorm(K), lambda m, x, r: (m.first(norm(x + r, m.norm.weight)), x)), "MXFP4", *inputs()
    )
    assert not calls(gm)


@pytest.mark.parametrize("total", [lambda x, r: torch.add(x, r, alpha=2), lambda x, r: x + r[:1], lambda x, r: x + 1.0])
def test_sums_that_are_no_residual_stay_before_the_norm(total: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm, _, _ = both(Block(LlamaRMSNorm(K), lambda m, x, r: (m.first(m.norm(total(x, r))), x)), "MXFP4", *inputs())
    (call,) = calls(gm)
    assert call.args[1] is None and "add" in names(gm)


def test_two_scales_for_one_norm_stay() -> None:
    """Each quantization reads the norm's result, so neither may take it."""
    block = Block(LlamaRMSNorm(K), with_residual)
    traced = trace(block, *inputs())
    gm, report, _ = lowered(traced, "NVFP4_STATIC", target=SM100)  # without scale_class each weight has its own
    assert not calls(gm) and len(report.refused) == 2
    gm, report, _ = both(block, {"first.weight": "MXFP4", "second.weight": "FP8_DYNAMIC"}, *inputs())
    assert not calls(gm) and "others" in report.refused[0]


@pytest.mark.parametrize(
    "spec", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A8", "W4AFP8", "NVFP4A16", "MXFP4A16", "W4A16", "FP8"]
)
def test_graphs_of_other_schemes_are_the_same(spec: str) -> None:
    texts = []
    for target in (None, Target.fake("cpu"), SM100):
        traced = trace(Block(LlamaRMSNorm(K), with_residual), *inputs())
        texts.append(lines(lowered(traced, spec, target=target)[0]))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("spec", ["NVFP4", "MXFP4"])
def test_other_targets_have_the_familys_torch_code(spec: str) -> None:
    texts = []
    for target in (None, Target.fake("cpu"), Target.fake("sm80")):
        gm, report, _ = lowered(trace(Block(LlamaRMSNorm(K), with_residual), *inputs()), spec, target=target)
        assert not calls(gm) and not report.refused
        texts.append(lines(gm))
    assert texts[0] == texts[1] == texts[2]


# --- whole models ---


def called_ops(call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, int]]:
    """The result of a compiled function, and how often it calls each of our ops."""
    with torch.no_grad():
        call()  # compiles
        with torch.profiler.profile() as profile:
            result = call()
    return result, {e.key: e.count for e in profile.key_averages() if e.key.startswith("sglq_kernels::")}


@pytest.mark.parametrize(("spec", "dynamic"), [("NVFP4", False), ("MXFP4", True)])
def test_a_model_compiled_for_a_gpu(spec: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's code for this CPU with our ops in it, which compute as eager torch here; under dynamic=True eps is an input.

    Codes may flip where Inductor's sums differ from eager's.
    """
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(BF16).eval()
    ids, results = torch.arange(10).view(2, 5), []
    for target in ("cpu", "sm100"):
        monkeypatch.setattr(Target, "of", staticmethod(lambda device, target=target: Target.fake(target)))
        torch._dynamo.reset()
        compiled = quant_compile.compile(
            model, spec, kernels="reference", dynamic=dynamic, inductor={"emulate_precision_casts": True}
        )
        results.append(called_ops(lambda compiled=compiled: compiled(input_ids=ids, use_cache=False).logits.float()))
    (torchs, without), (mine, counts) = results
    ours = {"MXFP4": {"sglq_kernels::norm_quantize": 2}, "NVFP4": {"sglq_kernels::quantize_rows": 4}}[spec]
    assert without == {"sglq_kernels::linear": 4} and counts == without | ours
    assert float((mine - torchs).norm() / torchs.norm()) <= 0.02


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = LlamaRMSNorm(64), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def test_a_variant_that_is_compiled_at_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer has the first one's graph, under another scheme."""
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: Target.fake("sm100")))
    model = nn.Sequential(Layer(), Layer()).to(BF16).requires_grad_(False)
    policy = {"default": "MXFP4", "rules": [{"match": "0.linear", "scheme": "FP8_DYNAMIC"}]}
    for layer in model:
        layer.compile(backend="sglquant", options={"policy": policy, "kernels": "reference"}, dynamic=False)
    counts = called_ops(lambda: model(torch.randn(3, 64).to(BF16)))[1]
    assert counts == {"sglq_kernels::linear": 2, "sglq_kernels::norm_quantize": 1}
