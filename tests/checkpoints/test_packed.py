"""The format ``packed``: planes come back as they lie, nothing is packed again, and a file that was changed is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quant_compile
from quant_compile import cli
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.packed import FILE
from quant_compile.ir.errors import OptionError, PolicyError
from quant_compile.lowering.weights import STORE
from quant_compile.pretrained import plan_of
from tests.checkpoints.packers import CASES
from tests.checkpoints.support import logits, quantized, tiny_gpt_oss, tiny_llama, tiny_moe, write
from tests.checkpoints.test_save import DENSE, MOE, assert_equal, compiled, load, planes_of, policy_of


def slabs_of(model: nn.Module) -> dict[str, tuple[str, tuple[Tensor, ...]]]:
    """Each weight's layout, and the planes of its slab as they lie."""
    out: dict[str, tuple[str, tuple[Tensor, ...]]] = {}
    for name, parameter in model.named_parameters():
        key = STORE.held(parameter)
        if key is not None:
            out[name] = key.layout, STORE.entry(parameter).packs[key].slab.planes
    return out


def strides(plane: Tensor) -> list[int]:
    """Of dimensions that have several elements."""
    return [stride for stride, size in zip(plane.stride(), plane.shape, strict=True) if size > 1]


def assert_same_slabs(ours: nn.Module, theirs: nn.Module) -> None:
    one, other = slabs_of(ours), slabs_of(theirs)
    assert one.keys() == other.keys() and one
    for name, (layout, planes) in one.items():
        assert other[name][0] == layout
        for a, b in zip(planes, other[name][1], strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and strides(a) == strides(b), name
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


def no_more_packing(found: nn.Module) -> Tensor:
    """Logits, made without packing anything."""
    before = STORE.packed
    out = logits(found)
    assert STORE.packed == before
    return out


BEYOND = ("QSERVE_W4A8_CHANNEL", "NVFP4", "FP8_E5M2_DYNAMIC")  # no compressed-tensors file has them
CASES_OF = [
    *[(name, "dense", i % 3 == 0) for i, name in enumerate([*DENSE[::3], *BEYOND])],
    *[(name, "moe", i % 3 == 1) for i, name in enumerate(MOE[::2])],
]


def policy(name: str, folder: Path, model: nn.Module) -> Any:
    return name if name in BEYOND else policy_of(name, folder, model)


@pytest.mark.parametrize(("name", "kind", "released"), CASES_OF)
def test_round_trip(name: str, kind: str, released: bool, tmp_path: Path) -> None:
    make = tiny_moe if kind == "moe" else partial(tiny_llama, layers=1)
    model, wanted = compiled(make, partial(policy, name, tmp_path), release_weights=released)
    saved = quant_compile.save(model, tmp_path / "saved", "packed")
    assert saved.files == 1 and sum(saved.schemes.values()) == len(slabs_of(model))
    found = load(tmp_path / "saved")
    assert_same_slabs(found, model)
    assert torch.equal(no_more_packing(found), wanted)
    report = quant_compile.report(found)
    assert report.coverage == 1.0 and not report.misses
    again = quant_compile.save(found, tmp_path / "again", "packed")
    assert (again.nbytes, again.schemes) == (saved.nbytes, saved.schemes)
    assert_same_slabs(load(tmp_path / "again"), model)


def test_gpt_oss_and_several_schemes(tmp_path: Path) -> None:
    mixed = [{"match": "re:.*experts.*", "scheme": "MXFP4A16"}, {"match": "re:.*o_proj", "scheme": "keep"}]
    rules = {"version": 1, "default": "W8A16", "rules": mixed}
    model, wanted = compiled(tiny_gpt_oss, rules)
    quant_compile.save(model, tmp_path / "saved", "packed")
    found = load(tmp_path / "saved")
    assert torch.equal(no_more_packing(found), wanted)
    assert {line.scheme for line in quant_compile.report(found).lines} == {"W8A16", "MXFP4A16", None}


def test_a_head_that_is_tied_and_quantized(tmp_path: Path) -> None:
    rules = {"version": 1, "default": "W8A8", "rules": [{"match": "lm_head", "scheme": "W8A16"}]}
    model, wanted = compiled(partial(tiny_llama, 1, tied=True), rules, release_weights=False)
    with pytest.raises(quant_compile.SaveError, match=r"embed_tokens.*reads its values"):
        quant_compile.save(model, tmp_path / "saved", "packed")
    model, wanted = compiled(partial(tiny_llama, 1, tied=True), "W8A8")
    quant_compile.save(model, tmp_path / "saved", "packed")
    assert torch.equal(no_more_packing(load(tmp_path / "saved")), wanted)


@pytest.mark.parametrize("case", ["gptq desc_act", "modelopt int4 awq"])
def test_inputs_in_another_order_or_with_factors(case: str, tmp_path: Path) -> None:
    found = CASES[case]
    model = load(quantized(tmp_path / "source", tiny_llama(layers=1), found.pack, found.config))
    wanted = logits(model)
    quant_compile.save(model, tmp_path / "saved", "packed")
    again = load(tmp_path / "saved")
    assert torch.equal(no_more_packing(again), wanted)
    assert all("model.safetensors" in line.reason for line in quant_compile.report(again).lines if line.scheme)


def test_convert_needs_no_call_and_goes_on_to_other_formats(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    source = write(tmp_path / "source", model, dict(model.state_dict()), None)
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--policy", "W4A16", "--format", "packed"]
    assert cli.main(arguments) == 0
    found = load(tmp_path / "packed")
    planes, wanted = planes_of(found), logits(found)
    assert_equal(planes_of(found), planes)
    assert cli.main(["convert", str(tmp_path / "packed"), str(tmp_path / "shared")]) == 0
    other = load(tmp_path / "shared")
    assert_equal(planes_of(other), planes)
    assert torch.equal(logits(other), wanted)


def test_a_layout_that_this_device_does_not_read_is_made_anew(tmp_path: Path) -> None:
    """As on another GPU: rows serve nobody here, so each weight is packed once, and the rows go."""
    model = tiny_llama(layers=1)
    source = write(tmp_path / "source", model, dict(model.state_dict()), None)
    quant_compile.save(quant_compile.load(source, "W4A16", device="cpu"), tmp_path / "packed", "packed")
    document = json.loads((tmp_path / "packed" / FILE).read_text())
    assert {slab["layout"] for slab in document["slabs"]} == {"rows"}
    (tmp_path / "packed" / FILE).write_text(json.dumps(document | {"target": "sm90, NVIDIA H200"}))
    found, before = load(tmp_path / "packed"), STORE.packed
    assert any("packed on sm90" in note for note in quant_compile.report(found).notes)
    logits(found)
    assert STORE.packed > before and "rows" not in {layout for layout, _ in slabs_of(found).values()}


def test_its_policy_is_its_own(small: Path) -> None:
    with pytest.raises(PolicyError, match="a policy of its own"):
        load(small, policy="W8A8")
    with pytest.raises(OptionError, match="packed for"):
        load(small, dtype=torch.float32)


def test_inspect_shows_it(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(small)]) == 0
    shown = capsys.readouterr().out
    assert "packed by sglquant" in shown and "W4A16" in shown


# --- what was changed ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model, _ = compiled(partial(tiny_llama, layers=1), "W4A16", release_weights=True)
    quant_compile.save(model, folder / "small", "packed")
    return folder / "small"


@pytest.fixture
def changed(small: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder with other words, or other tensors."""

    def make(
        words: Callable[[dict[str, Any]], Any] | None = None, tensors: Callable[[dict[str, Tensor]], Any] | None = None
    ) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir()
        for file in small.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if words is not None:
            document = json.loads((folder / FILE).read_text())
            words(document)
            (folder / FILE).write_text(json.dumps(document))
        if tensors is not None:
            values = load_file(folder / "model.safetensors")
            tensors(values)
            save_file(values, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return change


WORDS = {
    "another version": (_set("version", value=2), "has version 2"),
    "a scheme that is none": (_set("slabs", 0, "spec", value="W5A5"), "which is none"),
    "a layout of the future": (_set("slabs", 0, "layout", value="w3_tiles"), "does not know"),
    "another scheme": (_set("slabs", 0, "spec", value="W8A16"), "must be|planes"),
    "rows of others": (_set("slabs", 0, "rows", value=[1]), "rows"),
    "members that the model lacks": (_set("slabs", 0, "members", value={"model.no.weight": [0, 4]}), "does not have"),
    "no members": (_set("slabs", 0, "members", value={}), "belongs to no weight"),
    "a slab that is missing": (lambda d: d["slabs"].pop(), "no file has"),
    "a slab twice": (lambda d: d["slabs"].append(copy.deepcopy(d["slabs"][0])), "twice"),
    "another plane": (_set("slabs", 0, "planes", 0, "tensor", value="model.norm.weight"), "must be"),
    "planes out of order": (_set("slabs", 0, "planes", 0, "order", value=[1, 0]), "must be|no plane"),
    "an order that is none": (_set("slabs", 0, "planes", 0, "order", value=[0, 0]), "no plane"),
    "scales of nothing": (_set("input_scales", value={"model.norm.weight": "model.norm.weight"}), "has no planes"),
    "inputs of nothing": (_set("inputs", value={"model.norm": {"order": "model.norm.weight"}}), "no linear"),
    "a policy that is none": (_set("policy", value={"version": 1, "default": "W5"}), "cannot be read"),
    "no list": (_set("slabs", value={}), "must be a list"),
    "no target": (_set("target", value=None), "names no target"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words_that_were_changed(name: str, changed: Callable[..., Path]) -> None:
    change, message = WORDS[name]
    folder = changed(change)
    with pytest.raises(CheckpointError, match=message) as caught:
        plan_of(folder)
    assert str(folder) in str(caught.value) and "Fix" in str(caught.value)


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][0] = torch.nan


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "one is missing": (lambda t: t.pop("slab.0.0"), "slab.0.0"),
    "a norm is missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "one too many": (lambda t: t.update(stray=torch.zeros(1)), "stray"),
    "another shape": (lambda t: t.update({"slab.0.0": t["slab.0.0"][:1].clone()}), "slab.0.0"),
    "another dtype": (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}), "model.norm.weight"),
    "NaN": (_nan, "NaN"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_were_changed(name: str, changed: Callable[..., Path]) -> None:
    change, message = TENSORS[name]
    with pytest.raises(CheckpointError, match=message):
        load(changed(tensors=change))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


STRANGE = (
    None,
    True,
    -1,
    0,
    7,
    2**70,
    1.5,
    "",
    "x",
    [],
    {},
    [[]],
    [-1],
    {"a": 1},
    "W8A8",
    "slab.0.1",
    "model.norm.weight",
)


def test_no_change_of_a_word_is_anything_but_an_error_or_a_load(small: Path, tmp_path: Path) -> None:
    """Every place of the document, each with some strange values; what is accepted says nothing else than before."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    document = json.loads((small / FILE).read_text())
    places = [path for path in _places(document) if path[0] not in ("versions", "times")]
    draw = random.Random(0)
    refused = 0
    for _ in range(250):
        made = copy.deepcopy(document)
        _set(*draw.choice(places), value=draw.choice(STRANGE))(made)
        (folder / FILE).write_text(json.dumps(made))
        try:
            plan_of(folder)
        except CheckpointError as error:
            assert str(folder) in str(error)
            refused += 1
    assert refused > 150
