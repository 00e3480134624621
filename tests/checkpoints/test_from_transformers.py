"""transformers' own ``from_pretrained``: with ``HfConfig`` it is ``load``, and what it loaded quantized is adopted by ``compile``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quant_compile
from quant_compile import CheckpointError, OptionError, PolicyError, ReleasedWeightError, SaveError, StaleWeightError
from quant_compile.lowering.weights import STORE
from tests.checkpoints.packers import CASES
from tests.checkpoints.support import distance, linears, logits, quantized, tiny_llama, tiny_moe, write

compressed_tensors = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


def saved(folder: Path, model: nn.Module) -> Path:
    """As transformers writes it."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def pretrained(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Values of a model, in bytes, which compare in every dtype."""
    return {name: value.clone().reshape(-1).view(torch.uint8) for name, value in model.state_dict().items()}


# --- HfConfig --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, tied=True), tiny_moe], ids=["tied", "experts"])
def test_is_load_under_another_name(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", make())
    policy = {"default": "W8A16", "rules": [{"match": "re:.*self_attn.*", "scheme": "W4A16"}]}
    ours = quant_compile.load(folder, policy, device="cpu")
    theirs = pretrained(folder, quantization_config=quant_compile.HfConfig(policy))
    assert not theirs.training
    for weight in linears(theirs).values():  # before any call: quantized as it was read
        assert STORE.peek(weight.weight).released  # type: ignore[union-attr]
        with pytest.raises(ReleasedWeightError):
            weight.weight + 1
    assert torch.equal(logits(theirs), logits(ours))
    one, two = quant_compile.report(theirs), quant_compile.report(ours)
    assert one.coverage == two.coverage == 1.0
    assert [(x.names, x.scheme, x.released, x.bytes_after) for x in one.lines] == [
        (x.names, x.scheme, x.released, x.bytes_after) for x in two.lines
    ]
    assert any("quantized as it was read" in line.reason for line in one.lines)


def test_dtype_options_and_a_spread_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", tiny_llama(1))
    config = quant_compile.HfConfig("W8A16", release_weights=False)
    found = pretrained(folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})
    assert found.dtype == torch.float32
    assert torch.equal(logits(found), logits(quant_compile.load(folder, "W8A16", device="cpu", dtype="fp32")))
    spread = pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="auto")
    assert any("at the first call" in note for note in quant_compile.report(spread).notes)
    assert torch.equal(logits(spread), logits(found))
    assert not any(line.released for line in quant_compile.report(spread).lines)


def test_wrong_configs_are_errors_before_anything_is_read() -> None:
    with pytest.raises(PolicyError, match="W8A17"):
        quant_compile.HfConfig("W8A17")
    with pytest.raises(OptionError, match="mood"):
        quant_compile.HfConfig("W8A16", mood="fast")
    made = quant_compile.HfConfig({"default": "W8A16", "rules": [{"match": "lm_head", "scheme": "keep"}]})
    again = type(made).from_dict(made.to_dict())
    assert again.policy == made.policy and '"sglquant"' in again.to_json_string()


def test_values_that_cannot_be_quantized(tmp_path: Path) -> None:
    model = tiny_llama(1)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(quant_compile.WeightError, match=r"up_proj.*NaN"):
        pretrained(saved(tmp_path / "m", model), quantization_config=quant_compile.HfConfig("W8A16"))


def test_transformers_registry_knows_ours_and_importing_stays_cheap() -> None:
    text = """
import sys, quant_compile
assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "sglquant" in AUTO_QUANTIZER_MAPPING and not [f for f in sys.meta_path if type(f).__module__.startswith("quant_compile")]
assert AUTO_QUANTIZATION_CONFIG_MAPPING["sglquant"] is quant_compile.HfConfig
"""
    subprocess.run([sys.executable, "-c", text], check=True, cwd=Path(__file__).parents[2])


@compressed_tensors
def test_save_then_plain_from_pretrained_then_compile(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", tiny_llama(1))
    found = pretrained(folder, quantization_config=quant_compile.HfConfig("W4A16"))
    with pytest.raises(SaveError, match=r"quant_compile\.save"):
        found.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    quant_compile.save(found, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"compressed-tensors.*\n.*quant_compile.load\(directory, policy\)"):
        pretrained(tmp_path / "ours", quantization_config=quant_compile.HfConfig("W8A16"))
    plain = pretrained(tmp_path / "ours")
    before = bits(plain)
    with pytest.raises(PolicyError, match="up_proj"):
        quant_compile.compile(plain, {"default": "W8A16", "rules": [{"match": "re:.*up_proj", "scheme": "W8A16"}]})
    assert bits(plain).keys() == before.keys()
    quant_compile.compile(plain, {"default": "W8A16", "rules": [{"match": "lm_head", "scheme": "W8A16"}]})
    logits(plain)
    report = quant_compile.report(plain)
    assert {line.scheme for line in report.lines if line.scheme} == {"W4A16", "W8A16"} and report.coverage == 1.0
    assert sum("that transformers loaded" in line.reason for line in report.lines) == 7
    quant_compile.compile(plain)  # under the checkpoint's own policy, by the same planes
    assert torch.equal(logits(plain), logits(found))
    quant_compile.uncompile(plain)
    after = bits(plain)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # compressed-tensors' hook is back; it rounds dequantized weights to bf16, we multiply by codes times scale
    assert distance(logits(plain), logits(found)) < 2e-2
    quant_compile.compile(plain, "W8A16")
    assert any("has decompressed its weight already" in note for note in quant_compile.report(plain).notes)


@compressed_tensors
@pytest.mark.parametrize("name", ["ct fp8 block", "ct mxfp8"])
def test_every_format_of_compressed_tensors_is_adopted(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = quantized(tmp_path, tiny_llama(1), case.pack, {**case.config, "quantization_status": "compressed"})
    ours, theirs = quant_compile.load(folder, device="cpu"), quant_compile.compile(pretrained(folder))
    assert torch.equal(logits(theirs), logits(ours))
    one, two = quant_compile.report(theirs), quant_compile.report(ours)
    assert one.coverage == two.coverage and one.policy == two.policy
    assert [(x.names, x.scheme) for x in one.lines] == [(x.names, x.scheme) for x in two.lines]
    if case.scheme is None:
        assert any("its values are kept in bfloat16" in line.reason for line in one.lines)


# --- packed -----------------------------------------------------------------------------------------------------------


@compressed_tensors
@pytest.mark.filterwarnings("error::quant_compile.ir.errors.LockWarning")
def test_a_lock_knows_what_transformers_has_loaded(tmp_path: Path) -> None:
    folder, lock = tmp_path / "ours", tmp_path / "l"
    made = pretrained(saved(tmp_path / "m", tiny_llama(1)), quantization_config=quant_compile.HfConfig("W4A16"))
    quant_compile.save(made, folder)
    for _ in range(
        2
    ):  # the first writes it; the second has its integers as buffers of other names until it is compiled
        plain = pretrained(folder)
        before = bits(plain)
        quant_compile.compile(plain, lock=lock)
        logits(plain)
    lines = lock.read_text().splitlines()
    lock.write_text("\n".join([*lines, lines[-1].replace("model.", "nothing."), ""]))
    plain = pretrained(folder)
    with pytest.raises(quant_compile.LockError, match=r"1 weight of the lock is not in the model.*nothing\."):
        quant_compile.compile(plain, {"default": "W8A16", "strict": True}, lock=lock)
    after = bits(plain)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def packed_folder(folder: Path, model: nn.Module, policy: Any = "W8A16") -> tuple[Path, torch.Tensor]:
    """A folder that ``save`` has packed, and the logits of its model."""
    found = logits(quant_compile.compile(model, policy))
    quant_compile.save(model, folder, "packed")
    return folder, found


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, tied=True), tiny_moe], ids=["tied", "experts"])
def test_a_packed_folder_loads_by_its_name(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    folder, found = packed_folder(tmp_path / "m", make())
    model, told = pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    for weight in linears(model).values():
        assert STORE.peek(weight.weight).released  # type: ignore[union-attr]
    assert torch.equal(logits(model), found)
    ours = quant_compile.load(folder, device="cpu")
    logits(ours)
    one, two = quant_compile.report(model), quant_compile.report(ours)
    assert [(x.names, x.scheme, x.reason) for x in one.lines] == [(x.names, x.scheme, x.reason) for x in two.lines]
    assert one.policy == two.policy and one.coverage == 1.0
    assert not model._keys_to_ignore_on_load_unexpected
    assert model.config.quantization_config.to_dict() == {"quant_method": "sglquant", "format": "packed", "version": 1}
    quant_compile.save(model, tmp_path / "again", "packed")
    assert torch.equal(logits(pretrained(tmp_path / "again")), found)


def test_a_packed_folder_of_reordered_inputs(tmp_path: Path) -> None:
    case = CASES["gptq desc_act"]
    made = quant_compile.load(quantized(tmp_path / "gptq", tiny_llama(1), case.pack, case.config), device="cpu")
    found = logits(made)
    quant_compile.save(made, tmp_path / "m", "packed")
    assert torch.equal(logits(pretrained(tmp_path / "m")), found)


def test_a_packed_folder_that_cannot_be_is_an_error_that_names_load(tmp_path: Path) -> None:
    folder, _ = packed_folder(tmp_path / "m", tiny_llama(1))
    with pytest.raises(OptionError, match=r"packed for bfloat16. Fix: from_pretrained without dtype"):
        pretrained(folder, dtype=torch.float32)
    with pytest.raises(OptionError, match=r"packed for one device.*\n.*quant_compile.load\(directory"):
        pretrained(folder, device_map="auto")
    with pytest.raises(CheckpointError, match=r"quantized already \(sglquant\).*\n.*quant_compile.load"):
        pretrained(folder, quantization_config=quant_compile.HfConfig("W8A16"))
    (folder / "sglquant.json").rename(folder / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"has no sglquant.json.*\n.*quant_compile.load\(directory\)"):
        pretrained(folder)


# --- modules that dequantize ------------------------------------------------------------------------------------------


def with_fp8_linears(model: nn.Module, block: tuple[int, int] | None, scheme: str = "dynamic") -> nn.Module:
    """As transformers' FineGrainedFP8 makes a model, on any device."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    for name, linear in linears(model).items():
        made = FP8Linear(linear.in_features, linear.out_features, block, scheme)
        weight = linear.weight.detach().float()
        if block is None:
            scale = weight.abs().max() / 448
            wide = scale
        else:
            grouped = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block[1], 0, -weight.shape[0] % block[0]))
            grouped = grouped.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
            scale = grouped.abs().amax((1, 3)) / 448
            wide = scale.repeat_interleave(block[0], 0)[: weight.shape[0]].repeat_interleave(block[1], 1)
            wide = wide[:, : weight.shape[1]]
        made.weight = nn.Parameter((weight / wide).to(torch.float8_e4m3fn), requires_grad=False)
        made.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made)
    return model.eval()


def test_fp8_linears_run_on_their_own_codes(tmp_path: Path) -> None:
    model = with_fp8_linears(tiny_llama(1), (128, 128))
    before, kinds = bits(model), {name: type(module) for name, module in model.named_modules()}
    codes = model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
    quant_compile.compile(model)
    planes = STORE.peek(model.model.layers[0].mlp.up_proj.weight)  # type: ignore[union-attr, index, arg-type]
    data = next(iter(planes.packs.values())).slab.planes[0]  # type: ignore[union-attr]
    assert data.data_ptr() == codes.data_ptr()  # adopted, not copied
    found = logits(model)
    report = quant_compile.report(model)
    assert {line.scheme for line in report.lines if line.scheme} == {"FP8_BLOCK"} and report.coverage == 1.0
    assert report.policy == "checkpoint (fp8)"

    folder = tmp_path / "same"  # the same tensors, as a checkpoint
    plain = tiny_llama(1)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quant_compile.uncompile(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = bits(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    write(folder, plain, dict(model.state_dict()), config)
    assert load_file(folder / "model.safetensors").keys() == before.keys()
    assert torch.equal(found, logits(quant_compile.load(folder, device="cpu")))


def test_released_fp8_linears_cannot_come_back() -> None:
    model = with_fp8_linears(tiny_llama(1), None)
    quant_compile.compile(model, "FP8_TENSOR_DYNAMIC")
    logits(model)
    assert {line.scheme for line in quant_compile.report(model).lines if line.scheme} == {"FP8_TENSOR_DYNAMIC"}
    assert quant_compile.release(model) > 0
    with pytest.raises(StaleWeightError):
        quant_compile.uncompile(model)
    assert torch.isfinite(logits(model)).all()


class QuantLinear(nn.Module):
    """Of a library that nobody knows: integers in buffers, in an order of the kernel's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 16, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.float().repeat(8, 1)[:64] * self.scales)


class Int8Experts(nn.Module):
    """Experts of such a library."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 64, dtype=torch.int8), requires_grad=False)
        self.gate_up_proj_scale = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_what_stays_is_named() -> None:
    model = nn.Sequential(QuantLinear(), nn.Linear(16, 64), Int8Experts(), QuantLinear()).eval()
    quant_compile.compile(model, "W8A16")
    text = "\n".join(quant_compile.report(model).notes)
    assert "0 and 1 more: stays as transformers loaded it: QuantLinear holds qweight" in text
    assert "2: stays as transformers loaded it: Int8Experts holds gate_up_proj" in text
    assert text.count("quant_compile.load(directory) adopts the integers") == 2
    line = next(line for line in quant_compile.report(model).lines if line.names == ("2.gate_up_proj",))
    assert "Int8Experts holds gate_up_proj" in line.reason and line.scheme is None


def test_weights_that_transformers_has_dequantized_are_named() -> None:
    model = tiny_moe()
    model.config.quantization_config = CASES["ct fp8 channel"].config  # type: ignore[union-attr]
    quant_compile.compile(model, "W8A16")
    (note,) = quant_compile.report(model).notes
    assert note.startswith("the config says compressed-tensors, and no module holds integers")
    with_fp8_linears(model, (128, 128))
    quant_compile.compile(model, "W8A16")
    assert any(
        "experts.gate_up_proj and 1 more: transformers has dequantized" in n for n in quant_compile.report(model).notes
    )


@compressed_tensors
def test_a_model_that_was_dequantized_as_it_was_loaded_says_so(tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    case = CASES["ct fp8 channel"]
    folder = quantized(tmp_path / "ct", tiny_llama(1), case.pack, {**case.config, "quantization_status": "compressed"})
    case = CASES["deepseek"]
    other = quantized(tmp_path / "fp8", tiny_llama(1), case.pack, case.config)
    models = [pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))]
    if not torch.cuda.is_available():  # else its modules are FP8Linear
        models.append(pretrained(other))
    for model in models:
        assert not hasattr(model.config, "quantization_config")
        quant_compile.compile(model, "W8A16")
        (note,) = quant_compile.report(model).notes
        assert "its integers are gone" in note and "quant_compile.load(directory) keeps them" in note
    saved(tmp_path / "bf16", tiny_llama(1))
    for plain in (pretrained(tmp_path / "bf16"), tiny_llama(1)):
        quant_compile.compile(plain, "W8A16")
        assert not quant_compile.report(plain).notes


def test_a_fault_of_a_module_leaves_all_as_they_were() -> None:
    model = with_fp8_linears(tiny_llama(1), (128, 128))
    model.model.layers[0].mlp.down_proj.weight_scale_inv.data[0, 0] = float("nan")  # type: ignore[union-attr, index]
    before, kinds = bits(model), [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_scale_inv holds a scale of nan"):
        quant_compile.compile(model)
    after = bits(model)
    assert [type(module) for module in model.modules()] == kinds
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
