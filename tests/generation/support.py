"""Shared by the tests of ``generate``: tiny models, prompts, eager quantized references, and a recorder that needs no GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode_temporarily,
)
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import quant_compile
from quant_compile.generation import attach, prompts
from quant_compile.generation.loop import Loop
from tests.runtime_support import UNMERGED, CompileCounter, ReferenceLinear, reference_of

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,  # sharp enough that tokens vary
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Weights alone: caches of other lengths add in another order, and a last bit of attention must flip no code of an input.
SPEC = "W8A16"
POLICY = {"default": SPEC, **UNMERGED}
REFERENCE = {"kernels": "reference"}
NEW = 8


def seeded(make: Callable[[], Any], seed: int = 3) -> Any:
    """A model with seeded weights."""
    torch.manual_seed(seed)
    return make().eval()


def llama(seed: int = 3, **changes: Any) -> Any:
    """A tiny Llama."""
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})), seed)


def reference(model: nn.Module, spec: str = SPEC) -> Any:
    """The eager quantized reference; output heads keep their precision."""
    made = reference_of(model, lambda name: None if name.endswith("lm_head") or name == "proj_out" else spec)
    for module in made.modules():
        if isinstance(module, ReferenceLinear):
            module.weight = torch.zeros(1)  # T5 looks at a weight's dtype
    return made


def prompt(rows: int = 2, length: int = 7, seed: int = 5, padded: bool = False) -> dict[str, Tensor]:
    """Token ids; with ``padded`` every row but the last begins with a few pad tokens."""
    ids = torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows - 1):
            mask[row, : 1 + row % (length - 1)] = 0
        ids = ids.where(mask.bool(), torch.zeros_like(ids))
    return {"input_ids": ids, "attention_mask": mask}


def tokens(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Greedy tokens."""
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **more})


def compiled(model: Any, **more: Any) -> Any:
    """The model, compiled with kernels that are the reference."""
    return quant_compile.compile(model, POLICY, **{**REFERENCE, **more})


def loop_of(model: nn.Module) -> Loop:
    """What a compiled model's ``generate`` works with."""
    call = vars(model)["_compiled_call_impl"]
    assert isinstance(call, attach.Call) and call.installed is not None and call.installed.loop is not None
    return call.installed.loop


class Tape(TorchDispatchMode):
    """What a function does to tensors, kept to be done again at the same addresses, as a CUDA graph does.

    Recording leaves every tensor as it was, and asking for a value is an error: so it is while a stream is captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self._before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        made = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, made))
        return made

    def put_back(self) -> None:
        """Undo all writes."""
        for tensor, values in self._before.values():
            tensor.copy_(values)
        self._before.clear()

    def replay(self) -> None:
        """Do it all again."""
        for func, args, kwargs, made in self.steps:
            aliases = [result.alias_info for result in func._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view, whose memory is written elsewhere
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


class TapeRecorder:
    """A ``Recorder`` for any device, which counts; each thread has its own tape."""

    def __init__(self) -> None:
        self.warmed = self.recorded = self.replayed = 0
        self.failure: Exception | None = None
        self.stream = 0
        self._own = threading.local()

    @property
    def tape(self) -> Tape | None:
        """What is recorded on now."""
        return getattr(self._own, "tape", None)

    @tape.setter
    def tape(self, tape: Tape | None) -> None:
        self._own.tape = tape

    def place(self) -> int:
        return self.stream

    def warm(self, run: Callable[[], Any]) -> Any:
        self.warmed += 1
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape = self.tape = Tape()
        try:
            with tape:
                made = run()
                if self.failure is not None:
                    raise self.failure
        finally:
            self.tape = None
            tape.put_back()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, made


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, plain_inductor: CompileCounter) -> TapeRecorder:
    """Models compiled in the test record their decode steps with this recorder, CPU or not.

    Dynamo runs nothing compiled under a dispatch mode, so the tape stops at the door of compiled code and goes on inside of it.
    Prompts are not recorded, so that the counts are those of steps; ``recorder_of_prompts`` does that as well.
    """
    gc.collect()  # the end of an earlier test's model would count as a change of weights
    made = TapeRecorder()

    def taped(gm: torch.fx.GraphModule, inputs: Any, config_patches: Any = None) -> Callable[..., Any]:
        forward = plain_inductor(gm, inputs, config_patches)

        def call(*args: Any) -> Any:
            runs = any(mode is made.tape for mode in _get_current_dispatch_mode_stack())
            with nullcontext() if made.tape is None or runs else made.tape:
                return forward(*args)

        return call

    def compiled_outside_of_the_tape(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        run = original(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if made.tape is None else _pop_mode_temporarily():
                return run(*args, **kwargs)

        return call

    original = attach._compiled_function
    monkeypatch.setattr(attach, "_compiled_function", compiled_outside_of_the_tape)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", taped)
    monkeypatch.setattr("quant_compile.generation.loop.recorder_for", lambda device: made)
    monkeypatch.setattr("quant_compile.generation.lease.LONGEST", 0)
    return made


@pytest.fixture
def recorder_of_prompts(recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """The same, for short prompts too."""
    monkeypatch.setattr("quant_compile.generation.lease.LONGEST", prompts.LONGEST)
    return recorder
