"""Shared by the tests of run-time behaviour: tiny models, an eager quantized reference, byte counts of the store.

``plain_inductor`` replaces Inductor by the lowered graph itself. What is tested then is Dynamo, the passes, the store
and the runner, which is the point of most of these tests, at a hundredth of the time; a few tests run real Inductor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile  # noqa: F401  registers the schemes
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.weights import STORE

SchemeOf = Callable[[str], str | None]


# W8A8: its reference's product is an exact integer sum, so results are equal bit for bit in a GEMM of any shape.
EXACT = "W8A8"
# For schemes with f32 sums: the same GEMMs as eager.
UNMERGED = {"fuse": {"merge_siblings": False}}


class CompileCounter:
    """Stands for ``compile_fx``: counts graphs and returns them uncompiled."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.patches: list[Any] = []

    def __call__(
        self, gm: torch.fx.GraphModule, inputs: Any, config_patches: Any = None, **_: Any
    ) -> Callable[..., Any]:
        assert len(inputs) == len(gm.graph.find_nodes(op="placeholder"))
        self.graphs.append(gm)
        self.patches.append(config_patches)
        return gm.forward

    def __len__(self) -> int:
        return len(self.graphs)


@pytest.fixture
def plain_inductor(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """No Inductor: compiled functions are the lowered graphs."""
    counter = CompileCounter()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", counter)
    return counter


@pytest.fixture
def dynamo_config() -> Any:
    """Dynamo's config, put back after the test."""
    from torch._dynamo import config

    with config.patch({}):
        before = config.recompile_limit, config.accumulated_recompile_limit
        yield config
        config.recompile_limit, config.accumulated_recompile_limit = before


class Mlp(nn.Module):
    """Gate, up and down, as Llama has them; ``up`` and ``gate`` are siblings.

    hardtanh instead of silu, which rounds differently on strided tensors (slices of a merged GEMM), so that tests can
    ask for equal bits, and which keeps deep stacks finite.
    """

    def __init__(self, hidden: int = 32, wide: int = 48, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, wide, bias=bias)
        self.up_proj = nn.Linear(hidden, wide, bias=bias)
        self.down_proj = nn.Linear(wide, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(nn.functional.hardtanh(self.gate_proj(x)) * self.up_proj(x))


class Stack(nn.Module):
    """Several Mlp layers."""

    def __init__(self, layers: int, hidden: int = 32, wide: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp(hidden, wide) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ReferenceLinear(nn.Module):
    """A linear through its scheme's family functions, eagerly."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, input_scale: Tensor | None = None) -> None:
        super().__init__()
        self.scheme, self.input_scale = scheme, input_scale
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        with torch.inference_mode(False), torch.no_grad():
            self.planes = family_of(scheme).quantize_weight(linear.weight.detach().clone(), scheme)

    def forward(self, x: Tensor) -> Tensor:
        family = family_of(self.scheme)
        quantized = self.scheme.input_activations is not None
        planes = family.quantize_input(x, self.scheme, self.input_scale) if quantized else (x,)
        return family.linear(planes, self.planes, self.bias, self.scheme, x.dtype)


def reference_of(model: nn.Module, scheme_of: str | SchemeOf, scales: dict[str, Tensor] | None = None) -> nn.Module:
    """A copy of ``model`` whose nn.Linears follow ``scheme_of(name)`` eagerly; None keeps one."""
    choose: SchemeOf = (lambda name: scheme_of) if isinstance(scheme_of, str) else scheme_of
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        spec = choose(name) if isinstance(module, nn.Linear) else None
        if spec is not None:
            assert isinstance(module, nn.Linear)
            parent, _, leaf = name.rpartition(".")
            scale = (scales or {}).get(f"{name}.input_scale")
            setattr(made.get_submodule(parent), leaf, ReferenceLinear(module, parse(spec), scale))
    return made


def reference_linear(x: Tensor, linear: nn.Linear, spec: str) -> Tensor:
    """One linear through its scheme's family functions."""
    with torch.no_grad():
        return ReferenceLinear(linear, parse(spec))(x)


def store_planes(model: nn.Module | None = None) -> list[Tensor]:
    """Every plane that the store holds (for ``model``), each once."""
    wanted = None if model is None else set(map(id, model.parameters()))
    found: dict[int, Tensor] = {}
    for identity, entry in list(STORE._entries.items()):
        if wanted is None or identity in wanted:
            for slab in entry.slabs():
                found |= {plane.untyped_storage()._cdata: plane for plane in slab.planes}
    return list(found.values())


def store_bytes(model: nn.Module | None = None) -> int:
    """Bytes of the storages behind ``store_planes``."""
    return sum(plane.untyped_storage().nbytes() for plane in store_planes(model))


def inner_error(error: BaseException) -> BaseException:
    """What the backend raised, inside Dynamo's BackendCompilerFailed."""
    return getattr(error, "inner_exception", error)


def bf16(*shape: int, seed: int = 0) -> Tensor:
    """Normal values, bf16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
