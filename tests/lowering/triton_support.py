"""What tests of Triton kernels share: cubins for any arch without a GPU, and functions run under Triton's interpreter.

Both need the triton package and nothing else; ``needs_triton`` skips where it is missing.
"""

from __future__ import annotations

import ast
import atexit
import importlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def compile_cubin(
    kernel: Any, arch: int, types: Mapping[str, Any], constants: Mapping[str, Any], aligned: bool = True, **options: Any
) -> Any:
    """Compile a ``@triton.jit`` function to a cubin for ``arch`` (90 for sm90), on a machine without a GPU.

    Args:
        types: argument -> Triton type text: ``*fp8e4nv``, ``*i8``, ``*fp32``, ``*bf16``, ``i32`` ...; a tuple of these for a tuple.
        constants: constexpr argument -> value (a pointer that may be None is a constant None here).
        aligned: pointers and i32 arguments are multiples of 16, as the launcher finds for usual shapes.
        options: num_warps, num_stages ...

    Returns:
        Triton's compiled kernel: ``.asm["ptx"]``, ``.asm["cubin"]``, ``.metadata.shared``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name in kernel.arg_names if name not in types and name not in constants]
    assert not missing, f"neither type nor constant for {missing}"
    hints = {}
    if aligned:
        wide = [i for i, name in enumerate(kernel.arg_names) if str(types.get(name)).startswith(("*", "i32", "i64"))]
        hints = {(i,): [["tt.divisibility", 16]] for i in wide}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def stack_bytes(built: Any, folder: Path) -> int:
    """Bytes of stack a thread has in a compiled kernel: what did not fit into registers."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", text))


def mend_interpreter() -> None:
    """Let Triton 3.6's interpreter loop to a run-time bound under numpy 2.4, which takes [x] for no scalar; and be quicker.

    Each call of a device function looks through all of triton.language anew for what is to be replaced, a third of the whole time; here
    once in a launch.
    """
    from triton.runtime import interpreter

    patch, patch_all, done = interpreter._patch_lang_tensor, interpreter._patch_lang, set[Any]()

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def patched_once(function: Any) -> Any:
        if function in done:
            return None  # a device function, whose scope nobody asks for
        scope = patch_all(function)
        done.add(function)
        restore = scope.restore

        def restored() -> None:
            done.clear()
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang_tensor = patched
    interpreter._patch_lang = patched_once


# What every interpreted test imports; once, in a process that is forked for each test.
IMPORTS = "torch", "triton.language", "pytest", "hypothesis", "quant_compile.backend", "quant_compile.lowering.registry"


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen[str]:
    """A process under TRITON_INTERPRET=1, which must be set before Triton is imported."""
    code = "from tests.lowering.triton_support import serve; serve()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "process_group": 0}
    server = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True, **pipes)
    atexit.register(_kill, server)
    return server


def _kill(server: subprocess.Popen[str]) -> None:
    """The server and the fork it waits for."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)


def serve() -> None:
    """For each line (module, function, arguments, file) of stdin: call it in a fork, which writes to the file; print how it ended."""
    mend_interpreter()
    for name in IMPORTS:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)  # tests run beside one another
    for line in sys.stdin:
        module, function, arguments, file = ast.literal_eval(line)
        child = os.fork()
        if child == 0:
            with open(file, "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            try:
                getattr(importlib.import_module(module), function)(*arguments)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run_interpreted(module: str, function: str, *arguments: object, timeout: float = 300) -> None:
    """Call ``module.function(*arguments)`` in a process of its own under Triton's interpreter.

    ``arguments`` must have a faithful repr. The process's output is the message of the AssertionError when it fails.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r", suffix=".log") as output:
        server.stdin.write(f"{(module, function, arguments, output.name)!r}\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            _server.cache_clear()
            _kill(server)
            raise AssertionError(f"{function} took more than {timeout:.0f} s\n{output.read()}")
        ended = server.stdout.readline().strip()
        if not ended:
            _server.cache_clear()
        assert ended == "0", f"{function} ended with {ended or 'its server'}\n{output.read()}"


def mend_bfloat16() -> None:
    """Let Triton 3.6's interpreter round f32 to bf16 as the hardware does: its own conversion cuts."""
    import torch
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.name == "bf16" and source.name == "fp32":
            return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    interpreter._convert_float = converted
