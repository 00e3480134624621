"""Python's profile hook in one thread, off where its calls are not asked for: they make Python several times slower."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from torch._dynamo import callback

Look = Callable[[FrameType, str, Any], None]


class _Current(threading.local):
    look: Look | None = None


_CURRENT = _Current()


@contextmanager
def profiled(look: Look) -> Generator[None]:
    """Call ``look`` for what this thread calls, but not while Dynamo compiles or inside of ``unprofiled``."""
    own, handler = threading.get_ident(), callback.callback_handler

    def pause(*_: Any) -> None:
        if threading.get_ident() == own:
            sys.setprofile(None)

    def go_on(*_: Any) -> None:
        if threading.get_ident() == own:
            sys.setprofile(_CURRENT.look)

    handler.register_start_callback(pause)
    handler.register_end_callback(go_on)
    _CURRENT.look = look
    sys.setprofile(look)
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
        _CURRENT.look = look
        sys.setprofile(look)
