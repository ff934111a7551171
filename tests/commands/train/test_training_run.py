"""Training commands check the memory of the machine before the stage starts."""

from types import SimpleNamespace

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.footprint import gpu_capacity
from megatron_sov.plan.footprint.gpu_capacity import (
    USABLE_SHARE, estimate_memory, find_fullest_stage, refuse_on_this_machine)
from megatron_sov.runs.gpu_driver import VisibleGpu


@pytest.fixture
def config() -> RunConfig:
    return apply_settings(recipes.get("tiny-solar-open"), ["train.steps=4"])


def test_runs_that_visible_gpus_cannot_hold_are_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch
                                                        ) -> None:
    lacks_zero1 = int(find_fullest_stage(config, 2)[1].total / USABLE_SHARE) - 1
    gpus = [VisibleGpu(index, f"GPU-{index}", "NVIDIA Tiny", size, 0)
            for index, size in enumerate((40 << 30, lacks_zero1))]
    monkeypatch.setattr(gpu_capacity, "list_visible_gpus", lambda: gpus)
    with pytest.raises(UserError, match=r"fits: --set parallel\.zero1=true$"):
        refuse_on_this_machine(config, 2)
    refuse_on_this_machine(config, 1)  # on the large GPU alone


def test_the_first_rank_of_each_machine_refuses_a_gpu_without_room(
        config: RunConfig, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_on_this_machine(config, None)
    offloaded = apply_settings(config, ["gpu.optimizer_offload=1", "parallel.zero1=true"])
    with monkeypatch.context() as patched, pytest.raises(UserError, match="that it has available"):
        patched.setattr(gpu_capacity.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
        refuse_on_this_machine(offloaded, None)
    gpu = VisibleGpu(0, "GPU-0", "NVIDIA Tiny", 20 << 20, 0)
    monkeypatch.setattr(gpu_capacity, "list_visible_gpus", lambda: [gpu])
    with pytest.raises(UserError, match="of a NVIDIA Tiny with"):
        refuse_on_this_machine(config, None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    refuse_on_this_machine(config, None)  # LOCAL_RANK 0 checks
    assert estimate_memory(config, 1).fullest == find_fullest_stage(config, 1)[1].total > 0
