"""Takes new weights into vLLM's workers out of safetensors files, which a trainer puts into shared memory.

Imported by vLLM (`--worker-extension-cls sov_vllm_worker.Extension`) in its own environment, by the name of
this file alone: nothing of the project is imported, whose transformers may be another version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

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


class FilesEngine(WeightTransferEngine[FilesInit, FilesUpdate]):
    """Reads whole models from files."""

    init_info_cls, update_info_cls = FilesInit, FilesUpdate

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        """Do nothing: files need no group."""

    def start_weight_update(self) -> None:
        # weights that were packed for a kernel get the shapes of files again, layer by layer
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdate) -> None:
        self.model.load_weights(_tensors_of(update_info.files))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Do nothing: no file is kept open."""


def _tensors_of(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                yield name, opened.get_tensor(name)


class Extension:
    """What vLLM mixes into its worker; importing this module is all that is wanted of it."""


_setup_kernel = UnquantizedFusedMoEMethod._setup_kernel


def _setup_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    # on a CPU vLLM 0.32 packs experts for its kernel where there is no kernel yet, so those of an update
    # would be passed over without a word
    self.moe_kernel = None
    return _setup_kernel(self, *args, **kwargs)


UnquantizedFusedMoEMethod._setup_kernel = _setup_anew
WeightTransferEngineFactory.register_engine(BACKEND, FilesEngine)
