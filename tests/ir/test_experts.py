"""Expert blocks in the Dynamo graphs of ten families, and one ``sglq.moe`` in their place that computes the same.

One Dynamo trace a case, no Inductor. The replaced graph gets its planes from the store's own functions, under the scheme
``none`` (the values themselves), so a difference would be one of understanding, not of quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from transformers import StaticCache

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.exporting.traced import Call, Traced
from quant_compile.ir import experts as experts_module
from quant_compile.ir import ops
from quant_compile.ir.experts import MoeMiss, MoeSite, Verdicts, find_experts
from quant_compile.ir.graph import ExpertBiasRef, ExpertRef, copy_graph
from quant_compile.lowering.weights import Key, pack_experts
from quant_compile.passes.insert_moe import after, replace_block
from quant_compile.passes.plan import SiteDecision
from quant_compile.runtime.call import _expert_bias
from quant_compile.runtime.decide import Found
from tests.moe_support import EXPERTS, FAMILIES, Family, one_thread, tokens

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
CLOSE = 1e-5
"""f32, logits of order one: what acceptance allows where HF's own implementations do not differ by more."""


@dataclass
class Seen:
    """A backend that finds blocks and runs Dynamo's graph; ``replay`` runs it with every block replaced."""

    sites: list[MoeSite] = field(default_factory=list)
    misses: list[MoeMiss] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    order: list[fx.Node] = field(default_factory=list)
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()
    pristine: fx.GraphModule | None = None

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        pristine, replaced, verdicts = copy_graph(gm), copy_graph(gm), Verdicts()
        parameters = {i: value for i, value in enumerate(inputs) if isinstance(value, nn.Parameter)}
        sites, misses = find_experts(pristine, parameters, verdicts)
        self.sites += sites
        self.misses += misses
        self.order += list(pristine.graph.nodes)
        self.parameters, self.pristine = parameters, pristine
        done: dict[fx.Node, fx.Node] = {}
        for block in find_experts(replaced, parameters, verdicts)[0]:
            decision = SiteDecision(None, "", block.node.name)
            done[block.node] = replace_block(replaced.graph, after(done, block), decision)
        replaced.graph.lint()
        replaced.recompile()
        self.graphs.append(replaced)

        def call(*arguments: Any) -> Any:
            # Copies: a graph that writes into a cache writes the same values once more.
            self.arguments = tuple(a.clone() if type(a) is Tensor else a for a in arguments)
            return gm.forward(*arguments)

        return call

    def replay(self, scale: tuple[int, float] | None = None) -> Any:
        """The latest call over; ``scale``: (expert, factor of its output)."""
        with torch.no_grad():
            return run(self.graphs[-1], self.arguments, scale)


def run(gm: fx.GraphModule, arguments: tuple[Any, ...], scale: tuple[int, float] | None = None) -> Any:
    """A replaced graph on copies of Dynamo's arguments."""
    values: list[Any] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        ref = node.meta.get("plane")
        if ref is None:
            given = arguments[node.meta["argument"]]
            values.append(given.clone() if isinstance(given, Tensor) else given)
            continue
        values.append(plane(ref, arguments))
        declared = node.meta["example_value"]
        assert (tuple(values[-1].shape), values[-1].dtype) == (tuple(declared.shape), declared.dtype), node.name
        if scale is not None and node.name.endswith(("down_proj__data", "down_proj__bias", "w2__data", "w2__bias")):
            values[-1][scale[0]] *= scale[1]
    return gm(*values)


def plane(ref: Any, arguments: tuple[Any, ...]) -> Tensor:
    """What the runtime resolves a reference to."""
    parameter = arguments[ref.slot]
    if isinstance(ref, ExpertBiasRef):
        return _expert_bias(ref, {ref.slot: parameter}).clone()
    assert isinstance(ref, ExpertRef)
    rows, columns = parameter.shape[1:]
    size = (columns, rows) if ref.transposed else (rows, columns)
    key = Key(ref.spec, ref.layout, ref.transposed, ref.dtype, ref.interleaved)
    return pack_experts(parameter, key, None, size)[ref.index]


def logits_of(result: Any) -> Tensor:
    """The tensor of vocabulary size among a graph's outputs."""
    found = [value for value in result if isinstance(value, Tensor) and value.dim() == 3]
    return found[-1] if len(found) > 1 else found[0]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a.double() - b.double()).abs().max())


def traced(model: nn.Module, seen: Seen, *arguments: Any, dynamic: bool | None = False, **keywords: Any) -> Tensor:
    """Logits of one compiled call; ``seen`` then knows the graph."""
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=seen, dynamic=dynamic, fullgraph=True)(*arguments, **keywords).logits


def cache_after_prefill(model: nn.Module) -> dict[str, Any]:
    """Keywords of a decode step that follows an eager prefill of 5 tokens."""
    cache = StaticCache(config=model.config, max_cache_len=8)  # type: ignore[arg-type]
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    return {"past_key_values": cache, "position_ids": torch.tensor([[5]]), "use_cache": True}


def prefill(model: nn.Module, seen: Seen) -> Tensor:
    """Two sequences of 5 tokens."""
    return traced(model, seen, tokens(), use_cache=False)


def decode(model: nn.Module, seen: Seen) -> Tensor:
    """One more token of each."""
    return traced(model, seen, tokens(length=1, seed=9), **cache_after_prefill(model))


PHASES: Mapping[str, Callable[[nn.Module, Seen], Tensor]] = {"prefill": prefill, "decode": decode}
WHOLE = [(name, "grouped_mm", "prefill") for name in FAMILIES] + [
    (name, "grouped_mm" if family.dense else "batched_mm", "decode") for name, family in FAMILIES.items()
]
"""As ``generate`` on a GPU has it."""
ALONE = [
    (name, implementation, length)
    for name, family in FAMILIES.items()
    if not family.dense
    for implementation, length in (("batched_mm", 5), ("grouped_mm", 1))
]
"""The other way round; the block without the model around it, to save time."""


def is_as_described(site: MoeSite, family: Family) -> bool:
    """Whether everything that a site says is what the family's config says."""
    return (
        site.module_class == family.experts_class
        and site.activation.text == family.activation
        and site.transposed == (family.transposed, family.transposed)
        and site.interleaved == family.interleaved
        and (site.experts, site.hidden, site.intermediate, site.top_k) == (EXPERTS, 64, 32, 1 if family.dense else 2)
        and (site.ids is None) == (site.weights is None) == family.dense
        and (site.b13 is None) == (site.b2 is None) == (family.experts_class != "GptOssExperts")
    )


@pytest.mark.parametrize(("name", "implementation", "phase"), WHOLE)
def test_the_replaced_graph_is_the_model(name: str, implementation: str, phase: str) -> None:
    family, seen = FAMILIES[name], Seen()
    model = family.make(implementation)
    wanted = PHASES[phase](model, seen)
    assert not seen.misses and len(seen.sites) == 1 and len(seen.graphs) == 1
    assert is_as_described(seen.sites[0], family)
    assert seen.sites[0].dtype == torch.float32
    left = [node for node in seen.graphs[0].graph.nodes if "grouped_mm" in str(node.target) or node.target is torch.bmm]
    assert not left and len(seen.graphs[0].graph.find_nodes(op="call_function", target=ops.moe)) == 1
    error = difference(logits_of(seen.replay()), wanted)
    assert error <= max(CLOSE, implementations_differ(model, family))
    # Each expert that some token chose shows; a token chooses two of the six.
    shown = sum(difference(logits_of(seen.replay((e, 1.05))), wanted) > 100 * CLOSE for e in range(EXPERTS))
    assert shown >= 2, "an expert whose output is 5 % off must fail the comparison"


@pytest.mark.parametrize(("name", "implementation", "length"), ALONE)
def test_the_replaced_block_alone(name: str, implementation: str, length: int) -> None:
    family, seen = FAMILIES[name], Seen()
    model = family.make(implementation)
    block = next(m for m in model.modules() if type(getattr(m, "experts", None)).__name__ == family.experts_class)
    torch._dynamo.reset()
    hidden = torch.randn(2, length, 64)
    with torch.no_grad():
        wanted = torch.compile(block, backend=seen, dynamic=False, fullgraph=True)(hidden)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    assert not seen.misses and len(seen.sites) == 1 and is_as_described(seen.sites[0], family)
    assert difference(seen.replay()[0], wanted) <= CLOSE
    assert sum(difference(seen.replay((e, 1.05))[0], wanted) > 100 * CLOSE for e in range(EXPERTS)) >= 2


def implementations_differ(model: nn.Module, family: Family) -> float:
    """Largest difference of the logits between HF's own two implementations."""
    if family.dense:
        return 0.0
    logits: list[Tensor] = []
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)  # type: ignore[operator]
        with torch.no_grad():
            logits.append(model(tokens(), use_cache=False).logits)
    return difference(*logits)


@pytest.mark.parametrize(
    ("name", "implementation"), [("qwen3_moe", "grouped_mm"), ("gpt_oss", "batched_mm"), ("llama4", "grouped_mm")]
)
def test_any_number_of_tokens(name: str, implementation: str) -> None:
    """Sizes are symbols: one graph, replaced once, is right for other lengths."""
    seen = Seen()
    model = FAMILIES[name].make(implementation)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=seen, dynamic=True, fullgraph=True)
    for length in (5, 7, 13):
        with torch.no_grad():
            wanted = compiled(tokens(length=length), use_cache=False).logits
        assert difference(logits_of(seen.replay()), wanted) <= CLOSE
        assert difference(logits_of(seen.replay((0, 1.05))), wanted) > CLOSE
    assert len(seen.graphs) == len(seen.sites) == 1 and not seen.misses
    assert not isinstance(seen.sites[0].x.meta["example_value"].shape[0], int)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_bf16_models(name: str) -> None:
    """The probe computes in wide floats whatever the model's dtype; planes and result have the model's."""
    seen, family = Seen(), FAMILIES[name]
    model = family.make(dtype=torch.bfloat16)
    wanted = prefill(model, seen)
    assert not seen.misses and is_as_described(seen.sites[0], family)
    assert seen.sites[0].dtype == torch.bfloat16
    got = logits_of(seen.replay())
    assert got.dtype == torch.bfloat16
    # Sums in another order: a few roundings of bf16 (4e-3 each).
    assert float((got.float() - wanted.float()).norm() / wanted.float().norm()) < 2e-2


def test_layers_that_are_alike_cost_one_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every layer is found once."""
    probes: list[float] = []
    original = experts_module.run_region

    def counted(*arguments: Any) -> Any:
        probes.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(experts_module, "run_region", counted)
    seen = Seen()
    model = FAMILIES["qwen3_moe"].make(layers=3)
    wanted = prefill(model, seen)
    assert len(probes) == 2, "one with hidden values around one, one beyond every clamp; none for copies of the graph"
    assert len(seen.sites) == 3 and not seen.misses
    assert len({node for site in seen.sites for node in site.nodes}) == sum(len(site.nodes) for site in seen.sites)
    assert len({slot for site in seen.sites for slot in site.slots}) == 6
    assert [site.node.name for site in seen.sites] == [n.name for n in seen.order if n in {s.node for s in seen.sites}]
    assert difference(logits_of(seen.replay()), wanted) <= CLOSE


def test_the_graph_that_a_gpu_gives_is_understood() -> None:
    """On a GPU the graph counts tokens in integers, names the device, and asks for its capability."""

    def as_on_a_gpu(gm: fx.GraphModule) -> None:
        gpu = torch.device("cuda", 0)
        for node in list(gm.graph.nodes):
            if (
                node.op == "call_method"
                and node.target == "float"
                and any("histc" in str(u.target) for u in node.users)
            ):
                node.target = "int"
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": gpu}
            if "grouped_mm" in str(node.target):
                with gm.graph.inserting_before(node):
                    asked = gm.graph.call_function(torch.cuda.get_device_capability, (gpu,))
                asked.meta = {"nn_module_stack": node.meta["nn_module_stack"]}

    found: list[list[MoeSite]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graph = copy_graph(gm)
        as_on_a_gpu(graph)
        parameters = {i: value for i, value in enumerate(inputs) if isinstance(value, nn.Parameter)}
        sites, misses = find_experts(graph, parameters)
        assert not misses, misses[0].reason
        found.append(sites)
        return gm.forward

    torch._dynamo.reset()
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(torch.arange(6)[None])
    assert [len(sites) for sites in found] == [1]


def test_the_program_that_a_gpu_gives_is_understood() -> None:
    """Exported: the same, in torch's own overloads, and products are torch's own too."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    traced = Traced.of(model, Call((), {"input_ids": torch.arange(6)[None], "use_cache": False}))
    gpu, changed = torch.device("cuda", 0), dict[str, int]()
    for node in traced.graph.graph.nodes:
        if node.target is torch.ops.aten.histc.default:
            cast = node.args[0]
            assert cast.target is torch.ops.aten.to.dtype
            cast.args = (cast.args[0], torch.int32)
            changed["histc"] = 1
        if "grouped_mm" in str(node.target):
            node.target = torch.ops.aten._grouped_mm.default
            changed["grouped_mm"] = changed.get("grouped_mm", 0) + 1
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": gpu}
    assert changed == {"histc": 1, "grouped_mm": 2}
    parameters = {i: value for i, value in enumerate(traced.inputs) if isinstance(value, nn.Parameter)}
    sites, misses = find_experts(traced.graph, parameters)
    assert len(sites) == 1 and not misses, [miss.reason for miss in misses]


def test_sites_of_a_copy_are_those_that_are_found_there() -> None:
    """Experts, attention, a linear of its own: no node of the first graph is left in what is moved to a copy."""
    found: list[tuple[Found, Found, fx.Graph]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        first = copy_graph(gm)
        second = copy_graph(first)
        parameters = {i: value for i, value in enumerate(inputs) if isinstance(value, nn.Parameter)}
        moved = Found.of(first, parameters).moved(dict(zip(first.graph.nodes, second.graph.nodes, strict=True)))
        found.append((moved, Found.of(second, parameters), second.graph))
        return gm.forward

    torch._dynamo.reset()
    model = FAMILIES["qwen3_moe"].make(layers=1)
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(tokens(), use_cache=False)
    assert found and any(each.blocks and each.linears and each.attention for each, _, _ in found)
    for moved, own, graph in found:
        assert parts(moved) == parts(own)
        nodes = [value for value in parts(moved) if isinstance(value, fx.Node)]
        assert len(nodes) > 10 and all(node.graph is graph for node in nodes)


def parts(value: Any) -> list[Any]:
    """All that a dataclass holds, flat and in order."""
    if is_dataclass(value):
        return [part for each in fields(value) for part in parts(getattr(value, each.name))]
    if isinstance(value, tuple | list):
        return [part for each in cast(Any, value) for part in parts(each)]
    return [value]
