"""Loading to a GPU through pinned buffers: every byte as in the file, within its memory, and nothing left after an error."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import quant_compile
from quant_compile.checkpoints import staging
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, Part
from quant_compile.checkpoints.staging import SIZES, Sizes, staged
from tests.checkpoints.staged import readers
from tests.checkpoints.support import write
from tests.checkpoints.test_packed import assert_same_slabs

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
MIB = 1 << 20
# Buffers of 1 MB and a byte, so that parts of tensors begin at odd places.
ODD = Sizes(readers=3, buffer=MIB + 1, ahead=6 * MIB, pieces=5, worth=0)
DTYPES = (
    torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int8, torch.int32, torch.int64,
)  # fmt: skip


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Memory of earlier tests is no part of these."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    assert not readers()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Two shards; sizes around a buffer's, several buffers, none and single bytes."""
    draw = random.Random(0)
    sizes = [
        0,
        1,
        1,
        3,
        MIB,
        MIB + 1,
        MIB + 2,
        2 * MIB + 3,
        9 * MIB + 8,
        0,
        *(draw.randrange(1, 5000) for _ in range(80)),
    ]
    for shard in range(2):
        tensors: dict[str, Tensor] = {"one": torch.tensor(2.5)} if shard else {}
        for i, nbytes in enumerate(sizes):
            dtype = DTYPES[(i + shard * 5) % len(DTYPES)]
            raw = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes // dtype.itemsize * dtype.itemsize,))
            tensors[f"{shard}.{i}"] = raw.to(torch.uint8).view(dtype)
        save_file(tensors, str(tmp_path / f"{shard}.safetensors"))
    return Files.open(tmp_path)


def same(found: Tensor, wanted: Tensor) -> bool:
    """To the bit."""
    assert found.is_cuda and (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    return torch.equal(found.cpu().reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("sizes", [ODD, SIZES], ids=["odd", "default"])
@pytest.mark.parametrize("busy", [False, True])
def test_every_byte(files: Files, sizes: Sizes, busy: bool) -> None:
    """Also while the stream works, in memory that its kernels have just used and freed."""
    names = [*files.tensors]
    random.Random(1).shuffle(names)
    work = torch.randn(2048, 2048, device=GPU)
    with staged(files, [[files.tensors[name]] for name in names], GPU, replace(sizes, worth=0)):
        assert files.staged is not None, "there is no pinned memory"
        found: list[Tensor] = []
        for name in names:
            if busy:
                for _ in range(5):
                    torch.full((3 * MIB,), 7, dtype=torch.uint8, device=GPU)
                    work = (work @ work).clamp(-1, 1)
            found.append(files.load(Part(name), GPU))
            found.append(found[-1].reshape(-1).view(torch.uint8).flip(0))  # read on the stream at once
        for name, values, flipped in zip(names, found[::2], found[1::2], strict=True):
            wanted = files.get(name)
            assert same(values, wanted), name
            assert torch.equal(flipped.cpu(), wanted.reshape(-1).view(torch.uint8).flip(0)), name
    assert files.staged is None and not files.notes


def test_unaligned_places(tmp_path: Path) -> None:
    """Nothing says that a header's length is a multiple of anything."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5.0), "b": torch.arange(3).bfloat16()}, str(file))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :])
    files = Files.open(file)
    with staged(files, [[info] for info in files.tensors.values()], GPU, ODD):
        assert all(same(files.load(Part(name), GPU), files.get(name)) for name in files.tensors)


def test_a_file_that_became_shorter(files: Files) -> None:
    last = max((info for info in files.tensors.values() if info.nbytes), key=lambda info: (info.file, info.start))
    os.truncate(last.file, last.start + last.nbytes - 1)
    before = torch.cuda.memory_allocated()
    with pytest.raises(CheckpointError, match="has become shorter"):
        _load_all(files)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    torch.cuda.synchronize()


def _load_all(files: Files) -> None:
    with staged(files, [[info] for info in files.tensors.values()], GPU, ODD):
        for name in files.tensors:
            files.load(Part(name), GPU)


# --- whole models ---


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(24, device=GPU)[None]).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 600 MB in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=4, vocab_size=8192,
        max_position_embeddings=256, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    return write(tmp_path_factory.mktemp("source"), model, dict(model.state_dict()), None)


def rounding_of_bf16(source: Path) -> float:
    """How far the unquantized model's logits in bf16 are from those in f32: two that compute in bf16 are about 1.4 times as far apart."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(GPU)
    in_bf16 = logits(model).float()
    exact = logits(model.float())
    return float((in_bf16 - exact).norm() / exact.norm())


@pytest.mark.parametrize("policy", ["FP8_DYNAMIC", "W4A16"])
def test_a_model_is_that_of_mapped_files(
    source: Path, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(staging, "link_of", lambda device: None)
        plain = quant_compile.load(source, policy, device=GPU)
    found = quant_compile.load(source, policy, device=GPU)
    assert_same_slabs(found, plain)
    wanted = logits(found)
    quant_compile.save(found, tmp_path / "packed", "packed")
    again = quant_compile.load(tmp_path / "packed", device=GPU)
    assert_same_slabs(again, found)
    if (
        policy == "W4A16"
    ):  # kernels are chosen by time and may be others, and split sums vary in order: both are bf16's rounding
        assert (logits(again) - wanted).norm() < 2 * rounding_of_bf16(source) * wanted.norm()
    else:
        assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("policy", ["FP8_DYNAMIC", "W4A16"])
def test_memory(source: Path, policy: str, tmp_path: Path) -> None:
    """The quantized model, one weight in 16 bits and f32 on its way, and what is read ahead of it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = quant_compile.load(source, policy, device=GPU)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    layer = 2 * (2048 * 5632 * 3 + 2048 * 2048 * 2 + 2048 * 512 * 2)
    assert peak <= held + layer + SIZES.ahead
    quant_compile.save(model, tmp_path / "packed", "packed")
    del model
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = quant_compile.load(tmp_path / "packed", device=GPU)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert peak <= held + layer  # what is read ahead stays
    del again


def test_a_load_that_fails_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, reads = torch.cuda.memory_allocated(), os.preadv, 0

    def fail(*args: object) -> int:
        nonlocal reads
        reads += 1
        if reads > 20:
            raise OSError(5, "Input/output error")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output"):
        quant_compile.load(source, "FP8_DYNAMIC", device=GPU)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_without_pinned_memory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: object, nbytes: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(staging.CudaLink, "pinned", none)
    model = quant_compile.load(source, "FP8_DYNAMIC", device=GPU)
    assert any("no pinned memory" in note for note in quant_compile.report(model).notes)
