"""Mixture-of-experts blocks of every scheme, on GPUs and on a CPU; ``MOE_KERNELS`` instead of ``KERNELS``.

* ``triton_moe``: FP8, INT8, blocks, W8A16 and W4A16; ``triton_moe4``: W4A8, W4AFP8, QServe, NVFP4A16 and MXFP4A16;
  ``triton_fp4_moe``: NVFP4 and MXFP4. ``_frame`` and ``_triton_frame`` hold what these three share.
* ``library_moe`` (FP8, blocks, W4A16), ``sgl_w4a8_moe`` (W4AFP8), ``fp4_native_moe`` (NVFP4, MXFP4): grouped GEMMs of libraries.
* ``torch_moe_decoded``: W4A8 and FP4 weights as 16-bit ones, for many tokens. ``torch_cpu_moe``: every scheme on a CPU.
"""
