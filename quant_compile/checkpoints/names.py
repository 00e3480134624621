"""File names to names of the transformers model: which tensors make which weight.

    a linear's tensors       model.layers.0.mlp.up_proj.{qweight, qzeros, ...}  ->  model.layers.0.mlp.up_proj.weight
    an expert's              ....experts.3.{gate,up,down}_proj.*                ->  expert 3 of ....experts.{gate_up_proj, down_proj}
    without a gate           ....experts.3.{up,down}_proj.*                     ->  expert 3 of ....experts.{up_proj, down_proj}
    fused, quantized         ....experts.gate_up_proj{_blocks, _scales, ...}    ->  all experts of ....experts.gate_up_proj
    anything else            a Parameter's or a buffer's own name

transformers' renamings of older names, and a missing or additional prefix of the base model, are undone. Every tensor of the file is used,
or ignored with a reason; every Parameter and every persistent buffer is filled. What is left over on either side is an error. So are two
tensors for one place, unless they are the same; where a config ties weights that a file has with different values, they are not tied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from quant_compile.checkpoints import cache
from quant_compile.checkpoints.errors import CheckpointError, cut
from quant_compile.checkpoints.files import Files, Part, names_of
from quant_compile.checkpoints.formats import SUFFIXES
from quant_compile.checkpoints.spelling import names_from_file
from quant_compile.model.weights import _stores_columns

GATE, UP, DOWN, BOTH = "gate", "up", "down", "both"
_PARTS = {"gate_proj": GATE, "w1": GATE, "up_proj": UP, "w3": UP, "down_proj": DOWN, "w2": DOWN, "gate_up_proj": BOTH}
_EXPERT = re.compile(rf"(.*\bexperts)\.(\d{{1,9}})\.({'|'.join(_PARTS)})")
# Endings of fused tensors -> the suffix that a reader knows.
_FUSED = {
    "_weight_scale_inv": "weight_scale_inv", "_scale_inv": "weight_scale_inv", "_weight_scale_2": "weight_scale_2",
    "_weight_scale": "weight_scale", "_input_scale": "input_scale", "_blocks": "blocks", "_scales": "scales", "_scale": "weight_scale",
}  # fmt: skip
# Of these a weight has one.
_CODES = ("weight", "weight_packed", "qweight", "blocks")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")
SHOWN = 6


@dataclass(frozen=True)
class Stem:
    """The tensors of one linear, or of one part of one expert: suffix -> tensor.

    Attributes:
        name: as the checkpoint spells it.
        tensors: by suffix.
        n: rows.
        k: columns.
        whole: rows and columns of the weight that these are a rank's part of; None: they are all.
        column: the first of the weight's columns.
    """

    name: str
    tensors: Mapping[str, Part]
    n: int
    k: int
    whole: tuple[int, int] | None = None
    column: int = 0


@dataclass(frozen=True)
class Slot:
    """A Parameter or a persistent buffer of the model, in every place that holds it.

    Attributes:
        name: its first name.
        tensor: the Parameter or buffer; in jobs of a rank's parts this rank's part of it.
        places: (module, attribute), aliases included.
    """

    name: str
    tensor: Tensor
    places: tuple[tuple[nn.Module, str], ...]
    names: tuple[str, ...]

    @property
    def owner(self) -> nn.Module:
        """The module that holds it first."""
        return self.places[0][0]


@dataclass(frozen=True)
class Copy:
    """A tensor that is a Parameter's or a buffer's whole content; of a rank's part ``part`` is that of the tensor."""

    slot: Slot
    part: Part

    @property
    def source(self) -> str:
        """The tensor's name."""
        return self.part.name


@dataclass(frozen=True)
class Linear:
    """A 2-D weight out of one module's tensors; ``transposed``: the Parameter is stored [k, n]."""

    slot: Slot
    stem: Stem
    transposed: bool = False


@dataclass(frozen=True)
class Experts:
    """A 3-D weight out of the tensors of its experts.

    Attributes:
        stems: of each expert: one, or gate and up.
        interleaved: rows of gate and up alternate in the one stem.
        transposed: the Parameter is stored [E, k, n].
        alternates: rows of gate and up alternate in the Parameter.
    """

    slot: Slot
    stems: tuple[tuple[Stem, ...], ...]
    interleaved: bool
    transposed: bool
    alternates: bool


@dataclass(frozen=True)
class ExpertBias:
    """A bias [E, n] out of those of its experts, gate and up in one or in two tensors; ``alternates`` as in ``Experts``."""

    slot: Slot
    sources: tuple[tuple[Part, ...], ...]
    alternates: bool


Job = Copy | Linear | Experts | ExpertBias


@dataclass(frozen=True)
class Mapped:
    """Everything to do, and what is left alone.

    Attributes:
        jobs: in the order of the model's Parameters.
        ignored: tensor -> why it is not used.
        cache: tensor with scales of the KV cache -> names that it may have in the model.
        untied: weights that the config ties and the file has apart, in pairs.
    """

    jobs: tuple[Job, ...]
    ignored: Mapping[str, str]
    cache: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    untied: tuple[tuple[str, str], ...] = ()


@dataclass
class _Claims:
    """Tensors by the Parameter that they belong to."""

    plain: dict[str, str] = field(default_factory=dict)
    linear: dict[str, dict[str, Part]] = field(default_factory=dict)
    stems: dict[str, str] = field(default_factory=dict)
    experts: dict[str, dict[tuple[int, str], dict[str, Part]]] = field(default_factory=dict)
    fused: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: dict[str, dict[tuple[int, str], str]] = field(default_factory=dict)


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Every name of a Parameter or persistent buffer -> its slot; aliases share one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for attribute, tensor in [*module._parameters.items(), *buffers.items()]:
            if tensor is not None:
                tensors[id(tensor)] = tensor
                places.setdefault(id(tensor), []).append((module, attribute))
                names.setdefault(id(tensor), []).append(f"{path}.{attribute}" if path else attribute)
    out: dict[str, Slot] = {}
    for identity, tensor in tensors.items():
        slot = Slot(names[identity][0], tensor, tuple(places[identity]), tuple(names[identity]))
        out |= dict.fromkeys(names[identity], slot)
    return out


class Resolver:
    """Finds what each tensor of a checkpoint is in a model.

    Args:
        model: on any device; its config and names are read.
        files: of the checkpoint.
    """

    def __init__(self, model: nn.Module, files: Files) -> None:
        self.model, self.files = model, files
        self.slots = slots_of(model)
        self._rename = names_from_file(model)
        self._claims = _Claims()
        self._same: dict[str, str] = {}

    def resolve(self) -> Mapped:
        """The jobs; a model's tied weights that the file has with different values are tied no longer.

        Raises:
            CheckpointError: tensors that belong nowhere, or two of them to one place; weights that no tensor fills, experts that are
                missing.
        """
        untied = self._untie()
        ignored = self._same
        cached: dict[str, tuple[str, ...]] = {}
        left: list[str] = []
        for name in names_of(self.files):
            if any(self._claim(name, key) for key in self._spellings(name)):
                continue
            reason = self._harmless(name)
            if reason is not None:
                ignored[name] = reason
            elif cache.sides_of(name) is not None:
                cached[name] = tuple(self._spellings(name))
            else:
                left.append(name)
        jobs = list(self._jobs())
        filled = {id(job.slot) for job in jobs}
        missing = [slot.name for slot in dict.fromkeys(self.slots.values()) if id(slot) not in filled]
        complain(self.files, self.model, left, missing)
        return Mapped(tuple(jobs), ignored, cached, untied)

    # --- two tensors for one place ---

    def _untie(self) -> tuple[tuple[str, str], ...]:
        """Give each place of a tied weight its own Parameter where the file has other values for it, as transformers does."""
        several = (slot for slot in self.slots.values() if len(slot.names) > 1)
        tied = {id(slot): slot for slot in several if isinstance(slot.tensor, nn.Parameter)}
        found: dict[int, dict[str, dict[str, str]]] = {}
        for name in names_of(self.files) if tied else ():
            for key in self._spellings(name):
                place = self._tied_place(key)
                if place is not None and id(self.slots[place[0]]) in tied:
                    own = found.setdefault(id(self.slots[place[0]]), {}).setdefault(place[0], {})
                    own.setdefault(place[1], name)
                    break
        apart: list[tuple[str, str]] = []
        for identity, places in found.items():
            slot = tied[identity]
            with_codes = [place for place in slot.names if set(places.get(place, ())).intersection(_CODES)]
            for other in with_codes[1:]:
                if not self._alike(places[with_codes[0]], places[other]):
                    module, attribute = slot.places[slot.names.index(other)]
                    module._parameters[attribute] = nn.Parameter(torch.empty_like(slot.tensor), requires_grad=False)
                    apart.append((with_codes[0], other))
        if apart:
            _tie_no_more(self.model)
            self.slots = slots_of(self.model)
        return tuple(apart)

    def _tied_place(self, key: str) -> tuple[str, str] | None:
        """The name of the model that a spelling belongs to, and what it is of it."""
        if key in self.slots:
            return key, "weight"
        places = ((f"{stem}.weight", suffix) for stem, suffix in _split(key))
        return next((place for place in places if place[0] in self.slots), None)

    def _alike(self, one: Mapping[str, str], other: Mapping[str, str]) -> bool:
        """Whether two places have the same tensors."""
        return set(one) == set(other) and all(self._equal(one[suffix], other[suffix]) for suffix in one)

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors of the file are the same bits."""
        a, b = self.files.tensors[one], self.files.tensors[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        first, second = (self.files.get(name).contiguous().reshape(-1).view(torch.uint8) for name in (one, other))
        return torch.equal(first, second)

    def _take(self, table: MutableMapping[Any, Any], key: Any, name: str, value: Any) -> None:
        """Enter a tensor, unless another has its place already.

        Raises:
            CheckpointError: the other has other values.
        """
        known = table.setdefault(key, value)
        first = known.name if isinstance(known, Part) else known
        if first != name:
            self._double(first, name)

    def _double(self, first: str, second: str) -> None:
        if not self._equal(first, second):
            self._fail(
                f"{first} and {second} are of one weight of the model, with different values",
                "Fix: remove the one that is not of this checkpoint.",
            )
        self._same[second] = f"the same as {first}"

    def _spellings(self, name: str) -> Iterator[str]:
        """What transformers may call this tensor."""
        key = self._rename(name)
        prefix = getattr(self.model, "base_model_prefix", "")
        yield key
        if prefix:
            yield f"{prefix}.{key}"
            yield key.removeprefix(f"{prefix}.")
        if key != name:
            yield name

    def _claim(self, name: str, key: str) -> bool:
        """Take a tensor for what it is under this spelling; False where the model has nothing of that name."""
        slot = self.slots.get(key)
        claims = self._claims
        if slot is not None:
            if slot.tensor.dim() == 2 and key.endswith(".weight"):
                self._claim_linear(slot, key.removesuffix(".weight"), "weight", name)
            elif slot.tensor.dim() == 3:
                self._take(claims.fused.setdefault(slot.name, {}), "weight", name, name)
            else:
                self._take(claims.plain, slot.name, name, name)
            return True
        return self._claim_suffixed(name, key) or self._claim_fused(name, key) or self._claim_expert_bias(name, key)

    def _claim_linear(self, slot: Slot, stem: str, suffix: str, name: str) -> None:
        self._take(self._claims.linear.setdefault(slot.name, {}), suffix, name, Part(name))
        self._claims.stems.setdefault(slot.name, stem)

    def _claim_suffixed(self, name: str, key: str) -> bool:
        for stem, suffix in _split(key):
            slot = self.slots.get(f"{stem}.weight")
            if slot is not None:
                self._claim_linear(slot, stem, suffix, name)
                return True
            fused = self.slots.get(stem)
            if fused is not None and fused.tensor.dim() == 3:
                self._take(self._claims.fused.setdefault(fused.name, {}), suffix, name, name)
                return True
            if self._claim_expert(name, stem, suffix):
                return True
        return False

    def _claim_expert(self, name: str, stem: str, suffix: str) -> bool:
        found = _EXPERT.fullmatch(stem)
        slot = self._expert_slot(found, "") if found else None
        if found is None or slot is None or slot.tensor.dim() != 3:
            return False
        parts = self._claims.experts.setdefault(slot.name, {})
        self._take(parts.setdefault((int(found[2]), _PARTS[found[3]]), {}), suffix, name, Part(name))
        return True

    def _expert_slot(self, found: re.Match[str], ending: str) -> Slot | None:
        """The block's weight that an expert's part belongs to: of a block without a gate, up's own."""
        part = _PARTS[found[3]]
        targets = {DOWN: ("down_proj",), UP: ("gate_up_proj", "up_proj")}.get(part, ("gate_up_proj",))
        slots = (self.slots.get(f"{found[1]}.{target}{ending}") for target in targets)
        return next((slot for slot in slots if slot is not None), None)

    def _claim_expert_bias(self, name: str, key: str) -> bool:
        found = _EXPERT.fullmatch(key.removesuffix(".bias")) if key.endswith(".bias") else None
        slot = self._expert_slot(found, "_bias") if found else None
        if found is None or slot is None:
            return False
        self._take(self._claims.biases.setdefault(slot.name, {}), (int(found[2]), _PARTS[found[3]]), name, name)
        return True

    def _claim_fused(self, name: str, key: str) -> bool:
        for ending, suffix in _FUSED.items():
            slot = self.slots.get(key.removesuffix(ending)) if key.endswith(ending) else None
            if slot is not None and slot.tensor.dim() == 3:
                self._take(self._claims.fused.setdefault(slot.name, {}), suffix, name, name)
                return True
        return False

    # --- jobs ---

    def _jobs(self) -> Iterator[Job]:
        claims = self._claims
        for slot in dict.fromkeys(self.slots.values()):
            if slot.name in claims.plain:
                yield Copy(slot, Part(claims.plain[slot.name]))
            elif slot.name in claims.linear:
                yield self._linear(slot, claims.linear[slot.name])
            elif slot.name in claims.experts:
                yield self._experts(slot, claims.experts[slot.name], claims.fused.get(slot.name, {}))
            elif slot.name in claims.fused:
                yield self._fused(slot, claims.fused[slot.name])
            elif slot.name in claims.biases:
                yield self._bias(slot, claims.biases[slot.name])

    def _one_of(self, names: Mapping[str, str]) -> None:
        """Refuse codes, or codes and values, of one weight in two forms.

        Raises:
            CheckpointError: there are.
        """
        codes = [name for suffix, name in names.items() if suffix in _CODES]
        if len(codes) > 1:
            self._fail(
                f"{codes[0]} and {codes[1]} are both the values of one weight",
                "Fix: remove the one that is not of this checkpoint.",
            )

    def _linear(self, slot: Slot, tensors: Mapping[str, Part]) -> Job:
        self._one_of({suffix: part.name for suffix, part in tensors.items()})
        if set(tensors) == {"weight"} and self.files.tensors[tensors["weight"].name].shape == tuple(slot.tensor.shape):
            return Copy(slot, tensors["weight"])
        transposed = type(slot.owner).__name__ == "Conv1D"
        n, k = reversed(slot.tensor.shape) if transposed else slot.tensor.shape
        return Linear(slot, Stem(self._claims.stems[slot.name], tensors, n, k), transposed)

    def _shape(self, slot: Slot) -> tuple[bool, bool, int, int]:
        """Stored [E, k, n]; gate and up alternate; n; k."""
        transposed = _stores_columns(slot.owner)
        _, n, k = slot.tensor.shape
        first = slot.places[0][1].startswith("gate_up")
        return (
            transposed,
            first and not getattr(slot.owner, "is_concatenated", True),
            *((k, n) if transposed else (n, k)),
        )

    def _experts(
        self, slot: Slot, parts: Mapping[tuple[int, str], Mapping[str, Part]], fused: Mapping[str, str]
    ) -> Experts:
        transposed, alternates, n, k = self._shape(slot)
        kinds = _kinds(slot, parts)
        stems: list[tuple[Stem, ...]] = []
        for expert in range(slot.tensor.shape[0]):
            own: list[Stem] = []
            for place, kind in enumerate(kinds):
                if (expert, kind) not in parts:
                    self._fail(f"expert {expert} of {slot.name} has no {kind} tensors", "Fix: download the rest of it.")
                tensors = dict(parts[expert, kind])
                self._one_of({suffix: part.name for suffix, part in tensors.items()})
                rows = n // len(kinds)
                for suffix, name in fused.items():
                    tensors.setdefault(suffix, self._share(name, expert, place, len(kinds)))
                own.append(Stem(_stem_of(tensors), tensors, rows, k))
            stems.append(tuple(own))
        beyond = sorted({expert for expert, _ in parts if expert >= slot.tensor.shape[0]})
        if beyond:
            self._fail(
                f"has expert {beyond[0]} of {slot.name}, which has {slot.tensor.shape[0]}", "Fix: correct num_experts."
            )
        return Experts(slot, tuple(stems), False, transposed, alternates)

    def _share(self, name: str, expert: int, place: int, kinds: int) -> Part:
        """What gate or up has of a fused tensor."""
        shape = self.files.tensors[name].shape
        rows = shape[1] // kinds if len(shape) > 1 else 0
        return Part(name, expert, rows=(place * rows, (place + 1) * rows) if kinds > 1 and rows else None)

    def _fused(self, slot: Slot, tensors: Mapping[str, str]) -> Job:
        self._one_of(tensors)
        info = {suffix: self.files.tensors[name] for suffix, name in tensors.items()}
        if set(tensors) == {"weight"} and info["weight"].shape == tuple(slot.tensor.shape):
            return Copy(slot, Part(tensors["weight"]))
        transposed, alternates, n, k = self._shape(slot)
        data = next((info[key] for key in ("weight", "weight_packed", "blocks") if key in info), None)
        if data is None:
            self._fail(
                f"{slot.name} has {', '.join(sorted(tensors.values()))} and no codes", "Fix: download the rest of it."
            )
        count = slot.tensor.shape[0]
        if data.shape[:1] != (count,):
            self._fail(
                f"{data.name} is {list(data.shape)}; the model has {count} experts",
                "Fix: load the model's own checkpoint.",
            )
        columns = len(data.shape) == 3 and _by_columns(data.shape[1:], n, k, transposed)
        stems: list[tuple[Stem, ...]] = []
        for expert in range(count):
            own = {
                suffix: Part(name, expert if info[suffix].shape[:1] == (count,) else None, columns)
                for suffix, name in tensors.items()
            }
            stems.append((Stem(slot.name, own, n, k),))
        return Experts(slot, tuple(stems), alternates, transposed, alternates)

    def _bias(self, slot: Slot, parts: Mapping[tuple[int, str], str]) -> ExpertBias:
        alternates = slot.places[0][1].startswith("gate_up") and not getattr(slot.owner, "is_concatenated", True)
        kinds = _kinds(slot, parts)
        sources: list[tuple[Part, ...]] = []
        for expert in range(slot.tensor.shape[0]):
            absent = [kind for kind in kinds if (expert, kind) not in parts]
            if absent:
                self._fail(f"expert {expert} of {slot.name} has no {absent[0]} bias", "Fix: download the rest of it.")
            sources.append(tuple(Part(parts[expert, kind]) for kind in kinds))
        return ExpertBias(slot, tuple(sources), alternates and kinds != (BOTH,))

    # --- what is left ---

    def _harmless(self, name: str) -> str | None:
        """Why a tensor that the model has no place for may be left alone, or None."""
        config = getattr(self.model, "config", None)
        text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
        layers = getattr(text, "num_hidden_layers", None)
        found = _LAYER.search(name)
        if found and isinstance(layers, int) and int(found[1]) >= layers:
            return f"of layer {found[1]}, and the model has {layers}: a layer that predicts further tokens, which transformers does not run"
        if cache.sides_of(name) is None and (reason := cache.unused(name)) is not None:
            return reason
        if name.endswith("rotary_emb.inv_freq"):
            return "computed from the config"
        if name.endswith(".bias") and self._is_bias_of_zeros(name):
            return "zeros, and the model has no such bias"
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if any(re.search(pattern, name) for pattern in patterns):
            return "transformers' model has no such part"
        return None

    def _is_bias_of_zeros(self, name: str) -> bool:
        """Whether a tensor is what some libraries write for every linear, whether it has a bias or not."""
        weights = (self.slots.get(f"{key.removesuffix('.bias')}.weight") for key in self._spellings(name))
        shape = self.files.tensors[name].shape
        fits = any(slot is not None and len(shape) == 1 and shape[0] in slot.tensor.shape for slot in weights)
        return fits and not bool(self.files.get(name).any())

    def _fail(self, what: str, fix: str) -> NoReturn:
        raise CheckpointError(f"{self.files.folder}: {what}.\n{fix}")


def _tie_no_more(model: nn.Module) -> None:
    """Let a model's config say that its embeddings are its own where its head is no longer that Parameter."""
    config = getattr(model, "config", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    if config is None or head is None or embedding is None or head.weight is embedding.weight:
        return
    for own in (config, config.get_text_config()):
        if getattr(own, "tie_word_embeddings", False):
            own.tie_word_embeddings = False


def complain(files: Files, model: nn.Module, left: Sequence[str], missing: Sequence[str]) -> None:
    """Refuse a checkpoint that does not fit its model.

    Raises:
        CheckpointError: tensors that belong to no weight, or weights that no tensor fills.
    """
    if not left and not missing:
        return
    lines = [f"{files.folder} does not fit {type(model).__name__}:"]
    for what, names in (("tensors that belong to no weight", left), ("weights that no tensor fills", missing)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {len(names)} {what}: {', '.join(map(cut, names[:SHOWN]))}{more}")
    scaled = next((name for name in left if name.endswith(".act.scales")), None)
    if scaled is not None:
        lines.append(f"{cut(scaled)} is what AWQ divides an activation by, which is not read here.")
        lines.append(
            "Fix: quantize without scaled activations, or load the original checkpoint with a policy (`method: awq`)."
        )
    else:
        lines.append("Fix: load a checkpoint of this architecture, whole; nothing has been filled with made-up values.")
    raise CheckpointError("\n".join(lines))


def _split(key: str) -> Iterator[tuple[str, str]]:
    """What a tensor's name may be cut into: a module's name, and a suffix that some reader knows."""
    return ((key[: -len(suffix) - 1], suffix) for suffix in SUFFIXES if key.endswith(f".{suffix}"))


def _kinds(slot: Slot, parts: Collection[tuple[int, str]]) -> tuple[str, ...]:
    """What an expert has in files for a block's weight."""
    attribute = slot.places[0][1]
    if attribute.startswith("down"):
        return (DOWN,)
    if attribute.startswith("up"):
        return (UP,)
    return (BOTH,) if (0, BOTH) in parts else (GATE, UP)


def _stem_of(tensors: Mapping[str, Part]) -> str:
    """The module's name, from one of its own tensors."""
    suffix, part = next((s, p) for s, p in tensors.items() if p.index is None)
    return part.name.removesuffix(f".{suffix}")


def _by_columns(shape: tuple[int, ...], n: int, k: int, stored: bool) -> bool:
    """Whether an expert's codes are [k, n] or [k/2, n]; where sizes do not tell, as the Parameter itself is stored."""
    rows = shape in ((n, k), (n, -(-k // 2)))
    columns = shape in ((k, n), (-(-k // 2), n))
    return stored if rows == columns else columns
