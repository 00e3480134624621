"""Two tensors for one place of a model: weights that a config ties and a file has apart, spellings, stale values, tables in codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quant_compile
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.pretrained import plan_of
from tests.checkpoints.packers import CASES, gptq
from tests.checkpoints.support import HIDDEN, INNER, VOCAB, distance, linears, logits, quantized, tiny_llama, write
from tests.checkpoints.test_names import edit


def load_f32(folder: Path) -> Any:
    return quant_compile.load(folder, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("form", ["values", "values of nothing quantized", "codes"])
def test_a_head_that_differs_from_the_table_it_is_tied_to(form: str, tmp_path: Path) -> None:
    """Both are what the file says, the config says so, and the report that they are apart; saved and loaded again as well."""
    case, model = CASES["ct packed 4 sym"], tiny_llama(1, tied=True).float()
    head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9)) / 16
    if form == "values of nothing quantized":
        folder, policy = write(tmp_path / "a", model, dict(model.state_dict()), None), {"default": "keep"}
    else:
        folder, policy = quantized(tmp_path / "a", model, case.pack, case.config), None
    own = {"lm_head.weight": head}
    if form == "codes":
        made, head = case.pack("lm_head", head)
        own = {f"lm_head.{suffix}": tensor for suffix, tensor in made.items()}
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["ignore"] = []
        (folder / "config.json").write_text(json.dumps(config))
    edit(folder, lambda t: t.pop("lm_head.weight", None))
    edit(folder, lambda t: t.update(own))
    model.lm_head.weight = nn.Parameter(head.float())
    wanted = logits(model)
    found = quant_compile.load(folder, policy, device="cpu", dtype=torch.float32)
    assert distance(logits(found), wanted) < 1e-2
    assert torch.equal(found.get_input_embeddings().weight, model.model.embed_tokens.weight.float())
    assert not found.config.tie_word_embeddings
    assert any("not tied: model.embed_tokens.weight and lm_head.weight" in note for note in plan_of(folder).notes)
    quant_compile.save(found, tmp_path / "b", format="packed")
    assert distance(logits(quant_compile.load(tmp_path / "b", device="cpu")), wanted) < 1e-2


def test_a_head_that_is_the_table_stays_tied(tmp_path: Path) -> None:
    case, model = CASES["ct packed 4 sym"], tiny_llama(1, tied=True)
    folder = quantized(tmp_path, model, case.pack, case.config)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    found = load_f32(folder)
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert found.config.tie_word_embeddings
    assert any("lm_head.weight first: the same as" in note or "the same as" in note for note in plan_of(folder).notes)


@pytest.mark.parametrize(
    "second", ["norm.weight", "model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight_packed"]
)
def test_two_tensors_for_one_place(second: str, tmp_path: Path) -> None:
    """Other values are an error that names both, the same values are none."""
    case, model = CASES["ct packed 4 sym"], tiny_llama(1)
    folder = quantized(tmp_path, model, case.pack, case.config)
    spelled = {"norm.weight": "model.norm.weight", "layers.0.mlp.up_proj.weight_packed": f"model.{second}"}
    first = spelled.get(second, "model.layers.0.mlp.up_proj.weight_packed")

    edit(folder, lambda t: t.update({second: t[first] + 1 if second in spelled else torch.zeros(INNER, HIDDEN)}))
    with pytest.raises(CheckpointError, match="Fix: remove the one") as raised:
        load_f32(folder)
    assert first in str(raised.value) and second in str(raised.value)
    if second in spelled:
        edit(folder, lambda t: t.update({second: t[first].clone()}))
        assert distance(logits(load_f32(folder)), logits(model.float())) < 1e-2


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_table_in_codes(tied: bool, tmp_path: Path) -> None:
    """Rows are looked up in values: it is dequantized, and the report says why."""
    case, model = CASES["ct packed 4 sym"], tiny_llama(1, tied=tied).float()
    folder = quantized(tmp_path, model, case.pack, case.config)
    made, values = case.pack("model.embed_tokens", model.model.embed_tokens.weight.detach())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    (folder / "config.json").write_text(json.dumps(config))
    edit(folder, lambda t: t.pop("model.embed_tokens.weight"))
    edit(folder, lambda t: t.update({f"model.embed_tokens.{suffix}": tensor for suffix, tensor in made.items()}))
    model.model.embed_tokens.weight.data = values.float()
    found = load_f32(folder)
    assert distance(logits(found), logits(model)) < 1e-2
    line = next(line for line in quant_compile.report(found).lines if "embed_tokens" in str(line))
    assert line.scheme is None and "looked up" in line.reason


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_the_model_has_not(value: float, tmp_path: Path) -> None:
    """Zeros, which AutoGPTQ wrote for every linear, are left alone by name; others are an error."""
    case, model = CASES["gptq desc_act"], tiny_llama(1)
    folder = quantized(tmp_path, model, case.pack, case.config)
    own = {f"{name}.bias": torch.full((linear.out_features,), value).half() for name, linear in linears(model).items()}
    edit(folder, lambda t: t.update(own))
    if value:
        with pytest.raises(CheckpointError, match="7 tensors that belong to no weight"):
            load_f32(folder)
    else:
        assert distance(logits(load_f32(folder)), logits(model.float())) < 1e-2
        assert any(
            "7 tensors" in note and "zeros, and the model has no such bias" in note for note in plan_of(folder).notes
        )


# --- files of other writers ---


def test_groups_wider_than_a_row(tmp_path: Path) -> None:
    """GPTQ with ``g_idx`` of zeros."""
    model = tiny_llama(1)

    def pack(name: str, w: torch.Tensor) -> Any:
        made, values = gptq(4, w.shape[1], True).pack(name, w)
        return {**made, "g_idx": torch.zeros(w.shape[1], dtype=torch.int32)}, values

    folder = quantized(tmp_path, model, pack, {**gptq(4, 64, True).config, "group_size": 512})
    assert distance(logits(load_f32(folder)), logits(model.float())) < 1e-2


def test_an_order_that_is_none(tmp_path: Path) -> None:
    """compressed-tensors' ``weight_g_idx`` of -1."""
    case, model = CASES["ct packed 4 sym"], tiny_llama(1)

    def pack(name: str, w: torch.Tensor) -> Any:
        made, values = case.pack(name, w)
        return {**made, "weight_g_idx": torch.full((w.shape[1],), -1, dtype=torch.int32)}, values

    folder = quantized(tmp_path, model, pack, case.config)
    assert distance(logits(load_f32(folder)), logits(model.float())) < 1e-2


def test_the_older_name_of_a_config(tmp_path: Path) -> None:
    case, model = CASES["ct packed 4 sym"], tiny_llama(1)
    folder = quantized(tmp_path, model, case.pack, case.config)
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    del config["compression_config"]["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    assert distance(logits(load_f32(folder)), logits(model.float())) < 1e-2


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_bytes_stored_as_other_elements(storage: torch.dtype, tmp_path: Path) -> None:
    """``bnb_4bit_quant_storage``."""
    case, model = CASES["bitsandbytes nf4"], tiny_llama(1)

    def pack(name: str, w: torch.Tensor) -> Any:
        made, values = case.pack(name, w)
        return {**made, "weight": made["weight"].reshape(-1).view(storage).reshape(-1, 1)}, values

    folder = quantized(tmp_path, model, pack, case.config)
    assert distance(logits(load_f32(folder)), logits(model.float())) < 1e-2


def test_scaled_activations_are_named(tmp_path: Path) -> None:
    case, model = CASES["awq"], tiny_llama(1)
    folder = quantized(tmp_path, model, case.pack, case.config)
    edit(folder, lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(INNER)}))
    with pytest.raises(CheckpointError, match=r"mlp\.act\.scales is what AWQ divides an activation by"):
        load_f32(folder)
