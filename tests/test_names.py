"""Names of weights are those of a checkpoint, whatever wraps the model or its parts; and what a Parameter is, in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import quant_compile
from quant_compile.model.names import names_in
from quant_compile.model.places import modules_of, places, unwrap
from quant_compile.model.plan import Plan
from quant_compile.model.weights import describe, linear_weights, possible_weights
from quant_compile.policy import Policy
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]


class Block(nn.Module):
    """A linear, a router by its name, and an attribute that is called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(32, 32)
        self.gate = nn.Linear(32, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x) * self.gate(x).softmax(-1).amax(-1, keepdim=True)


class Net(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Block()
        self.base_layer = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(self.mlp(x))


class Inside(nn.Module):
    """A model that is wrapped by a class that keeps it in an attribute of torch's own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = inner

    def forward(self, x: Tensor) -> Tensor:
        return self._fsdp_wrapped_module(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


NAMES = {"mlp.module.weight", "mlp.module.bias", "mlp.gate.weight"}
NAMES |= {name.replace("mlp", "base_layer", 1) for name in NAMES}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda module: torch.compile(module, backend="eager"),  # type: ignore[return-value]
    "data parallel": lambda module: nn.DataParallel(module),
    "average": lambda module: AveragedModel(module),
    "checkpoint": lambda module: checkpoint_wrapper(module),
    "fsdp": Inside,
    "two": lambda module: nn.DataParallel(Inside(module)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_leaves_names_as_they_are(wrapper: str) -> None:
    """Around the whole model, and around a part of it; a user's ``module`` and ``base_layer`` stay."""
    whole, part = WRAPPERS[wrapper](net()), net()
    part.mlp = WRAPPERS[wrapper](part.mlp)  # type: ignore[assignment]
    for model in (whole, part):
        assert {place.name for place in places(model)} == NAMES
        assert {name for names in names_in(model).values() for name in names.full} == NAMES
        assert {weight.site.names[0] for weight in linear_weights(model)} == {
            name.removesuffix(".weight") for name in NAMES if name.endswith("weight")
        }
        if wrapper != "checkpoint":  # which takes itself out of its named_parameters
            assert {place.raw for place in places(model)} == {name for name, _ in model.named_parameters()}
    assert isinstance(unwrap(whole), Net)
    assert {name for name, _ in modules_of(part)} == {name for name, _ in net().named_modules()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_plan_knows_routers_and_rules_below_a_wrapper(wrapper: str) -> None:
    model = net()
    model.mlp = WRAPPERS[wrapper](model.mlp)  # type: ignore[assignment]
    policy = Policy.load(
        {"default": "W8A8", "rules": [{"match": "re:mlp\\.module", "scheme": "W8A16"}], "strict": True}
    )
    plan = Plan.of(policy, model).enforce()
    by_name = {entry.names[0]: entry for entry in plan.entries}
    assert by_name["mlp.gate"].decision.reason == "kept by convention: MoE router gate"
    assert by_name["mlp.module"].decision.rule == 0 and by_name["base_layer.module"].decision.origin == "default"


@pytest.mark.parametrize("wrapper", ["data parallel", "average", "fsdp", "two"])
def test_calls_reports_and_restore_below_a_wrapper(wrapper: str, plain_inductor: CompileCounter) -> None:
    model, x = net(), torch.randn(4, 32)
    state = copy.deepcopy(model.state_dict())
    model.mlp = WRAPPERS[wrapper](model.mlp)  # type: ignore[assignment]
    wrapped_state = copy.deepcopy(model.state_dict())
    rules = [{"match": "base_layer.module", "scheme": "keep"}]
    quant_compile.compile(model, {"default": "W8A16", "rules": rules, "strict": True})
    with torch.inference_mode():
        before = model(x)
    lines = {line.names[0]: line for line in quant_compile.report(model).lines}
    assert set(lines) == NAMES
    assert lines["mlp.module.weight"].scheme == "W8A16" and lines["base_layer.module.weight"].scheme is None
    assert lines["mlp.gate.weight"].reason == "kept by convention: MoE router gate"
    for source in (state, wrapped_state, net()):
        assert quant_compile.release(model) > 0
        assert quant_compile.restore(model, source) == 2  # mlp.module and base_layer.gate
        assert torch.equal(_inner(model.mlp).module.weight, state["mlp.module.weight"])
    with torch.inference_mode():
        assert torch.equal(model(x), before)


def _inner(module: Any) -> Any:
    return unwrap(module)


def test_a_part_compiled_by_itself_has_the_names_of_the_whole(plain_inductor: CompileCounter) -> None:
    """Through the backend, where ``_orig_mod`` stands between the model and its part."""
    model = net()
    model.mlp = torch.compile(model.mlp, backend="sglquant", options={"policy": "W8A16"})  # type: ignore[assignment]
    with torch.inference_mode():
        model(torch.randn(4, 32))
    lines = {line.names[0]: line for line in quant_compile.report(model).lines}
    assert lines["mlp.gate.weight"].reason == "kept by convention: MoE router gate"
    assert lines["mlp.module.weight"].scheme == "W8A16"


class Scaled(nn.Module):
    """A parametrization that computes the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def test_a_parametrized_weight_is_named_as_its_linear(plain_inductor: CompileCounter) -> None:
    """A rule for the linear names it; the ledger has the checkpoint's name, and the reason why it is no linear's weight."""
    model = net()
    parametrize.register_parametrization(model.mlp.module, "weight", Scaled())
    model.requires_grad_(False)
    (names,) = (n for n in names_in(model).values() if "parametrizations" in n.full[0])
    assert names.full == ("mlp.module.parametrizations.weight.original",)
    assert "mlp.module" in names.rules and names.module_class == "Linear"
    keep = [{"match": "mlp.module", "module": "Linear", "scheme": "keep", "reason": "mine"}]
    policy = {"default": "W8A16", "rules": keep, "strict": True}
    quant_compile.compile(model, policy)
    with torch.inference_mode():
        model(torch.randn(4, 32))
    lines = {line.names[0]: line for line in quant_compile.report(model).lines}
    line = lines["mlp.module.parametrizations.weight.original"]
    assert line.scheme is None and not line.named and line.reason.startswith('rule 1 (match "mlp.module"')
    assert "computed by" in line.reason


class Listed(nn.Module):
    """Modules in a plain list and a dict, which torch does not register, and a reference back to the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.parts = [nn.Linear(32, 32), (nn.Linear(32, 32),)]
        self.heads = {"lm_head": nn.Linear(32, 48)}
        self.child = Child([self])

    def forward(self, x: Tensor) -> Tensor:
        x = self.child(self.first(x))
        return self.heads["lm_head"](self.parts[1][0](self.parts[0](x)))  # type: ignore[operator,index]


class Child(nn.Module):
    def __init__(self, parent: list[nn.Module]) -> None:
        super().__init__()
        self.parent = parent
        self.up = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@pytest.mark.parametrize("door", ["compile", "backend"])
def test_modules_in_plain_containers_have_names_and_lines(door: str, plain_inductor: CompileCounter) -> None:
    model = Listed().eval()
    wanted = {"first", "child.up", "parts.0", "parts.1.0", "heads.lm_head"}
    weights = {place.name.removesuffix(".weight") for place in places(model) if place.name.endswith("weight")}
    assert weights == wanted
    for place in places(model):
        place.parameter.requires_grad_(False)
    policy = {"default": "W8A16", "rules": [{"match": "parts.1.0", "scheme": "keep"}], "strict": True}
    if door == "compile":
        run: Any = quant_compile.compile(model, policy)
    else:
        run = torch.compile(model, backend="sglquant", options={"policy": policy})
    with torch.inference_mode():
        run(torch.randn(4, 32))
    schemes = {line.names[0].removesuffix(".weight"): line.scheme for line in quant_compile.report(model).lines}
    assert {name: schemes[name] for name in wanted} == {
        "first": "W8A16", "child.up": "W8A16", "parts.0": "W8A16", "parts.1.0": None, "heads.lm_head": None
    }  # fmt: skip


class Softmax2d(nn.Module):
    """2-D and 3-D Parameters whose use only tracing tells."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(4, 8))
        self.pos = nn.Parameter(torch.zeros(1, 4, 8))
        self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(()))


DESCRIBED = [
    (nn.Conv1d(4, 4, 3), "weight", "convolution kernel of Conv1d"),
    (nn.ConvTranspose2d(4, 4, 3), "weight", "convolution kernel of ConvTranspose2d"),
    (nn.Embedding(4, 4), "weight", "embedding"),
    (nn.EmbeddingBag(4, 4), "weight", "embedding"),
    (nn.LSTM(4, 4), "weight_ih_l0", "recurrent weight of LSTM"),
    (nn.LSTM(4, 4, proj_size=2), "weight_hr_l0", "projection of LSTM"),
    (nn.GRUCell(4, 4), "weight_hh", "recurrent weight of GRUCell"),
    (nn.LSTM(4, 4), "bias_ih_l0", "vector (norm, bias)"),
    (nn.LayerNorm([3, 4]), "weight", "weight of LayerNorm, a norm"),
    (nn.MultiheadAttention(4, 2), "in_proj_weight", "projection of MultiheadAttention, not read by any product"),
    (nn.Bilinear(3, 4, 5), "weight", "weight of Bilinear, a product of two inputs"),
    (Softmax2d(), "w1", "not read by any product that was traced"),
    (Softmax2d(), "pos", "not read by any product that was traced"),
    (Softmax2d(), "codes", "int8 numbers"),
    (Softmax2d(), "scale", "single number"),
]


@pytest.mark.parametrize(("module", "attribute", "words"), DESCRIBED)
def test_what_a_parameter_is_in_words(module: nn.Module, attribute: str, words: str) -> None:
    assert describe(module, attribute, getattr(module, attribute)).startswith(words)


def test_what_no_product_reads_is_neither_linear_nor_expert() -> None:
    """Before tracing: kernels, norms and embeddings are no sites; other 2-D and 3-D Parameters may be read by a product."""
    parts = [nn.Conv1d(4, 4, 3), nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.LayerNorm([3, 4]), nn.Embedding(4, 4), Softmax2d()]
    model = nn.ModuleList([*parts, nn.MultiheadAttention(4, 2), nn.Linear(4, 4)])
    assert [w.site.names[0] for w in linear_weights(model)] == ["6.in_proj_weight", "6.out_proj", "7"]
    recurrent = {"1.weight_ih_l0", "1.weight_hh_l0", "2.weight_ih", "2.weight_hh"}  # which a recurrence multiplies by
    assert {w.site.names[0] for w in possible_weights(model)} == {"5.w1", "5.pos", *recurrent}
