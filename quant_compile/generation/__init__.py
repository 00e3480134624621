"""What makes ``model.generate`` fast: static caches that are kept, one dynamic prefill graph, CUDA graphs of the decode step.

Everything here is set up by ``quant_compile.compile`` and taken away by ``quant_compile.uncompile``; see docs/generate.md.
"""

from __future__ import annotations

from quant_compile.generation.attach import install, kept_of, outside_of, uninstall

__all__ = ["install", "kept_of", "outside_of", "uninstall"]
