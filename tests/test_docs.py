"""The documents tell the truth: links resolve, snippets parse, quoted output is what runs print, tables come from results."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_compile import cli
from quant_compile.lowering.registry import kernels, layouts
from quant_compile.options import Options
from quant_compile.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
DOCUMENTS += [ROOT / "examples/tiny_lm/README.md", *sorted((ROOT / "docs").glob("*.md"))]
USAGE = ROOT / "docs" / "usage.md"
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("render_readme")


# --- links and snippets ----------------------------------------------------------------------------------------------


def links(document: Path) -> Iterator[str]:
    """Targets of relative links outside code blocks."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_relative_links_resolve(document: Path) -> None:
    for target in links(document):
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_links_are_found() -> None:
    """The README leads to every document."""
    found = set(links(ROOT / "README.md"))
    assert "docs/architecture.md" in found
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= found


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@every_document
def test_snippets_parse(document: Path) -> None:
    for text in blocks(document, "python"):
        ast.parse(text)
    for text in blocks(document, "bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for text in blocks(document, "json"):
        json.loads(text)


@pytest.mark.parametrize("index, rules", [(0, 2), (1, 1)])
def test_the_policies_of_the_usage_load(index: int, rules: int, tmp_path: Path) -> None:
    found = blocks(USAGE, "yaml")
    assert len(found) == 2
    path = tmp_path / "policy.yaml"
    path.write_text(found[index], encoding="utf-8")
    assert [rule.scheme is not None for rule in Policy.load(path).rules] == [True] * rules


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make (\w+)", document.read_text(encoding="utf-8"), flags=re.M):
            assert re.search(rf"^{target}:", makefile, flags=re.M), f"{document.name}: make {target}"


# --- tables in the text ----------------------------------------------------------------------------------------------


def first_column(document: Path, header: str) -> list[str]:
    """First cells of the table whose header begins with ``header``."""
    text = document.read_text(encoding="utf-8")
    table = re.search(rf"^\| {re.escape(header)} \|.*\n\|[- |:]+\n((?:\|.*\n)+)", text, flags=re.M)
    assert table is not None, header
    return [line.split("|")[1].strip(" `") for line in table[1].splitlines()]


def test_every_option_is_named() -> None:
    assert first_column(USAGE, "option") == list(Options.__dataclass_fields__)


def test_every_layout_is_named_with_its_kernels() -> None:
    document = ROOT / "docs" / "kernels.md"
    assert set(first_column(document, "layout")) == set(layouts())
    text = document.read_text(encoding="utf-8")
    for name in layouts():
        row = re.search(rf"^\| `{name}` \| (.*?) \|", text, flags=re.M)
        assert row is not None
        named = set(re.findall(r"`(\w+)`", row[1]))
        readers = {kernel.name for kernel in kernels().values() if kernel.layout == name}
        assert named <= readers if name == "rows" else named == readers


# --- quoted output ---------------------------------------------------------------------------------------------------


def plain(line: str) -> str:
    """A line of output without the widths of columns."""
    return " ".join(line.replace("│", " | ").split())


CONSOLES = [(document, text) for document in DOCUMENTS for text in blocks(document, "console")]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CONSOLES)))
def test_quoted_output_is_what_the_command_prints(
    index: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines in their order; ``...`` stands for lines left out."""
    monkeypatch.chdir(ROOT)
    command, *quoted = CONSOLES[index][1].splitlines()
    assert command.startswith("$ sglquant ")
    assert cli.main(shlex.split(command)[2:]) == 0
    printed = capsys.readouterr()
    lines = iter([plain(line) for line in (printed.out + printed.err).splitlines()])
    for line in quoted:
        assert line == "..." or plain(line) in lines, f"{command} does not print, or not in this order: {line}"


def test_there_is_quoted_output() -> None:
    assert len(CONSOLES) == 3


# --- the walk-through of CONTRIBUTING.md -----------------------------------------------------------------------------

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def quoted_sources() -> list[tuple[str, str]]:
    """(path, text) of the snippets of CONTRIBUTING that begin with the path of a file."""
    found = [re.match(r"# (quant_compile/\S+\.py)\n", text) for text in blocks(CONTRIBUTING, "python")]
    return [(match[1], match.string) for match in found if match is not None]


def test_quoted_code_is_the_code() -> None:
    """Statement by statement, as the files have it now."""
    quoted = quoted_sources()
    assert [Path(path).name for path, _ in quoted] == ["fp4.py", "torch_cpu_4bit.py"]
    for path, text in quoted:
        source = (ROOT / path).read_text(encoding="utf-8")
        real = {ast.get_source_segment(source, node) for node in ast.parse(source).body}
        statements = [ast.get_source_segment(text, node) or "" for node in ast.parse(text).body]
        assert len(statements) >= 3
        for statement in statements:
            assert statement in real, f"CONTRIBUTING.md is not what {path} says; copy it anew: {statement[:80]}"


def test_the_example_asks_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel that is quoted answers on a CPU, and below sm100 no other does."""
    (ask,) = [text for text in blocks(CONTRIBUTING, "python") if text.startswith("import")]
    exec(ask, {})
    cpu, hopper, blackwell = capsys.readouterr().out.splitlines()
    assert re.search(r"'torch_cpu_4bit': [\d.]+", cpu)
    assert "'triton_fp4': 'needs sm100 or newer" in hopper and "'torch_cpu_4bit': 'runs on CPU only'" in hopper
    assert re.search(r"'triton_fp4': [\d.]+", blackwell)


def changed_by(commit: str) -> set[str]:
    """Files that a commit changed; a merge, compared with its first parent."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    command = ["git", "diff", "--name-only", f"{commit}^", commit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the history before {commit} is not here")
    return set(done.stdout.split())


def test_the_story_of_mxfp4_is_the_history() -> None:
    """Each commit that is named changed the files beside it; no others, where its files are counted or it says so."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([0-9a-f]{7}(?:, [0-9a-f]{7})*) \| (.*?) \| (.*?) \|$", text, re.M)
    assert len(rows) >= 8
    (counted,) = re.findall(r"The commit that adds MXFP4 to the main line, ([0-9a-f]{7}), adds", text)
    whole = {counted, *(commits for commits, _, why in rows if "nothing else changed" in why)}
    assert len(whole) >= 2 and whole <= {commits for commits, _, _ in rows}
    for commits in dict.fromkeys(commits for commits, _, _ in rows):
        changed = set[str]().union(*map(changed_by, commits.split(", ")))
        named: set[str] = set()
        for name in re.findall(r"`([^`]+)`", " ".join(files for own, files, _ in rows if own == commits)):
            paths = {path for path in changed if f"/{path}".endswith(f"/{name}")}
            assert len(paths) == 1, (commits, name, paths)
            named |= paths
        assert commits not in whole or named == changed, (commits, changed - named)


# --- tables of results -----------------------------------------------------------------------------------------------

FIX = "run: make docs"


def test_tables_are_those_of_the_results(renderer: Any) -> None:
    """Every table stands in one document, as its file has it now; the README has that of ``generate``."""
    version = torch.version.cuda
    if version is not None and tuple(map(int, version.split("."))) < (12, 9):
        pytest.skip(f"torch for CUDA {version} has fewer block FP8 kernels than the table of kernels names")
    texts = {path: path.read_text(encoding="utf-8") for path in renderer.DOCUMENTS}
    assert set(texts) == {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}
    assert renderer.marked(texts[ROOT / "README.md"]) == ["generate"]
    assert sorted(name for text in texts.values() for name in renderer.marked(text)) == sorted(renderer.TABLES)
    for path, text in texts.items():
        assert renderer.render(text, document=path) == text, f"{path.name}: {FIX}"


def test_nothing_measured_is_typed() -> None:
    """No document holds a speed-up outside of the tables; those of the benchmarks' own page come with their reasons."""
    for document in (ROOT / "README.md", USAGE, ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "limits.md"):
        text = document.read_text(encoding="utf-8")
        text = re.sub(r"^<!-- table:(\w+) -->$.*?^<!-- end:\1 -->$", "", text, flags=re.S | re.M)
        assert not re.findall(r"\d(?:×|x faster| times faster| tokens/s)", text), document.name


def test_the_limit_of_experts_in_four_bits_is_what_the_table_says() -> None:
    """For 512 tokens and more: W4A8 is never slower than bf16, the slowest of the others as much as docs/limits.md says."""
    cells: dict[tuple[str, ...], float] = {}
    for name in ("moe", "moe_4bit"):  # as in the table, the second file's cells replace the first's
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["summary"]
        cells |= {(r["scheme"], r["shape"], r["routing"], r["t"]): r["speedup"] for r in rows if r["t"] >= 512}
    slower: dict[str, float] = {}
    for (scheme, *_), speedup in cells.items():
        if scheme.startswith(("W4", "NVFP4", "MXFP4", "QSERVE")):
            slower[scheme] = max(slower.get(scheme, 0.0), 1 / speedup)
    assert [scheme for scheme, most in slower.items() if most <= 1.0] == ["W4A8"]
    text = " ".join((ROOT / "docs" / "limits.md").read_text(encoding="utf-8").split())
    assert f"only W4A8 is never slower than bf16; the others are up to {max(slower.values()):.1f} times slower" in text


MACHINE = {"gpu": "NVIDIA H200", "cpu": "some", "threads": 2, "versions": {"torch": "2.11.0", "triton": None}}
CELL = {"ms": 2.0, "speedup": 1.5, "wall_ms": 2.25}
TOKEN = {"ms_per_token": 4.0, "first_token_ms": 14.0, "speedup": 1.0, "first_token_speedup": 1.0}
NOT_ASKED = {"reason": "not run: not asked for"}
FAMILY = {
    "class": "M",
    "status": "right",
    "graphs": 1,
    "coverage": 1.0,
    "quantized": 2,
    "error": 2e-7,
    "rounding": 0.02,
    "skips": [],
}
KV_CELL = {"distance": 64, "logp": -8.0, "to_base": -0.01, "error": 0.02, "first": 0.5, "five": 0.75, "trials": 64}
KV_ROW = {
    "model": "dense",
    "within": True,
    "perplexity": 5.0,
    "to_base": 0.001,
    "error": 0.0002,
    "copies": [KV_CELL],
    "needles": [KV_CELL] * 2,
}
RESULTS: dict[str, dict[str, Any]] = {
    "generate": {
        "settings": {
            "layers": {"Llama-3-8B": 16},
            "options": {"guard": "never_slower"},
            "new_tokens": 64,
            "gpus": 2,
            "processes_per_gpu": 4,
        },
        "rows": [
            {
                "model": "Llama-3-8B",
                "stack": "hf-auto",
                "cells": {"B=1 P=128": TOKEN, "B=8 P=32": TOKEN},
                "cold": {"seconds": 40.0},
                "warm": {"seconds": 20.0},
                "memory": {"peak_gib": 9.5, "held_gib": 8.5},
            },
            {
                "model": "Llama-3-8B",
                "stack": "W4A8",
                "cells": {
                    "B=1 P=128": TOKEN | {"ms_per_token": 2.0, "speedup": 2.0, "first_token_speedup": None},
                    "B=8 P=32": TOKEN | {"reason": "its logits are not finite"},
                },
                "cold": {"seconds": 60.0},
            },
            {
                "model": "Llama-3-8B",
                "stack": "W4A8:default",
                "cells": {"B=1 P=128": {"reason": "not run: the time was up"}},
                "calls": {"decode": {"host_ms": 1.25, "wall_ms": 2.5}},
            },
            {
                "model": "Llama-3-8B",
                "stack": "wrapper",
                "cells": {},
                "wrapper": {"weights": 300, "us_1": 9.6, "us_10": 9.9},
            },
        ],
    },
    "generate_rest": {
        "settings": {"layers": {"Llama-3-8B": 16}, "options": {}, "new_tokens": 64},
        "rows": [
            {"model": "Llama-3-8B", "stack": "hf-auto", "cells": {"B=1 P=32": TOKEN, "B=1 P=128": NOT_ASKED}},
            {"model": "Llama-3-8B", "stack": "W4A8+kv:FP8", "cells": {"B=1 P=32": TOKEN, "B=1 P=128": NOT_ASKED}},
        ],
    },
    "generate_cpu": {
        "settings": {"layers": {}, "options": {}, "new_tokens": 64},
        "rows": [{"model": "tiny-lm", "stack": "hf-auto", "cells": {"B=1 P=128": TOKEN}}],
    },
    "e2e": {
        "settings": {"shape": "Llama-3-8B", "layers": 16, "batches": [1, 64], "cache_tokens": 2112, "filled": 2048},
        "rows": [
            {
                "stack": "inductor",
                "error": None,
                "decode B=1": {"ms": 3.0, "speedup": None},
                "decode B=1 kernels": {"linears_speedup": None},
                "prefill 1x2048": {"ms": 28.0, "speedup": None},
                "first": {"held_gib": 8.5},
                "memory": {"model_gib": 8.5},
            },
            {
                "stack": "W4A16",
                "error": None,
                "decode B=1": CELL,
                "decode B=1 kernels": {"linears_speedup": 2.5},
                "prefill 1x2048": CELL,
                "first": {"held_gib": 9.0},
                "memory": {"weights_gib": 3.25},
            },
            {"stack": "torchao-int4", "error": "build: broken | pipe", "first": {"held_gib": 3.5}},
        ],
    },
    "gemm": {
        "verdicts": [
            {"scheme": "W8A8", "geomean_to_peer": 0.5, "worst_to_peer": 1.25, "worst_row": "16x32 M=1"},
            {"scheme": "W4A16", "geomean_to_peer": None, "worst_to_peer": None, "worst_row": None},
        ],
        "summary": [
            {"scheme": "W8A8", "n": 16, "k": 32, "m": 1, "ratio_to_bf16": 0.25},
            {"scheme": "W8A8", "n": 64, "k": 32, "m": 1, "ratio_to_bf16": 1.0},
            {"scheme": "W4A16", "n": 16, "k": 32, "m": 1, "ratio_to_bf16": None},
        ],
    },
    "families": {
        "settings": {"policy": "W8A16", "families": 5, "tolerance": 1e-3, "new_tokens": 4, "inductor": False},
        "rows": [
            FAMILY | {"family": "a", "generate": "same"},
            FAMILY
            | {"family": "b", "coverage": 0.5, "skips": ["x.*.w (2): read by `einsum`"], "generate": "other tokens"},
            FAMILY | {"family": "c", "status": "wrong", "error": None},
            {"family": "d", "status": "crashed", "reason": "TypeError: a_b"},
            {"family": "e", "status": "not run", "reason": "ImportError: timm"},
        ],
    },
    "quality_cuda": {
        "tokens_dense": 100,
        "rows": [
            {
                "model": "dense",
                "scheme": "W8A8",
                "bits_per_weight": 8.0,
                "bf16": 5.0,
                "textbook": 5.01,
                "product": 5.02,
                "product_to_textbook": 0.002,
                "product_to_bf16": 0.004,
                "coverage": 0.99,
                "error": None,
            },
            {
                "model": "dense",
                "scheme": "MXFP4",
                "bits_per_weight": 4.25,
                "bf16": 5.0,
                "textbook": 5.5,
                "product": 5.6,
                "product_to_textbook": 0.01,
                "product_to_bf16": 0.12,
                "coverage": 1.0,
                "draws": 8,
                "mean_to_textbook": -0.001,
                "mean_error": 0.0012,
                "error": None,
            },
            {"model": "dense", "scheme": "FP8", "bits_per_weight": 8.0, "bf16": 5.0, "error": "no kernel"},
        ],
    },
    "kv_quality": {
        "tokens": 4096,
        "settings": {"length": 512, "within": 0.005, "passage": 64, "trials": 64, "calibration": 4},
        "rows": [KV_ROW | {"scheme": "16 bits", "bits": 16.0}, KV_ROW | {"scheme": "FP8", "bits": 8.5}],
        "textbook": [{"model": "dense", "scheme": "FP8", "to_base": 0.002, "error": 0.0003}],
        "without": {"dense": {"needles": [KV_CELL | {"logp": -9.0, "first": 0.0}] * 2}},
        "compiled": [
            {"model": "dense", "scheme": scheme, "dtype": "float32", "tokens": 9, "perplexity": 5.0}
            | {"to_eager": 0.001, "error": 0.0002, "rms": 0.01, "eager_rms_to_base": 0.05}
            for scheme in ("16 bits", "FP8")
        ],
    },
    "compile_time": {
        "settings": {"shape": "Llama-3-8B", "layers": 16, "runs": 3, "apart": "packing"},
        "rows": [
            {"stack": "inductor", "compile_s": 20.0, "apart_s": 0.0, "ratio": 1.0, "runs": 3, "error": None},
            {"stack": "FP8_DYNAMIC", "runs": 0, "error": "too slow"},
        ],
        "passes": [{"layers": 5, "nodes": 400, "passes_s": 0.2, "us_per_node": 500.0}, {"layers": 10, "error": "x"}],
    },
    "checkpoint_logits": {
        "rows": [
            {"sample": "a", "dtype": "bf16", "reference": "logits", "loaded": 0.02, "eager": 0.001},
            {"sample": "b", "error": "ValueError: x"},
        ],
    },
    "cpu_decode": {
        "settings": {"shape": "Llama-3-8B", "layers": 2, "batch": 1},
        "rows": [{"variant": "W8A16", "us": 2500.0, "speedup": 1.25, "error": None}, {"variant": "x", "error": "bad"}],
    },
}
EXPECTED = {
    "generate": [
        "| stack | B=8 P=32 | B=1 P=128 |",
        "| HF bf16, static cache, compiled by HF | 4.00 (1.00×) | 4.00 (1.00×) |",
        "| W4A8 | wrong logits | 2.00 (2.00×) |",
    ],
    "generate_first_token": ["| W4A8 | wrong logits | 14.00 (–) |"],
    "generate_start": [
        "| Llama-3-8B | HF bf16, static cache, compiled by HF | 4 | 40.0 | 20.0 | 1.00× | 9.50 | 8.50 |",
        "| Llama-3-8B | W4A8 | 4 | 60.0 | – | 1.50× | – | – |",
        "| W4A8, no CUDA graphs | 1.25 / 2.50 |",
        "Python of a call of a graph with 300 weights, by the number of models: 10 µs with 1 bound to it, 10 µs with 10 bound to it.",
    ],
    "generate_rest": ["| stack | B=1 P=32 |", "| W4A8, KV cache FP8 | 4.00 (1.00×) |"],
    "generate_cpu": ["| HF bf16, static cache, compiled by HF | 4.00 (1.00×) |"],
    "e2e": [
        "| stack | decode B=1 | prefill 1x2048 | linears alone, B=1 | weights held, GiB |",
        "| Inductor bf16 | 3.00 / – (1.00×) | 28.00 / – (1.00×) | 1.00× | 8.50 |",
        "| W4A16 | 2.00 / 2.25 (1.50×) | 2.00 / 2.25 (1.50×) | 2.50× | 3.25 |",
        "| torchao int4, group 128 (build: broken / pipe) | – | – | – | 3.50 |",
    ],
    "gemm": ["| W8A8 | 2.00× | 0.80× (16×32 M=1) | 2.00× |", "| W4A16 | – | – | – |"],
    "quality": [
        "| scheme | bits a weight | coverage | textbook | compiled, H200 | to bf16 | to textbook |",
        "| dense bf16 | 16 | – | 5.0000 | – | – | – |",
        "| dense W8A8 | 8 | 99% | 5.0100 | 5.0200 | +0.40% | +0.20% |",
        "| dense MXFP4 | 4.25 | 100% | 5.5000 | 5.6000 | +12.00% | +1.00% (mean of 8: -0.10% ± 0.12%) |",
        "| dense FP8 | 8 | – | – | no kernel | – | – |",
    ],
    "kv_quality": [
        "| cache | bits | perplexity | to 16 bits | textbook, to 16 bits | copy from 64 |",
        "| dense 16 bits | 16 | 5.0000 | – | – | 50.0% |",
        "| dense FP8 | 8.5 | 5.0000 | +0.10% ± 0.02% | +0.20% ± 0.03% | 50.0% (-0.010 ± 0.020) |",
        "| dense 16 bits, no pair | -9.00 | -9.00 | 0.0% | 75.0% |",
        "| dense 16 bits | -8.00 | -8.00 | 50.0% | 75.0% |",
        "| dense FP8 | -0.01 ± 0.02 | -0.01 ± 0.02 | 50.0% | 75.0% |",
        "| dense 16 bits, float32 | 5.0000 | +0.10% ± 0.02% | 0.01000 | – |",
        "| dense FP8, float32 | 5.0000 | +0.10% ± 0.02% | 0.01000 | 0.05000 |",
    ],
    "compile_time": [
        "| Inductor bf16 | 20.0 | 0.0 | 1.00× | 3 |",
        "| FP8_DYNAMIC | – | – | – | 0 (too slow) |",
        "| 5 | 400 | 0.20 | 500 |",
    ],
    "cpu_decode": ["| W8A16 | 2.5 | 1.25× |", "| x (bad) | – | – |"],
    "checkpoint_logits": ["| a | bf16 | in memory | 2.0e-02 | 1.0e-03 | – |", "| b | – | ValueError: x | – | – | – |"],
    "families": [
        "5 of 5 families under W8A16:",
        "- 2 right: within 1e-03 of the eager reference. 1 have coverage 1.0, 0 no weight that the policy names, "
        "1 weights that are skipped, each with its reason (0 of them have nothing quantized, so that nothing was compared).",
        "- 1 wrong, 1 crashed where plain `torch.compile` works.",
        "- `generate`: 1 of 2 right ones give the eager reference's 4 tokens, 0 do not generate eagerly either, "
        "1 are listed with a reason.",
        "| b | x.\\*.w (2): read by \\`einsum\\`; generate: other tokens |",
        "| c | wrong: other shape or NaN |",
        "| d | crashed: TypeError: a\\_b |",
        "| a | `M` | 1 | 1.000 | 2e-07 | 2.0e-02 | same |",
        "| e | not run | ImportError: timm |",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_table_is_rendered_from_its_file(name: str, renderer: Any, tmp_path: Path) -> None:
    for file, content in RESULTS.items():
        (tmp_path / f"{file}.json").write_text(json.dumps({"machine": MACHINE, "date": "2026-01-02"} | content))
    out = renderer.render(f"a\n<!-- table:{name} -->\nstale text\n<!-- end:{name} -->\nb\n", tmp_path)
    assert out.startswith("a\n") and out.endswith("b\n") and "stale text" not in out
    lines = out.splitlines()
    assert [line for line in EXPECTED[name] if line not in lines] == []
    assert "H200, torch 2.11.0, 2026-01-02" in out or name in ("generate_first_token", "generate_start")
    assert renderer.render(out, tmp_path) == out


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "generate"])
def test_a_table_without_results_is_left_out(name: str, renderer: Any, tmp_path: Path) -> None:
    marks = f"<!-- table:{name} -->\n<!-- end:{name} -->"
    assert renderer.render(f"<!-- table:{name} -->\nstale text\n<!-- end:{name} -->", tmp_path) == marks


def test_the_readme_says_that_generate_is_not_measured(renderer: Any, tmp_path: Path) -> None:
    out = renderer.render("<!-- table:generate -->\n<!-- end:generate -->\n", tmp_path)
    assert "has not been measured yet" in out and len(out.splitlines()) == 5


def test_links_of_a_table_are_turned_to_its_document(renderer: Any) -> None:
    text = "[a](benchmarks/README.md#x) [b](https://x.y/z) [c](#d) [e](docs/moe.md)"
    assert renderer.relinked(text, ROOT / "README.md") == text
    moved = "[a](../benchmarks/README.md#x) [b](https://x.y/z) [c](#d) [e](moe.md)"
    assert renderer.relinked(text, ROOT / "docs" / "benchmarks.md") == moved


@pytest.mark.parametrize("stale", [True, False])
def test_every_document_is_rendered(
    stale: bool, renderer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--check`` tells and writes nothing; without it all files are filled."""
    paths = (tmp_path / "a.md", tmp_path / "b.md")
    for path, name in zip(paths, ("generate", "cpu_decode"), strict=True):
        path.write_text(
            f"<!-- table:{name} -->\n{'stale-text' if stale else ''}\n<!-- end:{name} -->\n", encoding="utf-8"
        )
    monkeypatch.setattr(renderer, "ROOT", tmp_path)
    monkeypatch.setattr(renderer, "DOCUMENTS", paths)
    if not stale:
        assert renderer.main([]) == 0
        capsys.readouterr()
    before = [path.read_text(encoding="utf-8") for path in paths]
    assert renderer.main(["--check"]) == int(stale)
    assert capsys.readouterr().out.count("out of date") == 2 * stale
    assert [path.read_text(encoding="utf-8") for path in paths] == before
    assert renderer.main([]) == 0
    filled = [path.read_text(encoding="utf-8") for path in paths]
    assert "stale-text" not in "".join(filled) and "FP8_DYNAMIC" in filled[0] and "| W8A16 |" in filled[1]
    assert renderer.main(["--check"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table:e2e -->\n",
        "<!-- table:e2e -->\n<!-- end:gemm -->\n",
        "<!-- table:nothing -->\n<!-- end:nothing -->\n",
        "<!-- table:e2e -->\n<!-- end:e2e -->\n" * 2,
    ],
)
def test_wrong_markers_are_refused(text: str, renderer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tables opened"):
        renderer.render(text, tmp_path)


def test_targets_of_kernels_are_spans(renderer: Any) -> None:
    targets = ["sm80", "sm89", "sm90", "sm100"]
    spans = {("sm89", "sm90", "sm100"): "sm89+", ("sm80", "sm89"): "sm80–sm89", ("sm90",): "sm90", ("sm100",): "sm100"}
    for found, text in (spans | {("sm80", "sm90"): "sm80 sm90"}).items():
        assert renderer.span(list(found), targets) == text
