"""Attention over a KV cache that is read once: decode with split keys, and the write side of a quantized cache.

``reference`` is the truth in plain torch, ``triton_decode`` the kernel for few queries, ``triton_store`` quantizes and stores.
"""
