"""Which tests run with a few of their cases in `make test`, or with none; `make test-all` runs them with all.

Their cases take long and hold much alike: kernels in Triton's interpreter (``tests/gpu`` runs them as well), and whole models that
are compiled under one scheme after the other. A test with none is of a whole model whose parts others test,
or of a benchmark that runs elsewhere.
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
    "lowering/test_fp4a16.py::test_in_interpreter": 1,
    "lowering/test_fp4_native.py::test_dense_numbers_with_the_block_scaled_product_emulated": 1,
    "lowering/test_gguf_kernels.py::test_in_interpreter": 2,
    "lowering/test_triton_gguf_moe.py::test_form_in_interpreter": 3,
    "lowering/test_triton_moe.py::test_grouped_in_interpreter": 1,
    "lowering/test_triton_moe.py::test_decode_in_interpreter": 2,
    "lowering/test_triton_moe4.py::test_cubin": 5,
    "lowering/test_triton_moe4.py::test_cubin_of_odd_sizes": 2,
    "lowering/test_triton_moe4.py::test_form_in_interpreter": 3,
    "lowering/test_triton_scaled_mm.py::test_every_plan_in_interpreter": 2,
    "lowering/test_w4a16.py::test_int4_in_interpreter": 1,
    "lowering/test_fp4.py::test_input_is_traced_by_dynamo_and_by_the_lowering": 2,
    "lowering/test_triton_fp4_input.py::test_norm_and_quantization_are_those_of_eager_torch": (),
    "lowering/test_triton_fp4_input.py::test_zeros_nan_and_inf_in_a_norm": 1,
    "passes/test_fuse_input.py::test_a_model_compiled_for_a_gpu": (),
    "passes/test_fusion.py::test_norm_and_quantize_are_one_kernel": 6,
    "passes/test_fusion.py::test_activation_and_quantize_are_one_kernel": 6,
    "passes/test_fusion.py::test_fp4_on_a_gpu": 3,
    "passes/test_fusion.py::test_kernels_of_groups_and_of_tensors": 2,
    "measure/test_recommend.py::test_every_goal_has_a_policy_that_the_target_serves": 2,
    "test_bad_input.py::test_an_empty_weight_is_kept_whatever_the_scheme": 24,
    "test_bad_input_4bit.py::test_any_size": 12,
    "test_bad_input_4bit.py::test_a_model_of_odd_sizes": 3,
    "test_bad_input_4bit.py::test_experts_of_any_size": 8,
    "ir/test_experts.py::test_the_replaced_graph_is_the_model": 5,
    "test_kv_cache.py::test_compiled_generate_is_the_eager_cache": 1,
    "test_latent.py::test_decode_absorbs_and_is_eager": (),
    "test_routers.py::test_routers_of_families": ("gemma4-name", "lfm2_moe-graph", "zaya-graph"),
    "checkpoints/test_adopted_modules.py::test_fp8_experts_run_on_their_own_codes": 1,
    "test_gguf_models.py::test_a_compiled_model_lives_on_its_blocks": (),
    "test_kv_cache.py::test_attention_reads_codes": 2,
    "test_moe.py::test_coverage_of_every_family": 5,
    "test_runtime.py::test_inputs_of_one_dimension": 8,
    "test_tiny_lm.py::test_whole_model_has_the_textbook_perplexity": (),
    "test_tiny_lm.py::test_layers_have_the_textbook_perplexity": 1,
    "test_tiny_lm.py::test_moe_has_the_textbook_perplexity": 1,
    "test_tiny_lm.py::test_whole_moe_is_close_to_bf16": (),
    "test_tiny_lm.py::test_what_the_demo_prints": 1,
    "test_family_sweep.py::test_three_families": (),
    "page/test_browser.py::test_nobody_is_kept_out": 2,
    "lowering/test_flat_gemv.py::test_numbers": (),
    "checkpoints/test_from_transformers.py::test_a_packed_folder_loads_by_its_name": (),
    "test_rounded.py::test_later_weights_make_good_what_earlier_ones_lost": 1,
    "test_benchmarks.py::test_kv_quality_smoke": (),
    "test_sentence_embeddings.py::test_w8a8_is_the_textbook_scheme": (),
    "checkpoints/test_packed.py::test_round_trip": 1,
    "checkpoints/test_save.py::test_round_trip": 1,
    "checkpoints/test_save.py::test_what_the_format_cannot_express": (),
    "checkpoints/test_save.py::test_gpt_oss": 1,
    "checkpoints/test_save.py::test_names_are_those_that_transformers_writes": (),
    "checkpoints/test_save.py::test_convert_that_keeps_every_weight_writes_16_bits": (),
    "test_offload.py::test_offloaded_weights": ("on_disk-compiled-by_torch",),
    "test_latent.py::test_a_cache_in_codes_is_absorbed_into": (),
    "checkpoints/test_gguf.py::test_architectures": ("llama",),
    "generation/test_encoder_decoder.py::test_tokens": ("more0-t5",),
    "checkpoints/test_gguf_save.py::test_load_save_load_has_the_same_bits": ("qwen3moe",),
    "checkpoints/test_gguf_save.py::test_values_beyond_f16_are_kept_as_they_are_loaded": (),
    "test_lora.py::test_other_tuners_are_right_or_named": ("ia3", "copies"),
    "test_lora.py::test_merging_is_noticed": 1,
    "generation/test_prompts.py::test_a_change_of_the_model_is_seen": 2,
    "generation/test_prompts.py::test_hooks_with_a_state_of_their_own": (),
    "generation/test_prompts.py::test_sliding_windows": (),
    "test_gguf_models.py::test_logits_are_those_of_dequantized_weights": 5,
    "test_attention.py::test_every_attention_of_a_decoder_is_found_and_the_same": (
        "llama3-True",
        "gemma2-True",
        "gpt_oss-True",
        "gpt2-True",
        "deepseek_v3-True",
        "llama3-eager-True",
        "gemma2-False",
    ),
    "test_attention.py::test_a_second_model_with_other_heads_is_matched": (),
    "test_recompiles.py::test_the_limit_is_raised_for_every_thread": 1,
    "test_moe_families.py::test_with_inductor": (),
    "test_moe_families.py::test_without_inductor": 1,
    "generation/test_loops.py::test_a_sliding_window_that_fills_up": (),
    "generation/test_loops.py::test_rows_and_padding": 2,
    "generation/test_loops.py::test_a_returned_window_is_the_users": (),
    "generation/test_pipelines.py::test_text_generation": 1,
    "generation/test_uncompile.py::test_nothing_is_left": 1,
    "checkpoints/test_gguf.py::test_experts_of_two_types_stay_in_their_blocks": 1,
    "checkpoints/test_gguf.py::test_files_in_16_bits_are_quantized_by_the_policy": (),
    "checkpoints/test_gguf.py::test_memory_is_the_file_and_one_tensor": (),
    "test_owners.py::test_each_model_has_its_own_names_rules_and_lines": 2,
    "test_never_in_silence.py::test_experts_of_every_layer_are_quantized_at_every_length": (),
    "test_prefill_attention.py::test_over_codes": 1,
    "test_prefill_attention.py::test_a_prompt_and_its_continuation": 1,
    "checkpoints/test_staging.py::test_a_model_is_the_same": 1,
    "checkpoints/test_fixtures.py::test_values_are_those_of_the_library": 3,
    "checkpoints/test_fixtures.py::test_whole_models": ("modelopt-fp8-mixtral", "llmcompressor-mxfp4a16-gpt-oss"),
    "test_families.py::test_logits_equal_the_eager_quantized_reference": ("llama3", "gemma3"),
    "checkpoints/test_requantize.py::test_planes_are_those_of_the_dequantized_weights": 3,
    "checkpoints/test_requantize.py::test_fp4_below_sm100": 2,
    "test_attention.py::test_encoders_and_their_decoders_are_found_or_named": 4,
    "generation/test_encoder_decoder.py::test_released": 1,
    "checkpoints/test_adopted_modules.py::test_a_model_runs_on_them_and_comes_back": 1,
    "generation/test_prompts.py::test_a_prompt_is_replayed_from_the_third_time_on": 1,
    "distributed/test_tensor_parallel.py::test_sums_of_codes": (),
    "distributed/test_tensor_parallel.py::test_sums_joined_with_what_follows": 1,
    "distributed/test_tensor_parallel.py::test_codes_are_those_of_the_whole_weight": ("nvfp4",),
    "test_kv_cache.py::test_calibrated": (),
    "checkpoints/test_cache_scales.py::test_llm_compressors_own": (),
    "test_sentence_embeddings.py::test_the_policy_for_bert_keeps_embeddings": (),
    "checkpoints/test_gguf_save.py::test_experts_of_two_types_have_the_same_bits": (),
    "test_latent.py::test_attention_keep_leaves_it_as_written": (),
    "test_latent.py::test_a_quantized_linear_is_made_of_its_planes_and_released": (),
    "test_generate.py::test_assistant_and_main_model_share_code_and_stay_apart": (),
    "test_cli.py::test_python_m_ends_as_the_command_does": (),
    "test_lora.py::test_adapters_are_kept_and_switched": 1,
    "distributed/test_tensor_parallel.py::test_each_rank_releases_its_parts": (),
    "distributed/test_load.py::test_integers_in_groups": (),
    "generation/test_loops.py::test_assisted_decoding_with_another_policy": (),
    "checkpoints/test_gguf_fuzz.py::test_heads": (),
    "test_guard.py::test_generate_with_a_prompt_in_16_bits_and_quantized_steps": (),
    "generation/test_prompts.py::test_states_of_all_layers_are_right": (),
    "test_moe_families.py::test_four_bits_without_inductor": 2,
    "test_attention.py::test_decode_through_the_backend": 1,
    "generation/test_loops.py::test_inductor_itself": (),
    "checkpoints/test_save.py::test_linears_that_store_columns": (),
    "checkpoints/test_gguf_save.py::test_a_file_becomes_a_folder_with_its_tokenizer": (),
    "distributed/test_tensor_parallel.py::test_released_parts_are_joined": (),
    "distributed/test_tensor_parallel.py::test_latent_attention_and_shared_experts": (),
    "distributed/test_tensor_parallel.py::test_sums_without_shared_memory_stay": (),
    "distributed/test_tensor_parallel.py::test_expert_parallel_with_biases": (),
    "checkpoints/test_gguf.py::test_gate_and_up_of_two_types_become_values_with_a_reason": (),
    "test_families.py::test_the_comparison_can_fail": (),
    "test_kv_cache.py::test_rules_name_layers": (),
    "test_kv_cache.py::test_encoder_decoders_keep_their_own_tokens_in_codes": (),
    "checkpoints/test_save.py::test_transformers_loads_the_same_weights": 8,
    "ir/test_account.py::test_attention_of_torch_is_quantized": 12,
    "test_transforms.py::test_linears_inside_stay_and_those_outside_are_quantized": 2,
    "lowering/test_expand.py::test_a_known_number_of_rows_launches_the_kernel": 4,
    "checkpoints/test_requantize.py::test_experts": 2,
    "checkpoints/test_load.py::test_eight_bit_inputs": 1,
    "generation/test_loops.py::test_beams": 2,
    "checkpoints/test_cache_scales.py::test_generate_uses_the_checkpoints_scales": (),
    "test_per_layer.py::test_40_layers_with_a_static_cache_are_all_quantized": (),
    "test_release.py::test_release_with_inductor_prefill_and_decode": (),
    "test_benchmarks.py::test_attention_prefill_smoke": (),
    "test_benchmarks.py::test_gemm_smoke": (),
    "test_moe_benchmarks.py::test_moe_smoke": (),
    "checkpoints/test_gguf_save.py::test_convert_quantizes_to_a_file": (),
    "test_families.py::test_every_linear_is_quantized": ("llama3", "gemma3"),
    "test_families.py::test_bytes_add_up": ("llama3", "gemma3"),
    "distributed/test_tensor_parallel.py::test_from_compile_to_uncompile": (),
    "test_lora.py::test_merging_into_released_weights_is_an_error": 1,
    "test_lora.py::test_adapters_around_a_model_that_ran_before": (),
    "checkpoints/test_load.py::test_weights_alone": 3,
    "generation/test_recording.py::test_modes_without_graphs_record_nothing": 1,
    "generation/test_recording.py::test_hidden_states_and_scores_of_all_steps": (),
    "generation/test_recording.py::test_another_stream_records_for_itself": (),
    "generation/test_recording.py::test_a_parameter_in_other_memory_is_seen": (),
    "generation/test_recording.py::test_padding_and_none_are_two_recordings": (),
    "ir/test_graph.py::test_inductor_computes_the_same_codes": 3,
    "lowering/test_attention_choice.py::test_inductors_code_launches_prefill_itself": 2,
    "test_guard.py::test_decode_is_quantized_and_the_prompt_stays_in_16_bits": 3,
    "lowering/test_kv_recorded.py::test_the_write_side": 2,
    "lowering/test_triton_latent.py::test_cubins": 4,
    "exporting/test_export.py::test_lengths_stay_free_with_kernels_of_a_gpu": 1,
    "checkpoints/test_from_transformers.py::test_every_format_of_compressed_tensors_is_adopted": 1,
    "checkpoints/test_from_transformers.py::test_a_packed_folder_of_reordered_inputs": (),
    "test_rounded.py::test_experts": 2,
    "passes/test_fuse_input.py::test_norms_of_models": 6,
    "test_calibrate.py::test_every_way_to_write_a_linear_is_measured": 7,
    "generation/test_recording.py::test_reduce_overhead_means_our_graphs_in_generate_and_inductors_outside": (),
    "test_generate.py::test_generate_with_inductor": (),
    "test_attention.py::test_keep_turns_it_off": 1,
}


def mark(items: Sequence[pytest.Item], whole: bool = False) -> None:
    """Mark the other cases slow; those that are slow by themselves do not count.

    Args:
        items: what was collected.
        whole: all tests were: every name must be one of theirs.

    Raises:
        pytest.UsageError: a name is no test's or no case's, or a number leaves nothing out.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0].removeprefix("tests/"), []).append(item)
    wrong = []
    for test, quick in QUICK.items():
        found = {_case(item): item for item in cases.get(test, []) if item.get_closest_marker("slow") is None}
        kept = _spread(list(found), quick) if isinstance(quick, int) else set(quick)
        if whole and (not found or not kept <= found.keys() or len(kept) == len(found)):
            wrong.append(f"tests/repeats.py: {test}: {quick} is not a part of its cases: {', '.join(found) or 'none'}")
        for case in found.keys() - kept:
            found[case].add_marker(pytest.mark.slow)
    if wrong:
        raise pytest.UsageError("\n".join(wrong))


def _case(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[2].removesuffix("]")


def _spread(cases: Sequence[str], count: int) -> set[str]:
    """From first to last: all if there are no more than ``count``."""
    if len(cases) <= count:
        return set(cases)
    return {cases[round(i * (len(cases) - 1) / max(1, count - 1))] for i in range(count)}
