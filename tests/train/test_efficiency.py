"""Figures of a step's efficiency."""

from __future__ import annotations

import pytest

from megatron_sov import recipes
from megatron_sov.config import apply_settings
from megatron_sov.models.count import train_flops_per_token
from megatron_sov.train.efficiency import Efficiency, peak_tflops


def test_figures_of_a_step() -> None:
    config = apply_settings(recipes.get("tiny-solar-open"), ["gpu.peak_tflops=2.0"])
    found = Efficiency(config, num_ranks=4).figures(num_tokens=8000, seq_len=128, seconds=0.5)
    tflops = 4000 * train_flops_per_token(config.model, 128) / 1e12
    assert found["tokens_per_s_per_process"] == 4000 and found["tflops_per_process"] == pytest.approx(tflops)
    assert found["mfu"] == pytest.approx(tflops / 2)
    assert 1e7 < found["peak_memory_bytes"] < 1e11 and "reserved_memory_bytes" not in found


def test_a_cpu_has_no_peak_unless_one_is_given() -> None:
    assert "mfu" not in Efficiency(recipes.get("tiny-solar-open"), 1).figures(8, 8, 1.0)


@pytest.mark.parametrize(("name", "bf16"), [
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4),
    ("NVIDIA H200 NVL", 835.5), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500), ("NVIDIA T4", None)])
def test_known_peaks(name: str, bf16: float | None) -> None:
    assert peak_tflops(name) == bf16
