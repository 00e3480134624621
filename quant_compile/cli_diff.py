"""The command that compares: ``diff``."""

from __future__ import annotations

import argparse

from quant_compile.cli_common import (
    TARGETS,
    Command,
    console_of,
    model_arguments,
    model_spec,
    output,
    positive,
    quiet_transformers,
    report_error,
    this_machine,
)
from quant_compile.ir.errors import OptionError


def add(command: Command) -> None:
    """Add it; ``command`` makes a command's parser, by its name, its function and its help."""
    text = "weights that differ between two policies, reports or locks; exit 0: none, 1: some, 2: an error"
    diff = command("diff", _diff, text)
    diff.add_argument("before", metavar="A", help="policy, report as JSON, or lock")
    diff.add_argument("after", metavar="B", help="the same")
    diff.add_argument(
        "--model",
        nargs="+",
        metavar="M",
        help="of policies: folder with config.json or Hugging Face id; two: A's and B's",
    )
    diff.add_argument("--target", choices=TARGETS, help="of policies: the device that kernels are chosen for")
    diff.add_argument(
        "--tokens", type=positive, default=16, metavar="N", help="of policies: tokens of the traced input"
    )
    diff.add_argument("--full", action="store_true", help="one line for every weight")
    diff.add_argument("--json", action="store_true", help="print everything as JSON")
    diff.add_argument("--html", type=output, metavar="FILE", help="write both reports side by side here; not of locks")
    model_arguments(diff)


def _diff(arguments: argparse.Namespace) -> int:
    try:
        return _compared(arguments)
    except Exception as error:  # whatever it is: 1 says that both were compared, and differ
        if arguments.traceback:
            raise
        report_error(error)
        return 2


def _compared(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    from quant_compile.diff import compare, read
    from quant_compile.lowering.target import Target

    models: list[str | None] = arguments.model or [None]
    if len(models) > 2:
        raise OptionError(f"--model takes one model, or A's and B's, got {len(models)}")
    target = Target.fake(arguments.target) if arguments.target else this_machine()
    sources = [
        read(source, model_spec(arguments, model) if model is not None else None, target, arguments.tokens)
        for source, model in zip((arguments.before, arguments.after), (models[0], models[-1]), strict=True)
    ]
    found = compare(*sources)
    if arguments.html:
        first, second = (source.report for source in sources)
        if first is None or second is None:
            raise OptionError("--html draws reports, and a lock is none. Fix: leave it out, or compare reports.")
        first.html(arguments.html, second)
    if arguments.json:
        print(found.to_json())
    elif found.same:
        print("; ".join((f"no weight differs, of {found.total}", *found.around)))
    else:
        console_of().print(found.table(arguments.full))
    return 0 if found.same else 1
