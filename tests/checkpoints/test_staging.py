"""Staging: every byte arrives whatever the order, sizes and delays; errors, interrupts and closing leave nothing behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import quant_compile
from quant_compile.checkpoints import staging
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files, Part, TensorInfo
from quant_compile.checkpoints.staging import Sizes, Stager, staged
from quant_compile.lowering.weights import STORE
from tests.checkpoints.packers import CASES
from tests.checkpoints.staged import SMALL, LateLink, readers
from tests.checkpoints.support import logits, quantized, tiny_gpt_oss, tiny_llama, tiny_moe, write
from tests.checkpoints.test_packed import assert_same_slabs

CPU = torch.device("cpu")
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.bool, torch.int64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of tensors of 0 to 700 bytes."""
    draw = random.Random(0)
    sizes = [0, 1, 1, 2, 63, 64, 65, 128, 500, 0, 3, 5, 7, 64, 64, 700, *(draw.randrange(90) for _ in range(60))]
    for shard in range(2):
        tensors: dict[str, Tensor] = {}
        for i, nbytes in enumerate(sizes[shard::2]):
            dtype = DTYPES[i % len(DTYPES)]
            values = torch.randint(0, 2, (nbytes // dtype.itemsize,)) if dtype == torch.bool else torch.randn(nbytes)
            tensors[f"{shard}.{i}"] = values[: nbytes // dtype.itemsize].mul(9).to(dtype)
        tensors[f"{shard}.one"] = torch.tensor(1.5)
        save_file(tensors, str(tmp_path / f"{shard}.safetensors"))
    return tmp_path


def same(found: Tensor, wanted: Tensor) -> bool:
    """To the bit."""
    return (found.dtype, found.shape) == (wanted.dtype, wanted.shape) and torch.equal(
        found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
    )


def staged_on(link: LateLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "link_of", lambda device: link)


@pytest.mark.parametrize("delay", [0.0, 0.002])
@pytest.mark.parametrize("seed", range(6))
def test_any_order_gives_every_byte(folder: Path, seed: int, delay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are never asked for, some twice, some out of their order, some were not announced."""
    link, files, draw = LateLink(delay), Files.open(folder), random.Random(seed)
    staged_on(link, monkeypatch)
    names = list(files.tensors)
    draw.shuffle(names)
    groups = [names[i : i + 3] for i in range(0, len(names) - 5, 3)]
    asked = [name for group in groups for name in draw.sample(group, draw.choice([1, 2, 3, 3, 3]))]
    asked = [*names[-5:], *asked, *draw.sample(names, 9)]
    for _ in range(4):
        i, j = draw.randrange(len(asked)), draw.randrange(len(asked))
        asked[i], asked[j] = asked[j], asked[i]
    with staged(files, [[files.tensors[name] for name in group] for group in groups], CPU, SMALL):
        for name in asked:
            assert same(files.load(Part(name), CPU), files.get(name)), name
    assert not readers() and link.given_back == 1 and files.staged is None
    assert link.pinned_bytes == 4 * SMALL.buffer


def announced(files: Files) -> list[list[TensorInfo]]:
    return [[info] for info in files.tensors.values()]


def test_what_is_ahead_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, link = Files.open(folder), LateLink()
    stager = Stager(link, announced(files), SMALL)
    try:
        for info in files.tensors.values():
            stager.take(info)
            ahead = [arrival.info.nbytes for arrival in stager._arrivals.values()]
            assert sum(ahead) == stager._ahead
            assert sum(ahead) <= SMALL.ahead or len([n for n in ahead if n]) == 1
    finally:
        stager.close()
    assert 1 < link.most_pairs <= SMALL.pieces


def test_neighbours_are_read_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, calls = Files.open(folder), 0
    real = os.preadv

    def counted(*args: object) -> int:
        nonlocal calls
        calls += 1
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", counted)
    ordered = sorted(files.tensors.values(), key=lambda info: (info.file, info.start))
    stager = Stager(LateLink(), [[info] for info in ordered], Sizes(1, 1 << 16, 1 << 17, 256))
    try:
        for info in ordered:
            stager.take(info)
    finally:
        stager.close()
    assert calls <= 3  # the first, what is left of its shard, and the other shard


def test_short_reads_are_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, real = Files.open(folder), os.preadv
    staged_on(LateLink(), monkeypatch)
    monkeypatch.setattr(os, "preadv", lambda fd, views, start: real(fd, [views[0][:7]], start))
    with staged(files, announced(files), CPU, SMALL):
        assert all(same(files.load(Part(name), CPU), files.get(name)) for name in files.tensors)


def test_experts_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of a tensor is that of the mapped one, and holds no more memory than itself."""
    save_file({"w": torch.randn(3, 6, 10), "flat": torch.randn(6)}, str(tmp_path / "model.safetensors"))
    files = Files.open(tmp_path)
    parts = [
        Part("w", index, transposed, rows)
        for index in (None, 0, 2)
        for transposed in (False, True)
        for rows in (None, (0, 2), (1, 99))
    ]
    parts += [Part("flat", None, True, (2, 4)), Part("flat", 3)]
    wanted = [files.load(part, CPU) for part in parts]
    staged_on(LateLink(), monkeypatch)
    with staged(files, [[part.span(files.tensors[part.name])] for part in parts], CPU, SMALL):
        for part, want in zip(parts, wanted, strict=True):
            found = files.load(part, CPU)
            assert torch.equal(found, want) and found.untyped_storage().nbytes() == want.numel() * 4, part
    with pytest.raises(IndexError):
        Part("w", 3).span(files.tensors["w"])


# --- what goes wrong ---


def test_a_file_that_became_shorter_is_an_error_that_names_the_tensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files.open(folder)
    staged_on(link := LateLink(), monkeypatch)
    last = max((info for info in files.tensors.values() if info.nbytes), key=lambda info: (info.file, info.start))
    os.truncate(last.file, last.start + last.nbytes - 1)
    with (
        pytest.raises(CheckpointError, match=f"{last.name}: the file has become shorter.*\nFix"),
        staged(files, announced(files), CPU, SMALL),
    ):
        for name in files.tensors:
            files.load(Part(name), CPU)
    assert not readers() and link.given_back == 1


def test_a_file_that_is_gone_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files.open(folder)
    staged_on(LateLink(), monkeypatch)
    (folder / "1.safetensors").unlink()
    with staged(files, announced(files), CPU):
        assert files.staged is None  # so few bytes are not worth it
    with pytest.raises(CheckpointError, match=r"1\.safetensors.*cannot be read"):
        load_all(files)
    assert not readers()


def load_all(files: Files) -> None:
    with staged(files, announced(files), CPU, SMALL):
        for name in files.tensors:
            files.load(Part(name), CPU)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no memory")])
def test_an_error_of_a_reader_reaches_who_asks(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files.open(folder)
    staged_on(LateLink(), monkeypatch)
    reads = 0

    def fail(*args: object) -> int:
        nonlocal reads
        reads += 1
        if reads > 2:
            raise error
        return real(*args)  # type: ignore[arg-type]

    real = os.preadv
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else MemoryError, match=r"Input/output|no memory"):
        load_all(files)
    assert not readers()


def test_an_error_of_a_copy_reaches_who_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(count: int) -> None:
        if count == 3:
            raise RuntimeError("device lost")

    staged_on(LateLink(on_copy=fail), monkeypatch)
    with pytest.raises(RuntimeError, match="device lost"):
        load_all(Files.open(folder))
    assert not readers()


def test_an_interrupt_ends_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the load waits for a tensor."""
    # A shell's background job ignores interrupts, and so does Python then.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[int] = []

    def on_copy(count: int) -> None:
        if not sent:  # the load has begun, and has not ended before this returns
            sent.append(count)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

    staged_on(link := LateLink(on_copy=on_copy), monkeypatch)
    started = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            load_all(Files.open(folder))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not readers() and link.given_back == 1
    assert time.perf_counter() - started < 5


def test_an_error_between_tensors_ends_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files.open(folder)
    staged_on(LateLink(0.001), monkeypatch)
    with pytest.raises(ZeroDivisionError), staged(files, announced(files), CPU, SMALL):
        files.load(Part(next(iter(files.tensors))), CPU)
        raise ZeroDivisionError
    assert not readers() and files.staged is None


def test_no_room_ahead_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit yet is allocated when it is asked for."""
    link, files = LateLink(), Files.open(folder)
    staged_on(link, monkeypatch)
    real, asked = link.empty, 0

    def full(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nonlocal asked
        asked += 1
        if asked % 2 == 0:
            raise torch.OutOfMemoryError
        return real(shape, dtype)

    monkeypatch.setattr(link, "empty", full)
    names = [name for name, info in files.tensors.items() if info.nbytes]
    with staged(files, [[files.tensors[name]] for name in names], CPU, SMALL):
        for name in names:
            asked = 0
            assert same(files.load(Part(name), CPU), files.get(name))


def test_without_pinned_memory_files_are_mapped_and_a_note_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(nbytes: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nmore")

    files = Files.open(folder)
    staged_on(link := LateLink(), monkeypatch)
    monkeypatch.setattr(link, "pinned", none)
    with staged(files, announced(files), CPU, SMALL):
        assert files.staged is None and not readers()
    assert files.notes == ["there is no pinned memory, and loading is slower: CUDA error: out of memory"]


def test_a_cpu_keeps_mapping() -> None:
    assert staging.link_of(CPU) is None


# --- whole models ---


def _gptq(folder: Path) -> tuple[Path, object]:
    case = CASES["gptq desc_act"]
    return quantized(folder, tiny_llama(), case.pack, case.config), None


def _plain(make: Callable[[], nn.Module], policy: str) -> Callable[[Path], tuple[Path, object]]:
    def made(folder: Path) -> tuple[Path, object]:
        model = make()
        return write(folder, model, dict(model.state_dict()), None), policy

    return made


def _packed(folder: Path) -> tuple[Path, object]:
    path, policy = _plain(tiny_moe, "FP8_DYNAMIC")(folder / "source")
    quant_compile.save(quant_compile.load(path, policy, device="cpu"), folder / "packed", "packed")
    return folder / "packed", None


MODELS: dict[str, Callable[[Path], tuple[Path, object]]] = {
    "gptq": _gptq,
    "moe": _plain(tiny_moe, "W4A16"),
    "gpt-oss": _plain(tiny_gpt_oss, "W8A16"),
    "packed": _packed,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, policy = MODELS[name](tmp_path)
    plain = quant_compile.load(path, policy, device="cpu")
    links: list[LateLink] = []
    asked: list[tuple[TensorInfo, bool]] = []
    take = Stager.take

    def watched(self: Stager, info: TensorInfo) -> Tensor:
        asked.append((info, info in self._group))
        return take(self, info)

    def link_of(device: torch.device) -> LateLink:
        links.append(LateLink())
        return links[-1]

    monkeypatch.setattr(Stager, "take", watched)
    monkeypatch.setattr(staging, "link_of", link_of)
    monkeypatch.setattr(staging, "SIZES", Sizes(2, 1 << 14, 1 << 16, 8, 0))
    found = quant_compile.load(path, policy, device="cpu")
    assert len(links) == 1 and links[0].copies and not readers()
    assert all(was_announced for _, was_announced in asked) and len(asked) > 10
    assert_same_slabs(found, plain)
    assert torch.equal(logits(found), logits(plain))


def test_a_load_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    path, policy = _plain(tiny_llama, "W8A16")(tmp_path)
    staged_on(LateLink(), monkeypatch)
    monkeypatch.setattr(staging, "SIZES", Sizes(2, 1 << 14, 1 << 16, 8, 0))
    before, real, reads = len(STORE), os.preadv, 0

    def fail(*args: object) -> int:
        nonlocal reads
        reads += 1
        if reads > 1:
            raise OSError(5, "Input/output error")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output"):
        quant_compile.load(path, policy, device="cpu")
    gc.collect()
    assert len(STORE) <= before and not readers()
