"""Modules that transformers loaded quantized, and whose ``forward`` dequantizes: linears over their own integers, or a reason why not.

A module of which ``library_modules`` knows what it holds becomes a plain ``nn.Linear`` in place, whose Parameter has no values and
whose planes are the module's tensors, by the reader of their format; a block of FP8Experts becomes the model's own experts. What was
there is kept for ``undo``, until ``forget``. Everything else whose tensors are integers stays, with a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.checkpoints.description import Description, Keys, Target
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, Part, TensorInfo
from quant_compile.checkpoints.fill import Filler, Outcome, put
from quant_compile.checkpoints.formats import FORMATS, METHODS
from quant_compile.checkpoints.library_modules import EXPERTS, FIX, Holding, holding_of, is_compressed
from quant_compile.checkpoints.loaded_experts import Twins, jobs_of
from quant_compile.checkpoints.names import Mapped, Slot
from quant_compile.checkpoints.weight import REAL, Dense, Module
from quant_compile.ir.family import Reject
from quant_compile.ir.shards import Shard
from quant_compile.lowering.identity import local_of, shard_of
from quant_compile.lowering.weights import STORE
from quant_compile.model.places import modules_of

MARK = "sglq_loaded"
HOOK = "ct_decompress_hook"
# What a plain module must not have: compressed-tensors finds modules to decompress by the first, bitsandbytes keeps tensors in the last.
_OWN = ("quantization_scheme", "quantization_status", "forward", "state")
_TENSORS = ("_parameters", "_buffers")


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
    """What a module was.

    Attributes:
        kind: its class.
        taken: attributes of the instance that are gone or have been replaced.
        added: attributes that it did not have.
        hooks: before its calls.
    """

    kind: type[nn.Module]
    taken: dict[str, Any]
    added: tuple[str, ...]
    hooks: dict[int, Any]

    def tensors(self) -> Iterator[Tensor]:
        """All of them, those that libraries keep beside Parameters and buffers as well."""
        for key in _TENSORS:
            yield from (tensor for name, tensor in self.taken[key].items() if tensor is not None and name != "bias")
        beside = getattr(self.taken.get("state"), "__dict__", {})
        yield from (tensor for tensor in beside.values() if isinstance(tensor, Tensor))


@dataclass
class _Mark:
    """On an adopted module."""

    method: str
    outcomes: tuple[Outcome, ...]
    before: _Before | None


@dataclass
class _Held(Files):
    """Tensors of a module in the place of a checkpoint's."""

    held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    on_disk = False

    def get(self, name: str) -> Tensor:
        """The tensor itself."""
        return self.held[name]


def adopt(model: nn.Module) -> Loaded:
    """Make plain linears, and experts, of a model's quantized modules, where their tensors can be planes.

    Raises:
        CheckpointError: tensors of a module are not of its format; nothing has been changed.
    """
    marks: list[_Mark] = []
    stays: list[Stays] = []
    fresh: list[nn.Module] = []
    twins, orders = Twins(model), dict[bytes, Tensor]()
    try:
        dtype = _dtype(model)
        for name, module in modules_of(model):
            found = _mark(module) or holding_of(name, module)
            if found is not None:
                _refuse_parts(name, module)
            if isinstance(found, Holding):
                fresh.append(module)
                found = _adopt(name, module, found, dtype, twins, orders)
            if isinstance(found, _Mark):
                marks.append(found)
            elif isinstance(found, Reject):
                stays.append(Stays(name, found.reason, tuple(p for p in module._parameters.values() if p is not None)))
    except BaseException:
        for module in fresh:
            _undo(module)
        raise
    if fresh:
        _set_hook(model, on=False)
    method = marks[0].method if marks else ""
    return Loaded(method, tuple(outcome for mark in marks for outcome in mark.outcomes), tuple(stays))


def _refuse_parts(name: str, module: nn.Module) -> None:
    """Refuse a library's module whose tensors ranks have in parts: integers and scales of whole modules are taken over.

    Raises:
        CheckpointError: torch divides one of its tensors.
    """
    parameters = module._parameters.items()
    cut = next((key for key, held in parameters if (shard := _shard(held)) is not None and shard.cuts), None)
    if cut is not None:
        raise CheckpointError(
            f"{name} was loaded quantized by transformers, and ranks have its {cut} in parts; only whole modules are taken over.\n"
            "Fix: quant_compile.load(directory, policy, distributed_config=...), which reads each rank's parts of the checkpoint."
        )


def _shard(held: Tensor | None) -> Shard | None:
    return None if held is None else shard_of(local_of(held))


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
    for key in (*before.added, MARK):
        vars(module).pop(key, None)
    vars(module).update(before.taken)
    module._forward_pre_hooks.clear()
    module._forward_pre_hooks.update(before.hooks)
    return True


def adopted(model: nn.Module) -> list[nn.Parameter]:
    """The Parameters that ``undo`` takes away."""
    marks = ((module, _mark(module)) for _, module in modules_of(model))
    found = [
        p for m, mark in marks if mark is not None and mark.before for n, p in m._parameters.items() if n != "bias"
    ]
    return [parameter for parameter in found if parameter is not None]


def forget(model: nn.Module) -> int:
    """Let go of what ``undo`` would put back; returns the bytes of tensors that are not planes as well."""
    freed = 0
    for _, module in modules_of(model):
        mark = _mark(module)
        if mark is not None and mark.before is not None:
            kept = {tensor.data_ptr() for tensor in _planes(module)}
            own = {tensor.data_ptr(): tensor.nbytes for tensor in mark.before.tensors()}
            freed += sum(nbytes for address, nbytes in own.items() if address not in kept)
            mark.before = None
    return freed


def _planes(module: nn.Module) -> Iterator[Tensor]:
    for parameter in module._parameters.values():
        entry = STORE.peek(parameter) if parameter is not None else None
        for pack in entry.packs.values() if entry is not None else ():
            yield from pack.slab.planes


def dequantized(model: nn.Module, found: Loaded) -> Iterator[str]:
    """What to say of weights that transformers had as integers, or whose config says so, and that no module holds; at most one sentence."""
    if (
        vars(model).get("is_quantized") is False
    ):  # transformers sets it where it takes the config away, and nowhere else
        yield (
            "transformers dequantized this model, as it loaded it or when it was told to: its integers are gone, and weights are taken as "
            "values; quant_compile.load(directory) keeps them"
        )
        return
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


def cache_left(model: nn.Module) -> Iterator[str]:
    """What to say of a KV cache that the config has a scheme for, whose scales transformers does not load; at most one sentence."""
    _, description = _configured(model)
    if description is not None and description.kv_cache is not None:
        yield (
            f"KV cache: the config says {description.kv_cache.text}, and transformers has not loaded its scales: it is kept as the policy "
            f"says, or in 16 bits; {FIX}"
        )


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


# --- what it becomes ---


def _mark(module: nn.Module) -> _Mark | None:
    return vars(module).get(MARK)


def _dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in."""
    own = getattr(getattr(model, "config", None), "dtype", None)
    if own in REAL:
        return own
    whole = (p for n, p in model.named_parameters() if p.dtype in REAL and "scale" not in n)
    return next((parameter.dtype for parameter in whole), torch.get_default_dtype())


def _adopt(
    name: str, module: nn.Module, held: Holding, dtype: torch.dtype, twins: Twins, orders: dict[bytes, Tensor]
) -> _Mark | Reject:
    if type(module).__name__ == EXPERTS:
        return _adopt_experts(name, module, held, dtype, twins)
    return _adopt_linear(name, module, held, dtype, orders)


def _adopt_linear(name: str, module: Any, held: Holding, dtype: torch.dtype, orders: dict[bytes, Tensor]) -> _Mark:
    n, k, stored = int(module.out_features), int(module.in_features), held.stored
    unknown = sorted(set(held.tensors) - set(FORMATS[stored.format].suffixes))
    if unknown:
        raise CheckpointError(
            f"{name} holds {unknown[0]}, which is no tensor of {stored.text}.\nFix: report this module."
        )
    files, device = _files(name, module, held), next(iter(held.tensors.values())).device
    parts = {key: Part(f"{name}.{key}") for key in held.tensors}
    with torch.no_grad():
        read = FORMATS[stored.format].read(Module(name, files, parts, n, k, dtype, False, device, copy=False), stored)
    bias = module._parameters.get("bias", module._buffers.get("bias"))
    before = _become(module, nn.Linear, {"_parameters": {"weight": None, "bias": _bias(bias, dtype)}, "_buffers": {}})
    vars(module)[MARK] = mark = _Mark(held.method, (), before)
    weight = nn.Parameter(torch.empty(n, k, dtype=dtype, device="meta"), requires_grad=False)
    slot = Slot(f"{name}.weight", weight, ((module, "weight"),), (f"{name}.weight",))
    outcome = put(slot, read, dtype, device, f"{files.folder} ({stored.text})", False, orders)
    if isinstance(read, Dense) and not read.reason:
        outcome = replace(outcome, quantized=True)
    mark.outcomes = (outcome,)
    return mark


def _adopt_experts(name: str, module: nn.Module, held: Holding, dtype: torch.dtype, twins: Twins) -> _Mark | Reject:
    twin = twins.of(name)
    if isinstance(twin, Reject):
        return twin
    jobs = jobs_of(name, twin, held, dtype)
    if isinstance(jobs, Reject):
        return jobs
    files, description = _files(name, module, held), Description(held.method, "its module", (Target(held.stored),))
    device = next(iter(held.tensors.values())).device
    outcomes = Filler(files, description, dtype, device).fill(Mapped(tuple(jobs), {}))
    own = {key: value for key, value in vars(twin).items() if "hooks" not in key} | {"training": module.training}
    if "config" in vars(module):  # of the model itself, which tells how experts are multiplied
        own["config"] = vars(module)["config"]
    before = _become(module, type(twin), own)
    vars(module)[MARK] = mark = _Mark(held.method, tuple(outcomes), before)
    return mark


def _files(name: str, module: nn.Module, held: Holding) -> _Held:
    """The module's tensors as if they came from a file."""
    where = Path(f"the {type(module).__name__} that transformers loaded")
    tensors = {f"{name}.{key}": tensor.detach() for key, tensor in held.tensors.items()}
    infos = {key: TensorInfo(key, where, t.dtype, tuple(t.shape), 0, t.nbytes) for key, t in tensors.items()}
    return _Held(where, infos, held=tensors)


def _become(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> _Before:
    """Change a module's class, and attributes of the instance; says what it was."""
    own = vars(module)
    before = _Before(
        type(module),
        {key: own.pop(key) for key in (*_OWN, "bias", *attributes) if key in own},
        tuple(attributes),
        dict(module._forward_pre_hooks),
    )
    module.__class__ = kind
    own.update(attributes)
    return before


def _bias(bias: Tensor | None, dtype: torch.dtype) -> nn.Parameter | None:
    """gptqmodel has it in a buffer, in f16."""
    if bias is None or isinstance(bias, nn.Parameter):
        return bias
    return nn.Parameter(bias.detach().to(dtype), requires_grad=False)


def _set_hook(model: nn.Module, on: bool) -> None:
    """compressed-tensors' hook, which decompresses the whole model at its first call: away where nothing is left for it, and back."""
    for module in model.modules():
        handle = vars(module).get(HOOK)
        if handle is None:
            continue
        if on and (kept := vars(module).pop(f"{MARK}_hook", None)) is not None:
            module._forward_pre_hooks[handle.id] = kept
        elif not on and not any(is_compressed(part) for part in module.modules()):
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
        yield f"{names[0]}{more}: stays as transformers loaded it: {reason}"
