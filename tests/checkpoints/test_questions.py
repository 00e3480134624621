"""Checks of values that wait for each other: refused all the same, by the first that was asked, before a model is given back.

And modules whose headers are alike are planned once, while one that differs is still found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quant_compile
from quant_compile.checkpoints import fill
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.formats import FORMATS
from quant_compile.checkpoints.weight import Questions
from quant_compile.pretrained import plan_of
from tests.checkpoints.packers import Case, ct_fp8, ct_int8, deepseek, gptq
from tests.checkpoints.support import quantized, quantized_experts, tiny_llama, tiny_moe
from tests.checkpoints.test_names import edit

Q = "model.layers.1.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.3.down_proj"


def _set(name: str, value: Any, view: torch.dtype | None = None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        held = tensors[name]
        (held if view is None else held.view(view)).flatten()[-1] = value

    return change


# Damage of a linear, and what is said of it.
DAMAGE: dict[str, tuple[Callable[[], Case], Callable[[dict[str, Tensor]], None], str]] = {
    "scale of 0": (deepseek, _set(f"{Q}.weight_scale_inv", 0.0), f"{Q}.weight_scale_inv holds a scale of 0.0 at "),
    "scale of NaN": (deepseek, _set(f"{Q}.weight_scale_inv", float("nan")), "holds a scale of nan at "),
    "negative inf": (lambda: ct_fp8("channel"), _set(f"{Q}.weight_scale", -float("inf")), "holds a scale of -inf at "),
    "code of NaN": (deepseek, _set(f"{Q}.weight", 0xFF, torch.uint8), f"{Q}.weight holds NaN or inf"),
    "exponent of NaN": (lambda: deepseek(True), _set(f"{Q}.weight_scale_inv", 255, torch.uint8), "holds a scale of NaN (255)"),
}  # fmt: skip


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Values on the CPU are asked as those on a GPU are; how many answers there were."""
    counts: Counter[str] = Counter()
    answer = Questions.answer

    def counted(self: Questions) -> None:
        counts["asked"] += len(self._asked)
        counts["answers"] += bool(self._asked)
        answer(self)

    monkeypatch.setattr(Questions, "waits", staticmethod(lambda numbers: True))
    monkeypatch.setattr(Questions, "answer", counted)
    return counts


@pytest.mark.parametrize("case", DAMAGE)
def test_what_waits_is_refused_as_at_once(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    make, change, words = DAMAGE[case]
    packed = make()
    folder = edit(quantized(tmp_path, tiny_llama(), packed.pack, packed.config), change)
    said: list[str] = []
    for waits in (False, True):
        if waits:
            request.getfixturevalue("waiting")
        with pytest.raises(CheckpointError, match=re.escape(words)) as raised:
            quant_compile.load(folder, progress=False)
        said.append(str(raised.value))
    assert said[0] == said[1] and "Fix:" in said[0]


@pytest.mark.parametrize(
    ("scale", "found"), [(1e6, "dequantizes to NaN or inf"), (1e-9, "its scales do not fit float16")]
)
@pytest.mark.parametrize("waits", [False, True])
def test_scales_of_a_wider_dtype_than_the_models(
    scale: float, found: str, waits: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if waits:
        request.getfixturevalue("waiting")
    packed = gptq(4, 128, True)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.scales"] = torch.full_like(tensors[f"{Q}.scales"], scale, dtype=torch.float32)

    folder = edit(quantized(tmp_path, tiny_llama(), packed.pack, packed.config), change)
    if scale > 1:
        with pytest.raises(CheckpointError, match=found):
            quant_compile.load(folder, dtype=torch.float16, progress=False)
        return
    model = quant_compile.load(folder, dtype=torch.float16, progress=False)
    said = [line for line in quant_compile.report(model).lines if Q in str(line)]
    assert found in str(said) or any(found in str(note) for note in quant_compile.report(model).notes)


def test_the_first_that_was_asked_is_named(waiting: Counter[str]) -> None:
    def fail(name: str) -> Callable[[], Any]:
        def raises() -> None:
            raise CheckpointError(name)

        return raises

    questions = Questions()
    questions.ask((torch.tensor(1.0),), lambda found: found[0] > 2, fail("fine"))
    questions.ask(torch.aminmax(torch.tensor([1.0, 3.0])), lambda found: found[0] < 0 or found[1] > 2, fail("first"))
    questions.ask((torch.tensor(9, dtype=torch.uint8),), lambda found: found[0] > 2, fail("second"))
    with pytest.raises(CheckpointError, match="first"):
        questions.answer()
    questions.answer()  # what was answered is not asked again


def test_experts_are_asked_together(waiting: Counter[str], tmp_path: Path) -> None:
    packed = deepseek()
    folder = quantized_experts(tmp_path / "good", tiny_moe(), packed.pack, packed.config)
    model = quant_compile.load(folder, progress=False)
    assert len(quant_compile.report(model).lines) >= 4
    assert waiting["asked"] > 3 * waiting["answers"]  # many stems, one answer for each weight of the model
    edit(folder, _set(f"{EXPERT}.weight_scale_inv", 0.0))
    with pytest.raises(CheckpointError, match=re.escape(f"{EXPERT}.weight_scale_inv holds a scale of 0.0")):
        quant_compile.load(folder, progress=False)


def test_what_is_made_of_values_is_looked_at_after_them(waiting: Counter[str], tmp_path: Path) -> None:
    packed = deepseek()
    folder = edit(
        quantized_experts(tmp_path, tiny_moe(), packed.pack, packed.config),
        _set(f"{EXPERT}.weight_scale_inv", float("nan")),
    )
    policy = {"default": "keep", "rules": [{"match": "*", "scheme": "W4A16", "requantize": True}]}
    with pytest.raises(CheckpointError, match=re.escape(f"{EXPERT}.weight_scale_inv holds a scale of nan")):
        quant_compile.load(folder, policy, progress=False)


def test_codes_beyond_their_bits_wait_too(waiting: Counter[str], tmp_path: Path) -> None:
    packed = ct_int8(packed=False, inputs=False)
    config = {**packed.config, "config_groups": {"group_0": {**packed.config["config_groups"]["group_0"]}}}
    config["config_groups"]["group_0"]["weights"] = {
        **config["config_groups"]["group_0"]["weights"],
        "num_bits": 4,
    }
    folder = quantized(tmp_path, tiny_llama(), packed.pack, config)
    with pytest.raises(CheckpointError, match="has codes beyond 4 bits"):
        quant_compile.load(folder, progress=False)


def test_headers_that_are_alike_are_planned_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed, reads = deepseek(), Counter[bool]()
    folder = quantized_experts(tmp_path / "good", tiny_moe(), packed.pack, packed.config)
    name = plan_of(folder).description.targets[0].stored.format  # type: ignore[union-attr]
    format = FORMATS[name]

    def read(module: Any, stored: Any) -> Any:
        reads[module.dry] += 1
        return format.read(module, stored)

    monkeypatch.setitem(fill.FORMATS, name, replace(format, read=read))
    assert plan_of(folder).outcomes and 0 < reads[True] < 12  # kinds of modules; experts alone are more
    edit(folder, lambda tensors: tensors.update({f"{EXPERT}.weight_scale_inv": torch.ones(3, 5)}))
    with pytest.raises(CheckpointError, match=re.escape(f"{EXPERT}.weight_scale_inv has shape 3x5")):
        plan_of(folder)
    assert not FORMATS["bitsandbytes"].by_header  # its headers are tensors
