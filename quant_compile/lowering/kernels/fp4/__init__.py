"""Linears with FP4 weights: NVFP4 and MXFP4 under FP4 inputs, NVFP4A16 and MXFP4A16 under 16-bit inputs; and FP4 inputs themselves.

``w4a8/humming_4bit`` serves those with 16-bit inputs as well.
"""
