"""Static scales of expert blocks: of the tokens and of the hidden layer, in every form that experts are computed in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import quant_compile
from quant_compile import MissingScalesError
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import Activation, moe_reference, stack_planes
from quant_compile.ir.scheme import parse
from tests import textbook
from tests.runtime_support import CompileCounter, inner_error, plain_inductor, reference_of

__all__ = ["plain_inductor"]

REFERENCE = {"kernels": "reference"}
LARGEST = {"FP8": 448.0, "W8A8_STATIC": 127.0}
NAMES = (".experts.gate_up_proj", ".experts.down_proj")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield


def tiny_moe(dtype: torch.dtype = torch.bfloat16) -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    for layer in model.model.layers:  # the default is so small that blocks hardly matter
        layer.mlp.experts.gate_up_proj.mul_(10)
        layer.mlp.experts.down_proj.mul_(10)
    return model


def tokens() -> list[Tensor]:
    return [torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm", "eager"])
def test_scales_of_transformers_experts(form: str) -> None:
    """As the textbook sees them, which computes the block by itself."""
    model = tiny_moe(torch.float32)
    model.set_experts_implementation(form)
    wanted = textbook.input_amax(model, tokens())
    policy = quant_compile.calibrate(model, tokens(), "FP8", progress=False)
    scales = load_file(str(policy.scales))
    wanted.pop("lm_head")
    assert scales.keys() == {f"{name}.input_scale" for name in wanted}
    assert sum(name.endswith(NAMES) for name in wanted) == 4
    for name, amax in wanted.items():
        torch.testing.assert_close(scales[f"{name}.input_scale"], amax.view(1) / 448, rtol=1e-4, atol=0)
    assert model.config._experts_implementation == form


def test_scales_of_experts_that_all_run() -> None:
    """Llama 4 multiplies every token by every expert, its weights stored [E, k, n], tokens already weighted."""
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, intermediate_size_mlp=64, num_hidden_layers=1, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    experts = model.model.layers[0].feed_forward.experts
    seen: list[Tensor] = []
    hook = experts.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    policy = quant_compile.calibrate(model, tokens(), "W8A8_STATIC", progress=False)
    hook.remove()
    assert len(seen) == 3
    hidden = [torch.bmm(x.view(4, -1, 64), experts.gate_up_proj).chunk(2, -1) for x in seen]
    wanted = (max(x.abs().max() for x in seen), max((u * F.silu(g)).abs().max() for g, u in hidden))
    scales = load_file(str(policy.scales))
    for name, amax in zip(NAMES, wanted, strict=True):
        torch.testing.assert_close(scales[f"model.layers.0.feed_forward{name}.input_scale"] * 127, amax.view(1))


Form = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Form] = {
    "einsum": lambda x, w, ids: torch.einsum("tk,enk->ten", x, w),
    "einsum of a list": lambda x, w, ids: torch.einsum("tk,enk->ten", [x, w]),
    "matmul": lambda x, w, ids: x @ w.mT,
    "baddbmm": lambda x, w, ids: torch.baddbmm(x.new_zeros(4, 6, 16), x.expand(4, 6, 8), w.transpose(1, 2)),
    "gathered": lambda x, w, ids: torch.bmm(w[ids], x.unsqueeze(-1)),
    "index_select": lambda x, w, ids: torch.bmm(x.unsqueeze(1), w.index_select(0, ids).permute(0, 2, 1).contiguous()),
    "one by one": lambda x, w, ids: torch.stack([F.linear(x, expert) for expert in w]),
    "one expert": lambda x, w, ids: x @ w[2].t(),
    "grouped": lambda x, w, ids: F.grouped_mm(x, w.mT, offs=torch.tensor([1, 2, 4, 6], dtype=torch.int32)),
}


@pytest.mark.parametrize("form", FORMS)
def test_products_with_stacked_weights_are_watched(form: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stacked, self.unread = (nn.Parameter(torch.randn(4, 16, 8)) for _ in range(2))
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return FORMS[form](self.linear(x), self.stacked, torch.tensor([0, 3, 1, 1, 2, 0]))

    model, x = Block(), torch.randn(6, 8)
    scales = load_file(str(quant_compile.calibrate(model, [x], "FP8", progress=False).scales))
    assert scales.keys() == {"linear.input_scale", "stacked.input_scale"}
    torch.testing.assert_close(scales["stacked.input_scale"] * 448, model.linear(x).abs().max().view(1))


def test_rows_of_no_expert_are_left_out() -> None:
    """Under expert parallelism grouped rows after the last offset hold whatever was there."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.grouped_mm(x, self.experts.mT, offs=torch.tensor([1, 2], dtype=torch.int32))

    x = torch.randn(4, 8)
    x[2], x[3] = float("nan"), 1e9
    scales = load_file(str(quant_compile.calibrate(Block(), [x], "FP8", progress=False).scales))
    torch.testing.assert_close(scales["experts.input_scale"] * 448, x[:2].abs().max().view(1))


class ReferenceExperts(nn.Module):
    """A block through ``moe_reference``, with calibrated scales."""

    def __init__(self, block: Any, spec: str, scales: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.scheme, self.scales = parse(spec), scales
        self.planes = [self._pack(weight.detach()) for weight in (block.gate_up_proj, block.down_proj)]

    def _pack(self, weight: Tensor) -> Planes:
        with torch.inference_mode(False), torch.no_grad():
            return stack_planes([family_of(self.scheme).quantize_weight(w, self.scheme) for w in weight])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        planes = family_of(self.scheme).quantize_input(x, self.scheme, self.scales[0])
        return moe_reference(
            planes, ids, weights, self.planes[0], None, self.planes[1], None, self.scheme, Activation("silu"), x.dtype,
            self.scales[1],
        )  # fmt: skip


def reference_model(model: Any, spec: str, scales: dict[str, Tensor]) -> Any:
    """Linears and experts through their schemes' references; the head kept."""
    made: Any = reference_of(model, lambda name: None if name == "lm_head" else spec, scales)
    for i, layer in enumerate(made.model.layers):
        first, second = (scales[f"model.layers.{i}.mlp{name}.input_scale"] for name in NAMES)
        layer.mlp.experts = ReferenceExperts(layer.mlp.experts, spec, (first, second))
    return made


@pytest.mark.parametrize("spec", LARGEST)
def test_end_to_end(spec: str, plain_inductor: CompileCounter) -> None:
    model = tiny_moe()
    policy = quant_compile.calibrate(model, tokens()[:2], {"default": spec}, progress=False)
    scales = load_file(str(policy.scales))
    reference = reference_model(model, spec, scales)
    halved = {k: v / 2 if k.endswith("experts.down_proj.input_scale") else v for k, v in scales.items()}
    other = reference_model(model, spec, halved)
    quant_compile.compile(model, policy, **REFERENCE)
    for ids in tokens():  # the last was not calibrated with
        ours, theirs = model(ids, use_cache=False).logits, reference(ids, use_cache=False).logits
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm()
        wrong = other(ids, use_cache=False).logits
        assert (wrong - theirs).norm() > 2e-2 * theirs.norm(), "the hidden layer's scale does not matter here"
    report = quant_compile.report(model).require(1.0)
    assert {line.scheme for line in report.lines if line.names[0].endswith(NAMES)} == {spec}


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_scale_names_the_weight_of_the_block(which: int, plain_inductor: CompileCounter) -> None:
    model = tiny_moe()
    policy = quant_compile.calibrate(model, tokens(), "W8A8_STATIC", progress=False)
    scales = load_file(str(policy.scales))
    missing = f"model.layers.1.mlp{NAMES[which]}"
    del scales[f"{missing}.input_scale"]
    save_file(scales, "less.safetensors")
    quant_compile.compile(model, {"default": "W8A8_STATIC", "scales": "less.safetensors"}, **REFERENCE)
    with pytest.raises(Exception) as error:
        model(tokens()[0], use_cache=False)
    inner = inner_error(error.value)
    assert isinstance(inner, MissingScalesError)
    assert f"{missing} has a static scheme and no calibrated input scale" in str(inner)


def test_a_block_that_no_batch_reached_is_named() -> None:
    model = tiny_moe()
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(MissingScalesError, match=r"no batch reached model\.layers\.1\.mlp\.experts\.\w+ \(2 weights"):
        quant_compile.calibrate(model, tokens(), "FP8", path="none.safetensors", progress=False)
    assert not Path("none.safetensors").exists()
