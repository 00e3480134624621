"""Headers, indexes and folders: what can be read is what safetensors reads; all else is a clear error before it costs anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, read_header


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Bytes of a safetensors file with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), span: Any = (0, 8)) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(span) if isinstance(span, tuple) else span,
    }


def test_every_dtype_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    kinds = (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.bool,
    )
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds} | {
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, str(tmp_path / "model.safetensors"), {"format": "pt"})
    files = Files.open(tmp_path)
    assert files.metadata == {"format": "pt"}
    assert set(files.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = files.get(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.float(), tensor.float())


def test_a_tensor_at_an_odd_place_is_read(tmp_path: Path) -> None:
    """Nothing says that a header's length is a multiple of anything."""
    file = tmp_path / "model.safetensors"
    text = json.dumps({"a": entry()}).encode()
    text += b" " * ((3 - len(text)) % 8)
    file.write_bytes(raw(text, torch.tensor([1.5, -2.0]).numpy().tobytes()))
    assert (8 + len(text)) % 4
    assert Files.open(file).get("a").tolist() == [1.5, -2.0]


def test_writing_to_a_mapped_tensor_changes_no_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, str(tmp_path / "model.safetensors"))
    before = (tmp_path / "model.safetensors").read_bytes()
    Files.open(tmp_path).get("a").fill_(7.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


BAD = {
    "empty": (b"", "too few"),
    "cut off in the length": (b"\x10\0\0", "too few"),
    "absurd header": (raw({}, length=1 << 60), "promises a header"),
    "header longer than the file": (raw({}, length=3), "promises a header"),
    "no JSON": (raw(b"{nope"), "no JSON"),
    "no UTF-8": (raw(b"\xff\xfe{}"), "no JSON"),
    "a list": (raw([1]), "must hold an object"),
    "deep": (raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "huge number": (raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'), "no JSON"),
    "twice": (
        raw(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "there twice",
    ),
    "entry is a number": (raw({"a": 3}), "no object"),
    "unknown dtype": (raw({"a": entry("Q4")}, b"x" * 8), "dtype 'Q4'"),
    "dtype is a list": (raw({"a": entry(["F32"])}, b"x" * 8), "dtype"),
    "negative size": (raw({"a": entry(shape=(-2,))}, b"x" * 8), "shape"),
    "fraction": (raw({"a": entry(shape=[2.0])}, b"x" * 8), "shape"),
    "true is no size": (raw({"a": entry(shape=[True])}, b"x" * 8), "shape"),
    "absurd size": (raw({"a": entry(shape=(1 << 58, 2))}, b"x" * 8), "takes"),
    "larger than any": (raw({"a": entry(shape=(1 << 61, 4))}, b"x" * 8), "larger than any"),
    "absurd beside a size of 0": (raw({"a": entry(shape=(0, 1 << 61, 4), span=(0, 0))}), "larger than any"),
    "half a surrogate": (raw(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "no JSON"),
    "out of range": (raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1e999}}', b"x"), "out of range"),
    "no number": (raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":NaN}}', b"x"), "out of range"),
    "blanks first": (raw(b" {}"), "blanks"),
    "twice among many": (
        raw(b'{"z":0,%s"z":0}' % b"".join(b'"%d":0,' % i for i in range(200_000))),
        "'z' is there twice",
    ),
    "many dimensions": (raw({"a": entry(shape=[1] * 40)}, b"x" * 8), "shape"),
    "offsets backwards": (raw({"a": entry(span=(8, 0))}, b"x" * 8), "has -8 bytes"),
    "three offsets": (raw({"a": entry(span=(0, 4, 8))}, b"x" * 8), "data_offsets"),
    "shape and bytes disagree": (raw({"a": entry(shape=(3,))}, b"x" * 8), "takes 12"),
    "data cut off": (raw({"a": entry()}, b"x" * 5), "3 bytes past the end"),
    "overlap": (raw({"a": entry(), "b": entry(span=(4, 12))}, b"x" * 12), "shares bytes with a"),
    "a hole": (raw({"a": entry(), "b": entry(span=(12, 20))}, b"x" * 20), "4 bytes after the end of a"),
    "a hole at the start": (raw({"a": entry(span=(4, 12))}, b"x" * 12), "does not begin"),
    "bytes left over": (raw({"a": entry()}, b"x" * 9), "1 bytes after its last tensor"),
    "metadata with numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_file_cannot_hold_is_an_error_that_names_it(case: str, tmp_path: Path) -> None:
    data, words = BAD[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as raised:
        Files.open(tmp_path)
    assert "model.safetensors" in str(raised.value) and "Fix:" in str(raised.value)


def index_of(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd.safetensors",
        "sub/a.safetensors",
        "..",
        "",
        3,
        None,
        "a.bin",
        "a\\b.safetensors",
        "C:a.safetensors",
    ],
)
def test_an_index_cannot_leave_its_folder(shard: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, str(tmp_path / "secret.safetensors"))
    inner = tmp_path / "model"
    inner.mkdir()
    index_of(inner, {"a": shard})
    with pytest.raises(CheckpointError, match="no safetensors file of this folder"):
        Files.open(inner)


def test_names_that_no_file_has_and_what_is_no_file(tmp_path: Path) -> None:
    """A pipe would keep its reader waiting."""
    for shard in ("x" * 300 + ".safetensors", "\0.safetensors", "pipe.safetensors"):
        inner = tmp_path / str(len(shard))
        inner.mkdir()
        os.mkfifo(inner / "pipe.safetensors")
        index_of(inner, {"a": shard})
        with pytest.raises(CheckpointError, match=r"index\.json.*(not there|no safetensors file)"):
            Files.open(inner)
        (inner / "model.safetensors.index.json").unlink()
        with pytest.raises(CheckpointError, match=r"pipe\.safetensors: cannot be read: it is no regular file"):
            Files.open(inner)


def test_shards_that_are_missing_or_lack_a_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, str(tmp_path / "one.safetensors"))
    index_of(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"not there: two\.safetensors"):
        Files.open(tmp_path)
    save_file({"c": torch.zeros(1)}, str(tmp_path / "two.safetensors"))
    with pytest.raises(CheckpointError, match="promises b in this file"):
        Files.open(tmp_path)
    save_file({"b": torch.ones(1), "a": torch.zeros(1)}, str(tmp_path / "two.safetensors"))
    with pytest.raises(CheckpointError, match=r"is also in one\.safetensors"):
        Files.open(tmp_path)
    save_file({"b": torch.ones(1)}, str(tmp_path / "two.safetensors"))
    assert Files.open(tmp_path).get("b").tolist() == [1.0]


@pytest.mark.parametrize("weight_map", [None, [], {}, "a"])
def test_an_index_without_a_map(weight_map: Any, tmp_path: Path) -> None:
    index_of(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="no weight_map"):
        Files.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.gguf"])
def test_other_files_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match=name) as raised:
        Files.open(tmp_path)
    assert "Fix:" in str(raised.value)
    with pytest.raises(CheckpointError, match=name):
        Files.open(tmp_path / name)


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors files"):
        Files.open(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        Files.open(tmp_path / "absent")


WORDS = ["a", "b", "dtype", "shape", "data_offsets", "__metadata__"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "BF16", "U8", "F8_E4M3"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=json_values | st.binary(max_size=64), data=st.binary(max_size=32), length=st.none() | st.integers(0, 1 << 63)
)
def test_any_header_is_read_or_refused(header: Any, data: bytes, length: int | None, tmp_path: Path) -> None:
    """No other exception, and nothing is allocated that the file does not have."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw(header, data, length))
    try:
        infos, _ = read_header(file)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in infos) <= file.stat().st_size
