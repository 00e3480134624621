"""Copy, edit, check and print FX graphs. Dynamo's own graph is never touched: every pass works on a copy.

Placeholders of a rewritten graph are either arguments of Dynamo's graph (``meta["argument"]`` = its position) or planes
(``meta["plane"]`` = a PlaneRef, resolved by the runtime at each call).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

from quant_compile.ir.errors import GraphError
from quant_compile.ir.family import PlaneSpec
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.operands import op_of
from quant_compile.ir.stored import VIEWS

CACHED = "sglq::cache_values"
# What decomposes into plain torch, so that lowered graphs may have it.
PLAIN = {CACHED, "sglq::latent_attention", "sglq::all_reduce"}
# Nodes of one inlined template carry the name of the node that it was inlined for.
INLINED = "inlined_for"
# Where a pass has replaced a node: the name that the node had in the graph as it was.
STANDS_FOR = "stands_for"
STATIC_INPUT = {"_dynamo_static_input_type": "unguarded"}


@dataclass(frozen=True)
class PlaneRef:
    """One plane of a packed weight, or of several that are merged.

    Attributes:
        slots: positions of the weights among the arguments of Dynamo's graph; several for merged siblings.
        transposed: per slot, whether the Parameter is stored [k, n].
        spec: the scheme.
        layout: how the planes lie in memory.
        dtype: dtype the linear computes in; under autocast not the Parameter's.
        index: which plane.
        views: per slot, the matrix that the Parameter is viewed as first, empty for its own shape; none: all have their own.
    """

    slots: tuple[int, ...]
    transposed: tuple[bool, ...]
    spec: str
    layout: str
    dtype: torch.dtype
    index: int
    views: tuple[tuple[int, ...], ...] = ()

    @property
    def stored(self) -> tuple[tuple[bool, tuple[int, ...]], ...]:
        """(transposed, view) of each slot."""
        return tuple(zip(self.transposed, self.views or ((),) * len(self.slots), strict=True))


@dataclass(frozen=True)
class ScaleRef:
    """The calibrated input scale [1] f32 of the weights in ``slots`` (equal for all of them)."""

    slots: tuple[int, ...]


@dataclass(frozen=True)
class FactorRef:
    """What the input of the weights in ``slots`` is multiplied by, [k] (equal for all of them), in ``dtype``."""

    slots: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class BiasRef:
    """The joined bias of merged siblings; a None slot stands for ``size`` zeros."""

    slots: tuple[int | None, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpertRef:
    """One plane of an expert block's packed weight.

    Attributes:
        slot: position of the Parameter [E, n, k] among the arguments of Dynamo's graph.
        transposed: an expert is stored [k, n].
        interleaved: its gate and up rows alternate; the planes have all gates first.
        spec: the scheme, or ``none``.
        layout: how the planes lie in memory (a name of ``moe_layouts``).
        dtype: dtype the block computes in.
        index: which plane.
        problem: the weight's half of the block, for packing into a layout; None while planes are the values themselves.
        view: the shape [E, ., .] that the Parameter is viewed as first; empty for its own.
    """

    slot: int
    transposed: bool
    interleaved: bool
    spec: str
    layout: str
    dtype: torch.dtype
    index: int
    problem: MoeProblem | None = None
    view: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExpertBiasRef:
    """An expert block's bias [E, n] in the dtype and row order of its planes."""

    slot: int
    interleaved: bool
    dtype: torch.dtype


Ref = PlaneRef | ScaleRef | FactorRef | BiasRef | ExpertRef | ExpertBiasRef


def slots_of(ref: Ref) -> tuple[int, ...]:
    """Positions of the weights that a plane is made of."""
    if isinstance(ref, ExpertRef | ExpertBiasRef):
        return (ref.slot,)
    return tuple(slot for slot in ref.slots if slot is not None)


def copy_graph(gm: fx.GraphModule) -> _LazyGraphModule:
    """A copy whose placeholders carry ``meta["argument"]``; shares the original's fake values, not its nodes."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    original = next(iter(gm.graph.find_nodes(op="output")))
    graph.output(output).meta = dict(original.meta)
    for position, old in enumerate(gm.graph.find_nodes(op="placeholder")):
        mapping[old].meta.setdefault("argument", position)
        mapping[old].meta.pop("grapharg", None)  # a weak reference to the real tensor; see forget_tensors
    copy = _LazyGraphModule(gm, graph)  # Python code is made of it when it is called, not after each pass
    copy.meta = dict(gm.meta)
    return copy


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode of the values in a Dynamo graph.

    Raises:
        GraphError: no node carries a fake tensor.
    """
    for node in graph.nodes:
        mode = getattr(node.meta.get("example_value"), "fake_mode", None)
        if mode is not None:
            return mode
    raise GraphError("the graph carries no fake tensors")


def forget_tensors(graph: fx.Graph) -> None:
    """Drop the weak references to real tensors that fake ones were made with: torch swaps no tensor that has any.

    Only when Dynamo is done with the graph.
    """
    try:
        describer = fake_mode_of(graph).fake_tensor_converter.meta_converter.describer
    except GraphError:
        return
    describer.lookup_tensor.data.clear()


def add_plane(graph: fx.Graph, ref: Ref, spec: PlaneSpec, like: fx.Node, name: str) -> fx.Node:
    """A new placeholder for a plane, on the device of ``like``'s value; after the existing placeholders."""
    value = like.meta["example_value"]
    last = graph.find_nodes(op="placeholder", sort=False)[-1]  # in order of insertion: the newest is the last
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.target = node.name  # the argument's name; a weight that is used twice asks for the same one twice
    with value.fake_mode:
        node.meta["example_value"] = torch.empty(spec.shape, dtype=spec.dtype, device=value.device)
    node.meta["plane"] = ref
    node.meta["tensor_dict"] = dict(STATIC_INPUT)
    return node


def add_named_plane(
    graph: fx.Graph, ref: Ref, spec: PlaneSpec, like: fx.Node, parameter: str, label: str = ""
) -> fx.Node:
    """``add_plane`` for the weight called ``parameter``, which stands in the node's name and in printed graphs."""
    node = add_plane(graph, ref, spec, like, plane_name(parameter, label or spec.name))
    node.meta["parameter"] = parameter
    return node


def add_input_scale(graph: fx.Graph, slot: int, like: fx.Node, parameter: str) -> fx.Node:
    """A placeholder for the calibrated input scale [1] of the weight in ``slot``."""
    return add_named_plane(graph, ScaleRef((slot,)), PlaneSpec("input_scale", (1,), torch.float32), like, parameter)


def multiply_input(
    graph: fx.Graph, x: fx.Node, slot: int, like: fx.Node, parameter: str, dtype: torch.dtype
) -> fx.Node:
    """x [..., k] times the factors of the inputs of the weight in ``slot``; Inductor makes it part of what computes x."""
    value = x.meta["example_value"]
    spec = PlaneSpec("input_factor", (int(value.shape[-1]),), dtype)
    factor = add_named_plane(graph, FactorRef((slot,), dtype), spec, like, parameter)
    product = graph.call_function(operator.mul, (x, factor))
    product.meta |= {
        "example_value": value * factor.meta["example_value"],
        "site": f"factors of the input of {parameter}",
    }
    return product


def add_expert_planes(
    graph: fx.Graph, ref: ExpertRef, specs: Iterable[PlaneSpec], experts: int, like: fx.Node, parameter: str
) -> list[fx.Node]:
    """Placeholders of all planes [E, ...] of a weight whose single experts have planes ``specs``."""
    return [
        add_named_plane(
            graph, replace(ref, index=i), PlaneSpec(spec.name, (experts, *spec.shape), spec.dtype), like, parameter
        )
        for i, spec in enumerate(specs)
    ]


def planes_of(graph: fx.Graph) -> list[str]:
    """Names of the weights whose planes a graph reads, each once."""
    found = graph.find_nodes(op="placeholder")
    return list(dict.fromkeys(node.meta.get("parameter", node.name) for node in found if "plane" in node.meta))


def names_reading(node: fx.Node) -> tuple[str, ...]:
    """Names of the weights that a node's readers multiply by."""
    return tuple(dict.fromkeys(name for user in node.users for name in user.meta.get("names", ())))


def plane_name(parameter: str, plane: str) -> str:
    """Node name of a plane: the weight's qualified name with underscores, and the plane's."""
    stem = "".join(c if c.isalnum() else "_" for c in parameter.removesuffix(".weight"))
    return f"{stem if not stem[:1].isdigit() else 'w' + stem}__{plane}"


def prepare_for_inductor(gm: fx.GraphModule) -> None:
    """Drop what ties placeholders to Dynamo's guards, and give example values to a graph whose passes have called methods.

    Without one, torch does not take a method's first argument for a tensor and leaves the graph out of AOTAutograd's cache.
    """
    gm._param_name_to_source = {}  # type: ignore[assignment]
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None  # type: ignore[attr-defined]
    if any(not _has_example(node) for node in gm.graph.find_nodes(op="call_method")):
        fill_examples(gm.graph)


def fill_examples(graph: fx.Graph) -> None:
    """Run what passes have put in on fake tensors; where that does not work, the rest is left as it is."""
    try:
        mode = fake_mode_of(graph)
        # Without torch's own dispatcher in Python, as when it traces, operations that are made of others put conditions on sizes.
        with mode, enable_python_dispatcher(), torch.no_grad():
            for node in graph.nodes:
                if node.op in ("call_function", "call_method") and not _has_example(node):
                    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["example_value"])
                    node.meta["example_value"] = _run(node, args, kwargs)
    except Exception:  # a cache is missed; whatever is wrong with the graph, AOTAutograd says it
        return


def _has_example(node: fx.Node) -> bool:
    return "example_value" in node.meta


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


class _Shape:
    """``x.shape`` of a traced input of which only the last size is known."""

    def __init__(self, last: int) -> None:
        self.last = last

    def __getitem__(self, index: int) -> int:
        if index != -1:
            raise GraphError("a traced input knows only its last size")
        return self.last


class _InputProxy(fx.Proxy):
    last_size = 0

    @property
    def shape(self) -> _Shape:
        return _Shape(self.last_size)


def trace(function: Callable[..., Any], last_size: int, inputs: int) -> fx.Graph:
    """Graph of a function of ``inputs`` tensors (the first [..., last_size]) that returns a tuple of tensors."""
    graph = fx.Graph()
    tracer = fx.Tracer()
    tracer.graph = graph
    tracer.root = torch.nn.Module()
    proxies = [_InputProxy(graph.placeholder(f"a{i}"), tracer) for i in range(inputs)]
    proxies[0].last_size = last_size
    graph.output(tracer.create_arg(function(*proxies)))
    for node in graph.find_nodes(op="call_method"):
        _make_function(node)
    return graph


_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
# Methods whose function takes the same arguments.
_FUNCTIONS = {
    function.__name__: function
    for function in (
        torch.abs, torch.amax, torch.amin, torch.clamp, torch.clamp_max, torch.clamp_min, torch.flatten, torch.reciprocal,
        torch.round, torch.squeeze, torch.sum, torch.unflatten,
    )
}  # fmt: skip
_OF_DTYPES = {"to": torch.ops.aten.to.dtype, "view": torch.ops.aten.view.dtype}


def _make_function(node: fx.Node) -> None:
    """Call torch's function instead of a method: of these AOTAutograd's cache wants an example value of the first argument."""
    name, function = str(node.target), _FUNCTIONS.get(str(node.target))
    if name in _CASTS:
        name, node.args = "to", (*node.args, _CASTS[name])
    if name in _OF_DTYPES and len(node.args) == 2 and isinstance(node.args[1], torch.dtype):
        function = _OF_DTYPES[name]
    if name == "reshape" and node.args[1:] and all(isinstance(size, int | fx.Node) for size in node.args[1:]):
        function, node.args = torch.reshape, (node.args[0], node.args[1:])
    if function is not None:
        node.op, node.target = "call_function", function


def inline(graph: fx.Graph, template: fx.Graph, inputs: Iterable[fx.Node], before: fx.Node) -> tuple[fx.Node, ...]:
    """Copy a traced template in front of ``before``, whose name its nodes carry; returns the nodes of its outputs."""
    mapping = dict(zip(template.find_nodes(op="placeholder"), inputs, strict=False))
    result: Any = ()
    with graph.inserting_before(before):
        for node in template.nodes:
            if node.op == "output":
                result = node.args[0]
            elif node.op != "placeholder":
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
                mapping[node].meta[INLINED] = before.name
    return tuple(mapping[node] for node in result)


def erase_with_inputs(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node without users, then what fed only it: views, planes, and tensor placeholders (Inductor keeps unused inputs).

    Only for nodes known to have no effect: matched linears, sglq ops and the views around them.
    """
    if node.users or (node.op == "placeholder" and not isinstance(node.meta.get("example_value"), torch.Tensor)):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        if source.op == "placeholder" or is_view(source):
            erase_with_inputs(graph, source)


def stand_for(new: fx.Node, old: fx.Node) -> None:
    """Note that ``new`` takes the place of ``old``, or of what that has taken the place of; ``verify: true`` compares them."""
    new.meta[STANDS_FOR] = old.meta.get(STANDS_FOR, old.name)


def stands_for(node: fx.Node) -> str | None:
    """Name of the node of the graph as it was whose place a node has taken."""
    return node.meta.get(STANDS_FOR)


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at its input differently, so that it may vanish when nothing uses it."""
    return op_of(node) in VIEWS


def verify(gm: fx.GraphModule, stage: str) -> fx.GraphModule:
    """Check a rewritten graph; its Python code is made anew when it is next called.

    Args:
        gm: the graph.
        stage: ``quantized`` (sglq ops allowed) or ``lowered`` (none may be left but those of PLAIN).

    Raises:
        GraphError: an sglq op is left after lowering, or a placeholder has no origin.
    """
    gm.graph.lint()
    for node in gm.graph.nodes:
        if stage == "lowered" and getattr(node.target, "namespace", None) == "sglq" and op_of(node) not in PLAIN:
            raise GraphError(f"{node.format_node()} is left after lowering")
        if node.op == "placeholder" and "plane" not in node.meta and "argument" not in node.meta:
            raise GraphError(f"placeholder {node.name} has no origin")
    gm.recompile()
    return gm


def lines(gm: fx.GraphModule) -> list[str]:
    """The graph as text, one line a node; quantized sites are marked with ``*``."""
    return [text for node in gm.graph.nodes if (text := _line(node))]


def _line(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    kind = f"{short_dtype(value.dtype)}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    if node.op == "placeholder":
        ref = node.meta.get("plane")
        origin = node.meta.get("parameter", "")
        return f"  {node.name}: {kind or 'int'} = {'plane' if ref else 'input'} {origin}".rstrip()
    if node.op == "output":
        return f"  return {_text(node.args[0])}"
    arguments = ", ".join([*map(_text, node.args), *(f"{key}={_text(value)}" for key, value in node.kwargs.items())])
    name = node.target if isinstance(node.target, str) else target_name(node.target)
    site = node.meta.get("site", "")
    return f"{'*' if site else ' '} {node.name}{': ' + kind if kind else ''} = {name}({arguments}){'  # ' + site if site else ''}"


def target_name(target: Any) -> str:
    """Name of what a node calls: ``linear``, or ``sglq.linear`` of our own."""
    namespace = getattr(target, "namespace", None)
    if namespace:
        return f"{namespace}.{target._schema.name.split('::')[1]}"
    return getattr(target, "__name__", str(target))


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return (
        short_dtype(value) if isinstance(value, torch.dtype) else repr(value) if isinstance(value, str) else str(value)
    )


def short_dtype(dtype: torch.dtype) -> str:
    """``bf16`` for ``torch.bfloat16``."""
    return (
        str(dtype)
        .removeprefix("torch.")
        .replace("bfloat", "bf")
        .replace("float", "f")
        .replace("uint", "u")
        .replace("int", "i")
    )
