"""Seeds random generators from (seed, step, rank), so that resume needs no generator state."""

import hashlib

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_sov.engine.parallel import collectives


def seed_step(seed: int, step: int) -> None:
    """Seed torch's and Megatron-Core's generators for one optimizer step.

    Processes with the same data and pipeline stage share the default generator, so that dropout is equal
    where tensor parallelism does not split; Megatron-Core's own generators differ among them by offsets."""
    data_rank, _ = collectives.get_data_rank()
    seed_text = f"{seed}:{step}:{data_rank}:{parallel_state.get_pipeline_model_parallel_rank()}"
    # 7 bytes leave room for the offsets in 63 bits
    derived_seed = int.from_bytes(hashlib.blake2b(seed_text.encode(), digest_size=7).digest(), "little")
    torch.manual_seed(derived_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(derived_seed)
