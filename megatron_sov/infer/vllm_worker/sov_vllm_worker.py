"""vLLM worker extension that loads new weights from safetensors files or from a process group with the
trainer.

vLLM imports this file by name (`--worker-extension-cls sov_vllm_worker.Extension`) in its own environment, so
it imports only its neighbour `sov_weight_group` from this project.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sov_weight_group import Meeting, WeightGroup, find_local_address, read_files
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

BACKEND = "sov_files"
"""Value for `--weight-transfer-config`."""


@dataclass
class FilesInit(WeightTransferInitInfo):
    """Empty: the transfer needs no initialization."""


@dataclass
class FilesUpdate(WeightTransferUpdateInfo):
    """Source for new weights under Hugging Face names."""

    files: list[str] = field(default_factory=list)
    """Safetensors files that together contain the whole model."""
    group: dict[str, Any] | None = None
    """`Meeting` fields if weights are sent over a process group."""


class FilesEngine(WeightTransferEngine[FilesInit, FilesUpdate]):
    """Loads whole models."""

    init_info_cls, update_info_cls = FilesInit, FilesUpdate
    _group: WeightGroup | None = None

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        """Do nothing: each update creates a new group."""

    def start_weight_update(self) -> None:
        # Restores the file shapes of weights that were packed for a kernel, layer by layer.
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdate) -> None:
        try:
            if update_info.group is None:
                self.model.load_weights(read_files(update_info.files))
            else:
                self._receive_group(Meeting(**update_info.group))
        except BaseException:
            self._close_group()
            # vLLM 0.32 would treat the received tensors as the beginning of the next update
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def _receive_group(self, meeting: Meeting) -> None:
        config, device = self.parallel_config, torch.device("cpu")
        self._close_group()
        # keep the group until every worker has finished: closing the group would break slower transfers
        self._group = WeightGroup(
            meeting, 1 + config.data_parallel_index * config.world_size + config.rank,
            find_local_address(meeting.host, meeting.port),
            self.device if meeting.backend == "nccl" else device)
        tensors = self._group.receive()
        self.model.load_weights(tensors)
        # every worker must take part in every broadcast, even if the worker needs no further tensor
        for _ in tensors:
            pass

    def finish_weight_update(self) -> None:
        self._close_group()
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._close_group()

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None


class Extension:
    """Mixed into vLLM's worker; vLLM needs only the module's import."""


_setup_kernel = UnquantizedFusedMoEMethod._setup_kernel


def _setup_new_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
    # On CPUs, vLLM 0.32 packs experts only until the kernel exists, and would silently ignore updated
    # experts.
    self.moe_kernel = None
    return _setup_kernel(self, *args, **kwargs)


if current_platform.is_cpu():  # on GPUs, CUDA graphs hold addresses of the first kernel's tensors
    UnquantizedFusedMoEMethod._setup_kernel = _setup_new_kernel
WeightTransferEngineFactory.register_engine(BACKEND, FilesEngine)
