"""What runs when a compiled graph is called: decide its sites, compile a variant, bind planes, run.

Modules point one way: ``guard`` <- ``decide`` <- ``variant`` <- ``record``, ``verified`` <- ``call``.
"""

from quant_compile.runtime.call import Binding, GraphRunner
from quant_compile.runtime.decide import Choosers
from quant_compile.runtime.variant import Variant

__all__ = ["Binding", "Choosers", "GraphRunner", "Variant"]
