"""Which parametrized tests run with a few of their cases in `make test`; `make test-all` runs them with all.

Their cases take long and hold much alike: kernels in Triton's interpreter (``tests/gpu`` runs them as well), and whole models that
are compiled under one scheme after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

# Test -> how many of its cases, spread over all; or which, by their ids.
QUICK: Mapping[str, int | Sequence[str]] = {
    "lowering/test_attention.py::test_in_interpreter": ("check_same_bits", "check_unread", "check_every_e4m3_byte"),
    "lowering/test_prefill_attention.py::test_in_interpreter": ("check_unread",),
    "lowering/test_prefill_attention.py::test_cubins": 6,
    "lowering/test_prefill_attention.py::test_codes_are_operands_in_registers": 2,
    "lowering/test_w4a8.py::test_every_plan_in_interpreter": ("W4AFP8",),
    "lowering/test_w4a8.py::test_in_interpreter": ("check_unaligned_inputs", "check_every_code", "check_dequantized"),
    "lowering/test_fp4a16.py::test_in_interpreter": 2,
    "lowering/test_fp4_native.py::test_dense_numbers_with_the_block_scaled_product_emulated": 1,
    "lowering/test_gguf_kernels.py::test_in_interpreter": 4,
    "lowering/test_triton_gguf_moe.py::test_form_in_interpreter": 3,
    "lowering/test_triton_moe.py::test_grouped_in_interpreter": 2,
    "lowering/test_triton_moe.py::test_decode_in_interpreter": 2,
    "lowering/test_triton_moe4.py::test_cubin": 5,
    "lowering/test_triton_moe4.py::test_cubin_of_odd_sizes": 2,
    "lowering/test_triton_moe4.py::test_form_in_interpreter": 3,
    "lowering/test_triton_scaled_mm.py::test_every_plan_in_interpreter": 2,
    "lowering/test_w4a16.py::test_int4_in_interpreter": 1,
    "lowering/test_fp4.py::test_input_is_traced_by_dynamo_and_by_the_lowering": 2,
    "lowering/test_triton_fp4_input.py::test_norm_and_quantization_are_those_of_eager_torch": 1,
    "lowering/test_triton_fp4_input.py::test_zeros_nan_and_inf_in_a_norm": 1,
    "passes/test_fuse_input.py::test_a_model_compiled_for_a_gpu": 1,
    "passes/test_fusion.py::test_norm_and_quantize_are_one_kernel": 6,
    "passes/test_fusion.py::test_activation_and_quantize_are_one_kernel": 6,
    "passes/test_fusion.py::test_fp4_on_a_gpu": 3,
    "passes/test_fusion.py::test_kernels_of_groups_and_of_tensors": 2,
    "measure/test_recommend.py::test_every_goal_has_a_policy_that_the_target_serves": 5,
    "test_bad_input.py::test_an_empty_weight_is_kept_whatever_the_scheme": 24,
    "test_bad_input_4bit.py::test_any_size": 12,
    "test_bad_input_4bit.py::test_a_model_of_odd_sizes": 3,
    "test_bad_input_4bit.py::test_experts_of_any_size": 8,
    "ir/test_experts.py::test_the_replaced_graph_is_the_model": 8,
    "test_kv_cache.py::test_compiled_generate_is_the_eager_cache": 1,
    "test_kv_cache.py::test_encoder_decoders_keep_their_own_tokens_in_codes": 1,
    "test_latent.py::test_decode_absorbs_and_is_eager": 2,
    "test_routers.py::test_routers_of_families": 16,
    "checkpoints/test_adopted_modules.py::test_fp8_experts_run_on_their_own_codes": 2,
    "test_gguf_models.py::test_a_compiled_model_lives_on_its_blocks": 1,
    "test_kv_cache.py::test_attention_reads_codes": 2,
    "test_moe.py::test_coverage_of_every_family": 5,
    "test_runtime.py::test_inputs_of_one_dimension": 8,
    "test_tiny_lm.py::test_whole_model_has_the_textbook_perplexity": 1,
    "test_tiny_lm.py::test_layers_have_the_textbook_perplexity": 4,
    "test_tiny_lm.py::test_moe_has_the_textbook_perplexity": 4,
    "test_tiny_lm.py::test_whole_moe_is_close_to_bf16": 1,
    "checkpoints/test_packed.py::test_round_trip": 4,
    "checkpoints/test_save.py::test_round_trip": 10,
    "checkpoints/test_save.py::test_what_the_format_cannot_express": 2,
    "checkpoints/test_save.py::test_gpt_oss": 1,
    "checkpoints/test_save.py::test_names_are_those_that_transformers_writes": 1,
    "checkpoints/test_save.py::test_convert_that_keeps_every_weight_writes_16_bits": 1,
    "checkpoints/test_cache_scales.py::test_generate_uses_the_checkpoints_scales": 1,
}


def mark(items: Sequence[pytest.Item]) -> None:
    """Mark the other cases slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0].removeprefix("tests/"), []).append(item)
    for test, quick in QUICK.items():
        found = cases.get(test, [])
        for index, item in enumerate(found):
            name = item.nodeid.partition("[")[2].removesuffix("]")
            if name not in quick if not isinstance(quick, int) else index not in _spread(len(found), quick):
                item.add_marker(pytest.mark.slow)


def _spread(total: int, count: int) -> set[int]:
    """Indices from first to last: all if there are no more than ``count``."""
    if total <= count:
        return set(range(total))
    return {round(i * (total - 1) / max(1, count - 1)) for i in range(count)}
