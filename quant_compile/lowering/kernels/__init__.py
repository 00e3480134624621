"""Kernel families, one file each: ``fit``, ``run`` and, where they bring a layout, its ``pack`` and inverse.

Files with a leading underscore hold Triton source and are imported only when a kernel runs.
"""
