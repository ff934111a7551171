"""A Hugging Face folder becomes a checkpoint that any layout can load; one tensor (of experts: one expert's) is read at a time.

The checkpoint's writer collects what it is given into files of at most `mcore.tensors.MAX_FILE_BYTES`; so much stays in memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from megatron_sov.artifacts import MANIFEST, new_artifact, refuse_existing
from megatron_sov.config import RunConfig
from megatron_sov.convert.companions import carry, ids_in
from megatron_sov.convert.sources import HfWeights
from megatron_sov.errors import UserError
from megatron_sov.mcore.tensors import TensorWriter, write_index
from megatron_sov.models.weights import Link


def from_hf(hf_dir: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Write a Hugging Face folder as a checkpoint (part "model", step 0); dtypes stay, router biases become float32.

    Args:
        hf_dir: a folder with config.json and safetensors files.
        out: the checkpoint to write; it appears only when complete.
        overwrite: replace a checkpoint that is already there.

    Raises:
        UserError: the config has fields that we do not honour, or the tensors are not exactly those of its model.
    """
    hf_dir, out = Path(hf_dir), Path(out)
    refuse_existing(out, "checkpoint", overwrite)
    if not (hf_dir / "config.json").is_file():
        raise UserError(f"{hf_dir}: has no config.json, so it is not a Hugging Face folder; pass the folder that holds the model")
    source = HfWeights(hf_dir)
    _check_dtypes(source)
    with new_artifact(out, "checkpoint", overwrite=overwrite) as artifact:
        writer = TensorWriter(artifact.path, "model")
        for link in tqdm(source.links, desc="from-hf", unit="block", disable=None):
            writer.add(link.key, _block(source, link), link.shape, link.offset)
        write_index(artifact.path, "model", [writer.finish()])
        carry(hf_dir, artifact.path / "tokenizer", ids_in(source.config))
        if (hf_dir / MANIFEST).is_file():
            artifact.add_input(hf_dir)
        artifact.content = {"step": 0, "parts": ["model"], "tokens": 0}
        artifact.settings = RunConfig(recipe="from-hf", model=source.model).to_dict()


def _block(source: HfWeights, link: Link) -> torch.Tensor:
    block: torch.Tensor = link.join({name: source.read(name) for name in link.hf_names})
    return block.float() if link.fp32 else block


def _check_dtypes(source: HfWeights) -> None:
    """Refuse tensors of different dtypes where they become one tensor (query and key, all experts of a layer)."""
    first: dict[str, str] = {}
    for link in source.links:
        for name in link.hf_names:
            other = first.setdefault(link.key, name)
            if source.dtype(name) != source.dtype(other):
                raise UserError(f"{source.path}: {name} has dtype {source.dtype(name)} and {other} {source.dtype(other)}, "
                                "but they become one tensor; save the model in one dtype")
