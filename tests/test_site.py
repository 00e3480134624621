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


@needs_mkdocs
@pytest.mark.parametrize("link", ["images/nothing.svg", "index.md#nothing", "nowhere.html"])
@pytest.mark.parametrize(
    "html", ['<img alt="a" src="{}">', '<a href="{}">b</a>', '<picture><source srcset="{}"></picture>']
)
def test_a_broken_link_in_html_is_found(link: str, html: str, tmp_path: Path) -> None:
    site_hooks = hooks()
    page = '<html><body><h2 id="here">A</h2><a href="#here"></a><a href="b/index.html#there"></a><a href="b/"></a>{}</body></html>'
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<i id="there"></i><a href="../index.html#here"></a>', encoding="utf-8")
    (tmp_path / "index.html").write_text(page.format(""), encoding="utf-8")
    assert list(site_hooks.broken(tmp_path)) == []
    (tmp_path / "index.html").write_text(page.format(html.format(link)), encoding="utf-8")
    assert list(site_hooks.broken(tmp_path)) == [("index.html", link)]


def hooks() -> Any:
    """``docs/site_hooks.py``, which is in no package."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_mkdocs
def test_a_broken_link_in_html_stops_the_build(tmp_path: Path) -> None:
    """The hook of the real site, over one page."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text('# A\n\n<a href="nothing.html">b</a>\n', encoding="utf-8")
    hook = tmp_path / "hook.py"
    hook.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'docs')!r})\nfrom site_hooks import on_post_build\n",
        encoding="utf-8",
    )
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {docs}\nhooks: [{hook}]\nplugins: []\nnav: null\n", encoding="utf-8"
    )
    done = build(config, tmp_path / "site")
    assert done.returncode == 1 and "index.html: the link nothing.html leads nowhere" in done.stdout + done.stderr


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
