"""A `torch_dist` checkpoint built from torch classes, so that any part can be damaged."""

import argparse
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties,
    TensorStorageMetadata)

from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families import supported as models

MODEL = ModelConfig("llama", vocab_size=16, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1,
                    head_dim=4, dense_ffn_dim=12, num_experts=0, num_shared_experts=0, rope_theta=1e4,
                    norm_eps=1e-6, max_position_tokens=32)
FILE = "__0_0.distcp"
ARGS = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 1, "kv_channels":
        4, "group_query_attention": True, "ffn_hidden_size": 12, "swiglu": True, "normalization": "RMSNorm",
        "norm_epsilon": 1e-6, "add_bias_linear": False, "position_embedding_type": "rope", "rotary_base":
        10000, "untie_embeddings_and_output_weights": True, "vocab_size": 16, "max_position_embeddings": 32}


def tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of the model under Megatron's keys."""
    generator = torch.Generator().manual_seed(0)
    return {link.key: torch.randn(link.shape, generator=generator)
            for link in models.get_family("llama").links(MODEL)}


def checkpoint(folder: Path, training: Mapping[str, Any] | None = None) -> Metadata:
    """Write a valid checkpoint in which each tensor is one piece; return its index. `training`: further
    entries of common.pt, for a checkpoint with AdamW's state."""
    folder.mkdir(parents=True)
    state, stored, raw = {}, {}, io.BytesIO()
    moments = {} if training is None else {
        f"optimizer.state.{name}.{key}": tensor for key, tensor in tensors().items()
        for name in ("exp_avg", "exp_avg_sq", "fp32_param")}
    for key, tensor in {**tensors(), **moments}.items():
        start, origin = raw.tell(), torch.Size([0] * tensor.dim())
        torch.save(tensor, part := io.BytesIO())
        raw.write(part.getvalue())
        state[key] = TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), tensor.shape,
                                           [ChunkStorageMetadata(origin, tensor.shape)])
        stored[MetadataIndex(key, origin, 0)] = _StorageInfo(FILE, start, raw.tell() - start)
    state["decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"] = BytesStorageMetadata()
    (folder / FILE).write_bytes(raw.getvalue())
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist",
                                                      "sharded_backend_version": 1}))
    torch.save({"args": argparse.Namespace(**ARGS), "iteration": 3, **(training or {})}, folder / "common.pt")
    index = Metadata(state, storage_data=stored)
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    """Pickle an index as torch does."""
    (folder / ".metadata").write_bytes(pickle.dumps(index))
