"""A newcomer's path, each step timed: clone, demo, an own model on a CPU, a policy, a report.

What runs is what docs/tutorial.md says, taken out of it, in a fresh clone with its own environment, without any GPU. The clone is of this
repository, so a network counts only for the packages that ``make demo`` installs.

    python benchmarks/newcomer.py                              # on an idle machine
    python benchmarks/newcomer.py --installed                  # this interpreter: what does it take without the installation?
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import RESULTS, ROOT, last_line, machine, write_result

TUTORIAL = ROOT / "docs" / "tutorial.md"
LIMIT_S = 600  # of all steps together
# Runs a file's snippets one after the other and writes after each of them the time.
DRIVER = """
import json, sys, time
scope, ends = {"__name__": "__main__"}, [time.time()]
for text in json.load(open(sys.argv[1])):
    exec(compile(text, "tutorial.md", "exec"), scope)
    ends.append(time.time())
json.dump([b - a for a, b in zip(ends, ends[1:])], open(sys.argv[2], "w"))
"""


@dataclass(frozen=True)
class Step:
    """One step of the path.

    Attributes:
        name: what it is.
        seconds: by the wall clock.
        error: the last line of what went wrong; empty: nothing did.
    """

    name: str
    seconds: float
    error: str = ""


Run = Callable[[Sequence[str], Path], None]
"""Runs a command in a folder; raises ``subprocess.CalledProcessError``."""


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a document in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def commands(text: str, first: str) -> list[str]:
    """Lines of the bash block whose first line begins so, without their comments.

    Raises:
        ValueError: there is no such block.
    """
    for block in blocks(text, "bash"):
        if block.startswith(first):
            return [line.partition("  #")[0].strip() for line in block.splitlines() if line.strip()]
    raise ValueError(f"docs/tutorial.md has no bash block that begins with {first!r}")


def walk(folder: Path, run: Run, installed: bool, clock: Callable[[], float] = time.monotonic) -> list[Step]:
    """Go the path in an empty folder, as far as it leads.

    Args:
        folder: where the clone goes.
        run: runs a command.
        installed: with this interpreter, which has everything; the demo then installs nothing.
        clock: seconds.
    """
    text, clone = TUTORIAL.read_text(encoding="utf-8"), folder / "sglquant"
    python = sys.executable if installed else str(clone / ".venv" / "bin" / "python")
    demo = [python, "-m", "quant_compile", "demo", "--html", "demo.html"] if installed else ["make", "demo"]
    first, report = blocks(text, "python")[:2]
    policy = commands(text, "sglquant inspect")
    steps: list[Step] = []

    def timed(name: str, act: Callable[[], None]) -> bool:
        started = clock()
        error = ""
        try:
            act()
        except subprocess.CalledProcessError as failure:
            error = last_line(str(failure.stderr or failure))
        steps.append(Step(name, clock() - started, error))
        return not error

    def snippets() -> None:
        (folder / "snippets.json").write_text(json.dumps([first, report]), encoding="utf-8")
        run([python, "-c", DRIVER, str(folder / "snippets.json"), str(folder / "times.json")], clone)

    def policies() -> None:
        (clone / "my_policy.yaml").write_text(blocks(text, "yaml")[0], encoding="utf-8")
        for line in policy:
            words = line.split()
            run([python, "-m", "quant_compile", *words[1:]], clone)

    path: list[tuple[str, Callable[[], None]]] = [
        ("clone", lambda: run(["git", "clone", "--quiet", str(ROOT), str(clone)], folder)),
        ("demo" if installed else "demo, with its installation", lambda: run(demo, clone)),
        ("own model on a CPU", snippets),
        ("policy", policies),
    ]
    for name, act in path:
        if not timed(name, act):
            break
    return with_report(steps, folder / "times.json")


def with_report(steps: Sequence[Step], times: Path) -> list[Step]:
    """The steps, with the report's own time taken out of the model's, in whose process it is made."""
    if not times.exists():
        return list(steps)
    seconds = json.loads(times.read_text(encoding="utf-8"))[1]
    out = [Step(s.name, s.seconds - seconds, s.error) if s.name == "own model on a CPU" else s for s in steps]
    return [*out, Step("report", seconds)]


def without_gpu(command: Sequence[str], folder: Path) -> None:
    """Run a command; of ``diff`` a difference is none to stop for."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and not ("diff" in command and done.returncode == 1):
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr or done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 where a step failed or all took longer than LIMIT_S."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--installed", action="store_true", help="use this interpreter and install nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "newcomer.json", help="where the result goes")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        steps = walk(Path(folder), without_gpu, args.installed)
    total = sum(step.seconds for step in steps)
    for step in steps:
        print(f"{step.seconds:7.1f} s  {step.name}{f': {step.error}' if step.error else ''}")
    complete = len(steps) == 5 and not any(step.error for step in steps)
    print(f"{total:7.1f} s  in all{'' if complete else ', not all of the way'}")
    meta = {"machine": machine("cpu"), "installed": args.installed, "total_s": total, "limit_s": LIMIT_S}
    write_result(args.out, [asdict(step) for step in steps], meta)
    return int(not complete or total > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
