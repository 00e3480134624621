"""Hostile GGUF files: hypothesis changes numbers, bytes and lengths of valid ones; each is an answer or an error in words.

A short form, and a long one outside of CI with SGLQ_FUZZ=1: over 200,000 files.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quant_compile
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.gguf.container import read
from quant_compile.checkpoints.gguf.files import GgufFiles
from quant_compile.checkpoints.gguf.model import read_model
from quant_compile.pretrained import plan_of
from tests.checkpoints import fuzz
from tests.checkpoints.fuzz import Watch
from tests.checkpoints.test_fuzz import LONG

SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8, "f": 4, "d": 8, "?": 1}


@dataclass
class Bytes:
    """A file as it grows; remembers where its numbers are."""

    data: bytearray = field(default_factory=bytearray)
    numbers: list[tuple[int, int]] = field(default_factory=list)

    def number(self, kind: str, value: float) -> None:
        self.numbers.append((len(self.data), SIZES[kind]))
        self.data += struct.pack(f"<{kind}", value)

    def text(self, text: str) -> None:
        self.number("Q", len(text.encode()))
        self.data += text.encode()


KINDS = {"B": 0, "H": 2, "I": 4, "f": 6, "?": 7, "Q": 10, "d": 12}
HIDDEN, INNER, VOCAB = 64, 96, 40
LLAMA: dict[str, Any] = {
    "general.architecture": "llama", "general.name": "tiny", "llama.block_count": ("I", 1), "llama.context_length": ("I", 64),
    "llama.embedding_length": ("I", HIDDEN), "llama.feed_forward_length": ("I", INNER), "llama.attention.head_count": ("I", 4),
    "llama.attention.head_count_kv": ("I", 2), "llama.attention.layer_norm_rms_epsilon": ("f", 1e-5), "llama.rope.freq_base": ("f", 1e4),
    "llama.attention.key_length": ("I", 16), "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": ("f", 2.0),
    "llama.vocab_size": ("Q", VOCAB), "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "é"],
    "tokenizer.ggml.token_type": [("I", 1)] * 3, "tokenizer.ggml.scores": [("d", 0.5)] * 2, "tokenizer.ggml.add_bos_token": ("?", 1),
    "tokenizer.ggml.bos_token_id": ("H", 1), "general.alignment": ("I", 32),
}  # fmt: skip
Q8, Q4, F32 = (8, 32, 34), (2, 32, 18), (0, 1, 4)
TENSORS: dict[str, tuple[tuple[int, ...], tuple[int, int, int]]] = {
    "token_embd.weight": ((HIDDEN, VOCAB), Q8), "output_norm.weight": ((HIDDEN,), F32), "output.weight": ((HIDDEN, VOCAB), Q4),
    "rope_freqs.weight": ((8,), F32),
    **{f"blk.0.{name}.weight": (shape, Q4 if len(shape) > 1 else F32) for name, shape in {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, 64), "attn_k": (HIDDEN, 32), "attn_v": (HIDDEN, 32),
        "attn_output": (64, HIDDEN), "ffn_gate": (HIDDEN, INNER), "ffn_up": (HIDDEN, INNER), "ffn_down": (INNER, HIDDEN)}.items()},
}  # fmt: skip
MOE = {name.replace("llama.", "qwen3moe."): "qwen3moe" if value == "llama" else value for name, value in LLAMA.items()} | {
    "qwen3moe.expert_count": ("I", 2), "qwen3moe.expert_used_count": ("I", 1), "qwen3moe.expert_feed_forward_length": ("I", 32),
}  # fmt: skip
MOE_TENSORS = {name: found for name, found in TENSORS.items() if ".ffn_" not in name or "norm" in name} | {
    "blk.0.ffn_gate_inp.weight": ((HIDDEN, 2), F32), "blk.0.ffn_gate_exps.weight": ((HIDDEN, 32, 2), Q4),
    "blk.0.ffn_up_exps.weight": ((HIDDEN, 32, 2), Q8), "blk.0.ffn_down_exps.weight": ((32, HIDDEN, 2), Q4),
    "blk.0.attn_q_norm.weight": ((16,), F32), "blk.0.attn_k_norm.weight": ((16,), F32),
}  # fmt: skip


def made(metadata: dict[str, Any], tensors: dict[str, Any]) -> Bytes:
    """A valid file, of zeros and ones."""
    out = Bytes(bytearray(b"GGUF"))
    out.number("I", 3)
    out.number("Q", len(tensors))
    out.number("Q", len(metadata))
    for key, value in metadata.items():
        out.text(key)
        _value(out, value)
    at = 0
    for name, (shape, (number, size, nbytes)) in tensors.items():
        out.text(name)
        out.number("I", len(shape))
        for length in shape:
            out.number("Q", length)
        out.number("I", number)
        out.number("Q", at)
        whole = nbytes
        for length in shape:
            whole *= length
        at += -(-whole // size // 32) * 32
    out.data += bytes(-len(out.data) % 32) + struct.pack("<f", 1.0) * (at // 4)
    return out


def _value(out: Bytes, value: Any) -> None:
    if isinstance(value, str):
        out.number("I", 8)
        out.text(value)
    elif isinstance(value, tuple):
        out.number("I", KINDS[value[0]])
        out.number(*value)
    else:
        out.number("I", 9)
        out.number("I", 8 if isinstance(value[0], str) else KINDS[value[0][0]])
        out.number("Q", len(value))
        for item in value:
            if isinstance(item, str):
                out.text(item)
            else:
                out.number(*item)


BASES = (made(LLAMA, TENSORS), made(MOE, MOE_TENSORS))
NUMBERS = [n for n in fuzz.NUMBERS if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
EDITS = st.one_of(
    st.tuples(st.just("number"), st.integers(0, 400), st.sampled_from([*NUMBERS, *range(48)])),
    st.tuples(st.just("number"), st.integers(0, 400), st.integers(0, (1 << 64) - 1)),
    st.tuples(st.just("byte"), st.integers(0, 4000), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.integers(0, 60000), st.just(0)),
    st.tuples(st.just("twice"), st.integers(0, 4000), st.integers(1, 200)),
    st.tuples(st.just("out"), st.integers(0, 4000), st.integers(1, 200)),
    st.tuples(st.just("number"), st.integers(0, 2), st.sampled_from([*NUMBERS, *range(48)])),
)
FILES = st.tuples(st.sampled_from(range(len(BASES))), st.lists(EDITS, min_size=0, max_size=3))
ONE = st.tuples(st.sampled_from(range(len(BASES))), st.lists(EDITS, min_size=1, max_size=1))


def changed(which: int, edits: list[tuple[str, int, int]]) -> bytes:
    base = BASES[which]
    data = bytearray(base.data)
    for kind, place, value in edits:
        if kind == "number":
            at, size = base.numbers[place % len(base.numbers)]
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == "byte":
            data[place : place + 1] = bytes([value])
        elif kind == "cut":
            del data[place % (len(data) + 1) :]
        elif kind == "twice":
            data[place:place] = data[place : place + value]
        else:
            del data[place : place + value]
    return bytes(data)


@pytest.fixture
def folder() -> Iterator[Path]:
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sglquant-fuzz-", dir=place) as out:
        yield Path(out)


def fuzzed(count: int) -> Any:
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@pytest.mark.parametrize("times", LONG)
def test_heads(times: int, folder: Path) -> None:
    """The container, all of its metadata, and the config that they make; little more memory than the file."""
    file, watch = folder / "model.gguf", Watch(folder)

    def look() -> Any:
        head = read(file)
        for key in head.values:
            head.raw(key)
        return read_model(file)

    @fuzzed(1000 if times == 1 else 200_000)
    @given(FILES)
    def run(case: tuple[int, list[tuple[str, int, int]]]) -> None:
        data = changed(*case)
        file.write_bytes(data)
        watch.run(look, case)

    look_at_transformers(file)
    with fuzz.traced() if times == 1 else nullcontext():
        run()
    print(f"heads: {watch}")
    assert 0.02 < watch.accepted / watch.cases < 0.9
    assert watch.largest < 2 * len(BASES[0].data) + 1_000_000


def look_at_transformers(file: Path) -> None:
    """Import what the first config imports."""
    file.write_bytes(bytes(BASES[0].data))
    plan_of(file)
    file.write_bytes(bytes(BASES[1].data))
    plan_of(file)


@pytest.mark.parametrize("times", LONG)
def test_models(times: int, folder: Path) -> None:
    """What a load would plan; Python's own modules may be read."""
    file = folder / "model.gguf"
    watch = Watch(folder, (sys.prefix, sys.base_prefix, str(Path(quant_compile.__file__).parent), "/proc/", "/sys/"))
    look_at_transformers(file)

    @fuzzed(60 * min(times, 20))
    @given(ONE)
    def run(case: tuple[int, list[tuple[str, int, int]]]) -> None:
        file.write_bytes(changed(*case))
        watch.run(lambda: plan_of(file), case)

    run()
    print(f"models: {watch}")
    assert watch.accepted > watch.cases / 50


def test_the_valid_files_are_valid(folder: Path) -> None:
    file = folder / "model.gguf"
    for base in BASES:
        file.write_bytes(bytes(base.data))
        assert isinstance(plan_of(file).files, GgufFiles)


def refused(folder: Path, data: bytes, words: str) -> None:
    file = folder / "model.gguf"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as raised:
        plan_of(file)
    assert str(folder) in str(raised.value) and "Fix:" in str(raised.value)


def at(which: int, place: int, value: int, kind: str = "Q") -> bytes:
    data = bytearray(BASES[which].data)
    data[place : place + SIZES[kind]] = struct.pack(f"<{kind}", value)
    return bytes(data)


def without(metadata: dict[str, Any], **changes: Any) -> bytes:
    return bytes(made({**metadata, **{key.replace("__", "."): value for key, value in changes.items()}}, TENSORS).data)


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too few"),
    "wrong magic": (b"GGML" + bytes(BASES[0].data[4:]), "no GGUF file"),
    "version 1": (at(0, 4, 1, "I"), "version 1"),
    "big-endian": (at(0, 4, 3 << 24, "I"), "big-endian"),
    "many tensors": (at(0, 8, 1 << 40), "promises .* tensors"),
    "many values": (at(0, 16, 1 << 40), "promises .* values"),
    "cut off in its head": (bytes(BASES[0].data[:700]), "promises 3 texts"),
    "cut off in its tensors": (bytes(BASES[0].data[:-2000]), "past the end"),
    "an architecture that is not known": (without(LLAMA, general__architecture="mamba"), "architecture 'mamba'"),
    "a text where a number must be": (without(LLAMA, llama__block_count="one"), "must be int"),
    "an array where a number must be": (without(LLAMA, llama__attention__head_count=[("I", 4)]), "must be int"),
    "more layers than tensors": (without(LLAMA, llama__block_count=("I", 1 << 20)), "num_hidden_layers 1048576"),
    "another vocabulary": (without(LLAMA, llama__vocab_size=("I", 41)), "token_embd.weight"),
    "another hidden size": (without(LLAMA, llama__embedding_length=("I", 128)), "Fix:"),
    "no heads": (without(LLAMA, llama__attention__head_count=("I", 0)), "head_count is 0"),
    "an odd alignment": (without(LLAMA, general__alignment=("I", 48)), "no power of two"),
    "a missing layer": (without(LLAMA, llama__block_count=("I", 2)), "no tensor fills"),
    "a type of a fork": (bytes(made(LLAMA, TENSORS | {"output.weight": ((HIDDEN, VOCAB), (137, 32, 18))}).data), "type 137"),
    "a type without a codec": (bytes(made(LLAMA, TENSORS | {"output.weight": ((HIDDEN, VOCAB), (9, 32, 36))}).data), r"type 9 \(Q8_1\)"),
    "a tensor too many": (bytes(made(LLAMA, TENSORS | {"blk.0.ssm_a": ((HIDDEN,), F32)}).data), "belong to no weight: blk.0.ssm_a"),
    "experts of another count": (
        bytes(made(MOE | {"qwen3moe.expert_count": ("I", 3)}, MOE_TENSORS).data), "the model has 3 experts|has shape"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files(what: str, folder: Path) -> None:
    refused(folder, *BAD[what])


def test_scales_of_nan_are_found_as_they_are_read(folder: Path) -> None:
    data = bytearray(BASES[0].data)
    info = plan_with(folder, bytes(data)).tensors["blk.0.ffn_up.weight"]
    data[info.start : info.start + 2] = b"\x00\x7e"
    (folder / "model.gguf").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight holds a scale of NaN or inf in block 0"):
        quant_compile.load(folder / "model.gguf", device="cpu")


def plan_with(folder: Path, data: bytes) -> Any:
    (folder / "model.gguf").write_bytes(data)
    return plan_of(folder / "model.gguf").files
