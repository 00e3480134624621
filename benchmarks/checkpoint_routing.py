"""Why logits of mixtures of experts are as far from the writing library's as they are: what of it is routing, and what rounding.

Needs the samples of ``checkpoint_logits``. ``library`` is transformers' model with the checkpoint's weights rounded to bf16, an operation
after the other, inputs quantized as compressed-tensors does it (scales in the model's dtype): it gives the library's logits to the last
bit, and hence its experts. ``f64`` is the same with exact weights and scales of inputs in f32. Where experts are *held*, every router
is made to choose those of the other model. Errors are relative, by the Frobenius norm.

    python benchmarks/checkpoint_routing.py SAMPLES --only llmcompressor-FP8_BLOCK-dsv3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoint_logits import dequantized, relative
from common import RESULTS, machine, write_result
from safetensors.torch import load_file
from torch import Tensor, nn

import quant_compile

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
Quantize = Callable[[Tensor], Tensor]


def as_library(x: Tensor) -> Tensor:
    """Groups of 128 in e4m3, scales and quotients in x's dtype."""
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale).flatten(-2)


def in_f32(x: Tensor) -> Tensor:
    """The same, in f32 whatever x is."""
    return as_library(x.float()).to(x.dtype)


def quantize_inputs(model: nn.Module, quantize: Quantize) -> None:
    """Of every linear but the head, and of experts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            module.register_forward_pre_hook(lambda m, args: (quantize(args[0]),))
        if type(module).__name__.endswith("Experts"):
            module.forward = _experts(module, quantize)  # type: ignore[method-assign]


def _experts(module: Any, quantize: Quantize) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        codes, out = quantize(x), torch.zeros_like(x)
        for expert in range(module.num_experts):
            token, place = torch.where(chosen == expert)
            if not len(token):
                continue
            gate, up = F.linear(codes[token], module.gate_up_proj[expert]).chunk(2, -1)
            y = F.linear(quantize(module.act_fn(gate) * up), module.down_proj[expert]) * weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    return forward


def routers(model: nn.Module) -> list[Any]:
    """Of every layer that has one."""
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def hold(model: nn.Module, chosen: Sequence[Tensor]) -> nn.Module:
    """Let routers choose these experts, with the weights that their own scores give these."""

    def hook(indices: Tensor) -> Callable[..., Any]:
        def forward(router: Any, args: Any, out: Any) -> Any:
            logits = out[0]
            deepseek = hasattr(router, "routed_scaling_factor")
            wide = logits if logits.dtype == F64 else logits.float()
            weights = (wide.sigmoid() if deepseek else wide.softmax(-1)).gather(1, indices)
            if router.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, (weights * (router.routed_scaling_factor if deepseek else 1)).to(out[1].dtype), indices

        return forward

    for router, indices in zip(routers(model), chosen, strict=True):
        router.register_forward_hook(hook(indices))
    return model


@torch.inference_mode()
def run(model: Any, length: int) -> tuple[Tensor, list[Tensor]]:
    """Logits of the tokens 0..length-1, and the experts of each layer."""
    torch._dynamo.reset()
    chosen: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda m, a, out: chosen.append(out[2].clone())) for router in routers(model)]
    logits = model(torch.arange(length)[None]).logits.double()
    for hook in hooks:
        hook.remove()
    return logits, chosen


def changed(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[int]:
    """Tokens of each layer whose experts differ."""
    return [int((x.sort(-1)[0] != y.sort(-1)[0]).any(-1).sum()) for x, y in zip(a, b, strict=True)]


def plain(folder: Path, dtype: torch.dtype, quantize: Quantize | None, exact: bool, noise: float = 0) -> nn.Module:
    """transformers' model; ``noise`` changes each embedding by so much of itself."""
    model: Any = dequantized(folder, F32 if dtype == F64 else dtype, F32 if exact else BF16)
    model = model.double() if dtype == F64 else model
    model.set_experts_implementation("eager")
    if quantize is not None:
        quantize_inputs(model, quantize)
    table = model.get_input_embeddings().weight.data
    table.mul_(1 + noise * torch.randn(table.shape, generator=torch.Generator().manual_seed(1), dtype=F32).to(dtype))
    return model


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Both dtypes of one sample."""
    wanted = next(iter(load_file(folder / "ref_logits.safetensors").values()))
    length = wanted.shape[1]
    grouped = "FP8_BLOCK" in folder.name
    own, ideal = (as_library, in_f32) if grouped else (None, None)
    library, theirs = run(plain(folder, BF16, own, exact=False), length)
    f64, best = run(plain(folder, F64, ideal, exact=True), length)
    moved, _ = run(plain(folder, F64, ideal, exact=True, noise=1e-7), length)
    held, _ = run(hold(plain(folder, F64, ideal, exact=True, noise=1e-7), best), length)
    of_sample = {
        "sample": folder.name,
        "library_again": relative(library, wanted),
        "library_in_f32": relative(run(plain(folder, F32, own, exact=False), length)[0], wanted),
        "noise_1e-7": relative(moved, f64),
        "noise_1e-7_held": relative(held, f64),
    }
    rows: list[dict[str, Any]] = []
    for name, dtype in (("f32", F32), ("bf16", BF16)):

        def load(dtype: torch.dtype = dtype) -> nn.Module:
            return quant_compile.load(folder, device="cpu", dtype=dtype, progress=False)

        ours, chosen = run(load(), length)
        rows.append(
            of_sample
            | {
                "dtype": name,
                "loaded": relative(ours, wanted),
                "loaded_held": relative(run(hold(load(), theirs), length)[0], wanted),
                "changed": changed(chosen, best),
                "loaded_f64": relative(ours, f64),
                "loaded_f64_held": relative(run(hold(load(), best), length)[0], f64),
                "library_f64_held": relative(run(hold(plain(folder, dtype, own, True), best), length)[0], f64),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, help="a folder of folders")
    parser.add_argument(
        "--only", default="llmcompressor-NVFP4A16-moe,gptqmodel-w4g128-moe,llmcompressor-FP8_BLOCK-dsv3"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_routing.json")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name in args.only.split(","):
        rows += rows_of(args.samples / name)
        print(*rows[-2:], sep="\n", flush=True)
    meta = {"benchmark": "checkpoint_routing", "machine": machine("cpu"), "settings": {"device": "cpu"}}
    write_result(args.out, rows, meta)


if __name__ == "__main__":
    main()
