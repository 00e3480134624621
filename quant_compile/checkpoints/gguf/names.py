"""Tensors of a GGUF file to weights of a transformers model: the jobs that ``fill`` does, and what is undone on the way.

    blk.3.attn_q.weight                      ->  model.layers.3.self_attn.q_proj.weight
    blk.3.ffn_{gate,up,down}_exps.weight     ->  all experts of model.layers.3.mlp.experts.{gate_up_proj, down_proj}
    blk.3.ffn_{gate,up,down}.5.weight        ->  expert 5 of these, as older files have them
    blk.3.attn_{k,v}_b.weight                ->  model.layers.3.self_attn.kv_b_proj.weight

Reads the architecture's table, shapes and types, and names and sizes of the model. Every tensor is used, or ignored with a reason; every
weight is filled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from quant_compile.checkpoints.errors import cut
from quant_compile.checkpoints.files import Part, TensorInfo
from quant_compile.checkpoints.fill import alternates
from quant_compile.checkpoints.gguf.architectures import FREQUENCIES, LONG, SHORT, Architecture
from quant_compile.checkpoints.gguf.container import fail
from quant_compile.checkpoints.gguf.files import GgufFiles, less_one, rows_of_heads
from quant_compile.checkpoints.gguf.reader import (
    BLOCKS,
    FORMAT,
    KEYS,
    SCALE,
    VALUES,
    Blocks,
    GgufDescription,
    blocks_of,
)
from quant_compile.checkpoints.names import (
    Copy,
    ExpertBias,
    Experts,
    Job,
    Linear,
    Mapped,
    Slot,
    Stem,
    complain,
    slots_of,
)
from quant_compile.ir.ggml.types import PLAIN
from quant_compile.model.weights import _stores_columns

GATE, UP, DOWN, BOTH = "gate", "up", "down", "gate_up"
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale)")
_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d{1,6})\.weight")
_LATENTS = {"attn_k_b.weight": KEYS, "attn_v_b.weight": VALUES}
_COMPUTED = (FREQUENCIES, LONG, SHORT, "attn_rot_embd.weight")
_FIX = "Fix: load the file with the metadata that it was written with."


@dataclass
class _Claims:
    """Tensors by the slot that they belong to, and in it by suffix or by part and expert (None: all)."""

    linear: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    experts: dict[str, dict[tuple[str, int | None], dict[str, str]]] = field(
        default_factory=dict[str, dict[tuple[str, int | None], dict[str, str]]]
    )
    biases: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])


class GgufResolver:
    """Finds what each tensor of a file is in a model.

    Args:
        model: on any device; its config and names are read.
        files: of the model; what is to be undone is entered there.
        architecture: of the file.
    """

    def __init__(self, model: nn.Module, files: GgufFiles, architecture: Architecture) -> None:
        self.model, self.files, self.architecture = model, files, architecture
        self.slots = slots_of(model)
        self.kinds: dict[str, Blocks] = {}
        self._claims = _Claims()

    def resolve(self) -> tuple[Mapped, GgufDescription]:
        """The jobs, and how the weights are stored that they read.

        Raises:
            CheckpointError: tensors that belong nowhere, weights that no tensor fills, experts that are missing or too many.
        """
        ignored: dict[str, str] = {}
        left: list[str] = []
        for name in self.files.tensors:
            reason = self._ignored(name)
            if reason is not None:
                ignored[name] = reason
            elif not self._claim(name):
                left.append(name)
        jobs = list(self._jobs())
        filled = {id(job.slot) for job in jobs}
        missing = [slot.name for slot in dict.fromkeys(self.slots.values()) if id(slot) not in filled]
        complain(self.files, self.model, left, missing)
        types = tuple(block.name for block in self.files.types.values())
        method = FORMAT if set(types) - set(PLAIN) else ""
        return Mapped(tuple(jobs), ignored), GgufDescription(
            method, str(self.files.folder), kinds=self.kinds, types=types
        )

    # --- whose a tensor is ---

    def _ignored(self, name: str) -> str | None:
        found = _BLOCK.fullmatch(name)
        layers = self.model.config.num_hidden_layers  # type: ignore[union-attr]
        if found and isinstance(layers, int) and int(found[1]) >= layers:
            return f"of layer {int(found[1])}, and the model has {layers}: transformers does not run it"
        if (found[2] if found else name) in _COMPUTED:
            return "its numbers are in the config, or divide the model's frequencies"
        return "inputs stay in 16 bits" if name.endswith(".input_scale") else None

    def _claim(self, name: str) -> bool:
        """Take a tensor for what it is; False where the model has nothing of that name."""
        found = _BLOCK.fullmatch(name)
        prefix, rest = (f"model.layers.{int(found[1])}.", found[2]) if found else ("", name)
        if found and self._claim_experts(name, prefix, rest):
            return True
        if rest in _LATENTS:
            return self._claim_linear(name, f"{prefix}self_attn.kv_b_proj.weight", _LATENTS[rest])
        stem, _, suffix = rest.rpartition(".")
        own = self.architecture.names
        target = f"{prefix}{own[rest]}" if rest in own else f"{prefix}{own[stem]}.{suffix}" if stem in own else ""
        if suffix == "scale" and target:
            return self._claim_linear(name, f"{target.rpartition('.')[0]}.weight", SCALE)
        claimed = bool(target) and self._claim_linear(name, target, "weight")
        if claimed:
            self._undo(name, stem, suffix)
        return claimed

    def _claim_linear(self, name: str, target: str, suffix: str) -> bool:
        slot = self.slots.get(target)
        if slot is None or suffix in (taken := self._claims.linear.setdefault(slot.name, {})):
            return False
        taken[suffix] = name
        return True

    def _claim_experts(self, name: str, prefix: str, rest: str) -> bool:
        found, one = _EXPERTS.fullmatch(rest), _EXPERT.fullmatch(rest)
        part = found[1] if found else one[1] if one else ""
        target = f"{prefix}mlp.experts.{'down_proj' if part == DOWN else 'gate_up_proj'}"
        if found and found[2] == "bias":
            slot = self.slots.get(f"{target}_bias")
            if slot is None or part in (taken := self._claims.biases.setdefault(slot.name, {})):
                return False
            taken[part] = name
            return True
        slot = self.slots.get(target) if part else None
        if slot is None or slot.tensor.dim() != 3:
            return False
        claim = self._claims.experts.setdefault(slot.name, {}).setdefault((part, int(one[2]) if one else None), {})
        suffix = SCALE if found and found[2] == "scale" else "weight"
        if suffix in claim:
            return False
        claim[suffix] = name
        return True

    def _undo(self, name: str, stem: str, suffix: str) -> None:
        """Enter what the converter of this architecture has done to a tensor."""
        info, config = self.files.tensors[name], self.model.config
        if self.architecture.permuted and stem in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if stem == "attn_q" else config.num_key_value_heads  # type: ignore[union-attr]
            if info.shape[0] % (2 * int(heads)):  # type: ignore[arg-type]
                fail(info.where, f"has {info.shape[0]} rows, which are not those of {heads} heads", _FIX)
            self.files.undo[name] = rows_of_heads(int(heads))  # type: ignore[arg-type]
        elif self.architecture.offset and stem.endswith("norm") and suffix == "weight":
            self.files.undo[name] = less_one
        elif stem == "ffn_gate_inp_shexp" and len(info.shape) == 1:
            self.files.tensors[name] = TensorInfo(
                name, info.file, info.dtype, (1, *info.shape), info.start, info.nbytes
            )

    # --- jobs ---

    def _jobs(self) -> Iterator[Job]:
        claims = self._claims
        for slot in dict.fromkeys(self.slots.values()):
            if slot.name in claims.linear:
                yield self._linear(slot, claims.linear[slot.name])
            elif slot.name in claims.experts:
                yield self._experts(slot, claims.experts[slot.name])
            elif slot.name in claims.biases:
                yield self._biases(slot, claims.biases[slot.name])

    def _linear(self, slot: Slot, tensors: Mapping[str, str]) -> Job:
        if KEYS in tensors or VALUES in tensors:
            return self._latents(slot, tensors)
        name = tensors.get("weight", "")
        if not name:
            fail(self.files.folder, f"{slot.name} has {', '.join(map(cut, tensors.values()))} and no codes")
        block = self.files.types[name].name
        if block in PLAIN or slot.tensor.dim() != 2:
            return Copy(slot, Part(name))
        stem = name.removesuffix(".weight")
        parts = {BLOCKS if suffix == "weight" else suffix: Part(tensor) for suffix, tensor in tensors.items()}
        self.kinds[stem] = blocks_of(block, _reader(slot))
        n, k = slot.tensor.shape
        return Linear(slot, Stem(stem, parts, n, k))

    def _latents(self, slot: Slot, tensors: Mapping[str, str]) -> Job:
        absent = {KEYS, VALUES} - set(tensors)
        if absent or "weight" in tensors:
            fail(
                self.files.folder,
                f"{slot.name} has {', '.join(map(cut, tensors.values()))}",
                "Fix: download the whole model.",
            )
        keys, values = (self.files.types[tensors[suffix]].name for suffix in (KEYS, VALUES))
        stem = tensors[KEYS].replace("attn_k_b.weight", "attn_kv_b")
        self.kinds[stem] = blocks_of(values, keys=keys)
        n, k = slot.tensor.shape
        return Linear(slot, Stem(stem, {suffix: Part(tensors[suffix]) for suffix in (KEYS, VALUES)}, n, k))

    def _experts(self, slot: Slot, parts: Mapping[tuple[str, int | None], Mapping[str, str]]) -> Job:
        transposed = _stores_columns(slot.owner)
        count, n, k = slot.tensor.shape
        n, k = (k, n) if transposed else (n, k)
        kinds = _kinds(slot, {part for part, _ in parts})
        beyond = [expert for _, expert in parts if expert is not None and expert >= count]
        if beyond:
            fail(self.files.folder, f"has expert {beyond[0]} of {slot.name}, which has {count}", _FIX)
        stems = [
            tuple(self._expert(slot, parts, kind, expert, n // len(kinds), k) for kind in kinds)
            for expert in range(count)
        ]
        return Experts(slot, tuple(stems), False, transposed, alternates(slot))

    def _expert(
        self,
        slot: Slot,
        parts: Mapping[tuple[str, int | None], Mapping[str, str]],
        kind: str,
        expert: int,
        n: int,
        k: int,
    ) -> Stem:
        """One expert's gate, up or down."""
        whole = parts.get((kind, None))
        tensors = whole or parts.get((kind, expert), {})
        name = tensors.get("weight")
        if name is None:
            fail(
                self.files.folder,
                f"expert {expert} of {slot.name} has no {kind} tensor",
                "Fix: download the rest of it.",
            )
        info, count = self.files.tensors[name], slot.tensor.shape[0]
        if whole is not None and (len(info.shape) != 3 or info.shape[0] != count):
            fail(info.where, f"is {list(info.shape)}; the model has {count} experts", _FIX)
        block, stem = self.files.types[name].name, name.removesuffix(".weight")
        out: dict[str, Part] = {}
        for suffix, tensor in tensors.items():
            own = suffix if suffix != "weight" or block in PLAIN else BLOCKS
            all_of_them = self.files.tensors[tensor].shape[:1] == (count,)
            out[own] = Part(tensor, expert if whole is not None and all_of_them else None)
        if block not in PLAIN:
            self.kinds.setdefault(stem, blocks_of(block))
        return Stem(stem, out, n, k)

    def _biases(self, slot: Slot, parts: Mapping[str, str]) -> Job:
        kinds, (count, _) = _kinds(slot, set(parts)), slot.tensor.shape
        absent = [kind for kind in kinds if kind not in parts]
        if absent:
            fail(self.files.folder, f"{slot.name} has no {absent[0]} tensor", "Fix: download the rest of it.")
        for name in parts.values():
            if self.files.tensors[name].shape[:1] != (count,):
                fail(self.files.tensors[name].where, f"is not of {count} experts", _FIX)
        sources = tuple(tuple(Part(self._own(parts[kind], expert)) for kind in kinds) for expert in range(count))
        for kind in kinds:
            del self.files.tensors[parts[kind]]
        return ExpertBias(slot, sources, alternates(slot) and kinds != (BOTH,))

    def _own(self, name: str, expert: int) -> str:
        """A tensor of one expert's numbers, cut out of one of all."""
        made, info = f"{name}[{expert}]", self.files.tensors[name].cut(expert)
        self.files.tensors[made] = TensorInfo(made, info.file, info.dtype, info.shape, info.start, info.nbytes)
        self.files.types[made] = self.files.types[name]
        return made


def _kinds(slot: Slot, there: set[str]) -> tuple[str, ...]:
    """What the file has for a block's weight."""
    if slot.places[0][1].startswith("down"):
        return (DOWN,)
    return (BOTH,) if BOTH in there else (GATE, UP)


def _reader(slot: Slot) -> str:
    """Who reads a matrix as values, and so needs them; empty where only linears do."""
    for module, _ in slot.places:
        if isinstance(module, nn.Embedding):
            return "an embedding reads it"
        if not isinstance(module, nn.Linear):
            return f"a {type(module).__name__} reads it"
    return ""
