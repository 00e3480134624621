"""Checkpoints as other libraries write them: files, their configs, and one reader for each format.

``files`` validates and maps, ``config`` describes, ``FORMATS`` (``formats.py``) turns a module's tensors into planes, ``names`` finds the
weights that they belong to, ``fill`` puts them there. The other way, ``export`` plans what a model becomes, ``compressed_tensors_writer``
makes tensors of planes, and ``write`` puts them into a folder. Nothing here compiles or runs a model.
"""
