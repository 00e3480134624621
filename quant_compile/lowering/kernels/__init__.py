"""Kernels, grouped by the schemes that they serve; one file per provider and job: ``fit``, ``run``, and ``pack`` and its inverse.

* ``scaled``: FP8 and INT8 on both sides, scales per row or in blocks.
* ``weight_only``: integer weights under 16-bit inputs.
* ``w4a8``: 4-bit integer weights under 8-bit inputs.
* ``fp4``: FP4 weights under FP4 or 16-bit inputs, and FP4 inputs.
* ``experts``: Mixture-of-experts blocks of every scheme.
* ``attention``: attention over a KV cache, 16 bits or quantized, and the cache's writes.
* ``cpu``: linears of every scheme on a CPU.

Files without a leading underscore are found by the registry. Of the others, ``_triton_*`` hold Triton source, imported only when a
kernel runs, and the rest what several kernels share; those of several folders lie here: ``_roofline`` (costs), ``_library`` (refusals
and inputs of libraries), ``_humming``, ``_launch`` and ``_triton_pieces`` (Triton). ``reference`` runs any scheme anywhere.
"""
