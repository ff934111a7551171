"""The worker extension that receives policy weights inside vLLM."""

import importlib
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sov.infer.engines.server_process import BACKEND, EXTENSION, WORKER_FOLDER
from megatron_sov.infer.vllm_worker.sov_weight_group import Meeting, WeightGroup

CPU = torch.device("cpu")
REGISTERED: dict[str, type] = {}
DONE: list[str] = []


class Base:
    """The part of vLLM's engine class that our subclass uses."""

    def __class_getitem__(cls, _: object) -> type:
        return cls


class Model:
    """Model that loads tensors until `ends_at`, and fails at `fails_at`."""

    def __init__(self, ends_at: str = "", fails_at: str = "") -> None:
        self.ends_at, self.fails_at = ends_at, fails_at
        self.taken: dict[str, torch.Tensor] = {}

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if name == self.fails_at:
                raise KeyError(name)
            self.taken[name] = tensor
            if name == self.ends_at:
                return


class Kernel:
    """vLLM's expert kernel setup, recording whether a kernel existed."""

    moe_kernel: Any = "first"

    def _setup_kernel(self) -> None:
        DONE.append(str(self.moe_kernel))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> type:
    """Create the engine as vLLM's worker does, with only the worker's folder on its path; parametrized by
    GPU."""
    DONE.clear()
    factory = types.SimpleNamespace(register_engine=lambda name, made: REGISTERED.update({name: made}))
    monkeypatch.setattr(Kernel, "_setup_kernel", Kernel._setup_kernel)
    platform = types.SimpleNamespace(is_cpu=lambda: not getattr(request, "param", False))
    modules: dict[str, dict[str, Any]] = {
        "distributed.weight_transfer.base": {"WeightTransferEngine": Base, "WeightTransferInitInfo": Base,
                                             "WeightTransferUpdateInfo": Base},
        "distributed.weight_transfer.factory": {"WeightTransferEngineFactory": factory},
        "model_executor.layers.fused_moe.unquantized_fused_moe_method": {"UnquantizedFusedMoEMethod": Kernel},
        "platforms": {"current_platform": platform},
        "model_executor.model_loader.reload": {
            "initialize_layerwise_reload": lambda *_: DONE.append("initialized"),
            "finalize_layerwise_reload": lambda *_: DONE.append("finalized")}}
    for name, content in modules.items():
        module = types.ModuleType(f"vllm.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(str(WORKER_FOLDER))
    module_name, _, extension = EXTENSION.partition(".")
    for name in (module_name, "sov_weight_group"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert hasattr(importlib.import_module(module_name), extension)
    return REGISTERED[BACKEND]


def worker(engine: type, model: Model, rank: int = 0, world_size: int = 1, copy: int = 0) -> Any:
    result = engine()
    result.model, result.model_config, result.device = model, None, CPU
    result.parallel_config = types.SimpleNamespace(rank=rank, world_size=world_size, data_parallel_index=copy)
    return result


def send(workers: list[Any], tensors: dict[str, torch.Tensor]) -> list[BaseException | None]:
    """Send tensors to workers, one thread each; return their results."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = Meeting("127.0.0.1", store.port, 1 + len(workers), "gloo", 30)
    ended: list[BaseException | None] = [None] * len(workers)

    def receive(place: int) -> None:
        try:
            update = workers[place].update_info_cls(group=asdict(meeting))
            workers[place].start_weight_update()
            workers[place].receive_weights(update)
        except BaseException as e:
            ended[place] = e

    threads = [threading.Thread(target=receive, args=[place]) for place in range(len(workers))]
    for thread in threads:
        thread.start()
    group = WeightGroup(meeting, 0, "127.0.0.1", CPU, store)
    try:
        group.send(iter(tensors.items()), threading.Event())
    except RuntimeError:
        group.close()
        del group
    for thread in threads:
        thread.join()
    return ended


def test_all_workers_of_all_replicas_receive_weights(engine: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.infer.vllm_worker.sov_weight_group.BUCKET_BYTES", 16)
    tensors = {name: torch.full((4,), float(place)) for place, name in enumerate("abcd")}
    models = [Model(), Model(ends_at="b"), Model(), Model()]
    workers = [worker(engine, model, rank, 2, copy)
               for model, (copy, rank) in zip(models, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True)]
    assert send(workers, tensors) == [None] * 4
    for one in workers:
        one.finish_weight_update()
        one.shutdown()
    assert [sorted(model.taken) for model in models] == [list("abcd"), list("ab"), list("abcd"), list("abcd")]
    assert torch.equal(models[3].taken["c"], torch.full((4,), 2.0))
    assert DONE == ["initialized"] * 4 + ["finalized"] * 4


def test_partial_update_is_discarded(engine: type, tmp_path: Path) -> None:
    # more than socket buffers hold, so that sending blocks without a receiver
    tensors = {"a": torch.ones(1), "b": torch.ones(1 << 22), "c": torch.ones(1 << 22)}
    broken = worker(engine, Model(fails_at="a"))
    [error] = send([broken], tensors)
    assert isinstance(error, KeyError) and DONE == ["initialized", "finalized"]
    save_file(tensors, tmp_path / "w")
    with pytest.raises(KeyError):
        broken.receive_weights(broken.update_info_cls(files=[str(tmp_path / "w")]))
    assert DONE == ["initialized", "finalized", "finalized"]
    whole = worker(engine, Model())
    whole.receive_weights(whole.update_info_cls(files=[str(tmp_path / "w")]))
    assert sorted(whole.model.taken) == ["a", "b", "c"]


@pytest.mark.parametrize(("engine", "seen"), [(False, "None"), (True, "first")], indirect=["engine"])
def test_expert_kernels_are_rebuilt_on_cpus_only(engine: type, seen: str) -> None:
    # CUDA graphs keep reading the tensors of the first kernel
    Kernel()._setup_kernel()
    assert [seen] == DONE
