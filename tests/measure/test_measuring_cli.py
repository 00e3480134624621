"""``sglquant attribute`` and ``sglquant search``, on a tiny model with a tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from quant_compile import cli
from quant_compile.measure import attribute
from quant_compile.policy import Policy
from tests.measure.test_attribute import tiny

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny(1).save_pretrained(tmp_path / "model")
    words = {f"w{index}": index for index in range(63)} | {"?": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{index * 7 % 63}" for index in range(80)))
    return tmp_path


def run(capsys: Captured, folder: Path, command: str, *more: str) -> tuple[int, str, str]:
    own = (
        "--text",
        str(folder / "text.txt"),
        "--tokenizer",
        str(folder / "tokenizer.json"),
        "--length",
        "16",
        "--count",
        "2",
    )
    code = cli.main((command, str(folder / "model"), *own, *more))
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def test_attribute(capsys: Captured, folder: Path) -> None:
    code, out, _ = run(capsys, folder, "attribute", "--policy", "W4A16", "--top", "2", "--json", str(folder / "a.json"))
    assert code == 0 and "KL alone" in out and "over 32 positions" in out
    rows = json.loads((folder / "a.json").read_text())["rows"]
    assert len(rows) == 7 and sum(row["kl"] is not None for row in rows) == 2


def test_search(capsys: Captured, folder: Path) -> None:
    pytest.importorskip("scipy")
    path, page = folder / "p.yaml", folder / "p.html"
    more = ("--out", str(path), "--points", "0", "--plot", str(page), "--schemes", "W4A16", "int4.group32+16", "W8A16")
    code, out, _ = run(capsys, folder, "search", "--bits", "5", "--m", "1:10,16", "--target", "sm90", *more)
    assert code == 0 and "what budgets buy" in out and "estimated on sm90, 10 x m=1, 1 x m=16" in out
    assert Policy.load(path).schemes and "<svg" in page.read_text()
    code, _, err = run(capsys, folder, "search", *more)
    assert code == 2 and "Fix: one or more of --bits, --bytes, --ms, --error" in err
    code, _, err = run(capsys, folder, "search", "--bits", "2", *more)
    assert code == 1 and "cannot be met" in err and "Fix: a budget of 4.125" in err


def test_text_and_tokenizer(capsys: Captured, folder: Path) -> None:
    policy = ("--policy", "W8A16")
    code, _, err = run(capsys, folder, "attribute", *policy, "--length", "500")
    assert code == 2 and "has 80 tokens, and one window needs 501" in err
    code, _, err = run(capsys, folder, "attribute", *policy, "--tokenizer", str(folder / "model"))
    assert code == 2 and "no tokenizer in" in err
    code, _, err = run(capsys, folder, "attribute", *policy, "--text", "none.txt")
    assert code == 2 and "none.txt does not exist" in err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--plot", "a.xyz"), 2, "Fix: a path that ends in .png, .svg, .pdf"),
        (("--json", "nowhere/a.json"), 2, "nowhere does not exist"),
        (("--plot", "nowhere/a.png"), 2, "nowhere does not exist"),
        (("--device", "abacus"), 2, "no device 'abacus' here"),
    ],
    ids=["ending", "folder", "plot folder", "device"],
)
def test_what_cannot_be_written_or_used_is_said_before_anything_is_measured(
    capsys: Captured, folder: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.setattr(attribute, "attribute", pytest.fail)
    got, _, err = run(capsys, folder, "attribute", "--policy", "W8A16", *more)
    assert got == code and message in err
