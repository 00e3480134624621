"""The documents build as a site without a warning, a broken link is an error, and every public name is in the reference."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quant_compile

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers")
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="the extra `docs` is not installed"
)


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@needs_mkdocs
def test_the_site_builds(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    documented = set(re.findall(r'<h3 id="quant_compile\.([\w.]+)"', reference))
    assert set(quant_compile.__all__) <= documented
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="usage.html"' in home and 'src="images/speed-light.svg"' in home
    assert (tmp_path / "source" / "LICENSE").exists() or "source/" not in home
    architecture = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'href="contributing.html#add-a-kernel"' in architecture


@needs_mkdocs
@pytest.mark.parametrize("link", ["nowhere.md", "index.md#nothing", "../quant_compile/nothing.py"])
def test_a_broken_link_is_an_error(link: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# A\n\n[b]({link})\n", encoding="utf-8")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {docs}\nhooks: []\nplugins: []\nnav: null\n", encoding="utf-8"
    )
    done = build(config, tmp_path / "site")
    assert done.returncode == 1 and "Aborted with 1 warnings in strict mode" in done.stdout + done.stderr


PUBLIC = [(name, getattr(quant_compile, name)) for name in [*quant_compile.__all__, "HfConfig"]]


@pytest.mark.parametrize(("name", "value"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_every_public_name_says_what_it_is(name: str, value: Any) -> None:
    """Functions: each parameter under ``Args``; classes: each field under ``Attributes``, each public method in words."""
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return  # PRESETS: a mapping
    text = inspect.getdoc(value) or ""
    assert len(text) > 20, f"{name} has no docstring"
    if inspect.isfunction(value):
        assert missing(inspect.signature(value).parameters, text) == [], f"{name} does not say what these are"
        return
    fields = getattr(value, "__dataclass_fields__", {})
    own = (
        [] if name == "HfConfig" else [field for field in fields if not field.startswith("_")]
    )  # that one's are transformers'
    assert missing(own, text) == [], f"{name} does not say what these are"
    for method, function in vars(value).items():
        if not method.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            assert inspect.getdoc(function), f"{name}.{method} has no docstring"


def missing(parameters: Any, text: str) -> list[str]:
    """Parameters that a docstring does not name, by themselves or in a list."""
    found = set(re.findall(r"\w+", text))
    return [name for name in parameters if name not in found]


def test_missing_parameters_are_found() -> None:
    assert missing(["model", "policy"], "Args:\n  model: the model.") == ["policy"]
