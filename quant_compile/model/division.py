"""How ``load`` divides a model among processes: transformers' plans over torch's meshes, checked before anything is read.

transformers makes the process group and the mesh, and turns Parameters into DTensors on the meta device. What it would only find at the
first call, heads that ranks cannot share and rows that do not come out even, is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from quant_compile.ir.errors import MissingLibraryError, OptionError
from quant_compile.lowering.identity import local_of, shard_of

WITH = "Fix: start the processes by torchrun --nproc-per-node N, and call load on each"


ALONE = "a plan for several processes was given, and there is one, which has the model whole (torchrun --nproc-per-node N starts several)"


@dataclass(frozen=True)
class Division:
    """A mesh of processes, and what transformers is told of it.

    Attributes:
        config: transformers' DistributedConfig.
        mesh: as transformers makes it.
        device: of this process.
    """

    config: Any
    mesh: Any
    device: torch.device

    @staticmethod
    def of(config: Any) -> Division | None:
        """The mesh of a DistributedConfig; None: one process has the model whole. A collective where several are asked for.

        Raises:
            OptionError: there are not as many processes.
        """
        from transformers import PreTrainedModel

        maker: Any = PreTrainedModel
        try:
            config, where, mesh = maker.prepare_distribute_model(config)
        except Exception as error:  # whatever transformers and torch raise
            raise OptionError(f"transformers cannot divide the model: {_text(error)}.\n{WITH}.") from error
        return None if mesh is None else Division(config, mesh, torch.device(where or "cpu"))

    def divide(self, model: nn.Module) -> nn.Module:
        """Make Parameters DTensors, on the meta device. Weights that were tied are to be tied again.

        Raises:
            OptionError: the model has no plan, or the ranks cannot share its heads or rows.
        """
        maker: Any = type(model)
        _untie(model)
        try:
            made = maker.maybe_distribute_model(model, self.config, self.mesh)
        except Exception as error:
            raise OptionError(
                f"transformers cannot divide {maker.__name__}: {_text(error)}.\n"
                "Fix: a plan that fits it (tp_plan={name: style}), another number of processes, or load it on one GPU."
            ) from error
        _check_heads(made, self.config.tp_size)
        _check_even(made)
        return made


def asked(distributed_config: Any, tp_plan: Any, device: Any) -> Any:
    """The DistributedConfig that the arguments of ``load`` ask for; None where they ask for none.

    Raises:
        OptionError: they contradict each other, have unknown names, or ask for what is not done here.
        MissingLibraryError: transformers is too old for it.
    """
    config = _config(distributed_config, tp_plan)
    if config is None:
        return None
    plan = getattr(config, "tp_plan", None)
    if plan is not None and plan != "auto" and not isinstance(plan, Mapping):
        raise OptionError(f'tp_plan must be "auto", or a dict of names and styles, got {plan!r}.')
    _refuse_others(config)
    if (config.tp_size or 1) > 1 and device is not None:
        raise OptionError(
            f"device={device!r} is given beside a tp_plan, under which each process has a device of its own.\n"
            "Fix: leave device out; torchrun's LOCAL_RANK says which GPU it is."
        )
    return config


def _config(distributed_config: Any, tp_plan: Any) -> Any:
    if distributed_config is None and tp_plan is None:
        return None
    if distributed_config is not None and tp_plan is not None:
        raise OptionError("distributed_config and tp_plan are both given.\nFix: DistributedConfig(tp_plan=...), alone.")
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise MissingLibraryError(f"a tp_plan needs transformers 5.17 or newer: {error}") from error
    if isinstance(distributed_config, DistributedConfig):
        return distributed_config
    given = {"tp_plan": tp_plan} if distributed_config is None else distributed_config
    if not isinstance(given, Mapping):
        raise OptionError(
            f"distributed_config is a {type(given).__name__}.\nFix: transformers' DistributedConfig, or a dict of its keys."
        )
    known = {each.name for each in fields(DistributedConfig)} if is_dataclass(DistributedConfig) else set(given)
    wrong = [str(key) for key in given if key not in known]
    if wrong:
        raise OptionError(
            f"DistributedConfig has no {', '.join(wrong)}.\nFix: its keys are {', '.join(sorted(known))}."
        )
    try:
        return DistributedConfig.from_dict(dict(given))
    except Exception as error:
        raise OptionError(f"no DistributedConfig can be made of {str(given)[:200]}: {_text(error)}.") from error


def _refuse_others(config: Any) -> None:
    """Refuse ways of several processes other than tensor and expert parallelism."""
    for name, what in (
        ("fsdp_size", "FSDP"),
        ("dp_replicate_size", "FSDP replicas"),
        ("pp_size", "pipeline parallelism"),
    ):
        if (getattr(config, name, None) or 1) > 1:
            raise OptionError(
                f"{name}={getattr(config, name)}: load divides models by tensor and expert parallelism, and not by {what}.\n"
                'Fix: DistributedConfig(tp_plan="auto") over all processes.'
            )


def _check_heads(model: Any, ranks: int) -> None:
    """Refuse ranks among which attention heads do not come out even; transformers' code would take parts of heads for heads."""
    config = model.config.get_text_config(decoder=True)
    cut = [name for name, parameter in model.named_parameters() if "att" in name.lower() and _is_cut(parameter)]
    sizes = {"num_attention_heads": True, "num_key_value_heads": any("k_proj" in name for name in cut)}
    for key, matters in sizes.items():
        heads: Any = getattr(config, key, None)
        if cut and matters and isinstance(heads, int) and heads % ranks:
            raise OptionError(
                f"{type(model).__name__} has {key} {heads}, which {ranks} processes cannot share evenly ({cut[0]}).\n"
                f"Fix: a number of processes that divides {heads}."
            )


def _check_even(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        shard = shard_of(local_of(parameter))
        if shard is not None and shard.cuts and shard.uneven and not _is_table(model, name):
            _fail(
                name,
                f"{'x'.join(map(str, shard.shape))} is divided as {shard.placements}, which does not come out even",
            )


def _untie(model: nn.Module) -> None:
    """Let each place have a Parameter of its own, as plans of transformers expect it."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            seen.add(id(parameter))


def _is_cut(parameter: Any) -> bool:
    shard = shard_of(local_of(parameter))
    return shard is not None and bool(shard.cuts)


def _is_table(model: nn.Module, name: str) -> bool:
    """Whether it is a weight of a vocabulary, whose rows transformers divides unevenly."""
    getters = (getattr(model, get, lambda: None)() for get in ("get_input_embeddings", "get_output_embeddings"))
    owner = model.get_submodule(name.rpartition(".")[0])
    return any(owner is module for module in getters)


def _fail(name: str, what: str) -> NoReturn:
    raise OptionError(f"{name}: {what}.\nFix: a number of processes that divides its sizes.")


def _text(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400].rstrip('.')}"
