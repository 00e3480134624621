"""Weights that a checkpoint has quantized, and that a policy or a device wants otherwise: other schemes, values, the same codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile import cli
from quant_compile.ir.errors import NoKernelError, OptionError, PolicyError
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.scheme import parse
from quant_compile.lowering.target import Target
from quant_compile.pretrained import plan_of
from tests.checkpoints.packers import CASES, ct_config, nvfp4_parts
from tests.checkpoints.support import Pack, distance, logits, quantized, tiny_llama, tiny_moe, tiny_nemotron, write
from tests.checkpoints.test_names import per_expert
from tests.checkpoints.test_save import assert_equal, planes_of

CLOSE = 1e-2  # see test_load
NVFP4A16 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}


def load(folder: Path, *args: Any, **kwargs: Any) -> nn.Module:
    return quant_compile.load(folder, *args, device="cpu", **kwargs)


def schemes_of(model: nn.Module) -> dict[str, str | None]:
    return {line.names[0].removesuffix(".weight"): line.scheme for line in quant_compile.report(model).lines}


def reasons_of(model: nn.Module) -> dict[str, str]:
    return {line.names[0].removesuffix(".weight"): line.reason for line in quant_compile.report(model).lines}


def again(scheme: str, match: str = "*_proj") -> dict[str, Any]:
    return {"default": "keep", "rules": [{"match": match, "scheme": scheme, "requantize": True}]}


def short(pack: Pack) -> Pack:
    """With scales that bf16 holds, since the packers' values have them in bf16, as the libraries do."""

    def packed(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, values = pack(name, w)
        if "scales" in tensors:
            tensors["scales"] = tensors["scales"].to(torch.bfloat16).to(torch.float16)
        return tensors, values

    return packed


@pytest.mark.parametrize("name", ["gptq 4 bits asym", "gptq desc_act", "awq", "modelopt int4 awq", "bitsandbytes nf4"])
@pytest.mark.parametrize("scheme", ["W8A8", "keep"])
def test_planes_are_those_of_the_dequantized_weights(name: str, scheme: str, tmp_path: Path) -> None:
    """To the bit; orders and factors of inputs are undone. The truth holds the formula's values, rounded once."""
    case, truth = CASES[name], tiny_llama(layers=1)
    found = load(quantized(tmp_path, truth, short(case.pack), case.config), again(scheme))
    ours = logits(found)
    if scheme == "keep":
        parameters = dict(found.named_parameters())
        for key, parameter in truth.named_parameters():
            assert torch.equal(parameters[key].detach(), parameter.detach()), key
        words = "dequantized from" if case.scheme else "values are kept"
        assert words in reasons_of(found)["model.layers.0.mlp.up_proj"]
        return
    wanted = quant_compile.compile(truth.requires_grad_(False), scheme)
    assert distance(ours, logits(wanted)) == 0
    assert_equal(planes_of(found), planes_of(wanted))
    reason = reasons_of(found)["model.layers.0.mlp.up_proj"]
    assert "rule 1" in reason and "requantized from" in reason and quant_compile.report(found).coverage == 1.0


def test_values_are_rounded_once(tmp_path: Path) -> None:
    """Scales in fp16 are not rounded to the model's bf16 before they multiply."""
    case = CASES["gptq 4 bits asym"]
    folder = quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config)
    exact = dict(load(folder, again("keep"), dtype=torch.float32).named_parameters())
    for name, parameter in load(folder, again("keep")).named_parameters():
        assert torch.equal(parameter.detach(), exact[name].detach().to(torch.bfloat16)), name


def test_factors_of_inputs_are_multiplied_in(tmp_path: Path) -> None:
    case, truth = CASES["modelopt int4 awq"], tiny_llama(layers=1)

    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, values = case.pack(name, w)
        factor = torch.linspace(0.5, 2, w.shape[1]).to(torch.bfloat16)
        return {**tensors, "pre_quant_scale": factor}, values * factor.float()

    found = load(quantized(tmp_path, truth, pack, case.config), again("W8A16"))
    wanted = quant_compile.compile(truth.requires_grad_(False), "W8A16")
    assert distance(logits(found), logits(wanted)) == 0
    assert_equal(planes_of(found), planes_of(wanted))


def test_rules_one_by_one_and_the_default(tmp_path: Path) -> None:
    """A rule's key wins over the policy's, which holds for the default too; conventions stay with the checkpoint."""
    case = CASES["ct packed 4 sym"]
    folder = quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config)
    rule: dict[str, Any] = {"match": "q_proj", "scheme": "W8A16"}
    policy = {"default": "keep", "requantize": True, "rules": [rule]}
    found = {o.name.removesuffix(".weight").rpartition(".")[2]: o for o in plan_of(folder, policy).outcomes}
    assert found["q_proj"].scheme == parse("W8A16") and found["q_proj"].was == "int4.group64+16"
    assert found["up_proj"].scheme is None and found["up_proj"].was == "int4.group64+16"
    reasons = reasons_of(load(folder, policy))
    assert "dequantized from int4.group64+16; default of the policy" in reasons["model.layers.0.mlp.up_proj"]
    rule["requantize"] = False
    words = r"q_proj: policy says W8A16 .* has it in int4\.group64\+16(.|\n)*`requantize: true`"
    with pytest.raises(PolicyError, match=words):
        plan_of(folder, policy)
    assert {o.was for o in plan_of(folder, {"default": "W8A8"}).outcomes} == {""}


def test_values_of_no_scheme_are_a_conflict_too(tmp_path: Path) -> None:
    """NF4 is loaded as values; a rule that gives them a scheme contradicts the checkpoint, unless it says so."""
    case = CASES["bitsandbytes nf4"]
    folder = quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config)
    with pytest.raises(PolicyError, match=r"policy says W8A8 .*bitsandbytes(.|\n)*requantize"):
        plan_of(folder, {"default": "keep", "rules": [{"match": "*_proj", "scheme": "W8A8"}]})
    assert plan_of(folder, {"default": "keep", "rules": [{"match": "*_proj", "scheme": "keep"}]}).outcomes


def test_the_same_codes_where_only_inputs_differ(tmp_path: Path) -> None:
    case = CASES["ct nvfp4"]
    folder = quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config)
    static, alone = load(folder), load(folder, again("NVFP4A16"))
    assert_equal(
        {name: planes[:1] for name, planes in planes_of(alone).items()},
        {name: planes[:1] for name, planes in planes_of(static).items()},
    )
    logits(alone)
    assert schemes_of(alone)["model.layers.0.mlp.up_proj"] == "NVFP4A16"
    assert "with the codes of NVFP4_STATIC" in reasons_of(alone)["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("make", [tiny_moe, tiny_nemotron])
@pytest.mark.parametrize("scheme", ["W8A16", "keep"])
def test_experts(make: Callable[[], nn.Module], scheme: str, tmp_path: Path) -> None:
    """With a gate, and without."""
    case, model = CASES["gptq 4 bits sym"], make()
    folder = write(tmp_path, model, per_expert(model, short(case.pack)), case.config)
    found = load(folder, again(scheme, "experts"))
    parameters = dict(model.named_parameters())
    if scheme == "keep":
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter.detach(), parameters[name].detach()), name
        return
    policy = {"default": "keep", "rules": [{"match": "experts", "scheme": scheme}]}
    wanted = quant_compile.compile(model.requires_grad_(False), policy)
    assert distance(logits(found), logits(wanted)) == 0
    assert_equal(planes_of(found), planes_of(wanted))


def test_fused_experts(tmp_path: Path) -> None:
    """GPT-OSS: transposed, gate and up alternate."""
    from tests.checkpoints.packers import mxfp4_parts
    from tests.checkpoints.support import tiny_gpt_oss

    model = tiny_gpt_oss()
    tensors = dict(model.state_dict())
    for name in ("gate_up_proj", "down_proj"):
        full = f"model.layers.0.mlp.experts.{name}"
        parameter = dict(model.named_parameters())[full]
        parts = [mxfp4_parts(w.t().contiguous().float()) for w in parameter.detach()]
        del tensors[full]
        tensors[f"{full}_blocks"] = torch.stack([packed for packed, _, _ in parts]).unflatten(-1, (-1, 16))
        tensors[f"{full}_scales"] = torch.stack([scale for _, scale, _ in parts])
        parameter.data = torch.stack([values.t() for _, _, values in parts]).to(torch.bfloat16)
    folder = write(tmp_path, model, tensors, {"quant_method": "mxfp4"})
    policy = again("W8A16", "experts")
    wanted = quant_compile.compile(model.requires_grad_(False), {**policy, "requantize": True})
    logits(wanted)
    assert_equal(planes_of(load(folder, policy)), planes_of(wanted))


def test_half_a_block_is_an_error(tmp_path: Path) -> None:
    case, model = CASES["gptq 4 bits sym"], tiny_moe()
    folder = write(tmp_path, model, per_expert(model, case.pack), case.config)
    with pytest.raises(PolicyError, match=r"down_proj: policy says W8A16(.|\n)*one scheme"):
        plan_of(folder, again("W8A16", "experts.down_proj"))


def test_convert_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, truth = CASES["gptq 4 bits sym"], tiny_llama(layers=1)
    folder = quantized(tmp_path / "gptq", truth, case.pack, case.config)
    policy = tmp_path / "policy.yaml"
    policy.write_text('default: keep\nrules:\n  - {match: "*.mlp.*", scheme: FP8_DYNAMIC, requantize: true}\n')
    assert cli.main(["inspect", str(folder), "--policy", str(policy)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "FP8_DYNAMIC" in shown and "requantized from" in shown and "int4.group64+16" in shown
    assert cli.main(["convert", str(folder), str(tmp_path / "new"), "--policy", str(policy)]) == 0
    found = {o.name: o.scheme for o in plan_of(tmp_path / "new").outcomes if o.scheme}
    assert found["model.layers.0.mlp.up_proj.weight"] == parse("FP8_DYNAMIC")
    assert found["model.layers.0.self_attn.q_proj.weight"] == parse("int4.group64+16")


# --- devices without kernels ---


def mxfp4_inputs() -> tuple[Any, dict[str, Any]]:
    args = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return CASES["ct mxfp4"].pack, ct_config("mxfp4-pack-quantized", args, {**args, "dynamic": True})


CHECKPOINTS = {
    "NVFP4_STATIC": (CASES["ct nvfp4"].pack, CASES["ct nvfp4"].config),
    "MXFP4": mxfp4_inputs(),
    "FP8_DYNAMIC": (CASES["ct fp8 channel"].pack, CASES["ct fp8 channel"].config),
}


@pytest.fixture
def as_sm90(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has kernels for what sm90 has kernels for."""
    from quant_compile import backend
    from quant_compile.lowering.moe import serves

    fake = Target.fake("sm90")
    monkeypatch.setattr("quant_compile.pretrained.Target", SimpleNamespace(of=lambda device: fake))
    monkeypatch.setattr(backend, "serves", lambda problem, target, request: serves(problem, fake, request))


@pytest.mark.parametrize("in_policy", [False, True])
@pytest.mark.parametrize(("scheme", "alone"), [("NVFP4_STATIC", "NVFP4A16"), ("MXFP4", "MXFP4A16")])
@pytest.mark.parametrize("fallback", ["weight_only", "fp8"])
def test_fp4_below_sm100(
    fallback: str, scheme: str, alone: str, in_policy: bool, tmp_path: Path, as_sm90: None
) -> None:
    truth = tiny_llama(layers=1)
    folder = quantized(tmp_path, truth, *CHECKPOINTS[scheme])
    with pytest.raises(NoKernelError) as raised:
        load(folder)
    assert f'fallback="weight_only" of load serves it as {alone} here' in str(raised.value)
    assert 'fallback="fp8" of load serves it as FP8_DYNAMIC here' in str(raised.value)
    given: dict[str, Any] = (
        {"policy": {"default": "keep", "fallback": fallback}} if in_policy else {"fallback": fallback}
    )
    dtype = torch.float32 if fallback == "weight_only" else torch.bfloat16
    found = load(folder, dtype=dtype, **given)
    ours = logits(found)
    wanted = alone if fallback == "weight_only" else "FP8_DYNAMIC"
    assert {found for found in schemes_of(found).values() if found} == {wanted}
    assert quant_compile.report(found).coverage == 1.0
    reason = reasons_of(found)["model.layers.0.mlp.up_proj"]
    assert "fallback" in reason and scheme in reason
    if fallback == "weight_only":
        assert distance(ours, logits(truth.float())) < CLOSE
        return
    reference = quant_compile.compile(truth.requires_grad_(False), "FP8_DYNAMIC")
    assert distance(ours, logits(reference)) < CLOSE
    assert "requantized from" in reason


def test_fallbacks_of_experts(tmp_path: Path) -> None:
    """Both weights of a block; experts without a gate have no kernels on GPUs, and keep their values."""

    def pack(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, scale, whole, values = nvfp4_parts(w)
        made = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": (1 / whole).reshape(1)}
        return {**made, "input_global_scale": torch.tensor([512.0])}, values

    config = ct_config("nvfp4-pack-quantized", NVFP4A16, {**NVFP4A16, "dynamic": "local"})
    for make in (tiny_moe, tiny_nemotron):
        model = make()
        folder = write(tmp_path / make.__name__, model, per_expert(model, pack), config)
        for way, wanted in (("weight_only", "NVFP4_STATIC"), ("fp8", "FP8_DYNAMIC")):
            plan = plan_of(folder, fallback=way, target=Target.fake("sm90"))
            found = [o for o in plan.outcomes if o.name.endswith("experts.down_proj")]
            assert len(found) == 1 and found[0].quantized
            if make is tiny_moe:
                assert found[0].scheme == parse(wanted)
                assert bool(plan.serving()) == (way == "weight_only")
            else:
                assert found[0].scheme is None and "without a gate" in found[0].notes[0]
    assert isinstance(plan.wishes.problems["model.layers.1.mixer.experts.up_proj"](parse("W8A8")), MoeProblem)


def test_fp8_on_sm80_is_weights_alone(tmp_path: Path) -> None:
    """It multiplies no FP8, and reads it."""
    folder = quantized(tmp_path, tiny_llama(layers=1), *CHECKPOINTS["FP8_DYNAMIC"])
    with pytest.raises(NoKernelError, match=r'fallback="weight_only" of load serves it as fp8e4m3\.channel\+16 here'):
        plan_of(folder, target=Target.fake("sm80")).serving()
    plan = plan_of(folder, fallback="weight_only", target=Target.fake("sm80"))
    assert plan.serving() == ("7 weights in FP8_DYNAMIC run as fp8e4m3.channel+16, by fallback weight_only",)


def test_fallbacks_that_do_not_help_are_not_named(tmp_path: Path) -> None:
    """sm80 multiplies no FP8."""
    folder = quantized(tmp_path, tiny_llama(layers=1), *CHECKPOINTS["NVFP4_STATIC"])
    with pytest.raises(NoKernelError) as raised:
        plan_of(folder, target=Target.fake("sm80")).serving()
    assert 'fallback="weight_only"' in str(raised.value) and 'fallback="fp8"' not in str(raised.value)
    with pytest.raises(NoKernelError):
        plan_of(folder, fallback="fp8", target=Target.fake("sm80")).serving()
    for target in ("cpu", "sm100"):
        plan = plan_of(folder, fallback="fp8", target=Target.fake(target))
        assert not plan.serving() and {o.was for o in plan.outcomes} == {""}
    with pytest.raises(OptionError, match="fallback must be one of weight_only, fp8"):
        plan_of(folder, fallback="int8")
