"""What the modules of quantization libraries hold, in the words of their formats, or why it cannot be taken from them.

    FP8Linear                weight e4m3, weight_scale_inv               transformers' FineGrainedFP8
    FP8Experts               gate_up_proj, down_proj, ..._scale_inv      transformers' FineGrainedFP8
    Linear, compressed       weight or weight_packed, weight_scale, ...  compressed-tensors, until a first call decompresses them
    kernels of gptqmodel     qweight, qzeros, scales, g_idx              GPTQ and AWQ, where a kernel leaves the order of the file
    Linear8bitLt             weight int8 and its SCB                     bitsandbytes

Modules are known by the names of their classes, so that no library is imported. Reads modules; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.checkpoints import awq, bitsandbytes, fp8_block, gptq
from quant_compile.checkpoints.compressed_tensors import METHOD as COMPRESSED
from quant_compile.checkpoints.compressed_tensors import describe
from quant_compile.checkpoints.description import Keys, Stored
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.formats import SUFFIXES
from quant_compile.checkpoints.weight import REAL
from quant_compile.ir.family import Reject
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import QuantArgs

# gptqmodel's kernels that hold a file's tensors as they are, at least until their first call; the others bring them into an order of
# their own as they are loaded, some under the shapes of the file. Source: post_init of gptqmodel 7.7.
GPTQ_KERNELS = ("TorchLinear", "TritonV2Linear", "TorchFusedLinear", "TorchAtenLinear", "TorchCpuAvx512Linear")
AWQ_KERNELS = (
    "AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear", "TorchFusedAwqLinear", "TorchAtenAwqLinear", "TorchCpuAvx512AwqLinear",
)  # fmt: skip
EXPERTS = "FP8Experts"
FIX = "quant_compile.load(directory) adopts the integers"
_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
_CLASSES = ("Params4bit", "Int8Params")  # bitsandbytes' Parameters


def stays(reason: str, fix: str = FIX) -> Reject:
    """Why a module is left alone, and what to do about it."""
    return Reject(f"{reason}; {fix}")


@dataclass(frozen=True)
class Holding:
    """A linear, or a block of experts, whose tensors are those of its format.

    Attributes:
        method: ``quant_method`` of a checkpoint of such modules.
        stored: the format.
        tensors: by suffix; of a block of experts by the attributes of its module.
    """

    method: str
    stored: Stored
    tensors: Mapping[str, Tensor]


def holding_of(name: str, module: nn.Module) -> Holding | Reject | None:
    """What a module holds; why it stays as it is; None where it holds no integers.

    Args:
        name: of the module, for messages.

    Raises:
        CheckpointError: what it says of itself contradicts itself.
    """
    for kind in (_fp8_linear, _fp8_experts, _compressed, _gptq, _awq, _eight_bits, _four_bits):
        found = kind(name, module)
        if found is not None:
            away = _elsewhere(module, found.tensors.values()) if isinstance(found, Holding) else ""
            return stays(away) if away else found
    kept = {key: t for key, t in _own(module).items() if _is_code(key, t)}
    if not kept:
        return None
    away = _elsewhere(module, _own(module).values())
    return stays(away or f"{type(module).__name__} holds {next(iter(kept))} in a form of its own")


def is_compressed(module: nn.Module) -> bool:
    """Whether a module is one that compressed-tensors would decompress at the model's first call."""
    status = vars(module).get("quantization_status")
    return vars(module).get("quantization_scheme") is not None and getattr(status, "value", status) == "compressed"


# --- FineGrainedFP8 ---


def _fp8_linear(name: str, module: Any) -> Holding | None:
    if type(module).__name__ != "FP8Linear":
        return None
    weight, scale = (module._parameters.get(key) for key in ("weight", "weight_scale_inv"))
    if weight is None or scale is None or weight.element_size() != 1:
        return None
    return Holding("fp8", _fp8_stored(module), _persistent(module))


def _fp8_experts(name: str, module: Any) -> Holding | Reject | None:
    if type(module).__name__ != EXPERTS:
        return None
    held = _own(module)
    codes = {key: t for key, t in held.items() if t.dim() == 3 and f"{key}_scale_inv" in held}
    if not codes or any(t.element_size() > 1 for t in codes.values()):
        return None
    packed = next((key for key, t in codes.items() if not t.dtype.is_floating_point), None)
    if packed is not None:
        return stays(f"{EXPERTS} holds {packed} in packed e2m1 (FP4), and e4m3 is taken over")
    return Holding("fp8", _fp8_stored(module), held)


def _fp8_stored(module: Any) -> Stored:
    """From what transformers made the module with."""
    block = module.block_size
    if block is None:
        inputs = QuantArgs(8, "float", "tensor", dynamic=module.activation_scheme == "dynamic")
        return Stored(fp8_block.FORMAT, 8, inputs=inputs)
    inputs = QuantArgs(8, "float", "group", dynamic=True, group_size=int(block[1]))
    return Stored(fp8_block.FORMAT, 8, inputs=inputs, variant=f"{int(block[0])}x{int(block[1])}")


# --- compressed-tensors ---


def _compressed(name: str, module: Any) -> Holding | Reject | None:
    scheme = vars(module).get("quantization_scheme")
    if scheme is None or getattr(scheme, "weights", None) is None:
        return None
    weight = module._parameters.get("weight")
    if not is_compressed(module):
        decompressed = weight is not None and weight.dtype in REAL
        why = "compressed-tensors has decompressed its weight already, at an earlier call or as it was loaded"
        return stays(why) if decompressed else None
    if type(module).__name__ != "Linear":
        return None
    group = {key: value for key, value in scheme.model_dump(mode="json").items() if value}
    stored = describe(Keys({"config_groups": {"own": group}}, "quantization_scheme")).targets[0].stored
    return None if stored is None else Holding(COMPRESSED, stored, _persistent(module))


# --- gptqmodel ---


def _gptq(name: str, module: Any) -> Holding | Reject | None:
    if not _is_a(module, "GPTQQuantLinear"):
        return None
    why = _moved(module, GPTQ_KERNELS)
    if why:
        return stays(why)
    bits = _whole(name, module, "bits", gptq.BITS)
    # A kernel multiplies by q - z or by q - (z + 1), whatever its checkpoint had: transformers has converted its zero points.
    version = "gptq_v2" if type(module).REQUIRES_FORMAT_V2 else "gptq"
    stored = Stored(
        gptq.FORMAT, bits, _group(name, module), bool(module.sym), variant="gptq_p" if module.planar else version
    )
    return Holding("gptq", stored, _persistent(module))


def _awq(name: str, module: Any) -> Holding | Reject | None:
    if not _is_a(module, "AWQuantLinear"):
        return None
    why = _moved(module, AWQ_KERNELS)
    if why:
        return stays(why)
    bits = _whole(name, module, "bits", (4,))
    stored = Stored(awq.FORMAT, bits, _group(name, module), bool(module.sym))
    return Holding("awq", stored, _persistent(module))


def _is_a(module: nn.Module, base: str) -> bool:
    return any(kind.__name__ == base for kind in type(module).__mro__)


def _moved(module: Any, kernels: tuple[str, ...]) -> str:
    """Why a kernel's tensors are not those of the file; empty where they are."""
    kind, mode = type(module).__name__, getattr(module, "linear_mode", None)
    if kind not in kernels:
        return f"{kind} is a kernel of gptqmodel that may hold its codes in an order of its own; {kernels[0]} does not"
    if getattr(module, "_cpu_transformed", False) or str(getattr(mode, "value", mode)) == "inference":
        return f"{kind} has brought its codes into an order of its own, at an earlier call"
    if getattr(module, "adapter", None) is not None:
        return f"{kind} has an adapter"
    if getattr(module, "online_full_had", False) or getattr(module, "online_partial_had", False):
        return f"{kind} rotates its inputs"
    if module.pack_dtype is not torch.int32:
        return f"{kind} packs codes into {dtype_name(module.pack_dtype)}, and int32 is taken over"
    return ""


def _whole(name: str, module: Any, attribute: str, valid: tuple[int, ...]) -> int:
    value = getattr(module, attribute, None)
    if value not in valid or isinstance(value, bool):
        known = ", ".join(map(str, valid))
        raise CheckpointError(
            f"{name}.{attribute} is {value!r}, and must be one of {known}.\nFix: load the model again."
        )
    return value


def _group(name: str, module: Any) -> int | None:
    """As the checkpoint said it; None for a scale per row."""
    value = getattr(module, "requested_group_size", module.group_size)
    if not isinstance(value, int) or isinstance(value, bool) or (value != -1 and value <= 0):
        raise CheckpointError(
            f"{name}.group_size is {value!r}, and must be -1 or from 1 up.\nFix: load the model again."
        )
    return None if value == -1 else value


# --- bitsandbytes ---


def _eight_bits(name: str, module: Any) -> Holding | Reject | None:
    weight = module._parameters.get("weight")
    if type(module).__name__ != "Linear8bitLt" or weight is None or weight.dtype != torch.int8:
        return None
    row = getattr(weight, "SCB", None)
    row = getattr(module.state, "SCB", None) if row is None else row  # where a first call has put it
    if row is None:
        return stays("Linear8bitLt has codes and no scales (SCB)")
    return Holding("bitsandbytes", Stored(bitsandbytes.FORMAT, 8), {"weight": weight.data, "SCB": row})


def _four_bits(name: str, module: Any) -> Reject | None:
    weight = module._parameters.get("weight")
    fix = "quant_compile.load(directory, policy) with `requantize: true` quantizes what they stand for"
    return stays(bitsandbytes.NO_SCHEME, fix) if type(weight).__name__ == "Params4bit" else None


# --- tensors ---


def _own(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of the module itself but its bias."""
    held = {**module._parameters, **module._buffers}
    return {key: tensor for key, tensor in held.items() if tensor is not None and key != "bias"}


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in _own(module).items() if key not in module._non_persistent_buffers_set}


def _elsewhere(module: nn.Module, tensors: Iterable[Tensor]) -> str:
    """Why a module's tensors are not all here."""
    if "_hf_hook" in vars(module):
        return "accelerate moves its tensors or inputs between devices"
    for tensor in tensors:
        if tensor.is_meta:
            return "its tensors are on the meta device"
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its tensors are {type(tensor).__name__}"
    return ""


def _is_code(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a weight's codes: of bitsandbytes, or named as a checkpoint names them."""
    if type(tensor).__name__ in _CLASSES:
        return True
    if tensor.dim() < 2 or tensor.dtype not in _CODES:
        return False
    return name.endswith(("proj", "weight", "_blocks", *SUFFIXES))
