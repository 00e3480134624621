"""A model to a GGUF file: the inverse of what ``model`` and ``names`` read, for the architectures that say they can be exported.

Planes of GGUF schemes are written as they are, rows of Llama's q and k in llama.cpp's order; values in their own dtype, vectors and routers
in f32. Metadata come from the model's config; those of the tokenizer from the file that the model was loaded from. The file is written
beside its place, read back as a load would, flushed, and put there in one step.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor, nn

from quant_compile.checkpoints.errors import CheckpointError, SaveError
from quant_compile.checkpoints.fill import Filler
from quant_compile.checkpoints.gguf.architectures import (
    ARCHITECTURES,
    FREQUENCIES,
    LLAMA3,
    LLAMA3_CONTEXT,
    llama3_factors,
)
from quant_compile.checkpoints.gguf.container import ALIGNMENT, MAGIC, MARK, TEXT, VERSIONS, Container
from quant_compile.checkpoints.gguf.model import read_model
from quant_compile.checkpoints.gguf.names import GgufResolver
from quant_compile.checkpoints.names import Slot, slots_of
from quant_compile.ir.ggml.types import PLAIN, TYPES, BlockType
from quant_compile.ir.scheme import GGUF, Scheme, parse
from quant_compile.lowering.weights import STORE, Key

FORMAT = "gguf"
# transformers' name -> the file's.
EXPORTED = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
QUANTIZATION_VERSION = 2
SHOWN = 6
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERTS = {"mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "mlp.experts.down_proj": ("ffn_down_exps",)}
_PLAIN_OF = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_FIX = "Fix: give these weights a GGUF scheme by a rule of the policy (`requantize: true` where they are quantized), or `keep` them."
KeyOf = Callable[[nn.Parameter], Key | None]


@dataclass(frozen=True)
class Piece:
    """A tensor to come.

    Attributes:
        name: in the file.
        block: its type.
        shape: outermost first, in numbers.
        make: its bytes.
    """

    name: str
    block: BlockType
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its length."""
        return torch.Size(self.shape).numel() // self.block.size * self.block.nbytes


@dataclass(frozen=True)
class Export:
    """Everything to write.

    Attributes:
        pairs: metadata, each with its encoded value.
        pieces: in the order of the model's weights.
        schemes: of every weight that is quantized, by its name in the model.
        kept: names of the others.
    """

    pairs: tuple[tuple[str, bytes], ...]
    pieces: tuple[Piece, ...]
    schemes: Mapping[str, Scheme]
    kept: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(piece.nbytes for piece in self.pieces)


def export_of(model: nn.Module, key_of: KeyOf) -> Export:
    """What a model becomes in a GGUF file.

    Args:
        model: of transformers, without wrappers.
        key_of: the planes that stand for a weight; None: its values do.

    Raises:
        SaveError: the architecture is not written, or weights have schemes that a GGUF file cannot hold.
    """
    config: Any = model.config
    name = EXPORTED.get(config.model_type)
    if name is None:
        fix = "Fix: save it as compressed-tensors, or packed."
        raise SaveError(f"a {config.model_type} model is not written as GGUF; {', '.join(EXPORTED)} are.\n{fix}")
    made = _Exporter(model, name, key_of)
    pieces = tuple(piece for slot in dict.fromkeys(slots_of(model).values()) for piece in made.pieces(slot))
    made.complain()
    factors = _factors(model)
    if factors is not None:
        pieces += (Piece(FREQUENCIES, PLAIN["f32"], tuple(factors.shape), lambda: factors),)
    kept = tuple(slot.name for slot in dict.fromkeys(slots_of(model).values()) if slot.name not in made.schemes)
    return Export(tuple(_pairs(model, name)), pieces, made.schemes, kept)


@dataclass
class _Exporter:
    model: nn.Module
    name: str
    key_of: KeyOf
    schemes: dict[str, Scheme] = field(default_factory=dict[str, Scheme])
    refusals: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def __post_init__(self) -> None:
        self.architecture = ARCHITECTURES[self.name]
        self._names = {module: name for name, module in self.architecture.names.items()}

    def pieces(self, slot: Slot) -> Iterator[Piece]:
        """The tensors of one Parameter."""
        names = self._names_of(slot)
        key = self.key_of(slot.tensor) if isinstance(slot.tensor, nn.Parameter) else None
        if key is None:
            yield from self._plain(slot, names)
            return
        scheme = parse(key.spec)
        reason = self._refusal(slot, key, scheme)
        if reason:
            self.refusals.setdefault(reason, []).append(slot.name)
            return
        self.schemes[slot.name] = scheme
        assert scheme.weights.format is not None
        block, (n, k) = TYPES[scheme.weights.format], slot.tensor.shape[-2:]
        shape = (*slot.tensor.shape[:-2], n // len(names), k)
        for place, name in enumerate(names):
            yield Piece(name, block, shape, self._maker(slot, key, place, len(names), name))

    def _maker(self, slot: Slot, key: Key, place: int, parts: int, name: str) -> Callable[[], Tensor]:
        parameter: Any = slot.tensor

        def make() -> Tensor:
            if parameter.dim() < 3:
                return self._rows(name, STORE.logical(parameter, key, slot.name)[0])
            experts = (STORE.logical(parameter, key, slot.name, expert)[0] for expert in range(parameter.shape[0]))
            return torch.stack([planes.chunk(parts)[place] for planes in experts])

        return make

    def _refusal(self, slot: Slot, key: Key, scheme: Scheme) -> str:
        if scheme.weights.type != GGUF:
            return f"{scheme.spec} is no type of GGUF"
        parameter: Any = slot.tensor
        if STORE.entry(parameter).scales_input:
            return "its input is reordered or scaled for its codes, which has no place in a GGUF file"
        if len(slot.places) > 1:
            return "it is the table of an embedding too"
        return "it is stored by columns" if key.transposed or key.interleaved else ""

    def _plain(self, slot: Slot, names: Sequence[str]) -> Iterator[Piece]:
        """Values: matrices in their dtype."""
        if "sglq_input_factor" in slot.owner._buffers:
            self.refusals.setdefault("its values go with factors of its inputs", []).append(slot.name)
        wide = slot.tensor.dim() < 2 or "ffn_gate_inp" in names[0]
        dtype = torch.float32 if wide else slot.tensor.dtype
        shape = list(slot.tensor.shape)
        if len(names) > 1:
            shape[-2] //= len(names)
        for place, name in enumerate(names):

            def make(place: int = place, name: str = name) -> Tensor:
                whole = _values(slot)
                part = whole.chunk(len(names), -2)[place] if len(names) > 1 else whole
                return self._rows(name, part).to(dtype)

            yield Piece(name, PLAIN[_PLAIN_OF[dtype]], tuple(shape), make)

    def _rows(self, name: str, rows: Tensor) -> Tensor:
        """Of q and k where llama.cpp has them in another order: the inverse of ``rows_of_heads``."""
        if not self.architecture.permuted or not re.search(r"\.attn_[qk]\.", name):
            return rows
        config: Any = self.model.config
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def _names_of(self, slot: Slot) -> list[str]:
        found = _LAYER.fullmatch(slot.name)
        prefix, rest = (f"blk.{found[1]}.", found[2]) if found else ("", slot.name)
        if rest in _EXPERTS:
            return [f"{prefix}{name}.weight" for name in _EXPERTS[rest]]
        module, _, suffix = (rest if found else slot.name).rpartition(".")
        if module not in self._names:
            fix = "Fix: save it as compressed-tensors, or packed."
            raise SaveError(f"{slot.name} has no name in a GGUF file of {self.name}.\n{fix}")
        return [f"{prefix}{self._names[module]}.{suffix}"]

    def complain(self) -> None:
        """Raise what was refused."""
        if not self.refusals:
            return
        lines = ["GGUF has no form for some weights; nothing has been written:"]
        for reason, names in self.refusals.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {reason}: {', '.join(names[:SHOWN])}{more}")
        raise SaveError("\n".join([*lines, _FIX]))


def _values(slot: Slot) -> Tensor:
    entry = STORE.peek(slot.tensor) if isinstance(slot.tensor, nn.Parameter) else None
    if slot.tensor.is_meta or (entry is not None and entry.released):
        raise SaveError(f"{slot.name} has no values here.\nFix: quant_compile.restore(model, source) first.")
    with torch._C.DisableTorchFunctionSubclass():
        return slot.tensor.detach()


# --- metadata ---


def _pairs(model: nn.Module, name: str) -> Iterator[tuple[str, bytes]]:
    """Keys and encoded values: of the model by its config, all else as the file had it."""
    config: Any = model.config
    head: Container | None = vars(model).get(MARK)
    yield "general.architecture", _text(name)
    for key in head.values if head is not None else ():
        if key.startswith(("general.", "tokenizer.")) and key not in _OWN_KEYS:
            yield key, head.encoded(key)  # type: ignore[union-attr]
    yield "general.quantization_version", _u32(QUANTIZATION_VERSION)
    if head is None:
        for which in ("bos", "eos"):
            token = getattr(config, f"{which}_token_id", None)
            if isinstance(token, int):
                yield f"tokenizer.ggml.{which}_token_id", _u32(token)
    for key, value in _model_facts(config):
        if value is not None:
            yield (
                f"{name}.{key}",
                _f32(value) if isinstance(value, float) else _text(value) if isinstance(value, str) else _u32(value),
            )


_OWN_KEYS = ("general.architecture", "general.alignment", "general.quantization_version", "general.file_type")


def _model_facts(c: Any) -> Iterator[tuple[str, Any]]:
    """Keys without the architecture."""
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    yield "block_count", c.num_hidden_layers
    yield "context_length", c.max_position_embeddings
    yield "embedding_length", c.hidden_size
    yield "feed_forward_length", c.intermediate_size
    yield "attention.head_count", c.num_attention_heads
    yield "attention.head_count_kv", c.num_key_value_heads
    yield "attention.layer_norm_rms_epsilon", float(c.rms_norm_eps)
    yield "attention.key_length", head
    yield "attention.value_length", head
    yield "rope.dimension_count", head
    yield "vocab_size", c.vocab_size
    yield from _rope_facts(c)
    if c.model_type == "qwen3_moe":
        if not c.norm_topk_prob or c.decoder_sparse_step != 1 or c.mlp_only_layers:
            fix = "Fix: save it as compressed-tensors."
            raise SaveError(
                f"llama.cpp's qwen3moe has experts in every layer, with weights that are normalized; this model has not.\n{fix}"
            )
        yield "expert_count", getattr(c, "num_experts", None) or c.num_local_experts
        yield "expert_used_count", c.num_experts_per_tok
        yield "expert_feed_forward_length", c.moe_intermediate_size


def _rope_facts(c: Any) -> Iterator[tuple[str, Any]]:
    rope, kind = c.rope_parameters, c.rope_parameters.get("rope_type", "default")
    yield "rope.freq_base", float(rope["rope_theta"])
    if kind == "llama3" and rope["original_max_position_embeddings"] != LLAMA3_CONTEXT:
        yield "rope.scaling.original_context_length", int(rope["original_max_position_embeddings"])
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        yield "rope.scaling.original_context_length", int(rope["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            yield f"rope.scaling.yarn_{key}", None if rope.get(key) is None else float(rope[key])
    known = kind in ("default", "linear", "yarn") or (
        kind == "llama3" and all(rope[key] == LLAMA3[key] for key in LLAMA3)
    )
    if not known or (kind == "yarn" and rope.get("attention_factor") is not None):
        raise SaveError(
            f"rotary frequencies of {dict(rope)} are not written as GGUF.\nFix: save it as compressed-tensors."
        )


def _factors(model: nn.Module) -> Tensor | None:
    """What divides each rotary frequency, f32, where something does that no metadata say."""
    config: Any = model.config
    rope, rotary = config.rope_parameters, next((m for m in model.modules() if "inv_freq" in m._buffers), None)
    if rotary is None or rope["rope_type"] not in ("default", "llama3"):
        return None
    own: Any = rotary._buffers["inv_freq"]
    if rope["rope_type"] == "llama3":
        return llama3_factors(own.numel(), rope["rope_theta"], rope).float()
    plain = rope["rope_theta"] ** -(torch.arange(own.numel(), dtype=torch.float64) / own.numel())
    factors = plain / own.cpu().double()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors.float()


def _u32(value: int) -> bytes:
    return struct.pack("<II", 4, int(value))


def _f32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


def _text(text: str) -> bytes:
    return struct.pack("<I", TEXT) + _bare(text)


def _bare(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


# --- writing ---


def check_target(file: Path) -> None:
    """Refuse a place that a GGUF file cannot take.

    Raises:
        SaveError: something else is there.
    """
    if file.is_symlink():
        raise SaveError(f"{file} is a link.\nFix: name the file that it leads to.")
    if not file.exists():
        return
    if not file.is_file():
        raise SaveError(f"{file} is no file.\nFix: name another.")
    with file.open("rb") as opened:
        if opened.read(4) not in (MAGIC, b""):
            raise SaveError(
                f"{file} is not replaced, since it is no GGUF file.\nFix: name another, or remove this one."
            )


def write(file: Path, export: Export, model: nn.Module, dtype: torch.dtype) -> int:
    """Write the file whole; returns the bytes of its tensors.

    Raises:
        SaveError: it would not load as the same schemes.
    """
    with _replacing(file) as made:
        with made.open("wb") as opened, torch.no_grad():
            _stream(opened, export)
            opened.flush()
            os.fsync(opened.fileno())
        _check(made, export, model, dtype)
    return export.nbytes


def _stream(opened: BinaryIO, export: Export) -> None:
    opened.write(MAGIC + struct.pack("<IQQ", max(VERSIONS), len(export.pieces), len(export.pairs)))
    for key, value in export.pairs:
        opened.write(_bare(key) + value)
    at = 0
    for piece in export.pieces:
        sizes = piece.shape[::-1]
        opened.write(_bare(piece.name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, piece.block.number, at))
        at += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
    opened.write(bytes(-opened.tell() % ALIGNMENT))
    for piece in export.pieces:
        data = piece.make().detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if data.numel() != piece.nbytes:
            _defect(f"{piece.name} has {data.numel()} bytes, and {piece.nbytes} were promised")
        opened.write(data.numpy().data)
        opened.write(bytes(-data.numel() % ALIGNMENT))


def _check(file: Path, export: Export, model: nn.Module, dtype: torch.dtype) -> None:
    """Read the head as a load would."""
    try:
        found = read_model(file)
        mapped, description = GgufResolver(model, found.files, found.architecture).resolve()
        outcomes = Filler(found.files, description, dtype, torch.device("meta")).plan(mapped)
    except CheckpointError as error:
        _defect(str(error).split("Fix:")[0].strip())
    for outcome in outcomes:
        if outcome.scheme != export.schemes.get(outcome.name):
            _defect(f"{outcome.name} would load in another scheme ({'; '.join(outcome.notes)})")


def _defect(what: str) -> NoReturn:
    raise SaveError(f"the model cannot be written so that it loads again: {what}.\nFix: report this model.")


@contextmanager
def _replacing(file: Path) -> Generator[Path]:
    """A new file beside ``file``, which takes its place when the block ends without an error."""
    file = file.absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.saving-", dir=file.parent)
    os.close(handle)
    made = Path(name)
    try:
        umask = os.umask(0o022)
        os.umask(umask)
        made.chmod(file.stat().st_mode & 0o7777 if file.is_file() else 0o666 & ~umask)
        yield made
        made.replace(file)
        opened = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    finally:
        made.unlink(missing_ok=True)
