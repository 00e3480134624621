"""The newcomer's path is the tutorial's, each step is timed, and a step that fails is where it ends; the notebook runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quantize_a_model.ipynb"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("newcomer")


class Pretended:
    """Notes commands instead of running them; the snippets take 5 s and the report 2."""

    def __init__(self, fails: str = "no such command") -> None:
        self.ran: list[list[str]] = []
        self.fails = fails

    def __call__(self, command: Sequence[str], folder: Path) -> None:
        self.ran.append(list(command))
        if "clone" in command:
            Path(command[-1]).mkdir()
        if command[-1].endswith("times.json"):
            Path(command[-1]).write_text("[0.25, 0.5]", encoding="utf-8")
        if self.fails in " ".join(command):
            raise subprocess.CalledProcessError(2, list(command), "", "first line\n/home/x/y.py: no such file")


def clock() -> Any:
    ticks = itertools.count()
    return lambda: float(next(ticks))


def test_the_path_is_that_of_the_tutorial(module: Any, tmp_path: Path) -> None:
    run = Pretended()
    steps = module.walk(tmp_path, run, False, clock())
    assert [(step.name, step.seconds, step.error) for step in steps] == [
        ("clone", 1.0, ""),
        ("demo, with its installation", 1.0, ""),
        ("own model on a CPU", 0.5, ""),
        ("policy", 1.0, ""),
        ("report", 0.5, ""),
    ]
    assert run.ran[1] == ["make", "demo"] and run.ran[2][0].endswith("sglquant/.venv/bin/python")
    told = [" ".join(["sglquant", *command[3:]]) for command in run.ran[3:]]
    text = module.TUTORIAL.read_text(encoding="utf-8")
    assert len(told) == 2 and all(line in text for line in told)
    assert (tmp_path / "sglquant" / "my_policy.yaml").read_text(encoding="utf-8") in text
    first, report = json.loads((tmp_path / "snippets.json").read_text(encoding="utf-8"))
    assert "quant_compile.compile(" in first and "report.html(" in report


def test_a_step_that_fails_ends_it(module: Any, tmp_path: Path) -> None:
    steps = module.walk(tmp_path, Pretended("demo"), True, clock())
    assert [step.name for step in steps] == ["clone", "demo"]
    assert steps[-1].error == "y.py: no such file"


def test_the_driver_times_each_snippet(module: Any, tmp_path: Path) -> None:
    given, out = tmp_path / "given.json", tmp_path / "out.json"
    given.write_text(json.dumps(["import time; a = 1", "time.sleep(0.2); assert a == 1"]), encoding="utf-8")
    subprocess.run([module.sys.executable, "-c", module.DRIVER, str(given), str(out)], check=True)
    first, second = json.loads(out.read_text(encoding="utf-8"))
    assert first < 0.2 <= second


def test_a_document_without_its_block_is_told(module: Any) -> None:
    with pytest.raises(ValueError, match="no bash block that begins with 'sglquant fly'"):
        module.commands(module.TUTORIAL.read_text(encoding="utf-8"), "sglquant fly")


def test_the_table_has_every_step(module: Any, tmp_path: Path) -> None:
    renderer = importlib.import_module("render_readme")
    rows = [{"name": "clone", "seconds": 1.25, "error": ""}]
    meta = {"machine": module.machine("cpu"), "installed": False, "total_s": 1.25, "limit_s": 600}
    module.write_result(tmp_path / "newcomer.json", rows, meta, quiet=True)
    text = renderer.newcomer(tmp_path)
    assert "| clone |" in text and "| in all |" in text and "with everything that is installed" in text
    assert renderer.newcomer(tmp_path / "nothing") == ""


# --- the notebook ---


def cells() -> list[str]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in found), "clear its outputs"
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_is_python_and_has_no_outputs() -> None:
    for text in cells():
        ast.parse(text)
    whole = "\n".join(cells())
    for step in (
        "quant_compile.compile(",
        "Policy.load(",
        "report.html(",
        "quant_compile.save(",
        "quant_compile.load(",
    ):
        assert step in whole


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel")),
    reason="the extra `notebook` is not here",
)
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient, nbformat = importlib.import_module("nbclient"), importlib.import_module("nbformat")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "report.html").stat().st_size > 10_000 and (tmp_path / "tiny-w8a8").is_dir()
