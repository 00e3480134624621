"""Hostile headers, indexes and configs by the hundred thousand: valid ones that are changed a little, and ones that a grammar makes.

``Watch.run`` calls a reader and demands an answer or a ``CheckpointError`` that names a file and a fix, soon, in little memory, and
without a look outside of the folder. Everything follows from a seed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from quant_compile.checkpoints.errors import CheckpointError

LONGEST = 5.0  # a hang and not a slow machine
"""CPU seconds of one case."""
LARGEST = 8_000_000
"""Bytes that Python may allocate in one case, whose files have some kB."""


class FuzzError(AssertionError):
    """A reader did what it must not; says which case."""


class TooLong(BaseException):
    """A case does not end; no handler of the product may catch it."""


_watching: list[Watch] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event in _EVENTS:
        _watching[-1].saw(event, args)


_EVENTS = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.system", "subprocess.Popen",
           "socket.connect", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen")  # fmt: skip
_hooked = False


class Watch:
    """Runs readers on a folder.

    Args:
        folder: the only place that may be looked into.
        also: starts of paths that may be read besides, such as Python's own modules.
    """

    def __init__(self, folder: Path, also: tuple[str, ...] = ()) -> None:
        global _hooked
        if not _hooked:
            sys.addaudithook(_audit)
            _hooked = True
        self.folder, self.also = folder, also
        self.cases = self.accepted = 0
        self.slowest = 0.0
        self.largest = 0
        self._seen: list[str] = []

    def saw(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit event while a reader runs."""
        if event not in ("open", "os.listdir", "os.scandir"):
            self._seen.append(f"{event} {args!r:.200}")
            return
        if isinstance(args[0], int):
            return
        path = os.path.abspath(os.fsdecode(args[0] if args[0] is not None else "."))
        inside = path == str(self.folder) or path.startswith(f"{self.folder}{os.sep}")
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or not (inside or path.startswith(self.also)):
            self._seen.append(f"{event} {path}")

    def run(self, reader: Callable[[], Any], case: object) -> Any:
        """What the reader answers, or None where it refuses.

        Raises:
            FuzzError: another exception, no file or fix in the text, too long, too large, or a look outside.
        """
        self._seen.clear()
        answer, error = None, None
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.thread_time()
        _watching.append(self)
        try:
            with _alarm():
                answer = reader()
        except (Exception, TooLong) as caught:
            error = caught
        finally:
            _watching.pop()
        took, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1] - before
        self.cases += 1
        self.accepted += error is None
        self.slowest, self.largest = max(self.slowest, took), max(self.largest, peak)
        if error is not None:
            self._check(error, case)
        if took > LONGEST:
            self._fail(f"takes {took:.1f} s", case)
        if tracemalloc.is_tracing() and peak > LARGEST:
            self._fail(f"allocates {peak:,} bytes", case)
        if self._seen:
            self._fail(f"leaves its folder: {self._seen[0]}", case)
        return answer

    def _check(self, error: BaseException, case: object) -> None:
        text = str(error)
        if not isinstance(error, CheckpointError):
            raise FuzzError(f"{type(error).__name__}: {text[:300]}\n{case!r:.1500}") from error
        if str(self.folder) not in text or "Fix:" not in text:
            self._fail(f"a text without file or fix: {text[:300]}", case)
        if len(text) > 4000:
            self._fail(f"a text of {len(text)} characters", case)

    def _fail(self, what: str, case: object) -> NoReturn:
        raise FuzzError(f"{what}\n{case!r:.1500}")

    def __str__(self) -> str:
        return (
            f"{self.cases:,} cases, {self.accepted:,} accepted, at most {self.slowest:.3f} s and {self.largest:,} bytes"
        )


@contextmanager
def _alarm() -> Iterator[None]:
    """Interrupts what spends three times the CPU time that is allowed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {3 * LONGEST:.0f} s")

    old = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, 3 * LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


@contextmanager
def traced() -> Iterator[None]:
    """Python's allocations are counted."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


# --- values ---

NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 128, -1, -2, 255, 256, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1, 1 << 61,
           1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -(1 << 63), 0.5, 2.0, 1e300, True, False)  # fmt: skip
TEXTS = ("", " ", ".", "..", "../x", "/etc/passwd", "\0", "\ud800", "a/b", "é", "字" * 5, "٣", "x" * 300, "a" * 5000, "%s%n", "{}", "None",
         "__metadata__", "__class__", "model.safetensors", "re:", "re:.*", "*", "[", "{0.__class__}", "\n", "\x1b[31m")  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly small."""
    kind = rng.randrange(10 if depth < 3 else 6)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind == 5:
        return None
    if kind < 8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def changed(rng: random.Random, whole: Any, words: tuple[str, ...] = ()) -> Any:
    """A JSON value with one place changed: removed, replaced, renamed, doubled, or moved."""
    places = list(_places(whole))
    if not places:
        return value(rng)
    owner, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice((*TEXTS, *words))] = owner.pop(key)
    elif kind == 2 and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif kind == 3:
        other, place = rng.choice(places)
        owner[key] = _copied(other[place]) if place in (other if isinstance(other, dict) else range(len(other))) else 0
    elif kind == 4 and words:
        owner[key] = rng.choice(words)
    elif kind == 5 and isinstance(owner[key], int):
        owner[key] += rng.choice((-64, -8, -1, 1, 8, 64))
    elif kind == 6 and isinstance(owner, dict):
        owner[rng.choice((*words, *TEXTS))] = value(rng)
    else:
        owner[key] = value(rng)
    return whole


def _copied(whole: Any) -> Any:
    return json.loads(json.dumps(whole))


def _places(whole: Any) -> Iterator[tuple[Any, Any]]:
    items = whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list) else ()
    for key, inner in items:
        yield whole, key
        yield from _places(inner)


def text_of(rng: random.Random, whole: Any) -> bytes:
    """JSON in UTF-8, sometimes with what Python's encoder would never write."""
    try:
        text = json.dumps(whole, ensure_ascii=rng.random() < 0.8).encode()
    except UnicodeEncodeError:
        text = json.dumps(whole).encode()
    kind = rng.randrange(12)
    if kind == 0:
        return damaged(rng, text)
    if kind == 1:
        return monster(rng)
    if kind == 2:
        return text.replace(b"1", rng.choice((b"1" * 5000, b"1e999", b"NaN", b"-Infinity", b"01", b"1.0", b"1_0")), 1)
    if kind == 3:
        return text.replace(b"{", b'{"twice":1,"twice":2,', rng.randrange(3))
    return text


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, put in, or doubled."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 3:
            del out[at : at + rng.randrange(1, 20)]
        else:
            out[at:at] = out[at : at + rng.randrange(1, 60)]
    return bytes(out)


def monster(rng: random.Random) -> bytes:
    """JSON that is small and costs much where a reader is careless."""
    count = rng.choice((10, 300, 900, 980, 1000, 3000, 20_000))
    kind = rng.randrange(7)
    if kind == 0:
        return b'{"a":' * count + b"1" + b"}" * count
    if kind == 1:
        return b'{"a":' + b"[" * count + b"]" * count + b"}"
    if kind == 2:  # a key twice, at the end of many
        return json.dumps({f"k{i}": 0 for i in range(count)}).encode()[:-1] + b',"k%d":1}' % (count - 1)
    if kind == 3:
        return b'{"a":' + b"9" * count + b"}"
    if kind == 4:
        return json.dumps(
            {"a" * count: {"dtype": "F32" * count, "shape": [1] * count, "data_offsets": [0] * count}}
        ).encode()
    if kind == 5:
        return b'{"' + b"\\u0000" * count + b'":0}'
    return b" " * count + b"{}" + b"\n" * count


# --- headers ---

SIZES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I32": 4,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "BOOL": 1,
    "I64": 8,
}
HEADER_WORDS = (
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "w",
    "a.weight",
    *SIZES,
    "F4",
    "F6_E2M3",
    "f32",
    "Q4_K",
)


def header(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A valid header, and the bytes of its tensors."""
    entries: dict[str, Any] = {}
    at = 0
    for i in range(rng.randrange(6)):
        dtype = rng.choice(tuple(SIZES))
        shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(4))]
        size = SIZES[dtype]
        for side in shape:
            size *= side
        entries[rng.choice((f"t{i}", f"model.layers.{i}.w", *TEXTS))] = {
            "dtype": dtype, "shape": shape, "data_offsets": [at, at + size]
        }  # fmt: skip
        at += size
    if rng.random() < 0.3:
        entries["__metadata__"] = {"format": "pt"}
    return entries, at


def safetensors_file(rng: random.Random) -> bytes:
    """A file's bytes: valid, or with a fault in the header's values, its text, its length or its data."""
    entries, size = header(rng)
    whole: Any = entries
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        whole = changed(rng, whole, HEADER_WORDS)
    text = text_of(rng, whole) if rng.random() < 0.7 else json.dumps(whole).encode()
    length, data = len(text), bytes(size)
    kind = rng.randrange(12)
    if kind == 0:
        length = rng.choice((0, 1, length - 1, length + 1, length + size, 100_000_000, 1 << 40, (1 << 64) - 1))
    elif kind == 1:
        data = data[: rng.randrange(size + 1)] if rng.random() < 0.5 else data + bytes(rng.randrange(1, 9))
    whole_file = max(0, length).to_bytes(8, "little") + text + data
    return damaged(rng, whole_file) if kind == 2 else whole_file


# --- indexes ---

SHARDS = ("one.safetensors", "two.safetensors")
INDEX_WORDS = (
    "weight_map", "metadata", "a", "b", "c", *SHARDS, "three.safetensors",
    "../one.safetensors", "/dev/zero.safetensors", "one.safetensors/", "./one.safetensors", "one.safetensors\0", "sub/one.safetensors",
    "C:one.safetensors", "pytorch_model.bin", "\\one.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors", "~.safetensors",
    ".safetensors", "model.safetensors.index.json", "pipe.safetensors", "folder.safetensors", "loop.safetensors",
)  # fmt: skip


def index_file(rng: random.Random) -> bytes:
    """An index of two shards, valid or not."""
    whole: Any = {"metadata": {"total_size": 24}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}}
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        whole = changed(rng, whole, INDEX_WORDS)
    return text_of(rng, whole)


# --- configs ---

CONFIG_WORDS = (
    "bits", "group_size", "sym", "desc_act", "checkpoint_format", "config_groups", "format", "ignore", "kv_cache_scheme", "quant_algo",
    "quantized_layers", "weight_block_size", "packing_format", "data_type", "extra_config", "dynamic", "version",
    "modules_to_not_convert", "meta", "load_in_4bit", "load_in_8bit", "quant_type", "weights", "input_activations",
    "output_activations", "targets", "num_bits", "type", "strategy", "symmetric", "block_structure", "activation_scheme", "act_bits",
    "act_dynamic", "sparsity_config", "transform_config", "quant_method", "w_bit", "q_group_size", "zero_point", "exclude_modules",
    "quantizer", "gptq", "gptq_v2", "gptq_p", "awq", "fp8", "modelopt", "compressed-tensors", "auto-round", "intel/auto-round",
    "bitsandbytes", "torchao", "mxfp4", "hqq", "int", "float", "group", "tensor", "channel", "block", "token", "tensor_group",
    "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "FP8", "NVFP4", "W4A16_AWQ", "MIXED_PRECISION",
    "auto_round:auto_awq", "auto_round:auto_gptq", "auto_round:llm_compressor", "mx_fp", "nv_fp4", "dynamic", "static", "Linear",
    "+:.*down.*", "-:.*", "+:(a|a)*b",
)  # fmt: skip
PATTERNS = (
    "re:.*up_proj", "re:(a|a)*$", "re:(?:a|aa)+b", "re:a*a*a*a*a*a*a*b", "re:((a*)*)*", "re:(a{1,9}){1,9}b", "re:(",
    "re:(?P<n>x)(?P=n)", "re:(?i:UP)", "re:(?=(a|a)*b)", "re:(a|b|ab)*c", "re:(.|a)*c", "re:(a?){60}a{60}b", "re:a{4294967296}",
    "re:(?:a{65535}){65535}", "re:[[:alpha:]", "re:\\p{L}+", "re:(?R)", "re:(?:abc){e<=1}", "re:\\L<x>", "re:" + "(" * 150 + ")" * 150,
    "*a*a*a*a*a*a*a*a*b", "[z-a]", "[!", "[]", "model.layers.*", "?" * 300, "re:(?<=a)b", "re:a++", "re:(?>a)", "re:\\N{DIGIT ONE}",
    "re:(?(1)a|b)", "re:(?u:a)|(?a:b)",
)  # fmt: skip
CONFIG_WORDS += PATTERNS
_CT = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}
CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:7"]},
        "dynamic": {"+:.*down.*": {"bits": 8, "group_size": 32}, "-:.*o_proj": {}},
    },
    {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    },
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": {"num_bits": 8},
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": _CT, "input_activations": None},
            "group_1": {
                "targets": ["re:.*down_proj"],
                "format": "float-quantized",
                "weights": {**_CT, "type": "float"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            },
        },
    },
    {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    },
    {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head"],
        "group_size": 16,
    },
    {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
            "lm_head": {"quant_algo": "FP8"},
        },
    },
    {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}, ".*o_proj.*": {"bits": 16}},
    },
    {
        "quant_method": "auto-round",
        "bits": 8,
        "data_type": "fp",
        "act_bits": 8,
        "act_dynamic": True,
        "packing_format": "auto_round:fp8",
    },
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "llm_int8_skip_modules": ["lm_head"]},
    {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
)
OTHERS = ("hf_quant_config.json", "quantize_config.json", "quantization_config.json")
NAMES = (
    "model.layers.0.mlp.up_proj",
    "lm_head",
    "a" * 200,
    "a" * 200 + "cb",
    "model.layers.0.mlp.experts.3.down_proj",
    "",
)


def config_files(rng: random.Random) -> dict[str, bytes]:
    """The configs of a folder, by name."""
    made = _config(rng)
    out = {"config.json": text_of(rng, _wrapped(rng, made))}
    if rng.random() < 0.3:
        other = _copied(made) if rng.random() < 0.5 and _plain(made) else _config(rng)
        name = rng.choice(OTHERS)
        out[name] = text_of(rng, {"quantization": other} if name.startswith("hf") and rng.random() < 0.9 else other)
        if rng.random() < 0.2:
            del out["config.json"]
    return out


def _plain(whole: Any) -> bool:
    return isinstance(whole, dict)


def _wrapped(rng: random.Random, made: Any) -> Any:
    kind = rng.randrange(20)
    if kind == 0:
        return {"model_type": "llama", "text_config": {"quantization_config": made}}
    return changed(rng, {"quantization_config": made}, CONFIG_WORDS) if kind == 1 else {"quantization_config": made}


def _config(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return {
            "quant_method": rng.choice(CONFIG_WORDS),
            **{rng.choice(CONFIG_WORDS): value(rng) for _ in range(rng.randrange(5))},
        }
    if rng.random() < 0.01:
        bomb = rng.choice(PATTERNS)
        return rng.choice(
            ({**CONFIGS[0], "dynamic": {bomb.replace("re:", "+:"): {}}}, {**CONFIGS[1], "modules_to_not_convert": [bomb]},
             {**CONFIGS[2], "ignore": [bomb]},
             {**CONFIGS[5], "quantized_layers": {bomb: {"quant_algo": "FP8"}}},
             {**CONFIGS[6], "extra_config": {bomb.removeprefix("re:"): {"bits": 8}}})
        )  # fmt: skip
    return config(rng, rng.choice(CONFIGS))


def config(rng: random.Random, whole: dict[str, Any]) -> Any:
    """A config of quantization with a few places changed."""
    made: Any = _copied(whole)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        made = changed(rng, made, CONFIG_WORDS)
    return made


# --- tensors against a model ---

SUFFIX_WORDS = ("weight", "scales", "qzeros", "g_idx", "weight_scale", "weight_packed", "weight_zero_point", "_weight_scale", "bias",
                "_weight_zero_point", "input_scale", "weight_scale_2", "weight_shape", "pre_quant_scale", "weight.absmax")  # fmt: skip
NAME_WORDS = (
    "", ".", "x", "model", "layers." + "9" * 5000 + ".x", "model.layers.٣.mlp.up_proj.weight", "model.layers.7.mlp.up_proj.scales",
    "model.layers.0.mlp.experts.99999999999999999999.up_proj.weight", "model.layers.0.mlp.experts." + "1" * 5000 + ".up_proj.weight",
    "experts.0.up_proj", "lm_head.scales", "k_scale", "model.embed_tokens.qweight", "model.norm.weight_scale",
)  # fmt: skip


def tensors(rng: random.Random, whole: dict[str, tuple[str, list[int]]]) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes of a checkpoint with a few changed."""
    out = {name: (dtype, list(shape)) for name, (dtype, shape) in whole.items()}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        name = rng.choice([name for name in out if "proj" in name] or list(out))
        dtype, shape = out[name]
        kind = rng.randrange(7)
        if kind == 0:
            del out[name]
        elif kind == 1:
            stem = name.rpartition(".")[0]
            out[f"{stem}.{rng.choice(SUFFIX_WORDS)}"] = out.pop(name)
        elif kind == 2:
            out[f"{name.rpartition('.')[0]}.{rng.choice(SUFFIX_WORDS)}"] = (rng.choice(tuple(SIZES)), list(shape))
        elif kind == 3:
            out[rng.choice(NAME_WORDS)] = (dtype, shape)
        elif kind == 4:
            out[name] = (rng.choice(tuple(SIZES)), shape)
        else:
            out[name] = (dtype, _shape(rng, shape))
        if not out:
            break
    return out


def _shape(rng: random.Random, shape: list[int]) -> list[int]:
    kind = rng.randrange(6)
    if kind == 0 and shape:
        return shape[:-1]
    if kind == 1:
        return [*shape, rng.choice((0, 1, 2))]
    if kind == 2:
        return shape[::-1]
    if kind == 3:
        return [rng.choice((0, 1, 2, 4, 64, 1 << 40)) for _ in range(rng.randrange(4))]
    at = rng.randrange(len(shape) + 1)
    return [*shape[:at], rng.choice((0, 1, 2, 3, 8, 1 << 20)), *shape[at + 1 :]]


def sparse_file(file: Path, whole: dict[str, tuple[str, list[int]]], data: dict[str, bytes]) -> None:
    """A file of these tensors whose values are holes, but for ``data``; those that no file system would hold get no bytes."""
    entries: dict[str, Any] = {}
    at, places = 0, {}
    for name, (dtype, shape) in whole.items():
        size = SIZES[dtype]
        for side in shape:
            size *= side
        size = size if size < 1 << 34 else 0
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        places[name] = (at, size)
        at += size
    text = json.dumps(entries).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + at)
        for name, values in data.items():
            if name in places and places[name][1] == len(values):
                opened.seek(8 + len(text) + places[name][0])
                opened.write(values)


MODEL_WORDS = (
    "llama", "mistral", "qwen3_moe", "gpt2", "bert", "gpt_oss", "deepseek_v3", "mamba", "t5", "LlamaForCausalLM", "LlamaModel",
    "pipeline", "utils", "AutoModel", "PreTrainedModel", "GPT2LMHeadModel", "num_hidden_layers", "hidden_size", "head_dim",
    "vocab_size", "model_type", "architectures", "auto_map", "configuration_files", "text_config", "rope_parameters", "rope_scaling",
    "rope_type", "yarn", "linear", "dynamic", "dtype", "torch_dtype", "float99", "float32", "int8", "attn_implementation",
    "_attn_implementation", "kernels-community/flash-attn", "layer_types", "tie_word_embeddings", "hidden_act", "gelu", "_name_or_path",
    "max_position_embeddings", "num_experts", "n_layer", "../../config.1.0.0.json", "evil--repo.Config", "AutoConfig", "custom.Config",
    "base_config", "_commit_hash", "gguf_file", "id2label", "num_labels", "quantization_config",
)  # fmt: skip


def model_config(rng: random.Random, whole: dict[str, Any]) -> bytes:
    """A model's config with a few places changed."""
    made: Any = _copied(whole)
    for _ in range(rng.choice((1, 1, 2, 3))):
        made = changed(rng, made, MODEL_WORDS)
    return text_of(rng, made) if rng.random() < 0.3 else json.dumps(made).encode()
