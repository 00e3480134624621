"""A compiled function may call several models: each of them has its names, its rules and its lines in the ledger."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile.ir.errors import PolicyError
from quant_compile.model.names import Owners
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]

RULES = [{"match": "fc", "scheme": "keep", "reason": "mine"}, {"match": "*.up", "scheme": "W8A16"}]
POLICY = {"default": "W8A8", "strict": True, "rules": RULES}
KEPT, HEAD = 'rule 1 (match "fc"): mine', "kept by convention: output head"


class Enc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.block = nn.ModuleDict({"up": nn.Linear(32, 32)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["up"](torch.relu(self.fc(x)))


class Dec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.relu(self.fc(x)))


Pair = tuple[Enc, Dec]
Run = Callable[[Tensor], Tensor]


def pair() -> Pair:
    torch.manual_seed(0)
    return Enc().eval().requires_grad_(False), Dec().eval().requires_grad_(False)


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="sglquant", options={"policy": POLICY})


def by_closure() -> tuple[Run, Pair]:
    enc, dec = pair()
    return compiled(lambda x: dec(enc(x))), (enc, dec)


def by_list() -> tuple[Run, Pair]:
    models = list(pair())

    def run(x: Tensor) -> Tensor:
        for model in models:
            x = model(x)
        return x

    return compiled(run), tuple(models)  # type: ignore[return-value]


def by_dict() -> tuple[Run, Pair]:
    models = dict(zip("ab", pair(), strict=True))
    return compiled(lambda x: models["b"](models["a"](x))), tuple(models.values())  # type: ignore[return-value]


class Pipeline:
    """An object that is no module."""

    def __init__(self) -> None:
        self.parts = {"models": pair()}

    def run(self, x: Tensor) -> Tensor:
        enc, dec = self.parts["models"]
        return dec(enc(x))


class Slotted:
    """One that keeps another, without a ``__dict__``."""

    __slots__ = ("inner",)

    def __init__(self) -> None:
        self.inner = Pipeline()

    def run(self, x: Tensor) -> Tensor:
        return self.inner.run(x)


def by_object() -> tuple[Run, Pair]:
    pipeline = Pipeline()
    return compiled(pipeline.run), pipeline.parts["models"]


def by_slots() -> tuple[Run, Pair]:
    slotted = Slotted()
    return compiled(slotted.run), slotted.inner.parts["models"]


GLOBAL: list[Pair] = []


def helper(x: Tensor) -> Tensor:
    enc, dec = [model for model in GLOBAL[0]]
    return dec(enc(x))


def by_globals() -> tuple[Run, Pair]:
    GLOBAL[:] = [pair()]
    return compiled(lambda x: helper(x)), GLOBAL[0]


def by_partial() -> tuple[Run, Pair]:
    enc, dec = pair()
    return compiled(functools.partial(lambda enc, dec, x: dec(enc(x)), enc, dec)), (enc, dec)


def by_arguments() -> tuple[Run, Pair]:
    models = pair()
    function = compiled(lambda models, x: models[1](models[0](x)))
    return functools.partial(function, models), models


WAYS = [by_closure, by_list, by_dict, by_object, by_slots, by_globals, by_partial, by_arguments]


def reasons(model: nn.Module) -> dict[str, str]:
    """Weight -> its scheme, or why it has none."""
    lines = [line for line in quant_compile.report(model).lines if line.names[0].endswith("weight")]
    return {line.names[0].removesuffix(".weight"): line.scheme or line.reason for line in lines}


@pytest.mark.parametrize("way", WAYS)
def test_each_model_has_its_own_names_rules_and_lines(
    way: Callable[[], tuple[Run, Pair]], plain_inductor: CompileCounter
) -> None:
    run, (enc, dec) = way()
    with torch.inference_mode():
        run(torch.randn(3, 32))
    assert len(plain_inductor) == 1
    assert reasons(enc) == {"fc": KEPT, "block.up": "W8A16"}
    assert reasons(dec) == {"fc": KEPT, "lm_head": HEAD}
    assert quant_compile.report(enc).policy == quant_compile.report(dec).policy == "policy"


def test_other_models_at_a_later_call_are_decided_by_their_own_names(plain_inductor: CompileCounter) -> None:
    run = compiled(lambda models, x: models[1](models[0](x)))
    first, second = pair(), pair()
    with torch.inference_mode():
        run(first, torch.randn(3, 32))
        run(second, torch.randn(3, 32))
    assert reasons(second[0]) == {"fc": KEPT, "block.up": "W8A16"} and reasons(second[1])["lm_head"] == HEAD


def test_a_rule_without_effect_in_any_model_is_an_error(plain_inductor: CompileCounter) -> None:
    """Of one that has an effect in another model, also behind a graph break, nothing is said."""
    enc, dec = pair()

    def run(x: Tensor) -> Tensor:
        y = enc(x)
        torch._dynamo.graph_break()
        return dec(y)

    rules = [{"match": "lm_head", "scheme": "W8A16"}, {"match": "block.up", "scheme": "keep"}]
    options = {"policy": {"default": "W8A8", "strict": True, "rules": rules}}
    with torch.inference_mode():
        torch.compile(run, backend="sglquant", options=options)(torch.randn(3, 32))
    assert reasons(enc) == {"fc": "W8A8", "block.up": 'rule 2 (match "block.up")'}
    assert reasons(dec) == {"fc": "W8A8", "lm_head": "W8A16"}
    options = {"policy": {"default": "W8A8", "strict": True, "rules": [{"match": "nothing", "scheme": "keep"}]}}
    with torch.inference_mode(), pytest.raises(Exception, match='match "nothing", matches no weight') as error:
        torch.compile(lambda x: dec(enc(x)), backend="sglquant", options=options)(torch.randn(3, 32))
    assert isinstance(error.value, PolicyError) or "PolicyError" in str(error.value)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Enc()
        self.lm_head = nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(x))


def test_parts_in_a_list_have_the_names_of_the_model_around_them(plain_inductor: CompileCounter) -> None:
    model = Whole().eval().requires_grad_(False)
    parts = [model.body, model.lm_head]

    def run(x: Tensor) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    with torch.inference_mode():
        compiled(run)(torch.randn(3, 32))
    assert reasons(model) == {"body.fc": KEPT, "body.block.up": "W8A16", "lm_head": HEAD}


def test_two_registered_models_in_one_graph(plain_inductor: CompileCounter) -> None:
    """Both given to ``compile``, and called by a compiled function as well."""
    enc, dec = pair()
    quant_compile.compile(enc, POLICY)
    quant_compile.compile(dec, {"default": "W8A8", "rules": RULES[:1], "strict": True})
    with torch.inference_mode():
        dec(enc(torch.randn(3, 32)))
    assert reasons(enc) == {"fc": KEPT, "block.up": "W8A16"} and reasons(dec) == {"fc": KEPT, "lm_head": HEAD}
    with torch.inference_mode():
        torch.compile(lambda x: dec(enc(x)), backend="sglquant", options={"policy": POLICY})(torch.randn(3, 32))
    assert reasons(dec)["lm_head"] == HEAD


def test_a_parameter_without_a_model_has_no_names() -> None:
    model = Enc()
    alone = nn.Parameter(torch.zeros(2, 2))
    owners = Owners.of([alone, model.fc.weight])
    assert owners.names(alone) is None and owners.models == (model,)
    known = owners.names(model.fc.weight)
    assert known is not None and known.rules == ("fc",)
