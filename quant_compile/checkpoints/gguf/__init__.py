"""GGUF files: the container, what its architectures are in transformers, tokenizers, and writing one."""
