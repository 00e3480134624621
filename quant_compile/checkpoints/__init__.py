"""Checkpoints as other libraries write them: files, their configs, and one reader for each format.

``files`` validates and maps, ``config`` describes, ``FORMATS`` (``formats.py``) turns a module's tensors into planes, ``names`` finds the
weights that they belong to, ``fill`` puts them there. Nothing here compiles or runs a model.
"""
