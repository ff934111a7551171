"""Settings before CUDA starts; tests/layouts/test_precision.py shows that runs repeat."""

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
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.loop import train_step
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.trainer import Trainer
from megatron_sov.work.clusters.units import GIB


@pytest.fixture(autouse=True)
def _left_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
    assert (torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled())
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


# Randomness is a function of seed and step: a run in two pieces equals one run, without stored generator
# states.

STEPS, FIRST = 2, 1


def pieces(data: str, run: str, layout: dict[str, Any], dropout: float,
           recompute: bool = False) -> dict[str, Any]:
    """Train once, then in two pieces with a checkpoint between; return the losses and whether all bits
    agree."""
    config = apply_settings(recipes.get("tiny-solar-open"), [
        "model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.head_dim=8",
        "model.expert_ffn_dim=16", 'data.phases=[{"name": "main", "seq_len": 32}]',
        "train.global_batch_size=4", "train.micro_batch_size=2", f"train.steps={STEPS}",
        f"train.hidden_dropout={dropout}", f"train.recompute={str(recompute).lower()}",
        *(f"parallel.{k}={str(v).lower()}" for k, v in layout.items())])
    place = world.join_world(ParallelConfig(**layout))
    folder = RunFolder(Path(run))
    if place.is_main:
        folder.create()
        folder.declare(config)
    dist.barrier()

    def trainer() -> Any:
        return Trainer(config, place, folder, open_sources({data: 1.0}, 368), LanguageModelling)

    def steps(trainer: Any, count: int) -> list[tuple[float, float]]:
        results = [train_step(trainer) for _ in range(count)]
        return [(r.loss, r.grad_norm) for r in results]

    whole = trainer()
    expected = steps(whole, STEPS)
    first = trainer()
    found = steps(first, FIRST)
    first.save()
    first.checkpointer.finish()
    second = trainer()
    assert load.find_damage(folder.checkpoint(FIRST)) is None
    second.resume(folder.checkpoint(FIRST))
    found += steps(second, STEPS - FIRST)
    tensors = [{b.key: b.data for b in [*list_local_shards(t.model), *t.optimizer.state_shards()]}
               for t in (whole, second)]
    differing = [key for key, value in tensors[0].items() if not value.equal(tensors[1][key])]
    world.leave_world()
    return {"losses": expected, "same": expected == found, "differing": differing}


@pytest.mark.deep
@pytest.mark.distributed
def test_dropout_resumes_to_the_bit(ranks: Any, job: Any, packed_data: Any, tmp_path: Path) -> None:
    runs = {"alone": (1, {}, 0.1), "recomputed": (1, {}, 0.1, True), "without": (1, {}, 0.0)}
    result = dict(zip(runs, ranks(*(
        job(__file__, "pieces", nproc, {"data": str(packed_data.text), "run": str(tmp_path / name),
                                        "layout": layout, "dropout": dropout, "recompute": bool(more)})
        for name, (nproc, layout, dropout, *more) in runs.items())), strict=True))
    for name, results in result.items():
        assert all(r["same"] and r["differing"] == [] for r in results), name
        assert all(r["losses"] == results[0]["losses"] for r in results), name
    losses = {name: [loss for loss, _ in results[0]["losses"]] for name, results in result.items()}
    assert losses["recomputed"] == losses["alone"]
    assert all(abs(a - b) > 1e-6 for a, b in zip(losses["alone"], losses["without"], strict=True))


def draws() -> list[Any]:
    """Return draws of the default and the tensor-parallel generator at some steps, at tp = 2."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    world.join_world(ParallelConfig(tp=2))
    found = []
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        rng.seed_step(seed, step)
        with get_cuda_rng_tracker().fork():
            split = torch.rand(2).tolist()
        found.append([torch.rand(2).tolist(), split])
    world.leave_world()
    return found


@pytest.mark.distributed
def test_generators_differ_where_work_is_split(ranks: Any, job: Any) -> None:
    (found,) = ranks(job(__file__, "draws", 4))
    assert all(rank[0] == rank[3] for rank in found), "the same step again"
    for at in range(3):
        shared, split = ([rank[at][kind] for rank in found] for kind in (0, 1))
        assert shared[0] == shared[1] != shared[2] == shared[3], (
            "tensor-parallel neighbours drop alike what they both hold")
        assert len({tuple(s) for s in split}) == 4
    assert len({tuple(rank[at][0]) for rank in found for at in range(3)}) == 6


# The GPU of each rank, with a double of `torch.cuda`.

SOON = datetime.timedelta(seconds=20)


def get_rank_errors(uuids: list[str], problems: dict[int, str]) -> list[str]:
    """Return the error of each rank; the ranks share a store."""
    store = dist.HashStore()

    def rank(number: int) -> str:
        try:
            problem = problems.get(number, "")
            gpu_setup.check_all_gpus(store, number, len(uuids), uuids[number], problem, SOON)
        except UserError as e:
            return str(e)
        return ""

    with ThreadPoolExecutor(len(uuids)) as ranks:
        return list(ranks.map(rank, range(len(uuids))))


def test_all_ranks_report_a_rank_without_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_rank_errors(["a", "b", "c"], {}) == ["", "", ""]
    assert get_rank_errors(["a", "b"], {1: "is on fire"}) == ["rank 1: its GPU is on fire"] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    (said,) = set(get_rank_errors(["a", "b", "a"], {}))
    assert "(a) is another rank's as well: LOCAL_RANK = 2 of 2 visible GPUs" in said


@pytest.mark.each(("local_rank", "count", "index"), [("3", 8, 3), ("3", 1, 0), ("5", 4, 1)])
def test_a_rank_takes_its_gpu_among_the_visible_ones(local_rank: str, count: int, index: int,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that sees only its own GPU uses GPU 0."""
    taken = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 79 * GIB))
    device = gpu_setup.select_gpu(dist.HashStore(), 0, 1, 60 * GIB, SOON)
    assert taken == [device] == [torch.device("cuda", index)]
    with pytest.raises(UserError, match=r"70\.0 of 79\.0 GiB"):
        gpu_setup.select_gpu(dist.HashStore(), 0, 1, 75 * GIB, SOON)

    def busy(device: torch.device) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(UserError, match="0: its GPU cannot"):
        gpu_setup.select_gpu(dist.HashStore(), 0, 1, 0, SOON)


# Environment variables before the start of a run, and CPU affinity.


def test_variables_suit_layout_and_chip_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(gpu: str, *settings: str) -> dict[str, str]:
        return gpu_setup.build_run_variables(apply_settings(recipes.get("tiny-solar-open"), list(settings)),
                                           gpu)

    halves, passes = ("parallel.tp=2", "parallel.sp=true"), ("parallel.ep=2",
                                                             "parallel.expert_overlap=micro_batches")
    hopper, blackwell = "NVIDIA H100 80GB HBM3", "NVIDIA B200"
    assert of(hopper) == {"TORCH_NCCL_HIGH_PRIORITY": "1", gpu_setup.MAX_CONNECTIONS_VARIABLE: "32",
                          "NCCL_NVLS_ENABLE": "0"}
    connections = gpu_setup.MAX_CONNECTIONS_VARIABLE
    assert of(hopper, *halves)[connections] == "1" == of(hopper, "parallel.cp=2")[connections]
    assert of(blackwell, *halves)[connections] == "32" == of(hopper, *halves, *passes)[connections]
    assert of(hopper, *passes)["NVTE_BWD_LAYERNORM_SM_MARGIN"] == "16"
    assert of(hopper, *passes, "parallel.expert_dispatcher=deepep")["NVTE_FWD_LAYERNORM_SM_MARGIN"] == "20"
    assert of(hopper, "gpu.nccl_user_buffers=on")["NCCL_NVLS_ENABLE"] == "1"
    assert of(hopper, 'gpu.cuda_graphs=["moe_router"]')["NCCL_GRAPH_REGISTER"] == "0"

    monkeypatch.setattr(gpu_setup, "list_visible_gpus", lambda: [SimpleNamespace(name=hopper)])
    for name in of(hopper, *passes):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    config = apply_settings(recipes.get("tiny-solar-open"), [*passes])
    gpu_setup.set_run_variables(config)
    assert (os.environ["NCCL_NVLS_ENABLE"], os.environ["TORCH_NCCL_HIGH_PRIORITY"]) == ("1", "1")
    # a second run of the process replaces its own values and keeps the user's
    gpu_setup.set_run_variables(apply_settings(recipes.get("tiny-solar-open"), [*halves]))
    assert os.environ[connections] == "1" and "NVTE_FWD_LAYERNORM_SM_MARGIN" not in os.environ
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"
    gpu_setup.set_run_variables(config)
    assert os.environ[gpu_setup.MAX_CONNECTIONS_VARIABLE] == "32"
    monkeypatch.setenv(gpu_setup.MAX_CONNECTIONS_VARIABLE, "1")
    with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS=1, with which messages"):
        gpu_setup.set_run_variables(config)


def test_a_process_is_bound_to_cores_near_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: taken.append(sorted(cpus)), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1b, pci_device_id=0)
    gpu_setup.bind_near_gpu(gpu, tmp_path)
    folder = tmp_path / "0000:1b:00.0"
    folder.mkdir()
    (tmp_path / "0000:00:00.0").mkdir()  # the bridge
    (tmp_path / "0000:00:00.0" / "local_cpulist").write_text("0-1\n")
    gpu_setup.bind_near_gpu(SimpleNamespace(), tmp_path)
    for text in ("2-5,8\n", "6-7\n", "nothing\n"):
        (folder / "local_cpulist").write_text(text)
        gpu_setup.bind_near_gpu(gpu, tmp_path)
    assert taken == [[2, 3]], "of a GPU that the kernel does not know, or with none of ours, nothing changes"
