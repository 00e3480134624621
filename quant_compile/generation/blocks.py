"""Compile a model's repeated blocks once for all of them, and run what is around them as it is.

Compiling a whole model takes time with every layer. Dynamo guards no Parameters, and planes are inputs of compiled graphs, so one
graph of a decoder layer serves all layers, if nothing in it tells them apart: a layer's number in the cache does, hence ``OneLayer``.
Launching block by block costs the host more than one large graph does, which no one sees where steps are CUDA graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.generation import caches
from quant_compile.generation.calls import enter
from quant_compile.generation.inputs import marked
from quant_compile.generation.weights import has_hooks
from quant_compile.model.places import modules_of
from quant_compile.model.weights import linear_weights, possible_weights
from quant_compile.rules import Decides

CALL = "_compiled_call_impl"  # what ``nn.Module.__call__`` looks for
FEWEST = 3  # blocks of one kind, for which one graph instead of one for each pays


class OneLayer:
    """What a block sees of a cache: the layer that it writes, whatever its number is."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As of transformers' caches."""
        return self.layer.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """As of transformers' caches."""
        return self.layer.get_seq_length()


@dataclass(frozen=True)
class Blocks:
    """What is compiled of a model.

    Attributes:
        repeated: its blocks, with their layer of the cache.
        single: modules outside of them whose weights the policy names.
    """

    repeated: tuple[tuple[int, nn.Module], ...]
    single: tuple[nn.Module, ...]


def blocks_of(model: nn.Module, policy: Decides) -> Blocks | None:
    """The blocks of a decoder; None where they are not all that is to be quantized but for single linears."""
    found = next(_layers(model), None)
    if found is None:
        return None
    name, layers = found
    inside = f"{name}."
    modules = dict(modules_of(model))
    single: dict[int, nn.Module] = {}
    # What is eager around the blocks is not traced, so that a product with any other parameter would stay in 16 bits.
    for weight in (*linear_weights(model), *possible_weights(model)):
        if any(n.startswith(inside) for n in weight.site.names) or policy.decide(weight.site).scheme is None:
            continue
        module = next((modules[n] for n in weight.site.names if isinstance(modules.get(n), nn.Linear)), None)
        if module is None:
            return None
        single[id(module)] = module
    return Blocks(tuple(enumerate(layers)), tuple(single.values()))


def layer_names(model: Any) -> list[str]:
    """Names of a decoder's layers; ``layers.0`` and so on where they are in no list of modules."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    name = next((name for name, _ in _layers(model, alike=False)), "layers")
    return [f"{name}.{i}" for i in range(count)]


def _layers(model: Any, alike: bool = True) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of as many modules as the decoder has layers, the outermost first; ``alike``: enough of them, of one class."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    within = set(decoder.modules())
    for name, module in modules_of(model):
        if not isinstance(module, nn.ModuleList) or module not in within:
            continue
        if len(module) != count:
            continue
        if not alike or (count >= FEWEST and len({type(m) for m in module}) == 1):
            yield name, module


class Active(threading.local):
    """Whether this thread is inside of a call that runs block by block, and the inputs that its blocks share."""

    depth = 0

    def __init__(self) -> None:
        self._marked: dict[tuple[str, int], tuple[Any, Any]] = {}

    def __enter__(self) -> Active:
        self.depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if not self.depth:
            self._marked.clear()

    def marked(self, name: str, value: Any) -> Any:
        """``marked`` of an input, once for all blocks that get the same object: masks, positions and their embeddings."""
        found = self._marked.get((name, id(value)))
        if found is None:
            found = self._marked[name, id(value)] = value, marked(name, value)
        return found[1]


class BlockCall:
    """A block's call: compiled inside of a call that runs block by block, else as it was.

    Args:
        run: ``(block, *args, **kwargs)``, compiled.
        index: the block's layer of the cache.
        cache: what the block calls its cache.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        cache: str,
        run: Callable[..., Any],
        active: Active,
    ) -> None:
        self._plain, self._block, self._index, self._cache = block._call_impl, block, index, cache
        self._run, self._active = run, active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or not self._active.depth:
            return self._plain(*args, **kwargs)
        kwargs = {name: self._active.marked(name, value) for name, value in kwargs.items()}
        found: Any = kwargs.get(self._cache)
        if isinstance(found, caches.types().static):
            kwargs[self._cache] = OneLayer(found.layers[self._index])
        hidden = [marked("hidden_states", value) for value in args]
        enter()
        return self._run(self._block, *hidden, **kwargs)


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether any module has hooks, which one graph for all blocks would give to none of them or to all."""
    stack = list(modules)
    while stack:
        module = stack.pop()
        if has_hooks(module):
            return True
        stack += [child for child in vars(module)["_modules"].values() if child is not None]
    return False


def around_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that run as they were written, around its blocks; none where it is compiled as a whole."""
    calls = {id(m) for m in model.modules() if isinstance(vars(m).get(CALL), BlockCall)}
    inside = {id(part) for m in model.modules() if id(m) in calls for part in m.modules()}
    return [m for m in model.modules() if id(m) not in inside] if calls else []


def call_block(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What is compiled once for all blocks."""
    return module._call_impl(*args, **kwargs)
