"""What went wrong elsewhere with quantised experts, and the tests that show that it does not here."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moeyard
from moeyard import Routing
from moeyard.bench.cases import grouped_gemm
from moeyard.quant import MXFP4_FP8, NVFP4, scheme_of
from moeyard.testing import draw_quantised, judged_experts

TESTS = Path(__file__).parent

TRAPS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("rows of padding, and NaN in workspaces", (
        "test_quant_layers.py::test_trap_01_rows_that_are_not_routed_reach_no_other",
        "test_vllm_quantised.py::test_the_standard_format_under_a_map_reads_no_workspace")),
    2: ("rows of zeros, infinities or NaN", (
        "test_quant.py::test_trap_02_zeros_infinities_and_nan_stay_in_their_row_or_group",
        "test_quant_layers.py::test_trap_02_infinities_and_nan_stay_in_their_row")),
    3: ("gate and up with scales of their own, static scales", (
        "test_quant_layers.py::test_trap_03_gate_and_up_have_scales_of_their_own",
        "test_quant_layers.py::test_trap_03_static_scales_are_those_of_expert_and_product",
        "test_checkpoints_formats.py::test_scales_of_gate_and_up_are_both_kept",
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named")),
    4: ("NVFP4's global scales of gate and up", (
        "test_quant_layers.py::test_mutants_are_beyond_the_budget",
        "test_checkpoints_formats.py::test_global_scales_divide_or_multiply_and_are_two")),
    5: ("global scales that divide or multiply, or are missing", (
        "test_checkpoints_formats.py::test_global_scales_divide_or_multiply_and_are_two",
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named")),
    6: ("scale_inv multiplies; scales transposed or without an axis", (
        "test_checkpoints_formats.py::test_weight_scale_inv_multiplies",
        "test_checkpoints_formats.py::test_scales_of_rows_may_lack_their_last_axis",
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named")),
    7: ("e8m0 of 0 and 255, large ones; e4m3 scales that are negative, zero or NaN", (
        "test_quant.py::test_trap_07_scales_of_8_bits_may_be_any_byte",
        "test_quant_cpu.py::test_trap_07_scales_of_8_bits_may_be_any_byte",
        "test_checkpoints_formats.py::test_unusual_codes_are_kept_bit_by_bit",
        "test_four_bits_on_host.py::test_scales_at_their_ends",
        "interpreted_triton_four_bits.py::test_scales_at_their_ends")),
    8: ("e4m3 weights that are NaN, files of fnuz", (
        "test_quant.py::test_trap_08_every_byte_of_e4m3_means_what_the_format_says",
        "test_checkpoints_formats.py::test_unusual_codes_are_kept_bit_by_bit",
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named")),
    9: ("ties, saturation, division against a product with the reciprocal", (
        "test_quant.py::test_trap_09_ties_go_to_even_and_large_values_saturate",
        "test_quant.py::test_trap_09_a_division_is_no_product_with_the_reciprocal")),
    10: ("int8 weights of -128, long sums", (
        "test_quant_layers.py::test_trap_10_int8_weights_of_minus_128_and_long_sums",
        "test_checkpoints_errors.py::test_configurations_that_mean_something_else_are_refused",
        "test_checkpoints_formats.py::test_unusual_codes_are_kept_bit_by_bit")),
    11: ("slices that begin inside a block", (
        "test_quant.py::test_trap_11_slices_of_larger_matrices_touch_whole_blocks",
        "test_quant_layers.py::test_trap_11_and_12_slices_that_begin_inside_blocks_add_up",
        "test_checkpoints_formats.py::test_a_share_is_that_part_of_the_whole",
        "test_checkpoints_errors.py::test_fused_blocks_that_straddle_gate_and_up_are_refused")),
    12: ("slices along the columns of groups and words", (
        "test_quant_layers.py::test_trap_11_and_12_slices_that_begin_inside_blocks_add_up",
        "test_checkpoints_formats.py::test_a_share_is_that_part_of_the_whole")),
    13: ("sizes of gpt-oss", (
        "test_quant_layers.py::test_trap_13_sizes_of_gpt_oss",
        "test_checkpoints_formats.py::test_gpt_oss_in_mxfp4")),
    14: ("top_k of 6 and 10, 512 experts, nobody, everybody", (
        "test_quant_layers.py::test_trap_14_many_experts_and_odd_top_k",
        "test_quant_layers.py::test_every_implementation_is_within_its_budget")),
    15: ("orders of packed words", (
        "test_quant.py::test_trap_15_every_position_of_a_byte_is_its_own_column",
        "test_pack.py::test_one_code_at_every_place_of_a_word",
        "test_checkpoints_formats.py::test_one_hot_weights_at_every_position_of_a_word",
        "test_transformers_quantised.py::test_a_model_that_a_tool_made_has_the_logits_of_the_dequantised_one")),
    16: ("axes, orders and versions of zero points", (
        "test_quant.py::test_trap_16_zero_points_are_those_of_their_block",
        "test_checkpoints_formats.py::test_one_hot_zero_points",
        "test_checkpoints_formats.py::test_zero_points_of_version_1_wrap_around",
        "test_checkpoints_formats.py::test_symmetric_files_may_have_zero_points_of_either_version",
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named")),
    17: ("g_idx, trivial and real", (
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named",
        "test_checkpoints_errors.py::test_what_says_nothing_is_dropped",
        "test_checkpoints_errors.py::test_configurations_that_mean_something_else_are_refused",
        "test_checkpoints_errors.py::test_real_act_order_needs_its_g_idx")),
    18: ("scales of float16 beside a bfloat16 model", (
        "test_checkpoints_formats.py::test_scales_keep_their_dtype",
        "test_quant_cpu.py::test_scales_of_16_bits")),
    19: ("3, 5, 6 and 7 bits, which run across words", (
        "test_checkpoints_errors.py::test_configurations_that_mean_something_else_are_refused",)),
    20: ("ignored layers, overrides, schemes that differ", (
        "test_checkpoints_errors.py::test_schemes_that_differ_inside_a_layer_are_named",
        "test_checkpoints_errors.py::test_targets_and_ignored_layers")),
    21: ("scales of attention and outputs", (
        "test_checkpoints_errors.py::test_what_says_nothing_is_dropped",)),
    22: ("local, static and dynamic scales of activations", (
        "test_checkpoints_formats.py::test_activations_that_stay_as_they_are_are_told",
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named",
        "test_checkpoints_errors.py::test_what_says_nothing_is_dropped",
        "test_checkpoints_errors.py::test_configurations_that_mean_something_else_are_refused")),
    23: ("transforms and sparsity", (
        "test_checkpoints_errors.py::test_configurations_that_mean_something_else_are_refused",)),
    24: ("gate and up fused, apart, in turn, swapped, transposed", (
        "test_quant_layers.py::test_mutants_are_beyond_the_budget",
        "test_quant_layers.py::test_trap_24_the_budget_is_not_that_of_a_fixed_share",
        "test_checkpoints_formats.py::test_orders_of_gate_and_up",
        "test_checkpoints_formats.py::test_gpt_oss_in_mxfp4",
        "test_checkpoints_formats.py::test_gpt_oss_in_bfloat16_is_transposed",
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named")),
    25: ("the router's weight once, before rows are quantised", (
        "test_quant_layers.py::test_trap_25_the_router_weight_is_in_the_scale",
        "test_quant_layers.py::test_mutants_are_beyond_the_budget",
        "test_vllm_quantised.py::test_the_routers_weight_counts_once")),
    26: ("biases after scales, once", (
        "test_quant_layers.py::test_trap_26_biases_are_not_scaled_and_count_once",
        "test_checkpoints_formats.py::test_gpt_oss_in_mxfp4")),
    27: ("rows that are quantised twice", (
        "test_quant_layers.py::test_trap_27_repeated_rows_are_quantised_alike",
        "test_quant_layers.py::test_mutants_are_beyond_the_budget",
        "test_vllm_quantised.py::test_rows_that_are_codes_already_are_not_rounded_again")),
    28: ("what the activation leaves, rounded or not", (
        "test_quant_layers.py::test_trap_28_what_the_activation_leaves_may_be_rounded_or_not",)),
    29: ("long sums of positive values", (
        "test_quant_layers.py::test_trap_29_long_sums_of_positive_values",)),
    30: ("DeepGEMM's alignment of an expert's rows", (
        "test_bench_experts.py::test_padded_rows_find_their_way_back",
        "test_quant_traps.py::test_trap_30_an_alignment_that_does_not_fit_is_refused_before_a_product")),
    31: ("graphs and streams: nothing waits, nothing is shared", (
        "test_quant_layers.py::test_trap_31_nothing_waits_for_a_device",
        "gpu/test_experts_coded_gpu.py::test_every_kind_of_call",
        "gpu/test_few_tokens_8bit_gpu.py::test_layers_that_overlap_in_a_graph",
        "gpu/test_four_bits_gpu.py::test_the_same_bits_over_100_runs_and_in_graphs")),
    32: ("times that are remembered without a release", (
        "test_quant_traps.py::test_trap_32_times_of_others_name_the_release_that_was_timed",
        "test_bench_results.py::test_committed_results_are_right_and_name_their_commit")),
    33: ("scales folded into codes, whose range is narrow", (
        "test_quant_traps.py::test_trap_33_scales_of_4_bits_beside_rows_of_8_keep_their_whole_range",)),
    34: ("loads that are interrupted, files and tensors that are missing, twice there, or of another dtype", (
        "test_checkpoints_files.py::test_an_index_that_is_wrong_is_named",
        "test_checkpoints_files.py::test_a_tensor_in_two_shards_is_named",
        "test_checkpoints_files.py::test_files_that_are_broken_are_named",
        "test_checkpoints_files.py::test_an_interrupt_leaves_no_open_file",
        "test_checkpoints_errors.py::test_tensors_that_do_not_fit_are_named")),
}  # fmt: skip
"""By number: what went wrong, and the tests that show it."""

_NAMED = re.compile(r"_trap((?:_\d\d(?:_and)?)+)_")
_TOLD = re.compile(r"\b[Tt]raps? (\d+(?:, \d+)*)")


def found_in(file: Path) -> dict[str, set[int]]:
    """The tests of a file, and the traps that their names and docstrings name."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            named = _NAMED.search(node.name)
            numbers = {int(number) for number in re.findall(r"\d\d", named[1])} if named else set()
            for listed in _TOLD.findall(ast.get_docstring(node) or ""):
                numbers |= {int(number) for number in listed.split(", ")}
            found[node.name] = numbers
    return found


def test_every_trap_has_tests_that_exist() -> None:
    """And every test that names a trap is in the table."""
    assert list(TRAPS) == list(range(1, 35))
    there = {file.relative_to(TESTS).as_posix(): found_in(file) for file in TESTS.rglob("*.py")}
    for number, (_, tests) in TRAPS.items():
        assert tests, number
        for one in tests:
            file, name = one.split("::")
            assert name in there[file], f"trap {number}: {one} is no test"
    told = {
        (number, f"{file}::{name}") for file, found in there.items() for name, all_ in found.items() for number in all_
    }
    assert {one for one in told if one[1] not in TRAPS[one[0]][1]} == set()


@pytest.mark.parametrize("words", [str(MXFP4_FP8), f"{NVFP4}, e4m3 per row"])
def test_trap_33_scales_of_4_bits_beside_rows_of_8_keep_their_whole_range(words: str) -> None:
    """Groups side by side may differ by any power of two: nothing is flushed, rounded or counted out."""
    weights = draw_quantised(1, 128, 64, scheme_of(words), torch.float32)
    assert weights.scales is not None
    bytes_ = (1, 60, 127, 170) if "e8m0" in words else (1, 0x38, 0x7E, 0x08)
    for scales in (weights.scales.w13, weights.scales.w2):
        stored = scales.view(torch.uint8)
        for row in range(stored.shape[1]):
            stored[0, row] = bytes_[row % 4]  # a row's scale is seen alone, whatever its groups beside have
            stored[0, row, -1] = bytes_[(row + 1) % 4]
    hidden = torch.randn(3, 128) * 2.0**-30
    hidden[:, : 128 // 2] *= 2.0**20
    routing = Routing(torch.ones(3, 1), torch.zeros(3, 1).int())
    judged = judged_experts(hidden, routing, weights)
    assert bool(judged.wide.isfinite().all())
    for impl in ("cpu", "torch"):
        assert judged.error(moeyard.fused_experts(hidden, routing, weights, impl=impl)) is None, impl


def test_trap_30_an_alignment_that_does_not_fit_is_refused_before_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepGEMM's alignment is asked for when rows are padded, and may have been set by another caller."""
    package, utils, layout = (ModuleType(f"deep_gemm{name}") for name in ("", ".utils", ".utils.layout"))

    def multiply(*_: object) -> None:
        raise AssertionError("rows of the wrong experts would be multiplied")

    vars(package)["m_grouped_bf16_gemm_nt_contiguous"] = multiply
    vars(layout)["get_mk_alignment_for_contiguous_layout"] = lambda: 224
    for module in (package, utils, layout):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    run = grouped_gemm._deep_gemm()
    with pytest.raises(ValueError, match="expected an alignment that divides 128, got 224"):
        run(None)  # type: ignore[arg-type]


def test_trap_32_times_of_others_name_the_release_that_was_timed() -> None:
    files = list((TESTS.parent / "benchmarks" / "results").rglob("*.json"))
    seen = 0
    for file in files:
        content = json.loads(file.read_text())
        for row in content["rows"]:
            package = row["provider"].split()[0]
            if package == "moeyard":
                continue
            seen += 1
            assert re.search(r"\d+\.\d+", content["peers"].get(package) or row["impl"]), (file, row["provider"])
    assert seen
