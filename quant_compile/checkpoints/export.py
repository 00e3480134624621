"""A model's weights to the tensors of a checkpoint: which of them are quantized, how each is stored, and under which names.

Reads the weight store, the model's names and sizes, and no values; the jobs that it makes read those when they are written. What is
planned is then read back dry, by the very code that loads checkpoints, so that what is written loads again with the same schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.checkpoints import compressed_tensors, compressed_tensors_writer
from quant_compile.checkpoints.cache_writer import CacheForm
from quant_compile.checkpoints.compressed_tensors_writer import Form, form_of, tensors_of
from quant_compile.checkpoints.description import Description, Keys
from quant_compile.checkpoints.errors import CheckpointError, SaveError
from quant_compile.checkpoints.files import Files, TensorInfo
from quant_compile.checkpoints.fill import Filler, alternates
from quant_compile.checkpoints.names import Resolver, Slot, slots_of
from quant_compile.checkpoints.spelling import PARTS, expert_parts, names_in_file
from quant_compile.checkpoints.write import Item, Job
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.weights import STORE, Key
from quant_compile.model.places import without_reserved
from quant_compile.model.weights import _stores_columns, linear_weights

KeyOf = Callable[[nn.Parameter], Key | None]
SHOWN = 8
# What the format ``packed`` refuses as well.
TIED = "it is the table of an embedding too, and weights that are tied are stored once, as they are"
UNSCALED = "the scale of its input is not known: call the model once"
PACKED_FIX = 'quant_compile.save(model, folder, "packed") writes them as they are, for this package alone'
NO_CACHE = CacheForm()


@dataclass(frozen=True)
class Export:
    """Everything to write.

    Attributes:
        jobs: in the order of the model's Parameters.
        config: ``quantization_config``; empty where nothing is quantized.
        schemes: of every weight that is quantized, by its name in the model.
        kept: names of the other weights and buffers.
        texts: further files, by name.
    """

    jobs: tuple[Job, ...]
    config: dict[str, Any]
    schemes: Mapping[str, Scheme]
    kept: tuple[str, ...]
    texts: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(job.nbytes for job in self.jobs)


def export_of(model: nn.Module, key_of: KeyOf, dtype: torch.dtype, cache: CacheForm = NO_CACHE) -> Export:
    """What a model becomes in files of compressed-tensors.

    Args:
        model: without wrappers.
        key_of: the planes that stand for a weight; None: its values do.
        dtype: of the model.
        cache: scales of its KV cache.

    Raises:
        SaveError: weights that compressed-tensors cannot express, each with its scheme and the reason, or that would not load again.
    """
    made = _Exporter(model, key_of)
    jobs = (*(job for slot in made.slots for job in made.jobs(slot)), *cache.jobs)
    made.complain()
    config: dict[str, Any] = {}
    if made.forms or cache.scheme is not None:
        config = compressed_tensors_writer.quantization_config(made.forms, made.others(), cache.scheme)
    kept = tuple(slot.name for slot in made.slots if slot.name not in made.schemes)
    out = Export(jobs, config, made.schemes, kept)
    _check(model, out, made.wanted, dtype)
    return out


def _check(model: nn.Module, export: Export, wanted: Mapping[str, Scheme], dtype: torch.dtype) -> None:
    """Read headers and config as a load would.

    Raises:
        SaveError: what a load would refuse, or take for another scheme.
    """
    items = [item for job in export.jobs for item in job.items]
    infos = {i.name: TensorInfo(i.name, Path("model.safetensors"), i.dtype, i.shape, 0, i.nbytes) for i in items}
    files = Files(Path("the saved folder"), infos)
    fix = f"Fix: {PACKED_FIX}; or `keep` this weight in the policy. Report this model."
    if len(infos) < len(items):
        names = [item.name for item in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise SaveError(f"two tensors would be called {twice}.\n{fix}")
    try:
        keys = Keys(export.config, "quantization_config")
        described = compressed_tensors.describe(keys) if export.config else Description()
        outcomes = Filler(files, described, dtype, torch.device("meta")).plan(Resolver(model, files).resolve())
    except CheckpointError as error:
        raise SaveError(
            f"{type(model).__name__} cannot be saved so that it loads again: {str(error).split('Fix:')[0]}{fix}"
        ) from None
    for outcome in outcomes:
        scheme = wanted.get(outcome.name)
        if outcome.scheme != scheme:
            ours, theirs = (s.spec if s is not None else "unquantized" for s in (scheme, outcome.scheme))
            why = f" ({'; '.join(outcome.notes)})" if outcome.notes else ""
            raise SaveError(f"{outcome.name} is {ours}, and would load as {theirs}{why}.\n{fix}")


@dataclass
class _Exporter:
    """Walks the slots of a model; collects forms by module, and refusals."""

    model: nn.Module
    key_of: KeyOf
    forms: dict[str, Form] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    wanted: dict[str, Scheme] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    refusals: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = list(dict.fromkeys(slots_of(self.model).values()))
        self._by_name = {slot.name: slot for slot in self.slots}
        self._spell = names_in_file(self.model)
        self._parts = expert_parts(self.model)
        self._embedded = {id(w.parameter) for w in linear_weights(self.model) if w.in_embedding}

    # --- names ---

    def _name(self, name: str) -> str:
        return self._spell(without_reserved(name))

    def _stems(self, slot: Slot, expert: int, always: bool) -> list[str]:
        """Modules of one expert in files, gate before up; none where files hold the block's weight whole."""
        block, _, attribute = slot.name.rpartition(".")
        parts = self._parts.get(attribute) or (PARTS.get(attribute, (attribute,)) if always else ())
        return [self._name(f"{block}.{expert}.{part}.weight").removesuffix(".weight") for part in parts]

    # --- jobs ---

    def jobs(self, slot: Slot) -> Iterator[Job]:
        """The jobs of one Parameter or buffer."""
        key = self._key(slot)
        if key is not None:
            yield from self._quantized(slot, key)
            return
        if isinstance(slot.tensor, nn.Parameter) and slot.tensor.dim() == 3 and self._stems(slot, 0, False):
            yield from self._plain_experts(slot)
        elif self._bias_of(slot) is not None:
            yield from self._expert_biases(slot)
        else:
            name = self._name(slot.name)
            if "sglq_input_factor" in slot.owner._buffers and slot.name.endswith(".weight"):
                reason = "its values go with factors of its inputs, which have no place in a checkpoint of this format"
                self.refusals.setdefault(("kept", reason), []).append(slot.name)
            self.plain.append(name.removesuffix(".weight"))
            yield _job({name: slot.tensor}, lambda: {name: _values(slot)})

    def _key(self, slot: Slot) -> Key | None:
        return self.key_of(slot.tensor) if isinstance(slot.tensor, nn.Parameter) else None

    def _quantized(self, slot: Slot, key: Key) -> Iterator[Job]:
        scheme = parse(key.spec)
        reason = self._refusal(slot, key, scheme)
        n, k = slot.tensor.shape[-2:] if slot.tensor.dim() > 1 else (0, 0)
        n, k = (k, n) if key.transposed else (n, k)
        stems = [slot.name] if slot.tensor.dim() != 3 else self._stems(slot, 0, True)
        form: Form | Reject = Reject(reason) if reason else form_of(scheme, n // len(stems), k)
        block = family_of(scheme).row_block(scheme)
        if isinstance(form, Form) and n // len(stems) % block and len(stems) > 1:
            form = Reject(
                f"gate and up have {n // len(stems)} rows each, no multiple of the {block} that share a scale"
            )
        if isinstance(form, Reject):
            self.refusals.setdefault((scheme.spec, form.reason), []).append(slot.name)
            return
        self.schemes[slot.name], self.wanted[slot.name] = scheme, form.scheme
        experts = slot.tensor.shape[0] if slot.tensor.dim() == 3 else None
        for expert in range(experts) if experts is not None else (None,):
            yield self._job(slot, key, form, (n, k), expert)

    def _refusal(self, slot: Slot, key: Key, scheme: Scheme) -> str | None:
        """Why a weight is none of those that compressed-tensors knows, whatever its scheme."""
        parameter = slot.tensor
        assert isinstance(parameter, nn.Parameter)
        entry = STORE.entry(parameter)
        if entry.scales_input:
            return "its input is reordered or scaled for its codes, which has no place in a checkpoint of this format"
        if id(parameter) in self._embedded:
            return TIED
        if scheme.static and entry.input_scale is None:
            return UNSCALED
        if key.view and key.view != tuple(parameter.shape):
            return f"it is multiplied as {'x'.join(map(str, key.view))}, and is no matrix of a linear"
        if parameter.dim() == 3:
            stored = (_stores_columns(slot.owner), alternates(slot))
            told = "its experts lie in another order than their module says"
            return None if stored == (key.transposed, key.interleaved) else told
        linear = parameter.dim() == 2 and isinstance(slot.owner, nn.Linear)
        return None if linear else f"it belongs to a {type(slot.owner).__name__}, and the format knows nn.Linear only"

    def _job(self, slot: Slot, key: Key, form: Form, size: tuple[int, int], expert: int | None) -> Job:
        """Tensors of a linear, or of one expert."""
        parameter: Any = slot.tensor
        stems = (
            [self._name(slot.name).removesuffix(".weight")]
            if expert is None
            else self._stems(slot, expert, always=True)
        )
        self.forms |= dict.fromkeys(stems, form)
        scale = STORE.entry(parameter).input_scale if parse(key.spec).static else None
        n, k = size[0] // len(stems), size[1]

        def tensors(planes: Planes, scale: Tensor | None) -> dict[str, Tensor]:
            cuts = zip(*(plane.chunk(len(stems)) for plane in planes), strict=True)
            return {
                f"{stem}.{suffix}": tensor
                for stem, own in zip(stems, cuts, strict=True)
                for suffix, tensor in tensors_of(form, own, n, k, scale).items()
            }

        specs = family_of(parse(key.spec)).weight_planes(parse(key.spec), *size, key.dtype)
        dry = tuple(_like(spec.shape, spec.dtype) for spec in specs)
        promised = tensors(dry, None if scale is None else scale.to("meta"))
        return _job(promised, lambda: tensors(STORE.logical(parameter, key, slot.name, expert), scale))

    def _plain_experts(self, slot: Slot) -> Iterator[Job]:
        """A block's weight as files hold it: a matrix for each expert, or two."""
        for expert in range(slot.tensor.shape[0]):
            stems = self._stems(slot, expert, always=False)
            self.plain.extend(stems)

            def tensors(whole: Tensor, stems: list[str] = stems) -> dict[str, Tensor]:
                rows = whole.t() if _stores_columns(slot.owner) else whole
                return {f"{stem}.weight": part for stem, part in zip(stems, _cut(slot, rows, len(stems)), strict=True)}

            def make(expert: int = expert, tensors: Callable[[Tensor], dict[str, Tensor]] = tensors):
                return tensors(_values(slot)[expert])

            yield _job(tensors(_like(slot.tensor.shape[1:], slot.tensor.dtype)), make)

    def _bias_of(self, slot: Slot) -> Slot | None:
        """The block's weight that a bias [E, n] belongs to, where that is stored expert by expert."""
        weight = self._by_name.get(slot.name.removesuffix("_bias")) if slot.name.endswith("_bias") else None
        if weight is None or weight.tensor.dim() != 3 or slot.tensor.dim() != 2 or self._key(weight) is None:
            return None
        return weight

    def _expert_biases(self, slot: Slot) -> Iterator[Job]:
        """One job for all experts: their biases are small."""
        weight = self._bias_of(slot)
        assert weight is not None

        def tensors(whole: Tensor) -> dict[str, Tensor]:
            out: dict[str, Tensor] = {}
            for expert in range(whole.shape[0]):
                stems = self._stems(weight, expert, always=True)
                for stem, part in zip(stems, _cut(weight, whole[expert], len(stems)), strict=True):
                    out[f"{stem}.bias"] = part
            return out

        yield _job(tensors(_like(slot.tensor.shape, slot.tensor.dtype)), lambda: tensors(_values(slot)))

    # --- what is left ---

    def others(self) -> dict[str, bool]:
        """Modules that are not quantized; True: readers would take them for quantized linears."""
        linear = {self._name(f"{path}.weight") for path, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        weights = [weight for weight in linear_weights(self.model) if not weight.in_embedding]
        sites = [weight.site for weight in weights if weight.site.kind == "linear"]
        linear |= {self._name(f"{name}.weight") for site in sites for name in site.names}
        linear = {name.removesuffix(".weight") for name in linear} - set(self.forms)
        experts = {stem.rpartition(".experts.")[0] + ".experts" for stem in self.plain if ".experts." in stem}
        linear |= {block for block in experts if not any(name.startswith(f"{block}.") for name in self.forms)}
        return {**{name: name in linear for name in self.plain}, **dict.fromkeys(sorted(linear), True)}

    def complain(self) -> None:
        """Raise what was refused, and that nothing is quantized."""
        if not self.refusals:
            return
        lines = ["compressed-tensors has no form for some weights; nothing has been written:"]
        for (spec, reason), names in self.refusals.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {spec}: {reason}: {', '.join(names[:SHOWN])}{more}")
        other = "give these weights another scheme by a rule of the policy, or `keep` them, and call the model once"
        packable = not any(reason in (TIED, UNSCALED) for _, reason in self.refusals)
        lines.append(f"Fix: {PACKED_FIX}; or {other}." if packable else f"Fix: {other}.")
        raise SaveError("\n".join(lines))


def _cut(slot: Slot, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Gate and up of an expert's rows."""
    if parts == 1:
        return (rows,)
    return (rows[0::2], rows[1::2]) if alternates(slot) else rows.chunk(2)


def _values(slot: Slot) -> Tensor:
    """The values of a Parameter or buffer.

    Raises:
        SaveError: they are released, or elsewhere.
    """
    entry = STORE.peek(slot.tensor) if isinstance(slot.tensor, nn.Parameter) else None
    if slot.tensor.is_meta or (entry is not None and entry.released):
        raise SaveError(f"{slot.name} has no values here.\nFix: quant_compile.restore(model, source) first.")
    with torch._C.DisableTorchFunctionSubclass():
        return slot.tensor.detach()


def _like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _job(promised: Mapping[str, Tensor], make: Callable[[], Mapping[str, Tensor]]) -> Job:
    return Job(tuple(Item(name, t.dtype, tuple(t.shape)) for name, t in promised.items()), make)
