"""``save``: what is written loads again to the bit, in this package and in others; a folder is replaced whole or not at all."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import quant_compile
from quant_compile import cli, saving
from quant_compile.checkpoints import write as writing
from quant_compile.checkpoints.compressed_tensors_writer import divisor
from quant_compile.checkpoints.errors import CheckpointError, SaveError
from quant_compile.checkpoints.fill import scale_input
from quant_compile.checkpoints.write import Item, Job
from quant_compile.ir.errors import OptionError, WeightError
from quant_compile.ir.scheme import parse
from quant_compile.lowering.registry import layouts
from quant_compile.lowering.weights import STORE
from quant_compile.pretrained import plan_of
from tests.checkpoints.packers import CASES
from tests.checkpoints.support import distance, linears, logits, quantized, tiny_gpt_oss, tiny_llama, tiny_moe, write
from tests.checkpoints.test_names import filled

Make = Callable[[], nn.Module]
TOKENS = torch.arange(24)[None]


def weights(
    bits: int, strategy: str, symmetric: bool = True, group: int | None = None, kind: str = "int"
) -> dict[str, Any]:
    made = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric}
    return made if group is None else {**made, "group_size": group}


INT8_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
# name -> (preset or scheme, format); of presets with scales of inputs, calibrated ones.
SCHEMES: dict[str, tuple[str | dict[str, Any], str]] = {
    "W8A8": ("W8A8", "int-quantized"),
    "W8A8_STATIC": ("W8A8_STATIC", "int-quantized"),
    "W8A16": ("W8A16", "pack-quantized"),
    "W4A16": ("W4A16", "pack-quantized"),
    "W4A16_ASYM": ("W4A16_ASYM", "pack-quantized"),
    "W4A16 channel": ({"weights": weights(4, "channel")}, "pack-quantized"),
    "W4A16 channel asym": ({"weights": weights(4, "channel", False)}, "pack-quantized"),
    "W4A16 group 32 asym": ({"weights": weights(4, "group", False, 32)}, "pack-quantized"),
    "W4A8": ("W4A8", "int-quantized"),
    "W4A8 channel": ({"weights": weights(4, "channel"), "input_activations": INT8_TOKENS}, "int-quantized"),
    "W4AFP8": ("W4AFP8", "pack-quantized"),
    "FP8": ("FP8", "float-quantized"),
    "FP8_DYNAMIC": ("FP8_DYNAMIC", "float-quantized"),
    "FP8_TENSOR_DYNAMIC": ("FP8_TENSOR_DYNAMIC", "float-quantized"),
    "FP8_BLOCK": ("FP8_BLOCK", "float-quantized"),
    "FP8 weights": ({"weights": weights(8, "channel", kind="float")}, "float-quantized"),
    "FP8 weights, channels by tokens": (
        {"weights": weights(8, "tensor", kind="float"), "input_activations": FP8_TOKENS},
        "float-quantized",
    ),
    "NVFP4_STATIC": ("NVFP4_STATIC", "nvfp4-pack-quantized"),
    "NVFP4A16": ("NVFP4A16", "nvfp4-pack-quantized"),
    "MXFP4": ("MXFP4", "mxfp4-pack-quantized"),
    "MXFP4A16": ("MXFP4A16", "mxfp4-pack-quantized"),
}
DENSE = list(SCHEMES)
MOE = [
    "W8A8",
    "W8A16",
    "W4A16",
    "W4A16 group 32 asym",
    "W4A8",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4_STATIC",
    "MXFP4A16",
]


def policy_of(name: str, folder: Path, model: nn.Module) -> Any:
    scheme = SCHEMES[name][0]
    if isinstance(scheme, str) and parse(scheme).static:
        return quant_compile.calibrate(
            model, [{"input_ids": TOKENS}], scheme, path=folder / "scales.safetensors", progress=False
        )
    return scheme if isinstance(scheme, str) else {"version": 1, "default": scheme}


def compiled(make: Make, policy: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[nn.Module, Tensor]:
    """A model that has run, and its logits."""
    model = make().requires_grad_(False)
    if dtype == torch.float32:
        model = model.float()  # in bf16 it is; to(bf16) would round its rotary frequencies, which are in no checkpoint
    model.config.dtype = dtype  # type: ignore[union-attr]
    quant_compile.compile(model, policy if not callable(policy) else policy(model), **options)
    return model, logits(model)


def planes_of(model: nn.Module) -> dict[str, list[tuple[Tensor, ...]]]:
    """Row-form planes of every weight that has some, of each expert, and the scales of their inputs."""
    out: dict[str, list[tuple[Tensor, ...]]] = {}
    for name, parameter in model.named_parameters():
        key = STORE.held(parameter)
        if key is None:
            continue
        experts = range(parameter.shape[0]) if parameter.dim() == 3 else (None,)
        out[name] = [STORE.logical(parameter, key, name, expert) for expert in experts]
        scale = STORE.entry(parameter).input_scale
        out[name] += [(scale,)] if scale is not None else []
    return out


def assert_equal(ours: dict[str, list[tuple[Tensor, ...]]], theirs: dict[str, list[tuple[Tensor, ...]]]) -> None:
    assert set(ours) == set(theirs) and ours
    for name in ours:
        for own, other in zip(ours[name], theirs[name], strict=True):
            for a, b in zip(own, other, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape, name
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def load(folder: Path, **options: Any) -> nn.Module:
    return quant_compile.load(folder, device="cpu", **options)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def accepted(config: dict[str, Any]) -> Any:
    """The config as compressed-tensors itself reads it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(config)


CASES_OF = [
    *[(name, "dense", torch.float32 if i % 2 else torch.bfloat16, i % 3 == 0) for i, name in enumerate(DENSE)],
    *[(name, "moe", torch.bfloat16 if i % 2 else torch.float32, i % 3 == 1) for i, name in enumerate(MOE)],
]


@pytest.mark.parametrize(("name", "kind", "dtype", "released"), CASES_OF)
def test_round_trip(name: str, kind: str, dtype: torch.dtype, released: bool, tmp_path: Path) -> None:
    """Equal codes, scales and logits; planes of values that are there are those that a kernel's layout unpacks to."""
    make = tiny_moe if kind == "moe" else partial(tiny_llama, layers=1)
    model, wanted = compiled(make, partial(policy_of, name, tmp_path), dtype, release_weights=released)
    planes = planes_of(model)
    saved = quant_compile.save(model, tmp_path / "saved")
    assert sum(saved.schemes.values()) == len(planes) and saved.files == 1
    if not released:
        quant_compile.release(model)
        assert_equal(planes_of(model), planes)
    config = config_of(tmp_path / "saved")
    assert {group["format"] for group in config["config_groups"].values()} == {SCHEMES[name][1]}
    assert accepted(config).format == SCHEMES[name][1]
    found = load(tmp_path / "saved")
    assert_equal(planes_of(found), planes)
    assert torch.equal(logits(found), wanted)
    assert quant_compile.report(found).coverage == 1.0


def test_a_loaded_model_is_saved_as_it_was_loaded(tmp_path: Path) -> None:
    """Without a call, and after one, when planes lie in a kernel's layout."""
    model, wanted = compiled(tiny_moe, "W4A16")
    quant_compile.save(model, tmp_path / "one")
    found = load(tmp_path / "one")
    quant_compile.save(found, tmp_path / "two")
    assert torch.equal(logits(found), wanted)
    quant_compile.save(found, tmp_path / "three")
    for folder in ("two", "three"):
        for file in (tmp_path / "one").iterdir():
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_wrapped_model_and_its_generation_config(tmp_path: Path) -> None:
    model = tiny_llama(layers=1).requires_grad_(False)
    model.generation_config.max_new_tokens = 7  # type: ignore[union-attr]
    quant_compile.compile(model, "W8A8")
    wanted = logits(model)
    quant_compile.save(torch.nn.DataParallel(model), tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written["max_new_tokens"] == 7 and "disable_compile" not in written
    assert model.generation_config.disable_compile is True  # type: ignore[union-attr]
    found = load(tmp_path / "saved")
    assert found.generation_config.max_new_tokens == 7  # type: ignore[union-attr]
    assert torch.equal(logits(found), wanted)


# --- names, kinds of models, and mixed policies ---


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as safetensors' own reader has it."""
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            out |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return out


def tiny_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        num_local_experts=4, dtype="bfloat16", initializer_range=0.05, max_position_embeddings=128,
    )  # fmt: skip
    return MixtralForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("experts", ["W8A16", "keep"])
def test_names_are_those_that_transformers_writes(experts: str, tmp_path: Path) -> None:
    """Mixtral's files say block_sparse_moe, w1, w3 and w2; the model does not."""
    plain = tiny_mixtral()
    plain.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    policy = {"version": 1, "default": "W8A16", "rules": [{"kind": "moe", "match": "*", "scheme": experts}]}
    model, wanted = compiled(tiny_mixtral, policy)
    quant_compile.save(model, tmp_path / "ours")
    theirs, ours = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    stems = {name.rpartition(".")[0] for name in ours}
    assert stems == {name.rpartition(".")[0] for name in theirs}
    assert any("block_sparse_moe.experts.3.w3" in name for name in ours)
    kept = set(ours) & set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    assert any(".experts." in name for name in kept) == (experts == "keep")
    assert torch.equal(logits(load(tmp_path / "ours")), wanted)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "minimax", "jamba", "qwen3_next", "t5", "qwen2_5_vl"])
def test_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are called as transformers' own files call them, shared experts, vision towers and tied tables included."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    models = importlib.import_module("family_models")
    model = models.tiny(family).make().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs", policy="W8A16")
    quant_compile.save(loaded, tmp_path / "ours")
    assert_equal(planes_of(load(tmp_path / "ours")), planes_of(loaded))
    theirs, ours = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    packed = {name.removesuffix("_packed") for name in ours if name.endswith(".weight_packed")}
    assert packed and packed | (set(ours) & set(theirs)) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in set(ours) & set(theirs))


@pytest.mark.parametrize("scheme", ["W8A16", "MXFP4A16", "keep"])
def test_gpt_oss(scheme: str, tmp_path: Path) -> None:
    """Biases, transposed experts, and gate and up in alternation; kept experts stay as transformers stores them."""
    policy = {"version": 1, "default": "W8A16", "rules": [{"kind": "moe", "match": "*", "scheme": scheme}]}
    model, wanted = compiled(tiny_gpt_oss, policy, release_weights=scheme == "W8A16")
    quant_compile.save(model, tmp_path / "saved")
    names = set(tensors_in(tmp_path / "saved"))
    block = "model.layers.0.mlp.experts"
    assert (f"{block}.gate_up_proj" in names) == (f"{block}.gate_up_proj_bias" in names) == (scheme == "keep")
    assert (f"{block}.3.up_proj.bias" in names) == (f"{block}.3.up_proj.weight_packed" in names) == (scheme != "keep")
    found = load(tmp_path / "saved")
    if scheme != "keep":
        assert_equal(planes_of(found), planes_of(model))
    assert torch.equal(logits(found), wanted)


def test_several_schemes(tmp_path: Path) -> None:
    """Each group names its modules; what is kept is ignored by name, with the modules that other libraries take for linears."""
    channel = {"weights": weights(4, "channel", False)}
    rules = [
        {"match": "re:.*layers\\.1\\..*", "scheme": "W4A16"},
        {"match": "*.down_proj", "scheme": channel},
        {"match": "*.o_proj", "scheme": "keep"},
        {"match": "lm_head", "scheme": "W8A16"},
    ]
    model, wanted = compiled(tiny_llama, {"version": 1, "default": "FP8_DYNAMIC", "rules": rules})
    saved = quant_compile.save(model, tmp_path / "saved")
    assert saved.schemes == {"FP8_DYNAMIC": 5, "int4.channel.asym+16": 1, "W4A16": 7, "W8A16": 1}
    config = config_of(tmp_path / "saved")
    assert config["format"] == "mixed-precision" and config["ignore"] == ["model.layers.0.self_attn.o_proj"]
    assert len(config["config_groups"]) == 4 and accepted(config).config_groups
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert "re:^model\\.layers\\.1\\.mlp\\.down_proj$" in targets and "Linear" not in targets
    found = load(tmp_path / "saved")
    assert_equal(planes_of(found), planes_of(model))
    assert torch.equal(logits(found), wanted)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model, wanted = compiled(partial(tiny_llama, 1, tied=True), "W8A8")
    quant_compile.save(model, tmp_path / "saved")
    assert "lm_head.weight" not in tensors_in(tmp_path / "saved")
    assert config_of(tmp_path / "saved")["ignore"] == ["lm_head"]
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = compiled(tiny_moe, "W8A8")
    monkeypatch.setattr(saving, "shards_of", partial(writing.shards_of, largest=100_000))
    saved = quant_compile.save(model, tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) == saved.files > 5 and names[0] == f"model-00001-of-{saved.files:05d}.safetensors"
    assert set(index["weight_map"]) == set(tensors_in(tmp_path / "saved"))
    assert index["metadata"]["total_size"] == saved.nbytes
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)


def test_a_shard_is_what_safetensors_reads(tmp_path: Path) -> None:
    """Odd sizes, numbers without dimensions, nothing at all, and a dtype that turned out wider; every tensor is aligned."""
    tensors = {
        "a": torch.arange(5, dtype=torch.int8), "b": torch.tensor(2.0), "c": torch.empty(0, 3), "d": torch.arange(7.0).bfloat16(),
        "e": torch.tensor([3.0], dtype=torch.float64), "f": torch.arange(16.0).reshape(4, 4).t(), "g": torch.tensor([1, 2]),
        "h": torch.arange(8.0).to(torch.float8_e4m3fn),
    }  # fmt: skip
    items = tuple(Item(n, torch.float32 if n == "e" else t.dtype, tuple(t.shape)) for n, t in tensors.items())
    assert writing.write_shard(
        tmp_path / "x.safetensors", [Job(items[:4], lambda: tensors), Job(items[4:], lambda: tensors)]
    )
    found = tensors_in(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name
    head = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(head[:8], "little")
    header = json.loads(head[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_divisor_gives_its_scale_back() -> None:
    """A third of all f32 scales are the reciprocal of no f32 number; in f64 every one is."""
    scales = torch.rand(3000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-6, 0).repeat(500)
    made = [divisor(scale.reshape(1)) for scale in scales]
    back = torch.cat([d.reciprocal().float() for d in made])
    assert torch.equal(back, scales)
    wide = sum(d.dtype == torch.float64 for d in made)
    assert 0 < wide < len(made) / 2


# --- other libraries ---


def _others() -> Iterator[tuple[str, str]]:
    """int8 and NVFP4 experts are left out: transformers 5.24 does not load those of llm-compressor's own checkpoints either."""
    yield from ((name, "dense") for name in DENSE)
    yield from (("W4A16", "moe"), ("FP8_DYNAMIC", "moe"))


@pytest.mark.parametrize(("name", "kind"), list(_others()))
def test_transformers_loads_the_same_weights(name: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    make = tiny_moe if kind == "moe" else partial(tiny_llama, layers=1)
    write(tmp_path / "source", (plain := make()), dict(plain.state_dict()), None)
    model = quant_compile.load(tmp_path / "source", policy_of(name, tmp_path, plain), device="cpu")
    quant_compile.save(model, tmp_path / "saved")
    ours = filled(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    found = dict(theirs.named_parameters(remove_duplicate=False))
    assert set(found) == set(ours)
    for full, values in ours.items():
        assert torch.equal(found[full].detach(), values.to(torch.bfloat16)), full


# --- errors, before anything is written ---


REFUSED = {
    "NVFP4": ("NVFP4", "NVFP4_STATIC"),
    "QServe": ("QSERVE_W4A8_GROUP", "zero points"),
    "e5m2": ("FP8_E5M2_DYNAMIC", "e4m3"),
    "groups": (
        {"version": 1, "default": "keep", "rules": [{"match": "*.down_proj", "scheme": "W4A16"}]},
        "groups of 128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_cannot_express(name: str, tmp_path: Path) -> None:
    policy, why = REFUSED[name]

    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=320,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=96,
            dtype="bfloat16",
        )
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()

    model, wanted = compiled(make, policy)
    with pytest.raises(SaveError, match=why) as caught:
        quant_compile.save(model, tmp_path / "saved")
    assert "model.layers.0.mlp.down_proj.weight" in str(caught.value)
    assert not list(tmp_path.iterdir())
    _, _, fix = str(caught.value).partition("Fix: ")
    assert fix.startswith('quant_compile.save(model, folder, "packed")')
    quant_compile.save(model, tmp_path / "saved", "packed")
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)


def test_a_head_that_is_tied_and_quantized(tmp_path: Path) -> None:
    policy = {"version": 1, "default": "W8A8", "rules": [{"match": "lm_head", "scheme": "W8A16"}]}
    model, _ = compiled(partial(tiny_llama, 1, tied=True), policy)
    with pytest.raises(SaveError, match="table of an embedding") as caught:
        quant_compile.save(model, tmp_path / "saved")
    assert "packed" not in str(caught.value)  # refuses it as well


def test_an_input_in_another_order(tmp_path: Path) -> None:
    case = CASES["gptq desc_act"]
    model = load(quantized(tmp_path / "gptq", tiny_llama(layers=1), case.pack, case.config))
    with pytest.raises(SaveError, match=r'reordered(.|\n)*Fix: .*"packed"'):
        quant_compile.save(model, tmp_path / "saved")
    quant_compile.save(model, tmp_path / "saved", "packed")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_linears_that_store_columns(tmp_path: Path) -> None:
    """GPT-2's Conv1D has no place in compressed-tensors; ``packed`` keeps it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> nn.Module:
        config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=128, dtype="bfloat16")
        return GPT2LMHeadModel._from_config(config, dtype=torch.bfloat16).eval()

    model, wanted = compiled(make, "W8A8")
    with pytest.raises(SaveError, match=r'Conv1D(.|\n)*Fix: .*"packed"'):
        quant_compile.save(model, tmp_path / "saved")
    quant_compile.save(model, tmp_path / "saved", "packed")
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)


def test_models_that_are_not_compiled_or_were_never_called(tmp_path: Path) -> None:
    model = tiny_llama(layers=1).requires_grad_(False)
    with pytest.raises(SaveError, match="not compiled"):
        quant_compile.save(model, tmp_path / "saved")
    quant_compile.compile(model, "W8A8")
    with pytest.raises(SaveError, match="never been called"):
        quant_compile.save(model, tmp_path / "saved")
    with pytest.raises(OptionError, match="compressed-tensors"):
        quant_compile.save(model, tmp_path / "saved", "marlin")
    with pytest.raises(OptionError, match="ends in"):
        quant_compile.save(model, tmp_path / "saved", "gguf")
    bare = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(SaveError, match="no config"):
        quant_compile.save(bare, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_policy_that_no_call_has_seen_yet(tmp_path: Path) -> None:
    """The planes are still those of the policy before."""
    model, wanted = compiled(partial(tiny_llama, layers=1), "W8A8")
    quant_compile.compile(model, "W8A16")
    with pytest.raises(SaveError, match=r"compiled with W8A16 and has not been called since: .* is in W8A8"):
        quant_compile.save(model, tmp_path / "saved")
    assert not torch.equal(logits(model), wanted)
    assert quant_compile.save(model, tmp_path / "saved").schemes == {"W8A16": 7}
    quant_compile.compile(model, "W8A8")
    assert torch.equal(logits(model), wanted)
    assert quant_compile.save(model, tmp_path / "saved").schemes == {"W8A8": 7}


def test_weights_that_no_call_has_read_are_told(tmp_path: Path) -> None:
    """Only the decoder ran: the head, which a rule names, is written as it is."""
    model = tiny_llama(layers=1).requires_grad_(False)
    policy = {"version": 1, "default": "W8A8", "rules": [{"match": "lm_head", "scheme": "W8A8"}]}
    quant_compile.compile(model, policy)
    logits(model)
    head = model.lm_head  # type: ignore[union-attr]
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="no call has quantized.*lm_head.weight"):
        quant_compile.save(model, tmp_path / "saved")
    assert "lm_head" in config_of(tmp_path / "saved")["ignore"]


def test_nvfp4_siblings_with_scales_of_their_own_are_told(tmp_path: Path) -> None:
    """vLLM would run them under one; where they share it, as in llm-compressor's files, there is nothing to tell."""
    model = tiny_llama(layers=1)
    source = write(tmp_path / "source", model, dict(model.state_dict()), None)
    with pytest.warns(UserWarning, match=r"global scales of .*q_proj and .*k_proj and .*v_proj differ"):
        quant_compile.save(load(source, policy="NVFP4A16"), tmp_path / "saved")
    for linear in linears(model).values():
        linear.weight.data[0, 0] = 1.0  # the largest of each
    source = write(tmp_path / "same", model, dict(model.state_dict()), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not quant_compile.save(load(source, policy="NVFP4A16"), tmp_path / "saved").notes


def test_planes_that_do_not_unpack_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compiled(partial(tiny_llama, layers=1), "W4A16", release_weights=True)
    (tmp_path / "saved").mkdir()
    key = STORE.held(model.model.layers[0].mlp.down_proj.weight)  # type: ignore[union-attr, index]
    assert key is not None
    layout = layouts()[key.layout]
    monkeypatch.setitem(layouts(), key.layout, type(layout)(**{**vars(layout), "exact": lambda planes: False}))
    with pytest.raises(WeightError, match="do not unpack"):
        quant_compile.save(model, tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir()) and len(list(tmp_path.iterdir())) == 1


def test_swizzled_nvfp4_siblings_know_that_they_are_inexact() -> None:
    from quant_compile.lowering.registry import Problem

    layout = layouts()["nvfp4_swizzled"]
    scheme = parse("NVFP4")
    problem = Problem(scheme, 128, 64, torch.bfloat16)
    planes = quant_compile.lowering.weights.family_of(scheme).quantize_weight(torch.randn(128, 64), scheme)
    assert layout.exact(layout.pack(planes, problem))
    mixed = (*planes[:2], torch.cat((planes[2][:64], planes[2][64:] * 1.37)))
    assert not layout.exact(layout.pack(mixed, problem))


# --- folders ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    model = tiny_llama(layers=1)
    folder = write(tmp_path_factory.mktemp("plain"), model, dict(model.state_dict()), None)
    return load(folder, policy="W8A8")


def test_places_that_are_no_checkpoints(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "notes.txt").write_text("mine")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "config.json").write_text("{}")
    (tmp_path / "nested" / ".git").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name, why in (("file", "is a file"), ("home", "no config.json"), ("nested", ".git"), ("link", "is a link")):
        with pytest.raises(SaveError, match=why):
            quant_compile.save(small, tmp_path / name)
    assert (tmp_path / "home" / "notes.txt").read_text() == "mine" and (tmp_path / "nested" / ".git").is_dir()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_is_found_before_anything_is_written(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1234, 1234))  # type: ignore[attr-defined]
    with pytest.raises(SaveError, match=r"needs [\d,]+ bytes, and 1,234 are free"):
        quant_compile.save(small, tmp_path / "deep" / "saved")
    assert not list(tmp_path.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _failing(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


STEPS: dict[str, tuple[Any, str]] = {
    "the second shard": (writing, "write_shard"),
    "the index": (writing.json, "dumps"),
    "the configs": (saving, "_write_configs"),
    "a file beside": (shutil, "copyfile"),
    "flushing": (os, "fsync"),
    "taking its place": (writing, "_take_place"),
}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_the_old_folder(
    step: str, old: bool, small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    if old:
        quant_compile.save(small, folder)
        (folder / "README.md").write_text("the old one")
    before = contents(folder) if old else None
    beside = tmp_path / "tokenizer.json"
    beside.write_text("{}")
    monkeypatch.setattr(saving, "shards_of", partial(writing.shards_of, largest=100_000))
    where, name = STEPS[step]
    real, calls = getattr(where, name), iter(range(10_000))
    monkeypatch.setattr(
        where, name, lambda *a, **k: _failing() if step != "the second shard" or next(calls) else real(*a, **k)
    )
    with pytest.raises(KeyboardInterrupt):
        quant_compile.save(small, folder, beside=[beside])
    monkeypatch.undo()
    assert (contents(folder) if folder.exists() else None) == before
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", *(["saved"] if old else [])}
    quant_compile.save(small, folder, beside=[beside])
    assert "README.md" not in contents(folder) and contents(folder)["tokenizer.json"] == b"{}"
    assert len(list(tmp_path.iterdir())) == 2


def test_where_folders_cannot_be_exchanged(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder is moved away, and back if the new one cannot be moved to its place."""
    folder = tmp_path / "saved"
    quant_compile.save(small, folder)
    (folder / "README.md").write_text("the old one")
    monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    real = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, to: _failing() if self.name.startswith(".") and not self.name.endswith(".old") else real(self, to),
    )
    with pytest.raises(KeyboardInterrupt):
        quant_compile.save(small, folder)
    assert (folder / "README.md").read_text() == "the old one" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(Path, "rename", real)
    quant_compile.save(small, folder)
    assert not (folder / "README.md").exists() and len(list(tmp_path.iterdir())) == 1


# Told "name moment": forks a process that saves or converts, and kills it that many seconds after its start, or, where the moment begins
# with "w", after its folder has appeared; "inf" lets it end. Answers with seconds until the folder and until the end, and the exit code.
_KILLS = """
import glob, os, signal, sys, time
import torch
import quant_compile
from quant_compile import cli
torch.set_num_threads(1)
source, target = sys.argv[1:]
model = quant_compile.load(source, "W4A16", device="cpu", progress=False)
steps = {
    "save": lambda: quant_compile.save(model, target),
    "convert": lambda: sys.exit(cli.main(["convert", source, target, "--policy", "W4A16"])),
}
folder = os.path.join(os.path.dirname(target), "." + os.path.basename(target) + ".saving-*")
print("ready", flush=True)
for line in sys.stdin:
    name, moment = line.split()
    for left in glob.glob(folder):
        os.rename(left, os.path.join(os.path.dirname(target), "left-%d" % time.monotonic_ns()))
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(2, 1)
            steps[name]()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    writing, ended, status = None, 0, 0
    while not ended:
        now = time.monotonic()
        if writing is None and glob.glob(folder):
            writing = now
        start = writing if moment.startswith("w") else began
        if start is not None and now - start >= float(moment.lstrip("w")):
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
        else:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.0005)
    print((writing or now) - began, time.monotonic() - began, os.waitstatus_to_exitcode(status), flush=True)
"""


class Killer:
    """A process that has imported everything, and forks those that are killed."""

    def __init__(self, source: Path, target: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(quant_compile.__file__).parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _KILLS, str(source), str(target)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def run(self, name: str, moment: str) -> tuple[float, float, int]:
        """Seconds until the folder, seconds until the end, exit code."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{name} {moment}\n")
        self.process.stdin.flush()
        writing, ended, code = self.process.stdout.readline().split()
        return float(writing), float(ended), int(code)

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Killer, Path, dict[str, bytes]]]:
    """With the place to save to, and the old folder's contents."""
    place, model = tmp_path_factory.mktemp("killed"), tiny_llama()
    source = write(place / "source", model, dict(model.state_dict()), None)
    quant_compile.save(load(source, policy="W8A8"), place / "old")
    made = Killer(source, place / "saved")
    yield made, place, contents(place / "old")
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["save", "convert"])
def test_kill_9_leaves_the_old_folder_or_the_new_one(name: str, killer: tuple[Killer, Path, dict[str, bytes]]) -> None:
    """Twenty moments all over the operation, and ten of the part that writes."""
    process, place, old = killer
    target, chance = place / "saved", random.Random(name)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(place / "old", target)
    runs = [process.run(name, "inf") for _ in range(2)]
    assert all(code == 0 for _, _, code in runs)
    new = contents(target)
    assert new != old and plan_of(target).outcomes
    writing, whole = max(begun for begun, _, _ in runs), max(ended for _, ended, _ in runs)
    moments = [str((i + chance.random()) / 20 * whole) for i in range(20)]
    moments += [f"w{(i + chance.random()) / 10 * (whole - writing)}" for i in range(10)]
    killed = seen_old = 0
    for moment in chance.sample(moments, len(moments)):
        if contents(target) != old:
            shutil.rmtree(target)
            shutil.copytree(place / "old", target)
        _, _, code = process.run(name, moment)
        assert code in (0, -signal.SIGKILL), moment
        found = contents(target)
        assert found in (old, new), moment
        killed, seen_old = killed + (code != 0), seen_old + (found == old)
    left = [path for path in place.iterdir() if path.name.startswith(("left-", ".saved.saving-"))]
    assert killed >= 8 and seen_old >= 5 and left, "too few were interrupted"
    print(
        f"{name}: {killed} killed of {len(moments)}, {seen_old} old; {whole:.2f} s, of which {whole - writing:.2f} write"
    )


# --- convert ---


def test_convert_quantizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The planes that compiling the model makes; a tokenizer and the generation config go along, calibrated scales too."""
    model = tiny_moe().requires_grad_(False)
    source = write(tmp_path / "source", model, dict(model.state_dict()), None)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "training.log"):
        (source / name).write_text('{"eos_token_id": 5}' if name.startswith("gen") else "{}")
    policy = quant_compile.calibrate(
        model, [{"input_ids": TOKENS}], "FP8", path=tmp_path / "scales.safetensors", progress=False
    )
    policy.save(tmp_path / "policy.yaml")
    assert cli.main(["convert", str(source), str(tmp_path / "saved"), "--policy", str(tmp_path / "policy.yaml")]) == 0
    text = capsys.readouterr().out
    assert "6 weights in FP8" in text and "1 file" in text
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {
        "tokenizer.json",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    } <= files and "training.log" not in files
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == 5
    quant_compile.compile(model, policy)
    wanted = logits(model)
    found = load(tmp_path / "saved")
    assert_equal(planes_of(found), planes_of(model))
    assert torch.equal(logits(found), wanted)


@pytest.mark.parametrize(
    "name", ["awq", "gptq 4 bits sym", "ct nvfp4", "modelopt fp8", "modelopt w4a8 awq", "deepseek", "torchao fp8"]
)
def test_convert_takes_codes_over(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = quantized(tmp_path / "source", tiny_llama(layers=1), case.pack, case.config)
    assert cli.main(["convert", str(source), str(tmp_path / "saved")]) == 0
    found, wanted = load(tmp_path / "saved"), load(source)
    assert_equal(planes_of(found), planes_of(wanted))
    assert len(planes_of(found)) == len(linears(tiny_llama(layers=1)))


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, tied=True), tiny_moe], ids=["tied", "experts"])
def test_convert_that_keeps_every_weight_writes_16_bits(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that anyone reads: the same tensors, no quantization in its config."""
    from transformers import AutoModelForCausalLM

    model = make()
    model.save_pretrained(tmp_path / "source")  # type: ignore[operator]
    (tmp_path / "keep.yaml").write_text("default: keep\n")
    arguments = ["convert", str(tmp_path / "source"), str(tmp_path / "saved"), "--policy", str(tmp_path / "keep.yaml")]
    assert cli.main(arguments) == 0
    assert "nothing is quantized" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(plain[name], value) for name, value in model.state_dict().items())
    assert cli.main([*arguments[:2], str(tmp_path / "packed"), *arguments[3:], "--format", "packed"]) == 0
    assert torch.equal(logits(load(tmp_path / "packed")), logits(load(tmp_path / "saved", policy={"default": "keep"})))


def test_convert_dequantizes_a_checkpoint(tmp_path: Path) -> None:
    case, truth = CASES["gptq desc_act"], tiny_llama(layers=1)
    source = quantized(tmp_path / "source", truth, case.pack, case.config)
    saved = saving.convert(source, tmp_path / "saved", {"default": "keep", "requantize": True})
    assert not saved.schemes and "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    found = load(tmp_path / "saved", policy={"default": "keep"}).state_dict()
    loaded = load(source, policy={"default": "keep", "requantize": True}).state_dict()
    for name, value in truth.state_dict().items():
        assert torch.equal(found[name], loaded[name])
        assert distance(found[name].float(), value.float()) < 4e-3  # the truth's scales are rounded to bf16
    with pytest.raises(SaveError, match=r'factors of its inputs(.|\n)*Fix: .*"packed"'):
        model = quant_compile.compile(tiny_llama(layers=1), {"default": "keep"})
        scale_input(model.model.layers[0].mlp.up_proj, None, torch.ones(256))  # type: ignore[union-attr, index]
        quant_compile.save(model, tmp_path / "other")


def test_convert_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(layers=1)
    source = write(tmp_path / "source", model, dict(model.state_dict()), None)
    for arguments, code, why in (
        ([str(source), str(tmp_path / "saved")], 2, "name a policy"),
        ([str(source), str(tmp_path / "saved"), "--policy", "W9"], 1, "unknown policy"),
        ([str(source), str(tmp_path / "saved"), "--policy", "NVFP4"], 1, "NVFP4_STATIC"),
        ([str(source), str(tmp_path / "saved"), "--policy", "W8A8", "--format", "gguf"], 2, "gguf"),
        ([str(source), str(source / "config.json"), "--policy", "W8A8"], 1, "is a file"),
        ([str(tmp_path / "none"), str(tmp_path / "saved"), "--policy", "W8A8"], 1, "none"),
    ):
        assert cli.main(["convert", *arguments]) == code, arguments
        error = capsys.readouterr().err
        assert why in error and "Traceback" not in error and "--traceback" not in error, error
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_would_not_load_again_is_not_written(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reads what is planned: a scale that readers do not know, or a module that they would leave out, is seen."""
    from quant_compile.checkpoints import compressed_tensors_writer, export

    real = compressed_tensors_writer.tensors_of
    monkeypatch.setattr(export, "tensors_of", lambda *a, **k: {**real(*a, **k), "weight_extra": torch.ones(1)})
    with pytest.raises(SaveError, match="weight_extra"):
        quant_compile.save(small, tmp_path / "saved")
    monkeypatch.undo()
    config = compressed_tensors_writer.quantization_config
    monkeypatch.setattr(
        compressed_tensors_writer, "quantization_config", lambda *a: {**config(*a), "ignore": ["re:.*up_proj"]}
    )
    with pytest.raises(SaveError, match="up_proj"):
        quant_compile.save(small, tmp_path / "saved")
    assert not list(tmp_path.iterdir()) and issubclass(SaveError, ValueError) and CheckpointError is not SaveError
