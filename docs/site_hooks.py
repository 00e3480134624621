"""What mkdocs adds to docs/: documents that lie elsewhere in the repository, files that are linked, and the reference of public names.

Documents are written for a reader of the repository, so their links are relative to where they lie; here they become links of the site.
Reads sources as text: neither torch nor this package is imported.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Documents outside of docs/ -> their pages.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmark-scripts.md",
    "examples/tiny_lm/README.md": "tiny-lm.md",
}
LINK = re.compile(r"\[([^\[\]]*)\]\((?!<)([^)\s]+)\)|\b(?:src|srcset|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^```.*?^```", re.S | re.M)
# Public names that ``__all__`` leaves out, since they import transformers at their first use.
LATE = {"HfConfig": "quant_compile._transformers.HfConfig"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, the reference, and every file that some document links."""
    for source, page in PAGES.items():
        text = rewritten((ROOT / source).read_text(encoding="utf-8"), Path(source))
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "reference.md", content=reference()))
    for path in dict.fromkeys(linked_files()):
        files.append(File.generated(config, f"source/{path.as_posix()}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a document of docs/ as links of the site."""
    uri = page.file.src_uri
    return markdown if uri in (*PAGES.values(), "reference.md") else rewritten(markdown, Path("docs") / uri)


def on_post_build(config: Any) -> None:
    """Tell of every link within the site that leads nowhere: mkdocs looks at those of Markdown, not at those written as HTML."""
    for where, link in broken(Path(config["site_dir"])):
        logging.getLogger("mkdocs.hooks").warning("%s: the link %s leads nowhere", where, link)


class _Links(HTMLParser):
    """What a page links, and what can be linked in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.anchors = list[str](), {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        for name, value in attrs:
            if name in ("id", "name"):
                self.anchors.add(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")
            elif name == "srcset":
                self.links += [part.split()[0] for part in (value or "").split(",") if part.strip()]


def broken(site: Path) -> Iterator[tuple[str, str]]:
    """Links of a built site to files or places of it that are not there: (page, link)."""
    pages = {page: _Links(page.read_text(encoding="utf-8")) for page in sorted(site.rglob("*.html"))}
    for page, found in pages.items():
        if page.name == "404.html":  # its links are from the root of a server
            continue
        for link in dict.fromkeys(found.links):
            if re.match(r"[a-z][a-z0-9+.-]*:|//", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path.partition("?")[0])).resolve() if path else page
            if target.is_dir():
                target /= "index.html"
            known = pages.get(target)
            if not target.is_file() or (known is not None and unquote(anchor) not in known.anchors):
                yield page.relative_to(site).as_posix(), link


def rewritten(text: str, source: Path) -> str:
    """A document whose links lead within the site; those of folders become text.

    Args:
        source: where it lies, relative to the repository.
    """

    def moved(match: re.Match[str]) -> str:
        target = match[2] or match[3]
        where = placed(target, source)
        if where is None:
            return match[0]
        if not where:
            return match[1] or match[0]
        start, end = match.span(2 if match[2] else 3)
        return f"{match[0][: start - match.start()]}{where}{match[0][end - match.start() :]}"

    return _outside_of_code(text, lambda part: LINK.sub(moved, part))


def placed(target: str, source: Path) -> str | None:
    """Where a link leads in the site; empty: nowhere; None: it stays as it is."""
    if re.match(r"[a-z]+:|#", target):
        return None
    path, hash_, anchor = target.partition("#")
    full = (ROOT / source.parent / path).resolve()
    if not full.is_relative_to(ROOT) or not full.exists():
        return None  # mkdocs tells
    inside = full.relative_to(ROOT)
    if full.is_dir():
        return ""
    name = PAGES.get(inside.as_posix())
    if name is None:
        within = inside.is_relative_to("docs")
        name = inside.relative_to("docs").as_posix() if within else f"source/{inside.as_posix()}"
    return f"{name}{hash_}{anchor}"


def linked_files() -> Iterator[Path]:
    """Files outside of docs/ that are no pages and that some document links, relative to the repository."""
    documents = [*map(Path, PAGES), *(path.relative_to(ROOT) for path in sorted((ROOT / "docs").glob("*.md")))]
    for document in documents:
        text = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
        for match in LINK.finditer(text):
            where = placed(match[2] or match[3], document)
            if where and where.startswith("source/"):
                yield Path(where.removeprefix("source/").partition("#")[0])


def _outside_of_code(text: str, change: Callable[[str], str]) -> str:
    out, start = "", 0
    for fence in FENCE.finditer(text):
        out += change(text[start : fence.start()]) + fence[0]
        start = fence.end()
    return out + change(text[start:])


# --- the reference ---


def public_names() -> list[str]:
    """``quant_compile.__all__``, read and not imported."""
    tree = ast.parse((ROOT / "quant_compile" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    raise ValueError("quant_compile/__init__.py has no __all__")


def reference() -> str:
    """The page of all public names: functions, classes, and what goes wrong."""
    names = public_names()
    wrong = [name for name in names if name.endswith(("Error", "Warning"))]
    functions = [name for name in names if name[0].islower()]
    rest = [name for name in names if name not in wrong and name not in functions]
    parts = ["# Python\n\n`import quant_compile`; what it does to a model is in [usage.md](usage.md).\n"]
    parts += _section("Functions", (f"quant_compile.{name}" for name in functions))
    parts += _section("Data", (*(f"quant_compile.{name}" for name in rest), *LATE.values()))
    parts += _section("Errors and warnings", (f"quant_compile.{name}" for name in wrong))
    return "\n".join(parts)


def _section(title: str, paths: Iterable[str]) -> list[str]:
    return [f"## {title}\n", *(f"::: {path}\n" for path in paths)]
