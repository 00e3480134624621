"""Python's profile hook in one thread, off where its calls are not asked for: they make Python several times slower."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch._dynamo import callback
from torch._dynamo.convert_frame import CatchErrorsWrapper

Look = Callable[[FrameType, str, Any], None]

# What Python calls to ask Dynamo for a frame's translation. Dynamo compiles in it, and writes much down before and after that.
_ASKED = CatchErrorsWrapper.__call__.__code__


class _Current(threading.local):
    look: Look | None = None


_CURRENT = _Current()


class _Hook:
    """``look``, but for what Dynamo calls while it is asked for a frame: there it only waits for the answer."""

    def __init__(self, look: Look) -> None:
        self._asked: FrameType | None = None
        self._look = look
        # Dynamo, at work in what is watched, would look at the watcher; while it is asked it does not.
        disabled: Any = torch.compiler.disable(self._watch)
        self.watch: Look = disabled

    def _watch(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code is not _ASKED:
            self._look(frame, event, argument)
        elif event == "call":
            self._asked = frame
            _set(self._wait)

    def _wait(self, frame: FrameType, event: str, _: Any) -> None:
        if frame is self._asked and event == "return":
            self._asked = None
            _set(self.watch)


def _set(look: Look) -> None:
    _CURRENT.look = look
    sys.setprofile(look)


@contextmanager
def profiled(look: Look) -> Generator[None]:
    """Call ``look`` for what this thread calls, but not while Dynamo is asked for a frame or inside of ``unprofiled``."""
    own, handler = threading.get_ident(), callback.callback_handler

    def pause(*_: Any) -> None:
        if threading.get_ident() == own:
            sys.setprofile(None)

    def go_on(*_: Any) -> None:
        if threading.get_ident() == own:
            sys.setprofile(_CURRENT.look)

    handler.register_start_callback(pause)
    handler.register_end_callback(go_on)
    _set(_Hook(look).watch)
    try:
        yield
    finally:
        _CURRENT.look = None
        sys.setprofile(None)
        with suppress(ValueError):  # torch._dynamo.reset() drops them
            handler.remove_start_callback(pause)
        with suppress(ValueError):
            handler.remove_end_callback(go_on)


@contextmanager
def unprofiled() -> Generator[None]:
    """Without the hook of ``profiled``; any other stays."""
    look, _CURRENT.look = _CURRENT.look, None
    if look is None:
        yield
        return
    sys.setprofile(None)
    try:
        yield
    finally:
        _set(look)
