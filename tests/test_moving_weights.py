"""Values that change or move under a compiled model: what shows it is seen at the next call, and what comes back is not packed again."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import quant_compile
from quant_compile.generation.weights import Weights
from quant_compile.lowering.identity import ANCHOR, place_of
from quant_compile.lowering.weights import STORE
from quant_compile.runtime.watch import Watched
from tests.runtime_support import Mlp, bf16, plain_inductor, reference_of

__all__ = ["plain_inductor"]
pytestmark = pytest.mark.usefixtures("plain_inductor")
REFERENCE = {"kernels": "reference"}
# One block of 4 MiB each, which the C library gives back and hands out again at once.
SIZE = 1024


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def by_package(model: nn.Module) -> Callable[..., Any]:
    return quant_compile.compile(model, "W8A8", **REFERENCE)


def by_torch(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="sglquant", options={"policy": "W8A8", **REFERENCE})


def values(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in model.named_parameters()
    }  # fmt: skip


def by_data(model: nn.Module, seed: int) -> None:
    for (_, parameter), value in zip(model.named_parameters(), values(model, seed).values(), strict=True):
        parameter.data = value


def assigned(model: nn.Module, seed: int) -> None:
    model.load_state_dict(values(model, seed), assign=True)


def copied(model: nn.Module, seed: int) -> None:
    model.load_state_dict(values(model, seed))


def swapped(model: nn.Module, seed: int) -> None:
    for (_, parameter), value in zip(model.named_parameters(), values(model, seed).values(), strict=True):
        torch.utils.swap_tensors(parameter, Parameter(value, requires_grad=False))


def by_conversions(model: nn.Module, seed: int) -> None:
    """There and back in another dtype, with other values in between."""
    model.float()
    by_data(model, seed)
    model.bfloat16()


def by_overwriting(model: nn.Module, seed: int) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        by_conversions(model, seed)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def by_swapping(model: nn.Module, seed: int) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        by_conversions(model, seed)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def by_apply(model: nn.Module, seed: int) -> None:
    fresh = iter(values(model, seed).values())
    model._apply(lambda old: next(fresh))


def by_vector(model: nn.Module, seed: int) -> None:
    vector_to_parameters(torch.cat([v.flatten() for v in values(model, seed).values()]), model.parameters())


def by_set(model: nn.Module, seed: int) -> None:
    for (_, parameter), value in zip(model.named_parameters(), values(model, seed).values(), strict=True):
        parameter.set_(value)


WAYS = [
    by_data, assigned, copied, swapped, by_conversions, by_overwriting, by_swapping, by_apply, by_vector, by_set,
]  # fmt: skip


@pytest.mark.parametrize("door", [by_package, by_torch])
@pytest.mark.parametrize("way", WAYS)
def test_new_values_are_seen_whatever_way_they_came(way: Callable[[nn.Module, int], None], door: Any) -> None:
    model, x = Mlp().bfloat16().requires_grad_(False), bf16(5, 32)
    run = door(model)
    run(x)
    for seed in range(3):
        way(model, 2 * seed)
        way(model, 2 * seed + 1)
        assert torch.equal(run(x), reference_of(model, "W8A8")(x))
        assert quant_compile.report(model).coverage == 1.0
    before = STORE.packed
    run(x)
    assert STORE.packed == before


def put_back_at(address: int, parameter: Parameter) -> bool:
    """Give a Parameter other values, at an address that is free, if the allocator can be brought to it."""
    tried = []
    for _ in range(64):
        tried.append(torch.randn(SIZE, SIZE))
        if tried[-1].data_ptr() == address:
            break
    parameter.data = tried[-1]
    return tried[-1].data_ptr() == address


def test_an_address_that_was_handed_out_again_is_seen() -> None:
    """Freed between two calls and given to other values, with the version as it was."""
    model, x = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).requires_grad_(False), torch.randn(2, SIZE)
    run = by_torch(model)
    parameter, again = model[0].weight, 0
    parameter.data = torch.randn(SIZE, SIZE)
    run(x)
    for _ in range(6):
        address, version = parameter.data_ptr(), parameter._version
        parameter.data = torch.empty(0)
        again += put_back_at(address, parameter) and parameter._version == version
        assert torch.equal(run(x), reference_of(model, "W8A8")(x))
    if not again:
        pytest.skip("the allocator never handed the address out again")


def test_a_recorded_step_sees_the_same() -> None:
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).requires_grad_(False)
    weights, again = Weights(model), 0
    parameter = model[0].weight
    for _ in range(6):
        weights.look()
        before = weights.state()
        weights.look()
        assert weights.state() == before  # nothing has changed
        place = parameter.data_ptr()
        parameter.data = torch.empty(0)
        again += put_back_at(place, parameter)
        weights.look()
        assert weights.state() != before
    if not again:
        pytest.skip("the allocator never handed the address out again")


def test_place_of_a_tensor() -> None:
    tensor = torch.randn(4, 6)
    assert place_of(tensor) == place_of(tensor.detach()) != place_of(tensor.clone())
    assert place_of(tensor) != place_of(tensor[1:]) and place_of(tensor) != place_of(tensor.view(torch.int32))
    assert place_of(tensor.to_sparse()) == ()


def test_parameters_of_inference_mode_that_are_replaced_by_data() -> None:
    """They have no version, but a place."""
    with torch.inference_mode():
        model = Mlp().bfloat16().requires_grad_(False)
        x = bf16(5, 32)
        run = by_torch(model)
        for seed in range(3):
            assigned(model, seed)
            run(x)
            for name, value in values(model, seed + 10).items():
                model.get_parameter(name).data = value
            assert torch.equal(run(x), reference_of(model, "W8A8")(x))


def test_values_that_move_and_come_back_are_not_packed_again() -> None:
    """As offloading by ``.data`` does at every call: from the third time on, equal values are known to be equal."""
    model, x = Mlp().bfloat16().requires_grad_(False), bf16(5, 32)
    run = by_package(model)
    wanted = run(x)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    packs = []
    for _ in range(6):
        for name, parameter in model.named_parameters():
            parameter.data = torch.empty(0)
            parameter.data = kept[name].clone()
        before = STORE.packed
        assert torch.equal(run(x), wanted)
        packs.append(STORE.packed - before)
    assert packs[0] > 0 and packs[1:] == [0] * 5
    by_data(model, 5)
    assert torch.equal(run(x), reference_of(model, "W8A8")(x))


def test_two_live_weights_that_are_swapped() -> None:
    model, x = Mlp().bfloat16().requires_grad_(False), bf16(5, 32)
    run = by_package(model)
    run(x)
    torch.utils.swap_tensors(model.up_proj.weight, model.gate_proj.weight)
    assert torch.equal(run(x), reference_of(model, "W8A8")(x))


def test_other_weights_for_one_call() -> None:
    model, x = Mlp().bfloat16().requires_grad_(False), bf16(5, 32)
    run = by_torch(model)
    wanted = run(x)
    others = {name: Parameter(value, requires_grad=False) for name, value in values(model, 3).items()}
    other = Mlp().bfloat16().requires_grad_(False)
    other.load_state_dict(others)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, others, (x,))

    assert torch.equal(call(model, x), other(x))
    for _ in range(2):
        assert torch.equal(torch.compile(call, backend="sglquant", options={"policy": "W8A8", **REFERENCE})(model, x),
                           reference_of(other, "W8A8")(x))  # fmt: skip
        assert torch.equal(run(x), wanted)


def test_files_and_copies_carry_no_identity() -> None:
    model, x = Mlp().bfloat16().requires_grad_(False), bf16(5, 32)
    by_package(model)(x)
    assert ANCHOR in vars(model.up_proj.weight)
    file = io.BytesIO()
    torch.save(dict(model.state_dict(keep_vars=True)), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["up_proj.weight"]
    assert STORE.peek(loaded) is None and torch.equal(loaded, model.up_proj.weight)
    model.up_proj.weight = loaded
    assert torch.equal(model(x), reference_of(model, "W8A8")(x))


def test_parameters_to_vector_and_back_changes_nothing() -> None:
    model, x = Mlp().bfloat16().requires_grad_(False), bf16(5, 32)
    run = by_package(model)
    wanted = run(x)
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    assert torch.equal(run(x), wanted)


def test_what_a_call_costs() -> None:
    """300 weights; 30 us here, six times that for busy machines."""
    parameters = tuple(Parameter(torch.randn(4, 4), requires_grad=False) for _ in range(300))
    watched = Watched.of(parameters, range(300))
    best = min(_seconds(lambda: watched.unchanged(parameters)) for _ in range(50))
    assert watched.unchanged(parameters) and best < 180e-6


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
