"""The backend's options as data, with their validation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from quant_compile.ir.errors import MissingScalesError, OptionError, PolicyError, SchemeError
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.kv import NAMES, TENSOR, CacheScheme, parse_cache
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.guard import NEVER_SLOWER
from quant_compile.lowering.moe import moe_kernels
from quant_compile.lowering.registry import kernels as known_kernels
from quant_compile.lowering.rounding.recipe import FACTOR, PLANES_OF, Factor, Rounding, factor_key, plane_key, token_of
from quant_compile.lowering.select import Request
from quant_compile.policy import ATTENTION, AUTO, KEEP, Policy
from quant_compile.rules import CACHE_SCHEMES, CacheRules, cache_scale_key, scale_key

MODES = ("auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
TUNE = ("off", "quick", "full")
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it a reciprocal is inf


@dataclass(frozen=True)
class Options:
    """Options of ``backend="sglquant"``.

    Attributes:
        policy: preset name, shipped policy, YAML path, dict or Policy; None: the device's default preset.
        mode: ``auto`` (CUDA graphs of ``generate``'s decode step) or an Inductor mode (torch.compile refuses its own ``mode``
            beside options); ``default``: no CUDA graphs.
        release_weights: free the original weights after packing.
        kernels: ``auto``, ``reference``, or {scheme or ``*``: kernel name, or a list of one of linears and one of expert blocks}.
        tune: ``off`` (cost estimates), ``quick`` or ``full`` (measure on this GPU, cached on disk).
        inductor: Inductor config patches.
        blocks: compile the repeated blocks of a model once for all of them instead of the whole model (in ``generate``); None: where
            decode steps become CUDA graphs.
        guard: ``never_slower``: linears whose quantized chain is measured to be slower than 16 bits at the m that is run stay in 16
            bits there; False: not even if the policy says so; None: as the policy says.
        attention: ``auto`` (kernels that read a cache once, where they are faster), ``keep`` (as the model wrote it); None: as the
            policy says.
        kv_cache: how ``generate`` keeps K and V, ``FP8``, ``FP8_E5M2``, ``INT8`` (with ``_HEAD`` or ``_TENSOR``: fixed scales) or
            ``keep``; None: as the policy says.
        lock: file that keeps what every weight got; written where it is not there, else enforced: what differs is a warning, and an
            error under a strict policy.
        lock_update: write the lock anew.
        verify: replay every rewrite on the inputs of a graph's first call, and refuse what is not what it stands for; None: as the
            policy says.
    """

    policy: Any = None
    mode: str = "auto"
    release_weights: bool | None = None
    kernels: str | Mapping[str, str | Sequence[str]] = "auto"
    tune: str = "quick"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    blocks: bool | None = None
    guard: str | bool | None = None
    attention: str | None = None
    kv_cache: str | None = None
    lock: str | Path | None = None
    lock_update: bool = False
    verify: bool | None = None

    @staticmethod
    def of(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Validate the options of a compile call.

        Raises:
            OptionError: unknown key or a value it cannot have; lists the valid ones.
        """
        data = dict(options or {})
        valid = list(Options.__dataclass_fields__)
        for key in data:
            if key not in valid:
                raise OptionError(f"unknown option {key!r}; valid options: {', '.join(valid)}")
        if mode and mode != "default":
            data.setdefault("mode", mode)
        made = Options(**data)
        _one_of("mode", made.mode, MODES)
        _one_of("tune", made.tune, TUNE)
        for key in ("release_weights", "blocks", "lock_update", "verify"):
            if (value := getattr(made, key)) not in (None, True, False):
                raise OptionError(f"{key} must be true or false, got {value!r}")
        _lock(made.lock, made.lock_update)
        if made.guard is not None and made.guard is not False and made.guard != NEVER_SLOWER:
            raise OptionError(f"guard must be {NEVER_SLOWER}, or false for none, got {made.guard!r}")
        _one_of("attention", AUTO if made.attention is None else made.attention, ATTENTION)
        _cache_scheme(made.kv_cache)
        if isinstance(made.kernels, str):
            _one_of("kernels", made.kernels, ("auto", "reference"), " or a dict {scheme: kernel}")
        elif not isinstance(made.kernels, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"kernels must be auto, reference or a dict {{scheme: kernel}}, got {made.kernels!r}")
        else:
            _pins(made.kernels)
        if not isinstance(made.inductor, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"inductor must be a dict of Inductor config patches, got {type(made.inductor).__name__}")
        _inductor_keys(made.inductor)
        return made

    def request(self, policy: Policy) -> Request:
        """What the user wants of kernels."""
        pins = self.kernels if isinstance(self.kernels, str) else _pins(self.kernels)
        return Request(pins, policy.allow_reference or pins == "reference", self.tune)

    def releases(self, policy: Policy) -> bool:
        """Whether original weights are freed; the option wins over the policy."""
        return bool(policy.release_weights if self.release_weights is None else self.release_weights)

    def guards(self, policy: Policy) -> bool:
        """Whether linears stay in 16 bits where these are faster; the option wins over the policy."""
        return (policy.guard if self.guard is None else self.guard) == NEVER_SLOWER

    def verifies(self, policy: Policy) -> bool:
        """Whether rewrites are replayed; the option wins over the policy."""
        return policy.verify if self.verify is None else self.verify

    def attends(self, policy: Policy) -> bool:
        """Whether attention may be replaced; the option wins over the policy."""
        return (self.attention or policy.attention) != KEEP

    def caches(self, policy: Policy) -> CacheRules | None:
        """How layers keep K and V; the option wins over the policy. None: all in 16 bits."""
        if self.kv_cache is None:
            return policy.kv_cache
        return None if self.kv_cache.lower() == KEEP else CacheRules(parse_cache(self.kv_cache))


def _lock(path: Any, update: bool) -> None:
    if path is not None and (not isinstance(path, str | Path) or not str(path).strip()):
        raise OptionError(f"lock must be the path of a file, got {path!r}")
    if update and path is None:
        raise OptionError('lock_update writes a lock anew, and none is named. Fix: lock="model.lock".')


def _cache_scheme(name: Any) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise OptionError(f"kv_cache must be the name of a scheme, got {name!r}. Fix: rules go into the policy.")
    if name.lower() != KEEP:
        _one_of("kv_cache", name.upper(), (KEEP, *NAMES))


def _inductor_keys(patches: Mapping[str, Any]) -> None:
    if not patches:
        return
    from torch._inductor import config

    known = torch._inductor.list_options()
    for key in patches:
        # list_options leaves out some settings, such as force_disable_caches.
        if key not in known and not hasattr(config, str(key)):
            near = get_close_matches(str(key), known, 1)
            fix = f"Did you mean {near[0]!r}?" if near else "torch._inductor.list_options() lists them."
            raise OptionError(f"inductor: {key!r} is no setting of Inductor {torch.__version__}. {fix}")


def _pins(given: Mapping[str, str | Sequence[str]]) -> tuple[tuple[str, str], ...]:
    """(scheme spec or ``*``, kernel) of every pin, sorted; a kernel holds for what it serves, linears or expert blocks."""
    out: list[tuple[str, str]] = []
    for key, value in given.items():
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
        if not isinstance(key, str) or not names:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(
                f"kernels: {key!r}: {value!r} is no pin. Fix: {{scheme: kernel}} or {{scheme: [kernel, kernel]}}."
            )
        for name in names:
            _one_of("kernels", name, (*known_kernels(), *moe_kernels()))
        if sum(name in known_kernels() for name in names) > 1 or sum(name in moe_kernels() for name in names) > 1:
            raise OptionError(
                f"kernels: {key!r} is pinned to {', '.join(names)}. Fix: at most one kernel of linears and one of expert blocks."
            )
        out += [(_pin(key), name) for name in names]
    return tuple(sorted(out))


def _pin(key: str) -> str:
    """A pin's key in its one spelling: ``*``, or the spec of a scheme."""
    if key == "*":
        return key
    try:
        return parse(key).spec
    except SchemeError as error:
        raise OptionError(f"kernels: {key!r} is neither * nor a scheme: {error}") from None


def _one_of(name: str, value: Any, valid: tuple[str, ...], more: str = "") -> None:
    if value not in valid:
        raise OptionError(f"{name} must be one of {', '.join(valid)}{more}, got {value!r}")


class PolicySource:
    """A policy and a cheap check whether the file or the dict that it came from has changed since.

    torch.compile reuses code when its options compare equal, which a path or an edited dict always does: the content decides.
    ``generation`` counts the changes.
    """

    def __init__(self, given: Any, default: str) -> None:
        self.given = given
        self.generation = 0
        self.policy = Policy.load(default if given is None else given)
        self.is_default = given is None
        self._content = self.policy.content_hash
        self._snapshot = _snapshot(given)
        self._paths = tuple(
            Path(p)
            for p in (self.policy.source, self.policy.scales, self.policy.planes)
            if p is not None and Path(p).is_file()
        )
        self._stamp = self._now()

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """Calibrated input scales of the policy, by ``<weight>.input_scale``.

        Raises:
            PolicyError: the scales file is missing, or no safetensors file.
        """
        path = self.policy.scales
        if path is None:
            return {}
        if not Path(path).is_file():
            raise PolicyError(
                f"scales file {path} does not exist. Fix: quant_compile.calibrate(model, batches, policy) writes it."
            )
        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise PolicyError(
                f"scales file {path} is not readable as safetensors: {error}. "
                "Fix: quant_compile.calibrate(model, batches, policy) writes it again."
            ) from None

    def input_scale(self, names: Iterable[str]) -> Tensor | None:
        """[1] f32: the calibrated scale of a weight's input, under the first of its names that has one.

        Raises:
            PolicyError: as ``scales``.
            MissingScalesError: it is not one positive number.
        """
        for name in names:
            value = self.scales.get(scale_key(name))
            if value is None:
                continue
            if value.numel() != 1 or not SMALLEST_SCALE <= float(value.to(torch.float32)) < float("inf"):
                shown = float(value) if value.numel() == 1 else f"{value.numel()} numbers"
                raise MissingScalesError(
                    f"the input scale of {name} in {self.policy.scales} is {shown}, not a positive number.\n"
                    "Fix: policy = quant_compile.calibrate(model, batches, policy) with inputs that are not all zeros or NaN."
                )
            return value.reshape(1).to(torch.float32)
        return None

    def rounding(self, names: Iterable[str]) -> Rounding:
        """How the planes of a weight are made of its values: by calibration where the policy has its planes.

        Raises:
            PolicyError: the policy's method needs planes that are not there, or the file is not readable.
        """
        policy = self.check_planes()
        if policy.planes is not None:
            for name in (name.removesuffix(".weight") for name in names):
                if (told := self._planes_of.get(name)) is not None:
                    stored = _Stored(policy.planes, name, told["weights"])
                    factor = Factor(told[FACTOR], partial(stored.factor, told[FACTOR])) if FACTOR in told else None
                    return Rounding(told["method"], f"{self._token}.{name}", stored, tuple(told["checksums"]), factor)
        return Rounding(policy.rounding)

    def check_planes(self, names: Iterable[str] = ()) -> Policy:
        """The policy, whose planes are there if it needs any.

        Args:
            names: of a model's weights; some of them must have planes. None: any model will do.

        Raises:
            PolicyError: they are not, are not readable, or are of another model.
        """
        policy = self.policy
        if policy.planes is not None:
            known, named = self._planes_of, [name.removesuffix(".weight") for name in names]
            if named and known.keys().isdisjoint(named):
                raise PolicyError(
                    f"the policy's planes {policy.planes} are of no weight of this model: {next(iter(known), 'none')}, ...\n"
                    "Fix: quant_compile.calibrate(model, batches, policy) with this model, or leave `planes` out."
                )
        elif policy.method is not None:
            raise PolicyError(
                f"{policy.source or policy.name}: method {policy.method} needs planes that example batches make.\n"
                "Fix: policy = quant_compile.calibrate(model, batches, policy), or leave `method` out."
            )
        return policy

    @cached_property
    def _token(self) -> str:
        return token_of(Path(self.policy.planes or ""))

    @cached_property
    def _planes_of(self) -> dict[str, dict[str, Any]]:
        """Of each weight in the policy's file of planes their scheme, their method, and checksums of its values."""
        path = self.policy.planes
        try:
            with safe_open(str(path), "pt") as file:
                told = (file.metadata() or {}).get(PLANES_OF)
            return json.loads(told or "")
        except (OSError, SafetensorError, ValueError) as error:
            raise PolicyError(
                f"the policy's planes {path} are not readable: {error}.\n"
                "Fix: quant_compile.calibrate(model, batches, policy) writes them again, or leave `planes` out."
            ) from None

    def cache_scales(self, layer: str, scheme: CacheScheme) -> tuple[Tensor, Tensor] | None:
        """Fixed scales of a decoder layer's K and V under a scheme, f32 [heads] or [1]; None where the scales file has none.

        Raises:
            PolicyError: as ``scales``.
            MissingScalesError: they are of another scheme, or no positive numbers.
        """
        k, v = (self.scales.get(cache_scale_key(layer, side)) for side in ("k", "v"))
        if k is None or v is None:
            return None
        k, v = (value.to(torch.float32).flatten() for value in (k, v))
        wrong = ""
        if (found := self._cache_schemes.get(layer, scheme.name)) != scheme.name:
            wrong = f"of {found}, and the policy says {scheme.name}"
        elif scheme.scale == TENSOR and not k.numel() == v.numel() == 1:
            wrong = f"one for each head, and {scheme.name} has one for all"
        elif not all(bool(((value >= SMALLEST_SCALE) & value.isfinite()).all()) for value in (k, v)):
            wrong = "no positive numbers"
        if wrong:
            raise MissingScalesError(
                f"the KV cache's scales of {layer} in {self.policy.scales} are {wrong}.\n"
                "Fix: policy = quant_compile.calibrate(model, batches, policy), with inputs that are not all zeros or NaN."
            )
        return k, v

    @cached_property
    def _cache_schemes(self) -> dict[str, str]:
        """Layer -> name of the scheme that its scales are of, as far as the scales file tells."""
        with safe_open(str(self.policy.scales), "pt") as file:
            told = (file.metadata() or {}).get(CACHE_SCHEMES)
        return json.loads(told) if told else {}

    def _now(self) -> tuple[tuple[int, int], ...]:
        out: list[tuple[int, int]] = []
        for path in self._paths:
            try:
                stat = path.stat()
            except OSError:
                return self._stamp  # mid-edit or gone: keep what was loaded
            out.append((stat.st_mtime_ns, stat.st_size))
        return tuple(out)

    def reload_if_changed(self) -> bool:
        """Load the policy again if its file or dict changed; returns whether its content did.

        Raises:
            PolicyError: what is there now is no policy; so does every later call until it is.
        """
        if not self._paths and self._snapshot is None:
            return False
        now = self._now()
        if now == self._stamp and (self._snapshot is None or self.given == self._snapshot):
            return False
        fresh = self.policy if self.is_default else Policy.load(self.given)
        content = fresh.content_hash
        changed = content != self._content
        self._stamp, self._content, self.policy = now, content, fresh
        self._snapshot = _snapshot(self.given)
        for key in ("scales", "_planes_of", "_token"):
            self.__dict__.pop(key, None)
        self.__dict__.pop("_cache_schemes", None)
        self.generation += changed
        return changed


@dataclass(frozen=True)
class _Stored:
    """Planes of one weight in a policy's file, read when they are packed."""

    path: Path
    name: str
    weights: str

    def __call__(self, scheme: Scheme, expert: int | None) -> Planes:
        """Row form, of one expert or of a matrix."""
        if scheme.weights.spec != self.weights:
            raise PolicyError(
                f"{self.path} has planes of {self.name} as {self.weights}, and the policy says {scheme.weights.spec}.\n"
                "Fix: quant_compile.calibrate(model, batches, policy) makes them anew, or leave `planes` out."
            )
        count = len(family_of(scheme).weight_planes(scheme, 1, 1, torch.bfloat16))
        with safe_open(str(self.path), "pt") as file:
            parts = [file.get_slice(plane_key(self.name, i)) for i in range(count)]
            return tuple(part[:] if expert is None else part[expert : expert + 1].squeeze(0) for part in parts)

    def factor(self, name: str) -> Tensor:
        """[k]: what the weight's input is multiplied by."""
        with safe_open(str(self.path), "pt") as file:
            return file.get_tensor(factor_key(name))


def _snapshot(given: Any) -> dict[str, Any] | None:
    """A copy of a policy dict, to notice that it is edited in place; None for anything else."""
    return deepcopy(dict(given)) if isinstance(given, Mapping) else None
