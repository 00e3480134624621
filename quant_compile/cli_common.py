"""What the commands of ``sglquant`` share: arguments, the console, errors, the model and the device they are about."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_compile.ir.errors import OptionError, QuantError

if TYPE_CHECKING:
    from rich.console import Console

    from quant_compile.lowering.target import Target

Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
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


def this_machine() -> Target:
    import torch

    from quant_compile.lowering.target import Target

    return Target.of("cuda" if torch.cuda.is_available() else "cpu")


def report_error(error: Exception) -> int:
    """Print one clear text; returns the exit code."""
    # Dynamo wraps what a backend raises
    own = error if isinstance(error, QuantError) else getattr(error, "inner_exception", None)
    if isinstance(own, QuantError):
        print(f"sglquant: {own}", file=sys.stderr)
        return 2 if isinstance(own, OptionError) else 1
    hint = "Run again with --traceback to see where it comes from."
    print(f"sglquant: {type(error).__name__}: {error}\n{hint}", file=sys.stderr)
    return 1
