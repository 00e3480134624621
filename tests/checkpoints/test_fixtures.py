"""Checkpoints that the libraries themselves have written, committed small; the scripts beside them make them again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quant_compile
from quant_compile.ir.scheme import parse
from quant_compile.lowering.weights import STORE
from tests.checkpoints.fixtures.common import FIXTURES, MOST, SOME, tiny
from tests.checkpoints.support import distance, logits

# None: values of a table that no scheme has.
SCHEMES: dict[str, str | None] = {
    "autoround-asym": "int4.group32.asym+16",
    "autoround-sym": "int4.group32+16",
    "bitsandbytes-fp4": None,
    "bitsandbytes-int8": "W8A16",
    "bitsandbytes-nf4": None,
    "bitsandbytes-nf4-nested": None,
    "gptqmodel-3-bits": "int4.group64+16",
    "gptqmodel-asym": "int4.group32.asym+16",
    "gptqmodel-desc-act": "int4.group32+16",
    "llmcompressor-fp8-dynamic": "FP8_DYNAMIC",
    "llmcompressor-nvfp4a16": "NVFP4A16",
    "llmcompressor-w4a16-asym": "W4A16_ASYM",
    "modelopt-fp8": "FP8",
}


def test_every_fixture_is_small_and_known() -> None:
    folders = sorted(path for path in FIXTURES.iterdir() if path.is_dir() and not path.name.startswith("_"))
    assert [folder.name for folder in folders] == sorted(SCHEMES)
    for folder in folders:
        assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST
        assert set(load_file(folder / "truth.safetensors")) == {
            f"model.layers.0.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}" for name in SOME
        }


@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name  # without the truth, which is no part of a checkpoint
    folder.mkdir()
    for file in (FIXTURES / name).iterdir():
        if file.name != "truth.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    truth = load_file(FIXTURES / name / "truth.safetensors")
    exact = quant_compile.load(folder, {"default": "keep", "requantize": True}, device="cpu", dtype="fp32")
    for path, wanted in truth.items():
        found: torch.Tensor = exact.get_submodule(path).weight  # type: ignore[assignment]
        # As far as the library rounds: its values are in 16 bits. What modelopt exports it divides by scales in another way than its own
        # quantizer, so that 3 % of its codes are the next ones.
        off = (found - wanted.float()).abs() > 2**-7 * wanted.float().abs()
        assert float(off.float().mean()) <= (0.05 if name.startswith("modelopt") else 0), path
        assert torch.allclose(found, wanted.float(), rtol=1 / 8, atol=0), path
    model = quant_compile.load(folder, device="cpu")
    for path in truth:
        weight: nn.Parameter = model.get_submodule(path).weight  # type: ignore[assignment]
        held, scheme = STORE.held(weight), SCHEMES[name]
        assert (held is None) if scheme is None else (held is not None and parse(held.spec) == parse(scheme))
    # 4 bits of random weights are 0.1 from these; another order, another zero point are as far as no weights at all.
    assert distance(logits(model), logits(tiny())) < 0.35
