"""Linears with integer weights under 16-bit inputs: W4A16 and W8A16. Their layout ``w4_tiles`` serves experts as well."""
