"""The lock: what it writes, what it says of another set of kernels, and that a damaged one is refused by line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quant_compile
from quant_compile.ir.errors import LockError, LockWarning, OptionError
from quant_compile.ir.lock import Lock, LockedSite
from quant_compile.runtime.locked import versions
from tests.runtime_support import CompileCounter, Mlp, plain_inductor

__all__ = ["plain_inductor"]

LOCK = Lock(
    "W8A8",
    "1a2b",
    "sm90",
    'a "GPU"',
    {"torch": "2.13.0", "triton": "3.6.0"},
    {
        "layers.10.w": LockedSite("W8A8", "rows", ("m<=4: a, m>4: b",), ("one kernel for w + v",)),
        "layers.2.w": LockedSite(None),
    },
)


def run(model: nn.Module, lock: Path, policy: Any = "W8A8", rows: int = 3, **options: Any) -> str:
    """Compile and call; the lock's text."""
    torch._dynamo.reset()
    quant_compile.compile(model, policy, lock=lock, **options)
    with torch.inference_mode():
        model(torch.ones(rows, 32))
    return lock.read_text(encoding="utf-8")


def model() -> nn.Module:
    return nn.Sequential(Mlp(), Mlp()).eval()


def test_a_lock_is_read_as_it_is_written() -> None:
    assert Lock.parse(LOCK.text(), "x") == LOCK
    names = [line.split('"')[1] for line in LOCK.text().splitlines() if line.startswith("  ")]
    assert names == ["layers.2.w", "layers.10.w"]  # as people count
    import yaml

    assert yaml.safe_load(LOCK.text())["sites"]["layers.2.w"]["scheme"] is None


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, "lock: 2", "is of version 2, and this sglquant reads version 1"),
        (1, "lock: one", "lock invalid literal"),
        (1, "", "`lock: ...` is expected, got ''"),
        (2, 'policy: {"name": "W8A8"}', "policy must have the keys name, hash, and has name"),
        (2, 'policy: {"name": "W8A8", "hash": 3}', "policy has a value that is no text"),
        (3, 'target: {"device": "sm90"', "target is not readable"),
        (4, "versions: []", "versions must be in braces"),
        (5, "places:", "`sites:` is expected"),
        (6, '  layers.2.w: {"scheme": null}', '`  "name": {...}` is expected'),
        (6, '  "layers.2.w": {"scheme": null}', "layers.2.w must have the keys scheme, layout, kernels, joined"),
        (6, '  "w": {"scheme": 4, "layout": "", "kernels": [], "joined": []}', "w has a scheme or layout that is no text"),
        (6, '  "w": {"scheme": "W8A8", "layout": "", "kernels": "a", "joined": []}', "w has kernels or joined that are no list"),
        (6, '  "w": {"scheme": "W8A8", "scheme": "W8A8", "layout": "", "kernels": [], "joined": []}', "w has a key twice"),
        (7, '  "layers.2.w": {"scheme": null, "layout": "", "kernels": [], "joined": []}', "layers.2.w is given twice"),
        (7, "<<<<<<< HEAD", '`  "name": {...}` is expected'),
    ],
)  # fmt: skip
def test_a_damaged_lock_is_refused_by_line(line: int, text: str, message: str) -> None:
    lines = LOCK.text().splitlines()
    lines[line - 1] = text
    with pytest.raises(LockError) as error:
        Lock.parse("\n".join(lines), "model.lock")
    assert str(error.value).startswith(f"model.lock:{line}: ") and message in str(error.value)
    assert "lock_update=True" in str(error.value)


def test_an_empty_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("")
    with pytest.raises(LockError, match=r"l:1: `lock: \.\.\.` is expected"):
        Lock.load(tmp_path / "l")
    (tmp_path / "l").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LockError, match="cannot be read"):
        Lock.load(tmp_path / "l")


def test_a_lock_is_written_and_then_holds(
    tmp_path: Path, plain_inductor: CompileCounter, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "model.lock"
    text = run(model(), path)
    lock = Lock.load(path)
    assert set(lock.sites) == {f"{i}.{name}_proj.weight" for i in (0, 1) for name in ("gate", "up", "down")}
    assert lock.policy == "W8A8" and lock.device == "cpu" and lock.versions == versions()
    gate, down = lock.sites["0.gate_proj.weight"], lock.sites["0.down_proj.weight"]
    assert gate.scheme == "W8A8" and gate.layout and gate.kernels and not down.joined
    assert gate.joined == (
        "one kernel for gate_proj.weight + up_proj.weight",
        "one product of 2 weights that read one input",
    )
    assert run(model(), path) == text  # nothing changed, so nothing is written or said
    assert not [one for one in recwarn if issubclass(one.category, LockWarning)]


def test_graphs_of_other_sizes_are_in_the_lock_too(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    path, made = tmp_path / "model.lock", model()
    quant_compile.compile(made, "W8A8", lock=path, dynamic=False)
    with torch.inference_mode():
        for rows in (1, 5):
            made(torch.ones(rows, 32))
    assert len(plain_inductor) == 2 and len(Lock.load(path).sites) == 6


def test_other_kernels_are_named_with_their_weights(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    path = tmp_path / "model.lock"
    before = run(model(), path)
    with pytest.warns(LockWarning) as said:
        assert run(made := model(), path, kernels="reference") == before
    text = str(said[0].message)
    old = Lock.load(path).sites["0.down_proj.weight"].kernels[0]
    assert text.startswith(f"6 weights have changed since the lock {path}:")
    assert f"kernel {old} → reference" in text and "0.gate_proj.weight" in text and "lock_update=True" in text
    assert text in quant_compile.report(made).notes


def test_one_weight_that_changed_is_named_alone(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    path = tmp_path / "model.lock"
    run(model(), path)
    policy = {"default": "W8A8", "rules": [{"match": "1.down_proj", "scheme": "keep"}]}
    with pytest.warns(LockWarning, match="1 weight has changed") as said:
        run(model(), path, policy)
    text = str(said[0].message)
    assert "scheme W8A8 → kept: 1.down_proj.weight" in text and "0." not in text.split("\n")[1]
    assert "policy W8A8 → policy, whose content differs" in text


def test_a_strict_policy_makes_it_an_error(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    path = tmp_path / "model.lock"
    before = run(model(), path)
    with pytest.raises(Exception, match="6 weights have changed since the lock") as error:
        run(model(), path, {"default": "W8A8", "strict": True}, kernels="reference")
    assert isinstance(getattr(error.value, "inner_exception", error.value), LockError)
    assert path.read_text() == before


def test_an_update_replaces_the_lock(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    path = tmp_path / "model.lock"
    path.write_text("not a lock\n")
    run(nn.Sequential(Mlp()).eval(), path, lock_update=True, kernels="reference")
    assert len(Lock.load(path).sites) == 3
    run(model(), path, lock_update=True)
    assert len(Lock.load(path).sites) == 6 and "reference" not in Lock.load(path).sites["0.up_proj.weight"].kernels


def test_versions_that_differ_are_told_with_the_kernels(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    path = tmp_path / "model.lock"
    path.write_text(
        run(model(), path).replace(versions()["torch"], "2.0.0").replace('"device": "cpu"', '"device": "sm90"')
    )
    run(made := model(), path)
    assert not [note for note in quant_compile.report(made).notes if "lock" in note]  # the kernels are what they were
    with pytest.warns(LockWarning, match=r"Since then: device sm90 → cpu, torch 2\.0\.0 →"):
        run(model(), path, kernels="reference")


def test_bad_input_changes_nothing(tmp_path: Path) -> None:
    made = model()
    with pytest.raises(LockError, match="there is no such folder"):
        quant_compile.compile(made, "W8A8", lock=tmp_path / "no" / "model.lock")
    (tmp_path / "bad").write_text("lock: 1\n")
    with pytest.raises(LockError, match="bad:2: `policy"):
        quant_compile.compile(made, "W8A8", lock=str(tmp_path / "bad"))
    with pytest.raises(OptionError, match="none is named"):
        quant_compile.compile(made, "W8A8", lock_update=True)
    with pytest.raises(OptionError, match="lock must be the path of a file, got 3"):
        quant_compile.compile(made, "W8A8", lock=3)
    assert "no compiled graph" in quant_compile.report(made).notes[0]


def test_two_models_on_one_file_do_not_overwrite_each_other(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    a, b, lock = model(), model(), tmp_path / "l"
    quant_compile.compile(a, "W8A16", lock=lock)
    quant_compile.compile(b, "W4A16", lock=lock)  # neither was called: there is no file yet
    with torch.inference_mode():
        a(torch.ones(3, 32))
        text = lock.read_text()
        with pytest.warns(LockWarning, match="W8A16"):
            b(torch.ones(3, 32))
        assert lock.read_text() == text  # the second is held to what the first wrote
        a(torch.ones(5, 32))
    assert set(Lock.load(lock).sites) == {f"{i}.{name}_proj.weight" for i in (0, 1) for name in ("gate", "up", "down")}


def test_of_two_models_that_update_one_file_the_last_to_write_holds(
    tmp_path: Path, plain_inductor: CompileCounter
) -> None:
    torch._dynamo.reset()
    a, b, lock = model(), nn.Sequential(Mlp()), tmp_path / "l"
    for one in (a, b):
        quant_compile.compile(one, "W8A16", lock=lock, lock_update=True)
    with torch.inference_mode():
        a(torch.ones(3, 32))
        b(torch.ones(3, 32))
        text = lock.read_text()
        with pytest.warns(LockWarning, match=r"3 weights have changed.*\n.*not in the lock: 1\.gate"):
            a(torch.ones(2, 2, 32))
    assert lock.read_text() == text and len(Lock.load(lock).sites) == 3


class Broken(nn.Module):
    """Graphs without weights before and after, and a weight that only a list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.more = nn.Linear(32, 32), [nn.Linear(32, 32)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        x = self.one(x)
        torch._dynamo.graph_break()
        x = self.more[0](x)
        torch._dynamo.graph_break()
        return torch.relu(x)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.filterwarnings("error::quant_compile.ir.errors.LockWarning")
def test_graphs_without_weights_and_weights_in_lists(
    update: bool, tmp_path: Path, plain_inductor: CompileCounter
) -> None:
    text = run(Broken(), tmp_path / "l", lock_update=update)
    assert sorted(Lock.load(tmp_path / "l").sites) == ["more.0.weight", "one.weight"]
    assert run(Broken(), tmp_path / "l", {"default": "W8A8", "strict": True}) == text  # strict alone is no change


def test_the_last_compilation_keeps_the_lock(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    """Of a model and one around it that has the same weights; uncompile ends it."""
    lock, inner = tmp_path / "l", model()
    run(inner, lock)
    quant_compile.uncompile(inner)
    outer = nn.Sequential(inner)
    text = run(outer, lock, "W8A16", lock_update=True)
    assert set(Lock.load(lock).sites) == {
        f"0.{i}.{name}_proj.weight" for i in (0, 1) for name in ("gate", "up", "down")
    }
    assert "W8A16" in text and "W8A8" not in text.split("sites:")[1]


def test_a_policy_that_changed_is_told_though_no_kernel_did(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    policy = {"default": "W4A16", "rounding": "search"}
    run(model(), tmp_path / "l", policy)
    with pytest.warns(LockWarning, match="the policy has changed since the lock") as caught:
        run(model(), tmp_path / "l", {**policy, "rounding": "nearest"})
    assert len([one for one in caught if one.category is LockWarning]) == 1
    with pytest.raises(Exception, match="whose content differs"):
        run(model(), tmp_path / "l", {**policy, "rounding": "nearest", "strict": True})


def test_weights_that_are_gone_are_named_before_anything_runs(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    run(model(), tmp_path / "l")
    smaller = nn.Sequential(Mlp())
    with pytest.raises(LockError, match=r"3 weights of the lock are not in the model.*1\.down_proj\.weight"):
        quant_compile.compile(smaller, {"default": "W8A8", "strict": True}, lock=tmp_path / "l")
    assert quant_compile.report(smaller).policy == "none"
    with pytest.warns(LockWarning, match="not in the model"):
        run(smaller, tmp_path / "l")
    assert any("not in the model" in note for note in quant_compile.report(smaller).notes)


def test_other_sizes_are_a_change(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    text = run(nn.Sequential(nn.Linear(32, 64)), tmp_path / "l")
    assert '"shape": [64, 32]' in text
    with pytest.warns(LockWarning, match=r"shape \[64, 32\] → \[96, 32\]: 0.weight"):
        run(nn.Sequential(nn.Linear(32, 96)), tmp_path / "l")
    (tmp_path / "l").write_text(text.replace(', "shape": [64, 32]', ""))  # as files were written before
    assert Lock.load(tmp_path / "l").sites["0.weight"].shape == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LockWarning)
        run(nn.Sequential(nn.Linear(32, 64)), tmp_path / "l")


@pytest.mark.parametrize("name", ["a\u2028b", "a\x85b", "x1²2", "\ud800", "a\tb", "ц"])
def test_whatever_a_module_is_called(name: str, tmp_path: Path) -> None:
    lock = Lock("W8A8", "", "", "", {}, {name: LockedSite("W8A8"), "b": LockedSite(None)})
    assert Lock.load(lock.save(tmp_path / "l")) == lock


def test_an_empty_name_is_no_file() -> None:
    with pytest.raises(OptionError, match="lock must be the path of a file, got ''"):
        quant_compile.compile(model(), "W8A8", lock="")
