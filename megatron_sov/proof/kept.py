"""A checkpoint of a layout beside one of one process: each holds every tensor once, with the same numbers,
and a layout reads what one process wrote.

What stands in files belongs to no layout, so that what one layout wrote, any other that is proved reads.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_sov.base.artifacts import ArtifactWriter
from megatron_sov.checkpoint.host_snapshot import Snapshot, WrittenSnapshot
from megatron_sov.checkpoint.load import load_model, load_optimizer
from megatron_sov.checkpoint.sharded_tensors import TensorReader, write_index
from megatron_sov.engine.model.local_shards import local_shards
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.runs.checkpoints import KIND, MODEL
from megatron_sov.train.trainer import Trainer

OPTIMIZER = "optimizer"


def write(trainer: Trainer, place: ParallelWorld, folder: Path) -> None:
    """Write the tensors of a checkpoint; called by all processes together.

    Raises:
        ValueError: an element of a tensor is written by nobody, or by several.
    """
    snapshot = Snapshot()
    snapshot.take({MODEL: local_shards(trainer.model, rounded=True),
                   OPTIMIZER: trainer.optimizer.state_shards()}, changes=False)
    snapshot.write(folder, place.rank)
    torch.distributed.barrier()
    if place.is_main:
        written = [WrittenSnapshot.read(folder, rank) for rank in range(place.size)]
        for part in (MODEL, OPTIMIZER):
            write_index(folder, part, [index for one in written for index in one.indices[part]])
        artifact = ArtifactWriter(folder, KIND)
        artifact.known_files = {name: record for one in written for name, record in one.files.items()}
        artifact.content = {"step": trainer.optimizer.num_updates, "parts": [MODEL, OPTIMIZER]}
        artifact.complete()
    torch.distributed.barrier()


def read(trainer: Trainer, folder: Path, num_updates: int) -> None:
    """Give a model and its optimizer what `write` wrote, by whatever layout; called by all processes
    together.

    Args:
        trainer: whose.
        folder: with the tensors.
        num_updates: that the optimizer had made.

    Raises:
        UserError: it has other tensors, or of other shapes.
    """
    load_model(folder, trainer.model)
    load_optimizer(folder, trainer.optimizer, num_updates)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that `write` wrote, whole, by the names that `proving` has for them."""
    found = {}
    for part, before in ((MODEL, "weights/"), (OPTIMIZER, "")):
        reader = TensorReader(folder, part)
        found |= {before + key: reader.read(key, (0,) * len(reader.shape(key)), reader.shape(key))
                  for key in sorted(reader.keys())}
    return found
