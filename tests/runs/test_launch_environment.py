"""The number of processes of a run."""

from pathlib import Path

import psutil
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.runs.gpu_driver import find_gpu_fault, list_visible_gpus
from megatron_sov.runs.launch_environment import (
    has_launcher, num_ranks, process_started_s, refuse_lone_world_size)


def test_launcher_environment_overrides_nproc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # alone it says nothing: some clusters export it everywhere
    assert (num_ranks(None), num_ranks(3), has_launcher()) == (1, 3, False)
    refuse_lone_world_size(3)
    with pytest.raises(UserError, match="WORLD_SIZE=8: is set without RANK"):
        refuse_lone_world_size(None)
    monkeypatch.setenv("RANK", "5")
    assert (num_ranks(None), num_ranks(3), has_launcher()) == (8, 8, True)
    with pytest.raises(UserError, match="--nproc 0: must be"):
        num_ranks(0)
    with pytest.raises(UserError, match=r"--nproc 9{39}:"):
        num_ranks(10 ** 39 - 1)


def test_process_start_equals_that_of_psutil() -> None:
    assert process_started_s() == pytest.approx(psutil.Process().create_time(), abs=2)


# What the driver says of this machine's GPUs, by a program that stands for `nvidia-smi`.


NVIDIA_SMI = """#!/bin/sh
case "$1" in
  *memory.used) echo "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 4"
                echo "1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, 70000" ;;
  *ecc*) echo "GPU-aa, 0"; echo "GPU-bb, 3" ;;
  *hw_slowdown) echo "GPU-aa, Not Active"; echo "GPU-bb, Active" ;;
  *) echo 'Field is not a valid field to query.'; exit 2 ;;
esac
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs, the second one in use and ill."""
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_visible_gpus_follow_cuda_visible_devices(two_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(g.index, g.uuid, g.memory_bytes >> 20, g.used_bytes >> 20) for g in list_visible_gpus()] == [
        (0, "GPU-aa", 81559, 4), (1, "GPU-bb", 81559, 70000)]
    for visible, uuids in (("1", ["GPU-bb"]), ("1,0", ["GPU-bb", "GPU-aa"]), ("GPU-a", ["GPU-aa"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [g.uuid for g in list_visible_gpus()] == uuids


def test_gpu_fault_is_reported(two_gpus: Path) -> None:
    """A field unknown to the driver is ignored."""
    assert find_gpu_fault("GPU-aa") == ""
    assert find_gpu_fault("GPU-bb") == "3 uncorrected memory errors (ECC)"


def test_missing_nvidia_smi_gives_no_gpus(two_gpus: Path) -> None:
    (two_gpus / "nvidia-smi").unlink()
    assert list_visible_gpus() == [] and find_gpu_fault("GPU-aa") == ""
