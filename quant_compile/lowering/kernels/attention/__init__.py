"""Attention over a KV cache that is read once: ``reference`` is the truth in plain torch, ``triton_decode`` and ``triton_prefill``
the kernels for few queries and for many.

Writes into a quantized cache need no kernel: Inductor makes one of RoPE, quantization and the copy (``ir/kv.py``).
"""
