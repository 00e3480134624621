"""Short prompts, recorded: the device gets one CUDA graph, while the host goes through the model's call to see that it is still right.

The first token of a short prompt is host time: a launch for each of some hundred kernels. A prompt whose shape has come before is
replayed as soon as its tokens are in place; only then are guards, hooks and weights looked at, as in any call, with nothing
launched (``calls.Answering``). Where that finds another model than the recorded one, the cache is emptied and the prompt runs again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quant_compile.generation import caches
from quant_compile.generation.calls import Answering, Called, Noting, Remembering, Strayed, Watcher
from quant_compile.generation.graphs import Recorder, copier, put_back, python_state
from quant_compile.generation.inputs import leaves, shape_of, slot_of
from quant_compile.generation.weights import Weights

LONGEST = 1024  # tokens of all rows together: with more, the device takes longer than the host
MOST = 8  # recordings that one block of cache has
SHAPES = 64  # shapes that are remembered
STRAYS = 2  # recordings in vain, after which a shape is no longer recorded

Run = Callable[[dict[str, Any], Watcher], Any]  # the compiled model


@dataclass(eq=False)
class Recorded:
    """A prompt's CUDA graph.

    Attributes:
        replay: launches it.
        calls: the compiled graphs that the call reached.
        shape: of the call's outputs.
        state: of the weights that it was made with.
    """

    replay: Callable[[], None]
    calls: tuple[Called, ...]
    shape: Any
    state: Any


@dataclass(eq=False)
class Prompt:
    """A prompt's inputs at fixed addresses.

    Attributes:
        slots: by name of the input.
        ran: state of the weights with which it has run as compiled code, so that it may be recorded.
        recorded: the recording.
        strays: how often a recording was of no use.
        used: number of the block's prompt that used the recording last.
    """

    slots: dict[str, Any]
    ran: Any = None
    recorded: Recorded | None = None
    strays: int = 0
    used: int = 0

    def fill(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs, copied to where the recording reads them."""
        for name, value in inputs.items():
            self.slots[name].fill(value)
        return {name: slot.buffer for name, slot in self.slots.items()}


@dataclass(eq=False)
class Prompts:
    """The prompts of one block of cache, by shape; the least recently used first."""

    known: OrderedDict[Any, Prompt | None] = field(default_factory=OrderedDict)
    count: int = 0

    def of(self, inputs: dict[str, Any], place: Any) -> Prompt | None:
        """The prompt with these inputs' shapes; None if they are not all plain data."""
        self.count += 1
        key = shape_of(inputs), place, torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        if key not in self.known:
            slots = {name: slot_of(value) for name, value in inputs.items()}
            self.known[key] = None if any(slot is None for slot in slots.values()) else Prompt(slots)
            if len(self.known) > SHAPES:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        return self.known[key]

    def room(self) -> bool:
        """Whether one more may be recorded; makes room at the cost of one that has not been used for long."""
        held = [prompt for prompt in self.known.values() if prompt is not None and prompt.recorded is not None]
        if len(held) < MOST:
            return True
        oldest = min(held, key=lambda prompt: prompt.used)
        if self.count - oldest.used <= MOST * MOST:
            return False  # so many shapes come by turns that each would take another's place
        oldest.recorded = None
        return True


@dataclass(frozen=True)
class Filler:
    """One call of a model with a prompt.

    Attributes:
        cache: an empty one.
        name: what the model calls it.
        run: the compiled model.
        recorder: of the device.
        weights: of the model.
        note: writes into the report.
    """

    cache: Any
    name: str
    run: Run
    recorder: Recorder
    weights: Weights
    note: Callable[[str], None]

    def fill(self, prompts: Prompts, prompt: Prompt, inputs: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
        """(the call's outputs, the graphs that ran); what a recording will overwrite is copied."""
        held = {**prompt.fill(inputs), self.name: self.cache}
        if prompt.recorded is not None:
            found = self._replayed(prompt, prompt.recorded, held)
            if found is not None:
                prompt.used = prompts.count
                return found
            caches.reset(self.cache)
        self.weights.look()
        if self._may_record(prompts, prompt):
            found = self._record(prompt, held)
            if found is not None:
                prompt.used = prompts.count
                return found
            caches.reset(self.cache)
        noting = Noting()
        made = self.recorder.warm(lambda: self.run(held, noting))
        prompt.ran = self.weights.state()  # the call itself may have packed planes
        return made, noting.graphs

    def _may_record(self, prompts: Prompts, prompt: Prompt) -> bool:
        return prompt.ran == self.weights.state() and prompt.strays < STRAYS and prompts.room()

    def _replayed(self, prompt: Prompt, recorded: Recorded, held: dict[str, Any]) -> tuple[Any, tuple[int, ...]] | None:
        """As ``fill``; None if the recording is of another model than this one has become."""
        if self.weights.gone() or self.weights.state() != recorded.state:
            prompt.recorded = None
            return None
        recorded.replay()
        made = self._answered(recorded, held)
        self.weights.look()
        if made is None or self.weights.state() != recorded.state:
            prompt.recorded, prompt.strays = None, prompt.strays + (made is None)
            return None
        return self._copied(made), tuple(call.graph for call in recorded.calls)

    def _answered(self, recorded: Recorded, held: dict[str, Any]) -> Any:
        """The outputs of a call that launches nothing but what stands around compiled graphs; None if it strays."""
        answering = Answering(recorded.calls)
        try:
            made = self.run(held, answering)
        except Strayed:
            return None
        return made if answering.done and shape_of(made) == recorded.shape else None

    def _record(self, prompt: Prompt, held: dict[str, Any]) -> tuple[Any, tuple[int, ...]] | None:
        """As ``fill``; None, and a cache with anything in it, if the call cannot be recorded."""
        layers = [layer for part in caches.parts(self.cache) for layer in part.layers]
        before, remembering = python_state(layers), Remembering()
        try:
            replay, made = self.recorder.record(lambda: self.run(held, remembering))
        except Exception as error:  # whatever a model does that no CUDA graph can hold
            put_back(layers, before)
            return self._refuse(prompt, f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}")
        put_back(layers, before)
        recorded = Recorded(replay, remembering.calls(), shape_of(made), self.weights.state())
        replay()
        truth = self._copied(made)
        versions = _versions(self.cache)
        answered = self._answered(recorded, held)
        if answered is None or versions != _versions(self.cache) or not _equal(truth, self._copied(answered)):
            return self._refuse(
                prompt, "what stands around compiled blocks reads or writes what they hand to each other"
            )
        prompt.recorded = recorded
        return truth, tuple(call.graph for call in recorded.calls)

    def _copied(self, made: Any) -> Any:
        return copier(made, lambda value: (lambda: value) if value is self.cache else None)()

    def _refuse(self, prompt: Prompt, why: str) -> None:
        prompt.strays = STRAYS
        self.note(f"short prompts are not recorded as CUDA graphs: {why}; they go on as compiled code")


def _versions(cache: Any) -> list[int]:
    return [tensor._version for tensor in caches.tensors(cache)]


def _equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))
