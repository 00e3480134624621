"""One library's rounding of a model, for ``rounding_peers.py``: run by the Python of an environment that has the library.

    python benchmarks/rounding_peer.py LIBRARY METHOD SCHEME FOLDER

FOLDER holds ``model`` (a transformers folder with its tokenizer) and ``tokens.safetensors`` (``calibration`` [windows, length] and
``evaluation`` [windows, length], int64). Writes ``logits.safetensors`` there: what the library's own quantized model says of the evaluation
windows, f32 [windows, length, vocabulary], and ``told.json`` with seconds and versions. Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = {"llm-compressor": "llmcompressor", "modelopt": "nvidia-modelopt", "auto-round": "auto-round"}


def model_of(folder: Path) -> Any:
    """In f32, so that what is compared is the rounding."""
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


def llm_compressor(method: str, scheme: str, folder: Path, calibration: Tensor) -> Any:
    """rtn, gptq or awq."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    made: dict[str, Any] = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "awq": AWQModifier}
    recipe = made[method](targets="Linear", scheme=scheme, ignore=["lm_head"])
    if method == "rtn":
        return oneshot(model=model_of(folder), recipe=recipe)
    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    return oneshot(
        model=model_of(folder), dataset=Dataset.from_dict(rows), recipe=recipe, num_calibration_samples=calibration.shape[0],
        max_seq_length=calibration.shape[1], tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip


def modelopt(method: str, scheme: str, folder: Path, calibration: Tensor) -> Any:
    """rtn or awq."""
    import modelopt.torch.quantization as mtq

    names = {
        ("awq", "W4A16"): "INT4_AWQ_CFG", ("rtn", "W4A16"): "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", ("rtn", "NVFP4"): "NVFP4_DEFAULT_CFG",
        ("awq", "NVFP4"): "NVFP4_AWQ_LITE_CFG",
    }  # fmt: skip

    def run(model: Any) -> None:
        for part in calibration.split(8):
            model(part, use_cache=False)

    with torch.no_grad():
        return mtq.quantize(model_of(folder), getattr(mtq, names[method, scheme]), run)


def auto_round(method: str, scheme: str, folder: Path, calibration: Tensor) -> Any:
    """rtn (its own search of ranges), or light: 50 steps of signed gradient descent on the rounding."""
    from auto_round import AutoRound

    settings: dict[str, Any] = {"rtn": {"iters": 0}, "light": {"iters": 50, "lr": 5e-3}}[method]
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
    made = AutoRound(
        model_of(folder), AutoTokenizer.from_pretrained(folder / "model"), scheme=scheme, dataset=data, device_map="cpu",
        nsamples=calibration.shape[0], seqlen=calibration.shape[1], batch_size=8, amp=False, enable_torch_compile=False, **settings,
    )  # fmt: skip
    return made.quantize()[0]


LIBRARIES: dict[str, Callable[[str, str, Path, Tensor], Any]] = {
    "llm-compressor": llm_compressor,
    "modelopt": modelopt,
    "auto-round": auto_round,
}


def main(library: str, method: str, scheme: str, folder: Path) -> None:
    """Quantize, run, write."""
    tokens = load_file(folder / "tokens.safetensors")
    start = time.perf_counter()
    model = LIBRARIES[library](method, scheme, folder, tokens["calibration"])
    seconds = time.perf_counter() - start
    with torch.no_grad():
        rows = [model(row[None], use_cache=False).logits.float() for row in tokens["evaluation"]]
    save_file({"logits": torch.cat(rows)}, folder / "logits.safetensors")
    versions = {name: version(name) for name in (PACKAGES[library], "torch", "transformers")}
    (folder / "told.json").write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
