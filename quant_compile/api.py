"""The functions a user calls on a model: compile it in place, read its ledger, free, restore and repack its weights."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quant_compile.checkpoints import loaded as from_transformers
from quant_compile.checkpoints.adopted import OWN, policy_of
from quant_compile.checkpoints.description import Description
from quant_compile.generation import install, outside_of, uninstall
from quant_compile.generation.loop import KEPT
from quant_compile.ir.errors import LockError, OptionError, PolicyError, StaleWeightError, WeightError
from quant_compile.ir.report import Report
from quant_compile.lowering.shards import whole_shape
from quant_compile.lowering.target import Target, default_policy
from quant_compile.lowering.weights import STORE, disclaim
from quant_compile.model import names as naming
from quant_compile.model import offload
from quant_compile.model.distributed import has_parts, own_part, put_back, refuse_wrapped, stand_in
from quant_compile.model.ledger import LEDGER
from quant_compile.model.places import parameters_of, places, unwrap, without_reserved, wrapped_by_peft
from quant_compile.model.weights import linear_weights
from quant_compile.options import Options, PolicySource
from quant_compile.policy import Policy
from quant_compile.runtime.locked import begin as begin_lock
from quant_compile.runtime.locked import drop as drop_lock
from quant_compile.runtime.locked import hold as hold_lock
from quant_compile.runtime.ranks import together


def compile(
    model: nn.Module, policy: Any = None, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any
) -> nn.Module:
    """Compile a model in place, so that ``model(...)`` and ``model.generate(...)``, prefill and decode, run quantized.

    Args:
        model: any nn.Module with its weights loaded; a second call with another policy replaces the first.
        policy: preset name, shipped policy, YAML path, dict or Policy; None: the device's default.
        dynamic: as in torch.compile.
        fullgraph: as in torch.compile.
        options: ``mode``, ``release_weights``, ``kernels``, ``tune``, ``inductor``, ``guard``, ``attention``, ``blocks``, ``lock``,
            ``lock_update``, ``verify``; see ``Options``.

    Returns:
        The same model.

    Raises:
        OptionError, PolicyError, WeightError, LockError: nothing of the model has been changed.
    """
    for name, value, valid in (("dynamic", dynamic, (None, True, False)), ("fullgraph", fullgraph, (True, False))):
        if not any(value is one for one in valid):  # torch.compile would say so at the first call, or not at all
            raise OptionError(f"{name} must be one of {', '.join(map(str, valid))}, got {value!r}")
    parsed = Options.of({**options, "policy": policy})
    refuse_wrapped(model)
    lent = set(map(id, offload.lent_parameters(model)))
    if any(parameter.is_meta and id(parameter) not in lent for parameter in model.parameters()):
        raise WeightError(
            "the model is on the meta device and has no weights. Fix: load it first (from_pretrained, or to_empty + load_state_dict)."
        )
    lazy = next((name for name, value in model.named_parameters() if is_lazy(value)), None)
    if lazy is not None:
        raise WeightError(
            f"{lazy} has no shape yet (a lazy module). Fix: call the model once with an example input before compiling it."
        )
    device = offload.execution_device(model)
    target = Target.of(next((p.device for p in model.parameters() if p.is_cuda), "cpu" if device is None else device))
    source = PolicySource(parsed.policy, default_policy(target))
    source.check_planes(name for weight in linear_weights(unwrap(model)) for name in weight.site.names)
    source, loaded = _with_lock(unwrap(model), parsed, source, policy is not None)
    problems = source.policy.resolve(unwrap(model)).problems
    if parsed.releases(source.policy):
        stand_in(unwrap(model))
    naming.register(model)
    LEDGER.forget_refusals(unwrap(model))
    session = LEDGER.session(unwrap(model), source.policy, target.label)
    session.checked = True
    for text in [text for text in session.notes if text.startswith(KEPT)]:
        del session.notes[text]  # of an earlier compile
    session.notes |= dict.fromkeys(problems)
    session.notes |= dict.fromkeys(loaded)
    if policy is None and not source.policy.name.startswith(OWN):
        session.notes[f"no policy was given: {source.policy.name} is the default on this device"] = None
    if parsed.releases(source.policy):
        from_transformers.forget(unwrap(model))
    options = {**options, "policy": source.policy}
    note = partial(_note, weakref.ref(unwrap(model)), source.policy, target.label)
    for part in _called(model):
        install(part, options, note, dynamic=dynamic, fullgraph=fullgraph)
    return model


def _with_lock(model: nn.Module, parsed: Options, source: PolicySource, given: bool) -> tuple[PolicySource, list[str]]:
    """``_with_loaded``, and the lock held by the names that the model's weights have then.

    Raises:
        LockError, CheckpointError, PolicyError: nothing has been changed.
    """
    keeper = begin_lock(parsed)
    if keeper is None:
        found = _with_loaded(model, source, given)
        drop_lock(model)
        return found
    adopted = any(True for _ in from_transformers.adopted(model))
    source, loaded = _with_loaded(model, source, given)
    try:
        text = hold_lock(keeper, model, source.policy.strict)
    except LockError:
        if not adopted:
            from_transformers.undo(model)
        raise
    return source, [*loaded, *([text] if text else [])]


def _with_loaded(model: nn.Module, source: PolicySource, given: bool) -> tuple[PolicySource, list[str]]:
    """The policy of a model some of whose modules transformers loaded quantized, and what is to say of the others.

    Raises:
        CheckpointError, PolicyError: tensors are not of their format, or the policy contradicts them; nothing has been changed.
    """
    before = set(map(id, from_transformers.adopted(model)))
    found = from_transformers.adopt(model)
    if found.outcomes:
        description = Description(found.method, "the model that transformers loaded")
        try:
            whole = policy_of(model, found.outcomes, description, source.policy if given else None)
        except PolicyError:
            if not before:
                from_transformers.undo(model)
            raise
        source = PolicySource(whole if given else replace(whole, release_weights=None), whole.name)
    for module in found.stays:
        for parameter in module.parameters:
            LEDGER.record(parameter).reason = module.reason
    left = (*from_transformers.dequantized(model, found), *from_transformers.cache_left(model))
    return source, [*from_transformers.notes(found.stays), *left]


def _called(model: nn.Module) -> tuple[nn.Module, ...]:
    """A model, and where PEFT stands around one, that one too: its ``generate`` calls what is inside, not the wrapper."""
    inner = wrapped_by_peft(model)
    return (model,) if inner is None else (model, inner)


def _note(model: weakref.ref[nn.Module], policy: Policy, target: str, text: str) -> None:
    found = model()
    if found is not None:
        LEDGER.session(found, policy, target).notes[text] = None


def uncompile(model: nn.Module) -> nn.Module:
    """Give a model back as it was before ``compile``: its calls, its ``generate``, its generation config; planes are freed.

    Returns:
        The same model.

    Raises:
        StaleWeightError: weights are released, so that the model cannot run without its planes; nothing has been changed.
    """
    inner = unwrap(model)
    offload.adopt(inner)
    own = set(map(id, from_transformers.adopted(inner)))  # released, but what they were made of is here
    STORE.refresh(parameter for parameter in parameters_of(inner) if id(parameter) not in own)
    for part in _called(model):
        uninstall(part)
    from_transformers.undo(inner)
    for parameter in parameters_of(inner):
        disclaim(parameter)
    put_back(inner)
    for part in _called(model):
        LEDGER.forget(unwrap(part))
        drop_lock(unwrap(part))
    return model


def report(model: nn.Module) -> Report:
    """The ledger of a model: what became of every parameter's bytes, and why.

    Args:
        model: compiled, or any other, of which it says that it is not; a part of a compiled model has a report, too.

    Returns:
        The report as it is now; it does not change with later calls.
    """
    return LEDGER.report(model)


@contextmanager
def watch(model: nn.Module) -> Generator[None]:
    """Write to the report which weights are read outside of compiled graphs by whatever runs inside of the ``with`` block.

    The first calls of a compiled model are watched anyhow. This is for the others: methods besides ``forward``, parts called by
    themselves, calls under a dispatch mode or a stance of ``torch.compiler``. Python runs several times slower inside.

    Raises:
        OptionError: the model is not compiled, or another profiler (``sys.setprofile``) is on.
        PolicyError: at the end of the block, if the policy is strict and a weight that it names was read outside.
    """
    outside = outside_of(unwrap(model)) or outside_of(model)
    if outside is None:
        raise OptionError("the model is not compiled. Fix: quant_compile.compile(model, policy) first.")
    if sys.getprofile() is not None:
        raise OptionError(
            "a profiler is on (sys.setprofile), and Python has room for one. Fix: turn it off for this block."
        )
    with outside.watching():
        yield


def release(model: nn.Module) -> int:
    """Free the original values of every packed weight that no graph reads unquantized; returns the bytes freed.

    Compiled calls go on. Graphs compiled before notice the change of class and are compiled once more at their next call;
    with ``release_weights=True`` at compile time they are not. Eager use, state_dict, save and deepcopy raise until ``restore``.
    Of weights that ranks have in parts each rank releases its own.

    Args:
        model: compiled, and called once, so that its weights are packed.

    Returns:
        Bytes of 16-bit values that were freed; 0 where nothing is packed.
    """
    stand_in(unwrap(model), lambda parameter: (entry := STORE.peek(parameter)) is not None and bool(entry.packs))
    return from_transformers.forget(unwrap(model)) + sum(STORE.release(parameter) for parameter in parameters_of(model))


def restore(model: nn.Module, source: str | Path | Mapping[str, Tensor] | nn.Module) -> int:
    """Put the original values of released weights back; returns how many. Every rank of a divided model must call it.

    Args:
        model: the model.
        source: a safetensors file or a folder of them, a state dict, or a model; names with or without wrappers' parts. A rank that has
            parts takes them out of whole weights.

    Raises:
        StaleWeightError: the source lacks a weight or has another shape; nothing has been changed.
        OptionError: the source is no safetensors file, and no folder of them; nothing has been changed.
        RankError: the source of another rank of a divided model is none of its; nothing has been changed on any.
    """
    model = unwrap(model)
    with together("restore") if has_parts(model) else nullcontext():
        get, found = _restorable(model, source)
    for parameter, name in found:
        STORE.restore(parameter, own_part(parameter, get(name)))
    return len(found)


def _restorable(
    model: nn.Module, source: str | Path | Mapping[str, Tensor] | nn.Module
) -> tuple[Callable[[str], Tensor], list[tuple[nn.Parameter, str]]]:
    """How a source is read, and each released weight with its name there."""
    names = naming.names_in(model)
    released = [p for p in parameters_of(model) if (entry := STORE.peek(p)) is not None and entry.released]
    get, known = _reader(source)
    # A source with wrappers' parts in its names has them everywhere; one name alone may be that of another weight.
    wrapped = all(own.raw[0] in known for own in names.values())
    found: list[tuple[nn.Parameter, str]] = []
    for parameter in released:
        own = names[id(parameter)]
        aliases = (*own.raw, *own.full) if wrapped else (*own.full, *own.raw)
        name = next((alias for alias in aliases if alias in known), None)
        if name is None:
            raise StaleWeightError(
                f"the source has no {own.full[0]}; it has {len(known)} tensors, e.g. {', '.join(sorted(known)[:3])}"
            )
        shape = tuple(known[name])
        if shape not in (tuple(parameter.shape), whole_shape(parameter)):
            raise StaleWeightError(f"{name}: the source has shape {shape}, the model {tuple(parameter.shape)}")
        found.append((parameter, name))
    return get, found


def refresh(model: nn.Module) -> int:
    """Repack weights whose values changed in a way that torch does not record (``.data`` edits); returns how many had planes.

    Args:
        model: compiled; its weights are packed anew at its next call.

    Raises:
        StaleWeightError: a weight is released.
    """
    offload.adopt(unwrap(model))
    return STORE.refresh(parameters_of(model))


def _reader(
    source: str | Path | Mapping[str, Tensor] | nn.Module,
) -> tuple[Callable[[str], Tensor], dict[str, tuple[int, ...]]]:
    """(name -> tensor, name -> shape) of a source, without reading tensors that are not asked for."""
    if isinstance(source, nn.Module):
        source = {place.name: place.parameter for place in places(source)}
    if isinstance(source, Mapping):
        tensors = {without_reserved(name): tensor for name, tensor in source.items()} | dict(source)
        for name, tensor in tensors.items():
            if tensor.is_meta or getattr(tensor, "released_by_sglquant", False):
                raise StaleWeightError(
                    f"{name} of the source has no values itself: it is {'on the meta device' if tensor.is_meta else 'released'}"
                )
        return lambda name: tensors[name], {name: tuple(t.shape) for name, t in tensors.items()}
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise OptionError(f"{path} is no safetensors file and no folder of them")
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                    where[name] = file
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except SafetensorError as error:
            raise OptionError(f"{file} is not readable as safetensors: {error}. Nothing has been changed.") from None

    def get(name: str) -> Tensor:
        with safe_open(str(where[name]), framework="pt") as opened:
            return opened.get_tensor(name)

    return get, shapes
