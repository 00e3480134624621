"""Quantization simulated: an unmodified model runs eagerly, and chosen weights compute as their scheme says.

Weights are ``dequantize(quantize(w))``, inputs what the family quantizes and its ``linear`` reads; both are multiplied in f32, as
the families' references do. The model is not changed, and no more than a few weights exist in f32 at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.ir.errors import MeasureError, ReleasedWeightError, WeightError
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.numerics import all_finite
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.rounding import recipe
from quant_compile.lowering.rounding.recipe import Rounding, planes_of
from quant_compile.lowering.weights import STORE
from quant_compile.model.follow import Following, Made, Meeting, weights_by_address
from quant_compile.model.weights import Weight

# Bytes of values in f32 that are kept from one call to the next; at least FEW weights are, since experts are met one by one.
KEPT_BYTES, FEW = 1 << 30, 4
# Rows of the identity that inputs are multiplied by at a time.
_EYE_ROWS = 1024


def quantized_values(
    weight: Tensor, scheme: Scheme, rounding: Rounding | None = None, expert: int | None = None
) -> Tensor:
    """What a weight is once it is quantized; the one place where measuring quantizes a weight.

    Args:
        weight: [n, k], or [experts, n, k], each of which is quantized by itself.
        scheme: of the weight and its input; inputs play no part here.
        rounding: as a policy has it; None: as one that says nothing.

    Returns:
        Of the same shape, f32. Where inputs have factors, the weight that multiplies them as they were.
    """
    if weight.dim() == 3:
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for index, part in enumerate(weight):
            out[index] = quantized_values(part, scheme, rounding, index)
        return out
    planes = planes_of(weight.contiguous(), scheme, rounding or Rounding(recipe.DEFAULT), expert)
    values = family_of(scheme).dequantize_weight(planes, scheme, weight.shape[-1])
    factor = factor_of(rounding, weight.device)
    return values if factor is None else values * factor.float()


def factor_of(rounding: Rounding | None, device: torch.device) -> Tensor | None:
    """[k], what a weight's inputs are multiplied by; None: they are not."""
    return None if rounding is None or rounding.factor is None else rounding.factor.read().to(device)


def quantized_input(x: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Tensor:
    """What an input is once it is quantized.

    Families say what a product with a quantized input is, not what the input is by itself; so it is multiplied by the identity.

    Args:
        x: [..., k].
        scheme: whose ``input_activations`` say how.
        scale: calibrated, [1], of a static scheme.

    Returns:
        f32 [..., k].
    """
    if scheme.input_activations is None or not x.numel():
        return x.float()
    family, k = family_of(scheme), x.shape[-1]
    planes = family.quantize_input(x.contiguous(), scheme, scale)
    parts: list[Tensor] = []
    for start in range(0, k, _EYE_ROWS):
        stop = min(k, start + _EYE_ROWS)
        eye, ones = _identity(scheme, start, stop, k, x.device)
        parts.append(family.linear(planes, eye, None, scheme, torch.float32) / ones)
    return torch.cat(parts, -1)


def _identity(scheme: Scheme, start: int, stop: int, k: int, device: torch.device) -> tuple[Planes, Tensor]:
    """Planes of rows of the identity [stop - start, k], and what its ones became."""
    family, rows = family_of(scheme), torch.arange(stop - start, device=device)
    eye = torch.zeros(stop - start, k, device=device, dtype=torch.bfloat16)
    eye[rows, rows + start] = 1.0
    planes = family.quantize_weight(eye, scheme)
    return planes, family.dequantize_weight(planes, scheme, k)[rows, rows + start]


@dataclass(frozen=True)
class Chosen:
    """A weight and the scheme that it is to compute by.

    Attributes:
        scale: calibrated scale [1] of its input, of a static scheme.
        values: the Parameter whose values are quantized; that of ``weight`` unless the model is compared with another.
        rounding: as the policy has it.
    """

    weight: Weight
    scheme: Scheme
    scale: Tensor | None = None
    values: nn.Parameter | None = None
    rounding: Rounding | None = None

    @property
    def name(self) -> str:
        """The weight's."""
        return self.weight.site.names[0]

    @property
    def source(self) -> nn.Parameter:
        """Whose values are quantized."""
        return self.weight.parameter if self.values is None else self.values


class Values:
    """Quantized values of weights, as they are stored, made when they are asked for; few are kept.

    Args:
        kept_bytes: values in f32 that are kept.
        served: where a compiled model has planes of a linear under the scheme, these are what is measured.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES, served: bool = False) -> None:
        self.kept_bytes, self.served = kept_bytes, served
        self._kept: OrderedDict[tuple[int, Scheme, bool], Tensor] = OrderedDict()

    def of(self, chosen: Chosen, transposed: bool) -> Tensor:
        """f32, in the shape of the Parameter.

        Args:
            transposed: it is stored [k, n].

        Raises:
            WeightError: NaN or inf, or no values.
        """
        key = (id(chosen.source), chosen.scheme, transposed)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        stored = stored_values(chosen.source, chosen.name)
        if not all_finite(stored):
            raise WeightError(
                f"{chosen.name} has NaN or inf values. Fix: repair the checkpoint, or `keep` this weight in the policy."
            )
        values = self._of_planes(chosen, transposed) if self.served else None
        if values is None:
            values = quantized_values(stored.mT if transposed else stored, chosen.scheme, chosen.rounding)
        made = self._kept[key] = (values.mT if transposed else values).contiguous()
        self._make_room()
        return made

    def _of_planes(self, chosen: Chosen, transposed: bool) -> Tensor | None:
        found = STORE.served(chosen.source, chosen.scheme.spec)
        if found is None or found[0].transposed != transposed:
            return None
        key, planes = found
        rows, columns = key.shape_of(chosen.source)
        values = family_of(chosen.scheme).dequantize_weight(planes, chosen.scheme, rows if transposed else columns)
        factor = factor_of(STORE.entry(chosen.source).rounding, values.device)
        return values if factor is None else values * factor.float()

    def _make_room(self) -> None:
        total = sum(values.nbytes for values in self._kept.values())
        while total > self.kept_bytes and len(self._kept) > FEW:
            total -= self._kept.popitem(last=False)[1].nbytes


def stored_values(parameter: nn.Parameter, name: str) -> Tensor:
    """A weight's own values.

    Raises:
        WeightError: it has none: on the meta device, or released.
    """
    if parameter.is_meta:
        raise WeightError(f"{name} is on the meta device and has no values. Fix: load the weights first.")
    try:
        return parameter.detach()
    except ReleasedWeightError as error:
        raise WeightError(f"{name} cannot be measured: {error}") from None


@dataclass(frozen=True)
class Compared:
    """A product and what it is quantized, both in f32."""

    plain: Tensor
    quantized: Tensor


class Simulation(Following):
    """Under this context products with the chosen weights are what their schemes make of them; all others are the model's.

    A model that is moved to other memory in the meantime is not seen: enter it anew for each run.
    """

    def __init__(self, chosen: Iterable[Chosen], values: Values | None = None) -> None:
        self.chosen = {each.name: each for each in chosen}
        super().__init__(weights_by_address({name: each.weight.parameter for name, each in self.chosen.items()}))
        self.values = values or Values()
        self._made: _MadeInput | None = None
        self._storages: dict[int, list[tuple[int, int, str]]] = {}
        for name, each in self.chosen.items():
            parameter = each.weight.parameter
            start = parameter.data_ptr()
            own = (start, start + parameter.nbytes, name)
            self._storages.setdefault(parameter.untyped_storage().data_ptr(), []).append(own)

    def _known(self, tensor: Tensor) -> Made | None:
        found = super()._known(tensor)
        if found is not None or tensor.device.type == "meta":
            return found
        ranges = self._storages.get(tensor.untyped_storage().data_ptr(), ())
        name = next((name for start, stop, name in ranges if start <= tensor.data_ptr() < stop), None)
        return None if name is None else Made(name)

    def meet(self, meetings: list[Meeting]) -> Any:
        found = meetings[0]
        return self.quantized(found).to(_dtype(found.x))

    def quantized(self, found: Meeting, chosen: Chosen | None = None) -> Tensor:
        """The product as the weight's scheme computes it, f32.

        Args:
            chosen: another scheme for the weight.
        """
        chosen = chosen or self.chosen[found.made.weight]
        values = self._values(found, chosen)
        return _product(found, self._input(found, chosen), values)

    def compared(self, found: Meeting, chosen: Chosen | None = None) -> Compared:
        """The product as it is and as the weight's scheme computes it, f32 both."""
        return Compared(_product(found, found.x.float(), found.weight.float()), self.quantized(found, chosen))

    def _input(self, found: Meeting, chosen: Chosen) -> Tensor:
        """x as the scheme makes it, f32; weights that read one input one after the other get it once."""
        if chosen.scheme.input_activations is None or _summed(found)[0] is None:
            return found.x.float()
        factor = factor_of(chosen.rounding, found.x.device)
        if torch.is_grad_enabled():  # what is kept would keep its graph
            return _quantized_input(found, chosen, factor)
        if self._made is not None and self._made.serves(found, chosen, factor):
            return self._made.made
        made = _quantized_input(found, chosen, factor)
        self._made = _MadeInput(
            found.x.clone(), found.x.data_ptr(), _kind_of(found, chosen), chosen.scale, factor, made
        )
        return made

    def _values(self, found: Meeting, chosen: Chosen) -> Tensor:
        """Quantized values in the shape of the product's operand."""
        parameter, operand = chosen.weight.parameter, found.weight
        shared = operand.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        transposed = _columns(found, parameter) if shared else None
        values = self.values.of(chosen, chosen.weight.transposed if transposed is None else transposed)
        if not shared or operand.dtype != parameter.dtype:
            return found.made.of(values)
        if parameter.is_contiguous():  # any view of it is the same view of the values
            offset = operand.storage_offset() - parameter.storage_offset()
            return values.as_strided(operand.shape, operand.stride(), offset)
        return found.made.of(values)


@dataclass(frozen=True)
class _MadeInput:
    """An input that was quantized.

    Attributes:
        x: as it was, since a model may write over it.
        address: of its first value then.
        kind: what else than numbers made it.
    """

    x: Tensor
    address: int
    kind: tuple[Any, ...]
    scale: Tensor | None
    factor: Tensor | None
    made: Tensor

    def serves(self, found: Meeting, chosen: Chosen, factor: Tensor | None) -> bool:
        """Whether it is what a product takes."""
        if found.x.data_ptr() != self.address or self.kind != _kind_of(found, chosen):
            return False
        return _same(self.scale, chosen.scale) and _same(self.factor, factor) and torch.equal(self.x, found.x)


def _kind_of(found: Meeting, chosen: Chosen) -> tuple[Any, ...]:
    rows = None if found.rows is None else int(found.rows[-1])
    x, kind = found.x, found.x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return chosen.scheme, _summed(found)[0], rows, x.shape, x.stride(), x.dtype, cast


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _columns(found: Meeting, parameter: nn.Parameter) -> bool | None:
    """Whether a weight that is met as a view is stored [k, n], by which of its dimensions is summed; None: it does not show."""
    operand = found.weight
    dim = -2 if found.product is None else _summed(found)[1]
    rows, columns = parameter.stride()[-2:]
    if dim is None or rows == columns or min(parameter.shape[-2:]) == 1:
        return None
    step = operand.stride(dim)
    return None if step not in (rows, columns) else step == rows


def _summed(found: Meeting) -> tuple[int | None, int | None]:
    """The dimension of x and of the weight's operand that a product sums over; None where that is not one."""
    if found.product is None:
        return -1, -2
    left, right, out = found.product.letters
    x, weight = (right, left) if found.swapped else (left, right)
    both = [letter for letter in x if letter in weight and letter not in out]
    return (x.index(both[0]), weight.index(both[0])) if len(both) == 1 else (None, None)


def _quantized_input(found: Meeting, chosen: Chosen, factor: Tensor | None) -> Tensor:
    """x as the scheme makes it, f32; the summed dimension is its last one while it is quantized."""
    dim = _summed(found)[0]
    assert dim is not None
    x = found.x if found.rows is None else found.x[: int(found.rows[-1])]
    rows = x.movedim(dim, -1)
    made = quantized_input(rows if factor is None else rows * factor.to(x.dtype), chosen.scheme, chosen.scale)
    made = (made if factor is None else made / factor.float()).movedim(-1, dim)
    if made.shape == found.x.shape:
        return made
    return torch.cat([made, made.new_zeros(found.x.shape[0] - made.shape[0], *made.shape[1:])])


def _product(found: Meeting, x: Tensor, weight: Tensor) -> Tensor:
    """The product of a call over other operands; a bias and the like in f32 too."""
    with torch.autocast(found.x.device.type, enabled=False):
        if found.product is None:
            return _in_groups(x, weight, found.rows)
        swap: dict[int, Tensor] = {id(found.x): x, id(found.weight): weight}
        return found.func(
            *(_swapped(arg, swap) for arg in found.args),
            **{key: _swapped(value, swap) for key, value in found.kwargs.items()},
        )


def _swapped(value: Any, swap: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        other = swap.get(id(value))
        return other if other is not None else value.float() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        items: Iterable[Any] = value
        return type(value)(_swapped(item, swap) for item in items)
    return value


def _in_groups(x: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
    """Rows [t, k] in groups times [experts, k, n], one expert each; what comes after the last group is 0."""
    if ends is None:
        return torch.bmm(x, weight)
    if x.dim() != 2 or weight.dim() != 3:
        raise MeasureError(
            f"a grouped product of {x.dim()} and {weight.dim()} dimensions is not known. Fix: `keep` these experts, or "
            'model.set_experts_implementation("eager").'
        )
    parts: list[Tensor] = []
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        parts.append(x[start:stop] @ weight[expert])
        start = stop
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, weight.shape[-1])])


def _dtype(x: Tensor) -> torch.dtype:
    """Of a product with x as the model computes it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


Observe = Callable[[Meeting], None]
"""What is done with each product that is met."""


class Watching(Simulation):
    """Shows each product with a chosen weight, and computes what the model does."""

    def __init__(self, chosen: Iterable[Chosen], observe: Observe, values: Values | None = None) -> None:
        super().__init__(chosen, values)
        self.observe = observe

    def meet(self, meetings: list[Meeting]) -> Any:
        result = meetings[0].call()
        for found in meetings:
            self.observe(found)
        return result
