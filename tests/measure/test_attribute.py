"""Attribution: the weight that was damaged is the first, whichever way it was damaged; what rows say; bad input."""

from __future__ import annotations

import builtins
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import quant_compile
from quant_compile import MeasureError, MissingScalesError, OptionError, simulate
from tests.runtime_support import CompileCounter, plain_inductor
from tests.test_calibrate_experts import tiny_moe

__all__ = ["plain_inductor"]

DAMAGED = "model.layers.1.mlp.up_proj"


def tiny(layers: int = 2) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16)
    for parameter in model.parameters():  # the default is so small that layers hardly matter
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def attribute(model: Any, policy: Any = "W4A16", **options: Any) -> Any:
    return quant_compile.attribute(model, batches(), policy, progress=False, **options)


def both_first(found: Any, name: str) -> bool:
    """By divergence, which orders the rows, and by its own error."""
    return found.rows[0].name == name == max(found.rows, key=lambda row: row.own_error).name


def test_a_scheme_that_is_too_coarse() -> None:
    rough = {"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
    policy = {"default": "W8A16", "rules": [{"match": DAMAGED, "scheme": rough}]}
    found = attribute(tiny(), policy)
    assert both_first(found, DAMAGED)
    assert found.rows[0].scheme == "int4.channel+16"


def test_outliers_in_one_weight() -> None:
    model = tiny()
    weight = model.get_submodule(DAMAGED).weight
    weight.data[:, ::32] *= 30
    found = attribute(model)
    assert max(found.rows, key=lambda row: row.own_error).name == DAMAGED


def test_a_copy_with_one_projection_times_1_3() -> None:
    model = tiny()
    broken = copy.deepcopy(model)
    broken.get_submodule(DAMAGED).weight.data.mul_(1.3)
    found = attribute(broken, reference=model)
    assert both_first(found, DAMAGED)
    assert 0.25 < found.rows[0].own_error < 0.4


def test_planes_that_serve_a_compiled_model(plain_inductor: CompileCounter) -> None:
    """An edit that torch does not record leaves planes of other values: what runs is measured."""
    model = tiny(2)
    quant_compile.compile(model, "W8A16")
    with torch.no_grad():
        model(batches()[0], use_cache=False)
    before = attribute(model, "W8A16")
    assert all(row.unusual < 2 for row in before.rows)
    model.get_submodule(DAMAGED).weight.data.mul_(1.3)
    assert both_first(attribute(model, "W8A16"), DAMAGED)
    quant_compile.refresh(model)
    assert all(row.unusual < 2 for row in attribute(model, "W8A16").rows)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.v_proj"])
def test_quantizing_that_is_broken_for_one_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantized value comes from one function; of an expert block too."""
    with torch.no_grad():
        model = tiny_moe()
    target = dict(model.named_parameters()).get(
        name, getattr(model.get_submodule(name), "weight", None) if "v_proj" in name else None
    )
    right = simulate.quantized_values

    def broken(weight: Tensor, scheme: Any, *how: Any) -> Tensor:
        factor = 1.3 if weight.data_ptr() == target.data_ptr() and weight.shape == target.shape else 1.0
        return right(weight, scheme, *how) * factor

    monkeypatch.setattr(simulate, "quantized_values", broken)
    found = quant_compile.attribute(model, [batch % 64 for batch in batches()], "W8A16", progress=False)
    assert both_first(found, name)


def test_rows_say_what_and_where() -> None:
    model = tiny(2)
    found = attribute(model)
    assert len(found.rows) == 14 and not found.unreached
    assert found.total > 0 and found.positions == 64
    assert sum(row.share or 0 for row in found.rows) == pytest.approx(1)
    ranks = [row.kl * max(1, row.unusual) ** 2 for row in found.rows]
    assert ranks == sorted(ranks, reverse=True) and sorted(row.unusual for row in found.rows)[6] <= 1
    row = next(row for row in found.rows if row.name == DAMAGED)
    assert row.source.startswith("transformers/models/llama/modeling_llama.py:") and "self.up_proj(x)" in row.code
    order = [row.name for row in sorted(found.rows, key=lambda row: row.depth)]
    assert order[:3] == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"] and order[-1].endswith(
        "1.mlp.down_proj"
    )
    text = str(found)
    assert DAMAGED in text.replace("\n", "") and "KL alone" in text
    assert json.loads(found.to_json())["rows"][0]["name"] == found.rows[0].name


def test_own_errors_are_of_single_products() -> None:
    """||x (w_q - w)|| / ||x w||, of each batch's inputs together."""
    model = nn.Sequential(nn.Linear(128, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False))
    data = [torch.randn(4, 128), torch.randn(2, 128)]
    found = quant_compile.attribute(model, data, {"default": "W4A16"}, progress=False)
    x, w = torch.cat(data), model[0].weight.detach()
    wanted = x @ (simulate.quantized_values(w, quant_compile.PRESETS["W4A16"]) - w).T
    row = next(row for row in found.rows if row.name == "0")
    assert row.own_error == pytest.approx(float(wanted.norm() / (x @ w.T).norm()), rel=1e-4)


def test_top_limits_the_divergences() -> None:
    found = attribute(tiny(2), top=3)
    assert [row.kl is not None for row in found.rows] == [True] * 3 + [False] * 11
    least = min(row.own_error for row in found.rows[:3])
    assert all(row.own_error <= least for row in found.rows[3:])


def test_the_model_is_left_alone() -> None:
    model = tiny(2).train()
    before = {name: (p.clone(), p._version, type(p)) for name, p in model.named_parameters()}
    attribute(model)
    assert model.training and model.model.layers[0].training
    for name, parameter in model.named_parameters():
        values, version, kind = before[name]
        assert torch.equal(parameter, values) and parameter._version == version and type(parameter) is kind


def test_padding_does_not_count() -> None:
    model, ids = tiny(1), batches(1)[0]
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    found = quant_compile.attribute(model, [{"input_ids": ids, "attention_mask": mask}], "W4A16", progress=False)
    assert found.positions == 24


def test_bad_input() -> None:
    model = tiny(1)
    with pytest.raises(OptionError, match=r"no batches were given\. Fix"):
        quant_compile.attribute(model, [], "W4A16")
    with pytest.raises(OptionError, match=r"Fix: \[batch\]"):
        quant_compile.attribute(model, {"input_ids": batches()[0]}, "W4A16")
    with pytest.raises(OptionError, match="batch 0 has a tensor without elements"):
        quant_compile.attribute(model, [torch.zeros(0, 3, dtype=torch.long)], "W4A16")
    with pytest.raises(OptionError, match="top must be 1 or more"):
        attribute(model, top=0)
    with pytest.raises(MeasureError, match="quantizes no weight"):
        attribute(model, {"default": "keep"})
    with pytest.raises(MissingScalesError, match=r"Fix: policy = quant_compile\.calibrate"):
        attribute(model, "W8A8_STATIC")
    with pytest.raises(MeasureError, match="has no logits"):
        quant_compile.attribute(model.model, batches(), "W4A16", progress=False)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(MeasureError, match="NaN or inf in batch 0"):
        attribute(model)


def test_a_weight_with_nan_is_named() -> None:
    model = tiny(1)
    model.model.layers[0].mlp.gate_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(quant_compile.QuantError, match="NaN or inf"):
        attribute(model)


def test_weights_that_no_batch_used() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    found = quant_compile.attribute(Skips(), [torch.randn(2, 32)], "W8A16", progress=False)
    assert found.unreached == ("other",) and [row.name for row in found.rows] == ["used"]
    assert "no batch used: other" in str(found)


def test_a_plot_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = attribute(tiny(1))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(quant_compile.QuantError, match=r"quant-compile\[plot\]"):
            found.plot(tmp_path / "a.png")
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "a.png").stat().st_size > 1000
