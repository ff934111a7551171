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
CALLS: list[str] = []


class VllmBase:
    """Double of vLLM's engine class, which our extension subclasses."""

    def __class_getitem__(cls, _: object) -> type:
        return cls


class Model:
    """Model that loads tensors until `ends_at`, and fails at `fails_at`."""

    def __init__(self, ends_at: str = "", fails_at: str = "") -> None:
        self.ends_at, self.fails_at = ends_at, fails_at
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if name == self.fails_at:
                raise KeyError(name)
            self.loaded[name] = tensor
            if name == self.ends_at:
                return


class ExpertKernel:
    """Double of vLLM's setup of expert kernels; records the kernel that existed before."""

    moe_kernel: Any = "first"

    def _setup_kernel(self) -> None:
        CALLS.append(str(self.moe_kernel))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> type:
    """Create the engine as vLLM's worker does, with only the worker's folder on its path; parametrized by
    GPU."""
    CALLS.clear()
    factory = types.SimpleNamespace(register_engine=lambda name, made: REGISTERED.update({name: made}))
    monkeypatch.setattr(ExpertKernel, "_setup_kernel", ExpertKernel._setup_kernel)
    platform = types.SimpleNamespace(is_cpu=lambda: not getattr(request, "param", False))
    modules: dict[str, dict[str, Any]] = {
        "distributed.weight_transfer.base": {"WeightTransferEngine": VllmBase,
                                             "WeightTransferInitInfo": VllmBase,
                                             "WeightTransferUpdateInfo": VllmBase},
        "distributed.weight_transfer.factory": {"WeightTransferEngineFactory": factory},
        "model_executor.layers.fused_moe.unquantized_fused_moe_method": {
            "UnquantizedFusedMoEMethod": ExpertKernel},
        "platforms": {"current_platform": platform},
        "model_executor.model_loader.reload": {
            "initialize_layerwise_reload": lambda *_: CALLS.append("initialized"),
            "finalize_layerwise_reload": lambda *_: CALLS.append("finalized")}}
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


def build_worker(engine: type, model: Model, rank: int = 0, world_size: int = 1, copy: int = 0) -> Any:
    result = engine()
    result.model, result.model_config, result.device = model, None, CPU
    result.parallel_config = types.SimpleNamespace(rank=rank, world_size=world_size, data_parallel_index=copy)
    return result


def send_weights(workers: list[Any], tensors: dict[str, torch.Tensor]) -> list[BaseException | None]:
    """Send tensors to workers that receive in a thread each; return the error of each worker, or None."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = Meeting("127.0.0.1", store.port, 1 + len(workers), "gloo", 30)
    errors: list[BaseException | None] = [None] * len(workers)

    def receive(index: int) -> None:
        try:
            update = workers[index].update_info_cls(group=asdict(meeting))
            workers[index].start_weight_update()
            workers[index].receive_weights(update)
        except BaseException as e:
            errors[index] = e

    threads = [threading.Thread(target=receive, args=[index]) for index in range(len(workers))]
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
    return errors


def test_all_workers_of_all_replicas_receive_weights(engine: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.infer.vllm_worker.sov_weight_group.BUCKET_BYTES", 16)
    tensors = {name: torch.full((4,), float(index)) for index, name in enumerate("abcd")}
    models = [Model(), Model(ends_at="b"), Model(), Model()]
    workers = [build_worker(engine, model, rank, 2, copy)
               for model, (copy, rank) in zip(models, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True)]
    assert send_weights(workers, tensors) == [None] * 4
    for worker in workers:
        worker.finish_weight_update()
        worker.shutdown()
    assert [sorted(model.loaded) for model in models] == [list("abcd"), list("ab"), list("abcd"),
                                                          list("abcd")]
    assert torch.equal(models[3].loaded["c"], torch.full((4,), 2.0))
    assert CALLS == ["initialized"] * 4 + ["finalized"] * 4


def test_partial_update_is_discarded(engine: type, tmp_path: Path) -> None:
    # Larger than the socket buffers, so that sending blocks without a receiver.
    tensors = {"a": torch.ones(1), "b": torch.ones(1 << 22), "c": torch.ones(1 << 22)}
    failing_worker = build_worker(engine, Model(fails_at="a"))
    [error] = send_weights([failing_worker], tensors)
    assert isinstance(error, KeyError) and CALLS == ["initialized", "finalized"]
    save_file(tensors, tmp_path / "w")
    with pytest.raises(KeyError):
        failing_worker.receive_weights(failing_worker.update_info_cls(files=[str(tmp_path / "w")]))
    assert CALLS == ["initialized", "finalized", "finalized"]
    worker = build_worker(engine, Model())
    worker.receive_weights(worker.update_info_cls(files=[str(tmp_path / "w")]))
    assert sorted(worker.model.loaded) == ["a", "b", "c"]


@pytest.mark.parametrize(("engine", "kernel_before"), [(False, "None"), (True, "first")], indirect=["engine"])
def test_expert_kernels_are_rebuilt_on_cpus_only(engine: type, kernel_before: str) -> None:
    # On GPUs, CUDA graphs still read the tensors of the first kernel.
    ExpertKernel()._setup_kernel()
    assert [kernel_before] == CALLS
