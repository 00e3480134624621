"""What C++ tells of many tensors at once is what torch tells of each; where it cannot be compiled, loops do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from quant_compile.runtime import GraphRunner, native
from quant_compile.runtime.watch import LOOPS, Looks, Watched
from tests.runtime_support import Mlp, plain_inductor

__all__ = ["plain_inductor"]


@pytest.fixture(scope="module")
def made() -> Any:
    """The module, compiled if need be."""
    if sys.platform != "linux" or not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("no C++ compiler")
    assert native.library().exists() or native.build()
    return native.module()


@pytest.fixture(params=["native", "loops"])
def looks(request: pytest.FixtureRequest) -> Looks:
    if request.param == "loops":
        return LOOPS
    request.getfixturevalue("made")
    found = Looks.best()
    assert found is not LOOPS
    return found


def parameters() -> tuple[Parameter, ...]:
    with torch.inference_mode():
        unversioned = Parameter(torch.ones(2, 3), requires_grad=False)
    return *(Parameter(torch.ones(2, 3), requires_grad=False) for _ in range(4)), unversioned


def exchanged(given: tuple[Parameter, ...], at: int) -> None:
    kept.append(given[at].data)  # the storage lives, so that its death tells nothing
    given[at].data = torch.ones(2, 3)


def swapped(given: tuple[Parameter, ...], at: int) -> None:
    other = Parameter(torch.ones(2, 3), requires_grad=False)
    kept.append(other)
    torch.utils.swap_tensors(given[at], other)


def resized(given: tuple[Parameter, ...], at: int) -> None:
    storage = given[at].untyped_storage()
    kept.append(storage)
    storage.resize_(1 << 20)


def shifted(given: tuple[Parameter, ...], at: int) -> None:
    whole = torch.ones(4, 3)
    given[at].data = whole[:2]
    given[at].data = whole[2:]


kept: list[Any] = []
CHANGES: dict[str, Callable[[tuple[Parameter, ...], int], Any]] = {
    "in place": lambda given, at: given[at].add_(1),
    "other data": exchanged,
    "swapped": swapped,
    "resized": resized,
    "another part of a storage": shifted,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_where_they_are_watched(change: str, looks: Looks) -> None:
    given = parameters()
    watched = Watched.of(given, [0, 1, 3], looks)
    assert watched.unchanged(given)
    with torch.no_grad():
        CHANGES[change](given, 2)
        assert watched.unchanged(given)
        CHANGES[change](given, 3)
        assert not watched.unchanged(given)
        assert Watched.of(given, [0, 1, 3], looks).unchanged(given)


def test_a_parameter_of_inference_mode_has_a_place(looks: Looks) -> None:
    given = parameters()
    watched = Watched.of(given, [3, 4], looks)
    assert watched.unchanged(given)
    exchanged(given, 4)
    assert not watched.unchanged(given)


def test_identities_are_of_objects(looks: Looks) -> None:
    given = parameters()
    known = looks.identities(given)
    assert known == looks.identities((*given,)) and hash(known) == hash(looks.identities((*given,)))
    twin = Parameter(given[-1].detach(), requires_grad=False)
    others = [given[:1], given[1:], given[::-1], (*given[:-1], twin)]
    assert len({known, *map(looks.identities, others)}) == 5


def test_a_watch_holds_no_parameter(looks: Looks) -> None:
    given = parameters()
    before = list(map(sys.getrefcount, given))
    watched = Watched.of(given, range(5), looks)
    assert watched.unchanged(given) and looks.identities(given)
    assert list(map(sys.getrefcount, given)) == before


def test_what_is_no_tensor_is_refused(made: Any) -> None:
    for wrong in ((None,), (torch.ones(1), 3), [torch.ones(1)]):
        with pytest.raises(TypeError, match="states"):
            made.states(wrong)
    with pytest.raises(TypeError, match="identities"):
        made.identities([1])


def test_tensors_without_storage_have_no_address(made: Any) -> None:
    assert native._numbers(made.states((torch.ones(2).to_sparse(),)))[1] == 0


def test_threads_that_write_and_look(made: Any) -> None:
    """No count is lost, none is made up."""
    from concurrent.futures import ThreadPoolExecutor

    given = tuple(torch.zeros(2) for _ in range(50))

    def write(tensor: torch.Tensor) -> None:
        for _ in range(20):
            tensor.add_(1)
            made.states(given)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, given))
    assert native._numbers(made.states(given))[::2] == [20] * 50


def unbuilt(root: Path, script: str, **more: str) -> str:
    """Output of a process whose cache is empty."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "XDG_CACHE_HOME": str(root), "PYTHONPATH": str(Path(__file__).parents[1]), **more},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_without_a_compiler_loops_do(tmp_path: Path) -> None:
    script = (
        "from quant_compile.runtime import native, watch; native.build_ahead(); native._build_once().join(); "
        "print(native.module(), watch.Looks.best() is watch.LOOPS)"
    )
    assert unbuilt(tmp_path, script, PATH=str(tmp_path)).split() == ["None", "True"]


def test_a_process_that_ends_leaves_no_half(made: Any, tmp_path: Path) -> None:
    script = (
        "import time; from quant_compile.runtime import native; native.build_ahead()\n"
        "while not native._COMPILING: time.sleep(0.01)"
    )
    unbuilt(tmp_path, script)
    assert list(tmp_path.rglob("*")) == [tmp_path / "sglquant"]


def test_a_broken_file_is_not_used(tmp_path: Path) -> None:
    script = (
        "from quant_compile.runtime import native, watch; native.library().parent.mkdir(); "
        "native.library().write_bytes(b'no library'); print(watch.Looks.best() is watch.LOOPS)"
    )
    assert unbuilt(tmp_path, script).split() == ["True"]


def test_the_first_call_chooses_for_all(made: Any, monkeypatch: pytest.MonkeyPatch, plain_inductor: Any) -> None:
    """A module that comes later makes no binding anew: recorded steps remember those that they ran."""
    runners: list[GraphRunner] = []
    prepare = GraphRunner.prepare

    def prepared(self: GraphRunner) -> Any:
        runners.append(self)
        return prepare(self)

    monkeypatch.setattr(GraphRunner, "prepare", prepared)
    model, x = Mlp().requires_grad_(False), torch.ones(2, 32)
    run = torch.compile(model, backend="sglquant", options={"policy": "W8A8", "kernels": "reference"})
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(native, "module", lambda: None)
            run(x)
        before = [list(runner._bindings.values()) for runner in runners]
        run(x)
    assert Looks.best() is not LOOPS and [runner._looks for runner in runners] == [LOOPS]
    assert [list(runner._bindings.values()) for runner in runners] == before


def test_a_cache_that_nobody_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """No module, and no error: a folder of another user's, and no home at all."""
    for error in (PermissionError(13, "Permission denied"), RuntimeError("Could not determine home directory.")):

        def library(error: Exception = error) -> Path:
            raise error

        monkeypatch.setattr(native, "library", library)
        monkeypatch.setattr(native.shutil, "which", lambda name: name)
        assert not native.is_there() and native.module() is None and not native.build()
