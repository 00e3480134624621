"""Enters ``HfConfig`` in transformers' registries once both packages are imported, in whichever order.

transformers knows no plug-ins, and importing it takes seconds, so that it must not happen at ``import quant_compile``. Where its registry
is there already, ours is entered at once; else a finder waits on ``sys.meta_path`` for that one module, and takes itself away then.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def enter() -> None:
    """Register now, or when transformers' registry is imported."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    """A transformers without such a registry is left as it is; ``quant_compile.HfConfig`` then says what it lacks."""
    try:
        import quant_compile._transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return


class _Waiting(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's spec as the other finders have it, with a loader that goes on to register."""
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register()
