"""``HfConfig`` and the quantizer behind it: ``load`` under transformers' own name, ``from_pretrained(..., quantization_config=...)``.

Imported at the first use of ``quant_compile.HfConfig``, since it imports transformers, and enters both in transformers' registries.
transformers builds the model, reads the files, converts and places tensors; here weights that the policy names are quantized as
they come, one at a time, and the model is compiled at the end. A folder in the format ``packed`` has the same quantizer in its config:
weights that have planes are taken out of the model before transformers reads the files, so that none is made up, and put back over
their planes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant_compile import api
from quant_compile.checkpoints import packed
from quant_compile.checkpoints.description import PACKED
from quant_compile.checkpoints.errors import CheckpointError, SaveError
from quant_compile.checkpoints.files import Files, read_json
from quant_compile.checkpoints.fill import AS_READ, adopt_values
from quant_compile.checkpoints.names import Slot, slots_of
from quant_compile.checkpoints.wishes import Wishes
from quant_compile.ir.errors import OptionError, QuantError
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.select import Request
from quant_compile.lowering.target import Target, default_policy
from quant_compile.lowering.weights import claim_before_tracing
from quant_compile.model import cache_scales
from quant_compile.model.ledger import LEDGER
from quant_compile.options import Options
from quant_compile.policy import Policy
from quant_compile.pretrained import packed_policy, used_times

METHOD = PACKED
# Tensors of a packed folder that are no weights of the model.
_PLANES = r"^(?:slab|input_scale|input_order|input_factor|cache_scale)\."


@register_quantization_config(METHOD)
class HfConfig(QuantizationConfigMixin):
    """What ``from_pretrained(..., quantization_config=HfConfig("W8A16"))`` quantizes and compiles by.

    Args:
        policy: as in ``load``; None: the device's default.
        options: of ``compile``.

    Raises:
        OptionError, PolicyError: here, before anything is read.
    """

    def __init__(self, policy: Any = None, **options: Any) -> None:
        options.pop("quant_method", None)  # of a dict that transformers reads
        self.packed = options.get("format") == packed.FORMAT  # as ``save`` writes it
        if self.packed:
            options.pop("format")
            options.pop("version", None)  # sglquant.json says it too
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  (a text, as others register it)
        self.policy = None if policy is None else Policy.load(policy)
        self.options = options
        Options.of({**options, "policy": self.policy})

    def to_dict(self) -> dict[str, Any]:
        """In values that JSON has."""
        if self.packed:
            return packed.quantization_config()
        policy = None if self.policy is None else self.policy.to_dict()
        return {"quant_method": METHOD, "policy": policy, **self.options}


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    """Quantizes by the policy as weights are read; where a model is spread over devices, at its first call instead."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._options: dict[str, Any] = quantization_config.options
        self.policy: Policy | None = quantization_config.policy
        self.failure: QuantError | None = None
        self.late = ""
        self._is_packed: bool = quantization_config.packed
        self._packed: _PackedFolder | None = None
        self._slots: dict[str, tuple[Slot, Scheme]] = {}
        self._dtype = torch.get_default_dtype()
        self._wishes = Wishes()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """transformers tells the dtype of the model here."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Find the weights that the policy names, and change nothing; of a packed folder take out those that have planes.

        Raises:
            CheckpointError, OptionError: a packed folder does not fit the model, the dtype or the devices.
        """
        if self._is_packed:
            self._packed = _PackedFolder.of(model, checkpoint_files or (), device_map, self._dtype)
            return
        target = Target.of(_device(device_map))
        self.policy = self.policy or Policy.load(default_policy(target))
        if not _one_place(device_map):
            self.late = (
                "a device_map over several devices: weights are quantized at the first call, not as they are read"
            )
        elif getattr(model.config, "distributed_config", None) is not None:
            self.late = "a distributed model: weights are quantized at the first call, not as they are read"
        if self.late:
            return
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._wishes = wishes = Wishes.of(model, self.policy, self.policy.fallback, target, Request())
        alike = {*tied, *tied.values()}
        for name, slot in slots_of(model).items():
            found = wishes.plain(slot)
            if found is not None and not alike & set(slot.names):
                self._slots[name] = slot, found

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight is quantized as it is read."""
        return param_name in self._slots

    def get_quantize_ops(self) -> ConversionOps:
        """What does that."""
        return _Quantize(self._take)

    def _take(self, name: str, values: torch.Tensor) -> bool:
        """Quantize a weight that is read, into its place; False where it cannot be, and why is raised once all is read."""
        if name not in self._slots:
            return False
        slot, scheme = self._slots[name]
        if values.shape != slot.tensor.shape:
            return False  # transformers says so
        try:
            with torch.no_grad():
                made = adopt_values(
                    slot, values, scheme, self._dtype, values.device, AS_READ, self._wishes.rounding(slot)
                )
        except QuantError as error:
            self.failure = self.failure or error
            return False
        made._is_hf_initialized = True  # type: ignore[attr-defined]
        return True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Compile.

        Raises:
            WeightError: values are NaN or inf.
        """
        if self._packed is not None:
            return self._packed.into(model.eval(), self._options)
        if self.failure is not None:
            raise self.failure
        claim_before_tracing(p for p in cast(nn.Module, model).parameters() if p.dim() > 1)
        compiled = api.compile(model.eval(), self.policy, **{"release_weights": True, **self._options})
        if self.late:
            LEDGER.session(compiled, cast(Policy, self.policy), "").notes[self.late] = None
        return compiled

    def is_serializable(self) -> Any:
        """transformers asks before it saves.

        Raises:
            SaveError: always; what would be written has no values.
        """
        raise SaveError(
            "save_pretrained cannot write weights that sglquant has quantized.\n"
            "Fix: quant_compile.save(model, directory), which from_pretrained reads."
        )

    @property
    def is_trainable(self) -> Any:
        """Gradients do not pass quantized products."""
        return False

    @property
    def is_compileable(self) -> bool:
        """It is compiled already."""
        return True


@dataclass(frozen=True)
class _PackedFolder:
    """A folder that ``save`` has packed, checked against a model.

    Attributes:
        packed: what it holds.
        device: of the model.
        unexpected: names that the model's class lets files have besides its own.
    """

    packed: packed.Packed
    device: torch.device
    unexpected: Any

    @staticmethod
    def of(model: Any, checkpoint_files: Sequence[str], device_map: Any, dtype: torch.dtype) -> _PackedFolder:
        """Check it, and take weights that have planes out of the model, which is on the meta device."""
        folder = Path(next(iter(checkpoint_files), ".")).parent
        if not (folder / packed.FILE).is_file():
            raise CheckpointError(
                f"{folder} is packed by sglquant and has no {packed.FILE}.\n"
                "Fix: download the whole folder, then quant_compile.load(directory)."
            )
        if not _one_place(device_map):
            raise OptionError(
                f"{folder} is packed for one device, and device_map names several or is chosen later.\n"
                'Fix: quant_compile.load(directory, device="cuda"), or device_map={"": "cuda"}.'
            )
        own = read_json(folder / "config.json").get("dtype")
        if own != dtype_name(dtype):
            raise OptionError(f"{folder} is packed for {own}. Fix: from_pretrained without dtype, or with this one.")
        for target, source in (
            getattr(model, "all_tied_weights_keys", None) or {}
        ).items():  # transformers ties them later
            parent, _, attribute = target.rpartition(".")
            model.get_submodule(parent)._parameters[attribute] = model.get_parameter(source)
        found = packed.read(Files.open(folder), model)
        packed_policy(found)
        for slot in found.quantized:
            for module, attribute in slot.places:
                module._parameters[attribute] = None
                module._is_hf_initialized = True  # type: ignore[assignment]
        known = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(known or ()), _PLANES}
        device = next(iter(device_map.values())) if device_map else "cpu"
        return _PackedFolder(found, torch.device(device), known)

    def into(self, model: Any, options: Mapping[str, Any]) -> nn.Module:
        """Fill the model, and compile it by the folder's own policy."""
        model._keys_to_ignore_on_load_unexpected = self.unexpected
        scales = self.packed.cache_scales()
        self.packed.fill(model, self.device, lambda count: None)
        cache_scales.keep(model, scales)
        claim_before_tracing(p for p in cast(nn.Module, model).parameters() if p.dim() > 1)
        policy, target = packed_policy(self.packed), Target.of(self.device if self.device.type == "cuda" else "cpu")
        notes = used_times(self.packed, target)
        compiled = api.compile(model, policy, **{"release_weights": True, **options})
        LEDGER.session(compiled, policy, target.label).notes |= dict.fromkeys(notes)
        return compiled


class _Quantize(ConversionOps):
    """transformers' last step for a weight that it read; what is taken is not handed back."""

    def __init__(self, take: Callable[[str, torch.Tensor], bool]) -> None:
        self._take = take

    def convert(
        self, input_dict: dict[str, Any], *args: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Full names -> what is left for transformers to put into the model."""
        out: dict[str, Any] = {}
        for name, value in input_dict.items():
            values = value[0] if isinstance(value, list) else value
            if not self._take(name, values):
                out[name] = value
            elif missing_keys is not None:
                missing_keys.discard(name)
        return out


def _one_place(device_map: Any) -> bool:
    """Whether a model goes to one device, as far as that is known before it is placed."""
    return device_map is None or (isinstance(device_map, Mapping) and len(set(cast(Any, device_map).values())) == 1)


def _device(device_map: Any) -> str:
    """``cuda`` or ``cpu``: what policies default by."""
    if device_map is None:
        return "cpu"
    values = cast(Any, device_map).values() if isinstance(device_map, Mapping) else ["cuda"]
    on_gpu = any(not isinstance(value, str | torch.device) or str(value).startswith("cuda") for value in values)
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


def _guard_quantized(merge: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' join of a checkpoint's config with the user's, which says no word of a fix."""

    @functools.wraps(merge)
    def merged(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if not isinstance(quantization_config_from_args, HfConfig):
            return merge(quantization_config, quantization_config_from_args)
        method: Any = getattr(quantization_config, "quant_method", None)
        if isinstance(quantization_config, Mapping):
            method = cast(Mapping[str, Any], quantization_config).get("quant_method")
        raise CheckpointError(
            f"the checkpoint is quantized already ({getattr(method, 'value', method)}), and HfConfig is for those in 16 bits.\n"
            "Fix: quant_compile.load(directory, policy), which adopts its integers."
        )

    return merged


AutoHfQuantizer.merge_quantization_configs = staticmethod(_guard_quantized(AutoHfQuantizer.merge_quantization_configs))
