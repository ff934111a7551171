"""Takes new weights into vLLM's workers: out of safetensors files, which a trainer puts into shared memory,
or over a group with the trainer.

Imported by vLLM (`--worker-extension-cls sov_vllm_worker.Extension`) in its own environment, by the name of
this file alone: of the project its neighbour alone is imported, since transformers may be another version.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sov_weight_group import Meeting, WeightGroup, own_host, read_files
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

BACKEND = "sov_files"
"""Of `--weight-transfer-config`."""


@dataclass
class FilesInit(WeightTransferInitInfo):
    """Nothing is agreed beforehand."""


@dataclass
class FilesUpdate(WeightTransferUpdateInfo):
    """Weights by their Hugging Face names."""

    files: list[str] = field(default_factory=list)
    """Safetensors, all tensors of the model together."""
    group: dict[str, Any] | None = None
    """Where they are sent instead, as `Meeting` has it."""


class FilesEngine(WeightTransferEngine[FilesInit, FilesUpdate]):
    """Takes whole models."""

    init_info_cls, update_info_cls = FilesInit, FilesUpdate
    _group: WeightGroup | None = None

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        """Do nothing: a group is made with each update."""

    def start_weight_update(self) -> None:
        # weights that were packed for a kernel get the shapes of files again, layer by layer
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdate) -> None:
        try:
            if update_info.group is None:
                self.model.load_weights(read_files(update_info.files))
            else:
                self._receive(Meeting(**update_info.group))
        except BaseException:
            self._leave()
            # vLLM 0.32 would take what has come for the beginning of the next update, and mix both
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def _receive(self, meeting: Meeting) -> None:
        own, device = self.parallel_config, torch.device("cpu")
        self._leave()
        # held until all have all: a worker that leaves must not take away what another one still reads
        self._group = WeightGroup(
            meeting, 1 + own.data_parallel_index * own.world_size + own.rank,
            own_host(meeting.host, meeting.port), self.device if meeting.backend == "nccl" else device)
        sent = self._group.receive()
        self.model.load_weights(sent)
        for _ in sent:  # all take as many steps, also a worker whose part ends before
            pass

    def finish_weight_update(self) -> None:
        self._leave()
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None


class Extension:
    """What vLLM mixes into its worker; importing this module is all that is wanted of it."""


_setup_kernel = UnquantizedFusedMoEMethod._setup_kernel


def _setup_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    # on a CPU vLLM 0.32 packs experts for its kernel where there is no kernel yet, so those of an update
    # would be passed over without a word
    self.moe_kernel = None
    return _setup_kernel(self, *args, **kwargs)


if current_platform.is_cpu():  # graphs of a GPU hold addresses of the first kernel's tensors
    UnquantizedFusedMoEMethod._setup_kernel = _setup_anew
WeightTransferEngineFactory.register_engine(BACKEND, FilesEngine)
