"""Tables that are read, and those that are refused with one sentence."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.plan.footprint.memory import account_of, peak_bytes
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.tables import cells
from megatron_sov.plan.tables.cells import PREDICTED, MissingInput, count, number, read_table
from megatron_sov.plan.tables.predicted import (
    find, folded, predict, predict_file, published, shape_of, tokens_per_s_per_gpu, workload_of)


def table(tmp_path: Path, text: str) -> Path:
    """Return a file with this text."""
    file = tmp_path / "rows.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_columns_in_any_order_some_missing(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, '\ufeffgpu, model ,tp,params_b\nH100,"a, b",,"1,000.5"\n\nA100,c\n'))
    assert found.columns == ["gpu", "model", "tp", "params_b"]
    assert [row["model"] for row in found.rows] == ["a, b", "c"]
    assert (count(found.rows[0], "tp"), count(found.rows[0], "pp")) == (0, 0)
    assert number(found.rows[0], "params_b") == 1000.5 and number(found.rows[1], "params_b") == 0


@pytest.mark.parametrize(("text", "said"), [
    ("gpu,micro_bach\nH100,1\n", r"unknown column 'micro_bach'; did you mean 'micro_batch'\?"),
    ("foo,bar\n1,2\n", "unknown columns 'foo', 'bar'"),
    ("tp,tp\n1,2\n", "has column 'tp' twice"),
    ("gpu,tp\nH100,two\n", "row 2, column tp: 'two' is not a whole number"),
    ("gpu,tp\nH100,1\nH100,1.5\n", "row 3, column tp: '1.5' is not a whole number"),
    ("gpu,layers\nH100,20000\n", "'20000' is not a whole number up to 10,000"),
    ("gpu,mfu\nH100,-3\n", "row 2, column mfu: '-3' is not a number"),
    ("gpu,mfu\nH100,inf\n", "row 2, column mfu: 'inf' is not a number"),
    ("gpu,tp\nH100,1,2\n", "row 2 has 3 cells and the table 2 columns"),
    ("gpu,mfu\nH100,1e-320\n", "row 2, column mfu: '1e-320' is not a number from 0 to"),
    (f"gpu,note\nH100,{'x' * 5000}\n", "row 2, column note: has 5,000 characters and may have 4,096"),
    ("", "is empty"), ("gpu,tp\n", "has no row"), ('gpu\n"H100\n', "is no CSV"),
])
def test_a_bad_table_is_refused_where_it_is_bad(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_table(table(tmp_path, text))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    binary = tmp_path / "rows.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        read_table(binary)


# What people write for chips, precisions and the rest.


NOTE = "parentheses note refers to fp8 quantization granularity"
SELECTIVE = "selective"


@pytest.mark.parametrize(("read", "meanings"), [
    (lambda text: cells.chip_of(text).key, {
        "H100": "h100", "h100-80gb": "h100", "H100-96GB(HBM2e500W)": "h100-96", "DGX-GB300": "gb300",
        'A100 (paper: "NVIDIA Ampere")': "a100", "8x H100 SXM5": "h100", "NVIDIA B200 180GB": "b200",
        "GB200 NVL72": "gb200", "AMD Instinct MI300X": "mi300x", "A100-40GB": "a100-40", "H800": "h800",
        "": "gpu is empty", "TPU v5p": "is not in the table", "H1000": "is not in the table"}),
    (lambda text: cells.precision_of(text, "", has_fp8=True), {
        "bf16": "bf16", "amp_bf16": "bf16", "FP16": "bf16", "": "bf16", "FP8": "fp8", "FP8-CS": "fp8",
        "float8 tensorwise": "fp8", "BF16/FP8": "fp8", "FP8-MX": "mxfp8", "fp8_mx": "mxfp8",
        "MXFP8": "mxfp8", "NVFP4": "nvfp4", "fp8 blockwise": "fp8_blockwise",
        "int4": "precision 'int4' is not known"}),
    (lambda note: cells.precision_of("", note, has_fp8=True), {NOTE: "fp8"}),
    (lambda note: cells.precision_of("", note, has_fp8=False), {NOTE: "bf16"}),
    (cells.recompute_of, {
        "": ("none", ()), "none": ("none", ()), "full": ("full", ()), SELECTIVE: (SELECTIVE, ("core_attn",)),
        "selective op": (SELECTIVE, ("op",)), "selective:moe+layernorm": (SELECTIVE, ("moe", "layernorm")),
        "sometimes": "not known", "selective:everything": "not known"}),
    (lambda text: cells.sharding_of(text, data_parallel=True), {
        "fsdp": "fsdp", "hsdp(megatron-fsdp)": "fsdp", "fsdp(DeepSpeed ZeRO-3)": "fsdp", "zero1": "zero1",
        "fsdp(DeepSpeed ZeRO-2)": "zero1", "ddp": "none", "": "zero1"}),
    (cells.cuda_graphs_of, {
        "cuda_graph=full_iteration;x": "full", "cuda_graph=transformer_engine['attn']": "partial",
        "cuda_graph=nonefull_iteration": "none", "no cuda graph flag": "none", "": "none"}),
    (lambda notes: cells.stated(notes, "ga"), {"lbs=2;ga=16;fsdp=8": 16, "mega=3": 0}),
    (cells.network_bytes_per_s, {"torch.compile;network=400gbps": 400e9 / 64, "fast": 0})])
def test_words_mean_what_their_authors_meant(read: Callable[[str], object],
                                             meanings: dict[str, object]) -> None:
    for text, meant in meanings.items():
        try:
            assert read(text) == meant, text
        except MissingInput as refusal:
            assert isinstance(meant, str) and meant in str(refusal), text


# Published models by the names that tables give them.


@pytest.mark.parametrize(("name", "known"), [
    ("LLAMA3.1_405B", "llama3-405b"), ("Llama3 70B 2-node LoRA", "llama3-70b"),
    ("DeepSeekV3 (tokendrop)", "deepseek-v3"), ("DeepSeek-V3 proxy 14L/64E (CI)", "deepseek-v3-proxy"),
    ("Qwen3_30B_a3B", "qwen3-30b-a3b"), ("nemotron_3_nano_4b", "nemotron-3-nano-4b"),
    ("Nemotron_3_5_Lightning", "nemotron-3.5-lightning"),
    ("GPT3-175B", "gpt3-175b"), ("Qwen2.5 32B LoRA", "qwen2.5-32b"), ("MPT-1b", "mpt-1b")])
def test_models_are_found_under_many_spellings(name: str, known: str) -> None:
    found = find(name)
    assert found is not None and known in found.names


def test_no_name_of_a_model_means_two() -> None:
    names = [folded(name) for model in published() for name in model.names]
    assert len(set(names)) == len(names) and find("Frontier 9000") is None


# Sizes of a row's model: stated, published, or what fits its parameters.


def test_cells_beat_what_is_published() -> None:
    shape = shape_of({"model": "Llama 3 8B", "layers": "16", "vocab": "32000"})[0]
    assert (shape.num_layers, shape.vocab_size, shape.hidden_size) == (16, 32000, 4096)
    assert shape_of({"model": "DeepSeekV3 (w/o MTP)"})[0].num_mtp_layers == 0


def test_a_width_of_heads_follows_from_the_parameters() -> None:
    """Qwen3 30B-A3B under another name: 32 heads of 128, not of 2,048 / 32."""
    shape = shape_of({"model": "mystery", "layers": "48", "hidden": "2048", "heads": "32", "kv_heads": "4",
                      "vocab": "151936", "experts": "128", "topk": "8", "moe_ffn": "768",
                      "params_b": "30.5", "active_params_b": "3.3"})[0]
    assert shape.head_dim == 128 and shape.gated


def test_a_size_alone_gives_a_usual_shape() -> None:
    shape = shape_of({"model": "mystery", "params_b": "13"})[0]
    assert shape.params() / 1e9 == pytest.approx(13, rel=0.06)


# Rows as workloads: what a row states holds, what it leaves out follows.


LLAMA = {"model": "LLAMA3.1_405B", "gpu": "H100", "num_gpus": "1024", "seq_len": "8192", "micro_batch": "1",
         "global_batch": "1536", "tp": "8", "pp": "8", "vpp": "8", "cp": "2", "precision": "FP8",
         "dp_sharding": "zero1", "source": "megatron-bridge-perf-summary"}


def test_a_full_row_is_taken_as_it_stands() -> None:
    w = workload_of(LLAMA)
    assert (w.num_gpus, w.tp, w.pp, w.vpp, w.cp, w.dp) == (1024, 8, 8, 8, 2, 8)
    assert (w.num_micro_batches, w.precision, w.sharding, w.chip.key) == (192, "fp8", "zero1", "h100")
    assert w.sp and w.overlap_tp and w.tuned and w.shape.num_layers == 126


@pytest.mark.parametrize(("row", "said"), [
    ({"model": "mystery"}, "layers and hidden are empty"),
    ({"model": "mystery", "params_b": "100", "active_params_b": "10"}, "layers and hidden are empty"),
    ({"model": "Llama 3 8B", "gpu": ""}, "gpu is empty"),
    ({"model": "Llama 3 8B", "gpu": "H100", "tp": "8", "pp": "4", "num_gpus": "8"}, "is more than num_gpus"),
    ({"model": "Qwen3 30B", "gpu": "H100", "ep": "7"}, "ep = 7 does not divide experts = 128"),
    ({"model": "Llama 3 8B", "gpu": "H100", "tp": "64", "num_gpus": "64"}, "tp = 64 is more than heads = 32"),
    ({"model": "Llama 3 8B", "gpu": "H100", "pp": "8", "vpp": "9"}, "pp 8 x vpp 9 is more than layers = 32"),
    ({"model": "Llama 3 8B", "gpu": "H100", "kv_heads": "5"}, "kv_heads = 5 does not divide heads = 32"),
    ({"model": "Llama 3 8B", "gpu": "H100", "note": "multimodal run"}, "a multimodal run"),
    ({"model": "Llama 3 8B", "gpu": "H100", "tp": "2", "num_gpus": "63"}, "2 does not divide num_gpus = 63"),
    ({"model": "Qwen3 30B", "gpu": "H100", "etp": "64", "num_gpus": "8"}, "= 64 is more than num_gpus = 8"),
    ({"model": "Llama 3 8B", "gpu": "H100", "tp": "2", "pp": "1", "cp": "1", "num_gpus": "64",
      "micro_batch": "2", "global_batch": "32"}, "is fewer than micro_batch 2 x 32 data-parallel replicas")])
def test_what_is_missing_is_said(row: dict[str, str], said: str) -> None:
    with pytest.raises(MissingInput, match=said):
        workload_of(row)


def test_empty_cells_follow_from_the_others() -> None:
    w = workload_of({"model": "Llama 3 8B", "gpu": "H100", "num_gpus": "64", "global_batch": "128"})
    assert (w.tp, w.pp, w.seq_len, w.micro_batch_size, w.sharding) == (1, 1, 8192, 1, "zero1")
    accumulated = workload_of({"model": "Llama 3 8B", "gpu": "H100", "num_gpus": "8", "other": "GA=16"})
    assert accumulated.num_micro_batches == 16
    parallel = workload_of({"model": "GPT 7.5B", "layers": "36", "hidden": "4096", "gpu": "A100",
                            "num_gpus": "128", "other": "model_parallel_size(TP*PP)=16"})
    assert (parallel.tp, parallel.pp) == (8, 2)
    unknown = workload_of({"model": "Mixtral-8x7B", "gpu": "H100"})
    assert unknown.num_gpus == 8 and unknown.ep == 8


def test_words_of_a_row_count() -> None:
    row = {**LLAMA, "model": "Qwen3_30B_a3B", "ep": "8", "tp": "1", "cp": "1", "pp": "1", "vpp": ""}
    w = workload_of({**row, "other": "cuda_graph=full_iteration;dispatcher=hybridep;moe_a2a_overlap;"
                                     "optimizer=muon"})
    assert (w.cuda_graphs, w.dispatcher, w.overlap_ep, w.optimizer) == ("full", "hybridep", True, "muon")
    functional = workload_of({**row, "router": "real", "note": "functional support run, not tuned"})
    assert not functional.tuned and functional.imbalance > 1
    assert not workload_of({**row, "model": "Qwen3_30B_a3B (tokendrop)"}).dropless
    assert workload_of({**row, "source_ref": "docs.md (NeMo 25.08)"}).software_age_years == pytest.approx(1)
    eager = workload_of({"model": "MPT-7b", "gpu": "A100", "num_gpus": "8", "dp_sharding": "fsdp"})
    assert not eager.fused_kernels and eager.attention_kernel == "portable"


def test_activations_that_do_not_fit_are_recomputed() -> None:
    row = {"model": "Llama 3 70B", "gpu": "H100", "num_gpus": "64", "micro_batch": "2", "dp_sharding": "fsdp"}
    assert workload_of(row).recompute == "full"
    assert workload_of({**row, "recompute": "none"}).recompute == "none"
    assert workload_of({**row, "model": "Llama 3.2 1B"}).recompute == "none"


@pytest.mark.parametrize("note", ["dp=" + "1" * 4090, "local_batch=" + "9" * 400, "ga=" + "9" * 400,
                                  "model_parallel_size(tp*pp)=" + "8" * 400, "network=" + "9" * 400 + "gbps"])
def test_numbers_without_end_in_words_are_none(note: str) -> None:
    row = {"model": "Llama 3 8B", "gpu": "H100", "num_gpus": "64"}
    assert workload_of({**row, "note": note}) == workload_of({**row, "note": "nothing"})


# The throughput of a row, from whatever it states.


@pytest.mark.parametrize(("cells", "expected"), [
    ({"tokens_per_s_per_gpu": "326"}, 326.0), ({"step_time_s": "37.7"}, 1536 * 8192 / 1024 / 37.7),
    ({"tflops_per_gpu_model": "822"}, 822e12 / 2.524e12), ({"mfu": "50"}, 0.5 * 989.4e12 / 2.524e12),
    ({"mfu": "0.5"}, 0.5 * 989.4e12 / 2.524e12), ({"other": "aggregate_tokens_per_s=300k"}, 300e3 / 1024),
    ({"other": "2M H100 GPU-hours for 3T tokens"}, 3e12 / (2e6 * 3600)), ({}, 0.0),
    ({"tokens_per_s_per_gpu": "163", "step_time_s": "37.7", "note": "CARD INCONSISTENT"},
     1536 * 8192 / 1024 / 37.7)])
def test_throughput_is_taken_from_what_a_row_states(cells: dict[str, str], expected: float) -> None:
    row = {**LLAMA, **cells}
    assert tokens_per_s_per_gpu(row, workload_of(row)) == pytest.approx(expected, rel=1e-3)


# Memory of rows: the account of a workload, and nothing where it has none.


ROW = {"model": "Llama 3.1 8B", "gpu": "H200", "num_gpus": "8", "seq_len": "8192", "micro_batch": "1"}


def test_a_row_has_the_account_of_its_workload() -> None:
    w = workload_of(ROW)
    assert peak_bytes(w) == account_of(w).total


def test_a_ci_run_of_megatron_is_weighed_as_it_was_measured() -> None:
    """Megatron-LM's golden values of a 15 B model on tensor parallel 8: 28.2 GB (benchmarks/data)."""
    w = workload_of({"model": "Nemotron-like GPT 15B (CI)", "layers": "32", "hidden": "6144", "heads": "48",
                     "kv_heads": "8", "gpu": "H100", "seq_len": "4096", "micro_batch": "4",
                     "global_batch": "384", "tp": "8", "dp_sharding": "zero1", "source": "megatron-lm-ci"})
    assert peak_bytes(w) / 1e9 == pytest.approx(28.2, rel=0.15)


def test_sizes_that_nothing_can_cut_are_not_weighed() -> None:
    w = workload_of(ROW)
    assert peak_bytes(replace(w, tp=10**6, num_gpus=10**7)) == 0


# Predictions of whole tables: the calibration's own rows, and files that cannot be.


ROWS = Path(__file__).parents[2] / "benchmarks" / "data" / "throughput.csv"


def test_the_published_runs_are_predicted_as_well_as_the_package_says() -> None:
    stored = json.loads(resources.files("megatron_sov.plan.speed").joinpath("parameters.json").read_text())
    sizes = []
    for row in read_table(ROWS).rows:
        try:
            w = workload_of(row)
        except (MissingInput, UserError):
            continue
        if stated := tokens_per_s_per_gpu(row, w):
            sizes.append(abs(step_time(w).tokens_per_s_per_gpu / stated - 1))
    assert statistics.median(sizes) == pytest.approx(stored["provenance"]["median_error"]["fitted"], abs=2e-3)
    assert len(sizes) == stored["provenance"]["rows"] > 370


def test_a_file_keeps_its_columns_and_gets_four_more(tmp_path: Path) -> None:
    lines = ROWS.read_text(encoding="utf-8").splitlines(keepends=True)
    some, out = tmp_path / "some.csv", tmp_path / "predicted.csv"
    some.write_text("".join([lines[0], *lines[1:400:40], lines[-12]]), encoding="utf-8")
    summary = predict_file(some, out)
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    before = read_table(some)
    assert list(rows[0]) == [*before.columns, *PREDICTED] and summary.num_rows == len(rows) == 11
    for row, original in zip(rows, before.rows, strict=True):
        assert {name: row[name] for name in before.columns} == original
        assert bool(row["pred_tokens_per_s_per_gpu"]) != bool(row["pred_reason"])
        if not row["pred_reason"]:
            assert float(row["pred_tflops_per_gpu"]) > 0 and float(row["pred_peak_mem_gb"]) > 1
    assert [row["pred_reason"] for row in rows if row["pred_reason"]] == ["gpu is empty"]


def test_a_prediction_does_not_see_the_measurement() -> None:
    row = next(row for row in read_table(ROWS).rows if row["tokens_per_s_per_gpu"])
    hidden = {**row, "tokens_per_s_per_gpu": "", "tflops_per_gpu_model": "", "mfu": "", "step_time_s": ""}
    assert predict(row).tokens_per_s_per_gpu == predict(hidden).tokens_per_s_per_gpu


def test_a_table_of_predictions_may_be_predicted_again(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    (tmp_path / "rows.csv").write_text("model,gpu,num_gpus\nLlama 3 8B,H100,64\nLlama 3 8B,,64\n")
    summary = predict_file(tmp_path / "rows.csv", first)
    assert summary.as_text() == "1 of 2 rows predicted; none of them states a throughput"
    predict_file(first, second)
    assert first.read_bytes() == second.read_bytes()
    rows = list(csv.DictReader(first.open()))
    assert rows[1]["pred_reason"] == "gpu is empty" and not rows[1]["pred_tokens_per_s_per_gpu"]


def test_a_chip_without_the_precision_gets_a_reason() -> None:
    found = predict({"model": "Llama 3 8B", "gpu": "A100", "num_gpus": "8", "precision": "FP8"})
    assert found.reason.startswith("fp8 on A100-80GB: its tensor cores have none")


def test_nothing_is_written_where_the_table_is_bad(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    (tmp_path / "rows.csv").write_text("model,gpus\nx,1\n")
    with pytest.raises(UserError, match="unknown column 'gpus'; did you mean 'gpu'"):
        predict_file(tmp_path / "rows.csv", out)
    assert not out.exists()
    with pytest.raises(UserError, match="--output"):
        predict_file(ROWS, tmp_path)


def test_a_table_is_not_written_over_by_its_predictions(tmp_path: Path) -> None:
    rows, link = tmp_path / "rows.csv", tmp_path / "link.csv"
    rows.write_text("model,gpu\nLlama 3 8B,H100\n")
    link.symlink_to(rows)
    for out in (rows, link):
        with pytest.raises(UserError, match="which is read; choose another path"):
            predict_file(rows, out)
    assert rows.read_text() == "model,gpu\nLlama 3 8B,H100\n"
