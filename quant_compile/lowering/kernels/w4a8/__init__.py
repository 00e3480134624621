"""Linears with 4-bit integer weights under 8-bit inputs: W4A8 (int8), W4AFP8 (e4m3) and both forms of QServe.

``humming_4bit`` serves FP4 weights under 16-bit inputs as well (NVFP4A16, MXFP4A16), by the same GEMMs.
"""
