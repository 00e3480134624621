"""Kernels for weights in GGUF blocks under 16-bit inputs: Triton's, from blocks taken apart, and sgl-kernel's, from blocks as they are."""
