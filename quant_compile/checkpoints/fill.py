"""Put a checkpoint into a model: planes into the weight store as they are, values into Parameters, one weight at a time.

A dry pass first reads headers only: it finds every fault that shapes and names can have, the scheme of every weight and the bytes to come.
Only then are tensors mapped, checked, moved to the device and adopted. Reads the model's names and sizes; writes Parameters, buffers,
the store and, for inputs that a checkpoint permutes or scales, a hook on the linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.checkpoints.description import Description, Stored
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, Part
from quant_compile.checkpoints.formats import FORMATS
from quant_compile.checkpoints.names import Copy, ExpertBias, Experts, Job, Linear, Mapped, Slot, Stem
from quant_compile.checkpoints.staging import staged
from quant_compile.checkpoints.weight import REAL, Dense, Module, Quantized, Questions, Read
from quant_compile.checkpoints.wishes import Again, Wishes
from quant_compile.ir.errors import PolicyError, RangeError
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import NONE, gates_first, may_differ
from quant_compile.ir.numerics import all_finite, dtype_name
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.shards import is_distributed
from quant_compile.lowering.identity import local_of, shard_of
from quant_compile.lowering.rounding.recipe import TO_NEAREST, Rounding
from quant_compile.lowering.shards import refusal, shares_scale
from quant_compile.lowering.weights import STORE, Key, quantize, quantize_expert
from quant_compile.model.distributed import with_part
from quant_compile.model.weights import _stores_columns

Progress = Callable[[int], None]
AS_READ = "quantized as it was read"
LATER = "quantized at the first call, since its planes depend on more than this rank's part"


@dataclass(frozen=True)
class Outcome:
    """What becomes of one Parameter or buffer.

    Attributes:
        scheme: of its planes; None: values.
        source: where they come from, for the ledger.
        nbytes: that it takes.
        notes: what is not as the checkpoint has it, and why.
        quantized: the checkpoint has it quantized.
        was: what the checkpoint has it in, where that is not what it becomes.
        by_policy: the user's policy, and not the device, is why it is something else.
    """

    name: str
    scheme: Scheme | None
    source: str
    nbytes: int
    notes: tuple[str, ...] = ()
    quantized: bool = False
    was: str = ""
    by_policy: bool = False


@dataclass
class Filler:
    """Reads jobs; ``dry`` on the meta device, without effect on the model.

    Attributes:
        files: of the checkpoint.
        description: of its configs.
        dtype: of the model.
        device: of the model.
        wishes: what the user's policy and the device make of its weights.
        progress: told the bytes of the file that each job has read.
    """

    files: Files
    description: Description
    dtype: torch.dtype
    device: torch.device
    wishes: Wishes = field(default_factory=Wishes)
    progress: Progress = lambda count: None
    _orders: dict[bytes, Tensor] = field(default_factory=dict)
    _apart: dict[str, str] = field(default_factory=dict)
    _kept: dict[str, str] = field(default_factory=dict)
    _later: dict[str, str] = field(default_factory=dict)
    _questions: Questions = field(default_factory=Questions)
    _said: dict[str, Stored | None] = field(default_factory=dict)
    _alike: dict[tuple[Any, ...], Read] = field(default_factory=dict)

    def plan(self, mapped: Mapped) -> list[Outcome]:
        """What each job will do; every header is checked, and no tensor is read.

        Raises:
            CheckpointError: a tensor's dtype or shape is wrong, or the config contradicts the tensors.
        """
        self._prepare(mapped)
        return [self._run(job, dry=True) for job in mapped.jobs]

    def fill(self, mapped: Mapped) -> list[Outcome]:
        """Do every job.

        Raises:
            CheckpointError: as ``plan``, or values that cannot be.
        """
        out: list[Outcome] = []
        self._prepare(mapped)
        tensors = self.files.tensors
        steps = [[part.span(tensors[part.name]) for part in step if not part.cuts] for step in self._steps(mapped)]
        with torch.no_grad(), staged(self.files, steps, self.device):
            for job in mapped.jobs:
                try:
                    out.append(self._run(job, dry=False))
                except RangeError as error:
                    self._keep(job.slot, mapped, error.reason)
                    done = zip(mapped.jobs, out, strict=False)
                    out = [self._run(old, False) if old.slot.name in self._kept else made for old, made in done]
                    out.append(self._run(job, dry=False))
                self._questions.answer()
                self.progress(sum(part.nbytes(tensors[part.name]) for part in parts_of(job)))
        self.files.close()
        return out

    def _keep(self, slot: Slot, mapped: Mapped, reason: str) -> None:
        """Leave a weight in 16 bits, of a block's weights both."""
        slots = [job.slot for job in mapped.jobs if job.slot.owner is slot.owner and job.slot.tensor.dim() == 3]
        self._kept |= dict.fromkeys([other.name for other in (slots if slot.tensor.dim() == 3 else [slot])], reason)

    def _prepare(self, mapped: Mapped) -> None:
        """What one weight's outcome depends on besides itself."""
        for job in mapped.jobs:
            if job.slot.name not in self._kept and self._has_values(job):
                self._find_unquantized(job.slot, mapped)
        self._find_apart(mapped)

    def _has_values(self, job: Job) -> bool:
        """Whether the checkpoint has a weight in 16 or 32 bits, or its first expert."""
        if not isinstance(job, Experts):
            return isinstance(job, Copy)
        stem = job.stems[0][0]
        return set(stem.tensors) == {"weight"} and self.files.tensors[stem.tensors["weight"].name].dtype in REAL

    def _find_unquantized(self, slot: Slot, mapped: Mapped) -> None:
        """Parts of weights that the policy names and that are not quantized as they are read."""
        scheme = self.wishes.plain(slot)
        if scheme is None or slot.tensor.dim() < 2:
            return
        reason = self._unfit(slot, scheme)
        if reason:
            self._keep(slot, mapped, reason)
        elif shares_scale(slot.tensor, scheme) or self._is_recorded(slot):
            self._later[slot.name] = LATER

    def _unfit(self, slot: Slot, scheme: Scheme) -> str:
        """Why the parts that ranks have of a weight cannot have a scheme."""
        refused = refusal(slot.tensor, scheme, _is_transposed(slot))
        return "" if refused is None else refused.reason

    def _is_recorded(self, slot: Slot) -> bool:
        """Whether how to round a weight that ranks have in parts was recorded of the whole one."""
        shard = shard_of(slot.tensor)
        return shard is not None and bool(shard.cuts) and self.wishes.rounding(slot) != TO_NEAREST

    def _check_cut(self, slot: Slot, found: Read) -> None:
        """Refuse to adopt planes that the ranks' parts would cut through.

        Raises:
            CheckpointError: a cut goes through a group or a block.
        """
        reason = self._unfit(slot, found.scheme) if isinstance(found, Quantized) else ""
        if reason:
            raise CheckpointError(
                f"{self.files.folder}: {slot.name}: {reason}\nOr load it on fewer ranks, or on one GPU."
            )

    def _notes(self, slot: Slot) -> tuple[str, ...]:
        """Why a weight that the policy names has values."""
        return tuple(known[slot.name] for known in (self._kept, self._later) if slot.name in known)

    def _plain(self, slot: Slot) -> Scheme | None:
        """As ``Wishes.plain``, but for what is kept, or quantized later."""
        return None if slot.name in self._kept or slot.name in self._later else self.wishes.plain(slot)

    def _again(self, slot: Slot, scheme: Scheme | None) -> Again | None:
        """As ``Wishes.again``; values of what is kept.

        Raises:
            PolicyError: the parts that ranks have of the weight cannot be quantized so as they are read.
        """
        again = self.wishes.again(slot, scheme)
        if again is None or again.scheme is None:
            return again
        if slot.name in self._kept:
            return replace(again, scheme=None)
        reason = self._unfit(slot, again.scheme)
        if not reason and shares_scale(slot.tensor, again.scheme):
            reason = f"{again.scheme.spec} has a scale of the whole weight, of which each rank reads a part"
        if reason:
            raise PolicyError(
                f"{slot.name} cannot become {again.scheme.spec} in parts: {reason}\n"
                "Fix: take it out of the rule, or give it a scheme with a scale per channel."
            )
        return again

    def _steps(self, mapped: Mapped) -> Iterator[list[Part]]:
        """What jobs read together, in their order."""
        for job in mapped.jobs:
            if isinstance(job, Copy):
                by_expert = job.slot.tensor.dim() == 3 and self.wishes.plain(job.slot) is not None
                yield from ([part] for part in (_experts_of(job.part, job.slot) if by_expert else [job.part]))
            elif isinstance(job, ExpertBias):
                yield from (list(parts) for parts in job.sources)
            else:
                stems = [(job.stem,)] if isinstance(job, Linear) else job.stems
                yield from (list(stem.tensors.values()) for own in stems for stem in own)

    def _run(self, job: Job, dry: bool) -> Outcome:
        if isinstance(job, Copy):
            return self._copy(job, dry)
        if isinstance(job, Linear):
            return self._linear(job, dry)
        return self._experts(job, dry) if isinstance(job, Experts) else self._bias(job, dry)

    def _find_apart(self, mapped: Mapped) -> None:
        """Weights of blocks whose other weight has no planes, or those of a scheme that no kernel takes beside theirs."""
        blocks: dict[int, list[Experts]] = {}
        for job in mapped.jobs:
            if isinstance(job, Experts):
                blocks.setdefault(id(job.slot.owner), []).append(job)
        for jobs in blocks.values():
            parts = ((job.slot.name, self._parts(job, 0, dry=True)) for job in jobs)
            found = {name: part if isinstance(part, str) else part[0].scheme for name, part in parts}
            kinds = {name: kind if isinstance(kind, str) else kind.spec for name, kind in found.items()}
            if len(set(kinds.values())) < 2 or "" in kinds.values():
                continue
            why = self._why_apart(found)
            for name, kind in found.items() if why is not None else ():
                other = next(other for other in kinds if kinds[other] != kinds[name])
                if isinstance(kind, Scheme):
                    self._apart[name] = f"{other.rpartition('.')[2]} of its block is not in {kinds[name]}{why}"

    def _why_apart(self, found: Mapping[str, Scheme | str]) -> str | None:
        """What is to be said besides of a block whose weights differ and become values; None: they go together as they are."""
        schemes = {name: kind for name, kind in found.items() if isinstance(kind, Scheme)}
        if len(schemes) != 2 or len(found) != 2:
            return ""
        up, down = sorted(schemes, key=lambda name: "down" in name.rpartition(".")[2])
        if not may_differ(schemes[up], schemes[down]):
            return ""
        reason = self.wishes.unserved(up, schemes[up], schemes[down])
        return f", and {reason}" if reason else None

    # --- reading ---

    def read(self, stem: Stem, dry: bool, dtype: torch.dtype | None = None) -> Read:
        """A stem's weight through the reader of its format.

        Args:
            dtype: of values and of scales that have the model's; None: the model's.

        Raises:
            CheckpointError: the config says nothing of it or something else, or a tensor is not of its format.
        """
        dtype = dtype or self.dtype
        module = Module(
            stem.name, self.files, stem.tensors, stem.n, stem.k, dtype, dry, self.device, True, stem.whole, stem.column,
            self._questions,
        )  # fmt: skip
        if set(stem.tensors) == {"weight"} and module.info("weight").dtype in REAL:
            values = module.tensor("weight", REAL, (stem.n, stem.k))
            return Dense(values.to(dtype), "")
        where = f"{self.files.folder}: {stem.name}"
        quantized = sorted(part.name for suffix, part in stem.tensors.items() if suffix != "weight") or [stem.name]
        stored = self._said_of(stem.name)
        if stored is None:
            says = "leaves it unquantized" if self.description.method else "does not describe its quantization"
            config = self.description.where or "config.json"
            raise CheckpointError(f"{where} has {quantized[0]}, and {config} {says}.\nFix: correct the config.")
        reader = FORMATS[stored.format]
        strange = sorted(set(stem.tensors) - set(reader.suffixes))
        if strange:
            name = stem.tensors[strange[0]].name
            text = f"{where}: {name} is no tensor of {stored.text}, which {self.description.where} names"
            raise CheckpointError(f"{text}.\nFix: correct the config.")
        if not dry or not reader.by_header:
            return reader.read(module, stored)
        infos = ((suffix, module.info(suffix)) for suffix in stem.tensors)
        headers = tuple((suffix, info.dtype, info.shape) for suffix, info in infos)
        key = (stored, dtype, stem.n, stem.k, stem.whole, stem.column, headers)
        if key not in self._alike:
            self._alike[key] = reader.read(module, stored)
        return self._alike[key]

    def _said_of(self, name: str) -> Stored | None:
        """What the config says of a module; None: nothing, or that it is not quantized."""
        if name not in self._said:
            ignored = self.description.ignores(name)
            self._said[name] = None if ignored else self.description.stored(name)
        return self._said[name]

    # --- jobs ---

    def _copy(self, job: Copy, dry: bool) -> Outcome:
        slot, info = job.slot, job.part.info(self.files.tensors[job.source])
        if info.shape != tuple(slot.tensor.shape):
            have, want = list(info.shape), list(slot.tensor.shape)
            text = f"{info.where} has shape {have}; {slot.name} of the model has {want}"
            raise CheckpointError(f"{text}.\nFix: load the model's own checkpoint.")
        floating = slot.tensor.dtype.is_floating_point
        if floating and info.dtype not in (*REAL, torch.float64):
            raise CheckpointError(f"{info.where} is {info.dtype} without scales.\nFix: write the checkpoint again.")
        scheme = self._plain(slot)
        if scheme is not None:
            return self._quantize(slot, scheme, job.part, dry)
        if not dry:
            same = info.dtype == slot.tensor.dtype
            values = self.files.load(job.part, self.device, copy=same)
            place(slot, values.to(slot.tensor.dtype))
        return Outcome(slot.name, None, _source(self.files, job.source), _nbytes(slot), self._notes(slot))

    def _quantize(self, slot: Slot, scheme: Scheme, source: Part, dry: bool) -> Outcome:
        """A weight in 16 bits, by the user's policy, on its way to the device."""
        text = f"{_source(self.files, source.name)}, {AS_READ}"
        if not dry:
            self._adopt_quantized(slot, scheme, source, text)
        experts = slot.tensor.shape[0] if slot.tensor.dim() == 3 else 1
        nbytes = experts * _plane_bytes(slot, scheme, key_of(slot, scheme, self.dtype), self.dtype)
        return Outcome(slot.name, scheme, text, nbytes)

    def _adopt_quantized(self, slot: Slot, scheme: Scheme, source: Part, text: str) -> None:
        if slot.tensor.dim() < 3:
            values = self.files.load(source, self.device, copy=False)
            adopt_values(slot, values, scheme, self.dtype, self.device, text, self.wishes.rounding(slot))
            return
        key = key_of(slot, scheme, self.dtype)
        experts = (self.files.load(part, self.device, copy=False) for part in _experts_of(source, slot))
        rounding = self.wishes.rounding(slot)
        parts = (quantize_expert(values, key, slot.name, rounding, i) for i, values in enumerate(experts))
        adopt_experts(slot, key, parts, self.device, text, rounding)

    def _linear(self, job: Linear, dry: bool) -> Outcome:
        slot, found = job.slot, self.read(job.stem, dry)
        self._questions.answer()
        self._check_cut(slot, found)
        text, was = self._text(job.stem), self._was(job.stem, found)
        again = self._again(slot, found.scheme if isinstance(found, Quantized) else None) if was else None
        if again is not None and not _same_codes(found, again):
            return self._linear_again(job, again, was, text, dry)
        if isinstance(found, Dense):
            return self._dense_linear(job, found, text, dry)
        if again is not None and again.scheme is not None:
            found, text = replace(found, scheme=again.scheme, input_scale=None), f"{text}, with the codes of {was}"
        if not dry:
            put(slot, found, self.dtype, self.device, text, job.transposed, self._orders)
        return _told(Outcome(slot.name, found.scheme, text, _bytes_of(found.planes), found.notes, True), again, was)

    def _linear_again(self, job: Linear, again: Again, was: str, text: str, dry: bool) -> Outcome:
        """What the codes stand for, rounded once to the model's dtype, and quantized otherwise or left so."""
        slot, scheme, text = job.slot, again.scheme, _changed(text, again, was)
        key = Key(NONE if scheme is None else scheme.spec, "rows", job.transposed, self.dtype)
        if not dry:
            values = self._exact(job.stem).to(self.dtype)
            _finite(values, f"{self.files.folder}: {job.stem.name}")
            if scheme is None:
                place(slot, (values.t() if job.transposed else values).to(slot.tensor.dtype).contiguous())
            else:
                source = nn.Parameter(values, requires_grad=False)
                rounding = self.wishes.rounding(slot)
                planes = quantize(source, key._replace(transposed=False), slot.name, rounding)
                STORE.adopt(hollow(slot, self.device), key, planes, text, rounding=rounding)
        nbytes = _nbytes(slot) if scheme is None else _plane_bytes(slot, scheme, key, self.dtype)
        return _told(Outcome(slot.name, scheme, text, nbytes, (), True), again, was)

    def _dense_linear(self, job: Linear, found: Dense, text: str, dry: bool) -> Outcome:
        if not dry:
            _finite(found.values, f"{self.files.folder}: {job.stem.name}")
            return put(job.slot, found, self.dtype, self.device, text, job.transposed, self._orders)
        notes = (found.reason,) if found.reason else ()
        return Outcome(job.slot.name, None, text, _nbytes(job.slot), notes, bool(found.reason))

    def _experts(self, job: Experts, dry: bool) -> Outcome:
        slot, text = job.slot, self._text(job.stems[0][0])
        parts = self._apart.get(slot.name) or self._parts(job, 0, dry)
        if isinstance(parts, str):
            return self._dense_experts(job, parts, text, dry)
        first = _joined(parts, job.interleaved)
        self._check_cut(slot, first)
        was = first.scheme.spec
        again = self._again(slot, first.scheme)
        if again is not None and not _same_codes(first, again):
            return self._experts_again(job, again, was, text, dry)
        if again is None or again.scheme is None:
            return self._adopt_read(job, first, parts, first.scheme, text, dry)
        return _told(self._adopt_read(job, first, parts, again.scheme, text, dry), again, was)

    def _adopt_read(
        self, job: Experts, first: Quantized, parts: list[Quantized], scheme: Scheme, text: str, dry: bool
    ) -> Outcome:
        """Every expert's codes as they are, under ``scheme``; ``first`` is the first expert, made of ``parts``."""
        slot, same = job.slot, scheme == first.scheme
        key = Key(scheme.spec, "experts", job.transposed, self.dtype, job.alternates)
        scales: list[Tensor] = []
        whole: list[Tensor] = []
        for expert in range(len(job.stems)):
            found = parts if expert == 0 else self._parts(job, expert, dry)
            if isinstance(found, str) or found[0].scheme != first.scheme:
                return self._dense_experts(
                    job, found if isinstance(found, str) else "experts have different schemes", text, dry
                )
            scale = _largest(found)
            if scale is not None and same:
                scales.append(scale)
            if not dry:
                whole = whole or [plane.new_empty((len(job.stems), *plane.shape)) for plane in first.planes]
                _put_rows([out[expert] for out in whole], found, job.interleaved)
        notes = first.notes
        scale = torch.stack(scales).amax(0) if scales else None
        if not dry:
            if scale is not None and any(not torch.equal(own, scale) for own in scales):
                notes = (*notes, "experts have different input scales: the largest serves all of them")
            self._questions.answer()
            source = text if same else f"{text}, with the codes of {first.scheme.spec}"
            STORE.adopt(hollow(slot, self.device), key, tuple(whole), source, scale)
        return Outcome(slot.name, scheme, text, len(job.stems) * _bytes_of(first.planes), notes, True)

    def _parts(self, job: Experts, expert: int, dry: bool) -> list[Quantized] | str:
        """What an expert's rows are made of, gate before up; a reason where that is no planes of one scheme."""
        found = [self.read(stem, dry) for stem in job.stems[expert]]
        parts = [part for part in found if isinstance(part, Quantized)]
        if len(parts) < len(found):
            return next(part.reason for part in found if isinstance(part, Dense))
        if any(part.gather is not None for part in parts):
            return "the inputs of its experts are in an order of their own (desc_act)"
        if any(part.factor is not None for part in parts):
            return "the inputs of its experts have factors of their own (pre_quant_scale)"
        if any(part.scheme != parts[0].scheme for part in parts):
            return f"gate and up are one weight, and the file has them in {' and '.join(p.scheme.spec for p in parts)}"
        block = family_of(parts[0].scheme).row_block(parts[0].scheme)
        rows = parts[0].n // 2 if job.interleaved else parts[0].n
        if block > 1 and (job.interleaved or (len(parts) > 1 and rows % block)):
            return f"gate has {rows} rows, which is no multiple of the {block} that share a scale"
        return parts

    def _dense_experts(self, job: Experts, reason: str, text: str, dry: bool) -> Outcome:
        """Experts in 16 bits; by the user's policy on the way, where it names them."""
        slot = job.slot
        again = self._again(slot, None) if reason else None
        if again is not None:
            return self._experts_again(job, again, self._stored(job.stems[0][0]), text, dry)
        notes = (
            self._notes(slot)
            if not reason
            else (reason if "kept in" in reason else f"{reason}: its values are kept in {dtype_name(self.dtype)}",)
        )
        scheme = self._plain(slot) if not reason else None
        if scheme is not None:
            return self._quantize_experts(job, scheme, f"{text}, {AS_READ}", dry)
        self._place_experts(job, dry)
        return Outcome(slot.name, None, text, _nbytes(slot), notes, bool(reason))

    def _experts_again(self, job: Experts, again: Again, was: str, text: str, dry: bool) -> Outcome:
        """As ``_linear_again``."""
        text = _changed(text, again, was)
        if again.scheme is not None:
            outcome = self._quantize_experts(job, again.scheme, text, dry, torch.float32)
        else:
            self._place_experts(job, dry, torch.float32)
            outcome = Outcome(job.slot.name, None, text, _nbytes(job.slot))
        return _told(replace(outcome, quantized=True), again, was)

    def _quantize_experts(
        self, job: Experts, scheme: Scheme, text: str, dry: bool, dtype: torch.dtype | None = None
    ) -> Outcome:
        """Quantize values of experts; ``dtype`` as in ``read``."""
        key = Key(scheme.spec, "experts", job.transposed, self.dtype, job.alternates)
        plain = key._replace(transposed=False)
        self._check_experts(job, dry)
        count = range(len(job.stems))
        name, rounding = job.slot.name, self.wishes.rounding(job.slot)
        parts = (quantize_expert(self._values(job, i, dtype), plain, name, rounding, i) for i in count)
        return self._adopt_experts(job.slot, key, parts, scheme, text, dry, rounding)

    def _place_experts(self, job: Experts, dry: bool, dtype: torch.dtype | None = None) -> None:
        """Values of experts as the Parameter holds them; ``dtype`` as in ``read``."""
        self._check_experts(job, dry)
        if dry:
            return
        out = torch.empty(job.slot.tensor.shape, dtype=self.dtype, device=self.device)
        for expert in range(len(job.stems)):
            values = self._values(job, expert, dtype)
            out[expert].copy_(values.t() if job.transposed else values)
        place(job.slot, out)

    def _check_experts(self, job: Experts, dry: bool) -> None:
        for stem in [stem for stems in job.stems for stem in stems] if dry else ():
            self.read(stem, True)

    def _exact(self, stem: Stem, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """[n, k] in f32, factors of inputs multiplied in; ``dtype`` as in ``read``."""
        found = self.read(stem, False, dtype)
        self._questions.answer()  # before what is made of the values is looked at
        values = found.dequantized()
        return values if found.factor is None else values * found.factor.float()

    def _values(self, job: Experts, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """[n, k] of an expert in the model's dtype, rows as the model has them; its factors are multiplied in."""
        whole = torch.cat([self._exact(stem, dtype) for stem in job.stems[expert]])
        whole = (gates_first(whole) if job.interleaved else whole).to(self.dtype)
        _finite(whole, f"{self.files.folder}: {job.stems[expert][0].name}")
        return torch.stack(whole.chunk(2), 1).flatten(0, 1) if job.alternates else whole

    def _adopt_experts(
        self, slot: Slot, key: Key, parts: Any, scheme: Scheme, text: str, dry: bool, rounding: Rounding = TO_NEAREST
    ) -> Outcome:
        if not dry:
            adopt_experts(slot, key, parts, self.device, text, rounding)
        return Outcome(slot.name, scheme, text, slot.tensor.shape[0] * _plane_bytes(slot, scheme, key, self.dtype))

    def _bias(self, job: ExpertBias, dry: bool) -> Outcome:
        slot, (count, n) = job.slot, job.slot.tensor.shape
        for sources in job.sources:
            for source in sources:
                info = source.info(self.files.tensors[source.name])
                if info.dtype not in REAL or info.shape != (n // len(sources),):
                    text = f"{info.where} is {info.dtype} {list(info.shape)}; {slot.name} needs {n // len(sources)} numbers"
                    raise CheckpointError(f"{text}.\nFix: write the checkpoint again.")
        if not dry:
            out = torch.empty(count, n, dtype=slot.tensor.dtype, device=self.device)
            for expert, sources in enumerate(job.sources):
                parts = [self.files.load(source, self.device, copy=False) for source in sources]
                out[expert].copy_(torch.stack(parts, 1).flatten() if job.alternates else torch.cat(parts))
            place(slot, out)
        return Outcome(slot.name, None, _source(self.files, job.sources[0][0].name), _nbytes(slot))

    # --- writing ---

    def _was(self, stem: Stem, found: Read) -> str:
        """What a checkpoint has a weight in; empty where it is not quantized."""
        if isinstance(found, Quantized):
            return found.scheme.spec
        return self._stored(stem) if found.reason else ""

    def _stored(self, stem: Stem) -> str:
        stored = self.description.stored(stem.name)
        return stored.text if stored is not None else self.description.method

    def _text(self, stem: Stem) -> str:
        stored = self.description.stored(stem.name)
        source = _source(self.files, next(iter(stem.tensors.values())).name)
        return f"{source} ({stored.text})" if stored is not None and set(stem.tensors) != {"weight"} else source


def scale_input(module: nn.Module, order: Tensor | None, factor: Tensor | None) -> None:
    """Let a module's input be gathered in an order, and multiplied, before each call."""
    if order is not None:
        module.register_buffer("sglq_input_order", order, persistent=False)
        module.register_forward_pre_hook(_reorder)
    if factor is not None:
        module.register_buffer("sglq_input_factor", factor.contiguous(), persistent=False)
        module.register_forward_pre_hook(_scale)


def _reorder(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].index_select(-1, module.sglq_input_order), *args[1:]


def _scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0] * module.sglq_input_factor, *args[1:]


def hollow(slot: Slot, device: torch.device) -> nn.Parameter:
    """A Parameter without values in every place of the slot; of a rank's part that part."""
    meta = slot.tensor
    values = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
    values.untyped_storage().resize_(0)
    return place(slot, values)


def place(slot: Slot, values: Tensor) -> nn.Parameter:
    """Make ``values`` the Parameter or buffer in every place of a slot; returns it.

    Where ranks have the Parameter in parts, ``values`` are this rank's, and the Parameter is distributed; returns the part.
    """
    held = slot.owner._parameters.get(slot.places[0][1])
    made: Any = nn.Parameter(values, requires_grad=False) if isinstance(slot.tensor, nn.Parameter) else values
    if is_distributed(held):
        made = with_part(held, values)
    for module, attribute in slot.places:
        if isinstance(slot.tensor, nn.Parameter) or is_distributed(held):
            module._parameters[attribute] = made
        else:
            module._buffers[attribute] = made
    return local_of(made)


def _joined(parts: Sequence[Quantized], interleaved: bool) -> Quantized:
    """An expert of its parts, gate rows before up rows."""
    planes = tuple(torch.cat(same) for same in zip(*(part.planes for part in parts), strict=True))
    planes = tuple(map(gates_first, planes)) if interleaved else planes
    return replace(parts[0], planes=planes, n=sum(part.n for part in parts), input_scale=_largest(parts))


def _largest(parts: Sequence[Quantized]) -> Tensor | None:
    """The input scale of an expert whose parts have one each."""
    scales = [part.input_scale for part in parts if part.input_scale is not None]
    return torch.stack(scales).amax(0) if scales else None


def _put_rows(planes: Sequence[Tensor], parts: Sequence[Quantized], interleaved: bool) -> None:
    """Fill an expert's planes with those of its parts, one below the other."""
    for plane, same in zip(planes, zip(*(part.planes for part in parts), strict=True), strict=True):
        first = 0
        for part in map(gates_first, same) if interleaved else same:
            plane[first : first + part.shape[0]].copy_(part)
            first += part.shape[0]


def _same_codes(found: Read, again: Again) -> bool:
    """Whether only the inputs differ, so that the codes stay what they are."""
    return isinstance(found, Quantized) and again.scheme is not None and again.scheme.weights == found.scheme.weights


def _changed(text: str, again: Again, was: str) -> str:
    return f"{text}, {'dequantized' if again.scheme is None else 'requantized'} from {was}"


def _told(outcome: Outcome, again: Again | None, was: str) -> Outcome:
    """The outcome of a weight that is not what the checkpoint has it in."""
    if again is None or outcome.was:
        return outcome
    notes = outcome.notes if again.by_policy else (*outcome.notes, again.reason)
    return replace(outcome, was=was, by_policy=again.by_policy, notes=notes)


def put(
    slot: Slot,
    found: Read,
    dtype: torch.dtype,
    device: torch.device,
    text: str,
    transposed: bool,
    orders: dict[bytes, Tensor],
) -> Outcome:
    """Put what was read of a linear into its slot: planes into the store, or values, and what its input needs into hooks.

    Args:
        dtype: of the model.
        device: of the planes.
        text: where they come from, for the ledger.
        transposed: the Parameter is stored [k, n].
        orders: and factors of inputs that other linears have, by their bytes: one tensor, so that siblings can merge.
    """
    if isinstance(found, Dense):
        values = found.values.t() if transposed else found.values
        place(slot, values.to(slot.tensor.dtype).contiguous())
        _inputs(slot.owner, None, found.factor, orders)
        return Outcome(
            slot.name, None, text, _nbytes(slot), (found.reason,) if found.reason else (), bool(found.reason)
        )
    key = Key(found.scheme.spec, "rows", transposed, dtype)
    own_input = found.gather is not None or found.factor is not None
    STORE.adopt(hollow(slot, device), key, found.planes, text, found.input_scale, own_input)
    _inputs(slot.owner, found.gather, found.factor, orders)
    return Outcome(slot.name, found.scheme, text, _bytes_of(found.planes), found.notes, True)


def _inputs(module: nn.Module, gather: Tensor | None, factor: Tensor | None, orders: dict[bytes, Tensor]) -> None:
    """Let a linear's input come in the order, and with the factors, that its planes were made for."""
    if gather is not None:
        gather = orders.setdefault(gather.cpu().numpy().tobytes(), gather)
    if factor is not None:
        bits = factor.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        factor = orders.setdefault(str(factor.dtype).encode() + bits, factor)
    scale_input(module, gather, factor)


def key_of(slot: Slot, scheme: Scheme, dtype: torch.dtype) -> Key:
    """What the planes of a weight depend on, of one linear's or of experts'."""
    if slot.tensor.dim() == 3:
        return Key(scheme.spec, "experts", _is_transposed(slot), dtype, alternates(slot))
    return Key(scheme.spec, "rows", _is_transposed(slot), dtype)


def _is_transposed(slot: Slot) -> bool:
    """Whether a weight is stored [k, n], or [E, k, n]."""
    return _stores_columns(slot.owner) if slot.tensor.dim() == 3 else type(slot.owner).__name__ == "Conv1D"


def adopt_values(
    slot: Slot,
    values: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    text: str,
    rounding: Rounding,
) -> nn.Parameter:
    """Quantize a weight's values, an expert at a time, and put a Parameter without values, with these planes, into its slot.

    Args:
        values: [n, k], or [E, n, k], as the slot's Parameter stores them.
        dtype: of the model.
        device: where it is quantized and stays.
        text: where the values come from, for the ledger.
        rounding: how planes are made of them.

    Raises:
        WeightError: the values are NaN or inf.
    """
    key = key_of(slot, scheme, dtype)
    if values.dim() == 3:
        parts = (quantize_expert(values[i].to(device), key, slot.name, rounding, i) for i in range(values.shape[0]))
        return adopt_experts(slot, key, parts, device, text, rounding)
    planes = quantize(nn.Parameter(values.to(device), requires_grad=False), key, slot.name, rounding)
    made = hollow(slot, device)
    STORE.adopt(made, key, planes, text, rounding=rounding)
    return made


def adopt_experts(
    slot: Slot, key: Key, parts: Iterable[Planes], device: torch.device, text: str, rounding: Rounding = TO_NEAREST
) -> nn.Parameter:
    """Put a Parameter without values, with the planes of its experts, into its slot."""
    whole: list[Tensor] = []
    for expert, planes in enumerate(parts):
        whole = whole or [plane.new_empty((slot.tensor.shape[0], *plane.shape)) for plane in planes]
        for out, plane in zip(whole, planes, strict=True):
            out[expert].copy_(plane)
    made = hollow(slot, device)
    STORE.adopt(made, key, tuple(whole), text, rounding=rounding)
    return made


def parts_of(job: Job) -> list[Part]:
    """What a job reads."""
    if isinstance(job, Copy):
        return [job.part]
    if isinstance(job, Linear):
        return list(job.stem.tensors.values())
    if isinstance(job, ExpertBias):
        return [part for parts in job.sources for part in parts]
    return list(dict.fromkeys(part for stems in job.stems for stem in stems for part in stem.tensors.values()))


def _experts_of(part: Part, slot: Slot) -> list[Part]:
    """A block's weight that one tensor holds, expert by expert."""
    first = 0 if part.rows is None else part.rows[0]
    out: list[Part] = []
    for index in range(first, first + slot.tensor.shape[0]):
        own = Part(part.name, index)
        for dim, runs in part.cuts:
            own = own.cut(dim - 1, runs)
        out.append(own)
    return out


def _finite(values: Tensor, where: str) -> None:
    if not all_finite(values):
        raise CheckpointError(f"{where} dequantizes to NaN or inf.\nFix: write the checkpoint again.")


def alternates(slot: Slot) -> bool:
    """Whether rows of gate and up alternate in a block's weight."""
    return slot.places[0][1].startswith("gate_up") and not getattr(slot.owner, "is_concatenated", True)


def _source(files: Files, name: str) -> str:
    return files.tensors[name].file.name


def _nbytes(slot: Slot) -> int:
    return slot.tensor.numel() * slot.tensor.element_size()


def _bytes_of(planes: Planes) -> int:
    return sum(plane.numel() * plane.element_size() for plane in planes)


def _plane_bytes(slot: Slot, scheme: Scheme, key: Key, dtype: torch.dtype) -> int:
    """Of one weight, or of one expert."""
    n, k = slot.tensor.shape[-2:]
    n, k = (k, n) if key.transposed else (n, k)
    return sum(spec.nbytes for spec in family_of(scheme).weight_planes(scheme, n, k, dtype))
