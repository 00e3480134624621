"""Tensors of GGUF files: block types as data, bytes to numbers and numbers to bytes. The one home of their bit layouts."""
