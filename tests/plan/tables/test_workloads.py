"""Rows as workloads: what a row states holds, what it leaves out follows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sov.plan.memory_of_workload import account_of
from megatron_sov.plan.tables.measured import tokens_per_s_per_gpu
from megatron_sov.plan.tables.peak_memory import peak_bytes
from megatron_sov.plan.tables.shapes import MissingInput
from megatron_sov.plan.tables.workloads import workload_of

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
