"""Every command's help has examples that parse, and completion scripts complete in their shells."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quant_compile import cli
from quant_compile.cli_help import EXAMPLES, SHELLS, completion, examples_of

needs_shtab = pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="the extra `completion` is not here")


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser()
    (found,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


def test_every_command_has_examples() -> None:
    assert set(EXAMPLES) == set(commands())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_in_the_help_and_parse(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([name, "--help"]) == 0
    assert examples_of(name) in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").touch()  # which some arguments look for
    for text, what in EXAMPLES[name]:
        words = shlex.split(text.partition(" > ")[0])
        assert words[:2] == ["sglquant", name] and what
        assert callable(cli._parser().parse_args(words[1:]).run)


def test_an_example_that_does_not_parse_is_found() -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["check", "W8A8", "--no-such-option"])


def test_without_shtab_the_fix_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert "Fix: pip install 'quant-compile[completion]'" in capsys.readouterr().err


@needs_shtab
@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_name_every_command_and_option(shell: str) -> None:
    script = completion(cli._parser(), shell)
    for name in commands():
        assert name in script
    for option in ("policy", "html", "bits"):
        assert option in script


@needs_shtab
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["insp"], {"inspect"}),
        (["co"], {"convert", "compare", "completion"}),
        (["inspect", "model", "--gra"], {"--graph"}),
        (["inspect", "model", "--graph", "d"], {"diff"}),
        (["completion", "f"], {"fish"}),
    ],
)
def test_bash_completes(words: list[str], wanted: set[str], tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(completion(cli._parser(), "bash"), encoding="utf-8")
    line = " ".join(["sglquant", *words])
    told = f"""
source {script}
COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}
function_of=$(complete -p sglquant | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function_of sglquant "{words[-1]}" "{words[-2] if len(words) > 1 else "sglquant"}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == wanted


@needs_shtab
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_scripts(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    script = tmp_path / "completion"
    script.write_text(completion(cli._parser(), shell), encoding="utf-8")
    subprocess.run([shell, "-n", str(script)], check=True, capture_output=True)
    if shell == "fish":
        told = f"source {script}; complete -C 'sglquant insp'"
        done = subprocess.run(["fish", "-c", told], capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == "inspect"
