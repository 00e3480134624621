"""FP8 with a scale for each block of 128 x 128, as DeepSeek-V3 and transformers' FineGrainedFP8 store it, and FP8 per tensor, as AutoFP8.

    W = weight * weight_scale_inv        (the name notwithstanding, it multiplies)

``weight`` e4m3 [n, k]; ``weight_scale_inv`` [ceil(n/bn), ceil(k/bk)] f32 (or bf16, or the exponents of ue8m0), one number without
``weight_block_size`` (AutoFP8's ``weight_scale``). Inputs are quantized in groups of bk when the model runs, or by a scale in the
file (``static``): ``input_scale``, which AutoFP8 called ``act_scale`` before June 2024. Its ``kv_cache_scheme`` is a word, ``static``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.checkpoints.cache import static_of, stored_of
from quant_compile.checkpoints.description import CacheStored, Description, Keys, Stored, Target
from quant_compile.checkpoints.weight import (
    REAL,
    Axes,
    Axis,
    K,
    Module,
    N,
    Read,
    check_e8m0,
    check_fp8,
    fp8_blocks,
    fp8_weight,
    powers,
)
from quant_compile.ir.scheme import QuantArgs

_INPUT_SCALES = ("input_scale", "activation_scale", "act_scale")
SUFFIXES = ("weight", "weight_scale_inv", "weight_scale", *_INPUT_SCALES)
FORMAT = "fp8-block"
_HARMLESS = ("quant_method", "fmt", "scale_fmt", "dequantize", "use_kernels", "provider", "autoround_version")
_EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)


def describe(keys: Keys) -> Description:
    """From ``quantization_config``."""
    block = keys.block("weight_block_size")
    activation = keys.get("activation_scheme", str, "dynamic")
    if activation not in ("dynamic", "static"):
        keys.fail(f"activation_scheme must be dynamic or static, got {activation!r}")
    if block is not None:
        inputs = QuantArgs(8, "float", "group", dynamic=True, group_size=block[1])
    else:
        inputs = QuantArgs(8, "float", "tensor", dynamic=activation == "dynamic")
    variant = "x".join(map(str, block)) if block else ""
    stored = Stored(FORMAT, 8, inputs=inputs, variant=variant)
    ignored = (*keys.texts("modules_to_not_convert"), *keys.texts("ignored_layers"))
    return Description("fp8", keys.where, (Target(stored),), ignored, _cache(keys), keys.ignored(_HARMLESS))


def _cache(keys: Keys) -> CacheStored | None:
    """``kv_cache_scheme``: AutoFP8's word, or an object as compressed-tensors has it."""
    scheme = keys.get("kv_cache_scheme", (str, dict))
    if not scheme:
        return None
    if isinstance(scheme, str):
        return static_of(scheme, f"{keys.where}.kv_cache_scheme")
    return stored_of(Keys(scheme, f"{keys.where}.kv_cache_scheme"))


def axes(stored: Stored) -> Axes:
    """Dimensions of a module's tensors."""
    rows, columns = map(int, stored.variant.split("x")) if stored.variant else (None, None)
    scale = (Axis("n", rows), Axis("k", columns))
    return {"weight": (N, K), "weight_scale_inv": scale, "weight_scale": scale}


def read(module: Module, stored: Stored) -> Read:
    """A linear's planes."""
    codes = module.tensor("weight", (torch.float8_e4m3fn, torch.float8_e5m2), (module.n, module.k))
    codes = check_fp8(module, "weight", codes)
    name = "weight_scale_inv" if module.has("weight_scale_inv") else "weight_scale"
    if not stored.variant:
        given = next((suffix for suffix in _INPUT_SCALES if module.has(suffix)), None)
        scale = module.scale(name, REAL, (), (1,), (1, 1), (module.n,), (module.n, 1))
        return fp8_weight(module, codes, scale, stored.inputs, module.one(given) if given else None)
    bn, bk = map(int, stored.variant.split("x"))
    shape = (-(-module.n // bn), -(-module.k // bk))
    return fp8_blocks(module, codes, _scale(module, name, shape), (bn, bk), stored.inputs)


def _scale(module: Module, name: str, shape: tuple[int, int]) -> Tensor:
    """f32 scales of blocks."""
    if module.info(name).dtype not in _EXPONENTS:
        return module.scale(name, REAL, shape)
    exponents = module.tensor(name, _EXPONENTS, shape).view(torch.uint8)
    check_e8m0(module, name, exponents)
    return powers(exponents)
