"""``load``: logits of a compiled model are those of the values that its checkpoint stands for; the ledger says where planes came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quant_compile
from quant_compile import cli
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.ir.errors import OptionError, ReleasedWeightError, StaleWeightError
from quant_compile.lowering.weights import STORE
from quant_compile.pretrained import plan_of
from tests.checkpoints.packers import CASES
from tests.checkpoints.support import distance, linears, logits, quantized, tiny_llama, tiny_moe, write
from tests.checkpoints.test_names import per_expert
from tests.checkpoints.test_packed import slabs_of

# The truth has scales and values rounded to bf16, and codes of inputs flip where sums are added in another order.
CLOSE, CLOSE_CODES = 1e-2, 1e-2


def load(folder: Path, *args: Any, **kwargs: Any) -> torch.nn.Module:
    return quant_compile.load(folder, *args, device="cpu", **kwargs)


@pytest.mark.parametrize("name", ["gptq desc_act", "awq", "ct packed 3 asym", "ct nvfp4a16", "bitsandbytes nf4"])
def test_weights_alone(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], tiny_llama(layers=1)
    folder = quantized(tmp_path, model, case.pack, case.config)
    found = load(folder, dtype=torch.float32)
    assert distance(logits(found), logits(model.float())) < CLOSE
    report = quant_compile.report(found)
    if case.scheme:
        lines = [line for line in report.lines if line.scheme]
        assert len(lines) == 7 and report.coverage == 1.0
        assert all(line.released and "model.safetensors" in line.reason for line in lines)
    else:
        assert any("table" in line.reason for line in report.lines)


@pytest.mark.parametrize("name", ["ct fp8 channel", "deepseek", "ct int8", "modelopt fp8"])
def test_eight_bit_inputs(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], tiny_llama(layers=1).float()
    for parameter in model.parameters():  # quotients of numbers with few bits are often halfway between two codes
        parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)
    found = load(quantized(tmp_path, model, case.pack, case.config), dtype=torch.float32)
    kind, scale = {"ct int8": ("token", None), "ct fp8 channel": ("token", None), "deepseek": ("group", None)}.get(
        name, ("tensor", 0.02)
    )
    for linear in linears(model).values():
        linear.register_forward_pre_hook(lambda module, args: (as_codes(args[0], kind, scale, name == "ct int8"),))
    assert distance(logits(found), logits(model)) < CLOSE_CODES
    assert quant_compile.report(found).coverage == 1.0


def as_codes(x: torch.Tensor, kind: str, scale: float | None, integer: bool) -> torch.Tensor:
    """What an input's codes stand for."""
    top = 127 if integer else 448
    grouped = x.unflatten(-1, (-1, 128)) if kind == "group" else x
    step = grouped.abs().amax(-1, keepdim=True) / top if scale is None else torch.tensor(scale)
    codes = grouped / step
    codes = codes.round() if integer else codes.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return (codes * step).reshape(x.shape)


def test_generate_report_and_eager_reads(tmp_path: Path) -> None:
    case, model = CASES["gptq 4 bits asym"], tiny_llama()
    folder = quantized(tmp_path, model, case.pack, case.config)
    found = load(folder, dtype=torch.float32)
    prompt = torch.arange(9)[None]
    ours = found.generate(prompt, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    theirs = model.float().generate(prompt, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    assert ours.tolist() == theirs.tolist()
    text = str(quant_compile.report(found))
    assert "gptq" in text and "model.safetensors" in text
    weight = found.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
    with pytest.raises(ReleasedWeightError):
        weight + 1


def test_planes_are_held_once(tmp_path: Path) -> None:
    """What a kernel reads replaces what was adopted."""
    case = CASES["ct packed 4 sym"]
    found = load(quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config))
    logits(found)
    weight = found.model.layers[0].mlp.down_proj.weight  # type: ignore[union-attr, index]
    entry = STORE.peek(weight)
    assert entry is not None and len(entry.packs) == 1 and not entry.further
    assert (
        weight.untyped_storage().nbytes() == 0
        if not hasattr(weight, "released_by_sglquant")
        else weight.released_by_sglquant
    )


def test_experts(tmp_path: Path) -> None:
    case, model = CASES["gptq 4 bits sym"], tiny_moe()
    tensors = per_expert(model, case.pack)
    found = load(write(tmp_path, model, tensors, case.config), dtype=torch.float32)
    assert distance(logits(found), logits(model.float())) < CLOSE
    report = quant_compile.report(found)
    assert {line.scheme for line in report.lines if "experts" in line.names[0]} == {"int4.group64+16"}
    assert report.coverage == 1.0


@pytest.mark.parametrize("cut", [False, True])
def test_a_checkpoint_in_16_bits_is_quantized_on_the_way(cut: bool, tmp_path: Path) -> None:
    """Fused experts, or one by one: planes are those that ``compile`` makes of the loaded weights."""
    model = tiny_moe()
    tensors = (
        per_expert(model, lambda name, w: ({"weight": w.to(torch.bfloat16)}, w)) if cut else dict(model.state_dict())
    )
    found = load(write(tmp_path, model, tensors, None), "W8A16")
    wanted = quant_compile.compile(model.requires_grad_(False), "W8A16")
    assert distance(logits(found), logits(wanted)) < CLOSE_CODES
    parameters = dict(wanted.named_parameters())
    for name, parameter in found.named_parameters():
        ours, theirs = STORE.peek(parameter), STORE.peek(parameters[name])
        if ours is not None and ours.packs:
            assert theirs is not None
            pairs = zip(
                next(iter(ours.packs.values())).slab.planes, next(iter(theirs.packs.values())).slab.planes, strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs), name
    report = quant_compile.report(found)
    assert report.coverage == 1.0 and any("quantized as it was read" in line.reason for line in report.lines)


def test_a_policy_for_what_is_left(tmp_path: Path) -> None:
    case = CASES["ct packed 4 sym"]
    folder = quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config)
    found = load(folder, {"default": "keep", "rules": [{"match": "lm_head", "scheme": "W8A16"}]})
    logits(found)
    schemes = {line.names[0]: line.scheme for line in quant_compile.report(found).lines}
    assert schemes["lm_head.weight"] == "W8A16" and schemes["model.layers.0.mlp.up_proj.weight"] == "int4.group64+16"


def test_a_memory_limit_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    case = CASES["ct packed 4 sym"]
    folder = quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config)
    with pytest.raises(OptionError, match="max_memory"):
        load(folder, max_memory=1000)


def test_a_load_that_fails_leaves_nothing(tmp_path: Path) -> None:
    case, before = CASES["gptq 4 bits sym"], len(STORE)

    def pack(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, values = case.pack(name, w)
        if name.endswith("1.mlp.down_proj"):
            tensors["scales"] = torch.full_like(tensors["scales"], float("nan"))
        return tensors, values

    folder = quantized(tmp_path, tiny_llama(), pack, case.config)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.scales"):
        load(folder)
    import gc

    gc.collect()
    assert len(STORE) <= before


def test_inspect_shows_what_a_checkpoint_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["ct packed 3 asym"]
    folder = quantized(tmp_path, tiny_llama(), case.pack, case.config)
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "layers.*.mlp.up_proj" in shown and "int4.group64.asym+16" in shown and "3-bit" in shown
    (folder / "model.safetensors").write_bytes(b"short")
    assert cli.main(["inspect", str(folder)]) == 1
    assert "too few" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1000000000"),
        ({"num_labels": 1 << 40}, "says num_labels"),
        ({"head_dim": 1 << 40}, "makes the model compute"),
        ({"hidden_size": "large"}, "transformers cannot build"),
        ({"architectures": [3, "pipeline"], "model_type": "no-such"}, "no-such"),
        ({"dtype": 7}, "dtype"),
        ({"configuration_files": ["../config.1.0.0.json"]}, "no path in a config is opened"),
    ],
)
def test_a_config_that_no_model_has_is_an_error_before_one_is_built(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = tiny_llama(layers=1)
    folder = write(tmp_path, model, dict(model.state_dict()), None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=words) as raised:
        load(folder, "W8A16")
    assert "config.json" in str(raised.value) and "Fix:" in str(raised.value)


def test_code_that_a_config_names_is_neither_run_nor_asked_about(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    folder = write(tmp_path, model, dict(model.state_dict()), None)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    for kind in ("llama", "no-such"):
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": code, "model_type": kind}))
        if kind == "llama":
            assert plan_of(folder, "W8A16").outcomes
        else:
            with pytest.raises(CheckpointError, match=r"config\.json"):
                plan_of(folder, "W8A16")
    assert not (tmp_path / "sprung").exists()


def test_a_generation_config_that_cannot_be_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    folder = write(tmp_path, model, dict(model.state_dict()), None)
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        plan_of(folder, "W8A16")


@pytest.mark.parametrize("name", ["gptq desc_act", "awq"])
def test_restoring_original_values(name: str, tmp_path: Path) -> None:
    """Possible, unless an input is reordered for the planes: then it is refused before anything changes."""
    original, case = tiny_llama(layers=1), CASES[name]
    model = quant_compile.load(quantized(tmp_path, tiny_llama(layers=1), case.pack, case.config), device="cpu")
    if name == "awq":
        assert quant_compile.restore(model, original) == 7
        weight = model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
        assert torch.equal(weight.detach(), original.model.layers[0].mlp.up_proj.weight)  # type: ignore[union-attr, index]
        return
    with pytest.raises(StaleWeightError, match="reordered or scaled"):
        quant_compile.restore(model, original)


@pytest.mark.parametrize("name", ["gptq desc_act", "modelopt int4 awq"])
def test_siblings_whose_inputs_are_changed_alike_merge(name: str, tmp_path: Path) -> None:
    """q, k and v in one order, or with one factor, are one product; what was saved from them as well."""
    case = CASES[name]

    def alike(module: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        made, values = case.pack(module, w)
        if not name.startswith("modelopt"):
            return made, values
        factor = torch.linspace(0.5, 2, w.shape[1]).bfloat16()
        return {**made, "pre_quant_scale": factor}, values * factor.float()

    model = tiny_llama(layers=1)
    found = load(quantized(tmp_path / "source", model, alike, case.config), dtype=torch.float32)
    assert distance(logits(found), logits(model.float())) < CLOSE
    quant_compile.save(found, tmp_path / "packed", "packed")
    again = load(tmp_path / "packed", dtype=torch.float32)
    for each in (found, again):
        logits(each)
        slabs = {path: slabs_of(each)[f"{path}.weight"] for path in linears(each)}
        for first, *others in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            one = next(planes for path, (_, planes) in slabs.items() if path.endswith(first))
            for other in others:
                same = next(planes for path, (_, planes) in slabs.items() if path.endswith(other))
                assert all(a is b for a, b in zip(one, same, strict=True)), (first, other)
