"""Modules that transformers loaded quantized, and whose ``forward`` dequantizes: linears over their own integers, or a reason why not.

    FP8Linear             weight e4m3, weight_scale_inv              transformers' FineGrainedFP8
    Linear, compressed    weight or weight_packed, weight_scale, ... compressed-tensors, until a first call decompresses them

Each of these becomes a plain ``nn.Linear`` in place, whose Parameter has no values and whose planes are the module's tensors, by the
reader of their format. What was there is kept for ``undo``, until ``forget``. Everything else whose tensors are integers stays, with
a reason: experts, modules of GPTQ, AWQ and bitsandbytes, whose libraries put them into an order of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from quant_compile.checkpoints.compressed_tensors import METHOD as COMPRESSED
from quant_compile.checkpoints.compressed_tensors import describe
from quant_compile.checkpoints.description import Description, Keys, Stored
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, TensorInfo
from quant_compile.checkpoints.fill import Outcome, put
from quant_compile.checkpoints.formats import FORMATS, METHODS, SUFFIXES
from quant_compile.checkpoints.fp8_block import FORMAT as FP8_BLOCK
from quant_compile.checkpoints.names import Slot
from quant_compile.checkpoints.weight import REAL, Dense, Module, Part
from quant_compile.ir.scheme import QuantArgs
from quant_compile.model.places import modules_of

MARK = "sglq_loaded"
HOOK = "ct_decompress_hook"
MEMORY = Path("memory")
FIX = "quant_compile.load(directory) adopts the integers"
# Attributes by which compressed-tensors finds modules to decompress.
_SCHEME = ("quantization_scheme", "quantization_status")
_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
_CLASSES = ("Params4bit", "Int8Params")  # bitsandbytes' Parameters


@dataclass(frozen=True)
class Stays:
    """A module that is as transformers loaded it.

    Attributes:
        name: of the module.
        reason: why.
        parameters: that it holds.
    """

    name: str
    reason: str
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Loaded:
    """What became of the modules that transformers loaded quantized.

    Attributes:
        method: as a checkpoint's config names it, of the first that was adopted.
        outcomes: of adopted weights.
        stays: the others.
    """

    method: str
    outcomes: tuple[Outcome, ...]
    stays: tuple[Stays, ...]


@dataclass
class _Before:
    """What a module was."""

    kind: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    attributes: dict[str, Any]
    hooks: dict[int, Any]


@dataclass
class _Mark:
    """On an adopted module."""

    method: str
    outcome: Outcome
    before: _Before | None


@dataclass
class _Held(Files):
    """Tensors of a module in the place of a checkpoint's."""

    held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def get(self, name: str) -> Tensor:
        """The tensor itself."""
        return self.held[name]


def adopt(model: nn.Module) -> Loaded:
    """Make plain linears of a model's quantized modules, where their tensors can be planes.

    Raises:
        CheckpointError: tensors of a module are not of its format; nothing has been changed.
    """
    marks: list[_Mark] = []
    stays: list[Stays] = []
    fresh: list[nn.Module] = []
    try:
        dtype = _dtype(model)
        for name, module in modules_of(model):
            mark = _mark(module)
            if mark is None and (found := _stored(module)) is not None:
                fresh.append(module)
                mark = _adopt(name, module, *found, dtype)
            if mark is not None:
                marks.append(mark)
            elif reason := _reason(module):
                stays.append(Stays(name, reason, tuple(p for p in module._parameters.values() if p is not None)))
    except BaseException:
        for module in fresh:
            _undo(module)
        raise
    if fresh:
        _set_hook(model, on=False)
    method = marks[0].method if marks else ""
    return Loaded(method, tuple(mark.outcome for mark in marks), tuple(stays))


def undo(model: nn.Module) -> int:
    """Give modules back as they were before ``adopt``; returns how many."""
    count = sum(_undo(module) for _, module in modules_of(model))
    if count:
        _set_hook(model, on=True)
    return count


def _undo(module: nn.Module) -> bool:
    mark = _mark(module)
    if mark is None or mark.before is None:
        return False
    before = mark.before
    module.__class__ = before.kind
    for current, earlier in (
        (module._parameters, before.parameters),
        (module._buffers, before.buffers),
        (module._forward_pre_hooks, before.hooks),
    ):
        cast(dict[Any, Any], current).clear()
        cast(dict[Any, Any], current).update(earlier)
    vars(module).pop(MARK)
    vars(module).update(before.attributes)
    return True


def adopted(model: nn.Module) -> list[nn.Parameter]:
    """The Parameters that ``undo`` takes away."""
    marks = ((module, _mark(module)) for _, module in modules_of(model))
    return [cast(nn.Parameter, m._parameters["weight"]) for m, mark in marks if mark is not None and mark.before]


def forget(model: nn.Module) -> int:
    """Let go of what ``undo`` would put back; returns the bytes of tensors that are not planes as well."""
    freed = 0
    for _, module in modules_of(model):
        mark = _mark(module)
        if mark is not None and mark.before is not None:
            tensors = [t for name, t in mark.before.parameters.items() if t is not None and name != "bias"]
            freed += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            mark.before = None
    return freed


def dequantized(model: nn.Module, found: Loaded) -> Iterator[str]:
    """What to say of weights that a model's config calls quantized and that no module holds integers of; at most one sentence."""
    method, description = _configured(model)
    if description is None:
        return
    if not found.outcomes and not found.stays:
        yield f"the config says {method}, and no module holds integers: weights are taken as transformers made them; {FIX}"
        return
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and parameter.dtype in REAL and "scale" not in name
        if description.stored(name) is not None and not description.ignores(name)
    ]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: transformers has dequantized them as it loaded them, and they are taken as they are; {FIX}"


def _configured(model: nn.Module) -> tuple[str, Description | None]:
    """The method, and the description, of a model's config; none where it has none that is known."""
    found: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if found is None:
        return "", None
    data: dict[str, Any] = json.loads(json.dumps(found if isinstance(found, dict) else found.to_dict(), default=str))
    method = str(data.pop("quant_method", "")).lower()
    method = method.rpartition(".")[2].replace("_", "-")
    if method not in METHODS:
        return method, None
    try:
        return method, METHODS[method](Keys(data, "config.quantization_config"))
    except CheckpointError:  # of another version than the reader knows
        return method, Description(method)


# --- what a module is ---


def _mark(module: nn.Module) -> _Mark | None:
    return vars(module).get(MARK)


def _stored(module: nn.Module) -> tuple[str, Stored] | None:
    """The method and form of a module whose tensors are as in its checkpoint; None for any other."""
    if _elsewhere(module):
        return None
    if type(module).__name__ == "FP8Linear" and _is_fp8(module):
        return "fp8", _fp8_stored(module)
    if type(module).__name__ == "Linear" and _is_compressed(module):
        stored = _compressed_stored(module)
        return None if stored is None else (COMPRESSED, stored)
    return None


def _is_fp8(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.element_size() == 1 and module._parameters.get("weight_scale_inv") is not None


def _is_compressed(module: nn.Module) -> bool:
    status = vars(module).get("quantization_status")
    return vars(module).get("quantization_scheme") is not None and getattr(status, "value", status) == "compressed"


def _fp8_stored(module: Any) -> Stored:
    """From what transformers' FP8Linear was made with."""
    block = module.block_size
    if block is None:
        inputs = QuantArgs(8, "float", "tensor", dynamic=module.activation_scheme == "dynamic")
        return Stored(FP8_BLOCK, 8, inputs=inputs)
    inputs = QuantArgs(8, "float", "group", dynamic=True, group_size=int(block[1]))
    return Stored(FP8_BLOCK, 8, inputs=inputs, variant=f"{int(block[0])}x{int(block[1])}")


def _compressed_stored(module: Any) -> Stored | None:
    """From the scheme that compressed-tensors has left on the module."""
    group = {key: value for key, value in module.quantization_scheme.model_dump(mode="json").items() if value}
    data = {"config_groups": {"own": group}}
    return describe(Keys(data, "quantization_scheme")).targets[0].stored


def _elsewhere(module: nn.Module) -> str:
    """Why a module's tensors are not all here."""
    if "_hf_hook" in vars(module):
        return "accelerate moves its tensors or inputs between devices"
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.is_meta:
            return "its tensors are on the meta device"
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            return f"its tensors are {type(tensor).__name__}"
    return ""


def _reason(module: nn.Module) -> str:
    """Why a module that holds integers stays; empty for one that holds none."""
    kind = type(module).__name__
    scheme = vars(module).get("quantization_scheme")
    if scheme is not None and getattr(scheme, "weights", None) is not None and not _is_compressed(module):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dtype in REAL:
            return "compressed-tensors has decompressed its weight already, at an earlier call or as it was loaded"
    held = {**module._parameters, **module._buffers}
    integers = [name for name, t in held.items() if t is not None and _is_code(name, t)]
    if not integers:
        return ""
    return f"{kind} holds {integers[0]} in a form of its own" if not (why := _elsewhere(module)) else why


def _is_code(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a weight's codes: of bitsandbytes, or named as a checkpoint names them."""
    if type(tensor).__name__ in _CLASSES:
        return True
    if tensor.dim() < 2 or tensor.dtype not in _CODES:
        return False
    endings = ("proj", "weight", "_blocks", *SUFFIXES)
    return name.endswith(endings)


def _dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in."""
    own = getattr(getattr(model, "config", None), "dtype", None)
    if own in REAL:
        return own
    whole = (p for n, p in model.named_parameters() if p.dtype in REAL and "scale" not in n)
    return next((parameter.dtype for parameter in whole), torch.get_default_dtype())


# --- what it becomes ---


def _adopt(name: str, module: Any, method: str, stored: Stored, dtype: torch.dtype) -> _Mark:
    n, k = int(module.out_features), int(module.in_features)
    held = {f"{name}.{key}": tensor.detach() for key, tensor in _tensors(module)}
    infos = {key: TensorInfo(key, MEMORY, t.dtype, tuple(t.shape), 0, t.nbytes) for key, t in held.items()}
    parts = {key.removeprefix(f"{name}."): Part(key) for key in held}
    unknown = sorted(set(parts) - set(FORMATS[stored.format].suffixes))
    if unknown:
        raise CheckpointError(
            f"{name} holds {unknown[0]}, which is no tensor of {stored.text}.\nFix: report this module."
        )
    device = next(iter(held.values())).device
    files = _Held(MEMORY, infos, held=held)
    with torch.no_grad():
        read = FORMATS[stored.format].read(Module(name, files, parts, n, k, dtype, False, device, copy=False), stored)
    before = _Before(
        type(module), dict(module._parameters), dict(module._buffers), _taken(module), dict(module._forward_pre_hooks)
    )
    for key in parts:
        module._parameters.pop(key, None)
        module._buffers.pop(key, None)
    module.__class__ = nn.Linear
    weight = nn.Parameter(torch.empty(n, k, dtype=dtype, device="meta"), requires_grad=False)
    slot = Slot(f"{name}.weight", weight, ((module, "weight"),), (f"{name}.weight",))
    outcome = put(slot, read, dtype, device, f"the {before.kind.__name__} that transformers loaded ({stored.text})")
    if isinstance(read, Dense) and not read.reason:
        outcome = replace(outcome, quantized=True)
    vars(module)[MARK] = mark = _Mark(method, outcome, before)
    return mark


def _taken(module: nn.Module) -> dict[str, Any]:
    """Attributes of the instance that a plain linear must not have, taken from it."""
    return {key: vars(module).pop(key) for key in ("forward", *_SCHEME) if key in vars(module)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and key != "bias":
            yield key, tensor


def _set_hook(model: nn.Module, on: bool) -> None:
    """compressed-tensors' hook, which decompresses the whole model at its first call: away where nothing is left for it, and back."""
    for module in model.modules():
        handle = vars(module).get(HOOK)
        if handle is None:
            continue
        if on and (kept := vars(module).pop(f"{MARK}_hook", None)) is not None:
            module._forward_pre_hooks[handle.id] = kept
        elif not on and not any(_is_compressed(part) for part in module.modules()):
            kept = module._forward_pre_hooks.pop(handle.id, None)
            if kept is not None:
                vars(module)[f"{MARK}_hook"] = kept


def notes(stays: Sequence[Stays]) -> Iterator[str]:
    """One sentence for modules that stay for one reason."""
    by_reason: dict[str, list[str]] = {}
    for found in stays:
        by_reason.setdefault(found.reason, []).append(found.name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: stays as transformers loaded it: {reason}; {FIX}"
