"""PEFT: the base is quantized under its own names, adapters keep their precision, and merging is noticed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import quant_compile
from quant_compile.ir.errors import ReleasedWeightError
from quant_compile.model.places import places
from quant_compile.model.plan import Plan
from quant_compile.policy import Policy
from tests.moe_support import one_thread
from tests.runtime_support import CompileCounter, plain_inductor

peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e .[test])")

__all__ = ["one_thread", "plain_inductor"]
pytestmark = pytest.mark.usefixtures("one_thread")

POLICY = {"default": "W8A16", "strict": True}
TARGETS = ["q_proj", "v_proj", "down_proj"]
# int8 codes times scales in f32, summed in another order than eager's; without any quantization it is 6e-3 or more.
TOLERANCE = 1e-5
ADAPTER = "kept by convention: LoRA adapter"


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


def adapted(config: Any = None) -> Any:
    """A Llama with an adapter that is not zero."""
    config = config or peft.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(llama(), config).eval().requires_grad_(False)


def two_adapters() -> Any:
    model = adapted()
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return model.eval().requires_grad_(False)


def compiled(model: Any, door: str) -> Any:
    torch._dynamo.reset()
    if door == "compile":
        return quant_compile.compile(model, POLICY)
    return torch.compile(model, backend="sglquant", options={"policy": POLICY})


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(2, 11)[None]).logits


def rounded(model: Any) -> Any:
    """A copy whose base linears are rounded to int8 per row as they are now, merged or not; adapters and head are not."""
    model = copy.deepcopy(model)
    for place in places(model):
        adapter = any("lora_" in part or part == "modules_to_save" for part in place.raw.split("."))
        if isinstance(place.module, nn.Linear) and not adapter and not place.name.startswith("lm_head"):
            weight = place.parameter.data
            scale = weight.abs().amax(-1, keepdim=True) / 127
            place.parameter.data = (weight / scale).round() * scale
    return model


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def check(run: Any, plain: Any) -> None:
    """A call gives what the rounded base gives, and not what the plain one gives."""
    got = logits(run)
    assert error(got, logits(rounded(plain))) < TOLERANCE
    assert error(got, logits(plain)) > 100 * TOLERANCE


def test_plan_and_names_are_those_of_the_base() -> None:
    """A policy that was written for the model serves with adapters around it."""
    base = {entry.names[0] for entry in Plan.of(Policy.load("W8A8"), llama()).entries}
    rules = [{"match": "re:model\\.layers\\.0\\.self_attn\\.q_proj", "scheme": "keep"}]
    plan = Plan.of(Policy.load({"default": "W8A8", "rules": rules, "strict": True}), adapted()).enforce()
    by_name = {entry.names[0]: entry for entry in plan.entries}
    adapters = {name: entry for name, entry in by_name.items() if ".lora_" in name}
    assert by_name.keys() - adapters.keys() == base
    assert len(adapters) == 12 and all(entry.decision.reason == ADAPTER for entry in adapters.values())
    assert by_name["model.layers.0.self_attn.q_proj"].decision.rule == 0


@pytest.mark.parametrize("door", ["compile", "backend"])
def test_adapters_are_kept_and_switched(door: str, plain_inductor: CompileCounter) -> None:
    model = two_adapters()
    plain, run = copy.deepcopy(model), compiled(model, door)
    check(run, plain)
    for name in ("b", "default"):
        model.set_adapter(name)
        plain.set_adapter(name)
        check(run, plain)
    with model.disable_adapter(), plain.disable_adapter():
        check(run, plain)
    report = quant_compile.report(model)
    lines = {line.names[0]: line for line in report.lines}
    assert report.coverage == 1.0 and lines["model.layers.0.self_attn.q_proj.weight"].scheme == "W8A16"
    adapters = [line for name, line in lines.items() if ".lora_" in name]
    assert len(adapters) == 20 and all(line.reason == ADAPTER and line.scheme is None for line in adapters)


@pytest.mark.parametrize("door", ["compile", "backend"])
def test_a_rule_may_quantize_adapters(door: str, plain_inductor: CompileCounter) -> None:
    model = adapted()
    rules = [{"match": "*.lora_B.default", "scheme": "W8A16"}]
    policy = {"default": "keep", "rules": rules, "strict": True}
    torch._dynamo.reset()
    run: Any = model
    if door == "compile":
        quant_compile.compile(model, policy)
    else:
        run = torch.compile(model, backend="sglquant", options={"policy": policy})
    logits(run)
    schemes = {line.names[0]: line.scheme for line in quant_compile.report(model).lines}
    assert {name for name, scheme in schemes.items() if scheme} == {name for name in schemes if ".lora_B." in name}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("door", ["compile", "backend"])
def test_merging_is_noticed(door: str, safe: bool, plain_inductor: CompileCounter) -> None:
    """Also another adapter's merge behind an unmerge, with no call in between, and back; nothing is refreshed by hand."""
    model = two_adapters()
    plain, run = copy.deepcopy(model), compiled(model, door)
    both = (model, plain)
    check(run, plain)
    for name in ("default", "b", "default"):
        for each in both:
            each.set_adapter(name)
            each.requires_grad_(False)
            each.merge_adapter(safe_merge=safe)
        check(run, plain)
        for each in both:
            each.unmerge_adapter()
    check(run, plain)
    for scale in (2.0, 3.0):  # merged with another scale, with no call while it was not merged
        for each in both:
            for layer in each.modules():
                if hasattr(layer, "lora_A") and "default" in layer.scaling:
                    layer.set_scale("default", scale)
            each.merge_adapter(safe_merge=safe)
        check(run, plain)
        for each in both:
            each.unmerge_adapter()


def test_an_adapter_that_was_trained_between_two_merges(plain_inductor: CompileCounter) -> None:
    model = adapted()
    plain, run = copy.deepcopy(model), compiled(model, "compile")
    for step in range(2):
        for each in (model, plain):
            each.merge_adapter()
        check(run, plain)
        for each in (model, plain):
            each.unmerge_adapter()
            with torch.no_grad():
                for name, parameter in each.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(0.05 * (step + 1))


def test_merge_and_unload(plain_inductor: CompileCounter) -> None:
    """PEFT is gone and the Parameters are the same objects with other values."""
    model = adapted()
    plain = copy.deepcopy(model)
    logits(compiled(model, "backend"))
    merged, wanted = model.merge_and_unload(), plain.merge_and_unload()
    run = torch.compile(merged, backend="sglquant", options={"policy": POLICY})
    check(run, wanted)


def test_adapters_around_a_model_that_ran_before(plain_inductor: CompileCounter) -> None:
    """Planes of the plain model are those of the base, and are not made again; nor is a release in the way."""
    base = llama().requires_grad_(False)
    logits(torch.compile(base, backend="sglquant", options={"policy": POLICY}))
    assert quant_compile.release(base) > 0
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=TARGETS)).eval().requires_grad_(False)
    plain = peft.get_peft_model(llama(), peft.LoraConfig(r=8, target_modules=TARGETS)).eval().requires_grad_(False)
    check(compiled(model, "backend"), plain)


@pytest.mark.parametrize("door", ["compile", "backend"])
def test_merging_into_released_weights_is_an_error(door: str, plain_inductor: CompileCounter) -> None:
    model = adapted()
    plain, run = copy.deepcopy(model), compiled(model, door)
    check(run, plain)
    assert quant_compile.release(model) > 0
    with pytest.raises(ReleasedWeightError, match=r"data reads a weight whose original values were released[^!]*Fix: "):
        model.merge_adapter()
    assert quant_compile.restore(model, llama()) > 0
    model.merge_adapter()
    plain.merge_adapter()
    check(run, plain)


def test_generate_of_a_peft_model_runs_quantized(plain_inductor: CompileCounter) -> None:
    """Its ``generate`` calls the model inside; ``uncompile`` gives both back."""
    model = adapted()
    plain = copy.deepcopy(model)
    quant_compile.compile(model, POLICY)
    ids = torch.arange(2, 11)[None]
    arguments = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode():
        got = model.generate(input_ids=ids, **arguments)
        wanted = rounded(plain).generate(input_ids=ids, **arguments)
        unquantized = plain.generate(input_ids=ids, **arguments)
    assert len(plain_inductor) > 0 and torch.equal(got.sequences, wanted.sequences)
    assert error(torch.stack(got.logits), torch.stack(wanted.logits)) < TOLERANCE
    assert error(torch.stack(got.logits), torch.stack(unquantized.logits)) > 100 * TOLERANCE
    assert quant_compile.report(model).coverage == 1.0
    quant_compile.uncompile(model)
    assert error(logits(model), logits(plain)) < TOLERANCE


OTHERS = {
    "dora": lambda: peft.LoraConfig(r=8, target_modules=TARGETS, use_dora=True, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS, init_weights=False),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS, init_weights=False),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=TARGETS, init_weights=False),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "copies": lambda: peft.LoraConfig(r=8, target_modules=TARGETS, modules_to_save=["o_proj"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_tuners_are_right_or_named(kind: str, plain_inductor: CompileCounter) -> None:
    """A base weight that a tuner computes with is in the ledger with its bytes against the coverage; others are quantized."""
    model = adapted(OTHERS[kind]())
    torch._dynamo.reset()
    quant_compile.compile(model, "W8A16")
    logits(model)
    report = quant_compile.report(model)
    lines = {line.names[0]: line for line in report.lines}
    base = dict(llama().named_parameters())
    assert base.keys() <= lines.keys()
    for name, line in lines.items():
        if name not in base and "modules_to_save" not in name:
            assert line.scheme is None and line.reason.startswith("kept by convention:"), name
        elif name.endswith("_proj.weight"):
            assert line.scheme == "W8A16" or line.named, name
    unquantized = {name for name, line in lines.items() if line.named and line.scheme is None}
    assert (report.coverage < 1) == bool(unquantized)
    if kind == "copies":  # the originals, whose copies are read in their place
        assert unquantized == {name for name in base if name.endswith("o_proj.weight")}
        assert lines["model.layers.0.self_attn.o_proj.modules_to_save.default.weight"].scheme == "W8A16"
    if kind not in ("dora", "hra", "copies"):
        assert report.coverage == 1.0
