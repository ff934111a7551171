"""Determinism settings, random generators of a step, and the GPU, environment and CPU cores of a rank.

tests/layouts/test_precision.py shows that whole runs repeat to the bit.
"""

import datetime
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import load
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.parallel import gpu_setup, rng, world
from megatron_sov.engine.parallel.gpu_setup import DETERMINISM_VARIABLES, enable_determinism
from megatron_sov.model.config import ParallelConfig, apply_settings
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.loop import train_step
from megatron_sov.train.trainer import Trainer
from megatron_sov.work.clusters.units import GIB
from tests.tiny import tiny_trainer


@pytest.fixture(autouse=True)
def _restore_determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in DETERMINISM_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    for name in DETERMINISM_VARIABLES:
        os.environ.pop(name, None)


def test_settings_reach_every_library() -> None:
    enable_determinism()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory, "empty memory is filled, each time"
    assert [os.environ[name] for name in DETERMINISM_VARIABLES] == [":4096:8", "Ring", "0"]


def test_a_fitting_environment_stays_and_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    enable_determinism()
    assert os.environ["NCCL_ALGO"] == "Tree"
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    with pytest.raises(UserError, match="environment has NCCL_ALGO=NVLS"):
        enable_determinism()


def test_started_cuda_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA has started before"):
        enable_determinism()


# The generators of a step are seeded from the run's seed and the step: checkpoints need not store their
# states, and a resumed run equals an uninterrupted one.

STEPS, STEPS_BEFORE_RESUME = 2, 1


def train_with_resume(data: str, run: str, dropout: float, recompute: bool = False) -> dict[str, Any]:
    """Train without interruption, then again with a checkpoint and a second trainer that resumes from it.

    Returns:
        "steps": loss and gradient norm of each uninterrupted step; "same": whether the resumed run has the
        same; "differing": keys of parameters and optimizer states that differ at the end.
    """
    place = world.join_world(ParallelConfig())

    def build_trainer() -> Trainer:
        trainer: Trainer = tiny_trainer(
            data, "model.num_layers=2", "model.head_dim=8", "model.expert_ffn_dim=16",
            "train.global_batch_size=4", "train.micro_batch_size=2", f"train.steps={STEPS}",
            f"train.hidden_dropout={dropout}", f"train.recompute={str(recompute).lower()}", run=run,
            place=place)
        return trainer

    def train(trainer: Trainer, num_steps: int) -> list[tuple[float, float]]:
        results = [train_step(trainer) for _ in range(num_steps)]
        return [(result.loss, result.grad_norm) for result in results]

    def get_state(trainer: Trainer) -> dict[str, torch.Tensor]:
        shards = [*list_local_shards(trainer.model), *trainer.optimizer.state_shards()]
        return {shard.key: shard.data for shard in shards}

    uninterrupted = build_trainer()
    expected = train(uninterrupted, STEPS)
    saving = build_trainer()
    steps = train(saving, STEPS_BEFORE_RESUME)
    saving.save()
    saving.checkpointer.finish()
    resumed = build_trainer()
    checkpoint = RunFolder(Path(run)).checkpoint(STEPS_BEFORE_RESUME)
    assert load.find_damage(checkpoint) is None
    resumed.resume(checkpoint)
    steps += train(resumed, STEPS - STEPS_BEFORE_RESUME)
    state, resumed_state = get_state(uninterrupted), get_state(resumed)
    differing = [key for key, tensor in state.items() if not tensor.equal(resumed_state[key])]
    return {"steps": expected, "same": expected == steps, "differing": differing}


@pytest.mark.deep
@pytest.mark.distributed
def test_dropout_resumes_to_the_bit(ranks: Any, job: Any, packed_data: Any, tmp_path: Path) -> None:
    runs = {"dropout": {"dropout": 0.1}, "recomputed": {"dropout": 0.1, "recompute": True},
            "no dropout": {"dropout": 0.0}}
    results = ranks(*(
        job(__file__, "train_with_resume", 1, {
            "data": str(packed_data.text), "run": str(tmp_path / name), **arguments})
        for name, arguments in runs.items()))
    losses = {}
    for name, (result,) in zip(runs, results, strict=True):
        assert result["same"] and result["differing"] == [], name
        losses[name] = [loss for loss, _ in result["steps"]]
    assert losses["recomputed"] == losses["dropout"]
    assert all(abs(a - b) > 1e-6 for a, b in zip(losses["dropout"], losses["no dropout"], strict=True))


DRAWN_STEPS = [(1, 0), (1, 1), (2, 0), (1, 0)]
"""Seed of the run and step of each draw; the last repeats the first."""


def draw_at_steps() -> list[list[list[float]]]:
    """Inside ranks, tp = 2: draw from the default and from the tensor-parallel generator at each step."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    world.join_world(ParallelConfig(tp=2))
    draws = []
    for seed, step in DRAWN_STEPS:
        rng.seed_step(seed, step)
        with get_cuda_rng_tracker().fork():
            tensor_parallel_draw = torch.rand(2).tolist()
        draws.append([torch.rand(2).tolist(), tensor_parallel_draw])
    return draws


@pytest.mark.distributed
def test_generators_differ_where_work_is_split(ranks: Any, job: Any) -> None:
    (draws_by_rank,) = ranks(job(__file__, "draw_at_steps", 4))
    assert all(draws[0] == draws[3] for draws in draws_by_rank), "the same seed and step"
    different_draws = set()
    for i in range(3):  # the draws of `DRAWN_STEPS` without the repeated one
        default = [tuple(draws[i][0]) for draws in draws_by_rank]
        tensor_parallel = [tuple(draws[i][1]) for draws in draws_by_rank]
        assert default[0] == default[1] != default[2] == default[3], (
            "tensor-parallel neighbours apply the same dropout to activations that both have")
        assert len(set(tensor_parallel)) == 4
        different_draws |= set(default)
    assert len(different_draws) == 6  # 3 steps x 2 data-parallel ranks


# The GPU of each rank, with a replaced `torch.cuda`.

STORE_TIMEOUT = datetime.timedelta(seconds=20)


def get_rank_errors(uuids: list[str], problems: dict[int, str]) -> list[str]:
    """Check GPUs with these UUIDs on ranks that share a store; return the error of each rank, or "".

    `problems`: rank -> problem that it has found with its GPU.
    """
    store = dist.HashStore()

    def check_gpus(rank: int) -> str:
        problem = problems.get(rank, "")
        try:
            gpu_setup.check_all_gpus(store, rank, len(uuids), uuids[rank], problem, STORE_TIMEOUT)
        except UserError as e:
            return str(e)
        return ""

    with ThreadPoolExecutor(len(uuids)) as executor:
        return list(executor.map(check_gpus, range(len(uuids))))


def test_all_ranks_report_a_rank_without_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_rank_errors(["a", "b", "c"], {}) == ["", "", ""]
    assert get_rank_errors(["a", "b"], {1: "is on fire"}) == ["rank 1: its GPU is on fire"] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    (error,) = set(get_rank_errors(["a", "b", "a"], {}))
    assert "(a) is another rank's as well: LOCAL_RANK = 2 of 2 visible GPUs" in error


@pytest.mark.each(("local_rank", "count", "index"), [("3", 8, 3), ("3", 1, 0), ("5", 4, 1)])
def test_a_rank_takes_its_gpu_among_the_visible_ones(local_rank: str, count: int, index: int,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that sees only its own GPU uses GPU 0."""
    devices = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 79 * GIB))
    device = gpu_setup.select_gpu(dist.HashStore(), 0, 1, 60 * GIB, STORE_TIMEOUT)
    assert devices == [device] == [torch.device("cuda", index)]
    with pytest.raises(UserError, match=r"70\.0 of 79\.0 GiB"):
        gpu_setup.select_gpu(dist.HashStore(), 0, 1, 75 * GIB, STORE_TIMEOUT)

    def raise_busy(device: torch.device) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", raise_busy)
    with pytest.raises(UserError, match="0: its GPU cannot"):
        gpu_setup.select_gpu(dist.HashStore(), 0, 1, 0, STORE_TIMEOUT)


# Environment variables before the start of a run, and CPU affinity.

def test_variables_suit_layout_and_chip_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_variables(gpu: str, *settings: str) -> dict[str, str]:
        config = apply_settings(recipes.get("tiny-solar-open"), list(settings))
        return gpu_setup.build_run_variables(config, gpu)

    tp_overlap = ("parallel.tp=2", "parallel.sp=true")
    ep_overlap = ("parallel.ep=2", "parallel.expert_overlap=micro_batches")
    hopper, blackwell = "NVIDIA H100 80GB HBM3", "NVIDIA B200"
    connections = gpu_setup.MAX_CONNECTIONS_VARIABLE
    assert build_variables(hopper) == {
        "TORCH_NCCL_HIGH_PRIORITY": "1", connections: "32", "NCCL_NVLS_ENABLE": "0"}
    assert build_variables(hopper, *tp_overlap)[connections] == "1"
    assert build_variables(hopper, "parallel.cp=2")[connections] == "1"
    assert build_variables(blackwell, *tp_overlap)[connections] == "32"
    assert build_variables(hopper, *tp_overlap, *ep_overlap)[connections] == "32"
    assert build_variables(hopper, *ep_overlap)["NVTE_BWD_LAYERNORM_SM_MARGIN"] == "16"
    deepep_variables = build_variables(hopper, *ep_overlap, "parallel.expert_dispatcher=deepep")
    assert deepep_variables["NVTE_FWD_LAYERNORM_SM_MARGIN"] == "20"
    assert build_variables(hopper, "gpu.nccl_user_buffers=on")["NCCL_NVLS_ENABLE"] == "1"
    assert build_variables(hopper, 'gpu.cuda_graphs=["moe_router"]')["NCCL_GRAPH_REGISTER"] == "0"

    monkeypatch.setattr(gpu_setup, "list_visible_gpus", lambda: [SimpleNamespace(name=hopper)])
    for name in build_variables(hopper, *ep_overlap):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    ep_config = apply_settings(recipes.get("tiny-solar-open"), [*ep_overlap])
    gpu_setup.set_run_variables(ep_config)
    assert (os.environ["NCCL_NVLS_ENABLE"], os.environ["TORCH_NCCL_HIGH_PRIORITY"]) == ("1", "1")
    # A second run in this process replaces the values of the first run, but not the user's.
    gpu_setup.set_run_variables(apply_settings(recipes.get("tiny-solar-open"), [*tp_overlap]))
    assert os.environ[connections] == "1" and "NVTE_FWD_LAYERNORM_SM_MARGIN" not in os.environ
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"
    gpu_setup.set_run_variables(ep_config)
    assert os.environ[connections] == "32"
    monkeypatch.setenv(connections, "1")
    with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS=1, with which messages"):
        gpu_setup.set_run_variables(ep_config)


def test_a_process_is_bound_to_cores_near_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    affinities: list[list[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: affinities.append(sorted(cpus)),
                        raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1b, pci_device_id=0)
    gpu_setup.bind_near_gpu(gpu, tmp_path)  # no folder in sysfs yet
    gpu_folder, bridge_folder = tmp_path / "0000:1b:00.0", tmp_path / "0000:00:00.0"
    gpu_folder.mkdir()
    bridge_folder.mkdir()
    (bridge_folder / "local_cpulist").write_text("0-1\n")
    gpu_setup.bind_near_gpu(SimpleNamespace(), tmp_path)  # without PCI ids the bridge's folder would match
    for cpu_list in ("2-5,8\n", "6-7\n", "nothing\n"):
        (gpu_folder / "local_cpulist").write_text(cpu_list)
        gpu_setup.bind_near_gpu(gpu, tmp_path)
    assert affinities == [[2, 3]], "only cores near the GPU that the process may use; else nothing changes"
