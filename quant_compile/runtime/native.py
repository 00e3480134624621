"""``watch.cpp`` as a module: compiled once for each torch and Python, while a graph is compiled, where there is a C++ compiler.

Writes ``<cache>/sglquant/watch-<key>.so`` under ``XDG_CACHE_HOME`` (default ``~/.cache``). Where nothing can be compiled, or what was
compiled does not say what torch says, there is no module, and ``watch.py`` does with loops of Python's.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import torch

NAME = "sglquant_watch"
SOURCE = Path(__file__).with_name("watch.cpp")
COMPILERS = ("c++", "g++", "clang++")
LONGEST, LONGEST_CLEANING = 300, 2  # seconds

_LOCK = threading.Lock()
_LOADED: dict[Path, Any] = {}
_COMPILING = set[Any]()


def build_ahead() -> None:
    """Begin to compile, in a thread, if nothing is there yet; called when a graph begins to be compiled."""
    if sys.platform == "linux" and not is_there():
        _build_once()


def module() -> Any:
    """The module if it is there by now; None if not."""
    if not is_there():
        return None
    path = library()
    if path not in _LOADED:
        with _LOCK:
            if path not in _LOADED:
                _LOADED[path] = _load(path)
    return _LOADED.get(path)


def is_there() -> bool:
    """Whether it has been compiled; also False where nobody may look, or there is no home."""
    try:
        return library().exists()
    except (OSError, RuntimeError):
        return False


@lru_cache(maxsize=1)
def library() -> Path:
    """Where the compiled file belongs: named by all that it depends on."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    parts = (torch.__version__, torch.version.git_version, sys.version, sysconfig.get_config_var("SOABI"))
    digest.update("\n".join(map(str, parts)).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "sglquant" / f"watch-{digest.hexdigest()[:16]}.so"


@lru_cache(maxsize=1)
def _build_once() -> threading.Thread:
    thread = threading.Thread(target=build, name=NAME, daemon=True)
    thread.start()
    atexit.register(_give_up, thread)
    return thread


def _give_up(thread: threading.Thread) -> None:
    """A process that ends takes its compiler along, and leaves nothing behind."""
    for process in list(_COMPILING):
        process.kill()
    thread.join(LONGEST_CLEANING)


def build() -> bool:
    """Compile, and put the file in its place in one step; whether it is there."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return False
    try:
        path = library()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _run(_command(compiler, made))
            made.replace(path)
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return False  # no home, no headers, a compiler that is too old, a cache that is read-only: loops do
    return True


def _run(command: list[str]) -> None:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _COMPILING.add(process)
        try:
            code = process.wait(LONGEST)
        finally:
            _COMPILING.discard(process)
            process.kill()  # nothing if it has ended
    if code:
        raise subprocess.CalledProcessError(code, command)


def _command(compiler: str, made: Path) -> list[str]:
    home = Path(torch.__file__).parent
    headers = (sysconfig.get_paths()["include"], home / "include", home / "include/torch/csrc/api/include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", abi]
    libraries = [f"-L{home / 'lib'}", "-ltorch_python", "-lc10"]
    return [compiler, *flags, *(f"-I{path}" for path in headers), str(SOURCE), "-o", str(made), *libraries]


def _load(path: Path) -> Any:
    """The module, if it tells of a tensor what torch tells; None for a file that is broken."""
    try:
        loader = ExtensionFileLoader(NAME, str(path))
        spec = spec_from_loader(NAME, loader)
        assert spec is not None
        made = module_from_spec(spec)
        loader.exec_module(made)
    except ImportError:
        return None
    return made if _agrees(made) else None


def _agrees(made: Any) -> bool:
    with torch.inference_mode():
        tensors = [torch.ones(3), torch.empty(0)]
    with torch.inference_mode(False), torch.no_grad():
        tensors += [torch.ones(3).add_(1), torch.ones(4, 2)[1:]]
    told = [(-1 if tensor.is_inference() else tensor._version, tensor.data_ptr()) for tensor in tensors]
    asked, known = made.states(tuple(tensors)), made.identities(tuple(tensors))
    return _numbers(asked) == [number for pair in told for number in pair] and _numbers(known) == list(map(id, tensors))


def _numbers(packed: bytes) -> list[int]:
    return list(memoryview(packed).cast("q"))
