"""Schemes as data: the numerics of a site, in the words of compressed-tensors.

A scheme says what a linear's weight and its input become. Its ``spec`` is a short text that names it completely, so that
graphs, cache keys and ledgers carry content and never an id: a preset's name, or ``int4.group64.asym+16`` and the like.
Presets are declared by the scheme families (``lowering/schemes``) and looked up here by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, cast

from quant_compile.ir.errors import SchemeError
from quant_compile.ir.ggml.types import TYPES as BLOCKS

GGUF = "gguf"
TYPES = ("int", "float", GGUF)
STRATEGIES = ("tensor", "channel", "token", "group", "block", "tensor_group", "channel_group")
GROUPED = ("group", "tensor_group", "channel_group")
FORMAT_BITS = {"e4m3": 8, "e5m2": 8, "e2m1": 4}
FORMATS = tuple(FORMAT_BITS)


@dataclass(frozen=True)
class QuantArgs:
    """How one tensor is quantized. Field names and meanings are those of compressed-tensors, and ``format`` is ours.

    Attributes:
        num_bits: bits of one code.
        type: ``int``, ``float``, or ``gguf``: blocks of a GGUF type, which ``format`` names and which says everything else.
        strategy: what shares one scale: tensor, channel (a weight's row), token (an activation's row), group
            (``group_size`` consecutive k), block (``block_structure`` = rows x columns), tensor_group (group scales
            below a tensor scale), channel_group (small integer scales of groups below a channel scale).
        symmetric: no zero point.
        dynamic: the scale is computed from the data at run time; else it is fixed beforehand.
        format: float codes: e4m3 or e5m2 at 8 bits, e2m1 at 4; of blocks their type: q4_k.
    """

    num_bits: int
    type: str
    strategy: str
    symmetric: bool = True
    dynamic: bool = False
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise SchemeError(f"type must be one of {', '.join(TYPES)}, got {self.type!r}")
        if self.strategy not in STRATEGIES:
            raise SchemeError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.type == GGUF:
            self._check_blocks()
            return
        if self.type == "float" and self.format is None:
            object.__setattr__(self, "format", {8: "e4m3", 4: "e2m1"}.get(self.num_bits))
        if self.format is not None and (self.type != "float" or self.format not in FORMATS):
            raise SchemeError(f"format {self.format!r} needs type float and one of {', '.join(FORMATS)}")
        if self.format is not None and FORMAT_BITS[self.format] != self.num_bits:
            raise SchemeError(f"format {self.format} has {FORMAT_BITS[self.format]} bits, not {self.num_bits}")
        self._check_shares()

    def _check_shares(self) -> None:
        """What shares a scale is said once."""
        if self.block_structure is not None:
            rows, columns = self.block_structure
            object.__setattr__(self, "block_structure", (int(rows), int(columns)))
        if (self.strategy in GROUPED) != (self.group_size is not None):
            raise SchemeError(f"strategy {self.strategy} and group_size {self.group_size} contradict each other")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group_size must be positive, got {self.group_size}")
        if (self.strategy == "block") != (self.block_structure is not None):
            raise SchemeError(f"strategy {self.strategy} and block_structure {self.block_structure} contradict")

    def _check_blocks(self) -> None:
        if self.format is not None:
            object.__setattr__(self, "format", self.format.lower())
        known = _block_fields(self.format)
        wrong = [field for field, value in known.items() if getattr(self, field) != value]
        if wrong or not self.symmetric or self.dynamic or self.block_structure is not None:
            raise SchemeError(f"type {GGUF} has the fields type and format alone; {self.format} says the others")

    @staticmethod
    def of_blocks(format: str) -> QuantArgs:
        """The weights of a GGUF type.

        Raises:
            SchemeError: there is no such type.
        """
        return QuantArgs(type=GGUF, format=format, **_block_fields(format))

    @property
    def spec(self) -> str:
        """The arguments as one dotted word, e.g. ``fp8e4m3.token.dynamic``, ``int4.group128.asym`` or ``gguf.q4_k``."""
        if self.type == GGUF:
            return f"{GGUF}.{self.format}"
        kind = f"fp{self.num_bits}{self.format}" if self.type == "float" else f"int{self.num_bits}"
        strategy = self.strategy
        if self.group_size is not None:
            strategy += str(self.group_size)
        if self.block_structure is not None:
            strategy += "x".join(map(str, self.block_structure))
        return ".".join([kind, strategy, *([] if self.symmetric else ["asym"]), *(["dynamic"] if self.dynamic else [])])

    @staticmethod
    def from_fields(data: Mapping[str, Any], where: str) -> QuantArgs:
        """Build from the fields of a policy file or a compressed-tensors config; unknown fields are errors."""
        known = {f.name for f in fields(QuantArgs)}
        unknown = set(data) - known
        if unknown:
            raise SchemeError(
                f"{where}: unknown field {sorted(unknown)[0]!r}; valid fields: {', '.join(sorted(known))}"
            )
        if data.get("type") == GGUF:
            data = _of_blocks(data, where)
        missing = {"num_bits", "type", "strategy"} - set(data)
        if missing:
            raise SchemeError(f"{where}: field {sorted(missing)[0]!r} is missing")
        values = dict(data)
        if values.get("block_structure") is not None:
            values["block_structure"] = tuple(values["block_structure"])
        try:
            return QuantArgs(**values)
        except SchemeError as error:
            raise SchemeError(f"{where}: {error}") from None
        except (TypeError, ValueError) as error:
            raise SchemeError(f"{where}: {error}") from None

    @staticmethod
    def from_spec(spec: str) -> QuantArgs:
        """Inverse of ``spec``."""
        kind, strategy, *flags = spec.split(".")
        if kind == GGUF:
            return QuantArgs.of_blocks(strategy)
        data: dict[str, Any] = {"symmetric": "asym" not in flags, "dynamic": "dynamic" in flags}
        if kind.startswith("fp"):
            bits = kind[2:].split("e")[0]
            data |= {"type": "float", "num_bits": int(bits), "format": kind[2 + len(bits) :]}
        else:
            data |= {"type": "int", "num_bits": int(kind[3:])}
        name = strategy.rstrip("0123456789x") if strategy.startswith((*GROUPED, "block")) else strategy
        size = strategy[len(name) :]
        if name == "block":
            data["block_structure"] = tuple(int(part) for part in size.split("x"))
        elif size:
            data["group_size"] = int(size)
        return QuantArgs(strategy=name, **data)


def _block_fields(format: str | None) -> dict[str, Any]:
    """What a GGUF type says of the other fields.

    Raises:
        SchemeError: there is no such type.
    """
    block = BLOCKS.get((format or "").lower())
    if block is None:
        raise SchemeError(f"type {GGUF} needs a format, one of {', '.join(BLOCKS)}; got {format!r}")
    return {"num_bits": block.bits, "strategy": "group", "group_size": block.size}


def _of_blocks(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    try:
        return _block_fields(data.get("format")) | dict(data)
    except SchemeError as error:
        raise SchemeError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Scheme:
    """What a linear's weight and input become.

    Attributes:
        weights: of the weight.
        input_activations: of the input; None keeps it in 16 bits.
    """

    weights: QuantArgs
    input_activations: QuantArgs | None = None

    @property
    def spec(self) -> str:
        """Preset name where there is one, else ``<weights>+<activations>``; ``parse`` reads both."""
        return _preset_name(self) or f"{self.weights.spec}+{self._activation_spec()}"

    def _activation_spec(self) -> str:
        return self.input_activations.spec if self.input_activations else "16"

    @property
    def static(self) -> bool:
        """Whether the input's scale must be calibrated before the model runs."""
        return self.input_activations is not None and not self.input_activations.dynamic

    @staticmethod
    def from_fields(data: Mapping[str, Any], where: str = "scheme") -> Scheme:
        """Build from ``{weights: {...}, input_activations: {...}}``."""
        unknown = set(data) - {"weights", "input_activations"}
        if unknown:
            raise SchemeError(
                f"{where}: unknown field {sorted(unknown)[0]!r}; valid fields: weights, input_activations"
            )
        if not isinstance(data.get("weights"), Mapping):
            raise SchemeError(f"{where}: a custom scheme needs weights: {{num_bits, type, strategy, ...}}")
        weights = QuantArgs.from_fields(cast(Mapping[str, Any], data["weights"]), f"{where}.weights")
        activations = data.get("input_activations")
        if activations is None:
            return Scheme(weights)
        return Scheme(weights, QuantArgs.from_fields(activations, f"{where}.input_activations"))

    def to_fields(self) -> dict[str, Any]:
        """Inverse of ``from_fields``, without fields at their defaults."""
        out: dict[str, Any] = {"weights": _set_fields(self.weights)}
        if self.input_activations is not None:
            out["input_activations"] = _set_fields(self.input_activations)
        return out


def _set_fields(args: QuantArgs) -> dict[str, Any]:
    if args.type == GGUF:
        return {"type": args.type, "format": args.format}
    out: dict[str, Any] = {}
    for field in fields(QuantArgs):
        value = getattr(args, field.name)
        if field.name in ("num_bits", "type", "strategy") or value != field.default:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


PRESETS: dict[str, Scheme] = {}


def add_presets(presets: Mapping[str, Scheme]) -> None:
    """Make ``presets`` known by name. Called by scheme families when they register."""
    for name, scheme in presets.items():
        if PRESETS.setdefault(name.upper(), scheme) != scheme:
            raise SchemeError(f"two schemes claim the preset name {name}")
    _preset_name.cache_clear()
    parse.cache_clear()


@lru_cache(maxsize=None)
def _preset_name(scheme: Scheme) -> str | None:
    return next((name for name, preset in PRESETS.items() if preset == scheme), None)


@lru_cache(maxsize=None)
def parse(spec: str) -> Scheme:
    """Scheme of a preset name (any case) or of a ``Scheme.spec``.

    Raises:
        SchemeError: neither; lists the presets.
    """
    preset = PRESETS.get(spec.upper())
    if preset is not None:
        return preset
    weights, plus, activations = spec.partition("+")
    try:
        if not plus:
            raise ValueError
        return Scheme(QuantArgs.from_spec(weights), None if activations == "16" else QuantArgs.from_spec(activations))
    except (ValueError, SchemeError):
        raise SchemeError(f"unknown scheme {spec!r}; presets: {', '.join(sorted(PRESETS))}") from None
