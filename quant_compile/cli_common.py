"""What the commands of ``sglquant`` share: arguments, the console, the model they are about."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

TARGETS = ("cpu", "sm80", "sm89", "sm90", "sm100", "sm120")
# Width of tables that are piped or captured, where there is no terminal to fit.
PIPED_WIDTH = 170


def model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="transformers class (default: the config's)")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of the weights (default: the config's)"
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="build this many layers only")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def output(text: str) -> Path:
    """An argument that is a file to write: its folder is there, so that nothing is measured in vain."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"the folder {path.absolute().parent} does not exist"
        raise argparse.ArgumentTypeError(f"{text} cannot be written, {what}")
    return path


def existing(text: str) -> Path:
    """An argument that is a file to read."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"the file {text} does not exist")
    return path


def console_of() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


def model_spec(arguments: argparse.Namespace, source: str) -> Any:
    from quant_compile.inspect.models import ModelSpec

    return ModelSpec(source, arguments.class_name, arguments.dtype, arguments.layers)
