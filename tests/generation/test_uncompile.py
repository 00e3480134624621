"""``uncompile`` gives the untouched model back, and copies of a compiled model are untouched too."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import quant_compile
from quant_compile.ir.errors import StaleWeightError
from tests.generation.support import (
    POLICY,
    REFERENCE,
    TapeRecorder,
    compiled,
    llama,
    loop_of,
    prompt,
    recorder,
    reference,
    tokens,
)
from tests.runtime_support import CompileCounter, Stack, plain_inductor, store_bytes

__all__ = ["plain_inductor", "recorder"]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def everything(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """All attributes of all modules, shallow copies."""
    return [(name, dict(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("times", [1, 2])
def test_nothing_is_left(times: int, recorder: TapeRecorder) -> None:
    model = llama()
    plain = tokens(model, prompt())
    attributes, config = everything(model), model.generation_config.to_dict()
    kinds = [type(p) for p in model.parameters()]
    for _ in range(times):
        compiled(model)
        tokens(model, prompt())
    assert store_bytes(model) > 0 and vars(model) != attributes[0][1]
    assert quant_compile.uncompile(model) is model
    assert everything(model) == attributes and model.generation_config.to_dict() == config
    assert [type(p) for p in model.parameters()] == kinds
    assert store_bytes(model) == 0
    assert torch.equal(tokens(model, prompt()), plain)


def test_what_the_user_had_set_comes_back(plain_inductor: CompileCounter) -> None:
    model = llama()
    own = lambda *args, **kwargs: "mine"  # noqa: E731
    model.generate = own
    model.generation_config.disable_compile = False
    model.compile(backend="eager")
    before = dict(vars(model))
    compiled(model)
    assert model.generate is not own and model.generate() == "mine"
    quant_compile.uncompile(model)
    assert vars(model) == before and model.generation_config.disable_compile is False


def test_a_released_model_must_be_restored_first(plain_inductor: CompileCounter) -> None:
    model = llama()
    values = copy.deepcopy(model.state_dict())
    kinds = [type(p) for p in model.parameters()]
    plain = tokens(model, prompt())
    quant_compile.compile(model, POLICY, release_weights=True, **REFERENCE)
    quantized = tokens(model, prompt())
    with pytest.raises(StaleWeightError, match="restore"):
        quant_compile.uncompile(model)
    assert torch.equal(tokens(model, prompt()), quantized), "nothing has been changed"
    quant_compile.restore(model, values)
    quant_compile.uncompile(model)
    assert [type(p) for p in model.parameters()] == kinds
    assert torch.equal(tokens(model, prompt()), plain)


def test_a_model_that_does_not_generate(plain_inductor: CompileCounter) -> None:
    for model in (Stack(1), nn.Sequential(nn.Linear(32, 32))):
        x = torch.randn(2, 32)
        plain, before = model(x), dict(vars(model))
        quant_compile.compile(model, "w8a8", **REFERENCE)
        assert not torch.equal(model(x), plain)
        quant_compile.uncompile(model)
        assert vars(model) == before and torch.equal(model(x), plain)


def test_a_model_that_was_never_compiled_stays_as_it_is() -> None:
    model = llama()
    before = everything(model)
    quant_compile.uncompile(model)
    assert everything(model) == before


def test_copies_are_plain_models(plain_inductor: CompileCounter) -> None:
    """By deepcopy and by pickle, which ``torch.save(model)`` uses."""
    model = llama()
    plain = tokens(model, prompt())
    compiled(model)
    graphs = len(plain_inductor)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tokens(made, prompt()), plain)
        assert made.generate.__self__ is made
    assert len(plain_inductor) == graphs
    wanted = tokens(reference(llama()), prompt())
    assert torch.equal(tokens(model, prompt()), wanted)


def test_a_deleted_model_frees_its_caches(recorder: TapeRecorder) -> None:
    model = llama()
    compiled(model)
    tokens(model, prompt())
    pool = loop_of(model).pool
    cache = weakref.ref(pool._idle[0].cache)
    gone = weakref.ref(model)
    del model, pool
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None and cache() is None


def test_uncompile_frees_the_caches(recorder: TapeRecorder) -> None:
    model = llama()
    compiled(model)
    tokens(model, prompt())
    pool = loop_of(model).pool
    assert len(pool) == 1
    quant_compile.uncompile(model)
    assert len(pool) == 0


def test_signatures_are_kept(plain_inductor: CompileCounter) -> None:
    """Libraries look at what ``generate`` accepts."""
    import inspect

    model = llama()
    before = inspect.signature(model.generate)
    compiled(model)
    assert inspect.signature(model.generate) == before


@pytest.mark.parametrize(
    "register, generates",
    [
        ("register_full_backward_hook", True),
        ("register_full_backward_pre_hook", True),
        ("register_full_backward_hook", False),
    ],
)
def test_backward_hooks_end_no_graph_and_stay(register: str, generates: bool, plain_inductor: CompileCounter) -> None:
    # transformers 5.17 registers them on the norms of divided attention
    model: Any = llama() if generates else Stack(2)
    part = model.model.layers[0].self_attn.q_proj if generates else model.layers[1]
    seen = list[Any]()
    handle = getattr(part, register)(lambda *args: seen.append(args))
    quant_compile.compile(model, "w8a8", **REFERENCE)
    model(**prompt(), use_cache=False) if generates else model(torch.randn(2, 32))
    assert len(plain_inductor) == 1
    held = "_backward_pre_hooks" if "pre" in register else "_backward_hooks"
    copied = quant_compile.uncompile(copy.deepcopy(model))
    assert [len(getattr(module, held)) for module in copied.modules()].count(1) == 1, "a copy keeps them"
    later = getattr(part, register)(lambda *args: None)
    quant_compile.uncompile(model)
    assert len(getattr(part, held)) == 2
    with torch.enable_grad():
        part(torch.randn(2, part.in_features if generates else 32, requires_grad=True)).sum().backward()
    assert seen
    later.remove()
    handle.remove()
    assert not getattr(part, held)
