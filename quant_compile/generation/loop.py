"""``generate`` of one model: gives it a block of cache, prepares the inputs of its steps, and takes the block back.

The sampling loop itself is transformers'. Four of its methods are wrapped on the instance: ``generate``, what makes the cache, what
prepares a step's inputs, and what counts them up for the next step.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.generation import caches, facts
from quant_compile.generation.blocks import around_blocks
from quant_compile.generation.caches import PLAIN, Kept
from quant_compile.generation.graphs import CudaRecorder, Recorder
from quant_compile.generation.inputs import tokens_in
from quant_compile.generation.lease import Lease, Shared
from quant_compile.generation.pool import AHEAD, Block, Key, Pool, rounded
from quant_compile.generation.step import Step
from quant_compile.generation.weights import Weights

KEPT = "KV cache of generate: "  # how a note begins that says how K and V are kept
HOOKS = (
    "generate",
    "_prepare_cache_for_generation",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
)


def recorder_for(device: torch.device) -> Recorder | None:
    """What records decode steps on a device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


@dataclass(eq=False)
class Call:
    """One call of ``generate``.

    Attributes:
        plain: it goes transformers' own way.
        lease: its cache.
        returns_more: the user gets more than tokens.
    """

    plain: bool
    lease: Lease | None = None
    returns_more: bool = False


class _Stack(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []


class Hook:
    """A method on an instance; a copy of the model gets its class's own back."""

    def __init__(self, model: nn.Module, name: str, body: Callable[..., Any]) -> None:
        self._model, self._name, self._body = weakref.ref(model), name, body
        update_wrapper(self, getattr(model, name), updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._body(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return own_method(memo.get(id(self._model()), self._model()), self._name)

    def __reduce__(self) -> Any:
        return own_method, (self._model(), self._name)


def own_method(model: Any, name: str) -> Any:
    """A method of a model's class, bound to it."""
    return MethodType(getattr(type(model), name), model)


class Loop:
    """What one model's ``generate`` needs between its calls."""

    def __init__(self, model: Any, step: Step, note: Callable[[str], None], records: bool, kept: Kept = PLAIN) -> None:
        self.pool = Pool()
        self.kept = kept
        self.step = step
        self._model = weakref.ref(model)
        self._note = note
        self._records = records
        self._stack = _Stack()
        self._originals = {name: getattr(model, name) for name in HOOKS}
        self._prepares = inspect.signature(self._originals["_prepare_cache_for_generation"])
        kind = facts.mixin(model)
        self._quick = all(getattr(type(model), name, None) is getattr(kind, name, None) for name in HOOKS[2:])
        self._shared: Shared | None = None
        self._never: str | None = None
        self._asked = False
        self._shape: list[facts.LayerShape] | None = None
        self._shape_sought = False

    def hook(self, name: str) -> Hook:
        """What takes the place of a method."""
        bodies = {
            "generate": self.generate,
            "_prepare_cache_for_generation": self.prepare_cache,
            "prepare_inputs_for_generation": self.prepare_inputs,
            "_update_model_kwargs_for_generation": self.count_up,
        }
        return Hook(self._of(), name, bodies[name])

    def _of(self) -> Any:
        model = self._model()
        assert model is not None
        return model

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``."""
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        call = Call(facts.asked_for_plain(config, kwargs, self.step.names.cache))
        self._stack.calls.append(call)
        try:
            with self.step:
                made = self._originals["generate"](*args, **kwargs)
            return self._for_user(call, made)
        finally:
            self._stack.calls.pop()
            self._give_back(call)

    def prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """transformers' ``_prepare_cache_for_generation``."""
        original = self._originals["_prepare_cache_for_generation"]
        call = self._stack.calls[-1] if self._stack.calls else None
        if call is not None:
            self._give_back(call)
            given = self._prepares.bind(generation_config, model_kwargs, *args, **kwargs).arguments
            call.lease = self._lease(call, given)
        if call is None or call.lease is None:
            return original(generation_config, model_kwargs, *args, **kwargs)
        generation_config.disable_compile = True  # of this call; the model's own config may have been exchanged
        call.returns_more = bool(generation_config.return_dict_in_generate)
        model_kwargs[self.step.names.cache] = call.lease.cache
        return None

    def prepare_inputs(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``prepare_inputs_for_generation``."""
        original = self._originals["prepare_inputs_for_generation"]
        lease = self.step.leases.get(id(kwargs.get(self.step.names.cache)))
        if lease is None:
            return original(input_ids, *args, **kwargs)
        count = kwargs.get("next_sequence_length")
        one = count == 1 and lease.length > 0
        if one:
            lease.reserve(1)
            made = lease.next_inputs(input_ids)
            if made is not None:
                return made
            kwargs = lease.caught_up(kwargs)
        else:
            lease.reserve(count or tokens_in({"input_ids": input_ids, "inputs_embeds": kwargs.get("inputs_embeds")}))
        made = original(input_ids, *args, **kwargs)
        if one:
            lease.offer(made, kwargs)
        return made

    def count_up(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """transformers' ``_update_model_kwargs_for_generation``."""
        lease = self.step.leases.get(id(model_kwargs.get(self.step.names.cache)))
        if lease is not None and lease.goes_on:
            return model_kwargs
        return self._originals["_update_model_kwargs_for_generation"](outputs, model_kwargs, *args, **kwargs)

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _lease(self, call: Call, given: dict[str, Any]) -> Lease | None:
        """A cache for a call; None if transformers shall make it."""
        config, inputs = given["generation_config"], given["model_kwargs"]
        if call.plain or facts.chosen_by_config(config) or inputs.get(self.step.names.cache) is not None:
            return None
        if {"generation_mode", "batch_size", "max_cache_length"} - set(given):
            return self._plain("this version of transformers prepares caches in another way")
        why = self._why_never() or facts.why_plain(self._of(), config, given["generation_mode"])
        if why is not None:
            return self._plain(why)
        rows = given["batch_size"] * max(config.num_beams or 1, config.num_return_sequences or 1)
        most = given["max_cache_length"] + 2  # a mask is written one token ahead
        needed = facts.prompt_length(inputs) + AHEAD
        larger = self._blocks(rows, most, inputs)
        block = larger(min(most, needed))
        if block is None:
            return self._plain("its cache cannot be made before the first call")
        lease = Lease(self._share(), block, larger, self.pool.give)
        self.step.leases[id(lease.cache)] = lease
        return lease

    def _plain(self, why: str) -> None:
        lost = "; its KV cache is kept in 16 bits, against the policy" if self.kept.schemes else ""
        self._note(f"generate goes transformers' own way: {why}{lost}")

    def _why_never(self) -> str | None:
        if not self._asked:
            self._never, self._asked = facts.why_never(self._of()), True
        return self._never

    def _cache_shape(self, model: Any) -> list[facts.LayerShape] | None:
        if not self._shape_sought:  # once, also where the answer is that nobody knows: a look makes a small model
            self._shape, self._shape_sought = facts.cache_shape(model), True
        return self._shape

    def _share(self) -> Shared:
        if self._shared is None:
            model = self._of()
            recorder = recorder_for(model.device) if self._records else None
            chunked = getattr(model.config.get_text_config(decoder=True), "attention_chunk_size", None)
            writes = self._quick and chunked is None
            inside, names = self.step.inside, self.step.names
            lock, weights = threading.RLock(), Weights(model, around_blocks(model))
            if self.kept.schemes:
                self._note(f"{KEPT}{self.kept.text}")
            self._shared = Shared(inside, names, recorder, weights, lock, self._note, writes)
        return self._shared

    def _blocks(self, rows: int, most: int, inputs: dict[str, Any]) -> Callable[[int], Block | None]:
        """What takes a block for so many tokens from the pool, at most ``most``."""
        model = self._of()
        encoded = inputs.get("encoder_outputs")
        source = int(encoded[0].shape[1]) if encoded is not None and model.config.is_encoder_decoder else 0
        config, dtype, device = model.config.get_text_config(decoder=True), model.dtype, model.device
        shape = self._cache_shape(model)

        def take(tokens: int) -> Block | None:
            key = Key(rows, rounded(min(most, tokens)), source, dtype, device)

            def make() -> Any:
                if shape is None:
                    return None
                made = caches.make(config, shape, rows, key.length, dtype, device, self.kept)
                if made is None or not source:
                    return made
                cross = caches.make(config, shape, rows, source, dtype, device)
                return None if cross is None else caches.types().pair(made, cross)

            return self.pool.take(key, make)

        return take

    def _give_back(self, call: Call) -> None:
        lease, call.lease = call.lease, None
        if lease is None:
            return
        self.step.leases.pop(id(lease.cache), None)
        lease.rest()
        if not call.returns_more or lease.block.key.device.type != "cpu":
            self.pool.give(lease.block)

    def _for_user(self, call: Call, made: Any) -> Any:
        """The result, with a cache of its own in the place of the lent one."""
        name, lease = self.step.names.cache, call.lease
        if lease is not None and isinstance(made, dict) and made.get(name) is lease.cache:
            config = self._of().config.get_text_config(decoder=True)
            made[name] = caches.for_user(lease.cache, config, lease.length)
            call.returns_more = False
        return made
