"""Configs: every way to describe a checkpoint, what contradicts, and what no one wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant_compile.checkpoints.config import describe
from quant_compile.checkpoints.description import alike, matches
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.formats import METHODS

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
CT_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


def folder_of(folder: Path, config: Any, **others: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ct(weights: Any = CT_WEIGHTS, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group | changes}}


def test_a_checkpoint_without_a_config_is_not_quantized(tmp_path: Path) -> None:
    assert describe(tmp_path).text == "not quantized"
    assert describe(folder_of(tmp_path, None)).text == "not quantized"


def test_unknown_keys_are_a_note_and_paths_are_never_opened(tmp_path: Path) -> None:
    """gptqmodel writes the path of a temporary folder into its config."""
    trap = tmp_path / "trap"
    made = describe(folder_of(tmp_path, {**GPTQ, "tokenizer_path": str(trap), "another": 3}))
    assert any("another, tokenizer_path" in note for note in made.notes)
    assert not trap.exists()


def test_both_files_are_read(tmp_path: Path) -> None:
    made = describe(
        folder_of(
            tmp_path,
            {"quant_method": "gptq", "bits": 4},
            quantize_config={"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        )
    )
    stored = made.stored("model.layers.0.mlp.up_proj")
    assert stored is not None and (stored.group, stored.variant) == (32, "gptq_v2")


@pytest.mark.parametrize(
    ("config", "others", "words"),
    [
        (GPTQ, {"quantize_config": {"bits": 8}}, "says bits 8"),
        (GPTQ, {"quantize_config": {"bits": 4, "group_size": 64}}, "says group_size 64"),
        (GPTQ, {"hf_quant_config": {"quantization": {"quant_algo": "FP8"}}}, "says .modelopt"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            {"hf_quant_config": {"quantization": {"quant_algo": "NVFP4"}}},
            "says quant_algo 'NVFP4'",
        ),
    ],
)
def test_files_that_contradict_each_other(config: Any, others: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as raised:
        describe(folder_of(tmp_path, config, **others))
    assert "config.json" in str(raised.value) and "Fix:" in str(raised.value)


BAD: dict[str, tuple[Any, str]] = {
    "unknown method": ({"quant_method": "hqq"}, "quant_method 'hqq' is not read here"),
    "method is a number": ({"quant_method": 3}, "must be a text"),
    "no method": ({"bits": 4}, "has no quant_method"),
    "a list": ([4], "must be an object"),
    "bits": (GPTQ | {"bits": 9}, "bits must be one of"),
    "bits in words": (GPTQ | {"bits": "4"}, "bits must be int"),
    "no bits": ({"quant_method": "gptq"}, "has no bits"),
    "group": (GPTQ | {"group_size": -7}, "group_size must be -1 or a positive"),
    "group is true": (GPTQ | {"group_size": True}, "group_size must be int"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "five bits": (GPTQ | {"bits": 5}, "stored as gptq_p only"),
    "gemv": ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
    "algorithm": ({"quant_method": "modelopt", "quant_algo": "FP7"}, "quant_algo 'FP7'"),
    "no algorithm": ({"quant_method": "modelopt"}, "has no quant_algo"),
    "mixed of nothing": ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "without quantized_layers"),
    "block": ({"quant_method": "fp8", "weight_block_size": [128]}, "must be two sizes"),
    "activation": ({"quant_method": "fp8", "activation_scheme": "sometimes"}, "dynamic or static"),
    "ct format": (ct(format="marlin-24"), "format 'marlin-24'"),
    "ct group": (ct(weights={**CT_WEIGHTS, "strategy": "rows"}), "strategy must be one of"),
    "ct outputs": (ct(output_activations={"num_bits": 8}), "output_activations"),
    "ct targets": (ct(targets=[3]), "targets must be a list of texts"),
    "ct regex": (ct(targets=["re:(("]), "no regular expression"),
    "ct endless regex": (ct(targets=["re:(a+)+$"]), "repeats a repetition"),
    "ct exponential regex": (ct(targets=["re:(?:a{99}x){99}"]), "repeats too often"),
    "mixed regex": (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"re:((": {"quant_algo": "FP8"}},
        },
        "no regular expression",
    ),
    "auto-round bits": ({"quant_method": "auto-round", "bits": 9}, "bits must be one of 2, 3, 4, 8"),
    "auto-round awq bits": (
        {"quant_method": "auto-round", "bits": 3, "packing_format": "auto_round:auto_awq"},
        "bits must be one of 4",
    ),
    "auto-round bits of one": (
        {"quant_method": "auto-round", "bits": 4, "extra_config": {"lm_head": {"bits": 1}}},
        "lm_head: bits must",
    ),
    "sparsity": (ct() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "packing": ({"quant_method": "auto-round", "packing_format": "auto_round:zip"}, "packing_format 'zip'"),
    "bnb both": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}, "one of load_in_4bit"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_one_wrote_is_an_error_with_its_key(case: str, tmp_path: Path) -> None:
    config, words = BAD[case]
    with pytest.raises(CheckpointError, match=words) as raised:
        describe(folder_of(tmp_path, config))
    assert "config.json: quantization_config" in str(raised.value) and "Fix:" in str(raised.value)


def test_modules_of_their_own(tmp_path: Path) -> None:
    """gptqmodel's ``dynamic``, modelopt's ``quantized_layers``, auto-round's ``extra_config``, compressed-tensors' groups."""
    dynamic = {r"+:.*\.down_proj": {"bits": 8, "group_size": 32}, r"-:.*\.o_proj": {}}
    made = describe(folder_of(tmp_path, GPTQ | {"dynamic": dynamic}))
    down, up = made.stored("model.layers.0.mlp.down_proj"), made.stored("model.layers.0.mlp.up_proj")
    assert down is not None and up is not None and (down.bits, down.group, up.bits) == (8, 32, 4)
    assert made.ignores("model.layers.3.self_attn.o_proj") and not made.ignores("model.layers.3.mlp.up_proj")
    layers = {
        "model.layers.0.mlp.up_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_AWQ", "group_size": 64},
    }
    made = describe(
        folder_of(tmp_path, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    )
    up, down, other = (made.stored(f"model.layers.0.mlp.{name}") for name in ("up_proj", "down_proj", "gate_proj"))
    assert up is not None and down is not None and other is None and (up.bits, down.bits, down.group) == (8, 4, 64)
    extra = {"model.layers.0.mlp.up_proj": {"bits": 8}, r".*o_proj.*": {"bits": 16}}
    made = describe(folder_of(tmp_path, {"quant_method": "auto-round", "bits": 4, "extra_config": extra}))
    up = made.stored("model.layers.0.mlp.up_proj")
    assert up is not None and up.bits == 8 and made.ignores("model.layers.1.self_attn.o_proj")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("Linear", "model.layers.0.mlp.up_proj", True),
        ("lm_head", "lm_head", True),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("re:.*gate$", "model.layers.0.mlp.gate", True),
        ("re:.*gate$", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.*.self_attn", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.1", "model.layers.11.mlp", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize("pattern", ["re:(a|a)*b", "re:(?:a|aa)+b"])
def test_a_pattern_that_does_not_end_is_an_error(pattern: str, tmp_path: Path) -> None:
    made = describe(folder_of(tmp_path, GPTQ | {"modules_to_not_convert": [pattern]}))
    assert not made.ignores("lm_head")
    with pytest.raises(CheckpointError, match=r"config\.json.*takes too long to compare"):
        made.ignores("a" * 200 + "cb")


TEXTS = ["gptq", "int", "group", "block", "float", "pack-quantized", "re:(", "FP8", "x"]
INNER = ["weights", "targets", "num_bits", "type", "strategy", "quant_algo", "format", "bits", "block_structure"]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 200) | st.floats(allow_nan=False) | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
KEYS = (
    "bits", "group_size", "sym", "checkpoint_format", "config_groups", "format", "ignore", "kv_cache_scheme", "quant_algo",
    "quantized_layers", "weight_block_size", "packing_format", "data_type", "extra_config", "dynamic", "version",
    "modules_to_not_convert", "meta", "load_in_4bit", "quant_type",
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(sorted(METHODS)), config=st.dictionaries(st.sampled_from(KEYS), values, max_size=6))
def test_any_config_is_described_or_refused(method: str, config: dict[str, Any], tmp_path: Path) -> None:
    try:
        made = describe(folder_of(tmp_path, {"quant_method": method, **config}))
    except CheckpointError as error:
        assert "Fix:" in str(error)
        return
    made.stored("model.layers.0.mlp.up_proj")
    assert made.text


def test_patterns_of_names_that_have_equal_values() -> None:
    """One for all numbers where that is true, else one for each first number, and single names at last; each stands for its own only."""
    values: dict[str, str | None] = {
        f"layers.{i}.experts.{e}.up": "a" if i else "b" for i in range(3) for e in range(12)
    }
    values |= {f"layers.{i}.q": "a" for i in range(12)} | {
        "layers.1.o": None,
        "layers.11.o": "a",
        "head": "b",
        "a#1": "a",
    }
    found = list(alike(values))
    assert (
        dict(found)[r"layers\.\d+\.q"] == "layers.0.q"
        and dict(found)[r"layers\.0\.experts\.\d+\.up"]
        and len(found) == 8
    )
    for pattern, first in found:
        assert {values[name] for name in values if re.fullmatch(pattern, name)} == {values[first]}
    assert {name for name in values if any(re.fullmatch(pattern, name) for pattern, _ in found)} == set(values)
