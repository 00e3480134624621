"""Parameter -> packed planes: one packed copy per (Parameter, scheme, layout) in a process, found by identity.

The store holds Parameters weakly: when a model goes, its planes go. Siblings that a graph merges share one slab, and each
sibling's own planes are row slices of it; only where a layout cannot be cut and graphs group siblings differently is there
another copy for each group. ``epoch`` counts every change of any planes, so callers that cached planes know when to look
again; ``packed`` counts slabs made.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch.nn import Parameter

from quant_compile.ir.errors import MissingScalesError, RangeError, ReleasedWeightError, StaleWeightError, WeightError
from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import NONE, MoeProblem, gates_first
from quant_compile.ir.numerics import all_finite, checksum
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.identity import (
    Anchor,
    anchor_of,
    identity_of,
    is_lent,
    peek_anchor,
    shard_of,
    signature_of,
)
from quant_compile.lowering.moe import moe_layouts
from quant_compile.lowering.registry import Layout, Problem, layouts
from quant_compile.lowering.rounding.recipe import TO_NEAREST, Rounding, planes_of
from quant_compile.lowering.shards import Agreed, agree, shares_scale, with_largest

# Groups beyond the home that one weight keeps a slab for. Models use one or two; more is a sign of graphs that are gone.
MOST_FURTHER = 4
# Times that a weight may come in other memory with other values, until the values are no longer compared.
MOST_MOVES = 3


class ReleasableParameter(Parameter):
    """A Parameter whose original values may be freed after packing; until then it behaves as any other.

    Once released, shape, dtype, device and strides stay readable, so that models can be inspected and compiled again;
    compiled graphs run on its planes; any other use is an error. Weights get this class before Dynamo builds the guards of
    their first graph, since a class that changes later would fail them.
    """

    released_by_sglquant = False
    behaves_as_parameter = True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_dynamo_compiling() and not _is_metadata(func) and _any_released(args, kwargs):
            raise ReleasedWeightError(_released_message(_called(func)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Any:
        if self.released_by_sglquant:
            raise ReleasedWeightError(_released_message("deepcopy"))
        return super().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.released_by_sglquant:
            raise ReleasedWeightError(_released_message("pickle or torch.save"))
        return super().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            if not self.released_by_sglquant:
                return super().__repr__()
            return (
                f"ReleasableParameter(released, shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"
            )


def _any_released(args: Any, kwargs: Any) -> bool:
    values = [*args, *(kwargs or {}).values()]
    nested = [item for value in values if isinstance(value, list | tuple) for item in value]
    return any(isinstance(v, ReleasableParameter) and v.released_by_sglquant for v in (*values, *nested))


def _is_metadata(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "untyped_storage":
        # Dynamo describes the storage of each input when it compiles again; anyone else would go on to read it.
        return CompileContext.current_compile_id() is not None
    return name in _READABLE or _is_getter(func)


_READABLE = {
    "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "is_floating_point", "is_complex",
    "is_contiguous", "storage_offset", "get_device", "is_signed", "is_inference", "is_conj", "is_neg", "__len__",
    "__hash__", "_is_view", "requires_grad_", "type",
}  # fmt: skip
_GETTERS = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_leaf", "grad_fn", "is_quantized", "is_mkldnn", "is_nested", "names", "is_mps", "is_xpu",
    "itemsize", "nbytes", "_version", "is_sparse_csr", "retains_grad", "is_vulkan", "is_ipu", "is_mtia", "is_xla",
    "is_maia", "name", "_backward_hooks", "output_nr", "grad_dtype",
}  # fmt: skip


def _called(func: Any) -> str:
    """A function's name; of ``Tensor.data.__get__`` the attribute's."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name


def _is_getter(func: Any) -> bool:
    """Whether func is ``Tensor.<metadata>.__get__``, or sets ``requires_grad``, as ``requires_grad_`` does."""
    attribute, name = getattr(getattr(func, "__self__", None), "__name__", ""), getattr(func, "__name__", "")
    return (name == "__get__" and attribute in _GETTERS) or (name == "__set__" and attribute == "requires_grad")


def _released_message(what: str) -> str:
    return (
        f"{what} reads a weight whose original values were released after quantization.\n"
        "Fix: quant_compile.restore(model, source) with the checkpoint it came from, or compile with release_weights=False."
    )


class Key(NamedTuple):
    """What a pack depends on besides the Parameter."""

    spec: str
    layout: str
    transposed: bool
    dtype: torch.dtype
    interleaved: bool = False
    view: tuple[int, ...] = ()

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """What the Parameter is viewed as before it is packed: a matrix, or one for each expert."""
        return self.view or tuple(parameter.shape)


@dataclass(eq=False)
class Slab:
    """Planes of one weight or of merged siblings, in order; ``problem``: of an expert block, as its layout was told."""

    members: tuple[int, ...]
    rows: tuple[int, ...]
    planes: Planes
    problem: MoeProblem | None = None


@dataclass(frozen=True)
class Pack:
    """A weight's share of a slab: rows ``start`` to ``stop``."""

    slab: Slab
    start: int
    stop: int


Group = tuple[tuple[int, Key], ...]
"""Identities and keys of weights that one slab joins, in order; one weight is a group as well."""


@dataclass(eq=False)
class Entry:
    """What is known of one Parameter.

    Attributes:
        packs: its home under each key, from which everything is cut or unpacked.
        further: slabs of groups that no home can be cut into, held by each member; the oldest first.
        fingerprint: of the values that the planes were made of, where it was asked for.
        moves: how often other values came with other memory.
        source: where adopted planes come from.
        adopted: key of adopted planes that another layout has not replaced yet.
        own_input: the linear's input comes in an order, or with factors, that only these planes belong to.
        rounding: how planes are made of the values.
        input_factor: of ``rounding``, on the weight's device.
        agreed: of this rank's part of a weight: what all ranks know of it.
    """

    ref: weakref.ref[Anchor]
    signature: tuple[Any, ...]
    packs: dict[Key, Pack] = field(default_factory=dict)
    further: dict[Group, Slab] = field(default_factory=dict)
    input_scale: Tensor | None = None
    released: bool = False
    fingerprint: int | None = None
    moves: int = 0
    plain_readers: set[str] = field(default_factory=set)
    source: str = ""
    adopted: Key | None = None
    own_input: bool = False
    rounding: Rounding = TO_NEAREST
    input_factor: Tensor | None = None
    agreed: Agreed | None = None

    @property
    def scales_input(self) -> bool:
        """Whether the planes belong to an input that is reordered or scaled, by the module or by graphs."""
        return self.own_input or self.rounding.factor is not None

    def largest(self, parameter: Parameter, spec: str) -> Tensor | None:
        """[1] or [E]: the largest magnitude over all ranks, where a scale under the scheme is of all their parts.

        Raises:
            WeightError: it was not exchanged yet.
        """
        if not shares_scale(parameter, parse(spec)):
            return None
        if self.agreed is None:
            raise WeightError(
                "a weight of several ranks is packed before they have agreed on its scale; this is a defect"
            )
        return self.agreed.amax

    def is_as_before(self, parameter: Parameter) -> bool:
        """Whether the values are those that the planes were made of; known once a weight has been moved before."""
        if self.fingerprint is None or self.fingerprint != fingerprint(parameter):
            return False
        self.moves = 0
        return True

    def is_home(self, slab: Slab) -> bool:
        """Whether this Parameter's planes are cut from ``slab``."""
        return any(pack.slab is slab for pack in self.packs.values())

    def slabs(self) -> list[Slab]:
        """Every slab that holds planes of this Parameter, each once."""
        return list(
            {id(slab): slab for slab in (*(pack.slab for pack in self.packs.values()), *self.further.values())}.values()
        )


class WeightStore:
    """The packed weights of this process. Thread-safe; see the module's docstring."""

    def __init__(self) -> None:
        self.epoch = 0
        self.packed = 0
        self._entries: dict[int, Entry] = {}
        self._lock = threading.RLock()
        self._on_forget: list[weakref.WeakMethod[Callable[[int], None]]] = []

    def on_forget(self, callback: Callable[[int], None]) -> None:
        """Call ``callback(id)`` when a Parameter dies or its planes are dropped; held weakly."""
        self._on_forget = [ref for ref in self._on_forget if ref() is not None]
        self._on_forget.append(weakref.WeakMethod(callback))

    def entry(self, parameter: Parameter) -> Entry:
        """The entry of a Parameter, made on first sight."""
        with self._lock:
            anchor = anchor_of(parameter)
            identity = anchor.identity
            found = self._entries.get(identity)
            if found is not None and found.ref() is anchor:
                return found
            if found is not None:
                self._drop_further(found)
            ref = weakref.ref(anchor, lambda dead, identity=identity: self._forget(identity, dead))
            made = Entry(ref, signature_of(parameter))
            self._entries[identity] = made
            return made

    def peek(self, parameter: Parameter) -> Entry | None:
        """The entry of a Parameter if there is one."""
        anchor = peek_anchor(parameter)
        found = self._entries.get(anchor.identity) if anchor is not None else None
        return found if found is not None and found.ref() is anchor else None

    def _forget(self, identity: int, dead: weakref.ref[Anchor]) -> None:
        with self._lock:
            found = self._entries.get(identity)
            if found is None or found.ref is not dead:
                return  # the address already belongs to another Parameter
            del self._entries[identity]
            self._drop_further(found)  # the address may soon be another Parameter's
            self.epoch += 1
        self._announce(identity)

    def _announce(self, identity: int) -> None:
        """Tell those who cached planes of a Parameter that they are out of date, so that no old planes stay alive."""
        for ref in list(self._on_forget):
            callback = ref()
            if callback is not None:
                callback(identity)

    def __len__(self) -> int:
        return len(self._entries)

    def planes(self, parameters: tuple[Parameter, ...], keys: tuple[Key, ...], names: tuple[str, ...] = ()) -> Planes:
        """Packed planes of one weight or of siblings merged in this order; quantized now if they are not there.

        Raises:
            WeightError: NaN, inf, a dtype or device that cannot be quantized.
            StaleWeightError: a released weight would have to be packed again.
        """
        with self._lock:
            entries = [self.entry(parameter) for parameter in parameters]
            for entry, parameter in zip(entries, parameters, strict=True):
                self._check_fresh(entry, parameter)
            packs = [entry.packs.get(key) for entry, key in zip(entries, keys, strict=True)]
            cut = self._from_home(parameters[0], keys[0], packs)
            if cut is not None:
                return cut
            group = tuple(zip(map(identity_of, parameters), keys, strict=True))
            made = entries[0].further.get(group)
            if made is None:
                made = self._join(parameters, keys, packs, names or ("a weight",) * len(packs))
                self._keep(group, made, packs)
                self._replace_adopted(entries, keys)
            return made.planes

    def adopt(
        self,
        parameter: Parameter,
        key: Key,
        planes: Planes,
        source: str,
        input_scale: Tensor | None = None,
        own_input: bool = False,
        rounding: Rounding = TO_NEAREST,
    ) -> None:
        """Take planes in row form for a Parameter that has no values: it counts as released from now on.

        Args:
            parameter: hollow, of the weight's shape, dtype and device.
            key: ``layout`` is ``rows`` for a linear's planes and ``experts`` for those of a block, [E, ...].
            source: where the planes come from, for the ledger.
            input_scale: [1] f32, of a static scheme.
            own_input: other values cannot take their place, since the linear's input is reordered or scaled for them.
            rounding: how they were made.
        """
        rows = parameter.shape[0] if key.layout == "experts" else problem_of(parameter, key).n
        with self._lock:
            self.adopt_slab([parameter], [rows], key, planes)
            entry = self.entry(parameter)
            entry.source, entry.input_scale, entry.own_input = source, input_scale, own_input
            entry.rounding, entry.input_factor = rounding, None

    def adopt_slab(
        self,
        members: Sequence[Parameter | None],
        rows: Sequence[int],
        key: Key,
        planes: Planes,
        problem: MoeProblem | None = None,
    ) -> None:
        """Take planes in any layout for hollow Parameters that share them: they count as released from now on.

        Args:
            members: in order; None stands for rows that nobody reads.
            rows: of each member; of a block's weight its experts.
            key: of all of them.
            planes: as ``key.layout`` has them.
            problem: of an expert block, as its layout was told; None: row form.
        """
        with self._lock:
            entries = [None if member is None else self.entry(member) for member in members]
            identities = tuple(0 if member is None else identity_of(member) for member in members)
            slab, start = Slab(identities, tuple(rows), planes, problem), 0
            for member, entry, size in zip(members, entries, rows, strict=True):
                if member is not None and entry is not None:
                    entry.packs = {key: Pack(slab, start, start + size)}
                    entry.adopted, entry.released = key, True
                    claim(member)
                    member.released_by_sglquant = True  # type: ignore[attr-defined]
                start += size
            self.epoch += 1

    @staticmethod
    def _replace_adopted(entries: list[Entry], keys: tuple[Key, ...]) -> None:
        """Let adopted rows go once they lie in the layout that a kernel reads, from which they can be unpacked."""
        for entry, key in zip(entries, keys, strict=True):
            if entry.adopted is not None and entry.adopted != key and key in entry.packs:
                entry.packs.pop(entry.adopted, None)
                entry.adopted = None

    def _from_home(self, parameter: Parameter, key: Key, packs: list[Pack | None]) -> Planes | None:
        """Planes that are neighbours in one slab, as views of it; None where they are not or the layout cannot be cut."""
        known = [pack for pack in packs if pack is not None]
        if len(known) < len(packs) or any(a.slab is not b.slab or a.stop != b.start for a, b in pairwise(known)):
            return None
        slab = known[0].slab
        whole = Pack(slab, known[0].start, known[-1].stop)
        return self._cut(whole, _slab_problem(slab, parameter, key), layouts()[key.layout])

    def expert_planes(
        self, parameter: Parameter, key: Key, problem: MoeProblem | None, name: str = "a weight"
    ) -> Planes:
        """Packed planes [E, ...] of a block's weight [E, n, k], quantized expert by expert if they are not there.

        Args:
            key: ``layout`` is one of ``moe_layouts``; ``spec`` ``none`` stands for the values themselves.
            problem: the block; None only for ``none``.

        Raises:
            WeightError, StaleWeightError: as ``planes``.
        """
        with self._lock:
            entry = self.entry(parameter)
            self._check_fresh(entry, parameter)
            found = entry.packs.get(key)
            if found is None:
                other = next((k for k in entry.packs if _same_rows(k, key, bool(entry.source))), None)
                if other is None and entry.released:
                    raise StaleWeightError(
                        f"{name} was released and cannot become {key.spec}.\n"
                        "Fix: quant_compile.restore(model, source) first."
                    )
                experts, rows, columns = key.shape_of(parameter)
                size = (columns, rows) if key.transposed else (rows, columns)
                if other is None:
                    if key.spec != NONE:
                        _check_scheme(parse(key.spec), name)
                    with _plain_tensors():
                        source: Tensor | Planes = parameter.detach().reshape(key.shape_of(parameter))
                        _check_values(parameter, source, name, key)
                else:
                    source = entry.packs[other].slab.planes
                layout = other.layout if other is not None else ""
                largest = entry.largest(parameter, key.spec) if other is None and key.spec != NONE else None
                planes = pack_experts(source, key, problem, size, layout, entry.rounding, largest)
                _wait(planes)
                slab = Slab((identity_of(parameter),), (experts,), planes, problem)
                found = entry.packs[key] = Pack(slab, 0, experts)
                if other is not None:
                    del entry.packs[other]
                self.packed += 1
                self.epoch += 1
            return found.slab.planes

    def _row_form(self, parameter: Parameter, key: Key, name: str) -> Planes:
        """Row-form planes of a weight that has no pack under ``key``: out of another layout's pack, else quantized now."""
        entry = self.entry(parameter)
        other = next((k for k in entry.packs if _same_rows(k, key, bool(entry.source))), None)
        if other is not None:
            return self._rows(entry.packs[other], parameter, other)
        if entry.released:
            raise StaleWeightError(
                f"{name} was released as {', '.join(sorted({k.spec for k in entry.packs})) or 'nothing'} and cannot become {key.spec}.\n"
                "Fix: quant_compile.restore(model, source) first."
            )
        return quantize(parameter, key, name, entry.rounding, entry.largest(parameter, key.spec))

    def _join(
        self, parameters: tuple[Parameter, ...], keys: tuple[Key, ...], packs: list[Pack | None], names: tuple[str, ...]
    ) -> Slab:
        """A new slab of one weight or of siblings; packed together, since one alone may have a size that the layout does not take."""
        rows = [
            self._row_form(parameter, key, name) if pack is None else self._rows(pack, parameter, key)
            for pack, parameter, key, name in zip(packs, parameters, keys, names, strict=True)
        ]
        sizes = tuple(problem_of(parameter, key).n for parameter, key in zip(parameters, keys, strict=True))
        with _plain_tensors():
            joined = rows[0] if len(rows) == 1 else tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
            problem = problem_of(parameters[0], keys[0], sum(sizes))
            made = Slab(tuple(map(identity_of, parameters)), sizes, layouts()[keys[0].layout].pack(joined, problem))
        _wait(made.planes)
        self.packed += 1
        return made

    def _keep(self, group: Group, made: Slab, packs: list[Pack | None]) -> None:
        """Make a new slab the home of its members, or a further copy for this group where they have one with others.

        Graphs may group one weight differently (q, k, v and q, k) in a layout that cannot be cut. Packing it anew at each
        switch would take longer than the calls, and a graph can neither take a slab with siblings that it does not know nor
        leave them apart without a copy of each: so each group keeps its slab, which the ledger counts. A home moves only to
        a group that holds more siblings, so that graphs that alternate come to rest.
        """
        moves = self._outgrows(group, packs)
        start = 0
        for (identity, key), pack, size in zip(group, packs, made.rows, strict=True):
            entry = self._entries[identity]
            if moves or pack is None:
                entry.packs[key] = Pack(made, start, start + size)
                self.epoch += 1
            if not moves:
                entry.further[group] = made
            start += size
        for identity, _ in group:
            further = self._entries[identity].further
            while len(further) > MOST_FURTHER:
                self._drop_group(next(iter(further)))

    def _outgrows(self, group: Group, packs: list[Pack | None]) -> bool:
        """Whether every slab that is home to a member is home to fewer weights than the group, all of them members."""
        members = {identity for identity, _ in group}
        return all(
            {m for m in pack.slab.members if (e := self._entries.get(m)) is not None and e.is_home(pack.slab)} < members
            for pack in packs
            if pack is not None
        )

    def _drop_further(self, entry: Entry) -> None:
        for group in list(entry.further):
            self._drop_group(group)

    def _drop_group(self, group: Group) -> None:
        """Forget one further slab; bindings that hold its planes go."""
        for identity, _ in group:
            entry = self._entries.get(identity)
            if entry is not None:
                entry.further.pop(group, None)
        self.epoch += 1
        for identity, _ in group:
            self._announce(identity)

    def _rows(self, pack: Pack, parameter: Parameter, key: Key) -> Planes:
        """Row-form planes of one weight, out of its slab."""
        layout = layouts()[key.layout]
        problem = _slab_problem(pack.slab, parameter, key)
        cut = self._cut(pack, problem, layout)
        with _plain_tensors():
            if cut is not None and pack.stop - pack.start != problem.n:
                return layout.unpack(cut, problem_of(parameter, key))
            rows = layout.unpack(pack.slab.planes, problem)
            whole = Pack(Slab(pack.slab.members, pack.slab.rows, rows), pack.start, pack.stop)
            result = self._cut(whole, problem, layouts()["rows"])
        if result is None:
            raise WeightError("merged siblings do not end at a block of rows; this is a defect of merge_siblings")
        return result

    def refusal(self, parameter: Parameter, scheme: Scheme) -> Reject | None:
        """Why a weight's values cannot have a scheme; not asked of one that has planes under it, or has no values."""
        entry = self.peek(parameter)
        if parameter.is_meta or (entry is not None and entry.released) or not parameter.dtype.is_floating_point:
            return None
        if entry is not None and any(key.spec == scheme.spec for key in entry.packs):
            return None
        with _plain_tensors():
            return family_of(scheme).takes_values(scheme, parameter.detach())

    def held(self, parameter: Parameter, spec: str | None = None) -> Key | None:
        """The key of a weight's planes, those under ``spec`` first; None where it has none, or only its values."""
        entry = self.peek(parameter)
        keys = [key for key in entry.packs if key.spec != NONE] if entry is not None else []
        return next((key for key in keys if key.spec == spec), keys[0] if keys else None)

    def logical(self, parameter: Parameter, key: Key, name: str, expert: int | None = None) -> Planes:
        """Row-form planes of a weight, or of one expert of a block, whatever layout they lie in.

        A weight that has its values is quantized by its family once more, which gives the codes and scales that it has; planes of
        a released one are unpacked.

        Args:
            key: one that ``held`` gave.
            name: of the weight, for errors.
            expert: of a block's weight [E, n, k].

        Raises:
            WeightError: the planes are in a layout that does not give back what was packed to the last bit.
        """
        with self._lock:
            entry = self.entry(parameter)
            if not entry.released:
                if expert is None:
                    return quantize(parameter, key, name, entry.rounding, entry.largest(parameter, key.spec))
                with _plain_tensors():
                    stored = parameter.detach().reshape(key.shape_of(parameter))[expert]
                return quantize_expert(stored, key, name, entry.rounding, expert)
            pack = entry.packs[key]
            if expert is not None:
                return _expert_rows(pack.slab, parameter, key, expert)
            if not layouts()[key.layout].exact(pack.slab.planes):
                raise WeightError(
                    f"{name} is in the layout {key.layout}, whose scales do not unpack to the last bit.\n"
                    "Fix: quant_compile.restore(model, source) with the checkpoint it came from, then try again."
                )
            return tuple(plane.contiguous() for plane in self._rows(pack, parameter, key))

    def served(self, parameter: Parameter, spec: str) -> tuple[Key, Planes] | None:
        """Row-form planes with which graphs run a linear's weight under a scheme, whatever made them; in another layout, unpacked.

        None where the next call would pack anew, where there are none, and of experts.
        """
        with self._lock:
            entry = self.peek(parameter)
            if entry is None or (not entry.released and signature_of(parameter) != entry.signature):
                return None
            for key, pack in entry.packs.items():
                if key.spec == spec and not key.view and parameter.dim() == 2 and not entry.own_input:
                    return key, self._rows(pack, parameter, key)
            return None

    @staticmethod
    def _cut(pack: Pack, problem: Problem, layout: Layout) -> Planes | None:
        """Rows start..stop of a slab's planes as views, or None where the layout does not allow it."""
        if (pack.start, pack.stop) == (0, problem.n):
            return pack.slab.planes
        block = layout.row_block(problem)
        if block == 0 or pack.start % block or (pack.stop % block and pack.stop != problem.n):
            return None
        return tuple(_cut_plane(plane, pack.start, pack.stop, problem.n, block) for plane in pack.slab.planes)

    def _check_fresh(self, entry: Entry, parameter: Parameter) -> None:
        """Drop planes of values that are gone; those of values that came back in other memory, as offloading moves them, stay."""
        if entry.released:
            return
        signature = signature_of(parameter)
        if signature == entry.signature:
            return
        moved = signature[0] == entry.signature[0]  # the version is the same, the place is not
        entry.signature = signature
        if not entry.packs or (moved and entry.is_as_before(parameter)):
            return
        self._drop(entry)
        entry.fingerprint = fingerprint(parameter) if moved and entry.moves < MOST_MOVES else None
        entry.moves += 1

    def _drop(self, entry: Entry) -> None:
        entry.packs.clear()
        self._drop_further(entry)
        self.epoch += 1
        anchor = entry.ref()
        if anchor is not None:
            self._announce(anchor.identity)

    def round_by(self, parameter: Parameter, rounding: Rounding) -> None:
        """How the planes of a weight are to be made; those made otherwise are forgotten, but for a released weight's."""
        with self._lock:
            entry = self.entry(parameter)
            if entry.rounding == rounding or entry.released:
                return
            entry.rounding, entry.input_factor = rounding, None
            if entry.packs:
                self._drop(entry)

    def keep_only(self, parameter: Parameter, spec: str | None) -> None:
        """Forget planes under other schemes (None: all): the policy changed. A released weight keeps all it has."""
        with self._lock:
            entry = self.peek(parameter)
            if entry is None or entry.released or all(key.spec == spec for key in entry.packs):
                return
            entry.packs = {key: pack for key, pack in entry.packs.items() if key.spec == spec}
            for group in [group for group in entry.further if group[0][1].spec != spec]:
                self._drop_group(group)
            self.epoch += 1
            self._announce(identity_of(parameter))

    def agree(self, weights: Iterable[tuple[str, Parameter]]) -> None:
        """Exchange with other ranks what scales of their parts depend on, of weights that it was not exchanged of as they are now.

        A collective: every rank must call it for the same weights, in the same state.

        Args:
            weights: (name, Parameter); those that are not distributed, or have no values, are left alone.

        Raises:
            WeightError: one of them has NaN or inf on some rank.
        """
        with self._lock:
            wanted: list[tuple[str, Parameter]] = []
            for name, parameter in weights:
                shard, entry = shard_of(parameter), self.entry(parameter)
                if shard is None or not shard.cuts or entry.released:
                    continue
                if entry.agreed is None or entry.agreed.signature != signature_of(parameter):
                    wanted.append((name, parameter))
            for (_, parameter), agreed in zip(wanted, agree(wanted) if wanted else (), strict=True):
                self.entry(parameter).agreed = agreed

    def input_scale(self, parameters: tuple[Parameter, ...], names: tuple[str, ...]) -> Tensor:
        """Calibrated scale [1] f32 of the input of a weight (merged siblings share theirs).

        Raises:
            MissingScalesError: none was calibrated.
        """
        scale = self.entry(parameters[0]).input_scale
        if scale is None:
            raise MissingScalesError(
                f"{names[0] if names else 'a weight'} has a static scheme and no calibrated input scale.\n"
                "Fix: policy = quant_compile.calibrate(model, batches, policy), or use a dynamic scheme."
            )
        device = parameters[0].device
        if scale.device != device:
            scale = self.entry(parameters[0]).input_scale = scale.to(device)
        return scale

    def input_factor(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """What a weight's input is multiplied by, [k], for the planes that its rounding has."""
        with self._lock:
            entry = self.entry(parameter)
            factor, held = entry.rounding.factor, entry.input_factor
            assert factor is not None
            if held is None or held.device != parameter.device or held.dtype != dtype:
                with _plain_tensors():
                    held = entry.input_factor = factor.read().to(parameter.device, dtype)
            return held

    def refresh(self, parameters: Iterable[Parameter]) -> int:
        """Forget the planes of these weights so that the next call packs them anew; returns how many had planes.

        Raises:
            StaleWeightError: one of them is released.
        """
        with self._lock:
            entries = [entry for p in parameters if (entry := self.peek(p)) is not None and entry.packs]
            if any(entry.released for entry in entries):
                raise StaleWeightError(
                    "a released weight cannot be packed again. Fix: quant_compile.restore(model, source) first."
                )
            for entry in entries:
                self._drop(entry)
            return len(entries)

    def release(self, parameter: Parameter) -> int:
        """Free the original values of a packed weight; returns the bytes freed (0: not packed or already released)."""
        with self._lock:
            entry = self.peek(parameter)
            if entry is None or entry.released or not entry.packs or entry.plain_readers or is_lent(parameter):
                return 0
            if shard_of(parameter) is not None and not isinstance(parameter, ReleasableParameter):
                return 0  # a DTensor holds it, whose reads could not be refused
            self._check_fresh(entry, parameter)
            if not entry.packs:
                return 0
            entry.fingerprint = fingerprint(parameter)
            size = parameter.numel() * parameter.element_size()
            with _plain_tensors():
                hollow = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device
                )
                hollow.untyped_storage().resize_(0)
                parameter.data = hollow
            self._drop_further(entry)  # what only earlier graphs needed goes; the others pack theirs once more
            entry.released = True
            claim(parameter)
            parameter.released_by_sglquant = True  # type: ignore[attr-defined]
            self.epoch += 1
            return size

    def restore(self, parameter: Parameter, source: Tensor) -> bool:
        """Put original values back; returns whether they are the very values that were released (planes then stay)."""
        with self._lock:
            entry = self.entry(parameter)
            if not entry.released:
                return True
            if entry.own_input:
                raise StaleWeightError(
                    "the linear's input is reordered or scaled for the planes of its checkpoint, and other values would be wrong.\n"
                    "Fix: load the original checkpoint instead."
                )
            with torch._C.DisableTorchFunctionSubclass():
                if tuple(source.shape) != tuple(parameter.shape):
                    raise StaleWeightError(
                        f"source has shape {tuple(source.shape)}, the weight {tuple(parameter.shape)}"
                    )
                with _plain_tensors():
                    values = source.detach().to(device=parameter.device, dtype=parameter.dtype, copy=True)
                    parameter.data = values
                    parameter.released_by_sglquant = False  # type: ignore[attr-defined]
            entry.released, entry.source, entry.adopted = False, "", None
            entry.signature = signature_of(parameter)
            same = fingerprint(parameter) == entry.fingerprint
            if not same:
                self._drop(entry)
            self.epoch += 1
            return same


def _expert_rows(slab: Slab, parameter: Parameter, key: Key, expert: int) -> Planes:
    """Row-form planes of one expert, out of its block's planes in a kernel's layout."""
    _, rows, columns = key.shape_of(parameter)
    size = (columns, rows) if key.transposed else (rows, columns)
    own = tuple(plane[expert] for plane in slab.planes)
    if slab.problem is None:  # adopted, which is row form
        return own
    with _plain_tensors():
        return moe_layouts()[key.layout].unpack(own, slab.problem, *size)


def _same_rows(one: Key, other: Key, adopted: bool) -> bool:
    """Whether two keys have the same planes in row form; those that were adopted serve whatever their input becomes."""
    if one._replace(layout="", spec="") != other._replace(layout="", spec=""):
        return False
    if one.spec == other.spec or not adopted or NONE in (one.spec, other.spec):
        return one.spec == other.spec
    return parse(one.spec).weights == parse(other.spec).weights


def claim(parameter: Parameter) -> None:
    """Make a weight releasable; must happen before Dynamo builds guards over it. Lent weights are not ours to release."""
    if type(parameter) is Parameter and not is_lent(parameter):
        parameter.__class__ = ReleasableParameter


def claim_before_tracing(parameters: Iterable[Parameter]) -> None:
    """Make weights releasable that Dynamo has not seen yet; while it traces, a class must not change."""
    for parameter in parameters:
        claim(parameter)
    # Traced where a graph uses such a weight; called by anything else, it is no frame to compile.
    torch._dynamo.eval_frame.skip_code(ReleasableParameter.__torch_function__.__func__.__code__)


def disclaim(parameter: Parameter) -> None:
    """Take back ``claim``, of a weight that has its values."""
    if type(parameter) is ReleasableParameter and not parameter.released_by_sglquant:
        parameter.__class__ = Parameter  # pyright: ignore[reportAttributeAccessIssue]
        vars(parameter).pop("released_by_sglquant", None)


def _wait(planes: Planes) -> None:
    """Planes packed on one stream may be read on another as soon as the store's lock is free."""
    for device in {plane.device for plane in planes if plane.is_cuda}:
        torch.cuda.synchronize(device)


def _plain_tensors() -> Any:
    """Planes must be ordinary tensors, whatever mode the caller is in.

    Made in inference mode they could not be repacked outside of it; autocast would round scales and cannot join FP8 planes.
    """
    plain = torch._C.DisableTorchFunctionSubclass()  # else planes of a Tensor's subclass would be of that class
    return _All(torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast(), plain)


class _All:
    def __init__(self, *managers: Any) -> None:
        self.managers = managers

    def __enter__(self) -> None:
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *error: Any) -> None:
        for manager in reversed(self.managers):
            manager.__exit__(*error)


def _cut_plane(plane: Tensor, start: int, stop: int, n: int, block: int) -> Tensor:
    """Rows start..stop of n, of a plane with one row for each block of them (the last may be ragged) or a fixed share of n."""
    count = plane.shape[0]
    ratio = block if count == -(-n // block) or n % max(count, 1) else n // count
    return plane[start // ratio : -(-stop // ratio)]


def _slab_problem(slab: Slab, parameter: Parameter, key: Key) -> Problem:
    return problem_of(parameter, key, sum(slab.rows))


def problem_of(parameter: Parameter, key: Key, n: int | None = None) -> Problem:
    """The packing problem of a weight (or of a slab of n rows)."""
    rows, columns = key.shape_of(parameter)
    own, k = (columns, rows) if key.transposed else (rows, columns)
    return Problem(parse(key.spec), own if n is None else n, k, key.dtype)


def quantize(
    parameter: Parameter, key: Key, name: str, rounding: Rounding = TO_NEAREST, largest: Tensor | None = None
) -> Planes:
    """Row-form planes of a weight, on its own device, in chunks of rows; cast to the key's dtype first, as autocast does.

    Args:
        largest: the largest magnitude [1] of all ranks' parts of the weight, where their scale is of the whole tensor.

    Raises:
        WeightError: the weight has NaN or inf, is on the meta device, or is not floating point; nothing makes the scheme's planes.
    """
    scheme = parse(key.spec)
    _check_scheme(scheme, name)
    with _plain_tensors():
        weight = parameter.detach().reshape(key.shape_of(parameter))
        if not parameter.is_meta and parameter.dtype.is_floating_point:
            weight = (weight.t().contiguous() if key.transposed else weight).to(key.dtype)
        _check_values(parameter, weight, name, key)
        return tuple(plane.contiguous() for plane in _planes_of(weight, scheme, rounding, None, largest))


def pack_experts(
    source: Tensor | Planes,
    key: Key,
    problem: MoeProblem | None,
    size: tuple[int, int],
    layout: str = "",
    rounding: Rounding = TO_NEAREST,
    largest: Tensor | None = None,
) -> Planes:
    """Planes [E, ...] of a block's weight, filled expert by expert: besides them one expert's share is held.

    Args:
        source: the weight [E, n, k] as stored, or planes of another ``layout``.
        size: n and k of an expert.
        largest: [E]: see ``quantize``.
    """
    out: list[Tensor] = []
    layouts_ = moe_layouts()
    with _plain_tensors():
        experts = source.shape[0] if isinstance(source, Tensor) else source[0].shape[0]
        for expert in range(experts):
            if isinstance(source, Tensor):
                whole = None if largest is None else largest[expert]
                planes = _quantize_expert(source[expert], key, rounding, expert, whole)
            else:
                assert problem is not None
                planes = layouts_[layout].unpack(tuple(plane[expert] for plane in source), problem, *size)
            if problem is not None:
                planes = layouts_[key.layout].pack(planes, problem, *size)
            out = out or [plane.new_empty((experts, *plane.shape)) for plane in planes]
            for whole, plane in zip(out, planes, strict=True):
                whole[expert].copy_(plane)
    return tuple(out)


def quantize_expert(
    stored: Tensor, key: Key, name: str, rounding: Rounding = TO_NEAREST, expert: int | None = None
) -> Planes:
    """Planes of one expert [n, k] as stored, in row form.

    Raises:
        WeightError: it has NaN or inf, or is not floating point.
    """
    with _plain_tensors():
        _check_values(Parameter(stored, requires_grad=False), stored, name, key)
        return _quantize_expert(stored, key, rounding, expert)


def _quantize_expert(
    stored: Tensor, key: Key, rounding: Rounding, expert: int | None, largest: Tensor | None = None
) -> Planes:
    weight = stored.t() if key.transposed else stored
    scheme = None if key.spec == NONE else parse(key.spec)
    if key.interleaved and rounding.planes is None:
        weight = gates_first(weight)
    weight = weight.to(key.dtype).contiguous()
    if scheme is None:
        return (weight,)
    planes = _planes_of(weight, scheme, rounding, expert, largest)
    if key.interleaved and rounding.planes is not None:  # which are of the rows as the model has them
        planes = tuple(map(gates_first, planes))
    return planes


def _planes_of(
    weight: Tensor, scheme: Scheme, rounding: Rounding, expert: int | None = None, largest: Tensor | None = None
) -> Planes:
    """Row-form planes [n, k]; under the tensor scale of all ranks' parts, of which ``largest`` is the largest magnitude."""
    if largest is None or rounding.planes is not None:
        return planes_of(weight, scheme, rounding, expert)
    return tuple(plane[:-1] for plane in planes_of(with_largest(weight, largest), scheme, rounding, expert))


def _check_scheme(scheme: Scheme, name: str) -> None:
    """Refuse schemes that only a checkpoint brings.

    Raises:
        WeightError: nothing here makes planes of the scheme.
    """
    refusal = family_of(scheme).quantizes(scheme)
    if refusal is not None:
        raise WeightError(f"{name} cannot be quantized to {scheme.spec}: {refusal.reason}")


def _check_values(parameter: Parameter, weight: Tensor, name: str, key: Key) -> None:
    """Refuse what cannot be quantized.

    Raises:
        WeightError: the weight has NaN or inf, values too large for the scheme, is on the meta device, or is not floating point.
    """
    if parameter.is_meta:
        raise WeightError(
            f"{name} is on the meta device and has no values. Fix: load the weights before the first call."
        )
    if not parameter.dtype.is_floating_point:
        raise WeightError(f"{name} is {parameter.dtype}; only floating-point weights can be quantized. Fix: `keep` it.")
    if not all_finite(weight):
        where = ""
        if weight.dim() == 3:
            bad = [i for i, expert in enumerate(weight) if not bool(torch.isfinite(expert).all())]
            where = f" (expert {', '.join(map(str, bad[:8]))})"
        raise WeightError(
            f"{name} has NaN or inf values{where}. Fix: repair the checkpoint, or `keep` this weight in the policy."
        )
    scheme = None if key.spec == NONE else parse(key.spec)
    refusal = None if scheme is None else family_of(scheme).takes_values(scheme, weight)
    if refusal is not None:
        raise RangeError(name, refusal.reason)


def fingerprint(parameter: Parameter) -> int:
    """A checksum of the values' bytes, to tell whether restored values are the released ones."""
    with _plain_tensors():
        return checksum(parameter.detach())


STORE = WeightStore()
