"""Linears on a CPU: int8 and int4 weights on kernels of torch, every other scheme through dequantization. Experts: ``experts``."""
