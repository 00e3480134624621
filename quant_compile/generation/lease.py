"""One call of ``generate`` and the block of cache that it has: which step a token takes.

The first call of the model fills the cache. Every further token is a decode step over fixed inputs: run as compiled code the first
time, recorded the second, replayed from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant_compile.generation import caches
from quant_compile.generation.calls import Noting
from quant_compile.generation.graphs import Recorder, Recording, copier, counted, put_back, python_state
from quant_compile.generation.inputs import Mask, Slot, mark, masks_of, shape_of, slot_of
from quant_compile.generation.pool import Block
from quant_compile.generation.prompts import LONGEST, Filler, Run
from quant_compile.generation.weights import Weights

BUSY = 1024  # a prompt of so many tokens keeps the device busy while the host looks at the weights; else the first step does it


@dataclass(frozen=True)
class Names:
    """What a model calls its inputs."""

    ids: str
    positions: str
    mask: str
    cache: str


@dataclass(eq=False)
class Plan:
    """A decode step over fixed inputs.

    Attributes:
        slots: by name of the input.
        inputs: what the slots hold, as the model gets it.
        masks: those that each step writes for the next token; None: transformers makes them.
        positions: the token's position, which each step counts up.
        recordings: by what they are bound to.
        tried: key -> state of the weights with which a step has run, so that the next may be recorded.
        refused: keys that cannot be recorded.
    """

    slots: dict[str, Any]
    inputs: dict[str, Any]
    masks: list[Mask] | None
    positions: Tensor | None
    recordings: dict[Any, Recording] = field(default_factory=dict)
    tried: dict[Any, Any] = field(default_factory=dict)
    refused: set[Any] = field(default_factory=set)

    def accepts(self, inputs: dict[str, Any]) -> bool:
        """Whether the inputs are those of this step."""
        slots = self.slots
        return len(inputs) == len(slots) and all(
            name in slots and slots[name].accepts(value) for name, value in inputs.items()
        )

    def fill(self, inputs: dict[str, Any]) -> None:
        """Copy inputs to where the step reads them."""
        for name, value in inputs.items():
            self.slots[name].fill(value)


@dataclass(frozen=True)
class Template:
    """Inputs of the next step but for its token, at the addresses where the last step has left them.

    Attributes:
        inputs: by name.
        positions: the next token's position.
        full: sliding windows that were full in the last step; with others the masks are made in another way.
    """

    inputs: dict[str, Any]
    positions: Tensor | None
    full: tuple[bool, ...]


@dataclass(frozen=True)
class Shared:
    """What all leases of a model share.

    Attributes:
        call: the compiled model.
        names: of its inputs.
        recorder: None where nothing is recorded.
        weights: of the model.
        lock: held from a replay until its results are copied, since recordings share memory.
        note: writes into the report.
        writes_masks: a token sees all before it, or those in its window, so that masks may be written on.
    """

    call: Callable[..., Any]
    names: Names
    recorder: Recorder | None
    weights: Weights
    lock: Any
    note: Callable[[str], None]
    writes_masks: bool


@dataclass(eq=False)
class Lease:
    """A block in use.

    Attributes:
        shared: with other leases of the model.
        block: the memory; a larger one when it becomes too small.
        larger: makes a larger block for so many tokens.
        retire: takes a block that has become too small.
        length: tokens that the cache holds.
        filled_by: the graphs that filled the cache: with other graphs the model is not the one that was recorded.
    """

    shared: Shared
    block: Block
    larger: Callable[[int], Block | None]
    retire: Callable[[Block], None]
    length: int = 0
    filled_by: tuple[int, ...] = ()
    _plan: Plan | None = None
    _offer: dict[str, Any] | None = None
    _template: Template | None = None
    _skipped: Tensor | None = None
    _looked: bool = False

    def __post_init__(self) -> None:
        self._sliding = caches.sliding(self.cache)

    @property
    def cache(self) -> Any:
        """What transformers and the model see; the same object for the whole call."""
        return self.block.cache

    @property
    def _layers(self) -> list[Any]:
        return caches.parts(self.cache)[0].layers

    def reserve(self, tokens: int) -> None:
        """Make room for more tokens, and one to spare, since masks are written ahead; the cache stays the same object."""
        if self.length + tokens < self.block.key.length:
            return
        large = self.larger(max(self.length + tokens + 1, 2 * self.block.key.length))
        if large is None:
            return
        small = self.block
        self._let_go()
        caches.move(small.cache, large.cache, self.length)
        small.cache, large.cache = large.cache, small.cache
        self.block = large
        self._plan = self._offer = None
        self.retire(small)

    def rest(self) -> None:
        """Let go of the user's tensors."""
        self._plan = self._offer = self._template = self._skipped = None
        for plan in self.block.plans.values():
            for slot in _slots(list(plan.slots.values())) if plan is not None else ():
                slot.source = None

    # -- inputs of a step ----------------------------------------------------------------------------------------------

    def offer(self, inputs: dict[str, Any], given: dict[str, Any]) -> None:
        """Inputs as transformers made them of ``given``: later steps may take them over, if nothing but the known ones changes."""
        names = self.shared.names
        kept = {n: v for n, v in inputs.items() if n not in (names.ids, names.positions, names.mask, names.cache)}
        same = all(value is given.get(name) for name, value in kept.items())
        self._offer = kept if same and self.shared.writes_masks else None

    @property
    def goes_on(self) -> bool:
        """Whether the next step's inputs are there but for the token, so that transformers need not make them."""
        return self._template is not None

    def next_inputs(self, ids: Tensor) -> dict[str, Any] | None:
        """Inputs of a step, made of those of the step before; None if transformers must make them."""
        template = self._template
        if template is None:
            return None
        if template.full != self._full():
            self._let_go()
            return None
        return {self.shared.names.ids: ids[:, -1:], self.shared.names.cache: self.cache, **template.inputs}

    def caught_up(self, given: dict[str, Any]) -> dict[str, Any]:
        """What transformers would know now, had it counted along while the steps went on by themselves."""
        names, made = self.shared.names, dict(given)
        positions, self._skipped = self._skipped, None
        if positions is not None:
            made[names.positions] = positions
        mask = made.get(names.mask)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] <= self.length:
            missing = mask.new_ones((mask.shape[0], self.length + 1 - mask.shape[1]))
            made[names.mask] = torch.cat((mask, missing), 1)
        return made

    def _let_go(self) -> None:
        """The next step's inputs are not what the last one has left."""
        if self._template is not None and self._template.positions is not None:
            self._skipped = self._template.positions.clone()
        self._template = None

    # -- calls of the model --------------------------------------------------------------------------------------------

    def fill(self, inputs: dict[str, Any], tokens: int, run: Run) -> Any:
        """A call with several tokens, or the first one.

        Args:
            run: calls the model.
        """
        self._looked = False
        made, graphs = self._short(inputs, tokens, run) or _noted(inputs, run)
        if not self.length:
            self.filled_by = graphs
            caches.fill(self.cache)
        if not self._looked and self.shared.recorder is not None and tokens * self.block.key.batch >= BUSY:
            self._look()
        self.length += tokens
        self._let_go()
        return made

    def _short(self, inputs: dict[str, Any], tokens: int, run: Run) -> tuple[Any, tuple[int, ...]] | None:
        """A short prompt, by way of recordings; None if it is none."""
        shared, recorder, name = self.shared, self.shared.recorder, self.shared.names.cache
        rows = self.block.key.batch
        if recorder is None or self.length or tokens * rows > LONGEST or len(caches.parts(self.cache)) > 1:
            return None
        given = {key: value for key, value in inputs.items() if key != name}
        prompt = self.block.prompts.of(given, recorder.place())
        with shared.lock:
            filler = Filler(self.cache, run, recorder, shared.weights, shared.note)
            found = filler.fill(self.block.prompts, prompt, inputs)
        self._looked = prompt.recorded is not None  # else the first step does it, when the device has something to do
        return found

    def decode(self, inputs: dict[str, Any]) -> Any:
        """A call with one token."""
        inputs.pop(self.shared.names.cache)
        plan = self._plan_for(inputs)
        if plan is None:
            made = self.shared.call(**inputs, **{self.shared.names.cache: self.cache})
            self.length += 1
            return made
        plan.fill(inputs)
        full = self._full()
        run = partial(self._run, plan, bool(full) and full[0])
        made = run() if self.shared.recorder is None else self._recorded(plan, full, run, self.shared.recorder)
        self.length += 1
        if self._offer is not None and plan.masks is not None:
            self._template = self._template_of(plan, self._offer, full)
            self._offer = None
        return made

    def _look(self) -> None:
        self.shared.weights.look()
        self._looked = True

    def _template_of(self, plan: Plan, kept: dict[str, Any], full: tuple[bool, ...]) -> Template:
        names = self.shared.names
        written = {name: plan.inputs[name] for name in (names.mask, names.positions) if name in plan.inputs}
        return Template({**kept, **written}, plan.positions, full)

    def _full(self) -> tuple[bool, ...]:
        return tuple(layer.cumulative_length_int >= layer.keys.shape[2] for layer in self._sliding)

    def _plan_for(self, inputs: dict[str, Any]) -> Plan | None:
        plan = self._plan
        if plan is None or not plan.accepts(inputs):
            key = shape_of(inputs)
            plan = self.block.plans.get(key)
            if plan is None:
                plan = self._make_plan(inputs)
                self.block.plans[key] = plan
            self._plan = plan
        return plan

    def _make_plan(self, inputs: dict[str, Any]) -> Plan | None:
        slots = {name: slot_of(value) for name, value in inputs.items()}
        if any(slot is None for slot in slots.values()):
            self.shared.note(
                "the decode step has inputs that are no tensors or numbers: it is compiled, and not recorded"
            )
            return None
        held = {name: slot.buffer for name, slot in slots.items()}
        for name, value in held.items():
            mark(name, value)
        masks = masks_of(held.get(self.shared.names.mask), self.cache) if self.shared.writes_masks else None
        return Plan(slots, held, masks, held.get(self.shared.names.positions) if masks is not None else None)

    def _run(self, plan: Plan, full: bool) -> Any:
        made = self.shared.call(**plan.inputs, **{self.shared.names.cache: self.cache})
        for mask in plan.masks or ():
            mask.advance(self._layers, full)
        if plan.positions is not None:
            plan.positions.add_(1)
        return made

    def _recorded(self, plan: Plan, full: tuple[bool, ...], run: Callable[[], Any], recorder: Recorder) -> Any:
        if not self._looked:
            self._look()
        state = self.shared.weights.state()
        key = full, self.filled_by, recorder.place()
        found = plan.recordings.get(key)
        if found is not None and found.state == state:
            with self.shared.lock:
                return found(self._layers)
        if key in plan.refused:
            return run()
        if plan.tried.get(key) != state:
            made = recorder.warm(run)
            plan.tried[key] = self.shared.weights.state()  # the step itself may have packed planes
            return made
        with self.shared.lock:
            found = self._record(plan, state, run, recorder)
            if isinstance(found, Recording):
                plan.recordings[key] = found
                return found(self._layers)
        plan.refused.add(key)
        self.shared.note(f"the decode step cannot be recorded as a CUDA graph: {found}; it goes on as compiled code")
        return run()

    def _record(self, plan: Plan, state: Any, run: Callable[[], Any], recorder: Recorder) -> Recording | str:
        """A recording, or the reason why there is none."""
        before = python_state(self._layers)
        try:
            replay, made = recorder.record(run)
        except Exception as error:  # whatever a model does that no CUDA graph can hold
            put_back(self._layers, before)
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        counts = counted(self._layers, before)
        put_back(self._layers, before)
        if counts is None:
            return "a step changes Python values of its cache"
        return Recording(replay, copier(made, partial(_kept, self.block, plan, self.cache)), counts, state)


def _noted(inputs: dict[str, Any], run: Run) -> tuple[Any, tuple[int, ...]]:
    """(the model's outputs, the graphs that ran)."""
    noting = Noting()
    return run(inputs, noting), noting.graphs


def _kept(block: Block, plan: Plan, cache: Any, value: Any) -> Callable[[], Any] | None:
    """What a step hands on as it got it: its cache, and inputs."""
    if value is cache:
        return lambda: block.cache
    if isinstance(value, Tensor):
        for slot in _slots(list(plan.slots.values())):
            if slot.buffer.data_ptr() == value.data_ptr() and slot.buffer.shape == value.shape:
                return lambda: slot.buffer.clone() if slot.source is None else slot.source
    return None


def _slots(items: list[Any]) -> list[Slot]:
    found: list[Slot] = []
    for item in items:
        if isinstance(item, Slot):
            found.append(item)
        elif hasattr(item, "items"):
            found += _slots(list(item.items.values()))
    return found
