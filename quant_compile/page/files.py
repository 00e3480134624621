"""Write a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def written_whole(path: Path, text: str) -> Path:
    """Write ``text`` in place of what is at ``path``.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8", newline="\n") as file:
        try:
            file.write(text)
        except BaseException:
            os.unlink(file.name)
            raise
    try:
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise
    return path
