"""A process's part of a model without memory for it: built on meta tensors,
in one process that plays any rank of any size."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.config import RunConfig
from megatron_sov.mcore.parallel import cpu_shims


@dataclass(frozen=True)
class StageParams:
    """Parameters that one process of a pipeline stage holds."""

    dense: int
    """Those that every data-parallel process has: attention, norms, routers, shared experts, embeddings."""
    experts: int
    """Those of its routed experts."""
    layers: int
    """Layers of the trunk on it, and multi-token prediction layers."""


def stage_params(config: RunConfig, num_ranks: int) -> list[StageParams]:
    """Return what the first process of each pipeline stage holds, from the very modules that training builds.

    Must run in a process that is in no process group; nothing is sent anywhere.
    """
    cpu_shims.prepare_megatron()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_sov.mcore.model.language_model import build

    p = config.parallel
    found = []
    for stage in range(p.pp):
        dist.init_process_group("fake", rank=stage * (num_ranks // p.pp), world_size=num_ranks,
                                store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(
                p.tp, p.pp, p.vpp if p.vpp > 1 else None, context_parallel_size=p.cp,
                expert_model_parallel_size=p.ep, expert_tensor_parallel_size=p.etp,
                create_gloo_process_groups=False)
            with torch.device("meta"):
                model = build(config.model, p, config.train)
            experts = sum(w.numel() for w in model.parameters() if not getattr(w, "allreduce", True))
            total = sum(w.numel() for w in model.parameters())
            layers = sum(len(c.decoder.layers) + (len(c.mtp.layers) if c.mtp_process else 0)
                         for c in model.chunks)
            found.append(StageParams(total - experts, experts, layers))
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return found
