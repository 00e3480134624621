"""Examples under each command's ``--help``, and shell completion."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from quant_compile.cli_common import Command
from quant_compile.ir.errors import MissingLibraryError

SHELLS = ("bash", "zsh", "fish")
# Command -> what to type, and what that does.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "policies": (("sglquant policies", "all presets and shipped policies"),),
    "check": (
        ("sglquant check W8A8 --model meta-llama/Llama-3.1-8B", "what a preset decides"),
        ("sglquant check my.yaml --model path/to/model --full --json > plan.json", "every weight, as JSON"),
    ),
    "inspect": (
        ("sglquant inspect path/to/model --policy W4A16 --graph diff", "what the passes change in the graph"),
        ("sglquant inspect path/to/model --policy FP8_DYNAMIC --target sm90 --layers 1", "kernels of another device"),
        ("sglquant inspect path/to/model --policy FP8_DYNAMIC --target sm90 --html report.html", "all of it, as a page"),
        ("sglquant inspect model-Q4_K_M.gguf", "what load makes of a checkpoint"),
    ),
    "diff": (
        ("sglquant diff W8A8 my.yaml --model path/to/model", "two policies"),
        ("sglquant diff W8A8 W8A8 --model path/to/old path/to/new", "two versions of a model"),
        ("sglquant diff main.lock branch.lock", "two locks; exit status 1 where they differ"),
    ),
    "convert": (
        ("sglquant convert path/to/model path/to/w8a8 --policy W8A8", "quantize a checkpoint"),
        ("sglquant convert model-Q4_K_M.gguf path/to/folder", "a GGUF file to a folder"),
        ("sglquant convert path/to/model out.gguf --policy GGUF_Q4_K", "a folder to a GGUF file"),
    ),
    "recommend": (
        ("sglquant recommend path/to/model --goal throughput --gpu h100", "a policy, why, and what it costs"),
        ("sglquant recommend path/to/model --goal memory --gpu rtx4090 --out my.yaml", "write it"),
    ),
    "compare": (
        ("sglquant compare path/to/model text.txt --policies keep W8A8 my.yaml", "bits, perplexity, divergence, speed"),
        ("sglquant compare path/to/model text.txt --policies W8A8 W4A16 --new-tokens 0", "without measuring speed"),
    ),
    "attribute": (
        ("sglquant attribute path/to/model --policy W4A16 --text text.txt --top 10", "the ten weights that cost most"),
    ),
    "search": (
        ("sglquant search path/to/model --text text.txt --bits 5", "a scheme for each weight, 5 bits on average"),
        ("sglquant search path/to/model --text text.txt --ms 3 --m 1:128,512:1 --target sm90", "by time"),
    ),
    "demo": (
        ("sglquant demo", "the bundled models under several policies"),
        ("sglquant demo --policies W8A8 my.yaml --moe-policies --html demo.html", "of the dense model, with a page"),
    ),
    "completion": (
        ("sglquant completion bash > ~/.local/share/bash-completion/completions/sglquant", "from the next shell on"),
        ("sglquant completion zsh > ~/.zfunc/_sglquant", "where ~/.zfunc is in fpath"),
        ("sglquant completion fish > ~/.config/fish/completions/sglquant.fish", "from the next shell on"),
    ),
}  # fmt: skip


def examples_of(name: str) -> str:
    """The end of a command's help."""
    lines = [f"  {text}\n      {what}" for text, what in EXAMPLES[name]]
    return "\n".join(["examples:", *lines])


def add(command: Command, parser: argparse.ArgumentParser) -> None:
    """Add ``completion``, of all that ``parser`` has."""

    def run(arguments: argparse.Namespace) -> int:
        print(completion(parser, arguments.shell))
        return 0

    made = command("completion", run, "print a script that completes commands and options in a shell")
    made.add_argument("shell", choices=SHELLS, help="for which shell")


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script for a shell.

    Args:
        parser: of the whole command line.
        shell: one of SHELLS.

    Raises:
        MissingLibraryError: shtab is not installed.
    """
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError as error:
        raise MissingLibraryError(
            "completion needs shtab, which is not installed.\nFix: pip install 'quant-compile[completion]'"
        ) from error
    return shtab.complete(parser, shell)
