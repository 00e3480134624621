"""A model that ranks have in parts, put together on the first of them: what ``save`` writes of it.

Every function here is a collective, weight by weight in the model's order. Reads parts and planes, and changes nothing of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile import api
from quant_compile.checkpoints.errors import SaveError
from quant_compile.checkpoints.export import KeyOf
from quant_compile.checkpoints.fill import adopt_values, hollow, place
from quant_compile.checkpoints.names import Slot, slots_of
from quant_compile.inspect.models import construct
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import parse
from quant_compile.ir.shards import Shard, is_distributed
from quant_compile.lowering.identity import anchor_of, local_of, shard_of
from quant_compile.lowering.weights import STORE, Key
from quant_compile.model.ledger import LEDGER

CPU = torch.device("cpu")
FROM = "parts of ranks"


def gathered(model: Any, key_of: KeyOf) -> Gathered | None:
    """The whole model on the first rank; None on the others.

    Weights that have their values are quantized as one process would. Of released ones the planes are joined, which must have no
    scales that parts have for themselves.

    Args:
        model: compiled; the same on every rank.
        key_of: the planes that stand for a weight.

    Raises:
        SaveError: planes of parts are none of a whole weight, or ranks differ in what they have released. On every rank.
    """
    import torch.distributed as dist

    slots = list(dict.fromkeys(slots_of(model).values()))
    _check_alike(slots, key_of)
    first = Gathered(model) if dist.get_rank() == 0 else None
    for slot in slots:
        part: Any = local_of(slot.tensor)
        key = key_of(part) if isinstance(slot.tensor, nn.Parameter) else None
        entry = STORE.peek(part) if key is not None else None
        if key is None or entry is None or not entry.released:
            values = _whole(slot, part)
            if first is not None:
                first.take(slot.name, values, key, entry.rounding if entry is not None else None)
            del values
            continue
        planes = _joined_planes(slot.name, part, key)
        if first is not None:
            first.adopt(slot.name, key, planes)
    return first


def _check_alike(slots: Sequence[Slot], key_of: KeyOf) -> None:
    """Refuse parts that ranks have quantized or released differently, before anything is exchanged of them."""
    import torch.distributed as dist

    found: list[tuple[str, str, bool]] = []
    for slot in slots:
        part: Any = local_of(slot.tensor)
        key, entry = (key_of(part), STORE.peek(part)) if isinstance(slot.tensor, nn.Parameter) else (None, None)
        found.append((slot.name, key.spec if key is not None else "", entry is not None and entry.released))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    for rank, other in enumerate(ranks):
        if other != ranks[0]:
            name = next((mine[0] for mine, its in zip(ranks[0], other, strict=False) if mine != its), "a weight")
            raise SaveError(
                f"rank {rank} has {name} in another state (scheme, or released) than rank 0.\n"
                "Fix: compile, call and release the model alike on every rank, then save it on every rank."
            )


def _whole(slot: Slot, part: Tensor) -> Tensor:
    """All of a weight that has its values."""
    shard = shard_of(part)
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if shard is None or not shard.cuts:
            return part.detach()
        whole: Any = slot.tensor if is_distributed(slot.tensor) else anchor_of(part).whole.of(part.detach())
        return whole.detach().full_tensor()


def _joined_planes(name: str, part: nn.Parameter, key: Key) -> Planes:
    """Row-form planes of a released weight, of all ranks' parts."""
    own = _rows(name, part, key)
    shard = shard_of(part)
    if shard is None or not shard.cuts:
        return own
    if len(shard.cuts) > 1 or shard.uneven:
        raise SaveError(
            f"{name} is released, and divided as {shard.placements}: planes of such parts are not joined.\n{_FIX}"
        )
    scheme, (rows, columns) = parse(key.spec), shard.shape[-2:]
    n, k = (columns, rows) if key.transposed else (rows, columns)
    specs = family_of(scheme).weight_planes(scheme, n, k, key.dtype)
    parts = [_gather(plane, shard) for plane in own]
    return tuple(_join(name, each, spec.shape, shard, key) for each, spec in zip(parts, specs, strict=True))


def _rows(name: str, part: nn.Parameter, key: Key) -> Planes:
    if part.dim() != 3:
        return STORE.logical(part, key, name)
    experts = [STORE.logical(part, key, name, i) for i in range(part.shape[0])]
    return tuple(torch.stack(planes) for planes in zip(*experts, strict=True))


def _gather(plane: Tensor, shard: Shard) -> list[Tensor]:
    import torch.distributed as dist

    _, count, axis = shard.cuts[0]
    flat = plane.contiguous().reshape(-1).view(torch.uint8)
    out = [torch.empty_like(flat) for _ in range(count)]
    dist.all_gather(out, flat, group=shard.mesh.get_group(axis))
    return [each.view(plane.dtype).reshape(plane.shape) for each in out]


_FIX = (
    "Fix: save before release, or `sglquant convert CHECKPOINT FOLDER --policy P`, which needs no ranks, or a scheme with a scale per "
    "group of inputs."
)


def _join(name: str, parts: list[Tensor], wanted: Sequence[int], shard: Shard, key: Key) -> Tensor:
    """One plane of the whole weight.

    Args:
        wanted: its shape, of one expert where there are several: where a part has all of a dimension, ranks share what lies there.

    Raises:
        SaveError: the parts have scales of their own for what one scale of the whole weight is for.
    """
    cut, leading = shard.cuts[0][0], len(shard.shape) - 2
    if cut < leading:  # whole experts
        return torch.cat(parts, 0)
    along_rows = (cut == leading) != key.transposed
    axis, plane = leading + (0 if along_rows else 1), parts[0]
    if plane.dim() > axis and plane.shape[axis] < wanted[axis - leading]:
        sections = [each.chunk(shard.sections[0], axis) for each in parts]
        return torch.cat([section for group in zip(*sections, strict=True) for section in group], axis)
    if all(torch.equal(each, plane) for each in parts):
        return plane
    raise SaveError(
        f"{name} is released, and each rank has scales of its own for its part ({shard.placements}) in {key.spec}: no one scale is right "
        f"for all parts.\n{_FIX}"
    )


@dataclass
class Gathered:
    """The whole model as it is filled, on the CPU; the first error is kept, since other ranks go on."""

    divided: Any
    error: Exception | None = None
    model: Any = None
    slots: dict[str, Slot] = field(default_factory=dict[str, Slot])

    def __post_init__(self) -> None:
        self._try(self._build)

    def _build(self) -> None:
        config = copy.deepcopy(self.divided.config)
        vars(config).pop("distributed_config", None)
        self.model = construct(config, type(self.divided).__name__, self.divided.dtype)
        if hasattr(self.model, "tie_weights"):
            self.model.tie_weights()
        self.slots = slots_of(self.model)

    def take(self, name: str, values: Tensor, key: Key | None, rounding: Any) -> None:
        """Whole values: as they are, or quantized."""
        self._try(lambda: self._take(name, values.cpu(), key, rounding))

    def _take(self, name: str, values: Tensor, key: Key | None, rounding: Any) -> None:
        slot = self.slots[name]
        if key is None:
            place(slot, values.clone())
            return
        if key.view and len(key.view) != values.dim():
            raise SaveError(f"{name} is multiplied as {key.view}, and is no matrix of a linear.\n{_FIX}")
        adopt_values(slot, values, parse(key.spec), key.dtype, CPU, FROM, rounding)

    def adopt(self, name: str, key: Key, planes: Planes) -> None:
        """Planes of the whole weight."""
        self._try(lambda: self._adopt(name, key, planes))

    def _adopt(self, name: str, key: Key, planes: Planes) -> None:
        slot = self.slots[name]
        layout = "experts" if slot.tensor.dim() == 3 else "rows"
        STORE.adopt(hollow(slot, CPU), key._replace(layout=layout, view=()), tuple(p.cpu() for p in planes), FROM)

    def _try(self, act: Callable[[], None]) -> None:
        if self.error is None:
            try:
                act()
            except Exception as error:
                self.error = error

    def made(self) -> nn.Module:
        """The model, compiled with the same policy and never called, its weights released.

        Raises:
            Exception: what went wrong first.
        """
        if self.error is not None:
            raise self.error
        left = [name for name, slot in slots_of(self.model).items() if slot.tensor.is_meta]
        if left:
            raise SaveError(
                f"{type(self.model).__name__} has {left[0]}, which the divided model lacks; this is a defect"
            )
        self.model.generation_config = copy.deepcopy(getattr(self.divided, "generation_config", None))
        return api.compile(self.model.eval(), LEDGER.policy_of(self.divided), release_weights=True)
