"""Fuzzed headers, indexes and configs: accepted with results that hold, or refused in words; a short form, and a long one outside of CI."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save
from torch import nn

import quant_compile
from quant_compile.checkpoints.config import describe
from quant_compile.checkpoints.description import Description
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import Files
from quant_compile.checkpoints.fill import Filler, Outcome
from quant_compile.checkpoints.names import Resolver
from quant_compile.pretrained import plan_of
from tests.checkpoints import fuzz
from tests.checkpoints.fuzz import Watch
from tests.checkpoints.packers import CASES
from tests.checkpoints.support import quantized, tiny_llama, write

ASKED = pytest.mark.skipif(
    "SGLQ_FUZZ" not in os.environ, reason="SGLQ_FUZZ=1 asks for it: it takes a quarter of an hour"
)
LONG = [pytest.param(1, id="short"), pytest.param(40, id="long", marks=[pytest.mark.slow, ASKED])]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is such a file system."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sglquant-fuzz-", dir=place) as made:
        yield Path(made)


def rounds(what: str, count: int, watch: Watch, trace: bool = True) -> Iterator[random.Random]:
    """A generator of random numbers for each case; says at the end how many there were."""
    began = time.perf_counter()
    with fuzz.traced() if trace else nullcontext():
        for i in range(count):
            yield random.Random(f"{what} {i}")
    print(f"{what}: {watch}, {time.perf_counter() - began:.0f} s")


@pytest.mark.parametrize("times", LONG)
def test_headers(times: int, folder: Path) -> None:
    """What is accepted, safetensors accepts too, with the same names and shapes."""
    file, watch = folder / "model.safetensors", Watch(folder)
    for rng in rounds("headers", 2500 * times, watch):
        data = fuzz.safetensors_file(rng)
        file.write_bytes(data)
        files = watch.run(lambda: Files.open(file), data)
        if files is not None:
            check_header(files, data)
    assert 0.05 < watch.accepted / watch.cases < 0.6


def check_header(files: Files, data: bytes) -> None:
    theirs: dict[str, Any] = dict(safetensors.deserialize(data))
    assert {name: list(info.shape) for name, info in files.tensors.items()} == {
        name: found["shape"] for name, found in theirs.items()
    }, data
    assert files.nbytes == sum(len(found["data"]) for found in theirs.values()) <= len(data)


@pytest.mark.parametrize("times", LONG)
def test_indexes(times: int, folder: Path) -> None:
    inner = folder / "model"
    (inner / "folder.safetensors").mkdir(parents=True)
    (inner / fuzz.SHARDS[0]).write_bytes(save({"a": torch.zeros(2)}))
    (inner / fuzz.SHARDS[1]).write_bytes(save({"b": torch.zeros(2), "c": torch.zeros(2)}))
    os.mkfifo(inner / "pipe.safetensors")
    (inner / "loop.safetensors").symlink_to("loop.safetensors")
    for name in (*fuzz.SHARDS, "pytorch_model.bin"):
        (folder / name).write_bytes(b"outside")
    watch = Watch(inner)
    for rng in rounds("indexes", 1500 * times, watch):
        data = fuzz.index_file(rng)
        (inner / "model.safetensors.index.json").write_bytes(data)
        files = watch.run(lambda: Files.open(inner), data)
        assert files is None or set(files.tensors) <= {"a", "b", "c"}
    assert 0.02 < watch.accepted / watch.cases < 0.6


@pytest.mark.parametrize("times", LONG)
def test_configs(times: int, folder: Path) -> None:
    watch = Watch(folder)
    for rng in rounds("configs", 1500 * times, watch):
        files = fuzz.config_files(rng)
        for name in ("config.json", *fuzz.OTHERS):
            (folder / name).unlink(missing_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        watch.run(lambda: used(describe(folder)), files)
    assert 0.05 < watch.accepted / watch.cases < 0.8


def used(made: Description) -> Description:
    """After all that a load asks of it."""
    for name in fuzz.NAMES:
        made.stored(name)
        made.ignores(name)
    assert isinstance(made.text, str) and all(isinstance(note, str) for note in made.notes)
    return made


KINDS = (
    "gptq desc_act", "gptq_p 5 bits", "awq", "ct packed 3 asym", "ct int8", "ct nvfp4", "ct mxfp8", "deepseek ue8m0",
    "modelopt fp8 blocks", "modelopt w4a8 awq", "bitsandbytes nf4 double", "torchao int8", "torchao fp8", "auto-round asym",
)  # fmt: skip


@pytest.mark.parametrize("times", LONG)
def test_tensors_that_do_not_fit_the_model(times: int, folder: Path) -> None:
    """Headers that are true to their file, and configs, against a model that needs something else."""
    watch = Watch(folder)
    began = [known(kind, folder / kind.replace(" ", "-")) for kind in KINDS]
    for rng in rounds("tensors", 80 * min(times, 20), watch):
        case = rng.choice(began)
        watch.folder = case.folder
        tensors, files = (
            fuzz.tensors(rng, case.tensors),
            {"config.json": json.dumps({"quantization_config": case.config}).encode()},
        )
        if rng.random() < 0.3:
            files["config.json"] = json.dumps({"quantization_config": fuzz.config(rng, case.config)}).encode()
        fuzz.sparse_file(case.folder / "model.safetensors", tensors, case.data)
        (case.folder / "config.json").write_bytes(files["config.json"])
        watch.run(
            partial(planned, case),
            ({name: entry for name, entry in tensors.items() if case.tensors.get(name) != entry}, files),
        )
    assert 0.05 < watch.accepted / watch.cases < 0.8


def planned(case: Known) -> list[Outcome]:
    """What a load would plan, but for the model, which is there."""
    files = Files.open(case.folder)
    mapped = Resolver(case.model, files).resolve()
    outcomes = Filler(files, describe(case.folder), torch.bfloat16, torch.device("meta")).plan(mapped)
    assert {outcome.name for outcome in outcomes} == {name for name, _ in case.model.named_parameters()}
    return outcomes


@dataclass(frozen=True)
class Known:
    """A valid checkpoint: its folder and model, its tensors, their small values, and its config."""

    folder: Path
    model: nn.Module
    tensors: dict[str, Any]
    data: dict[str, bytes]
    config: dict[str, Any]


def known(kind: str, folder: Path) -> Known:
    case, model = CASES[kind], tiny_llama(layers=1)
    quantized(folder, model, case.pack, case.config)
    found = safetensors.deserialize((folder / "model.safetensors").read_bytes())
    return Known(
        folder, model, {name: (entry["dtype"], list(entry["shape"])) for name, entry in found},
        {name: bytes(entry["data"]) for name, entry in found if "quant_state" in name}, case.config,
    )  # fmt: skip


@pytest.mark.parametrize("times", LONG)
def test_configs_of_models(times: int, folder: Path) -> None:
    """``plan_of`` with another model's config, or one with hostile values; Python's own modules may be read, and nothing else."""
    inner = write(folder / "model", model := tiny_llama(layers=1), dict(model.state_dict()), None)
    config = json.loads((inner / "config.json").read_text())
    plan_of(inner, "W8A16")
    watch = Watch(inner, (sys.prefix, sys.base_prefix, str(Path(quant_compile.__file__).parent), "/proc/", "/sys/"))
    for rng in rounds("models", 40 * times, watch, trace=False):
        data = fuzz.model_config(rng, config)
        (inner / "config.json").write_bytes(data)
        watch.run(lambda: plan_of(inner, "W8A16"), data)
    assert watch.accepted > watch.cases / 20


FOUND: dict[str, tuple[str, str, str, list[int], str]] = {
    "no groups": ("torchao int8", "model.layers.0.mlp.up_proj._weight_scale", "F32", [384, 0], "has 0 groups"),
    "points of another shape": ("torchao int8", "model.layers.0.mlp.up_proj._weight_zero_point", "I8", [384, 9], "has shape"),
    "state of two dimensions": ("bitsandbytes nf4 double", "weight.quant_state.bitsandbytes__nf4", "U8", [17, 2], "no quantization state"),
    "no blocks": ("modelopt fp8 blocks", "model.layers.0.mlp.up_proj.weight_scale", "F32", [64, 0], "64x0 blocks"),
    "a layer of many digits": ("awq", f"layers.{'9' * 5000}.x", "F32", [1], "belong to no weight"),
    "an expert of many digits": ("awq", f"model.layers.0.mlp.experts.{'1' * 5000}.up_proj.weight", "F32", [1], "belong to no weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_what_fuzzing_found_in_tensors(what: str, folder: Path) -> None:
    kind, name, dtype, shape, words = FOUND[what]
    case = known(kind, folder / "model")
    names = [own for own in case.tensors if own.endswith(name)] or [name]
    fuzz.sparse_file(case.folder / "model.safetensors", {**case.tensors, names[0]: (dtype, shape)}, case.data)
    with pytest.raises(CheckpointError, match=words) as raised:
        planned(case)
    assert len(str(raised.value)) < 2000
