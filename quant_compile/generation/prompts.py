"""Short prompts, recorded: CUDA graphs launch what their compiled graphs would, while the host goes the call's whole way to see that it is
still the same.

The first token of a short prompt is host time: a launch for each of some hundred kernels. A prompt whose shape has come before is
replayed (``calls.Answering``), with guards, hooks, and what stands around compiled graphs as in any call. Where that finds another model
than the recorded one, the cache is emptied and the prompt runs again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quant_compile.generation import caches
from quant_compile.generation.calls import Answer, Answering, Noting, Remembering, Watcher
from quant_compile.generation.graphs import Recorder, copier
from quant_compile.generation.inputs import leaves, shape_of
from quant_compile.generation.segments import Segments, Unsuited
from quant_compile.generation.weights import Weights

LONGEST = 1024  # tokens of all rows together: with more, the device takes longer than the host
MOST = 8  # recordings that one block of cache has
SHAPES = 64  # shapes that are remembered
STRAYS = 3  # recordings in vain, after which a shape is no longer recorded
NOISE = 4  # times the difference of two calls with the same prompt: some kernels add in the order in which they finish

Run = Callable[[dict[str, Any], Watcher], Any]  # the compiled model
Result = tuple[Any, tuple[int, ...]]  # the outputs of a call, the graphs that ran


@dataclass(frozen=True, eq=False)
class Recorded:
    """A prompt's CUDA graphs.

    Attributes:
        answers, addresses: for ``Answering``.
        shape: of the call's outputs.
        state: of the weights that it was made with.
    """

    answers: tuple[Answer, ...]
    addresses: list[int]
    shape: Any
    state: Any


@dataclass(eq=False)
class Prompt:
    """A shape of prompts.

    Attributes:
        came: whether one has run as compiled code, so that the next may be recorded.
        recorded: the recording.
        strays: how often a recording was of no use.
        used: number of the block's prompt that used the recording last.
    """

    came: bool = False
    recorded: Recorded | None = None
    strays: int = 0
    used: int = 0


@dataclass(eq=False)
class Prompts:
    """The prompts of one block of cache, by shape; the least recently used first."""

    known: OrderedDict[Any, Prompt] = field(default_factory=OrderedDict)
    count: int = 0

    def of(self, inputs: dict[str, Any], place: Any) -> Prompt:
        """The prompt with these inputs' shapes."""
        self.count += 1
        key = shape_of(inputs), place, torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        found = self.known.setdefault(key, Prompt())
        self.known.move_to_end(key)
        if len(self.known) > SHAPES:
            self.known.popitem(last=False)
        return found

    def room(self) -> bool:
        """Whether one more may be recorded; makes room at the cost of one that has not been used for long."""
        held = [prompt for prompt in self.known.values() if prompt.recorded is not None]
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
        run: the compiled model.
        recorder: of the device.
        weights: of the model.
        note: writes into the report.
    """

    cache: Any
    run: Run
    recorder: Recorder
    weights: Weights
    note: Callable[[str], None]

    def fill(self, prompts: Prompts, prompt: Prompt, inputs: dict[str, Any]) -> Result:
        """The call's result; what a later replay overwrites is copied."""
        if prompt.recorded is not None:
            found = self._replayed(prompt, prompt.recorded, inputs)
            if found is not None:
                prompt.used = prompts.count
                return found
            caches.reset(self.cache)
        if prompt.came and prompt.strays < STRAYS and prompts.room():
            prompt.used = prompts.count
            return self._record(prompt, inputs)
        prompt.came = True
        noting = Noting()
        return self.run(inputs, noting), noting.graphs

    def _replayed(self, prompt: Prompt, recorded: Recorded, inputs: dict[str, Any]) -> Result | None:
        """As ``fill``; None if the recording is of another model than this one has become."""
        if self.weights.gone() or self.weights.state() != recorded.state:
            prompt.recorded = None
            return None
        made = self._answered(recorded, inputs)
        self.weights.look()
        if made is None or self.weights.state() != recorded.state:
            prompt.recorded, prompt.strays = None, prompt.strays + (made is None)
            return None
        return self._copied(made), tuple(answer.graph for answer in recorded.answers)

    def _answered(self, recorded: Recorded, inputs: dict[str, Any]) -> Any:
        """The outputs of a call that replays; None if it strays."""
        answering = Answering(recorded.answers, recorded.addresses)
        try:
            made = self.run(inputs, answering)
        except (
            Exception
        ):  # Strayed, or what a model made of it; an error of the model's own comes again when the prompt runs
            return None
        return made if answering.done and shape_of(made) == recorded.shape else None

    def _record(self, prompt: Prompt, inputs: dict[str, Any]) -> Result:
        """As ``fill``; the prompt is recorded, if it can be."""
        remembering, before = Remembering(caches.tensors(self.cache)), self.weights.versions()
        made = self.run(inputs, remembering)
        truth, graphs = self._copied(made), tuple(id(call.graph) for call in remembering.calls)
        self.weights.look()
        why = self.weights.foreign()
        if len(remembering.calls) != max(1, remembering.entered):
            why = why or "code of the model's stands between its graphs"
        if before != self.weights.versions():
            why = why or "a call writes to a Parameter or a buffer"
        if why is not None:
            return self._refuse(prompt, why, truth, graphs)
        try:
            segments = Segments(remembering)
            segments.record(self._recorded)
            recorded = Recorded(*segments.answers(), shape_of(made), self.weights.state())
        except Unsuited as error:
            return self._refuse(prompt, str(error), truth, graphs)
        except Exception as error:  # whatever a graph does that no CUDA graph can hold
            why = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            return self._refuse(prompt, why, truth, graphs)
        del remembering, segments, made
        caches.reset(self.cache)
        again = self._answered(recorded, inputs)
        far = float("nan") if again is None else _distance(truth, again)
        if far == 0:
            prompt.recorded = recorded
            return self._copied(again), graphs
        caches.reset(self.cache)
        noting = Noting()
        made = self.run(inputs, noting)
        if far <= NOISE * _distance(truth, made):
            prompt.recorded = recorded
            return made, noting.graphs
        return self._refuse(prompt, "what stands around compiled graphs uses results between them", made, noting.graphs)

    def _recorded(self, run: Callable[[], None]) -> Callable[[], None]:
        return self.recorder.record(run)[0]

    def _copied(self, made: Any) -> Any:
        return copier(made, lambda value: (lambda: value) if value is self.cache else None)()

    def _refuse(self, prompt: Prompt, why: str, made: Any, graphs: tuple[int, ...]) -> Result:
        prompt.strays = STRAYS
        self.note(f"some short prompts are not recorded as CUDA graphs: {why}; they go on as compiled code")
        return made, graphs


def _distance(one: Any, other: Any) -> float:
    """Between the tensors of two results; NaN if one of them has any."""
    return sum(float((a.float() - b.float()).norm()) for a, b in zip(leaves(one), leaves(other), strict=True))
