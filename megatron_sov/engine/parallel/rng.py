"""Randomness inside a step as a function of (seed, step, place): nothing has to be
stored to go on exactly."""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_sov.engine.parallel import collectives


def reseed(seed: int, step: int) -> None:
    """Seed torch and the library's tensor-parallel generators for one optimizer step.

    Processes that read the same data at the same pipeline stage share the default generator (what tensor
    parallelism does not split is dropped alike there); the library's own generators differ
    among them by offsets.
    """
    data_rank, _ = collectives.data_place()
    place = f"{seed}:{step}:{data_rank}:{parallel_state.get_pipeline_model_parallel_rank()}"
    # room for the offsets in 63 bits
    drawn = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest(), "little")
    torch.manual_seed(drawn)
    tensor_parallel.model_parallel_cuda_manual_seed(drawn)
