"""Scales of the KV cache in checkpoints: used as they are, the user's word first, kept by both formats, refused where they cannot be."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quant_compile
from quant_compile import cli
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.generation import kept_of
from quant_compile.generation.quantized import Quantized, types
from quant_compile.ir.errors import MissingScalesError
from quant_compile.ir.kv import CacheScheme
from quant_compile.pretrained import plan_of
from tests.checkpoints.packers import CASES
from tests.checkpoints.support import quantized, tiny_llama, write
from tests.generation.support import tokens

FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
BARE = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": ["lm_head"]}
IDS = {"input_ids": torch.arange(9)[None]}
Edit = Callable[[dict[str, Tensor]], None]


def scale(i: int, side: str, count: int = 1) -> Tensor:
    """Numbers of bf16, which no other layer or side has."""
    return (torch.arange(1, count + 1) * (0.004 if side == "k" else 0.002) * (i + 1)).bfloat16()


def spelled(key: str = "self_attn.{}_scale", count: int = 1, shape: tuple[int, ...] = (-1,)) -> dict[str, Tensor]:
    return {
        f"model.layers.{i}.{key.format(side)}": scale(i, side, count).reshape(shape) for i in (0, 1) for side in "kv"
    }


def checkpoint(folder: Path, scales: dict[str, Tensor], scheme: Any, config: dict[str, Any] | None = None) -> Path:
    """Weights in 16 bits, and a cache as the config says."""
    model = tiny_llama()
    config = {**BARE, "kv_cache_scheme": scheme} if config is None else config
    return write(folder, model, {**model.state_dict(), **scales}, config)


def load(folder: Path, *args: Any, **more: Any) -> Any:
    return quant_compile.load(folder, *args, device="cpu", dtype=torch.float32, **more)


def notes(model: nn.Module) -> str:
    return "\n".join(quant_compile.report(model).notes)


def held(model: nn.Module) -> list[tuple[str | None, Any]]:
    """Scheme and scales of each layer, as ``generate`` has them."""
    kept = kept_of(model)
    return [
        (scheme and scheme.name, pair and tuple(x.flatten().tolist() for x in pair))
        for scheme, pair in zip(kept.schemes, kept.scales or [None] * len(kept.schemes), strict=True)
    ]


def wanted(count: int = 1, factor: float = 1.0) -> list[tuple[list[float], list[float]]]:
    return [tuple((scale(i, side, count).float() / factor).tolist() for side in "kv") for i in (0, 1)]  # type: ignore[misc]


def eager(model: nn.Module, name: str, count: int = 1) -> Tensor:
    """Tokens of the plain model over a cache of the package with these scales."""
    scales = [tuple(scale(i, side, count).float() for side in "kv") for i in (0, 1)]
    cache = types().cache(model.config, 24, name, scales=scales)
    return tokens(model, IDS, past_key_values=cache, max_new_tokens=6)


# --- use ---


@pytest.mark.parametrize(
    ("scheme", "name", "count", "shape"),
    [
        (FP8, "FP8_TENSOR", 1, (1,)),
        ({**FP8, "strategy": "attn_head"}, "FP8_HEAD", 2, (2, 1, 1)),
        ({**FP8, "type": "int"}, "INT8_TENSOR", 1, ()),
    ],
)
def test_generate_uses_the_checkpoints_scales(scheme: Any, name: str, count: int, shape: Any, tmp_path: Path) -> None:
    found = load(checkpoint(tmp_path, spelled(count=count, shape=shape), scheme))
    assert held(found) == [(name, pair) for pair in wanted(count)]
    assert f"KV cache: {name} with the checkpoint's own scales, in 2 of 2 layers" in notes(found)
    if name == "FP8_TENSOR":  # of the others tests/test_kv_cache.py knows that layers use what they are given
        assert torch.equal(tokens(found, IDS, max_new_tokens=6), eager(tiny_llama().float(), name, count))
        assert f"KV cache of generate: {name} in 2 of 2 layers" in quant_compile.report(found).notes


@pytest.mark.parametrize(
    "key",
    [
        "self_attn.{}_proj.{}_scale",
        "self_attn.{}_proj.output_scale",
        "self_attn.attn.{}_scale",
        "self_attn.{}_bmm_quantizer._amax",
    ],
)
def test_spellings(key: str, tmp_path: Path) -> None:
    """Of modelopt, of older compressed-tensors, of vLLM itself; a largest magnitude is divided by 448."""
    scales = {f"model.layers.{i}.{key.replace('{}', side)}": scale(i, side) for i in (0, 1) for side in "kv"}
    found = load(checkpoint(tmp_path, scales, FP8))
    assert held(found) == [("FP8_TENSOR", pair) for pair in wanted(factor=448.0 if "amax" in key else 1.0)]


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ({"kv_cache_quant_algo": "FP8"}, "FP8_TENSOR"),
        ({"kv_cache_quant_algo": "INT8"}, "INT8_TENSOR"),
        ({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, "FP8_TENSOR"),
        ({"kv_cache_quant_algo": "NVFP4"}, None),
        ({"kv_cache_quant_algo": None}, None),
    ],
)
def test_modelopt(says: dict[str, Any], name: str | None, tmp_path: Path) -> None:
    config = {"quant_method": "modelopt", "quant_algo": "FP8", **says}
    folder = checkpoint(tmp_path, spelled("self_attn.{0}_proj.{0}_scale"), None, config)
    plan = plan_of(folder)
    assert (plan.cache.scheme and plan.cache.scheme.name) == name
    assert not any("kv_cache_scheme" in note and "ignored" in note for note in plan.notes)
    assert bool(plan.mapped.ignored) == (name is None)
    if says.get("kv_cache_quant_algo") == "NVFP4":
        assert "KV cache: in 16 bits" in "\n".join(plan.notes) and "NVFP4" in "\n".join(plan.notes)


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"}


@pytest.mark.parametrize(
    ("config", "count", "name"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}, 1, "FP8_TENSOR"),
        ({"quant_method": "fp8", "kv_cache_scheme": FP8}, 1, "FP8_TENSOR"),
        ({"quant_method": "fp8", "kv_cache_scheme": "dynamic"}, 1, None),
        ({"quant_method": "fp8", "kv_cache_scheme": " "}, 1, None),
        ({"quant_method": "fp8"}, 1, None),
        ({**AUTO_ROUND, "static_kv_dtype": "fp8"}, 1, "FP8_TENSOR"),
        ({**AUTO_ROUND, "static_kv_dtype": "float8_e4m3fn", "static_kv_granularity": "head"}, 2, "FP8_HEAD"),
        (
            {**AUTO_ROUND, "static_attention_dtype": "fp8", "static_attention_granularity": "head"}
            | {"static_kv_dtype": "fp8", "static_kv_granularity": "tensor"},
            2,
            "FP8_HEAD",
        ),
        ({**AUTO_ROUND, "static_kv_dtype": "nvfp4"}, 1, None),
        (AUTO_ROUND, 1, None),
    ],
)
def test_autofp8_and_auto_round(config: dict[str, Any], count: int, name: str | None, tmp_path: Path) -> None:
    """Their configs have a word or two for it."""
    plan = plan_of(checkpoint(tmp_path, spelled(count=count), None, config))
    assert (plan.cache.scheme and plan.cache.scheme.name) == name
    assert len(plan.cache.scales) == (2 if name else 0) and bool(plan.mapped.ignored or plan.cache.unused) != bool(name)
    said = any(key in config for key in ("kv_cache_scheme", "static_kv_dtype"))
    assert any(note.startswith("KV cache: ") for note in plan.notes) == (said or name is not None)
    assert not any("ignored" in note for note in plan.notes)


def test_one_scale_for_k_and_v(tmp_path: Path) -> None:
    """AutoFP8 before July 2024; beside scales of their own it is one too many."""
    scales = {f"model.layers.{i}.self_attn.kv_scale": scale(i, "k").reshape(()) for i in (0, 1)}
    config = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}
    found = load(checkpoint(tmp_path / "one", scales, None, config))
    both = [(k, k) for k, _ in wanted()]
    assert held(found) == [("FP8_TENSOR", pair) for pair in both]
    scales["model.layers.1.self_attn.k_scale"] = scale(1, "k")
    plan = plan_of(checkpoint(tmp_path / "more", scales, None, config))
    assert list(plan.cache.scales) == ["model.layers.0"]
    assert "has 2 of K and 1 of V" in plan.cache.unused["model.layers.1.self_attn.kv_scale"]


def test_global_scales_of_a_cache_in_nvfp4_are_named(tmp_path: Path) -> None:
    plan = plan_of(
        checkpoint(tmp_path, spelled("self_attn.{}_global_scale"), None, {**AUTO_ROUND, "static_kv_dtype": "nvfp4"})
    )
    assert len(plan.mapped.ignored) == 4 and all("NVFP4" in why for why in plan.mapped.ignored.values())


def test_a_granularity_that_is_not_known(tmp_path: Path) -> None:
    config = {**AUTO_ROUND, "static_kv_dtype": "fp8", "static_kv_granularity": "row"}
    with pytest.raises(CheckpointError, match="static_kv_granularity must be one of tensor, head"):
        plan_of(checkpoint(tmp_path, spelled(), None, config))


def test_quantized_weights_beside_it(tmp_path: Path) -> None:
    """And other tensors of quantized attention are named with their reasons."""
    case, model = CASES["ct packed 4 sym"], tiny_llama()
    folder = quantized(tmp_path, model, case.pack, {**case.config, "kv_cache_scheme": FP8})
    file = folder / "model.safetensors"
    more = {
        f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("q_scale", "k_zero_point", "prob_output_scale")
    }
    save_file({**load_file(file), **spelled(), **more}, str(file))
    found = load(folder)
    assert [name for name, _ in held(found)] == ["FP8_TENSOR"] * 2
    ignored = plan_of(folder).mapped.ignored
    assert set(ignored) == set(more) and all("attention" in why for why in ignored.values())


def test_tokens_have_scales_of_their_own(tmp_path: Path) -> None:
    for kind, name in (("float", "FP8"), ("int", "INT8")):
        scheme = {**FP8, "type": kind, "strategy": "token", "dynamic": True}
        found = load(checkpoint(tmp_path / kind, {}, scheme))
        assert held(found) == [(name, None)] * 2 and f"KV cache: {name}, as " in notes(found)


# --- precedence ---


def test_the_user_wins(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, spelled(), FP8)
    keep = {"default": "keep"}
    assert [name for name, _ in held(load(folder, keep))] == ["FP8_TENSOR"] * 2
    found = load(folder, {**keep, "kv_cache": "keep"})
    assert held(found) == [] and "KV cache: as the policy says, and not float of 8 bits" in notes(found)
    assert held(load(folder, kv_cache="keep")) == []
    assert held(load(folder, {**keep, "kv_cache": "INT8"})) == [("INT8", None)] * 2
    # The policy asks for just such scales, and has no file.
    mixed = {"scheme": "FP8_TENSOR", "rules": [{"match": "layers.1", "scheme": "FP8"}]}
    assert held(load(folder, {**keep, "kv_cache": mixed})) == [("FP8_TENSOR", wanted()[0]), ("FP8", None)]
    # Scales of other codes serve no other scheme.
    with pytest.raises(MissingScalesError, match=r"model\.layers\.0 as INT8_TENSOR"):
        load(folder, {**keep, "kv_cache": "INT8_TENSOR"})


def test_the_policys_own_scales_come_first(tmp_path: Path) -> None:
    folder, file = checkpoint(tmp_path / "model", spelled(), FP8), tmp_path / "scales.safetensors"
    save_file({f"model.layers.0.{side}_scale": torch.tensor([0.5]) for side in "kv"}, str(file))
    found = load(folder, {"default": "keep", "kv_cache": "FP8_TENSOR", "scales": str(file)})
    assert held(found) == [("FP8_TENSOR", ([0.5], [0.5])), ("FP8_TENSOR", wanted()[1])]


def test_a_copy_keeps_them(tmp_path: Path) -> None:
    found = copy.deepcopy(load(checkpoint(tmp_path, spelled(), FP8)))
    quant_compile.compile(found, {"default": "keep", "kv_cache": "FP8_TENSOR"})
    assert held(found) == [("FP8_TENSOR", pair) for pair in wanted()]


# --- what cannot be ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"symmetric": False}, "no scheme has zero points"),
        ({"num_bits": 4}, "no scheme has float codes of 4 bits"),
        ({"strategy": "channel"}, "scales are fixed for a layer or a head"),
        ({"strategy": "group", "group_size": 64, "dynamic": True}, "dynamic, a scale for each group"),
        ({"strategy": "tensor", "dynamic": True}, "dynamic, a scale for each tensor"),
        ({"dynamic": "local"}, "made for each token"),
    ],
)
def test_what_no_scheme_has_stays_in_16_bits_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    plan = plan_of(checkpoint(tmp_path, spelled(), {**FP8, **changes}))
    said = next(note for note in plan.notes if note.startswith("KV cache: in 16 bits"))
    assert reason in said and "kv_cache_scheme" in said
    assert plan.cache.rules is None and set(plan.mapped.ignored) == set(spelled())


def test_layers_without_scales_keep_16_bits(tmp_path: Path) -> None:
    scales = spelled()
    del scales["model.layers.1.self_attn.v_scale"]
    found = load(checkpoint(tmp_path / "one", scales, FP8))
    assert held(found) == [("FP8_TENSOR", wanted()[0]), (None, None)]
    assert "in 1 of 2 layers; 1 have none and keep 16 bits, model.layers.1 first" in notes(found)
    assert (
        "model.layers.1.self_attn.k_scale first: scale of the KV cache, and model.layers.1 has 1 of K and 0 of V"
        in notes(found)
    )
    plan = plan_of(checkpoint(tmp_path / "none", {}, FP8))
    assert plan.cache.rules is None and any("no layer has scales of both K and V" in note for note in plan.notes)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_values_that_cannot_be(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before anything is read or reserved; not where the scales are not used."""
    name = "model.layers.1.self_attn.v_scale"
    folder = checkpoint(tmp_path, {**spelled(), name: torch.tensor([value])}, FP8)

    def never(*args: Any) -> None:
        raise AssertionError("memory was taken")

    with monkeypatch.context() as patch:
        patch.setattr("quant_compile.pretrained._reserve", never)
        patch.setattr("quant_compile.pretrained._filled", never)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {re.escape(name)} has .*positive") as raised:
            load(folder)
    assert "Fix:" in str(raised.value)
    assert held(load(folder, kv_cache="keep")) == []


@pytest.mark.parametrize(
    ("bad", "scheme", "words"),
    [
        (torch.ones(2), FP8, "has 2 numbers, and FP8_TENSOR needs 1"),
        (torch.ones(0), FP8, "has 0 numbers"),
        (torch.ones(4), {**FP8, "strategy": "attn_head"}, "has 4 numbers, and FP8_HEAD needs 2"),
        (torch.ones(1, dtype=torch.int32), FP8, "is int32"),
    ],
)
def test_headers_that_cannot_be(bad: Tensor, scheme: Any, words: str, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_scale"
    folder = checkpoint(tmp_path, {**spelled(), name: bad}, scheme)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} {words}"):
        plan_of(folder)


def test_a_config_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="kv_cache_scheme: num_bits must be int"):
        plan_of(checkpoint(tmp_path, spelled(), {**FP8, "num_bits": "8"}))


def test_inspect_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, spelled(), FP8)
    assert cli.main(["inspect", str(folder)]) == 0
    assert "note: KV cache: FP8_TENSOR with the checkpoint's own scales, in 2 of 2 layers" in capsys.readouterr().out


# --- save ---


def said(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]


@pytest.mark.parametrize("format", ["compressed-tensors", "packed"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_round_trip(format: str, strategy: str, tmp_path: Path) -> None:
    """To the bit, of weights in 16 bits and quantized ones, twice."""
    count = 2 if strategy == "attn_head" else 1
    folder = checkpoint(tmp_path / "made", spelled(count=count), {**FP8, "strategy": strategy})
    first = load(folder, {"default": "W8A16"})
    for i in range(2):
        quant_compile.save(first, tmp_path / str(i), format)
        again = quant_compile.load(tmp_path / str(i), device="cpu")
        assert (
            held(again) == held(first) == [("FP8_HEAD" if count > 1 else "FP8_TENSOR", pair) for pair in wanted(count)]
        )
        first = again
    if format == "compressed-tensors":
        assert said(tmp_path / "1") == {**FP8, "strategy": strategy, "group_size": None, "block_structure": None}
        stored = load_file(tmp_path / "1" / "model.safetensors")["model.layers.1.self_attn.v_scale"]
        assert stored.dtype == torch.float32 and stored.shape == ((2, 1, 1) if count > 1 else (1,))


@pytest.mark.parametrize("format", ["compressed-tensors", "packed"])
def test_calibrated_scales_are_saved(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    policy = {"default": "keep", "kv_cache": "FP8_TENSOR"}
    made = quant_compile.calibrate(model, [IDS], policy, path=tmp_path / "scales.safetensors", progress=False)
    quant_compile.compile(model, made)
    quant_compile.save(model, tmp_path / "saved", format)
    (tmp_path / "scales.safetensors").unlink()
    found = quant_compile.load(tmp_path / "saved", device="cpu")
    assert held(found) == held(model) and held(model)[0][0] == "FP8_TENSOR"


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ("FP8", "vLLM takes fixed scales alone"),
        ({"scheme": "FP8_TENSOR", "rules": [{"match": "layers.1", "scheme": "INT8"}]}, "one scheme for all layers"),
    ],
)
def test_what_the_format_has_no_words_for_is_a_note(cache: Any, words: str, tmp_path: Path) -> None:
    found = load(checkpoint(tmp_path / "made", spelled(), FP8), {"default": "W8A16", "kv_cache": cache})
    with pytest.warns(UserWarning, match=words):
        quant_compile.save(found, tmp_path / "saved")
    assert said(tmp_path / "saved") is None
    assert not any("k_scale" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    quant_compile.save(found, tmp_path / "packed", "packed")
    assert held(quant_compile.load(tmp_path / "packed", device="cpu")) == held(found)


def test_layers_in_16_bits_stay_so_and_a_note_says_what_vllm_does(tmp_path: Path) -> None:
    cache = {"scheme": "FP8_TENSOR", "rules": [{"match": "layers.1", "scheme": "keep"}]}
    found = load(checkpoint(tmp_path / "made", spelled(), FP8), {"default": "W8A16", "kv_cache": cache})
    with pytest.warns(UserWarning, match=r"model\.layers\.1: load keeps K and V in 16 bits; vLLM"):
        quant_compile.save(found, tmp_path / "saved")
    assert held(quant_compile.load(tmp_path / "saved", device="cpu")) == held(found)


@pytest.mark.parametrize("format", ["compressed-tensors", "packed"])
def test_an_option_is_what_is_saved(format: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "made", spelled(), FP8)
    quant_compile.save(load(folder, {"default": "W8A16"}, kv_cache="keep"), tmp_path / "16", format)
    assert held(quant_compile.load(tmp_path / "16", device="cpu")) == []
    policy = {"default": "W8A16", "kv_cache": "INT8"}
    quant_compile.save(load(folder, policy, kv_cache="FP8_TENSOR"), tmp_path / "8", format)
    assert held(quant_compile.load(tmp_path / "8", device="cpu")) == [("FP8_TENSOR", pair) for pair in wanted()]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d, t: d["cache_scales"]["model.layers.0"].update(scheme="FP9"), "has the scheme 'FP9'"),
        (lambda d, t: d["cache_scales"].update({"model.layers.7": d["cache_scales"]["model.layers.0"]}), "is no layer"),
        (lambda d, t: t.pop("cache_scale.model.layers.0.k"), "no tensor of scales"),
        (lambda d, t: t["cache_scale.model.layers.0.k"].fill_(-1), "positive numbers"),
    ],
)
def test_a_packed_folder_that_was_changed(edit: Any, words: str, tmp_path: Path) -> None:
    quant_compile.save(
        load(checkpoint(tmp_path / "made", spelled(), FP8), {"default": "W8A16"}), tmp_path / "saved", "packed"
    )
    data, tensors = (
        json.loads((tmp_path / "saved/sglquant.json").read_text()),
        load_file(tmp_path / "saved/model.safetensors"),
    )
    edit(data, tensors)
    (tmp_path / "saved/sglquant.json").write_text(json.dumps(data))
    save_file(tensors, str(tmp_path / "saved/model.safetensors"))
    with pytest.raises(CheckpointError, match=words):
        quant_compile.load(tmp_path / "saved", device="cpu")


def test_llm_compressors_own(tmp_path: Path) -> None:
    """As in its samples: bf16 [1], in a config with all keys that it writes."""
    keys = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "observer": None,
        "observer_kwargs": {},
        "zp_dtype": None,
    }
    found = load(checkpoint(tmp_path, spelled(), {**FP8, **keys, "scale_dtype": None}))
    out = found.generate(**IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert not any(isinstance(layer, Quantized) for layer in out.past_key_values.layers)  # copies in the model's dtype
    assert kept_of(found).schemes == (CacheScheme("e4m3", "tensor"),) * 2


def test_a_model_of_transformers_has_lost_them() -> None:
    """Its config names a scheme, and no module has scales: the note says so."""
    model = tiny_llama(1)
    model.config.quantization_config = {**BARE, "kv_cache_scheme": FP8}  # type: ignore[union-attr]
    quant_compile.compile(model, {"default": "keep"})
    assert held(
        model
    ) == [] and "KV cache: the config says float of 8 bits, a scale for each tensor, and transformers has not" in notes(
        model
    )
