"""Quantized programs without this package's backend: ``torch.export`` of a model, rewritten, and AOTInductor packages of it."""
