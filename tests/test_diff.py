"""``sglquant diff``: exactly the weights that differ, why, and an exit status that tells a difference from an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from quant_compile import cli
from quant_compile.ir.lock import Lock
from quant_compile.ir.report import Report
from tests.page.reports import synthetic
from tests.test_cli import TINY, Captured, run
from tests.test_lock import LOCK

BASE = "default: W8A8\n"
RULE = "default: W8A8\nrules:\n  - {match: model.layers.1.mlp.down_proj, scheme: keep}\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def saved(folder: Path, name: str, thing: Report | Lock | str) -> str:
    path = folder / name
    path.write_text(thing.to_json() if isinstance(thing, Report) else thing if isinstance(thing, str) else thing.text())
    return str(path)


def test_two_policies_name_exactly_the_weight_that_differs(capsys: Captured, tmp_path: Path, llama: str) -> None:
    a, b = saved(tmp_path, "a.yaml", BASE), saved(tmp_path, "b.yaml", RULE)
    code, out, err = run(capsys, "diff", a, b, "--model", llama, "--json")
    found = json.loads(out)
    assert code == 1 and err == "" and not found["same"]
    (one,) = found["differences"]
    assert one["name"] == "model.layers.1.mlp.down_proj.weight" and one["what"] == ["scheme", "kernel", "layout"]
    assert "default of the policy → rule 1" in one["why"] and found["around"] == ["policy a → b"]
    code, out, _ = run(capsys, "diff", a, a, "--model", llama)
    assert code == 0 and out.startswith("no weight differs, of ")


def test_two_reports(capsys: Captured, tmp_path: Path) -> None:
    first = synthetic(100)
    line = first.lines[7]
    second = replace(first, lines=(*first.lines[:7], replace(line, kernels="other"), *first.lines[8:-1]))
    a, b = saved(tmp_path, "a.json", first), saved(tmp_path, "b.json", second)
    code, out, err = run(capsys, "diff", a, b, "--html", str(tmp_path / "two.html"))
    assert code == 1 and err == "" and "2 of 101 weights differ" in out
    assert "model.layers.0.mlp.experts.3.proj1.weight" in out and "another kernel is chosen" in out and "removed" in out
    assert "two side by side" in (tmp_path / "two.html").read_text()
    assert run(capsys, "diff", a, a)[0] == 0


def test_two_locks_say_what_else_differs(capsys: Captured, tmp_path: Path) -> None:
    site = LOCK.sites["layers.10.w"]
    changed = {**LOCK.sites, "layers.10.w": replace(site, kernels=("c",), joined=())}
    other = replace(LOCK, sites=changed, versions={"torch": "2.15.0", "triton": "3.6.0"})
    a, b = saved(tmp_path, "a.lock", LOCK), saved(tmp_path, "b.lock", other)
    code, out, _ = run(capsys, "diff", a, b)
    assert code == 1 and "1 of 2 weights differ" in out and "kernel, fusion" in out and "torch 2.13.0 → 2.15.0" in out
    assert "m<=4: a, m>4: b" in out and "one kernel for w + v" in out
    assert run(capsys, "diff", a, a)[0] == 0


def test_alike_differences_share_a_row(capsys: Captured, tmp_path: Path) -> None:
    first = synthetic(100)
    second = replace(first, lines=tuple(replace(line, kernels="k" if line.scheme else "") for line in first.lines))
    a, b = saved(tmp_path, "a.json", first), saved(tmp_path, "b.json", second)
    _, short, _ = run(capsys, "diff", a, b)
    _, full, _ = run(capsys, "diff", a, b, "--full")
    assert "more" in short and len(full.splitlines()) > 2 * len(short.splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x:1: not readable as JSON"),
        ('{"lines": 3}', "x is JSON, and no report"),
        ("lock: 7\n", "x:1: is of version 7"),
        ("default: NOPE\n", "x:1: "),
        ("default: W8A8\n", "x is a policy, and what it does depends on the model. Fix: --model"),
    ],
)
def test_bad_input_is_an_error_and_no_difference(capsys: Captured, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x").write_text(text)
    good = saved(tmp_path, "a.json", synthetic(5))
    code, out, err = run(capsys, "diff", str(tmp_path / "x"), good)
    assert code == 2 and out == "" and message in err.replace(f"{tmp_path}/", "")


def test_wrong_usage(capsys: Captured, tmp_path: Path) -> None:
    assert cli.main(["diff", "W8A8"]) == 2
    capsys.readouterr()
    lock = saved(tmp_path, "a.lock", LOCK)
    assert "a lock is none" in run(capsys, "diff", lock, lock, "--html", "x.html")[2]
    assert "got 3" in run(capsys, "diff", "W8A8", "W8A8", "--model", "a", "b", "c")[2]
    code, _, err = run(capsys, "diff", "W8A8", "W8A16", "--model", str(tmp_path))
    assert code == 2 and "has no config.json" in err


def test_sizes_of_two_models(capsys: Captured, tmp_path: Path, llama: str) -> None:
    wide = {**TINY, "intermediate_size": 2 * TINY["intermediate_size"]}
    transformers.LlamaConfig(**wide, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "wide")
    code, out, _ = run(capsys, "diff", "W8A8", "W8A8", "--model", llama, str(tmp_path / "wide"), "--json")
    found = json.loads(out)["differences"]
    assert code == 1 and {one["name"].split(".")[-2] for one in found} == {"gate_proj", "up_proj", "down_proj"}
    assert all("shape" in one["what"] and one["why"] for one in found)


def test_policies_that_round_otherwise(capsys: Captured, tmp_path: Path, llama: str) -> None:
    a = saved(tmp_path, "a.yaml", "default: W4A16\nrounding: search\n")
    b = saved(tmp_path, "b.yaml", "default: W4A16\nrounding: nearest\nkv_cache: FP8\n")
    code, out, _ = run(capsys, "diff", a, b, "--model", llama, "--json")
    found = json.loads(out)
    assert code == 1 and {tuple(one["what"]) for one in found["differences"]} == {("rounding",)}
    assert "kv_cache none → FP8" in found["around"]
    c = saved(tmp_path, "c.yaml", "default: W8A8\nkv_cache: FP8\n")
    code, out, _ = run(capsys, "diff", "W8A8", c, "--model", llama)
    assert code == 0 and "kv_cache none → FP8" in out  # no weight, but told


def test_coverage_of_two_reports(capsys: Captured, tmp_path: Path) -> None:
    first = synthetic(100)
    line = next(line for line in first.lines if line.scheme)
    lines = tuple(replace(one, missed=True) if one is line else one for one in first.lines)
    a, b = saved(tmp_path, "a.json", first), saved(tmp_path, "b.json", replace(first, lines=lines))
    code, out, _ = run(capsys, "diff", a, b, "--json")
    assert code == 1 and [one["what"] for one in json.loads(out)["differences"]] == [["coverage"]]


def test_sizes_of_two_locks(capsys: Captured, tmp_path: Path) -> None:
    name = "layers.2.w"
    site = replace(LOCK.sites[name], shape=(4, 8))
    a = saved(tmp_path, "a.lock", replace(LOCK, sites={**LOCK.sites, name: site}))
    b = saved(tmp_path, "b.lock", replace(LOCK, sites={**LOCK.sites, name: replace(site, shape=(4, 16))}))
    code, out, _ = run(capsys, "diff", a, b, "--json")
    assert code == 1 and [one["what"] for one in json.loads(out)["differences"]] == [["shape"]]
    assert run(capsys, "diff", a, saved(tmp_path, "c.lock", LOCK))[0] == 0  # written before locks had shapes
    code, _, err = run(capsys, "diff", a, str(tmp_path / "nothere.lock"))
    assert code == 2 and "there is no such file" in err
