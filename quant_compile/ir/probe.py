"""Run a region of a graph once, on the CPU, with random inputs and expert weights of rank one.

An expert weight is ``W[e] = size[e] * outer(left, right)``, so a product with it costs a dot product and no memory, whatever
E, n and k are, and is exact: the region computes what it would compute with these weights. Floats are f64 (f32 where the
region is large); casts between float dtypes are left out, so that the result can be compared digit by digit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg
from torch.nn import Parameter

from quant_compile.ir.moe import random_ids
from quant_compile.ir.operands import Operands, op_of, operands_of
from quant_compile.ir.stored import CASTS, KEEPS, permutation

# Elements of the largest value in a region up to which f64 is used.
WIDE_ELEMENTS = 1 << 23
CAST_METHODS = {"float", "double", "bfloat16", "half"}


class ProbeError(Exception):
    """Why a region could not be run."""


@dataclass(frozen=True, eq=False)
class RankOne:
    """``W[e] [n, k] = size[e] * outer(left [n], right [k])`` for all experts, or gathered by ids [r] for some rows.

    Attributes:
        slot: which input of the region it is.
        transposed: whether the value in the graph is [.., k, n], n and k being what its product makes of it.
    """

    slot: int
    size: Tensor
    rows: Tensor
    columns: Tensor
    swapped: bool = False
    ids: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.size.shape[0]

    @property
    def n(self) -> int:
        """Rows of one expert."""
        return self.rows.shape[0]

    @property
    def k(self) -> int:
        """Columns of one expert."""
        return self.columns.shape[0]

    def times(self, x: Tensor, ids: Tensor) -> Tensor:
        """``W[ids[r]] @ x[r]`` for rows [r, k] -> [r, n]; rows of ids outside of 0..E-1 become zero."""
        inside = (ids >= 0) & (ids < self.experts)
        size = self.size[ids.clamp(0, self.experts - 1)] * inside
        return (size * (x @ self.columns)).unsqueeze(-1) * self.rows

    def flipped(self) -> RankOne:
        """The transpose of each expert."""
        return replace(self, rows=self.columns, columns=self.rows, swapped=not self.swapped)


@dataclass(frozen=True, eq=False)
class Given:
    """One input of the region: a value, or an expert weight."""

    value: Any
    weight: RankOne | None = None

    def rank_one(self, transposed: bool) -> RankOne:
        """The weight as its product reads it, [n, k] an expert."""
        assert self.weight is not None
        return self.weight.flipped() if transposed else self.weight


@dataclass(frozen=True)
class Product:
    """A product with an expert weight: which input it is, and whether the Parameter is stored [k, n]."""

    slot: int
    transposed: bool


@dataclass(frozen=True, eq=False)
class Probe:
    """Inputs, products in order, and result of one run."""

    inputs: tuple[Given, ...]
    products: tuple[Product, ...]
    result: Tensor


def value_of(node: fx.Node) -> Tensor | None:
    """The fake tensor that Dynamo knows for a node."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def number_of(node: fx.Node) -> float | None:
    """Value of a Python float that Dynamo made an input (with ``dynamic=True``): a 0-d tensor, or the symbol read from it."""
    value = node.meta.get("example_value")
    if isinstance(value, Tensor) and value.dim() == 0 and node.op == "placeholder":
        value = next((user.meta.get("example_value") for user in node.users if user.target == "item"), None)
    return None if not isinstance(value, torch.SymFloat) or value.node.hint is None else float(value.node.hint)


def run_region(
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    result: fx.Node,
    parameters: Mapping[int, Parameter],
    experts_of: Collection[fx.Node],
    size: float,
) -> Probe:
    """Run ``nodes`` over random inputs.

    Args:
        experts_of: the inputs that are expert weights.
        size: standard deviation of the first product's results.

    Raises:
        ProbeError: an op over expert weights that is no product, or an op that failed on such inputs.
    """
    with torch.no_grad(), torch.inference_mode(False), torch._C._DisableFuncTorch(), _real():
        generator = torch.Generator().manual_seed(1234)
        elements = max((_elements(n) for n in nodes), default=0)
        # Known before any input is made: ids may come before the weights, and should name every expert.
        experts = max((parameters[n.meta["argument"]].shape[0] for n in inputs if n in experts_of), default=1)
        runner = _Runner(torch.float64 if elements <= WIDE_ELEMENTS else torch.float32, experts)
        given = tuple(runner.make(i, node, node in experts_of, generator, size) for i, node in enumerate(inputs))
        env: dict[fx.Node, Any] = {
            n: g.weight if g.weight is not None else g.value for n, g in zip(inputs, given, strict=True)
        }
        before = [g.value.clone() if isinstance(g.value, Tensor) else None for g in given]
        last = {argument: node for node in nodes for argument in node.all_input_nodes}
        for node in nodes:
            env[node] = runner.run(node, env)
            for argument in node.all_input_nodes:
                if last[argument] is node and argument is not result:
                    env.pop(argument, None)
        for node, old, now in zip(inputs, before, given, strict=True):
            if old is not None and not torch.equal(old, now.value):
                raise ProbeError(f"it writes into its input {node.name}")
        if not isinstance(env.get(result), Tensor):
            raise ProbeError("its result is not a tensor")
        return Probe(given, tuple(runner.products), env[result])


def _real() -> Any:
    """Out of Dynamo's fake mode: the probe computes with numbers."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def _elements(node: fx.Node) -> int:
    value = value_of(node)
    return 0 if value is None else int(torch.Size(map(_size, value.shape)).numel())


def _size(value: Any) -> int:
    """A size as a number: symbols take the value they were traced with.

    Raises:
        ProbeError: it is known only once the graph runs.
    """
    if not isinstance(value, torch.SymInt):
        return int(value)
    if value.node.hint is None:
        raise ProbeError(f"the size {value} depends on data")
    return int(value.node.hint)


class _Runner:
    def __init__(self, dtype: torch.dtype, experts: int) -> None:
        self.dtype, self.experts = dtype, experts
        self.products: list[Product] = []

    def make(self, i: int, node: fx.Node, is_weight: bool, generator: torch.Generator, size: float) -> Given:
        """A random value like the node's."""
        value = node.meta["example_value"]
        number = number_of(node)
        if number is not None:
            return Given(torch.tensor(number, dtype=self.dtype) if isinstance(value, Tensor) else number)
        if isinstance(value, torch.Size):
            return Given(torch.Size(map(_size, value)))
        if not isinstance(value, Tensor):
            return Given(_size(value))
        shape = tuple(map(_size, value.shape))

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=self.dtype)

        if is_weight:
            # A row of x times ``columns`` has the standard deviation ``size``; of later products it does not matter.
            scale = random(shape[0]).abs() + 0.5
            return Given(None, RankOne(i, scale, random(shape[1]), random(shape[2]) * (size / shape[2] ** 0.5)))
        if value.dtype.is_floating_point:
            return Given(random(*shape))
        if value.dtype == torch.bool:
            return Given(torch.ones(shape, dtype=torch.bool))
        return Given(self._ids(shape, generator))

    def _ids(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Distinct experts for each token, as a router gives them."""
        if len(shape) == 2 and shape[1] <= self.experts:
            return random_ids(shape[0], self.experts, shape[1], "cpu", generator)
        return torch.randint(self.experts, shape, generator=generator)

    def run(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """One node; a question about the device that nobody waits for is left out."""
        if not node.users and not node.all_input_nodes:
            return None
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
        weights = [a for a in (*args, *kwargs.values()) if isinstance(a, RankOne)]
        try:
            if weights:
                return self._over_weight(node, args, kwargs)
            return self._plain(node, *self._localized(args, kwargs))
        except ProbeError:
            raise
        except Exception as error:
            raise ProbeError(f"{name_of(node)} failed on random inputs: {error}") from error

    def _localized(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Devices become the CPU, float dtypes the probe's."""

        def local(value: Any) -> Any:
            if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
                return torch.device("cpu")
            if isinstance(value, torch.dtype) and value.is_floating_point:
                return self.dtype
            return value

        return map_aggregate(args, local), map_aggregate(kwargs, local)

    def _plain(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_method":
            if node.target in CAST_METHODS:
                return args[0].to(self.dtype)
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            if op_of(node) == "histc":  # of whole numbers on a GPU, where alone it takes them
                args = (args[0].to(self.dtype), *args[1:])
            return node.target(*args, **kwargs)  # type: ignore[operator]
        raise ProbeError(f"{node.op} {node.target} in the block")

    # -- ops over expert weights ---------------------------------------------------------------------------------------

    def _over_weight(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name = name_of(node)
        if name == "grouped_mm":
            return self._product(_grouped, name, args, kwargs)
        given = self._bound(node, args, kwargs)
        if name in _PRODUCTS:
            return self._product(_batched, name, [given.pop(key, None) for key in _PRODUCTS[name]], given)
        weight = given.get("self")
        if not isinstance(weight, RankOne):
            raise ProbeError(f"{name} over expert weights is not understood")
        if name in ("getitem", "index_select") and weight.ids is None and given.get("dim", 0) == 0:
            index: Any = given["index"]
            if isinstance(index, tuple) and len(index) == 1:  # pyright: ignore[reportUnknownArgumentType]
                index = index[0]
            if isinstance(index, Tensor) and index.dim() == 1 and not index.dtype.is_floating_point:
                return replace(weight, ids=index.long())
        if name in KEEPS or name in CASTS:
            return weight
        order = permutation(name, given, 3)
        if order is not None and order[0] == 0:
            return weight if order == (0, 1, 2) else weight.flipped()
        plain = tuple(value for key, value in given.items() if key != "self" and not isinstance(value, Tensor))
        raise ProbeError(f"{name}{plain} over expert weights is not understood")

    def _bound(self, node: fx.Node, args: Any, kwargs: Any) -> Operands:
        """Operands by name; the nodes tell which overload it is, since a weight is no tensor here."""
        if node.target is getattr:
            return {"self": args[0]}
        known = operands_of(node)
        if known is None:
            raise ProbeError(f"{name_of(node)} over expert weights is not understood")
        values = dict(
            zip([*map(id, node.args), *map(id, node.kwargs.values())], [*args, *kwargs.values()], strict=True)
        )
        return {key: values.get(id(value), value) for key, value in known.items()}

    def _product(self, product: Callable[..., tuple[Tensor, RankOne]], name: str, args: Any, kwargs: Any) -> Tensor:
        try:
            result, weight = product(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise ProbeError(f"{name} over expert weights is not understood: {error}") from error
        self.products.append(Product(weight.slot, weight.swapped))
        return result


def name_of(node: fx.Node) -> str:
    """Name of the op that a node calls: ``bmm``, ``getitem``, ``grouped_mm`` for every grouped product."""
    name = op_of(node)
    return "grouped_mm" if "grouped_mm" in name else name


def _grouped(a: Tensor, w: RankOne, offs: Tensor | None = None, **ignored: Any) -> tuple[Tensor, RankOne]:
    """``a [r, k]`` in groups that end at ``offs`` times ``w [E, k, n]``; rows after the last group are zero."""
    if offs is None or w.ids is not None or a.dim() != 2:
        raise ValueError("groups by offsets over all experts are expected")
    ids = torch.searchsorted(offs.to(torch.long), torch.arange(a.shape[0]), right=True)
    weight = w.flipped()
    return weight.times(a, ids), weight


def _batched(left: Any, right: Any) -> tuple[Tensor, RankOne]:
    """bmm or matmul: one expert for each batch, weight on either side."""
    weight: RankOne = left if isinstance(left, RankOne) else right.flipped()
    x = right.transpose(-2, -1) if isinstance(left, RankOne) else left
    if not isinstance(x, Tensor) or x.dim() < 3:
        raise ValueError("a batch of experts is expected")
    ids = torch.arange(weight.experts) if weight.ids is None else weight.ids
    if x.shape[-3] not in (1, ids.shape[0]) or (x.shape[-3] == 1 and x.dim() > 3):
        raise ValueError("one batch for each expert is expected")
    x = x.expand(*x.shape[:-3], ids.shape[0], *x.shape[-2:])
    rows = ids.reshape(-1, 1).expand(*x.shape[:-1]).reshape(-1)
    y = weight.times(x.reshape(-1, x.shape[-1]), rows).reshape(*x.shape[:-1], weight.n)
    return (y.transpose(-2, -1) if isinstance(left, RankOne) else y), weight


# Names of both operands.
_PRODUCTS = {"bmm": ("self", "mat2"), "matmul": ("self", "other")}
