"""Checkpoints that the libraries themselves have written, committed small; the scripts beside them make them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quant_compile
from quant_compile.ir.scheme import parse
from quant_compile.lowering.weights import STORE
from quant_compile.pretrained import plan_of
from tests.checkpoints.fixtures.common import (
    FIXTURES,
    IDS,
    MOST,
    SOME,
    tiny,
    tiny_deepseek,
    tiny_gpt_oss,
    tiny_mixtral,
    tiny_qwen3_moe,
)
from tests.checkpoints.support import distance, logits

# None: values of a table that no scheme has.
SCHEMES: dict[str, str | None] = {
    "autofp8-dynamic": "FP8_TENSOR_DYNAMIC",
    "autofp8-kv": "FP8",
    "autofp8-kv-scale": "FP8",
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
# Scheme, and the model it was made of.
WHOLE: dict[str, tuple[str, Callable[[], Any]]] = {
    "autoround-fp8-block-deepseek": ("FP8_BLOCK", tiny_deepseek),
    "autoround-fp8-static-kv": ("fp8e4m3.channel+fp8e4m3.tensor", tiny),
    "autoround-w4a16-qwen3-moe": ("W4A16", tiny_qwen3_moe),
    "gptqmodel-qwen3-moe": ("W4A16", tiny_qwen3_moe),
    "llmcompressor-fp8-block-deepseek": ("FP8_BLOCK", tiny_deepseek),
    "llmcompressor-fp8-dynamic-mixtral": ("FP8_DYNAMIC", tiny_mixtral),
    "llmcompressor-mxfp4-gpt-oss": ("MXFP4", tiny_gpt_oss),
    "llmcompressor-mxfp4a16-gpt-oss": ("MXFP4A16", tiny_gpt_oss),
    "llmcompressor-nvfp4a16-qwen3-moe": ("NVFP4A16", tiny_qwen3_moe),
    "llmcompressor-w4a16-qwen3-moe": ("W4A16", tiny_qwen3_moe),
    "modelopt-fp8-deepseek": ("FP8", tiny_deepseek),
    "modelopt-fp8-gpt-oss": ("FP8", tiny_gpt_oss),
    "modelopt-fp8-mixtral": ("FP8", tiny_mixtral),
    "modelopt-nvfp4-gpt-oss": ("NVFP4_STATIC", tiny_gpt_oss),
}
# The library's logits are of its model in f32, in which ours are the same.
IN_F32 = ("llmcompressor-mxfp4-gpt-oss", "llmcompressor-mxfp4a16-gpt-oss")
KEPT_CACHE = ("autofp8-kv", "autofp8-kv-scale", "autoround-fp8-static-kv")


def test_every_fixture_is_small_and_known() -> None:
    folders = sorted(path for path in FIXTURES.iterdir() if path.is_dir() and not path.name.startswith("_"))
    assert [folder.name for folder in folders] == sorted([*SCHEMES, *WHOLE])
    for folder in folders:
        assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST
        values = set(load_file(folder / "truth.safetensors")) - {"logits"}
        assert len(values) == len(SOME) or (folder.name in WHOLE and not values)


def checkpoint(name: str, folder: Path) -> Path:
    """Without the truth, which is no part of a checkpoint."""
    folder.mkdir()
    for file in (FIXTURES / name).iterdir():
        if file.name != "truth.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / name)
    truth = load_file(FIXTURES / name / "truth.safetensors")
    truth.pop("logits", None)
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


def off(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each token, relative."""
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).flatten()


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name: str, tmp_path: Path) -> None:
    """Every weight is near its source's, experts' by experts too, and a token's logits are as near to the source's as the library's own."""
    scheme, make = WHOLE[name]
    folder, source = checkpoint(name, tmp_path / name), make().float()
    exact = quant_compile.load(folder, {"default": "keep", "requantize": True}, device="cpu", dtype="fp32")
    for (path, found), wanted in zip(exact.named_parameters(), source.parameters(), strict=True):
        # e4m3 rounds by 0.027 in the mean square, 4 bits by 0.1, GPTQ, which makes good others, by 0.17; another order is above 1.
        most = 0.2 if name.startswith("gptq") else 0.15 if "4" in scheme and "8" not in scheme else 0.04
        assert distance(found, wanted.detach()) < most, path
    truth, weights = load_file(FIXTURES / name / "truth.safetensors"), dict(exact.named_parameters())
    library = truth.pop("logits", None)
    for path, values in truth.items():
        weight = weights[path] if path in weights else weights[f"{path}.weight"]
        assert torch.equal(weight.to(values.dtype), values), path
    torch._dynamo.reset()
    model = quant_compile.load(folder, device="cpu", dtype="fp32" if name in IN_F32 else None)
    held = [entry for p in model.parameters() if (entry := STORE.held(p)) is not None]
    assert held and {parse(key.spec) for key in held} == {parse(scheme)}
    with torch.no_grad():
        wanted = source(torch.tensor([*IDS])[None]).logits
        found = model(torch.tensor([*IDS])[None]).logits.float()
    ours = off(found, wanted)
    # One or two tokens whose two best experts are nearly equal go to the other one, and are off by 0.5 or more; the library has such, too.
    if library is None:
        # Inputs in 4 bits move more tokens: llm-compressor's own MXFP4 is off by 0.22, and 7 of its tokens by more than 0.3.
        most, middle = (10, 0.25) if scheme == "NVFP4_STATIC" else (3, 0.15)
        assert int((ours > 0.3).sum()) <= most
        assert float(ours.median()) < middle
    else:
        theirs = off(library, wanted)
        assert int((ours > 0.3).sum()) <= int((theirs > 0.3).sum()) + 3
        assert float(ours.median()) <= 1.1 * float(theirs.median())
        assert float(off(found, library).median()) < 0.1
        assert name not in IN_F32 or float(off(found, library).max()) < 1e-5


@pytest.mark.parametrize("name", KEPT_CACHE)
def test_scales_of_k_and_v_are_found(name: str, tmp_path: Path) -> None:
    plan = plan_of(checkpoint(name, tmp_path / name))
    assert any("FP8_TENSOR with the checkpoint's own scales, in 1 of 1 layers" in note for note in plan.notes)
    assert not plan.mapped.ignored and not plan.cache.unused
