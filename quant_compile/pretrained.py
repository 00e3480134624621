"""``load``: a checkpoint's directory, or a GGUF file, to a compiled model, with the integers that are in its files.

Builds the model that transformers would build, without its weights; ``checkpoints`` fills it; ``api.compile`` compiles it.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from quant_compile import api
from quant_compile.building import build, read_config
from quant_compile.checkpoints import cache
from quant_compile.checkpoints.adopted import policy_of
from quant_compile.checkpoints.cache import CachePlan, Decoder
from quant_compile.checkpoints.config import describe
from quant_compile.checkpoints.description import PACKED, Description, shown
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, read_json
from quant_compile.checkpoints.fill import Filler, Outcome, Progress, parts_of
from quant_compile.checkpoints.gguf.container import MARK, is_gguf
from quant_compile.checkpoints.gguf.files import GgufFiles
from quant_compile.checkpoints.gguf.model import GgufModel, read_model
from quant_compile.checkpoints.names import Mapped, Resolver
from quant_compile.checkpoints.packed import AGAIN, FILE, Packed
from quant_compile.checkpoints.packed import read as read_packed
from quant_compile.checkpoints.slices import divided
from quant_compile.checkpoints.wishes import Wishes
from quant_compile.generation.blocks import layer_names
from quant_compile.generation.facts import kv_heads, mixin
from quant_compile.inspect.models import DTYPES
from quant_compile.ir.errors import OptionError, PolicyError
from quant_compile.ir.kv import HEAD, CacheScheme
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.select import FALLBACKS, Request
from quant_compile.lowering.target import Target, default_policy
from quant_compile.lowering.tune import imported
from quant_compile.lowering.weights import claim_before_tracing
from quant_compile.model import cache_scales
from quant_compile.model.cache_scales import CacheScales
from quant_compile.model.distributed import has_parts
from quant_compile.model.division import ALONE, Division, asked
from quant_compile.model.ledger import LEDGER
from quant_compile.options import Options
from quant_compile.policy import Policy
from quant_compile.runtime.ranks import in_group, together


@dataclass(frozen=True)
class Plan:
    """What loading a checkpoint will do, found from headers and configs alone.

    Attributes:
        model: with Parameters on the meta device.
        files: of the checkpoint.
        description: of its configs.
        mapped: tensors to weights.
        outcomes: of each weight.
        dtype: of the model.
        given: the user's policy, or the device's default for a checkpoint that is not quantized.
        fallback: what serves where the device has no kernel for a scheme.
        wishes: what ``given`` and the device make of the weights.
        packed: of a folder with planes as kernels read them, which then says everything.
        cache: what becomes of scales of the KV cache.
    """

    model: nn.Module
    files: Files
    description: Description
    mapped: Mapped
    outcomes: tuple[Outcome, ...]
    dtype: torch.dtype
    given: Policy | None
    fallback: str | None
    wishes: Wishes
    packed: Packed | None = None
    cache: CachePlan = field(default_factory=CachePlan)

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded model."""
        return sum(outcome.nbytes for outcome in self.outcomes)

    @property
    def reads(self) -> int:
        """Bytes of files that filling the model reads."""
        if not has_parts(self.model):
            return self.files.nbytes
        return sum(part.nbytes(self.files.tensors[part.name]) for job in self.mapped.jobs for part in parts_of(job))

    def serving(self) -> tuple[str, ...]:
        """What the device makes of schemes that it has no kernels for, one sentence each.

        Raises:
            NoKernelError: nothing, and no fallback helps.
        """
        out: dict[tuple[str, str], int] = {}
        for outcome in self.outcomes:
            served = self.wishes.serving(outcome.name, outcome.scheme) if outcome.scheme is not None else None
            if outcome.scheme is not None and served is not None and served != outcome.scheme:
                key = (outcome.scheme.spec, served.spec)
                out[key] = out.get(key, 0) + 1
        return tuple(
            f"{count} weights in {old} run as {new}, by fallback {self.fallback}" for (old, new), count in out.items()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the configs and the names leave to say, one sentence each."""
        out = [f"{self.files.folder}: {self.description.text}", *self.description.notes, *self.cache.notes]
        out += [
            f"not tied: {one} and {other}, of which the files have different values"
            for one, other in self.mapped.untied
        ]
        for reason in dict.fromkeys(self.mapped.ignored.values()):
            names = [name for name, why in self.mapped.ignored.items() if why == reason]
            out.append(f"not used: {len(names)} tensors, {names[0]} first: {reason}")
        return tuple(out)

    def cache_scales(self) -> dict[str, CacheScales]:
        """Fixed scales of the KV cache, by layer; read here, so that wrong ones show before anything else is.

        Raises:
            CheckpointError: one is no positive number.
        """
        return cache.read(self.cache, self.files) if self.packed is None else self.packed.cache_scales()

    def table(self, full: bool = False) -> Table:
        """What becomes of each weight; those that differ only in numbers share a row unless ``full``."""
        title = (
            f"{self.files.folder.name}: {self.files.nbytes / 1e6:,.2f} MB in files, {self.nbytes / 1e6:,.2f} MB loaded"
        )
        table = Table(title=title, title_justify="left")
        for column in ("weight", "scheme", "MB", "from", "notes"):
            table.add_column(column, overflow="fold", justify="right" if column == "MB" else "left")
        rows: dict[tuple[object, ...], list[Outcome]] = {}
        for i, outcome in enumerate(self.outcomes):
            key = i if full else re.sub(r"\d+", "*", outcome.name)
            rows.setdefault((key, outcome.scheme, outcome.source, outcome.notes), []).append(outcome)
        for (key, scheme, source, _), row in rows.items():
            name = row[0].name if len(row) == 1 else f"{key} ({len(row)}x)"
            size = sum(outcome.nbytes for outcome in row) / 1e6
            spec = scheme.spec if isinstance(scheme, Scheme) else dtype_name(self.dtype)
            table.add_row(escape(name), spec, f"{size:,.2f}", escape(str(source)), escape("; ".join(row[0].notes)))
        return table


@contextmanager
def _collecting_later() -> Generator[None]:
    """Leave Python's garbage until then: a model is many new objects, none of them garbage, and collections look at all of them."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@_collecting_later()
def load(
    path: str | Path,
    policy: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_memory: int | None = None,
    progress: bool | None = None,
    fallback: str | None = None,
    distributed_config: Any = None,
    tp_plan: Any = None,
    **options: Any,
) -> nn.Module:
    """A checkpoint as a compiled, released model: what is quantized in its files is taken over as it is.

    Args:
        path: folder with config.json and safetensors files, or a GGUF file (of several splits the first).
        policy: for what the checkpoint has in 16 bits; None: its own quantization is the policy, or the device's default for a
            checkpoint that is not quantized. Rules with ``requantize: true`` hold for what is quantized as well.
        device: None: the GPU if there is one.
        dtype: of everything that is not quantized; None: the config's.
        max_memory: bytes that the weights may take on the device, of several each rank's; more is an error before any is read.
        progress: show a bar; None: on a terminal.
        fallback: what serves where the device has no kernel for a scheme: ``weight_only`` (its codes under 16-bit inputs) or ``fp8`` (4-bit
            floats become FP8_DYNAMIC); None: as the policy says, else that is an error.
        distributed_config: transformers' DistributedConfig, as for its ``from_pretrained``: every process that torchrun started calls this,
            and each has and reads its parts of the weights.
        tp_plan: ``"auto"``, or a plan: short for ``DistributedConfig(tp_plan=...)``.
        options: of ``compile``.

    Returns:
        The model; ``report(model)`` says of each weight which file it comes from.

    Raises:
        CheckpointError: a file, a tensor or a config is wrong, or does not fit the model; nothing is left on the device.
        PolicyError: the policy contradicts the checkpoint.
        NoKernelError: the device has no kernel for a linear's scheme; names the fallbacks that would do.
        OptionError: the processes cannot share the model.
        RankError: another process failed.
    """
    what, divides = f"load of {path}", distributed_config is not None or tp_plan is not None
    with together(what) if divides and in_group() else nullcontext():  # one rank may load a model for itself
        config = asked(distributed_config, tp_plan, device)
    division = None if config is None else Division.of(config)
    if division is not None:
        target = division.device
    else:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with nullcontext({}) if division is None else together(what) as alike:
        plan = plan_of(path, policy, target, dtype, fallback=fallback, options=options, division=division)
        alike["policy"] = "none" if plan.given is None else f"{plan.given.content_hash} {plan.given.to_dict()}"
        notes = [ALONE] if config is not None and division is None else []
        return _loaded(plan, target, max_memory, progress, options, notes)


def _loaded(
    plan: Plan,
    target: torch.device,
    max_memory: int | None,
    progress: bool | None,
    options: dict[str, Any],
    notes: Sequence[str],
) -> nn.Module:
    """What a plan says, done."""
    plan.serving()  # an error shows before anything is read
    if max_memory is not None and plan.nbytes > max_memory:
        raise OptionError(
            f"{plan.files.folder} takes {plan.nbytes / 1e9:.4g} GB, and max_memory is {max_memory / 1e9:.4g} GB.\n"
            "Fix: a policy with fewer bits for what is not quantized, or a larger device."
        )
    scales = plan.cache_scales()
    _reserve(plan.nbytes, target)
    with _bar(plan, progress) as step:
        whole = _filled(plan, target, step)
    cache_scales.keep(plan.model, scales)
    if isinstance(plan.files, GgufFiles):
        vars(plan.model)[MARK] = plan.files.head  # for ``save``
    _move_buffers(plan.model, target)
    claim_before_tracing(p for p in plan.model.parameters() if p.dim() > 1)
    notes = [*notes, *plan.notes, *plan.files.notes]
    if has_parts(plan.model):
        notes.append(
            f"read {plan.files.taken / 1e6:,.2f} MB of {plan.files.nbytes / 1e6:,.2f} MB in files, this rank's parts"
        )
    if plan.packed is not None:
        notes += used_times(plan.packed, Target.of(target if target.type == "cuda" else "cpu"))
    options.setdefault("release_weights", True)
    model = api.compile(plan.model.eval(), whole, **options)
    _note(model, notes, whole, target)
    return model


def _reserve(nbytes: int, device: torch.device) -> None:
    """Let torch's allocator have what the weights take in one piece, since asking CUDA for each tensor takes longer than copying it."""
    if device.type != "cuda":
        return
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:  # pieces that are free may do
        return


def _filled(plan: Plan, device: torch.device, progress: Progress) -> Policy:
    """Fill the model; the policy that what it has now belongs to."""
    if plan.packed is not None:
        plan.packed.fill(plan.model, device, progress)
        assert plan.given is not None
        return plan.given
    filler = Filler(plan.files, plan.description, plan.dtype, device, plan.wishes, progress)
    made = policy_of(plan.model, filler.fill(plan.mapped), plan.description, plan.given, plan.fallback)
    return made if plan.cache.rules is None else replace(made, kv_cache=plan.cache.rules)


def used_times(packed: Packed, target: Target) -> list[str]:
    """Use the times of kernels that a folder has, and say what of it does not hold for this device."""
    known = imported(target, packed.times)
    if packed.target != target.label:
        return [f"packed on {packed.target}: what kernels here read otherwise is packed anew at the first call"]
    return ["packed with other versions: kernels are measured anew"] if target.device == "cuda" and not known else []


def packed_policy(packed: Packed) -> Policy:
    """The policy that a packed folder was made with, without its scales, which the planes have.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return Policy.load({key: value for key, value in packed.policy.items() if key != "scales"})
    except PolicyError as error:
        where = packed.files.folder / FILE
        raise CheckpointError(f"{where} has a policy that cannot be read: {error}\n{AGAIN}") from error


def _plan_packed(
    files: Files, description: Description, model: nn.Module, wanted: torch.dtype, policy: Any, fallback: str | None
) -> Plan:
    if policy is not None:
        raise PolicyError(
            f"{files.folder} is packed by a policy of its own, and another cannot be applied to it.\n"
            "Fix: load it without a policy, or the checkpoint that it was made of with this one."
        )
    if fallback == "fp8":
        raise OptionError(
            f"{files.folder} is packed, and what is packed is not quantized again.\n"
            "Fix: load the checkpoint that it was made of with fallback='fp8'."
        )
    packed = read_packed(files, model)
    own = packed_policy(packed)
    own = own if fallback is None else replace(own, fallback=fallback)
    kinds = dict.fromkeys(scheme.name for scheme, _, _ in packed.caches.values())
    note = f"KV cache: {', '.join(kinds)} with the folder's own scales, of {len(packed.caches)} layers"
    cached = CachePlan(notes=(note,) if kinds else ())
    outcomes, mapped = packed.outcomes, Mapped((), {})
    return Plan(model, files, description, mapped, outcomes, wanted, own, own.fallback, Wishes(), packed, cached)


def plan_of(
    path: str | Path,
    policy: Any = None,
    device: torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    fallback: str | None = None,
    options: Mapping[str, Any] | None = None,
    target: Target | None = None,
    division: Division | None = None,
) -> Plan:
    """What ``load`` would do; reads headers and configs only.

    Args:
        target: that kernels are asked for; None: that of the device.
        division: among processes; the plan is then this rank's.

    Raises:
        CheckpointError, PolicyError: as ``load``, but for faults of values.
    """
    if fallback is not None and fallback not in FALLBACKS:
        raise OptionError(f"fallback must be one of {', '.join(FALLBACKS)}, got {fallback!r}")
    opened = _Opened.of(Path(path))
    files, description, config = opened.files, opened.description, opened.config
    wanted = _dtype(dtype, config, files.config_file)
    if description.method == PACKED and wanted != (own := _dtype(None, config, files.config_file)):
        raise OptionError(f"{path} is packed for {own}. Fix: load it without dtype.")
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # transformers would replace modules
    if division is not None:
        _refuse_whole(opened)
    model = build(config, wanted, files, division)
    if opened.gguf is None:
        _set_generation(model, files.folder)
    if description.method == PACKED:
        return _plan_packed(files, description, model, wanted, policy, fallback)
    mapped, description = opened.fit(model)
    target = target or Target.of(device if device is not None and device.type == "cuda" else "cpu")
    given = _given(policy, description, target, fallback)
    fallback = fallback if given is None else given.fallback
    cached = _plan_cache(model, files, description, mapped, given, options)
    mapped = replace(mapped, ignored={**mapped.ignored, **cached.unused})
    wishes = Wishes.of(model, given, fallback, target, _request(options, given))
    mapped, outcomes = _planned(mapped, files, description, wanted, wishes, division)
    policy_of(model, outcomes, description, given, fallback)  # a contradiction shows before anything is read
    return Plan(model, files, description, mapped, outcomes, wanted, given, fallback, wishes, cache=cached)


def _planned(
    mapped: Mapped,
    files: Files,
    description: Description,
    dtype: torch.dtype,
    wishes: Wishes,
    division: Division | None,
) -> tuple[Mapped, tuple[Outcome, ...]]:
    """The jobs, and what will become of each weight; among processes those of this rank, once the whole ones are known to be right."""

    def outcomes(jobs: Mapped) -> tuple[Outcome, ...]:
        return tuple(Filler(files, description, dtype, torch.device("meta"), wishes).plan(jobs))

    found = outcomes(mapped)
    if division is None:
        return mapped, found
    parts = divided(mapped, files, description)
    return parts, outcomes(parts)


def _refuse_whole(opened: _Opened) -> None:
    """Refuse files that only one process can load.

    Raises:
        OptionError: a GGUF file, or planes laid out for one device's kernels.
    """
    if opened.gguf is not None or opened.description.method == PACKED:
        what = "a GGUF file" if opened.gguf is not None else "packed for one device"
        raise OptionError(
            f"{opened.files.folder} is {what}, of which ranks cannot read their parts.\n"
            "Fix: load it on one GPU, or divide a checkpoint of safetensors, quantized (compressed-tensors, FP8, AWQ, GPTQ) or not."
        )


@dataclass(frozen=True)
class _Opened:
    """What a path names.

    Attributes:
        files: its tensors.
        description: of its configs; of a GGUF file that is known when its model is.
        config: of transformers.
        gguf: that file's model.
    """

    files: Files
    description: Description
    config: Any
    gguf: GgufModel | None = None

    @staticmethod
    def of(path: Path) -> _Opened:
        """Read headers and configs."""
        if is_gguf(path):
            made = read_model(path)
            return _Opened(made.files, Description(), made.config, made)
        files = Files.open(path)
        return _Opened(files, describe(files.folder), read_config(files))

    def fit(self, model: nn.Module) -> tuple[Mapped, Description]:
        """What each tensor is in the model."""
        if self.gguf is not None:
            return self.gguf.fit(model)
        return Resolver(model, self.files).resolve(), self.description


def _given(policy: Any, description: Description, target: Target, fallback: str | None) -> Policy | None:
    """The user's policy, or the device's default for what is not quantized."""
    given = None if policy is None else Policy.load(policy)
    if given is None and not description.method:
        given = Policy.load(default_policy(target))
    return given if given is None or fallback is None else replace(given, fallback=fallback)


def _plan_cache(
    model: Any,
    files: Files,
    description: Description,
    mapped: Mapped,
    given: Policy | None,
    options: Mapping[str, Any] | None,
) -> CachePlan:
    """What becomes of scales of the KV cache; a policy or an option that names ``kv_cache`` wins."""
    own = _options(options)
    says = own.kv_cache is not None or (given is not None and given.kv_cache is not None)
    users = (own.caches(given or Policy(None)),) if says else None
    stored = description.kv_cache
    decoder = Decoder(()) if stored is None else _decoder(model, stored.scheme)
    return cache.plan(stored, mapped.cache, files, decoder, users)


def _decoder(model: Any, scheme: CacheScheme | None) -> Decoder:
    """What a model lets a KV cache be."""
    layers = layer_names(model)
    reason = "" if mixin(model) is not None else f"{type(model).__name__} does not generate"
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        reason = "the model caches latents, of which libraries do not agree what such a scale is of"
    heads = kv_heads(model, len(layers)) if scheme is not None and scheme.scale == HEAD and not reason else None
    return Decoder(layers, heads, reason)


def _options(options: Mapping[str, Any] | None) -> Options:
    return Options.of({key: value for key, value in (options or {}).items() if key not in ("dynamic", "fullgraph")})


def _request(options: Mapping[str, Any] | None, given: Policy | None) -> Request:
    """What ``compile`` will be allowed to choose from."""
    return _options(options).request(given or Policy(None)).unpinned


def _dtype(given: str | torch.dtype | None, config: Any, file: Path) -> torch.dtype:
    if isinstance(given, str):
        given = DTYPES.get(given) or getattr(torch, given, None)
        if not isinstance(given, torch.dtype):
            raise OptionError(f"dtype must be a torch dtype or one of {', '.join(DTYPES)}")
    own = given or getattr(config, "dtype", None)
    own = getattr(torch, own, None) if isinstance(own, str) else own
    if own is None:
        return torch.bfloat16
    if own not in DTYPES.values() and given is None:
        known = ", ".join(map(str, DTYPES.values()))
        raise CheckpointError(f"{file}: dtype must be one of {known}, got {shown(own)}.\nFix: name one.")
    if own not in DTYPES.values():
        raise OptionError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {own}")
    return own


def _set_generation(model: Any, folder: Path) -> None:
    """What ``generate`` does by default, as the checkpoint says it."""
    from transformers import GenerationConfig

    if getattr(model, "generation_config", None) is not None and (folder / "generation_config.json").is_file():
        known = read_json(folder / "generation_config.json")
        try:
            model.generation_config = GenerationConfig.from_dict(known)
        except Exception as error:  # whatever transformers raises for values that it does not expect
            text = f"{folder / 'generation_config.json'}: transformers cannot read it: {type(error).__name__}: {str(error)[:300]}"
            raise CheckpointError(f"{text}.\nFix: correct this file, or remove it.") from None


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for name, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta:
                raise CheckpointError(
                    f"{name}.{attribute} is a buffer that no tensor fills.\nFix: report this architecture."
                )
            module._buffers[attribute] = buffer.to(device)


def _note(model: nn.Module, notes: Sequence[str], policy: Policy, device: torch.device) -> None:
    session = LEDGER.session(model, policy, Target.of(device if device.type == "cuda" else "cpu").label)
    session.notes |= dict.fromkeys(notes)


@contextmanager
def _bar(plan: Plan, wanted: bool | None) -> Generator[Progress]:
    """A bar with bytes and the time that is left, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not (console.is_terminal if wanted is None else wanted):
        yield lambda count: None
        return
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=plan.reads)
        yield lambda count: bar.advance(task, count)
