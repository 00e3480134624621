"""The format ``packed``: a model's planes as its kernels read them, in a folder that loads without quantizing or packing anything.

``sglquant.json`` says which planes belong to which weights and in which layout; planes and all other weights are in safetensors, weights
under their names in the model. A slab of merged siblings is stored once. Read back, every plane must have the dtype and shape that its
layout prescribes, so that a file of another version, or one that was changed, is refused before anything is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from quant_compile.checkpoints.cache import positive
from quant_compile.checkpoints.description import PACKED
from quant_compile.checkpoints.errors import CheckpointError, SaveError
from quant_compile.checkpoints.files import Files, Part, read_json
from quant_compile.checkpoints.fill import Outcome, Progress, hollow, place, scale_input
from quant_compile.checkpoints.names import Slot, slots_of
from quant_compile.checkpoints.staging import staged
from quant_compile.checkpoints.write import Item, Job
from quant_compile.ir.errors import QuantError
from quant_compile.ir.family import PlaneSpec, family_of
from quant_compile.ir.kv import CacheScheme, parse_cache
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.moe import moe_layouts, moe_problem_text, parse_moe_problem
from quant_compile.lowering.registry import Problem, layouts
from quant_compile.lowering.weights import STORE, Key, Slab
from quant_compile.model.cache_scales import CacheScales
from quant_compile.model.weights import linear_weights

FORMAT, FILE, VERSION = "packed", "sglquant.json", 1
AGAIN = "Fix: save the model again with this version, or convert the original checkpoint."

KeyOf = Callable[[nn.Parameter], "Key | None"]


def quantization_config() -> dict[str, Any]:
    """What ``config.json`` says: that ``sglquant.json`` says everything."""
    return {"quant_method": PACKED, "format": FORMAT, "version": VERSION}


# --- writing ---


@dataclass
class Packer:
    """What a model becomes.

    Raises:
        SaveError: planes do not stand for a weight, since something else reads its values.

    Attributes:
        jobs: tensors to write.
        slabs: of ``sglquant.json``.
        scales: weight -> tensor with the scale of its input.
        inputs: module -> what happens to its input, and the tensor that says how.
        sources: weight -> where its planes come from, if it was loaded.
        schemes: of quantized weights, by name.
        kept: names of all others.
        caches: decoder layer -> its fixed scales of the KV cache, and the tensors with them.
    """

    model: nn.Module
    key_of: KeyOf
    cache: Mapping[str, CacheScales] = field(default_factory=dict[str, CacheScales])
    jobs: list[Job] = field(default_factory=list)
    slabs: list[dict[str, Any]] = field(default_factory=list)
    scales: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    caches: dict[str, dict[str, str]] = field(default_factory=dict)
    _factors: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        members: dict[int, list[tuple[int, int, Slot]]] = {}
        slabs: dict[int, tuple[Slab, Key]] = {}
        read = {id(weight.parameter) for weight in linear_weights(self.model) if weight.in_embedding}
        for slot in dict.fromkeys(slots_of(self.model).values()):
            key = self.key_of(slot.tensor) if isinstance(slot.tensor, nn.Parameter) else None
            if key is None:
                self.kept.append(slot.name)
                self._tensor(slot.name, slot.tensor)
                continue
            entry = STORE.entry(cast(nn.Parameter, slot.tensor))
            if id(slot.tensor) in read:
                raise SaveError(
                    f"{slot.name} is quantized as {key.spec}, and an embedding that it is tied to reads its values: planes alone are not "
                    "the model.\nFix: `keep` this weight by a rule, or untie the two."
                )
            pack = entry.packs[key]
            slabs[id(pack.slab)] = pack.slab, key
            members.setdefault(id(pack.slab), []).append((pack.start, pack.stop, slot))
            self.schemes[slot.name] = parse(key.spec)
            if entry.rounding.factor is not None:
                self._factor(slot, key)
            if entry.source:
                self.sources[slot.name] = entry.source
            if entry.input_scale is not None:
                self.scales[slot.name] = f"input_scale.{slot.name}"
                self._tensor(self.scales[slot.name], entry.input_scale)
        for identity, (slab, key) in slabs.items():
            self._slab(slab, key, members[identity])
        self._inputs()
        for layer, found in self.cache.items():
            self.caches[layer] = {"scheme": found.scheme.name}
            for side, values in (("k", found.k), ("v", found.v)):
                self.caches[layer][side] = f"cache_scale.{layer}.{side}"
                self._tensor(self.caches[layer][side], values)

    def _slab(self, slab: Slab, key: Key, members: list[tuple[int, int, Slot]]) -> None:
        index = len(self.slabs)
        planes: list[dict[str, Any]] = []
        for position, plane in enumerate(slab.planes):
            order = sorted(range(plane.dim()), key=lambda d, plane=plane: (-plane.stride(d), d))
            name = f"slab.{index}.{position}"
            self._tensor(name, plane.permute(order))
            planes.append({"tensor": name, "order": order})
        self.slabs.append(
            {
                "spec": key.spec,
                "layout": key.layout,
                "transposed": key.transposed,
                "dtype": dtype_name(key.dtype),
                "interleaved": key.interleaved,
                "view": list(key.view),
                "rows": list(slab.rows),
                "members": {slot.name: [start, stop] for start, stop, slot in sorted(members, key=lambda m: m[0])},
                "problem": None if slab.problem is None else moe_problem_text(slab.problem),
                "planes": planes,
            }
        )

    def _factor(self, slot: Slot, key: Key) -> None:
        """Let the module multiply its input once it is loaded, as graphs do here.

        Raises:
            SaveError: the module's input is not what the weight multiplies by.
        """
        kind, path = type(slot.owner).__name__, slot.name.rpartition(".")[0]
        if not _input_widths(slot.owner):
            raise SaveError(
                f"{slot.name} is quantized for an input with factors, and {kind} is no linear that could multiply its input by them.\n"
                "Fix: a policy without `planes`, or `keep` this weight by a rule."
            )
        parameter = cast(nn.Parameter, slot.tensor)
        factor = STORE.entry(parameter).rounding.factor
        assert factor is not None
        name = f"input_factor.{factor.name}"
        if name not in self._factors:
            self._factors.add(name)
            self._tensor(name, STORE.input_factor(parameter, key.dtype))
        self.inputs.setdefault(path, {})["factor"] = name

    def _inputs(self) -> None:
        known: dict[int, str] = {}
        for path, module in self.model.named_modules():
            for kind in ("order", "factor"):
                buffer = module._buffers.get(f"sglq_input_{kind}")
                if buffer is None:
                    continue
                if id(buffer) not in known:
                    known[id(buffer)] = f"input_{kind}.{path}"
                    self._tensor(known[id(buffer)], buffer)
                self.inputs.setdefault(path, {})[kind] = known[id(buffer)]

    def _tensor(self, name: str, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            values = tensor.detach()
            item = Item(name, values.dtype, tuple(values.shape))
        self.jobs.append(Job((item,), lambda: {name: values}))

    def document(
        self, policy: Mapping[str, Any], target: str, times: Any, versions: Mapping[str, str]
    ) -> dict[str, Any]:
        """``sglquant.json``."""
        return {
            "version": VERSION, "target": target, "versions": dict(versions), "policy": dict(policy), "slabs": self.slabs,
            "input_scales": self.scales, "inputs": self.inputs, "sources": self.sources, "times": times,
            "cache_scales": self.caches,
        }  # fmt: skip


# --- reading ---


@dataclass(frozen=True)
class _Stored:
    """One slab of a file, checked against the model."""

    key: Key
    rows: tuple[int, ...]
    members: tuple[Slot | None, ...]
    problem: MoeProblem | None
    planes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Packed:
    """A folder that was read, and the model that it fills.

    Attributes:
        policy: keys of a policy file.
        target: device that the layouts were chosen for.
        times: measured times of kernels there.
        outcomes: of every weight.
        caches: decoder layer -> the scheme of its KV cache, and the tensors with its scales of K and V.
    """

    files: Files
    policy: Mapping[str, Any]
    target: str
    times: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    slabs: tuple[_Stored, ...]
    kept: tuple[Slot, ...]
    scales: Mapping[str, str]
    sources: Mapping[str, str]
    inputs: Mapping[str, Mapping[str, str]]
    caches: Mapping[str, tuple[CacheScheme, str, str]]

    def cache_scales(self) -> dict[str, CacheScales]:
        """Fixed scales of the KV cache, by layer.

        Raises:
            CheckpointError: one is no positive number.
        """

        def values(name: str) -> Tensor:
            return positive(self.files.get(name).clone(), self.files.tensors[name], AGAIN)

        return {layer: CacheScales(scheme, values(k), values(v)) for layer, (scheme, k, v) in self.caches.items()}

    @property
    def quantized(self) -> list[Slot]:
        """Weights that have planes."""
        return [slot for slab in self.slabs for slot in slab.members if slot is not None]

    def fill(self, model: nn.Module, device: torch.device, progress: Progress) -> None:
        """Take everything over.

        Raises:
            CheckpointError: values are NaN or inf.
        """
        tensors = _Tensors(self.files, device, progress)
        steps = [[self.files.tensors[name]] for name in self._order()]
        with torch.no_grad(), staged(self.files, steps, device):
            for slot in self.kept:
                place(slot, tensors.get(slot.name))
            for slab in self.slabs:
                planes = tuple(tensors.plane(name, order) for name, order in slab.planes)
                parameters = [None if slot is None else hollow(slot, device) for slot in slab.members]
                STORE.adopt_slab(parameters, slab.rows, slab.key, planes, slab.problem)
                for slot, parameter in zip(slab.members, parameters, strict=True):
                    if slot is not None and parameter is not None:
                        self._note(slot, parameter, tensors)
            self._inputs(model, tensors)
            tensors.check()
        self.files.close()

    def _order(self) -> Iterator[str]:
        """Tensors as ``fill`` asks for them."""
        yield from (slot.name for slot in self.kept)
        for slab in self.slabs:
            yield from (name for name, _ in slab.planes)
            names = [slot.name for slot in slab.members if slot is not None]
            yield from (self.scales[name] for name in names if name in self.scales)
        yield from dict.fromkeys(name for named in self.inputs.values() for name in named.values())

    def _note(self, slot: Slot, parameter: nn.Parameter, tensors: _Tensors) -> None:
        entry = STORE.entry(parameter)
        entry.source = self.sources.get(slot.name) or self.files.folder.name
        if slot.name in self.scales:
            entry.input_scale = tensors.get(self.scales[slot.name])
        path = slot.name.rpartition(".")[0]
        entry.own_input = path in self.inputs

    def _inputs(self, model: nn.Module, tensors: _Tensors) -> None:
        known: dict[str, Tensor] = {}
        for path, named in self.inputs.items():
            for name in named.values():
                known[name] = known[name] if name in known else tensors.get(name)
            found = {kind: known[name] for kind, name in named.items()}
            scale_input(model.get_submodule(path), found.get("order"), found.get("factor"))


def _input_widths(module: nn.Module | None) -> set[int]:
    """How many numbers a module's input may have, where a linear or experts multiply by it; empty: it is none of these."""
    width = getattr(module, "in_features", None)
    if module is None or isinstance(width, int):
        return {width} if isinstance(width, int) else set()
    return {size for weight in module.parameters(recurse=False) if weight.dim() == 3 for size in weight.shape[1:]}


@dataclass
class _Tensors:
    """Tensors of a folder on their way to a device. Their values are looked at once, at the end: a look waits for the device."""

    files: Files
    device: torch.device
    progress: Progress
    _ends: dict[torch.dtype, list[tuple[str, Tensor, Tensor]]] = field(
        default_factory=dict[torch.dtype, list[tuple[str, Tensor, Tensor]]]
    )

    def get(self, name: str) -> Tensor:
        """As it lies."""
        values = self.files.load(Part(name), self.device)
        self.progress(self.files.tensors[name].nbytes)
        if values.is_floating_point() and values.element_size() > 1 and values.numel():
            least, most = torch.aminmax(values)
            self._ends.setdefault(values.dtype, []).append((name, least, most))
        return values

    def plane(self, name: str, order: tuple[int, ...]) -> Tensor:
        """With its dimensions in the order of its layout."""
        inverse = sorted(range(len(order)), key=lambda d: order[d])
        return self.get(name).permute(inverse)

    def check(self) -> None:
        """Refuse NaN and inf.

        Raises:
            CheckpointError: a tensor has one.
        """
        for ends in self._ends.values():
            pairs = torch.stack([end for _, least, most in ends for end in (least, most)])
            finite = torch.isfinite(pairs).view(-1, 2).all(1).tolist()
            bad = next((name for (name, *_), good in zip(ends, finite, strict=True) if not good), None)
            if bad is not None:
                raise CheckpointError(f"{self.files.tensors[bad].where} has NaN or inf.\n{AGAIN}")


def read(files: Files, model: nn.Module) -> Packed:
    """What a folder holds for a model; headers and ``sglquant.json`` only.

    Raises:
        CheckpointError: it was written by another version, was changed, or is of another model.
    """
    return _Reader(files, model).packed()


class _Reader:
    """Checks every word of ``sglquant.json`` against the model, the layouts and the files' headers."""

    def __init__(self, files: Files, model: nn.Module) -> None:
        self.files, self.model = files, model
        self.path = files.folder / FILE
        self.data = read_json(self.path)
        if self.data.get("version") != VERSION:
            self._fail(f"has version {self.data.get('version')!r}, and {VERSION} is read here")
        self.slots = slots_of(model)
        self.used: set[str] = set()

    def packed(self) -> Packed:
        """Everything, checked."""
        slabs = tuple(self._slab(i, value) for i, value in enumerate(self._list("slabs")))
        taken = [slot.name for slab in slabs for slot in slab.members if slot is not None]
        quantized = set(taken)
        if len(quantized) < len(taken):
            twice = next(name for name in taken if taken.count(name) > 1)
            self._fail(f"gives {twice} planes twice")
        kept = tuple(slot for slot in dict.fromkeys(self.slots.values()) if slot.name not in quantized)
        for slot in kept:
            self._check(slot.name, slot.tensor.dtype, tuple(slot.tensor.shape))
        scales = self._names("input_scales", quantized)
        for tensor in scales.values():
            self._check(tensor, torch.float32, (1,))
        inputs, caches = self._of_inputs(), self._of_caches()
        left = sorted(set(self.files.tensors) - self.used)
        if left:
            self._fail(f"does not say what {left[0]} is")
        sources = self._names("sources", quantized, tensors=False)
        outcomes = tuple(self._outcomes(slabs, kept, sources))
        policy, times = self._mapping(self.data, "policy"), self._mapping(self.data, "times", optional=True)
        target = self.data.get("target")
        if not isinstance(target, str):
            self._fail("names no target")
        return Packed(self.files, policy, target, times, outcomes, slabs, kept, scales, sources, inputs, caches)

    def _outcomes(
        self, slabs: Sequence[_Stored], kept: Sequence[Slot], sources: Mapping[str, str]
    ) -> Iterator[Outcome]:
        for slab in slabs:
            size = sum(self.files.tensors[name].nbytes for name, _ in slab.planes)
            for slot, rows in zip(slab.members, slab.rows, strict=True):
                if slot is not None:
                    share = size * rows // max(1, sum(slab.rows))
                    source = f"{self.files.tensors[slab.planes[0][0]].file.name} ({slab.key.layout})"
                    origin = (f"from {sources[slot.name]}",) if slot.name in sources else ()
                    yield Outcome(slot.name, parse(slab.key.spec), source, share, origin, True)
        for slot in kept:
            info = self.files.tensors[slot.name]
            yield Outcome(slot.name, None, info.file.name, info.nbytes)

    def _slab(self, index: int, value: Any) -> _Stored:
        where = f"slabs[{index}]"
        data = self._object(value, where)
        key = self._key(data, where)
        rows = tuple(self._naturals(data.get("rows"), f"{where}.rows"))
        starts = [sum(rows[:i]) for i in range(len(rows))]
        members: list[Slot | None] = [None] * len(rows)
        for name, span in self._object(data.get("members"), f"{where}.members").items():
            start, stop = (*self._naturals(span, f"{where}.members"), 0, 0)[:2]
            slot = self.slots.get(name)
            position = next((i for i, own in enumerate(rows) if (starts[i], starts[i] + own) == (start, stop)), None)
            if slot is None or not isinstance(slot.tensor, nn.Parameter):
                self._fail(f"{where} names {name!r}, which the model does not have")
            if position is None or members[position] is not None:
                self._fail(f"{where} gives {name} rows {start} to {stop}, which are no member's")
            members[position] = slot
        if not any(members):
            self._fail(f"{where} belongs to no weight")
        problem, specs = self._specs(data, key, rows, members, where)
        planes = tuple(self._plane(p, specs, i, where) for i, p in enumerate(self._sequence(data.get("planes"), where)))
        if len(planes) != len(specs):
            self._fail(f"{where} has {len(planes)} planes, and the layout {key.layout} has {len(specs)}")
        return _Stored(key, rows, tuple(members), problem, planes)

    def _key(self, data: Mapping[str, Any], where: str) -> Key:
        spec, layout = data.get("spec"), data.get("layout")
        try:
            if not isinstance(spec, str):
                raise TypeError
            parse(spec)
        except (QuantError, TypeError, ValueError):
            self._fail(f"{where} has the scheme {spec!r}, which is none")
        if not isinstance(layout, str) or (layout not in layouts() and layout not in moe_layouts()):
            self._fail(f"{where} has the layout {layout!r}, which this version does not know")
        flags = [data.get(name) for name in ("transposed", "interleaved")]
        dtype = _DTYPES.get(str(data.get("dtype")))
        if dtype is None or not all(isinstance(flag, bool) for flag in flags):
            self._fail(f"{where} has no dtype, or no transposed and interleaved")
        view = tuple(self._naturals(data.get("view"), f"{where}.view"))
        return Key(spec, layout, cast(bool, flags[0]), dtype, cast(bool, flags[1]), view)

    def _specs(
        self, data: Mapping[str, Any], key: Key, rows: Sequence[int], members: Sequence[Slot | None], where: str
    ) -> tuple[MoeProblem | None, tuple[PlaneSpec, ...]]:
        """What planes of this layout are, for weights of the model's sizes."""
        scheme = parse(key.spec)
        slots = [slot for slot in members if slot is not None]
        shapes = [key.view or tuple(slot.tensor.shape) for slot in slots]
        if any(prod(shape) != slot.tensor.numel() for shape, slot in zip(shapes, slots, strict=True)):
            self._fail(f"{where} views {slots[0].name} in a shape that it does not have")
        text = data.get("problem")
        if len(shapes[0]) == 3:
            experts, *sizes = shapes[0]
            n, k = reversed(sizes) if key.transposed else sizes
            if tuple(rows) != (experts,):
                self._fail(f"{where} has {list(rows)} experts, and {slots[0].name} has {experts}")
            if text is None:
                own = family_of(scheme).weight_planes(scheme, n, k, key.dtype)
                return None, tuple(PlaneSpec(s.name, (experts, *s.shape), s.dtype) for s in own)
            try:
                problem = parse_moe_problem(str(text))
            except (QuantError, ValueError, AttributeError):
                self._fail(f"{where} has a problem that cannot be read")
            if key.layout not in moe_layouts() or problem.experts != experts or problem.scheme != scheme:
                self._fail(f"{where} and its problem contradict each other")
            return problem, moe_layouts()[key.layout].planes(problem, n, k)
        if key.layout not in layouts() or any(len(shape) != 2 for shape in shapes) or text is not None:
            self._fail(f"{where} has the layout {key.layout}, and {slots[0].name} has {len(shapes[0])} dimensions")
        sizes = [tuple(reversed(shape)) if key.transposed else shape for shape in shapes]
        known = [own for slot, own in zip(members, rows, strict=True) if slot is not None]
        if [n for n, _ in sizes] != known or len({k for _, k in sizes}) > 1:
            self._fail(f"{where} has rows {list(rows)}, and {slots[0].name} has {sizes[0][0]}")
        whole = Problem(scheme, sum(rows), sizes[0][1], key.dtype, False)
        return None, layouts()[key.layout].planes(whole)

    def _plane(self, value: Any, specs: Sequence[PlaneSpec], index: int, where: str) -> tuple[str, tuple[int, ...]]:
        data = self._object(value, f"{where}.planes")
        name, order = data.get("tensor"), self._naturals(data.get("order"), f"{where}.planes")
        spec = specs[index] if index < len(specs) else None
        if spec is None or not isinstance(name, str) or sorted(order) != list(range(len(spec.shape))):
            self._fail(f"{where}.planes[{index}] is no plane of its layout")
        self._check(name, spec.dtype, tuple(spec.shape[d] for d in order))
        return name, tuple(order)

    def _of_inputs(self) -> dict[str, dict[str, str]]:
        out: dict[str, dict[str, str]] = {}
        modules = dict(self.model.named_modules())
        for path, value in self._object(self.data.get("inputs"), "inputs").items():
            widths = _input_widths(modules.get(path))
            named = self._object(value, f"inputs.{path}")
            if not widths or not named or not set(named) <= {"order", "factor"}:
                self._fail(f"inputs names {path!r}, which is no linear of the model")
            for kind, name in named.items():
                info = self.files.tensors.get(str(name))
                fits = info is not None and len(info.shape) == 1 and info.shape[0] in widths
                if info is None or not fits or info.dtype.is_floating_point == (kind == "order"):
                    self._fail(f"inputs.{path}.{kind} is no tensor of {' or '.join(map(str, sorted(widths)))} numbers")
                self.used.add(info.name)
                if kind == "order" and info.dtype not in (torch.int32, torch.int64):
                    self._fail(f"inputs.{path}.order has dtype {info.dtype}")
                out.setdefault(path, {})[kind] = info.name
        return out

    def _of_caches(self) -> dict[str, tuple[CacheScheme, str, str]]:
        out: dict[str, tuple[CacheScheme, str, str]] = {}
        modules = dict(self.model.named_modules())
        for layer, value in self._mapping(self.data, "cache_scales", optional=True).items():
            where = f"cache_scales.{layer}"
            found = self._object(value, where)
            try:
                scheme = parse_cache(str(found.get("scheme")))
            except QuantError:
                self._fail(f"{where} has the scheme {found.get('scheme')!r}, which is none")
            if layer not in modules or not scheme.fixed or set(found) != {"scheme", "k", "v"}:
                self._fail(f"{where} is no layer with fixed scales of K and V")
            for side in ("k", "v"):
                info = self.files.tensors.get(str(found[side]))
                if info is None or info.dtype != torch.float32 or len(info.shape) != 1 or not info.shape[0]:
                    self._fail(f"{where}.{side} is no tensor of scales")
                self.used.add(info.name)
            out[layer] = scheme, found["k"], found["v"]
        return out

    def _check(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        info = self.files.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.files.folder}: no file has {name}, which {FILE} and the model need.\n{AGAIN}")
        if info.dtype != dtype or info.shape != shape:
            have, want = f"{dtype_name(info.dtype)} {list(info.shape)}", f"{dtype_name(dtype)} {list(shape)}"
            raise CheckpointError(f"{info.where} is {have}, and must be {want}.\n{AGAIN}")
        self.used.add(name)

    # --- words ---

    def _names(self, key: str, weights: set[str], tensors: bool = True) -> dict[str, str]:
        found = self._object(self.data.get(key), key)
        for name, value in found.items():
            if name not in weights or not isinstance(value, str):
                self._fail(f"{key} names {name!r}, which has no planes here")
            if tensors and value not in self.files.tensors:
                self._fail(f"{key} names the tensor {value!r}, which no file has")
        return cast(dict[str, str], found)

    def _mapping(self, data: Mapping[str, Any], key: str, optional: bool = False) -> dict[str, Any]:
        return {} if optional and data.get(key) is None else self._object(data.get(key), key)

    def _object(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._fail(f"{where} must be an object")
        return cast(dict[str, Any], value)

    def _list(self, key: str) -> list[Any]:
        return self._sequence(self.data.get(key), key)

    def _sequence(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            self._fail(f"{where} must be a list")
        return cast(list[Any], value)

    def _naturals(self, value: Any, where: str) -> list[int]:
        found = self._sequence(value, where)
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in found):
            self._fail(f"{where} must be numbers from 0 up")
        return cast(list[int], found)

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {what}.\n{AGAIN}")


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
