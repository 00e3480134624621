"""Code that Dynamo gave up on runs as it is, but frames within it are offered to Dynamo again: ours among them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quant_compile.generation import caches
from quant_compile.generation.inputs import mark, marked
from tests.generation.support import llama

MASK = torch.ones(2, 40)


def given_up(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function within a frame that Dynamo cannot trace or split."""

    def frame() -> Any:
        with contextlib.suppress(ValueError):
            torch._dynamo.graph_break()
        return function(*args)

    torch._dynamo.reset()
    return torch.compile(frame, backend="eager")()


@pytest.mark.parametrize("value", [MASK, {"full_attention": MASK}])
def test_an_input_is_marked(value: Any) -> None:
    found = given_up(marked, "attention_mask", value)
    made = found["full_attention"] if isinstance(found, dict) else found
    assert getattr(made, "_dynamo_weak_dynamic_indices", set()) == {1}


def test_a_fixed_input_is_marked() -> None:
    held = torch.ones(2, 7)
    given_up(mark, "attention_mask", held)
    assert getattr(held, "_dynamo_weak_dynamic_indices", set()) == {1}


def test_a_cache_is_made() -> None:
    model = llama()
    shape = [(2, 16, 2, 16)] * model.config.num_hidden_layers
    made = given_up(caches.make, model.config, shape, 1, 16, torch.float32, torch.device("cpu"))
    assert made.layers[0].keys.shape == (1, 2, 16, 16)
