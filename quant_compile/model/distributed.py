"""Models that torch.distributed divides: what is refused, by errors that name the place and the way out, and parts that stand alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from quant_compile.ir.errors import OptionError
from quant_compile.ir.shards import Shard, is_distributed, local_tensor
from quant_compile.lowering.identity import anchor_of, peek_anchor, shard_of
from quant_compile.lowering.weights import claim, disclaim
from quant_compile.model.places import Place, by_parameter, is_a, parameters_of, places

FORWARD = "_sglquant_forward"
"""Where a module keeps its ``forward`` that another stands for."""


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse what gathers weights at each call: its planes would be made of tensors that are gone after it.

    Raises:
        OptionError: a module is wrapped by FSDP2 (``fully_shard``).
    """
    found = next((name for name, module in model.named_modules() if is_a(module, "torch", "FSDPModule")), None)
    if found is not None:
        raise OptionError(
            f"{found or 'the model'} is wrapped by FSDP2 (fully_shard), which gathers its weights anew at each call.\n"
            "Fix: load the model with tp_plan, or whole, and compile that. Nothing has been changed."
        )


@dataclass(frozen=True, eq=False)
class Whole:
    """What the distributed Parameter was that this rank's part stands for.

    Attributes:
        spec: torch's DTensorSpec: mesh, placements, shape, strides.
        hook: keeps ``state_dict`` as it was.
    """

    spec: Any
    hook: RemovableHandle

    def of(self, part: Tensor) -> Tensor:
        """The DTensor that has this local tensor."""
        return _distributed(part, self.spec)


def with_part(whole: Any, part: Tensor) -> Tensor:
    """A distributed Parameter that is divided as ``whole`` is, and whose local tensor is ``part``, the very object."""
    made = _distributed(part, whole._spec)
    made._is_param = True  # type: ignore[attr-defined]
    return made


def _distributed(part: Tensor, spec: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor(part, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def stand_in(model: nn.Module, wanted: Callable[[Parameter], bool] = lambda _: True) -> None:
    """Let this rank's parts of weights stand in their modules in place of DTensors, so that their values can be freed.

    A module of transformers takes the local tensor of a DTensor when it is called without gradients, and a plain Parameter as it is.
    A read of a released one can be refused; torch gives the values of a DTensor to kernels without asking anybody. ``state_dict`` has
    DTensors as before. Weights of embeddings stay as they are.

    Args:
        wanted: of which parts.
    """
    for held in by_parameter(model).values():
        if len(held) == 1 and not isinstance(held[0].module, nn.Embedding) and wanted(held[0].parameter):
            _stand_in(held[0])
            _keep_sum(held[0])


def _keep_sum(place: Place) -> None:
    """Let ranks' experts be added still, where transformers' hook does so only while a Parameter of the module is a DTensor."""
    module, shard = place.module, shard_of(place.parameter)
    if shard is None or not shard.cuts or FORWARD in vars(module) or not _asks_for_dtensors(module.forward):
        return
    if any(is_distributed(parameter) for parameter in module._parameters.values()):
        return
    from transformers.distributed import tensor_parallel

    before, group = module.forward, shard.mesh.get_group(shard.cuts[0][2])
    add: Any = tensor_parallel._AllReduceForward  # pyright: ignore[reportPrivateUsage]
    vars(module)[FORWARD] = before
    module.forward = lambda *args, **kwargs: add.apply(before(*args, **kwargs), group)


def _asks_for_dtensors(forward: Any) -> bool:
    """Whether a module's hook is the one of transformers 5.17 for experts, which is told where its output comes from and looks itself."""
    names: tuple[str, ...] = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(forward, "__closure__", None) or (), strict=False))
    style = cells["self"].cell_contents if "self" in cells else None
    after = getattr(style, "transform_output_post_forward", None)
    return type(style).__name__ == "MoeExpertsParallel" and "source" in inspect.signature(after).parameters  # type: ignore[arg-type]


def _stand_in(place: Place) -> None:
    whole, part = place.module._parameters.get(place.attribute), place.parameter
    shard = shard_of(part)
    if whole is None or not is_distributed(whole) or shard is None or not shard.cuts:
        return
    spec: Any = whole._spec  # pyright: ignore[reportAttributeAccessIssue]
    anchor, attribute = anchor_of(part), place.attribute
    if type(part) is Tensor:
        part.__class__ = Parameter  # the very object, so that what is known of it stays known
    place.module._parameters[attribute] = part

    def as_before(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if prefix + attribute in state:
            state[prefix + attribute] = anchor.whole.of(state[prefix + attribute])

    anchor.whole = Whole(spec, place.module.register_state_dict_post_hook(as_before))
    claim(part)


def put_back(model: nn.Module) -> None:
    """Undo ``stand_in`` for weights that have their values."""
    for place in places(model):
        part, anchor = place.parameter, peek_anchor(place.parameter)
        if anchor is None or anchor.whole is None or getattr(part, "released_by_sglquant", False):
            continue
        disclaim(part)
        part.__class__ = Tensor  # pyright: ignore[reportAttributeAccessIssue]
        whole = anchor.whole.of(part)
        whole._is_param = True
        place.module._parameters[place.attribute] = whole
        if FORWARD in vars(place.module):
            place.module.forward = vars(place.module).pop(FORWARD)
        anchor.whole.hook.remove()
        anchor.whole = None


def own_part(parameter: Parameter, source: Tensor) -> Tensor:
    """Of a tensor that a source has for a weight what this rank has of the weight; the tensor itself where that is all of it."""
    if is_distributed(source):
        return local_tensor(source)
    shard = shard_of(parameter)
    return source if shard is None or tuple(source.shape) != shard.shape else shard.part_of(source)


def refuse_parts(model: nn.Module, what: str) -> None:
    """Refuse what needs whole weights.

    Args:
        what: the function, for the message.

    Raises:
        OptionError: ranks have a weight in parts.
    """
    found = _cut(model)
    if found is not None:
        raise OptionError(
            f"{what} needs whole weights, and ranks have those of this model in parts ({found.placements}).\n"
            "Fix: call it for the model loaded without tp_plan; a policy that it writes serves the divided model too."
        )


def has_parts(model: nn.Module) -> bool:
    """Whether ranks have a weight in parts."""
    return _cut(model) is not None


def _cut(model: nn.Module) -> Shard | None:
    """How the first weight that ranks have in parts is divided."""
    return next((shard for p in parameters_of(model) if (shard := shard_of(p)) is not None and shard.cuts), None)
