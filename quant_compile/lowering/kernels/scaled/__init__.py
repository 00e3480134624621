"""Linears with 8-bit weights and 8-bit inputs: FP8 and INT8 with scales per row or tensor, and FP8 in blocks."""
