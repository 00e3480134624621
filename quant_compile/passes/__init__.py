"""Graph rewrites, one file each: ``GraphModule + Plan -> GraphModule + PassReport``. PIPELINE is the order they run in."""

from __future__ import annotations

from quant_compile.passes.absorb_latent import absorb_latent
from quant_compile.passes.fuse_all_reduce import fuse_all_reduce
from quant_compile.passes.insert_attention import insert_attention
from quant_compile.passes.insert_batched import insert_batched
from quant_compile.passes.insert_moe import insert_moe
from quant_compile.passes.insert_quant import insert_quant
from quant_compile.passes.lower import lower
from quant_compile.passes.merge_siblings import merge_siblings
from quant_compile.passes.share_inputs import share_inputs
from quant_compile.passes.share_quant import share_quant

PIPELINE = (
    absorb_latent, insert_attention, insert_moe, insert_batched, insert_quant, share_inputs, share_quant, merge_siblings,
    fuse_all_reduce, lower,
)  # fmt: skip
